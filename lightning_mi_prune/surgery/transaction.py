"""Cuts of layers and units together, which can be undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_mi_prune.core.empty_linear import modules_of
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.surgery.layers import RemovedLayers, arrange_layers
from lightning_mi_prune.surgery.parameters import RotationMaps
from lightning_mi_prune.surgery.tensors import owners
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
    """A cut that was made, with everything needed to undo it.

    Args:
        before: Plan of the model before.
        after: Plan of the model now.
        rewrites: Parameters that were replaced.
        removed: Layers that were removed, by stack and number as built.
    """

    before: PruningPlan
    after: PruningPlan
    rewrites: tuple[Rewrite, ...]
    removed: RemovedLayers

    @property
    def removed_parameters(self) -> list[nn.Parameter]:
        """Parameters of the removed layers."""
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
    """Remove layers and units of a model; after an error it is unchanged.

    Args:
        model: Module from which groups and stacks are named.
        graph: Groups and stacks as built.
        plan: Units and layers that stay, of all groups and stacks or of some.
        current: Plan of the model now.
        compensated: As for :func:`units.apply_plan`.
        rotated: As for :func:`units.apply_plan`.

    Raises:
        PruningError: If the plan does not fit the model.
    """
    after = current.then(plan)
    _check_shared(model, graph, current, after)
    removed = arrange_layers(model, graph.stacks, after, current=current)
    try:
        groups = graph.groups_at(after)
        rewrites = apply_plan(
            model, groups, plan, current=current, compensated=compensated, rotated=rotated
        )
    except BaseException:
        _undo_layers(model, graph, removed, after, current)
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
        model: Module from which groups and stacks are named.
        graph: Groups and stacks as built.
        plan: The earlier plan.
        values: Parameters and buffers of that time, by name.
        current: Plan of the model now.
        available: Removed layers, with or without storage.

    Raises:
        PruningError: If the values do not fit this model at this plan; it is unchanged then.
    """
    arrange_layers(model, graph.stacks, plan, current=current, available=available)
    try:
        rewrites = restore_plan(model, graph.groups_at(plan), plan, values)
    except BaseException:
        _undo_layers(model, graph, {}, plan, current)
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
    """Give a model the layers and shapes of any plan, before weights are loaded.

    Args:
        model: Module from which groups and stacks are named.
        graph: Groups and stacks as built.
        plan: The plan.
        current: Plan of the model now.
        available: Removed layers, with or without storage.
        only: The groups that change, at their paths after it; default: all.

    Raises:
        PruningError: If the plan does not fit the model; it is unchanged then.
    """
    removed = arrange_layers(model, graph.stacks, plan, current=current, available=available)
    try:
        rewrites = reshape_tensors(model, graph.groups_at(plan), plan, only)
    except BaseException:
        _undo_layers(model, graph, removed, plan, current)
        raise
    return ModelCut(current, plan, tuple(rewrites), removed)


def cancel_cut(model: nn.Module, graph: PruningGraph, done: ModelCut) -> RemovedLayers:
    """Undo a cut: the same parameter objects and layers are put back.

    Returns:
        Layers that the cut had put back, removed again.
    """
    removed = arrange_layers(
        model, graph.stacks, done.before, current=done.after, available=done.removed
    )
    revert_rewrites(model, graph.groups_at(done.before), done.before, done.rewrites)
    return removed


def _undo_layers(
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
    """Refuse to remove a layer with modules or parameters that are used elsewhere too."""
    homes: dict[int, list[tuple[nn.Module, str]]] | None = None
    for stack in graph.stacks:
        kept = after.kept.get(stack.name, ())
        present = current.kept.get(stack.name, ())
        leaving = [new for new, index in enumerate(present) if index not in kept]
        for number in leaving if stack.name in after.sizes else ():
            homes = owners(model) if homes is None else homes
            layer = model.get_submodule(f"{stack.name}.{number}")
            inside = {id(module) for _, module in modules_of(layer)}
            top = f"{stack.name}.{number}"
            for path, module in model.named_modules(remove_duplicate=False):
                if id(module) in inside and path != top and not path.startswith(f"{top}."):
                    raise PruningError(
                        f"Layer {number} of {stack.name!r} cannot be removed: the model holds "
                        f"a part of it as {path!r} too. Use it through the stack, or leave it out."
                    )
            for name, parameter in layer.named_parameters():
                if any(id(module) not in inside for module, _ in homes[id(parameter)]):
                    raise PruningError(
                        f"Layer {number} of {stack.name!r} cannot be removed: its {name!r} "
                        "is shared with another part of the model. Untie it first."
                    )
