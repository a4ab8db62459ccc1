"""Optimizers of a resumed run, made of the parameters that those of the run were made of.

Lightning calls ``configure_optimizers`` of a resumed run when layers, and all units of others, have
left the model already. Groups that are made by layer, by parameter or by position would then be
others than those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import update_wrapper
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.optimizers import rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.standins import empty_linears, place_linears, show_linears
from lightning_mi_prune.surgery import arrange
from lightning_mi_prune.untrusted import described

__all__ = ["Footing"]

_KEY, _ENTRY = "lightning_mi_prune", "optimizers_of"
_HOOK = "configure_optimizers"


class Footing:
    """The plan at which the optimizers of a run were made; it travels with its checkpoints."""

    def __init__(self) -> None:
        self._begun: Plan | None = None

    def begin(self, keeper: PlanKeeper) -> None:
        """Note the plan that the model carries, unless a checkpoint told of another one."""
        if self._begun is None:
            self._begun = keeper.plan.bare()

    def save(self, checkpoint: MutableMapping[str, Any]) -> None:
        """Tell a checkpoint."""
        if self._begun is not None and self._begun.sizes:
            checkpoint[_KEY] = {_ENTRY: self._begun.to_json()}

    def load(
        self, module: pl.LightningModule, keeper: PlanKeeper, checkpoint: Mapping[str, Any]
    ) -> None:
        """Let the next ``configure_optimizers`` see the parameters that a checkpoint tells of.

        What is gone leaves its groups afterwards, as it did when it was cut.

        Args:
            module: The module, at the plan of the checkpoint.
            keeper: Its keeper.
            checkpoint: The checkpoint, which is not trusted.

        Raises:
            PruningError: If it tells of something else.
        """
        noted = checkpoint.get(_KEY)
        if noted is None or self._begun is not None:  # a finder of learning rates loads again
            return
        text = noted.get(_ENTRY) if isinstance(noted, Mapping) else None
        if not isinstance(text, str):
            raise PruningError(
                f"The checkpoint holds {described(noted)} under {_KEY!r}; expected the plan at "
                "which its optimizers were made. Take another checkpoint."
            )
        self._begun = Plan.from_json(text)
        alone = not isinstance(module.__dict__.get(_HOOK), _Once)  # of two callbacks one does it
        now = keeper.plan
        begun = self._begun.only(now.sizes)
        stacks = {stack.name for stack in keeper.anatomy.stacks}
        lost = [
            name
            for name, kept in begun.kept.items()
            if (kept != now.kept[name] if name in stacks else kept and not now.kept[name])
        ]
        if alone and lost:
            sizes = _sizes_in(checkpoint["optimizer_states"])
            module.__dict__[_HOOK] = _Once(module, keeper, begun, sizes)

    def abandon(self, module: pl.LightningModule) -> None:
        """Leave the module alone, if ``configure_optimizers`` was never called."""
        once = module.__dict__.get(_HOOK)
        if isinstance(once, _Once):
            once.step_aside()


class _Once:
    """Stands in for ``configure_optimizers`` of a module, for one call."""

    def __init__(
        self, module: pl.LightningModule, keeper: PlanKeeper, begun: Plan, sizes: list[list[int]]
    ) -> None:
        self._module, self._keeper, self._begun, self._sizes = module, keeper, begun, sizes
        self._set = module.__dict__.get(_HOOK)  # the user's own, as of LightningCLI
        self._configure = module.configure_optimizers
        update_wrapper(self, self._configure)

    def step_aside(self) -> None:
        del self._module.__dict__[_HOOK]
        if self._set is not None:
            self._module.__dict__[_HOOK] = self._set

    def __call__(self) -> Any:
        self.step_aside()
        module, keeper, now = self._module, self._keeper, self._keeper.plan
        stacks, then = keeper.anatomy.stacks, now.joined(self._begun)
        arrange(module, stacks, self._begun, current=now, spare=keeper.spare)
        empty = empty_linears(module)
        begun = {axis.name for axis in keeper.anatomy.axes if then.width(axis.name)}
        paths = {
            s.tensor.rpartition(".")[0]
            for axis in keeper.anatomy.standing(then)
            for s in axis.slices
            if axis.name in begun
        }
        show_linears(module, empty, paths)
        try:
            made = self._configure()
        finally:
            lost = [p for linear in empty.values() for p in linear.parameters() if not p.numel()]
            place_linears(module, empty)
            gone = arrange(module, stacks, now, current=then)
            layers = [layer for stack in gone.values() for layer in stack.values()]
            lost += [parameter for layer in layers for parameter in layer.parameters()]
            keeper.store(gone)
        optimizers = list(_optimizers_in(made))
        rebind(optimizers, [], lost, {id(p): name for name, p in module.named_parameters()})
        found = [[len(group["params"]) for group in o.param_groups] for o in optimizers]
        if found != self._sizes:
            raise PruningError(
                f"The optimizers of the checkpoint have groups of {self._sizes} parameters; those "
                f"of configure_optimizers have {found}. Resume with the groups the run began with."
            )
        return made


def _optimizers_in(made: Any) -> Iterator[Optimizer]:
    """The optimizers in all that ``configure_optimizers`` may return, in the order of Lightning."""
    if isinstance(made, Optimizer):
        yield made
    elif isinstance(made, (list, tuple, Mapping)):
        for part in made.values() if isinstance(made, Mapping) else made:
            yield from _optimizers_in(part)


def _sizes_in(states: Sequence[Any]) -> list[list[int]]:
    return [[len(group["params"]) for group in s["param_groups"]] for s in states if s]
