"""MutualInformationPruning: units removed by mutual information, as one callback."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mi_prune.allocation.budget import Budget, budget_of, sparsity_of
from lightning_mi_prune.calibration.activations import ActivationRecorder, Recorder
from lightning_mi_prune.calibration.calls import update_calls
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.gradients import (
    GradientRecorder,
    GradientSums,
    check_gradients,
    empty_sums,
)
from lightning_mi_prune.calibration.moments import check_moments
from lightning_mi_prune.callbacks.base import PruningCallback, as_misconfiguration, checked_options
from lightning_mi_prune.callbacks.distributed import (
    gather_ranks,
    refuse_compiled,
    sum_over_ranks,
    sum_tensor,
    world_size,
)
from lightning_mi_prune.callbacks.monitors import BestOf, MetricGuard, guard_of
from lightning_mi_prune.callbacks.resume import RunOptions, reconcile, resumed
from lightning_mi_prune.callbacks.schedule import Ramp, Schedule
from lightning_mi_prune.callbacks.sizes import begin_report, unit_cut_record
from lightning_mi_prune.callbacks.state import PendingCut, RunState, Snapshot, write_gradients
from lightning_mi_prune.callbacks.trainer import validation_batches, without_frozen
from lightning_mi_prune.checkpoint.state_dict import Find
from lightning_mi_prune.core import options
from lightning_mi_prune.core.errors import PruningError, number
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.discovery.families import find_groups, is_within, modules_without_groups
from lightning_mi_prune.discovery.graph import choose_groups, summarize_groups
from lightning_mi_prune.discovery.groups import DependencyGroup, count_parameters
from lightning_mi_prune.pipeline import PipelineOptions, decide, reconstruct
from lightning_mi_prune.pipeline import check as check_options
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reporting.report import Cut
from lightning_mi_prune.surgery.optimizer_state import check_optimizers
from lightning_mi_prune.surgery.units import check_cuttable
from lightning_mi_prune.surgery.verification import half_plan

__all__ = [
    "GradientCollection",
    "MutualInformationPruning",
    "UnitPruning",
    "copies",
    "is_scaled",
    "pooled",
    "store_gradients",
]


class GradientCollection:
    """Hooks that are up in the training steps of an epoch that ends with a choice.

    Args:
        steps: Training steps to take gradients from, over all ranks.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._recorder: GradientRecorder | None = None
        self._scale = 1.0
        self.whole = False

    def begin(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        groups: Sequence[DependencyGroup],
        plan: PruningPlan,
        run: RunState,
        index: int,
    ) -> None:
        """A training step begins; the first of an epoch begins anew."""
        if index == 0:
            self.close()
            run.felt, self.whole = None, True
        if self._recorder is None:
            batches = trainer.num_training_batches
            self.whole = self.whole and index == 0
            self._recorder = GradientRecorder(
                module,
                groups,
                steps=-(-self._steps // world_size(trainer.strategy)),
                batches=None if math.isinf(batches) else int(batches),
                plan=plan,
            )
            if run.felt is not None:  # of a run that stopped inside this epoch
                self._recorder.sums = dict(run.felt)
            run.felt = self._recorder.sums
            self._recorder.__enter__()
        # The scale of this step: the optimizer step inside it may change that of the next.
        accumulated = trainer.accumulate_grad_batches if module.automatic_optimization else 1
        self._scale = _scaler(trainer) / accumulated
        self._recorder.begin(index)

    def end(self) -> None:
        """A training step is over."""
        if self._recorder is not None:
            self._recorder.end(scale=self._scale)

    def close(self) -> None:
        """Take the hooks down; what was felt stays in the run."""
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None


def copies(felt: Mapping[str, GradientSums]) -> dict[str, GradientSums]:
    """The same sums once more."""
    return {
        key: GradientSums(s.dimension, s.units, over_units=s.over_units).unpack(s.packed())
        for key, s in felt.items()
    }


def pooled(trainer: pl.Trainer, felt: Mapping[str, GradientSums]) -> dict[str, GradientSums]:
    """What all ranks felt; every rank must call it."""
    together = copies(felt)
    sum_over_ranks(trainer.strategy, together)
    return together


def is_scaled(trainer: pl.Trainer) -> bool:
    """Whether a gradient scaler runs."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _scaler(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def store_gradients(
    trainer: pl.Trainer, felt: Mapping[str, GradientSums] | None, state: dict[str, Any] | None
) -> None:
    """Put what all ranks felt into the callback's part of a checkpoint.

    Only rank 0 writes; the others go on from nothing, so the sum over ranks is the same.
    """
    if felt is not None and state is not None and world_size(trainer.strategy) > 1:
        state["felt"] = write_gradients(pooled(trainer, felt))


class UnitPruning(PruningCallback):
    """Prunes units: neurons, heads, the width of the stream.

    Args:
        module: Path of the submodule to search for prunable networks; "" searches all.
        positions: Samples to listen to on each group in one validation run, over all ranks.
        calls: Positions of the inputs to store in it, over all ranks; 0 stores none.
        steps: Training steps to take gradients from, over all ranks; 0 takes none.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
        best_of: What monitors may compare (:func:`monitors.restart_comparison`).
        budget: What a cut may cost before it is taken back; None keeps every cut.
    """

    order: ClassVar[int] = 1

    def __init__(
        self,
        *,
        module: str,
        positions: int,
        calls: int,
        steps: int,
        seed: int,
        verbose: bool,
        best_of: BestOf,
        budget: MetricGuard | None,
    ) -> None:
        super().__init__(module=module, seed=seed, verbose=verbose, best_of=best_of, budget=budget)
        self._positions, self._calls, self._steps = positions, calls, steps
        self._feeling = GradientCollection(steps)
        self._chosen: list[DependencyGroup] = []

    @abstractmethod
    def choose(self, groups: list[DependencyGroup], modules: list[str]) -> list[DependencyGroup]:
        """The groups that may be cut; ``modules`` are those without any."""

    @abstractmethod
    def check(
        self, module: pl.LightningModule, groups: list[DependencyGroup], widths: Mapping[str, int]
    ) -> None:
        """Refuse a budget that these groups cannot meet from their present widths."""

    @abstractmethod
    def aim(self) -> str:
        """What the schedule leads to, in words; empty where it counts sparsities."""

    @override
    def finder(self) -> Find:
        return partial(find_groups, within=self._within)

    @override
    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, object]:
        tracker = self._tracked()
        mine = [group for group in tracker.graph.groups if is_within(group.name, self._within)]
        others = modules_without_groups(module, tracker.graph.groups, self._within)
        self._chosen = self.choose(without_frozen(module, mine), others)
        rank_zero_info(f"Pruning may cut {summarize_groups(self._chosen)}.")
        check_cuttable(module, self._standing, tracker.plan)
        tensors = {s.tensor for group in self._standing for s in group.tensors}
        refuse_compiled(module, {name.rpartition(".")[0] for name in tensors})
        self.warn_of_holders(trainer, module, [module.get_parameter(name) for name in tensors])
        if not self._run.fitted.epochs:
            self.report = begin_report(module, tracker, self._chosen)
        self.check_state(trainer, module)
        present = {name: len(kept) for name, kept in tracker.plan.kept.items()}
        self.check(module, self._standing, present)
        sizes = {f"the size of {group.name!r}": group.size for group in self._chosen}
        return self._options | sizes | resumed(self._run, tracker.plan)

    @override
    def reconcile(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
        asked = RunOptions(self._budget, self.aim(), self._calls, self._steps)
        surprises = reconcile(self._run, self._standing, module, self._tracked().plan, asked)
        if trainer.global_rank and self._run.felt is not None:  # rank 0 goes on with all of it
            self._run.felt = empty_sums(module, self._standing, self._tracked().plan)
        return surprises

    @override
    def plan_to_verify(self) -> PruningPlan | None:
        return half_plan(self._standing, self._tracked().plan) if self._standing else None

    @override
    def listen(self, trainer: pl.Trainer, module: pl.LightningModule) -> ActivationRecorder:
        world = world_size(trainer.strategy)
        return ActivationRecorder(
            module,
            self._standing,
            positions=-(-self._positions // world),
            batches=validation_batches(trainer),
            seed=self._seed,
            calls=-(-self._calls // world),
        )

    @override
    def hear(self, trainer: pl.Trainer, recorder: Recorder) -> CalibrationData | None:
        assert isinstance(recorder, ActivationRecorder)  # noqa: S101
        run = self._run
        run.examples = update_calls(run.examples, recorder.calls(self._standing))
        run.seconds = {"calibration": recorder.seconds}
        sum_over_ranks(trainer.strategy, recorder.moments)
        check_moments(recorder.moments)
        gradients = self._felt(trainer)
        if self._steps and gradients is None:
            return None
        heard = CalibrationData(recorder.moments, gradients)
        if self._calls:
            stored = move_tensors(recorder.stored, torch.device("cpu"))
            heard.ranks = gather_ranks(trainer.strategy, stored)
        return heard

    @override
    def describe(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        pending: PendingCut,
        before: PruningPlan,
    ) -> Cut:
        return unit_cut_record(
            trainer,
            module,
            self._run,
            self._standing,
            self._chosen,
            pending,
            before,
            self._tracked().plan,
        )

    @override
    def curves(self, module: pl.LightningModule) -> dict[str, float]:
        plan = self._tracked().plan
        widths = {f"width/{group.name}": plan.width(group.name) for group in self._chosen}
        return {"information_kept": self._run.kept, **widths}

    @override
    def sparsity(self, module: pl.LightningModule) -> float:
        plan = self._tracked().plan
        return sparsity_of(self._chosen, {a.name: plan.width(a.name) for a in self._chosen})

    @override
    def check_state(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        cut = [module.get_parameter(s.tensor) for a in self._standing for s in a.tensors]
        check_optimizers(trainer.strategy.optimizers, cut)

    @override
    def retry(self, trainer: pl.Trainer, trial: Snapshot, failed: float) -> str:
        run, every = self._run, trainer.check_val_every_n_epoch or 1
        schedule, run.schedule = run.schedule, Schedule()
        if self._budget is not None and self._budget.on_drop == "halve":
            last = int(self._end(trainer) + 1e-9) - 2
            epoch = trainer.current_epoch + 1
            run.schedule = schedule.halved(epoch, run.reached, failed, last, every)
        steps = zip(*vars(run.schedule).values(), strict=True)
        return ", ".join(f"{s:.3f} at epoch {e}" for e, s in steps) or "no further cut"

    @override
    def _named(self, goal: float) -> str:
        aim = self.aim()
        if not aim:
            return super()._named(goal)
        return aim if goal >= 1 else f"{goal:.3f} of the way to {aim}"

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        store_gradients(
            trainer, self._run.felt, checkpoint.get("callbacks", {}).get(self.state_key)
        )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._steps and self._run.heard is None and self._listens(trainer):
            known = (self._standing, self._tracked().plan)
            self._feeling.begin(trainer, pl_module, *known, self._run, batch_idx)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add what the training step let feel to the sums."""
        self._feeling.end()

    @override
    def quiet(self) -> None:
        super().quiet()
        self._feeling.close()

    def left_to_reach(self, sparsity: float) -> float:
        """Sparsity of the layers that are there which makes up for one of all: gone ones count."""
        built, standing = count_parameters(self._chosen), count_parameters(self._standing)
        return sparsity if built == standing else 1 - (1 - sparsity) * built / standing

    @property
    def _standing(self) -> list[DependencyGroup]:
        """The groups that may be cut, of the layers that are there."""
        names = {group.name for group in self._chosen}
        return [group for group in self._tracked().groups if group.name in names]

    def _felt(self, trainer: pl.Trainer) -> dict[str, GradientSums] | None:
        """What all ranks felt in this epoch; None, with a warning, where all of it was missed."""
        self._feeling.close()
        if not self._steps:
            return None
        empty = empty_sums(trainer.lightning_module, self._standing, self._tracked().plan)
        sums = pooled(trainer, self._run.felt or empty)
        missed = not any(s.counts.any() for s in sums.values())
        if missed and not (self._feeling.whole and trainer.is_last_batch):
            rank_zero_warn(
                f"The cut of epoch {trainer.current_epoch + 1} waits: no training step to take "
                "gradients from ran before the last validation of this epoch."
            )
            self._waits = True
            return None
        check_gradients(sums, scaled=is_scaled(trainer))
        return sums


class MutualInformationPruning(UnitPruning):
    """Make a network smaller while it trains, keeping the units that inform the layer above.

    Validation collects the inputs of the consumers. At the end of the epoch the units of every
    group are ranked, from the top of the network down, by their mutual information with what is
    kept above. At the start of the next epoch smaller dense layers take their place, the state of
    the optimizer follows, and training goes on.

    Args:
        sparsity: Share of the prunable parameters to remove. Above 0 and below 1, against the model
            as built. Default 0.5, unless one of the four budgets below is given.
        target_parameters: Instead: parameters of the whole module in the end.
        target_macs: Instead: multiply-accumulates of one validation example in the end.
        target_latency_ms: Instead: milliseconds of one forward pass of ``latency.batch`` examples.
            They are predicted from a table that is measured on this device.
        keep_information: Instead: share of the information with the layers above, in nats and
            summed over all groups, that stays.
        kinds: Kinds of unit to cut: ``"ffn"``, ``"heads"`` (default), ``"head_dim"`` (dimensions of
            heads), ``"pooler"``, ``"hidden"`` (the hidden size, with the word embeddings).
        module: Path of the submodule to search, such as ``"encoder"``; default: the whole module.
        include: Regular expression; only groups whose name it finds are cut.
        exclude: Regular expression; groups whose name it finds are left alone.
        widths: ``"global"`` lets the groups of all layers compete for the budget by what is lost
            for the cost that is saved, ``"uniform"`` keeps the same share everywhere.
        max_drop: Largest loss of ``monitor``, in its own unit, that a cut may cost once it has
            recovered, against the best value of the models before it. A cut that costs more is
            rolled back: weights, optimizer state and plan. None keeps every cut.
        monitor: Metric that ``max_drop`` compares, as validation logs it.
        calibration: How much is collected before a cut.
        importance: What decides which units go first.
        constraints: Fewest and most units of groups.
        latency: How milliseconds are measured.
        reconstruction: How the weights that stay make up for what was removed.
        schedule: When a run cuts, and how much each time.
        monitoring: How metrics are compared while the model changes its size.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.

    Raises:
        MisconfigurationException: If an option is outside its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as pl
        >>> from lightning_mi_prune import options
        >>> callback = MutualInformationPruning(sparsity=0.5, schedule=options.Schedule(cuts=2))
        >>> trainer = pl.Trainer(max_epochs=8, callbacks=[callback], logger=False)

    See Also:
        Fan et al., "Layer-wise Model Pruning based on Mutual Information", EMNLP 2021. Only its
        abstract fixed this reading: the estimator, the treatment of heads and the schedule are
        ours.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        target_parameters: int | None = None,
        target_macs: int | None = None,
        target_latency_ms: float | None = None,
        keep_information: float | None = None,
        kinds: list[str] | None = None,
        module: str | None = None,
        include: str | None = None,
        exclude: str | None = None,
        widths: Literal["global", "uniform"] = "global",
        max_drop: float | None = None,
        monitor: str | None = None,
        calibration: options.Calibration = options.Calibration(),
        importance: options.Importance = options.Importance(),
        constraints: options.Constraints = options.Constraints(),
        latency: options.Latency = options.Latency(),
        reconstruction: options.Reconstruction = options.Reconstruction(),
        schedule: options.Schedule = options.Schedule(),
        monitoring: options.Monitoring = options.Monitoring(),
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        given = checked_options(MutualInformationPruning, locals())
        targets = (target_parameters, target_macs, target_latency_ms, keep_information)
        with as_misconfiguration():
            budget = budget_of(sparsity, *targets)
            self.method = PipelineOptions(
                budget, widths, importance, constraints, latency, reconstruction, seed=seed
            )
        super().__init__(
            module=module or "",
            positions=calibration.positions,
            calls=reconstruction.stored_positions,
            steps=calibration.gradient_steps if importance.relevance == "gradient" else 0,
            seed=seed,
            verbose=verbose,
            best_of=monitoring.best_of,
            budget=guard_of(max_drop, monitor, monitoring),
        )
        self._options = given
        self._units, self._include, self._exclude = kinds, include, exclude
        self._ramp: Ramp = schedule.ramp
        self._cuts, self._first, self._last = (
            schedule.cuts,
            schedule.first_epoch,
            schedule.last_epoch,
        )

    @override
    def choose(self, groups: list[DependencyGroup], modules: list[str]) -> list[DependencyGroup]:
        return choose_groups(
            groups,
            kinds=self._units,
            include=self._include,
            exclude=self._exclude,
            modules=modules,
        )

    @override
    def check(
        self, module: pl.LightningModule, groups: list[DependencyGroup], widths: Mapping[str, int]
    ) -> None:
        method, sparsity = self.method, self.left_to_reach(self._goal)
        if method.budget.kind == "sparsity":
            if sparsity <= 0:  # layers that are gone were enough
                return
            method = replace(method, budget=Budget(sparsity))
        allowed, has = method.budget.target_parameters, sum(p.numel() for p in module.parameters())
        if allowed is not None and allowed >= has and self._tracked().plan.is_full:
            raise PruningError(
                f"target_parameters={allowed}, but the module has {number(has)} as built: "
                "nothing to cut. Ask for fewer."
            )
        check_options(
            method,
            module,
            self._tracked().groups,
            groups,
            widths,
            writes=module.trainer.is_global_zero,
        )

    @property
    def _goal(self) -> float:
        """Where the schedule ends: the sparsity, or all of the way to another budget."""
        budget = self.method.budget
        return budget.amount if budget.kind == "sparsity" else 1.0

    @override
    def aim(self) -> str:
        budget = self.method.budget
        return "" if budget.kind == "sparsity" else str(budget)

    @override
    def schedule(self, length: float, every: int, begin: int) -> Schedule:
        return self._fit(length, self._goal, every, begin, ramp=self._ramp, cuts=self._cuts)

    @override
    def decide(
        self, module: pl.LightningModule, heard: CalibrationData, goal: float, kept: float
    ) -> Decision | None:
        tracker = self._tracked()
        heard.examples = self._run.examples
        if self.method.budget.kind == "sparsity":
            goal = self.left_to_reach(goal)
        if goal <= 0:
            return None
        return decide(
            self.method,
            module,
            tracker.groups,
            self._standing,
            tracker.plan,
            heard,
            progress=min(1.0, goal / self._goal),
            kept=kept,
            tables=self._run.tables,
        )

    @override
    def reconstruct(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        selection: Decision,
        heard: CalibrationData,
    ) -> Decision:
        tracker, strategy = self._tracked(), trainer.strategy
        return reconstruct(
            module,
            tracker.groups,
            tracker.plan,
            selection,
            self.method.reconstruction,
            heard,
            add=partial(sum_tensor, strategy),
            rank=trainer.global_rank,
            world=world_size(strategy),
        )
