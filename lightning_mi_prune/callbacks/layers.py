"""Layers off stacks: what a callback that removes them compares, and who takes over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mi_prune.alignment import Kernel
from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.base import PruningCallback
from lightning_mi_prune.callbacks.companions import BestOf
from lightning_mi_prune.callbacks.reconciling import resumed, watch_anew
from lightning_mi_prune.callbacks.records import Pending, Trial
from lightning_mi_prune.callbacks.run import validation_batches, without_frozen
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.telling import (
    begin_layer_report,
    describe_layers,
    layer_parameters,
    tell_no_cut,
)
from lightning_mi_prune.checkpoints import Find
from lightning_mi_prune.depth import DepthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import is_within
from lightning_mi_prune.families.stacks import check_reached, find_parts
from lightning_mi_prune.hooks import Ear
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.report import Cut
from lightning_mi_prune.sample import Heard, placed, refreshed
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.sparing import Compared, StackCut, Thinning, nearest
from lightning_mi_prune.stack import blocks_of
from lightning_mi_prune.stacks import StackListeners
from lightning_mi_prune.states import check_optimizers
from lightning_mi_prune.strategies import add_up, gather, pool, refuse_compiled, world_size
from lightning_mi_prune.takeover import take_over
from lightning_mi_prune.wording import counted

__all__ = ["LayerPruning"]

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
        best_of: What monitors may compare (:func:`companions.restart_comparison`).
        budget: What a cut may cost before it is taken back; None keeps every cut.
    """

    turn: ClassVar[int] = 0

    def __init__(
        self,
        thinning: Thinning,
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
        budget: AccuracyBudget | None,
    ) -> None:
        super().__init__(module=module, seed=seed, verbose=verbose, best_of=best_of, budget=budget)
        self.thinning = thinning
        self._kernel, self._bandwidth, self._positions = kernel, bandwidth, positions
        self._calls, self._paths, self._cuts = calls, stacks, cuts
        self._first, self._last = first_epoch, last_epoch
        self._stacks: list[DepthAxis] = []

    @override
    def finder(self) -> Find:
        return partial(find_parts, stacks=self._paths, within=self._within)

    @override
    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, object]:
        keeper = self._kept()
        stacks = keeper.anatomy.stacks
        if self._paths is None:  # one layer, as in a short decoder, is no stack to thin
            mine = [stack for stack in stacks if is_within(stack.name, self._within)]
            mine = [stack for stack in mine if stack.size > 1] or mine
        else:
            mine = [stack for stack in stacks if stack.name in self._paths]
        self._stacks = without_frozen(module, mine)
        check_reached(module, self._names)
        refuse_compiled(module, self._names)
        layers = [module.get_submodule(name) for name in self._names]
        self.warn_of_holders(trainer, module, [p for part in layers for p in part.parameters()])
        for stack in self._stacks:
            if keeper.plan.width(stack.name) > 1 or stack.size < 2:
                blocks_of(module, stack.name)
            target = self.thinning.target or 1
            if target > stack.size:
                raise PruningError(
                    f"target_layers={target}, but {stack.name!r} has "
                    f"{counted(stack.size, 'layer')} as built; expected no more."
                )
        if not self._run.fitted.epochs:
            self.report = begin_layer_report(module, keeper, self._names)
        self.check_state(trainer, module)
        sizes = {f"the size of {stack.name!r}": stack.size for stack in self._stacks}
        return self._options | sizes | resumed(self._run, keeper.plan)

    @override
    def reconcile(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
        run, surprises = self._run, []
        plan, names = self._kept().plan, set(self._names)
        present = {name: plan.kept[name] for name in names if plan.width(name) > 1}
        if run.heard is not None and {n: c.layers for n, c in run.heard.stacks.items()} != present:
            run.heard = None
            surprises.append("What was heard was of other layers; a cut waits for validation.")
        elif run.heard is not None and self._stored and not any(run.heard.ranks):
            run.heard = None
            surprises.append("Nothing was stored for a refit; a cut waits for validation.")
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
    def trial_plan(self) -> Plan | None:
        keeper = self._kept()
        shorter = {
            stack.name: keeper.plan.kept[stack.name][:-1]
            for stack in self._stacks
            if keeper.plan.width(stack.name) > max(1, stack.fixed)
        }
        return keeper.anatomy.without(keeper.plan, shorter) if shorter else None

    @override
    def listen(self, trainer: pl.Trainer, module: pl.LightningModule) -> StackListeners:
        stacks = [stack for stack in self._stacks if self._kept().plan.width(stack.name) > 1]
        return StackListeners(
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
    def hear(self, trainer: pl.Trainer, listener: Ear) -> Heard | None:
        assert isinstance(listener, StackListeners)  # noqa: S101
        self._run.examples = refreshed(self._run.examples, listener.examples)
        self._run.seconds = {"listening": listener.seconds}
        pool(trainer.strategy, listener.sums)
        heard = Heard(stacks=listener.compared(self._kept().plan))
        if self._stored:
            heard.ranks = gather(trainer.strategy, placed(listener.stored, torch.device("cpu")))
        return heard

    @override
    def decide(
        self, module: pl.LightningModule, heard: Heard, goal: float, kept: float
    ) -> Selection | None:
        choices = self._choices(heard.stacks, goal)
        layers = {choice.name: choice.after for choice in choices if choice.removed}
        keeper = self._kept()
        return Selection(keeper.anatomy.without(keeper.plan, layers), {}, {}) if layers else None

    @override
    def pull_back(
        self, trainer: pl.Trainer, module: pl.LightningModule, selection: Selection, heard: Heard
    ) -> Selection:
        keeper, strategy = self._kept(), trainer.strategy
        if not self._stored:
            if self._calls:
                rank_zero_info(
                    f"Nothing takes over: what layers of {self._names} add is not known."
                )
            return selection
        try:
            return take_over(
                module,
                keeper.anatomy,
                keeper.plan,
                selection,
                heard,
                positions=self._calls,
                add=partial(add_up, strategy),
                rank=trainer.global_rank,
                world=world_size(strategy),
            )
        except PruningError as error:  # a layer can go without; training will make up for it
            rank_zero_warn(f"No layer takes over what the removed ones said: {error}")
            return selection

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
        told = [c for c in self._choices(self._run.compared.stacks, pending.sparsity) if c.removed]
        built = self.report.prunable_parameters
        return describe_layers(trainer, module, self._run, built, self._names, pending, told)

    @override
    def curves(self, module: pl.LightningModule) -> dict[str, float]:
        plan = self._kept().plan
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
    def retry(self, trainer: pl.Trainer, trial: Trial, failed: float) -> str:
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
    def _reached(self, trainer: pl.Trainer, heard: Heard, goal: float) -> None:
        self._run.schedule = Schedule()
        near = [f"{nearest(c):.3f} in {name!r}" for name, c in heard.stacks.items()]
        met = (
            f"No layer is left to remove: the most alike neighbours have CKA "
            f"{', '.join(near) or '(none)'}, threshold={self.thinning.threshold}, "
            f"target_layers={self.thinning.target}."
        )
        tell_no_cut(self.report, met, "Lower threshold, or set target_layers and threshold=None.")

    @override
    def _named(self, goal: float) -> str:
        return "fewer layers"

    def _would_choose(self, pending: Pending) -> bool:
        """Whether the options of today lead to a cut that is decided."""
        kept = pending.selection.plan.kept
        choices = self._choices(self._run.compared.stacks, pending.sparsity)
        return all(kept.get(choice.name, choice.before) == choice.after for choice in choices)

    def _removed(self, goal: float) -> list[tuple[int, ...]]:
        return [choice.removed for choice in self._choices(self._run.compared.stacks, goal)]

    @property
    def _stored(self) -> int:
        """Positions of inputs to store: none where it is not known what layers add."""
        return self._calls if any(stack.adds for stack in self._stacks) else 0

    @property
    def _names(self) -> list[str]:
        return [stack.name for stack in self._stacks]
