"""MutualInformationPruning: units removed by mutual information, as one callback."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

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
from lightning_mi_prune.calibration.memory import Memory, choose_memory, memory_needs
from lightning_mi_prune.calibration.moments import check_moments
from lightning_mi_prune.calibration.samples import MomentsOnDemand
from lightning_mi_prune.callbacks.base import PruningCallback, as_misconfiguration, checked_options
from lightning_mi_prune.callbacks.distributed import (
    broadcast_decision,
    gather_ranks,
    sum_over_ranks,
    sum_tensor,
    world_size,
)
from lightning_mi_prune.callbacks.resume import reconcile_units
from lightning_mi_prune.callbacks.schedule import CutSchedule, validation_batches
from lightning_mi_prune.callbacks.state import PendingCut, Session, write
from lightning_mi_prune.callbacks.verification import check_surroundings, without_frozen
from lightning_mi_prune.core import options
from lightning_mi_prune.core.errors import PruningError, number
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.core.spilling import is_spilling, spilled, spilling
from lightning_mi_prune.graph.graph import (
    PruningGraph,
    check_within,
    choose_groups,
    modules_without_groups,
    summarize_groups,
)
from lightning_mi_prune.graph.groups import DependencyGroup, count_parameters, is_within
from lightning_mi_prune.graph.inputs import ConsumerInput
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.pipeline import PipelineOptions, decide, reconstruct
from lightning_mi_prune.pipeline import check as check_options
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reporting.records import Cut
from lightning_mi_prune.reporting.report import group_cuts
from lightning_mi_prune.surgery.optimizer_state import check_optimizers
from lightning_mi_prune.surgery.units import check_cuttable
from lightning_mi_prune.surgery.verification import half_plan, parameters_in

__all__ = [
    "GradientCollection",
    "MutualInformationPruning",
    "UnitStrategy",
]


_FEWEST_POSITIONS = 8192


class GradientCollection:
    """Records gradients in the training steps of an epoch that ends with a decision.

    Args:
        steps: Training steps to take gradients from, over all ranks.
        groups: The groups that may be cut, of the layers that are there.
        in_files: Whether sums are in temporary files instead of memory.
    """

    def __init__(
        self,
        steps: int,
        groups: Callable[[Session], list[DependencyGroup]],
        in_files: Callable[[Session], bool],
    ) -> None:
        self._steps, self._groups, self._in_files = steps, groups, in_files
        self._recorder: GradientRecorder | None = None
        self._scale = 1.0
        self.seconds = 0.0  # spent on the gradients of this epoch
        self._whole = False  # whether every step of the epoch was seen

    def begin(self, session: Session, batch: Any, index: int) -> None:
        """A training step begins; the first of an epoch begins anew."""
        trainer, state = session.trainer, session.state
        if index == 0:
            self.close()
            state.gradients, self._whole = None, True
        if self._recorder is None:
            batches = trainer.num_training_batches
            self._whole = self._whole and index == 0
            with spilling(self._in_files(session)):
                self._recorder = GradientRecorder(
                    session.module,
                    self._groups(session),
                    steps=-(-self._steps // session.world),
                    batches=None if math.isinf(batches) else int(batches),
                    plan=session.plan,
                )
            if state.gradients is not None:  # of a run that stopped inside this epoch
                self._recorder.sums = dict(state.gradients)
            state.gradients = self._recorder.sums
            self._recorder.__enter__()
        # The scale of this step: the optimizer step inside it may change that of the next.
        automatic = session.module.automatic_optimization
        scaler = _scaler(trainer)
        scale = float(scaler.get_scale()) if scaler is not None else 1.0
        self._scale = scale / (trainer.accumulate_grad_batches if automatic else 1)
        self._recorder.begin(index)

    def end(self) -> None:
        """A training step is over."""
        if self._recorder is not None:
            self._recorder.end(scale=self._scale)
            self.seconds = self._recorder.seconds

    def close(self) -> None:
        """Take the hooks down; the sums stay in the state of the run."""
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None

    def save(self, session: Session, state: dict[str, Any]) -> None:
        """Put the sums of all ranks into the callback's part of a checkpoint.

        Only rank 0 writes; the others go on from nothing, so the sum over ranks is the same.
        """
        gradients = session.state.gradients
        if gradients is not None and session.world > 1:
            state["gradients"] = write(_summed(session.trainer, gradients))

    def collect(self, session: Session) -> dict[str, GradientSums] | None:
        """The sums of all ranks over this epoch; None, with a warning, where there are none."""
        self.close()
        trainer, groups = session.trainer, self._groups(session)
        with spilling(self._in_files(session)):
            empty = empty_sums(session.module, groups, session.plan)
            sums = _summed(trainer, session.state.gradients or empty)
        missed = not any(s.counts.any() for s in sums.values())
        if missed and not (self._whole and trainer.is_last_batch):
            rank_zero_warn(
                f"The cut of epoch {trainer.current_epoch + 1} waits: no training step to take "
                "gradients from ran before the last validation of this epoch."
            )
            return None
        check_gradients(sums, scaled=_scaler(trainer) is not None)
        return sums


def _summed(trainer: pl.Trainer, sums: Mapping[str, GradientSums]) -> dict[str, GradientSums]:
    """The sums over all ranks, in sums of their own; every rank must call it."""
    together: dict[str, GradientSums] = {}
    for key, s in sums.items():
        own = GradientSums(s.dimension, s.units, over_units=s.over_units).unpack(s.packed())
        if is_spilling():  # one after another
            sum_over_ranks(trainer.strategy, {key: own})
        own.matrix = spilled(own.matrix)
        together[key] = own
    if not is_spilling():
        sum_over_ranks(trainer.strategy, together)
    return together


def _scaler(trainer: pl.Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def positions_while_training(groups: Sequence[DependencyGroup]) -> int:
    """Positions that are enough for groups of a model whose training goes on.

    Five for each entry of the widest input: twenty for each output of a layer that is a fourth as
    wide. Half of them are enough to solve layers again: training goes on from there.

    Example:
        >>> positions_while_training([])
        8192
    """
    entries = [
        layout_size(ConsumerInput.of(group, consumers).layout, group.all_widths({}))
        for group in groups
        for consumers in group.inputs.values()
    ]
    return min(options.MOST_POSITIONS, max(_FEWEST_POSITIONS, 5 * max(entries, default=0)))


class UnitStrategy:
    """Removes units: neurons, heads, dimensions of heads and of the hidden state.

    Args:
        pipeline: How units are chosen, and weights solved again.
        calibration: How much is collected.
        schedule: When to cut.
        choose: Chooses the groups that may be cut, of groups and of the modules without any.
        module: Path of the submodule to search for prunable networks; "" searches all.
        halve: Whether half of a step is tried after its cut was rolled back.
    """

    order = 1
    late = False
    needs_graph = True

    def __init__(
        self,
        pipeline: PipelineOptions,
        calibration: options.Calibration,
        schedule: options.Schedule,
        *,
        choose: Callable[[list[DependencyGroup], list[str]], list[DependencyGroup]],
        module: str,
        halve: bool,
    ) -> None:
        budget = pipeline.budget
        self.pipeline, self.schedule = pipeline, schedule
        self.goal = budget.amount if budget.kind == "sparsity" else 1.0
        self.chosen: list[DependencyGroup] = []
        self._calibration, self._memory = calibration, ""
        self._asked = calibration, pipeline.reconstruction  # each fit may have another model
        self._stored = pipeline.reconstruction.stored_positions
        self._steps = (
            calibration.gradient_steps if pipeline.importance.relevance == "gradient" else 0
        )
        self.steps = (
            GradientCollection(self._steps, self._present, self._in_files) if self._steps else None
        )
        self._choose, self._within, self._halve = choose, module, halve
        self.budget = "" if budget.kind == "sparsity" else str(budget)

    def _present(self, session: Session) -> list[DependencyGroup]:
        """The groups that may be cut, of the layers that are there."""
        names = {group.name for group in self.chosen}
        return [group for group in session.tracker.groups if group.name in names]

    def _in_files(self, session: Session) -> bool:
        """Whether sums are made one after another from files; rank 0 chooses for all, once a fit.

        Raises:
            PruningError: If not even those of one group fit in memory.
        """

        def choose() -> Memory:
            needs = memory_needs(
                session.module,
                self._present(session),
                session.plan,
                positions=self._calibration.samples,
                gradients=self.steps is not None,
            )
            memory = choose_memory(self._calibration, needs, session.module.device)
            if memory == "low":
                rank_zero_info(f"Calibration with memory='low': {needs}.")
            return memory

        self._memory = self._memory or broadcast_decision(session.trainer.strategy, choose)
        return self._memory == "low"

    def check_paths(self, module: nn.Module) -> None:
        check_within(module, self._within)

    def prepare(self, session: Session) -> Mapping[str, object]:
        self._memory = ""
        module, plan, groups = session.module, session.plan, session.graph.groups
        mine = [group for group in groups if is_within(group.name, self._within)]
        others = modules_without_groups(module, groups, self._within)
        self.chosen = self._choose(without_frozen(module, mine), others)
        self._set_positions()
        rank_zero_info(f"Pruning may cut {summarize_groups(self.chosen)}.")
        present = self._present(session)
        check_cuttable(module, present, plan)
        paths = {s.tensor.rpartition(".")[0] for group in present for s in group.tensors}
        check_surroundings(session, self.parameters(session), paths)
        if not session.state.report.parameters:
            session.state.report = session.begin_report(self.chosen)
        check_optimizers(session.trainer.strategy.optimizers, self.parameters(session))
        self._check_budget(session, present)
        return {f"the size of {group.name!r}": group.size for group in self.chosen}

    def _set_positions(self) -> None:
        """Take as many positions as the groups need, as built, where no number is given."""
        calibration, solving = self._asked
        enough = positions_while_training(self.chosen)
        self._calibration = replace(calibration, positions=calibration.positions or enough)
        solving = replace(solving, positions=solving.positions or enough // 2)
        self.pipeline = replace(self.pipeline, reconstruction=solving)
        self._stored = solving.stored_positions

    def _check_budget(self, session: Session, present: list[DependencyGroup]) -> None:
        """Refuse a budget that these groups cannot meet from their present widths."""
        pipeline, module = self.pipeline, session.module
        if pipeline.budget.kind == "sparsity":
            sparsity = self._left(session, self.goal)
            if sparsity <= 0:  # layers that are gone were enough
                return
            pipeline = replace(pipeline, budget=Budget(sparsity))
        allowed, has = (
            pipeline.budget.target_parameters,
            sum(p.numel() for p in module.parameters()),
        )
        if allowed is not None and allowed >= has and session.plan.is_full:
            raise PruningError(
                f"target_parameters={allowed}, but the module has {number(has)} as built: "
                "nothing to cut. Ask for fewer."
            )
        widths = {name: len(kept) for name, kept in session.plan.kept.items()}
        writes = session.trainer.is_global_zero
        check_options(pipeline, module, session.tracker.groups, present, widths, writes=writes)

    def _left(self, session: Session, sparsity: float) -> float:
        """Sparsity of the layers that are there which makes up for one of all layers."""
        built = count_parameters(self.chosen)
        present = count_parameters(self._present(session))
        return sparsity if built == present else 1 - (1 - sparsity) * built / present

    def reconcile(self, session: Session) -> list[str]:
        groups, state = self._present(session), session.state
        dropped = reconcile_units(
            state,
            groups,
            session.module,
            session.plan,
            calls=self._stored,
            steps=self._steps,
        )
        if session.trainer.global_rank and state.gradients is not None:  # rank 0 has all of it
            state.gradients = empty_sums(session.module, groups, session.plan)
        return dropped

    def parameters(self, session: Session) -> list[nn.Parameter]:
        return list(parameters_in(session.module, self._present(session)).values())

    def plan_to_verify(self, session: Session) -> PruningPlan | None:
        present = self._present(session)
        return half_plan(present, session.plan) if present else None

    def recorder(self, session: Session) -> ActivationRecorder:
        with spilling(self._in_files(session)):
            return ActivationRecorder(
                session.module,
                self._present(session),
                positions=-(-self._calibration.samples // session.world),
                batches=validation_batches(session.trainer),
                seed=self.pipeline.seed,
                calls=-(-self._stored // session.world),
                halves=self._calibration.stability,
            )

    def collect(self, session: Session, recorder: Recorder) -> CalibrationData | None:
        assert isinstance(recorder, ActivationRecorder)  # noqa: S101
        state, strategy = session.state, session.trainer.strategy
        state.examples = update_calls(state.examples, recorder.calls(self._present(session)))
        state.seconds |= {"calibration": recorder.seconds}
        if self.steps is not None:
            state.seconds["gradients"] = self.steps.seconds
        moments, half = recorder.moments, recorder.half
        if isinstance(moments, MomentsOnDemand):
            if session.world > 1:
                add = partial(sum_over_ranks, strategy)
                moments = moments.reduced(add)
                half = half.reduced(add) if isinstance(half, MomentsOnDemand) else half
            moments.check()
        else:
            sum_over_ranks(strategy, moments)
            if half:
                sum_over_ranks(strategy, half)
            check_moments(moments)
        gradients = None if self.steps is None else self.steps.collect(session)
        if self.steps is not None and gradients is None:
            return None
        data = CalibrationData(moments, gradients, half=half)
        if self._stored:
            stored = move_tensors(recorder.stored, torch.device("cpu"))
            data.ranks = gather_ranks(strategy, stored)
        return data

    def decide(self, session: Session, data: CalibrationData, goal: float) -> Decision | None:
        data.examples = session.state.examples
        if self.pipeline.budget.kind == "sparsity":
            goal = self._left(session, goal)
        if goal <= 0:
            return None
        with spilling(data.is_in_files):
            return decide(
                self.pipeline,
                session.module,
                session.tracker.groups,
                self._present(session),
                session.plan,
                data,
                progress=min(1.0, goal / self.goal),
                kept=session.state.information_kept,
                tables=session.state.tables,
            )

    def reconstruct(self, session: Session, decision: Decision, data: CalibrationData) -> Decision:
        strategy = session.trainer.strategy
        with spilling(self._in_files(session)):
            return reconstruct(
                session.module,
                session.tracker.groups,
                session.plan,
                decision,
                self.pipeline.reconstruction,
                data,
                add=partial(sum_tensor, strategy),
                rank=session.trainer.global_rank,
                world=world_size(strategy),
            )

    def record(self, session: Session, pending: PendingCut, before: PruningPlan) -> Cut:
        widths = {group.name: before.width(group.name) for group in self.chosen}
        after = {group.name: session.plan.width(group.name) for group in self.chosen}
        decision, state = pending.decision, session.state
        return Cut(
            epoch=pending.epoch,
            sparsity=sparsity_of(self.chosen, after),
            parameters=sum(p.numel() for p in session.module.parameters()),
            prunable_parameters=count_parameters(self.chosen, after),
            macs=session.count_macs(),
            groups=group_cuts(self._present(session), widths, after, decision),
            seconds=state.seconds,
            information_kept=state.information_kept * decision.kept_share,
        )

    def sizes(self, session: Session) -> dict[str, float]:
        widths = {group.name: session.plan.width(group.name) for group in self.chosen}
        return {
            "information_kept": session.state.information_kept,
            **{f"width/{name}": width for name, width in widths.items()},
            "sparsity": sparsity_of(self.chosen, widths),
        }

    def retry(self, session: Session, failed: float, end: float) -> str:
        state, every = session.state, session.trainer.check_val_every_n_epoch or 1
        schedule, state.schedule = state.schedule, CutSchedule()
        if self._halve:
            last, epoch = int(end + 1e-9) - 2, session.trainer.current_epoch + 1
            state.schedule = schedule.halved(epoch, state.reached, failed, last, every)
        steps = zip(*vars(state.schedule).values(), strict=True)
        return ", ".join(f"{s:.3f} at epoch {e}" for e, s in steps) or "no further cut"

    def name_goal(self, goal: float) -> str:
        if not self.budget:
            return f"sparsity {goal:.3f}"
        return self.budget if goal >= 1 else f"{goal:.3f} of the way to {self.budget}"

    def no_cut(self, session: Session, data: CalibrationData, goal: float) -> tuple[str, str]:
        return f"The model meets {self.name_goal(goal)} already: no cut.", "Ask for less."


class MutualInformationPruning(PruningCallback):
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
        kinds: Kinds of unit to cut: ``"ffn"``, ``"heads"``, ``"channels"`` (default),
            ``"head_dim"`` (dimensions of heads), ``"pooler"``, ``"hidden"`` (the hidden size, with
            the word embeddings).
        module: Path of the submodule to search, such as ``"encoder"``; default: the whole module.
        include: Regular expression; only groups whose name it finds are cut.
        exclude: Regular expression; groups whose name it finds are left alone.
        graph: What the model can lose, or a file that holds it; default: what describes the model,
            else what its first batch shows.
        widths: ``"global"`` lets the groups of all layers compete for the budget by what is lost
            for the cost that is saved, ``"uniform"`` keeps the same share everywhere. ``"config"``
            gives groups one width that share a field of a Hugging Face config, and lets these
            classes compete: then plain ``AutoModel.from_pretrained`` opens the folder that
            ``save_pretrained`` of the model writes.
        max_drop: Largest loss of ``monitor``, in its own unit, that a cut may cost once it has
            recovered, against the best value of the models before it. A cut that costs more is
            rolled back: weights, optimizer state and plan. None keeps every cut.
        monitor: Metric that ``max_drop`` compares, as validation logs it.
        calibration: How much is collected before a cut.
        importance: What decides which units go first.
        constraints: Fewest and most units of groups.
        latency: How milliseconds are measured.
        reconstruction: How the weights that stay make up for what was removed.
        schedule: When a run cuts, and how much each time. Default: once, as early as possible;
            with ``max_drop`` what fits, at most 4 times.
        monitoring: How metrics are compared while the model changes its size.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
        write_report: Whether a run that cut something ends with ``report.html`` and
            ``report.json`` in the folder of the logger, if there is one; or a path of either, to
            write that instead.

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
        graph: PruningGraph | str | None = None,
        widths: options.Widths = "global",
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
        write_report: bool | str = True,
    ) -> None:
        given = checked_options(MutualInformationPruning, locals())
        targets = (target_parameters, target_macs, target_latency_ms, keep_information)
        with as_misconfiguration():
            budget = budget_of(sparsity, *targets)
            self.method = PipelineOptions(
                budget, widths, importance, constraints, latency, reconstruction, seed=seed
            )

        def choose(groups: list[DependencyGroup], modules: list[str]) -> list[DependencyGroup]:
            return choose_groups(
                groups, kinds=kinds, include=include, exclude=exclude, modules=modules
            )

        # Each of several cuts can be rolled back by itself; without that, one is as good.
        cuts = schedule.cuts if schedule.cuts is not None or max_drop is not None else 1
        schedule = replace(schedule, cuts=cuts)
        super().__init__(
            UnitStrategy(
                self.method,
                calibration,
                schedule,
                choose=choose,
                module=module or "",
                halve=monitoring.on_drop == "halve",
            ),
            given,
            graph=graph,
            max_drop=max_drop,
            monitor=monitor,
            monitoring=monitoring,
            verbose=verbose,
            write_report=write_report,
        )
