"""PREPARE  what a cut would touch, checked before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.plan import Plan

__all__ = ["Incision", "incisions", "owners", "parameter_of", "shapes_at"]


@dataclass
class Incision:
    """One parameter, what is to be cut off it, and new values if it takes over others' work."""

    name: str
    old: nn.Parameter
    kept: dict[int, Tensor] = field(default_factory=dict)
    folded: Tensor | None = None


def shapes_at(axes: Sequence[WidthAxis], plan: Plan) -> dict[str, list[int]]:
    """Shape of every tensor that the axes cut, at a plan."""
    shapes: dict[str, list[int]] = {}
    for axis in axes:
        for s in axis.slices:
            shape = shapes.setdefault(s.tensor, list(s.shape))
            shape[s.dim] = plan.width(axis.name) * axis.entries
    return shapes


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place where each parameter lives, by identity."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places[id(parameter)].append((module, attribute))
    return places


def incisions(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    current: Plan,
    places: Mapping[str, tuple[int, ...]],
    folded: Mapping[str, Tensor],
) -> list[Incision]:
    """What a cut would do to each parameter.

    Args:
        model: Module from which the axes are named; only read.
        axes: Axes of the plan.
        current: Plan the model carries now.
        places: Survivors of every axis that is cut, as positions in the present model.
        folded: New values of readers, by tensor name.

    Raises:
        PruningError: If a parameter cannot be cut, or does not fit the plan.
    """
    homes = owners(model)
    described = {id(model.get_submodule(_module(s.tensor))) for a in axes for s in a.slices}
    found: dict[int, Incision] = {}
    cut_by: dict[tuple[int, int], str] = {}
    for axis in axes:
        if axis.name not in places or len(places[axis.name]) == current.width(axis.name):
            continue
        for s in axis.slices:
            old = parameter_of(model, s.tensor)
            key = (id(old), s.dim)
            if key in cut_by:
                raise PruningError(
                    f"{s.tensor!r} is cut by {cut_by[key]!r} and {axis.name!r} at once: layers "
                    "share it. Exclude one of the axes, or untie the parameter."
                )
            cut_by[key] = axis.name
            stranger = next((m for m, _ in homes[id(old)] if id(m) not in described), None)
            if stranger is not None:
                raise PruningError(
                    f"{s.tensor!r} is shared with a {type(stranger).__name__} outside the axis "
                    f"{axis.name!r}, which would break. Exclude the axis, or untie the parameter."
                )
            width = current.width(axis.name) * axis.entries
            if old.shape[s.dim] != width:
                raise PruningError(
                    f"{s.tensor!r} has {old.shape[s.dim]} entries along dimension {s.dim}; the "
                    f"plan expects {width}. The model was changed behind the plan."
                )
            units = torch.tensor(places[axis.name], device=old.device)
            entries = torch.arange(axis.entries, device=old.device)
            incision = found.setdefault(id(old), Incision(s.tensor, old))
            incision.kept[s.dim] = (units[:, None] * axis.entries + entries).flatten()
    for name, values in folded.items():
        old = parameter_of(model, name)
        incision = found.setdefault(id(old), Incision(name, old))
        incision.folded = values
    for incision in found.values():
        _check_folded(incision)
    return list(found.values())


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of that name, if a cut of it would be safe.

    Raises:
        PruningError: If there is none, or it is no plain parameter, or carries hooks.
    """
    try:
        parameter = model.get_parameter(name)
    except AttributeError as error:
        raise PruningError(f"The model has no parameter {name!r}; was it replaced?") from error
    if type(parameter) is not nn.Parameter:
        raise PruningError(
            f"{name!r} is a {type(parameter).__name__}; expected a plain torch.nn.Parameter. "
            "Prune before quantizing or sharding."
        )
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise PruningError(
            f"{name!r} carries gradient hooks, which would stay behind on the old parameter. "
            "Remove them before the cut and register them again after it."
        )
    return parameter


def _check_folded(incision: Incision) -> None:
    if incision.folded is None:
        return
    shape = list(incision.old.shape)
    if 1 in incision.kept:
        shape[1] = len(incision.kept[1])
    if list(incision.folded.shape) != shape:
        raise PruningError(
            f"The fold-in of {incision.name!r} has shape {tuple(incision.folded.shape)}; expected "
            f"{tuple(shape)}. It belongs to another plan."
        )
