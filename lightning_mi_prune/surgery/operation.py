"""Whole operations on a model, layers and units alike, that can be taken back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_mi_prune.anatomy import Anatomy
from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.incisions import owners
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.standins import modules_of
from lightning_mi_prune.surgery.layers import Spare, arrange
from lightning_mi_prune.surgery.units import Rewrite, apply, reshape, revert, undo
from lightning_mi_prune.turns import TurnMaps

__all__ = ["Operation", "cancel", "operate", "recover", "remodel"]


@dataclass(frozen=True)
class Operation:
    """What was done to a model, and all it takes to cancel it.

    Args:
        before: Plan the model carried.
        after: Plan it carries now.
        rewrites: Parameters that were replaced.
        removed: Layers that left, by stack and number as built.
    """

    before: Plan
    after: Plan
    rewrites: tuple[Rewrite, ...]
    removed: Spare

    @property
    def lost(self) -> list[nn.Parameter]:
        """Parameters that left with their layers."""
        layers = (layer for stack in self.removed.values() for layer in stack.values())
        return [parameter for layer in layers for parameter in layer.parameters()]


def operate(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    *,
    current: Plan,
    folded: Mapping[str, Tensor] | None = None,
    turned: TurnMaps | None = None,
) -> Operation:
    """Take layers and units out of a model; a refused plan, or an error, leaves it as it was.

    Args:
        model: Module from which everything is named.
        anatomy: What it can lose, as built.
        plan: Survivors, of all axes and stacks or of some.
        current: Plan the model carries now.
        folded: New values of parameters, as for :func:`units.apply`.
        turned: New coordinates of heads, likewise.

    Raises:
        PruningError: If the plan and the model do not belong together.
    """
    after = current.then(plan)
    _check_shared(model, anatomy, current, after)
    removed = arrange(model, anatomy.stacks, after, current=current)
    try:
        standing = anatomy.standing(after)
        rewrites = apply(model, standing, plan, current=current, folded=folded, turned=turned)
    except BaseException:
        _put_back(model, anatomy, removed, after, current)
        raise
    return Operation(current, after, tuple(rewrites), removed)


def recover(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    values: Mapping[str, Tensor],
    *,
    current: Plan,
    spare: Spare,
) -> Operation:
    """Give a model back the layers, units and values it had at an earlier plan.

    Args:
        model: Module from which everything is named.
        anatomy: What it can lose, as built.
        plan: The earlier plan.
        values: Parameters and buffers of that time, by name.
        current: Plan the model carries now.
        spare: Layers that are gone, hollow or not.

    Raises:
        PruningError: If the values are not those of this model at this plan; it stays as it was.
    """
    arrange(model, anatomy.stacks, plan, current=current, spare=spare)
    try:
        rewrites = undo(model, anatomy.standing(plan), plan, values)
    except BaseException:
        _put_back(model, anatomy, {}, plan, current)
        raise
    return Operation(current, plan, tuple(rewrites), {})


def remodel(
    model: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    *,
    current: Plan,
    spare: Spare,
    only: Sequence[WidthAxis] | None = None,
) -> Operation:
    """Give a model the layers and shapes of any plan, for weights that follow.

    Args:
        model: Module from which everything is named.
        anatomy: What it can lose, as built.
        plan: The plan.
        current: Plan the model carries now.
        spare: Layers that are gone, hollow or not.
        only: The axes that change, at their places in the plan; default: all.

    Raises:
        PruningError: If the plan and the model do not belong together; the model is as it was.
    """
    removed = arrange(model, anatomy.stacks, plan, current=current, spare=spare)
    try:
        rewrites = reshape(model, anatomy.standing(plan), plan, only)
    except BaseException:
        _put_back(model, anatomy, removed, plan, current)
        raise
    return Operation(current, plan, tuple(rewrites), removed)


def cancel(model: nn.Module, anatomy: Anatomy, operation: Operation) -> Spare:
    """Put everything back that an operation changed: the very parameters and layers.

    Returns:
        Layers that had come back, and left again.
    """
    done = operation
    gone = arrange(model, anatomy.stacks, done.before, current=done.after, spare=done.removed)
    revert(model, anatomy.standing(done.before), done.before, done.rewrites)
    return gone


def _put_back(model: nn.Module, anatomy: Anatomy, removed: Spare, now: Plan, before: Plan) -> None:
    arrange(model, anatomy.stacks, before, current=now, spare=removed)
    revert(model, anatomy.standing(before), before, [])


def _check_shared(model: nn.Module, anatomy: Anatomy, current: Plan, after: Plan) -> None:
    """Refuse to take out a layer that holds what others use too."""
    homes: dict[int, list[tuple[nn.Module, str]]] | None = None
    for stack in anatomy.stacks:
        kept = after.kept.get(stack.name, ())
        places = current.kept.get(stack.name, ())
        leaving = [new for new, place in enumerate(places) if place not in kept]
        for number in leaving if stack.name in after.sizes else ():
            homes = owners(model) if homes is None else homes
            layer = model.get_submodule(f"{stack.name}.{number}")
            inside = {id(module) for _, module in modules_of(layer)}
            top = f"{stack.name}.{number}"
            for path, module in model.named_modules(remove_duplicate=False):
                if id(module) in inside and path != top and not path.startswith(f"{top}."):
                    raise PruningError(
                        f"Layer {number} of {stack.name!r} cannot go: the model holds a part of it "
                        f"as {path!r} too. Reach it through the stack, or leave the stack out."
                    )
            for name, parameter in layer.named_parameters():
                if _is_elsewhere(homes[id(parameter)], inside):
                    raise PruningError(
                        f"Layer {number} of {stack.name!r} cannot go: its {name!r} is shared with "
                        "another part of the model. Untie it first."
                    )


def _is_elsewhere(places: Iterable[tuple[nn.Module, str]], inside: set[int]) -> bool:
    return any(id(module) not in inside for module, _ in places)
