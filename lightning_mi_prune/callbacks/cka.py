"""CKALayerPruning: whole layers removed by clusters of alike ones (MPruner), as one callback."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mi_prune.alignment import Kernel
from lightning_mi_prune.callbacks.base import PruningCallback
from lightning_mi_prune.callbacks.companions import BestOf
from lightning_mi_prune.callbacks.options import (
    asked_budget,
    between,
    check_choices,
    check_counts,
    check_order,
    check_types,
)
from lightning_mi_prune.callbacks.reconciling import watch_anew
from lightning_mi_prune.callbacks.records import Pending, Trial
from lightning_mi_prune.callbacks.run import without_frozen
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.telling import (
    begin_layer_report,
    describe_layers,
    layer_parameters,
)
from lightning_mi_prune.checkpoints import Find
from lightning_mi_prune.depth import DepthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import is_within
from lightning_mi_prune.families.stacks import find_parts
from lightning_mi_prune.hooks import Ear
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.report import Cut
from lightning_mi_prune.sample import Heard, refreshed
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.sparing import Compared, LayerCriterion, StackCut, Thinning, nearest
from lightning_mi_prune.stack import blocks_of
from lightning_mi_prune.stacks import StackListeners
from lightning_mi_prune.states import check_optimizers
from lightning_mi_prune.strategies import pool

__all__ = ["CKALayerPruning"]

_SPARSEST = 3  # MPruner gives up when every third layer of a cluster is too much to lose


class CKALayerPruning(PruningCallback):
    """Take layers out of a model while it trains, where others say the same.

    Validation compares all layers of a stack (centered kernel alignment). Neighbours that are alike
    form clusters; the next epoch starts with all but the first of each taken out, and training goes
    on. With ``max_drop`` a cut that costs too much after its recovery is taken back exactly, and
    every second, then every third layer of a cluster is tried instead.

    Args:
        threshold: Least CKA with the first layer of a cluster, above 0 and up to 1. None lowers
            it as far as ``target_layers`` needs.
        target_layers: Fewest layers that stay in every stack; None leaves it to the threshold.
        criterion: ``"cka"``, or what people do instead, which needs ``target_layers``:
            ``"angle"`` removes the layers that turn their input least (ShortGPT),
            ``"angular_run"`` the run of layers that together turn it least (Gromov et al.),
            ``"last"`` the top ones, ``"random"`` any.
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: Width of the latter as a share of the median distance.
        positions: Positions to compare in a batch of validation, at least 4.
        stacks: Paths of the containers whose layers may go, such as ``"model.encoder.block"`` or
            ``"backbone.layer3"``; default: those of the Hugging Face models in the module.
        module: Path of the submodule to search for them; default: the whole module.
        cuts: Most attempts; default: 1, and with ``max_drop`` what fits, at most 4.
        first_epoch: Training epoch (from 1) of the first cut; default 1.
        last_epoch: Epoch of the last attempt; default: half-way.
        max_drop: Largest loss of ``monitor`` after recovery, as a share of its best value before
            (0.01 is one per cent of it). None keeps every cut.
        monitor: Metric that ``max_drop`` watches, as validation logs it.
        mode: ``"max"`` if more of it is better, ``"min"`` if less is.
        seed: Seed of the draw of positions, and of ``"random"``.
        verbose, best_of: As for :class:`MutualInformationPruning`.

    Raises:
        MisconfigurationException: If an option is outside its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as pl
        >>> callback = CKALayerPruning(max_drop=0.01, monitor="val_acc")
        >>> trainer = pl.Trainer(max_epochs=8, callbacks=[callback], logger=False)

    See Also:
        Hu et al., "MPruner", 2024 (arXiv 2408.13482). Beside :class:`MutualInformationPruning` in
        one Trainer, layers go in the first half of the run and units in the second.
    """

    turn: ClassVar[int] = 0

    def __init__(
        self,
        threshold: float | None = 0.98,
        *,
        target_layers: int | None = None,
        criterion: LayerCriterion = "cka",
        kernel: Kernel = "linear",
        bandwidth: float = 1.0,
        positions: int = 512,
        stacks: list[str] | None = None,
        module: str | None = None,
        cuts: int | None = None,
        first_epoch: int | None = None,
        last_epoch: int | None = None,
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        seed: int = 0,
        verbose: bool = True,
        best_of: BestOf = "final_size",
    ) -> None:
        check_types(module=module, verbose=verbose)
        check_counts(seed=seed, cuts=cuts, first_epoch=first_epoch, last_epoch=last_epoch)
        check_counts(positions=positions, least=4)
        check_choices(kernel=kernel, best_of=best_of)
        between("bandwidth", bandwidth, 0, 100)
        check_order("linear", cuts, first_epoch, last_epoch)
        if stacks is not None and (isinstance(stacks, str) or not stacks or module):
            raise MisconfigurationException(
                f"stacks={stacks!r}, module={module!r}; expected one of the two, stacks as a list "
                "of paths such as ['model.encoder.layer']."
            )
        try:
            self.thinning = Thinning(threshold, target_layers, criterion, seed)
        except PruningError as error:
            raise MisconfigurationException(str(error)) from error
        super().__init__(
            module=module or "",
            seed=seed,
            verbose=verbose,
            best_of=best_of,
            budget=asked_budget(max_drop, monitor, mode, relative=True),
        )
        self._kernel, self._bandwidth, self._positions = kernel, bandwidth, positions
        self._paths, self._cuts, self._first, self._last = stacks, cuts, first_epoch, last_epoch
        self._stacks: list[DepthAxis] = []

    @override
    def finder(self) -> Find:
        return partial(find_parts, stacks=self._paths, within=self._within)

    @override
    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> str:
        keeper = self._kept()
        stacks = keeper.anatomy.stacks
        if self._paths is None:
            mine = [stack for stack in stacks if is_within(stack.name, self._within)]
        else:
            mine = [stack for stack in stacks if stack.name in self._paths]
        if self._paths is None:  # one layer, as in a short decoder, is no stack to thin
            mine = [stack for stack in mine if stack.size > 1] or mine
        self._stacks = without_frozen(module, mine)
        for stack in self._stacks:
            if keeper.plan.width(stack.name) > 1 or stack.size < 2:
                blocks_of(module, stack.name)
            target = self.thinning.target or 1
            if target > stack.size:
                raise PruningError(
                    f"target_layers={target}, but {stack.name!r} has {stack.size} layers as built; "
                    "expected no more."
                )
        if not self._run.fitted.epochs:
            self.report = begin_layer_report(module, keeper, self._names)
        self.check_state(trainer, module)
        listening = (self._kernel, self._bandwidth, self._positions, self._seed)
        options = (self._budget, self._best_of, listening, self.thinning)
        return f"{keeper.plan.digest()} {self._names} {options}"

    @override
    def reconcile(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
        run, surprises = self._run, []
        plan, names = self._kept().plan, set(self._names)
        present = {name: plan.kept[name] for name in names if plan.width(name) > 1}
        if run.heard is not None and {n: c.layers for n, c in run.heard.stacks.items()} != present:
            run.heard = None
            surprises.append("What was heard was of other layers; a cut waits for validation.")
        if run.pending is not None and not set(run.compared) <= names:
            run.pending = None
            surprises.append("The pending cut was of other stacks; it will be chosen again.")
        return surprises + watch_anew(run, self._budget)

    @override
    def schedule(self, length: float, every: int, begin: int) -> Schedule:
        cuts = self._cuts if self._cuts is not None or self._budget is not None else 1
        return self._fit(length, 1.0, "linear", cuts, every, begin)

    @override
    def listen(self, trainer: pl.Trainer, module: pl.LightningModule) -> StackListeners:
        return StackListeners(
            module,
            [stack for stack in self._stacks if self._kept().plan.width(stack.name) > 1],
            positions=self._positions,
            kernel=self._kernel,
            bandwidth=self._bandwidth,
            seed=self._seed,
        )

    @override
    def hear(self, trainer: pl.Trainer, listener: Ear) -> Heard | None:
        assert isinstance(listener, StackListeners)  # noqa: S101
        self._run.examples = refreshed(self._run.examples, listener.examples)
        self._run.seconds = {"listening": listener.seconds}
        pool(trainer.strategy, listener.sums)
        return Heard(stacks=listener.compared(self._kept().plan))

    @override
    def decide(
        self, module: pl.LightningModule, heard: Heard, goal: float, kept: float
    ) -> Selection | None:
        choices = self._choices(heard.stacks, goal)
        layers = {choice.name: choice.after for choice in choices if choice.removed}
        keeper = self._kept()
        return Selection(keeper.anatomy.without(keeper.plan, layers), {}, {}) if layers else None

    def _choices(self, stacks: Mapping[str, Compared], goal: float) -> tuple[StackCut, ...]:
        sizes = {stack.name: stack.size for stack in self._stacks}
        return tuple(
            self.thinning.choose(
                name, compared, every=self._run.every, progress=goal, built=sizes[name]
            )
            for name, compared in sorted(stacks.items())
        )

    @override
    def describe(
        self, trainer: pl.Trainer, module: pl.LightningModule, pending: Pending, before: Plan
    ) -> Cut:
        told = [c for c in self._choices(self._run.compared, pending.sparsity) if c.removed]
        built = self.report.prunable_parameters
        return describe_layers(trainer, module, self._run, built, self._names, pending, told)

    @override
    def sizes(self, module: pl.LightningModule) -> dict[str, float]:
        report = self.report
        if report.cuts or not report.undone:
            return report.cuts[-1].metrics() if report.cuts else {}
        parameters = sum(p.numel() for p in module.parameters())
        left = layer_parameters(module, self._names)
        sparsity = 1 - left / report.prunable_parameters
        found = {"parameters": parameters, "macs": report.macs, "sparsity": sparsity}
        plan = self._kept().plan
        depths = {f"depth/{name}": plan.width(name) for name in self._names}
        return {f"prune/{name}": float(value) for name, value in (found | depths).items()}

    @override
    def check_state(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        layers = [module.get_submodule(name) for name in self._names]
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        check_optimizers(trainer.strategy.optimizers, parameters)

    @override
    def retry(self, trainer: pl.Trainer, trial: Trial, failed: float) -> str:
        run, epoch = self._run, trainer.current_epoch
        left, tried = run.schedule.left(failed), self._removed(failed)
        run.schedule, run.every = Schedule(), run.every + 1
        while run.every <= _SPARSEST and self._removed(failed) == tried:
            run.every += 1
        if not left or run.every > _SPARSEST or self.thinning.criterion != "cka":
            return "no further cut"
        # The model is the one that was compared: it need not be heard again.
        run.heard, run.heard_at = Heard(stacks=run.compared), epoch - 1
        step = (1 - failed) / max(1, len(left) - 1)
        goals = tuple(failed + step * place for place in range(len(left)))
        run.schedule = Schedule((epoch, *left[1:]), goals)
        return f"one of {run.every} layers of a cluster now"

    @override
    def _reached(self, trainer: pl.Trainer, heard: Heard, goal: float) -> None:
        self._run.schedule = Schedule()
        near = [f"{nearest(c):.3f} in {name!r}" for name, c in heard.stacks.items()]
        text = (
            f"No layer is left to remove: the most alike neighbours have CKA "
            f"{', '.join(near) or '(none)'}, threshold={self.thinning.threshold}, "
            f"target_layers={self.thinning.target}."
        )
        if self.report.cuts or self.report.undone:
            rank_zero_info(text)
        else:
            rank_zero_warn(f"{text} Nothing was cut. Lower the threshold, or set target_layers.")

    @override
    def _named(self, goal: float) -> str:
        return "fewer layers"

    def _removed(self, goal: float) -> list[tuple[int, ...]]:
        return [choice.removed for choice in self._choices(self._run.compared, goal)]

    @property
    def _names(self) -> list[str]:
        return [stack.name for stack in self._stacks]
