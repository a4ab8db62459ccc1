"""Whole cuts of a model, layers and units alike, that can be undone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_mi_prune.core.empty_linear import modules_of
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.graph import PruningGraph
from lightning_mi_prune.discovery.groups import DependencyGroup
from lightning_mi_prune.surgery.layers import RemovedLayers, arrange_layers
from lightning_mi_prune.surgery.parameters import RotationMaps, owners
from lightning_mi_prune.surgery.units import (
    Rewrite,
    apply_plan,
    reshape_tensors,
    restore_plan,
    revert_rewrites,
)

__all__ = [
    "ModelCut",
    "cancel_cut",
    "cut_model",
    "reshape_model",
    "restore_model",
]


@dataclass(frozen=True)
class ModelCut:
    """What was done to a model, and all it takes to cancel it.

    Args:
        before: Plan the model carried.
        after: Plan it carries now.
        rewrites: Parameters that were replaced.
        removed: Layers that left, by stack and number as built.
    """

    before: PruningPlan
    after: PruningPlan
    rewrites: tuple[Rewrite, ...]
    removed: RemovedLayers

    @property
    def removed_parameters(self) -> list[nn.Parameter]:
        """Parameters that left with their layers."""
        layers = (layer for stack in self.removed.values() for layer in stack.values())
        return [parameter for layer in layers for parameter in layer.parameters()]


def cut_model(
    model: nn.Module,
    graph: PruningGraph,
    plan: PruningPlan,
    *,
    current: PruningPlan,
    compensated: Mapping[str, Tensor] | None = None,
    rotated: RotationMaps | None = None,
) -> ModelCut:
    """Take layers and units out of a model; a refused plan, or an error, leaves it as it was.

    Args:
        model: Module from which everything is named.
        graph: What it can lose, as built.
        plan: Survivors, of all groups and stacks or of some.
        current: Plan the model carries now.
        compensated: New values of parameters, as for :func:`units.apply_plan`.
        rotated: New coordinates of heads, likewise.

    Raises:
        PruningError: If the plan and the model do not belong together.
    """
    after = current.then(plan)
    _check_shared(model, graph, current, after)
    removed = arrange_layers(model, graph.stacks, after, current=current)
    try:
        standing = graph.groups_at(after)
        rewrites = apply_plan(
            model, standing, plan, current=current, compensated=compensated, rotated=rotated
        )
    except BaseException:
        _put_back(model, graph, removed, after, current)
        raise
    return ModelCut(current, after, tuple(rewrites), removed)


def restore_model(
    model: nn.Module,
    graph: PruningGraph,
    plan: PruningPlan,
    values: Mapping[str, Tensor],
    *,
    current: PruningPlan,
    available: RemovedLayers,
) -> ModelCut:
    """Give a model back the layers, units and values it had at an earlier plan.

    Args:
        model: Module from which everything is named.
        graph: What it can lose, as built.
        plan: The earlier plan.
        values: Parameters and buffers of that time, by name.
        current: Plan the model carries now.
        available: Layers that are gone, hollow or not.

    Raises:
        PruningError: If the values are not those of this model at this plan; it stays as it was.
    """
    arrange_layers(model, graph.stacks, plan, current=current, available=available)
    try:
        rewrites = restore_plan(model, graph.groups_at(plan), plan, values)
    except BaseException:
        _put_back(model, graph, {}, plan, current)
        raise
    return ModelCut(current, plan, tuple(rewrites), {})


def reshape_model(
    model: nn.Module,
    graph: PruningGraph,
    plan: PruningPlan,
    *,
    current: PruningPlan,
    available: RemovedLayers,
    only: Sequence[DependencyGroup] | None = None,
) -> ModelCut:
    """Give a model the layers and shapes of any plan, for weights that follow.

    Args:
        model: Module from which everything is named.
        graph: What it can lose, as built.
        plan: The plan.
        current: Plan the model carries now.
        available: Layers that are gone, hollow or not.
        only: The groups that change, at their places in the plan; default: all.

    Raises:
        PruningError: If the plan and the model do not belong together; the model is as it was.
    """
    removed = arrange_layers(model, graph.stacks, plan, current=current, available=available)
    try:
        rewrites = reshape_tensors(model, graph.groups_at(plan), plan, only)
    except BaseException:
        _put_back(model, graph, removed, plan, current)
        raise
    return ModelCut(current, plan, tuple(rewrites), removed)


def cancel_cut(model: nn.Module, graph: PruningGraph, operation: ModelCut) -> RemovedLayers:
    """Put everything back that an operation changed: the very parameters and layers.

    Returns:
        Layers that had come back, and left again.
    """
    done = operation
    gone = arrange_layers(
        model, graph.stacks, done.before, current=done.after, available=done.removed
    )
    revert_rewrites(model, graph.groups_at(done.before), done.before, done.rewrites)
    return gone


def _put_back(
    model: nn.Module,
    graph: PruningGraph,
    removed: RemovedLayers,
    now: PruningPlan,
    before: PruningPlan,
) -> None:
    arrange_layers(model, graph.stacks, before, current=now, available=removed)
    revert_rewrites(model, graph.groups_at(before), before, [])


def _check_shared(
    model: nn.Module, graph: PruningGraph, current: PruningPlan, after: PruningPlan
) -> None:
    """Refuse to take out a layer that holds what others use too."""
    homes: dict[int, list[tuple[nn.Module, str]]] | None = None
    for stack in graph.stacks:
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
