"""CKALayerPruning: whole layers removed by CKA similarity (MPruner), as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mi_prune.calibration.activations import Recorder
from lightning_mi_prune.calibration.calls import update_calls
from lightning_mi_prune.calibration.data import CalibrationData, LayerComparison
from lightning_mi_prune.calibration.layers import Kernel, StackRecorder
from lightning_mi_prune.callbacks.base import PruningCallback, as_misconfiguration, checked_options
from lightning_mi_prune.callbacks.distributed import (
    gather_ranks,
    refuse_compiled,
    sum_over_ranks,
    sum_tensor,
    world_size,
)
from lightning_mi_prune.callbacks.monitors import BestOf, MetricGuard, guard_of
from lightning_mi_prune.callbacks.resume import resumed, watch_anew
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.sizes import (
    begin_layer_report,
    layer_cut_record,
    layer_parameters,
    report_no_cut,
)
from lightning_mi_prune.callbacks.state import PendingCut, Snapshot
from lightning_mi_prune.callbacks.trainer import validation_batches, without_frozen
from lightning_mi_prune.checkpoint.state_dict import Find
from lightning_mi_prune.core import options
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.discovery.containers import layer_paths
from lightning_mi_prune.discovery.families import is_within
from lightning_mi_prune.discovery.families.stacks import check_stack_paths, find_groups_and_stacks
from lightning_mi_prune.discovery.groups import LayerStack
from lightning_mi_prune.importance.layer_criteria import LayerCriterion, LayerSelector, StackCut
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reconstruction.removed_layers import compensate_removed_layers
from lightning_mi_prune.reporting.report import Cut
from lightning_mi_prune.surgery.optimizer_state import check_optimizers

__all__ = [
    "CKALayerPruning",
    "LayerPruning",
]

_SPARSEST = 3  # MPruner gives up when every third layer of a cluster is too much to lose


class LayerPruning(PruningCallback):
    """Removes layers.

    Args:
        thinning: How the layers that go are chosen.
        kernel: Kernel of the comparison.
        bandwidth: Its width.
        positions: Positions to compare in a batch of validation.
        calls: Positions of the inputs to store in it, over all ranks; 0 stores none.
        stacks: Paths of the containers; None finds them.
        module: Path of the submodule to search for them; "" searches all.
        cuts: Most attempts.
        first_epoch: Epoch that starts with the first cut (``trainer.current_epoch``).
        last_epoch: Epoch of the last attempt, likewise.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
        best_of: What monitors may compare (:func:`monitors.restart_comparison`).
        budget: What a cut may cost before it is taken back; None keeps every cut.
    """

    order: ClassVar[int] = 0

    def __init__(
        self,
        thinning: LayerSelector,
        *,
        kernel: Kernel,
        bandwidth: float,
        positions: int,
        calls: int,
        stacks: list[str] | None,
        module: str,
        cuts: int | None,
        first_epoch: int | None,
        last_epoch: int | None,
        seed: int,
        verbose: bool,
        best_of: BestOf,
        budget: MetricGuard | None,
    ) -> None:
        super().__init__(module=module, seed=seed, verbose=verbose, best_of=best_of, budget=budget)
        self.thinning = thinning
        self._kernel, self._bandwidth, self._positions = kernel, bandwidth, positions
        self._calls, self._paths, self._cuts = calls, stacks, cuts
        self._first, self._last = first_epoch, last_epoch
        self._stacks: list[LayerStack] = []

    @override
    def finder(self) -> Find:
        return partial(find_groups_and_stacks, stacks=self._paths, within=self._within)

    @override
    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, object]:
        tracker = self._tracked()
        stacks = tracker.graph.stacks
        if self._paths is None:  # one layer, as in a short decoder, is no stack to thin
            mine = [stack for stack in stacks if is_within(stack.name, self._within)]
            mine = [stack for stack in mine if stack.size > 1] or mine
        else:
            mine = [stack for stack in stacks if stack.name in self._paths]
        self._stacks = without_frozen(module, mine)
        check_stack_paths(module, self._names)
        refuse_compiled(module, self._names)
        layers = [module.get_submodule(name) for name in self._names]
        self.warn_of_holders(trainer, module, [p for part in layers for p in part.parameters()])
        for stack in self._stacks:
            if tracker.plan.width(stack.name) > 1 or stack.size < 2:
                layer_paths(module, stack.name)
            target = self.thinning.target or 1
            if target > stack.size:
                raise PruningError(
                    f"target_layers={target}, but {stack.name!r} has "
                    f"{counted(stack.size, 'layer')} as built; expected no more."
                )
        if not self._run.fitted.epochs:
            self.report = begin_layer_report(module, tracker, self._names)
        self.check_state(trainer, module)
        sizes = {f"the size of {stack.name!r}": stack.size for stack in self._stacks}
        return self._options | sizes | resumed(self._run, tracker.plan)

    @override
    def reconcile(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
        run, surprises = self._run, []
        plan, names = self._tracked().plan, set(self._names)
        present = {name: plan.kept[name] for name in names if plan.width(name) > 1}
        if run.heard is not None and {n: c.layers for n, c in run.heard.stacks.items()} != present:
            run.heard = None
            surprises.append("What was heard was of other layers; a cut waits for validation.")
        elif run.heard is not None and self._stored and not any(run.heard.ranks):
            run.heard = None
            surprises.append("Nothing was stored for a reconstruct; a cut waits for validation.")
        if run.pending is not None and not (
            set(run.compared.stacks) <= names and self._would_choose(run.pending)
        ):
            run.pending = None
            surprises.append("The pending cut was chosen by other options; it is chosen again.")
        return surprises + watch_anew(run, self._budget)

    @override
    def schedule(self, length: float, every: int, begin: int) -> Schedule:
        cuts = self._cuts if self._cuts is not None or self._budget is not None else 1
        # Layers take over what a well-trained model says; attempts need time to be taken back.
        late = self._budget is None
        return self._fit(length, 1.0, every, begin, ramp="linear", cuts=cuts, late=late)

    @override
    def plan_to_verify(self) -> PruningPlan | None:
        tracker = self._tracked()
        shorter = {
            stack.name: tracker.plan.kept[stack.name][:-1]
            for stack in self._stacks
            if tracker.plan.width(stack.name) > max(1, stack.fixed)
        }
        return tracker.graph.keep_layers(tracker.plan, shorter) if shorter else None

    @override
    def listen(self, trainer: pl.Trainer, module: pl.LightningModule) -> StackRecorder:
        stacks = [stack for stack in self._stacks if self._tracked().plan.width(stack.name) > 1]
        return StackRecorder(
            module,
            stacks,
            positions=self._positions,
            kernel=self._kernel,
            bandwidth=self._bandwidth,
            seed=self._seed,
            calls=-(-self._stored // world_size(trainer.strategy)),
            batches=validation_batches(trainer),
        )

    @override
    def hear(self, trainer: pl.Trainer, recorder: Recorder) -> CalibrationData | None:
        assert isinstance(recorder, StackRecorder)  # noqa: S101
        self._run.examples = update_calls(self._run.examples, recorder.examples)
        self._run.seconds = {"calibration": recorder.seconds}
        sum_over_ranks(trainer.strategy, recorder.sums)
        heard = CalibrationData(stacks=recorder.compared(self._tracked().plan))
        if self._stored:
            heard.ranks = gather_ranks(
                trainer.strategy, move_tensors(recorder.stored, torch.device("cpu"))
            )
        return heard

    @override
    def decide(
        self, module: pl.LightningModule, heard: CalibrationData, goal: float, kept: float
    ) -> Decision | None:
        choices = self._choices(heard.stacks, goal)
        layers = {choice.name: choice.after for choice in choices if choice.removed}
        tracker = self._tracked()
        return Decision(tracker.graph.keep_layers(tracker.plan, layers), {}, {}) if layers else None

    @override
    def reconstruct(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        selection: Decision,
        heard: CalibrationData,
    ) -> Decision:
        tracker, strategy = self._tracked(), trainer.strategy
        if not self._stored:
            if self._calls:
                rank_zero_info(
                    f"Nothing takes over: what layers of {self._names} add is not known."
                )
            return selection
        try:
            return compensate_removed_layers(
                module,
                tracker.graph,
                tracker.plan,
                selection,
                heard,
                positions=self._calls,
                add=partial(sum_tensor, strategy),
                rank=trainer.global_rank,
                world=world_size(strategy),
            )
        except PruningError as error:  # a layer can go without; training will make up for it
            rank_zero_warn(f"No layer takes over what the removed ones said: {error}")
            return selection

    def _choices(self, stacks: Mapping[str, LayerComparison], goal: float) -> tuple[StackCut, ...]:
        sizes = {stack.name: stack.size for stack in self._stacks}
        return tuple(
            self.thinning.choose(
                name, compared, every=self._run.every, progress=goal, built=sizes[name]
            )
            for name, compared in sorted(stacks.items())
        )

    @override
    def describe(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        pending: PendingCut,
        before: PruningPlan,
    ) -> Cut:
        told = [c for c in self._choices(self._run.compared.stacks, pending.sparsity) if c.removed]
        built = self.report.prunable_parameters
        return layer_cut_record(trainer, module, self._run, built, self._names, pending, told)

    @override
    def curves(self, module: pl.LightningModule) -> dict[str, float]:
        plan = self._tracked().plan
        return {f"depth/{name}": plan.width(name) for name in self._names}

    @override
    def sparsity(self, module: pl.LightningModule) -> float:
        return 1 - layer_parameters(module, self._names) / self.report.prunable_parameters

    @override
    def check_state(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        layers = [module.get_submodule(name) for name in self._names]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        check_optimizers(trainer.strategy.optimizers, parameters)

    @override
    def retry(self, trainer: pl.Trainer, trial: Snapshot, failed: float) -> str:
        run, epoch = self._run, trainer.current_epoch
        left, tried = run.schedule.left(failed), self._removed(failed)
        run.schedule, run.every = Schedule(), run.every + 1
        while run.every <= _SPARSEST and self._removed(failed) == tried:
            run.every += 1
        if not left or run.every > _SPARSEST or self.thinning.criterion != "cka":
            return "no further cut"
        # The model is the one that was compared: it need not be heard again.
        run.heard, run.heard_at = replace(run.compared), epoch - 1
        step = (1 - failed) / max(1, len(left) - 1)
        goals = tuple(failed + step * place for place in range(len(left)))
        run.schedule = Schedule((epoch, *left[1:]), goals)
        return f"one of {run.every} layers of a cluster now"

    @override
    def _reached(self, trainer: pl.Trainer, heard: CalibrationData, goal: float) -> None:
        self._run.schedule = Schedule()
        near = [f"{c.largest_neighbor_cka:.3f} in {name!r}" for name, c in heard.stacks.items()]
        met = (
            f"No layer is left to remove: the most alike neighbours have CKA "
            f"{', '.join(near) or '(none)'}, threshold={self.thinning.threshold}, "
            f"target_layers={self.thinning.target}."
        )
        report_no_cut(self.report, met, "Lower threshold, or set target_layers and threshold=None.")

    @override
    def _named(self, goal: float) -> str:
        return "fewer layers"

    def _would_choose(self, pending: PendingCut) -> bool:
        """Whether the options of today lead to a cut that is decided."""
        kept = pending.selection.plan.kept
        choices = self._choices(self._run.compared.stacks, pending.sparsity)
        return all(kept.get(choice.name, choice.before) == choice.after for choice in choices)

    def _removed(self, goal: float) -> list[tuple[int, ...]]:
        return [choice.removed for choice in self._choices(self._run.compared.stacks, goal)]

    @property
    def _stored(self) -> int:
        """Positions of inputs to store: none where it is not known what layers add."""
        return self._calls if any(stack.residual_branches for stack in self._stacks) else 0

    @property
    def _names(self) -> list[str]:
        return [stack.name for stack in self._stacks]


class CKALayerPruning(LayerPruning):
    """Take layers out of a model while it trains, where others say the same.

    Validation compares all layers of a stack (centered kernel alignment). Neighbours that are alike
    form clusters; the next epoch starts with all but the first of each taken out. The first takes
    over what the others said, and training goes on. With ``max_drop`` a cut that costs too much
    after its recovery is taken back exactly, and every second, then every third layer of a cluster
    is tried instead.

    Args:
        threshold: Least CKA with the first layer of a cluster, above 0 and up to 1. None takes the
            clusters that lose least on the way to ``target_layers``.
        target_layers: Fewest layers that stay in every stack; None leaves it to the threshold.
        criterion: ``"cka"``, or what people do instead, which needs ``target_layers``:
            ``"angle"`` removes the layers that turn their input least (ShortGPT),
            ``"angular_run"`` the run of layers that together turn it least (Gromov et al.),
            ``"last"`` the top ones, ``"random"`` any.
        stacks: Paths of the containers whose layers may go, such as ``"model.encoder.block"`` or
            ``"backbone.layer3"``; default: those of the Hugging Face models in the module.
        module: Path of the submodule to search for them; default: the whole module.
        max_drop: Largest loss of ``monitor``, in its own unit, that a cut may cost once it has
            recovered, against the best value of the models before it. None keeps every cut.
        monitor: Metric that ``max_drop`` compares, as validation logs it.
        similarity: How layers are compared.
        reconstruction: Whether layers that stay make up for the removed ones above them, by least
            squares on stored inputs, before training goes on; in stacks of known Hugging Face
            models but GPT-2. ``"layerwise"`` or ``"none"``.
        schedule: ``cuts`` is the largest number of attempts. Default: 1, half-way through the run;
            with ``max_drop`` what fits, at most 4.
        monitoring: How metrics are compared while the model changes its size.
        seed: Seed of the draw of positions, and of ``"random"``.
        verbose: Whether each cut prints a table on rank zero.

    Raises:
        MisconfigurationException: If an option is outside its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as pl
        >>> callback = CKALayerPruning(max_drop=0.01, monitor="val_acc")
        >>> trainer = pl.Trainer(max_epochs=8, callbacks=[callback], logger=False)

    See Also:
        Hu et al., "MPruner", 2024 (arXiv 2408.13482). Beside MutualInformationPruning in
        one Trainer, layers go in the first half of the run and units in the second.
    """

    def __init__(
        self,
        threshold: float | None = 0.98,
        *,
        target_layers: int | None = None,
        criterion: LayerCriterion = "cka",
        stacks: list[str] | None = None,
        module: str | None = None,
        max_drop: float | None = None,
        monitor: str | None = None,
        similarity: options.Similarity = options.Similarity(),
        reconstruction: options.Reconstruction = options.Reconstruction(),
        schedule: options.Schedule = options.Schedule(),
        monitoring: options.Monitoring = options.Monitoring(),
        seed: int = 0,
        verbose: bool = True,
    ) -> None:
        given = checked_options(CKALayerPruning, locals())
        if stacks is not None and (isinstance(stacks, str) or not stacks or module):
            raise MisconfigurationException(
                f"stacks={stacks!r}, module={module!r}; expected one of the two, stacks as a list "
                "of paths such as ['model.encoder.layer']."
            )
        if reconstruction.method == "compensation":
            raise MisconfigurationException(
                "reconstruction.method='compensation' is for units; expected 'layerwise' or 'none' "
                "where whole layers go."
            )
        with as_misconfiguration():
            thinning = LayerSelector(threshold, target_layers, criterion, seed)
        super().__init__(
            thinning,
            kernel=similarity.kernel,
            bandwidth=similarity.bandwidth,
            positions=similarity.positions,
            calls=reconstruction.stored_positions,
            stacks=stacks,
            module=module or "",
            cuts=schedule.cuts,
            first_epoch=schedule.first_epoch,
            last_epoch=schedule.last_epoch,
            seed=seed,
            verbose=verbose,
            best_of=monitoring.best_of,
            budget=guard_of(max_drop, monitor, monitoring),
        )
        self._options = given
