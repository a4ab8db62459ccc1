"""The change of each parameter in a cut, checked before the model is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.empty_linear import linear_at, modules_of
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup, entry_positions
from lightning_mi_prune.surgery.empty_modules import is_cut_forward

__all__ = [
    "ParameterCut",
    "RotationMaps",
    "check_empty",
    "config_numbers",
    "owners",
    "parameter_cuts",
    "parameter_of",
    "rotate_along",
    "shapes_at",
]

RotationMaps = Mapping[str, Mapping[int, Tensor]]
"""Maps ``(heads, size, size)`` to new coordinates, by name and dimension of a tensor."""


def rotate_along(tensor: Tensor, dim: int, maps: Tensor) -> Tensor:
    """A tensor with one dimension, ``heads * size`` long, in new coordinates for every head.

    Example:
        >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> rotate_along(torch.tensor([[1.0, 2.0]]), 1, swap)
        tensor([[2., 1.]])
    """
    last = tensor.to(maps).movedim(dim, -1)
    heads = last.reshape(*last.shape[:-1], *maps.shape[:2])
    new = torch.einsum("hij,...hj->...hi", maps, heads)
    return new.flatten(-2).movedim(-1, dim).to(tensor)


@dataclass
class ParameterCut:
    """Change of one parameter: kept positions and maps to new coordinates by dimension, new values.

    Args:
        name: Name of the parameter.
        old: The parameter.
        kept: Kept positions, by dimension.
        compensated: New values in the final shape, if it is compensated.
        rotated: Maps ``(heads, size, size)`` to new coordinates, by dimension.
    """

    name: str
    old: nn.Parameter
    kept: dict[int, Tensor] = field(default_factory=dict)
    compensated: Tensor | None = None
    rotated: Mapping[int, Tensor] = field(default_factory=dict)


def shapes_at(
    model: nn.Module, groups: Sequence[DependencyGroup], plan: PruningPlan
) -> dict[str, list[int]]:
    """Shape of every tensor that the groups cut, at a plan.

    Dimensions that they do not cut are as now, or as built for a tensor of a removed layer.
    """
    shapes: dict[str, list[int]] = {}
    widths = plan.widths
    for group in groups:
        for s in group.tensors:
            if s.tensor not in shapes:
                try:
                    shapes[s.tensor] = list(model.get_parameter(s.tensor).shape)
                except AttributeError:
                    shapes[s.tensor] = list(s.shape)
            shape = shapes[s.tensor]
            shape[s.dim] = widths[group.name] * group.entries_at(widths)
    return shapes


def config_numbers(groups: Sequence[DependencyGroup], plan: PruningPlan) -> dict[str, int]:
    """Values of the config fields of one network at a plan.

    A field stays as built where one number is not enough: if groups differ in width or one is
    empty. Tied fields change together or not at all.

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> dims = (PrunableDim("w", 0, (24, 24), (("h", 6),)),)
        >>> heads = DependencyGroup("h", "heads", 4, dims, ("o",), config="n_heads", tie="dim")
        >>> stream = DependencyGroup("r", "hidden", 24, (), ("o",), config="dim")
        >>> kept = {"h": (0, 1), "r": tuple(range(12))}
        >>> config_numbers([heads, stream], PruningPlan({"h": 4, "r": 24}, kept))
        {'n_heads': 2, 'dim': 12}
        >>> config_numbers([heads, stream], PruningPlan({"h": 4, "r": 24}, kept | {"h": (0,)}))
        {'n_heads': 4, 'dim': 24}
    """
    named: dict[str, list[DependencyGroup]] = {}
    for group in groups:
        for name in () if group.config is None else (group.config, *group.config_aliases):
            named.setdefault(name, []).append(group)
    numbers: dict[str, int] = {}
    for name, holders in named.items():
        widths = {plan.width(group.name) for group in holders}
        uniform = len(widths) == 1 and 0 not in widths
        numbers[name] = widths.pop() if uniform else holders[0].size
    for field_name in {group.tie for group in groups if group.tie is not None}:
        tied = [group for group in groups if group.tie == field_name]
        entries = {plan.width(group.name) * group.entries_at(plan.widths) for group in tied}
        ends = [group for group in groups if group.config == field_name]
        # A model built from a config of narrower heads scales attention by their present size.
        narrow = any(group.entries_at(plan.widths) != group.entries for group in tied)
        if (
            narrow
            or not ends
            or entries | {plan.width(group.name) for group in ends} != {numbers[field_name]}
        ):
            for group in (*tied, *ends):
                for name in () if group.config is None else (group.config, *group.config_aliases):
                    numbers[name] = group.size
    return numbers


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules and attributes that hold each parameter, by its ``id``."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for _, module in modules_of(model):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                found[id(parameter)].append((module, attribute))
    return found


def parameter_cuts(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    current: PruningPlan,
    kept: Mapping[str, tuple[int, ...]],
    compensated: Mapping[str, Tensor],
    rotated: RotationMaps | None = None,
) -> list[ParameterCut]:
    """The change of each parameter in a cut.

    Args:
        model: Module from which the groups are named; only read.
        groups: Groups of the plan.
        current: Plan of the model now.
        kept: Kept units of every group that is cut, as positions in the present model.
        compensated: New values of parameters in their final shape, by tensor name.
        rotated: New coordinates in which those values are, by tensor and dimension.

    Raises:
        PruningError: If a parameter cannot be cut, or does not fit the plan.
    """
    homes, widths = owners(model), current.widths
    cut = [a for a in groups if a.name in kept and len(kept[a.name]) < widths[a.name]]
    paths = {_module(s.tensor) for a in cut for s in a.tensors}
    paths |= {count.module for a in cut for count in a.attributes}
    found_at = [model.get_submodule(path) for path in paths]
    described = {id(part) for module in found_at for part in (module, linear_at(module))}
    found: dict[int, ParameterCut] = {}
    cut_by: dict[tuple[int, int], str] = {}
    for group in cut:
        for s in group.tensors:
            old = parameter_of(model, s.tensor)
            key = (id(old), s.dim)
            if cut_by.get(key) in (group.name, group.product_with or group.name):
                continue  # tied under another name, or cut by the other group of the product
            if key in cut_by:
                raise PruningError(
                    f"{s.tensor!r} is cut by {cut_by[key]!r} and {group.name!r} at once: layers "
                    "share it. Exclude one of the groups, or untie the parameter."
                )
            cut_by[key] = group.name
            stranger = next((m for m, _ in homes[id(old)] if id(m) not in described), None)
            if stranger is not None:
                raise PruningError(
                    f"{s.tensor!r} is shared with a {type(stranger).__name__} outside the group "
                    f"{group.name!r}, which would fail. Exclude the group, or untie the parameter."
                )
            width = widths[group.name] * group.entries_at(widths)
            if old.shape[s.dim] != width:
                raise PruningError(
                    f"{s.tensor!r} has {old.shape[s.dim]} entries along dimension {s.dim}; the "
                    f"plan expects {width}. The model was changed without the plan: put a new "
                    "network there, with a config of its own, or load the weights of the plan."
                )
            change = found.setdefault(id(old), ParameterCut(s.tensor, old))
            positions = entry_positions(group, kept, widths)
            change.kept[s.dim] = torch.tensor(positions, dtype=torch.long, device=old.device)
    for name, values in compensated.items():
        old = parameter_of(model, name)
        change = found.setdefault(id(old), ParameterCut(name, old))
        change.compensated = values
    for name, dims in (rotated or {}).items():
        old = parameter_of(model, name)
        change = found.setdefault(id(old), ParameterCut(name, old))
        change.rotated = dims
    for change in found.values():
        _check_compensated(change)
        _check_rotated(change)
    return list(found.values())


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a name, if it can be cut.

    Raises:
        PruningError: If there is none, it is not a plain parameter, or it has hooks.
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
            f"{name!r} has gradient hooks, which would remain on the old parameter. Remove them "
            "before the cut and register them again after it."
        )
    return parameter


def check_empty(model: nn.Module, groups: Sequence[DependencyGroup], plan: PruningPlan) -> None:
    """Refuse a plan that empties a group which cannot be empty.

    Raises:
        PruningError: If there is such a group, or a ``forward`` to replace was replaced before.
    """
    for group in groups:
        if group.name not in plan.sizes:
            continue
        width = plan.width(group.name)
        if not width and not group.may_be_empty and not group.empty_forward:
            raise PruningError(
                f"The plan keeps none of {counted(group.size, 'unit')} of group {group.name!r}, "
                "which cannot be empty; expected one or more. Lower the sparsity, or exclude the "
                "group."
            )
        paths = [s.module for s in group.empty_forward if not width]
        paths += [s.module for s in group.unit_arguments if width < group.size]
        for path in paths:
            forward = vars(model.get_submodule(path)).get("forward")
            if forward is not None and not is_cut_forward(forward):
                raise PruningError(
                    f"{path!r} has a forward of its own, {forward!r:.80}; expected that of its "
                    "class, because the cut must replace it. Remove it, or exclude the group "
                    f"{group.name!r}."
                )


def _check_compensated(change: ParameterCut) -> None:
    if change.compensated is None:
        return
    shape = list(change.old.shape)
    for dim, index in change.kept.items():
        shape[dim] = len(index)
    if list(change.compensated.shape) != shape:
        raise PruningError(
            f"The compensated {change.name!r} has shape {tuple(change.compensated.shape)}; "
            f"expected {tuple(shape)}. It belongs to another plan."
        )


def _check_rotated(change: ParameterCut) -> None:
    for dim, maps in change.rotated.items():
        shape, size = tuple(change.old.shape), 0
        square = maps.ndim == 3 and maps.shape[1] == maps.shape[2]
        if square and 0 <= dim < len(shape):
            size = maps.shape[0] * maps.shape[1]
        real = maps.is_floating_point() and not maps.is_meta and bool(maps.isfinite().all())
        if size and real:
            real = not bool(torch.linalg.inv_ex(maps.double().cpu()).info.any())
        if change.compensated is None or not real or size != shape[dim]:
            raise PruningError(
                f"The rotation of {change.name!r} along dimension {dim} has shape "
                f"{tuple(maps.shape)} and type {maps.dtype}; expected (heads, size, size) of "
                f"{shape}, invertible and with compensated values. It belongs to another plan."
            )
