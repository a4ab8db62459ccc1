"""What a cut does to parameters, buffers and numbers on modules, checked before it happens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.empty_linear import linear_at
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup, SizeAttribute
from lightning_mi_prune.graph.layouts import Layout, kept_positions, layout_size
from lightning_mi_prune.surgery.empty_modules import is_cut_forward
from lightning_mi_prune.surgery.tensors import owners, parameter_of, tensor_of

__all__ = [
    "ParameterCut",
    "RotationMaps",
    "attribute_value",
    "check_attributes",
    "check_empty",
    "config_numbers",
    "number_steps",
    "parameter_cuts",
    "rotate_along",
    "set_attributes",
    "set_number",
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
    """Change of one tensor: kept positions and maps to new coordinates by dimension, new values.

    Args:
        name: Name of the parameter or buffer.
        old: The parameter or buffer.
        kept: Kept positions, by dimension.
        compensated: New values in the final shape, if it is compensated.
        rotated: Maps ``(heads, size, size)`` to new coordinates, by dimension.
    """

    name: str
    old: Tensor
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
                    shapes[s.tensor] = list(tensor_of(model, s.tensor).shape)
                except PruningError:
                    shapes[s.tensor] = list(s.shape)
            shapes[s.tensor][s.dim] = layout_size(s.layout, group.all_widths(widths))
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
        entries = {layout_size(a.tensors[0].layout, a.all_widths(plan.widths)) for a in tied}
        ends = [group for group in groups if group.config == field_name]
        # A model built from a config of narrower heads scales attention by their present size.
        narrow = any(
            plan.widths.get(name, size) != size for group in tied for name, size in group.partners
        )
        if (
            narrow
            or not ends
            or entries | {plan.width(group.name) for group in ends} != {numbers[field_name]}
        ):
            for group in (*tied, *ends):
                for name in () if group.config is None else (group.config, *group.config_aliases):
                    numbers[name] = group.size
    return numbers


def parameter_cuts(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    current: PruningPlan,
    kept: Mapping[str, tuple[int, ...]],
    compensated: Mapping[str, Tensor],
    rotated: RotationMaps | None = None,
) -> list[ParameterCut]:
    """The change of each parameter and buffer in a cut.

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
    cut_by: dict[tuple[int, int], tuple[Layout, str]] = {}
    for group in cut:
        for s in group.tensors:
            old = tensor_of(model, s.tensor)
            key = (id(old), s.dim)
            layout, first = cut_by.setdefault(key, (s.layout, group.name))
            if layout != s.layout:
                raise PruningError(
                    f"{s.tensor!r} is cut by {first!r} and {group.name!r} at once: layers "
                    "share it. Exclude one of the groups, or untie the parameter."
                )
            if id(old) in found and s.dim in found[id(old)].kept:
                continue  # tied under another name, or cut by another group of its layout
            stranger = next((m for m, _ in homes[id(old)] if id(m) not in described), None)
            if stranger is not None:
                raise PruningError(
                    f"{s.tensor!r} is shared with a {type(stranger).__name__} outside the group "
                    f"{group.name!r}, which would fail. Exclude the group, or untie the parameter."
                )
            at = group.all_widths(widths)
            width = layout_size(s.layout, at)
            present = old.shape[s.dim] if s.dim < old.ndim else 0
            if present != width:
                raise PruningError(
                    f"{s.tensor!r} has {present} entries along dimension {s.dim}; the "
                    f"plan expects {width}. The model was changed without the plan: put a new "
                    "network there, with a config of its own, or load the weights of the plan."
                )
            change = found.setdefault(id(old), ParameterCut(s.tensor, old))
            positions = kept_positions(s.layout, kept, at)
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


def check_empty(model: nn.Module, groups: Sequence[DependencyGroup], plan: PruningPlan) -> None:
    """Refuse a plan that empties a group which cannot be empty, or with a width that cannot run.

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
        if width < group.size and width % group.multiple:
            raise PruningError(
                f"The plan keeps {counted(width, 'unit')} of group {group.name!r}; expected a "
                f"multiple of {group.multiple}, because grouped_mm needs aligned rows. Choose such "
                "a width, or set the experts of the model to 'eager' and discover it again."
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


def check_attributes(model: nn.Module, groups: Sequence[DependencyGroup]) -> None:
    """Refuse groups with a number on a module that cannot follow their width.

    Args:
        model: Module from which the groups are named.
        groups: Groups that are cut.

    Raises:
        PruningError: Naming the attribute, if it is no number, or cannot be set.

    Example:
        >>> size = SizeAttribute("", "out_features", (("units",),))
        >>> group = DependencyGroup("units", "ffn", 3, (), ("next",), (size,))
        >>> check_attributes(nn.Linear(2, 3), [group])
    """
    for group in groups:
        for number in group.attributes:
            _check(model, group, number)


def set_attributes(
    model: nn.Module, groups: Sequence[DependencyGroup], widths: Mapping[str, int]
) -> None:
    """Set the numbers on modules to what they are at the given widths.

    A list, tuple or config that holds a number is replaced by a copy: others may use it too.

    Args:
        model: Module from which the groups are named.
        groups: Groups whose numbers are set.
        widths: Widths of all groups.

    Example:
        >>> net, size = nn.Linear(2, 3), SizeAttribute("", "out_features", (("units",),))
        >>> group = DependencyGroup("units", "ffn", 3, (), ("next",), (size,))
        >>> set_attributes(net, [group], {"units": 1})
        >>> net.out_features
        1
    """
    for group in groups:
        at = group.all_widths(widths)
        for number in group.attributes:
            module = linear_at(model.get_submodule(number.module))
            set_number(module, number_steps(number), layout_size(number.layout, at))


def attribute_value(model: nn.Module, number: SizeAttribute) -> Any:
    """The present value of a number on a module.

    Args:
        model: Module from which it is named.
        number: The number; parts of its path may be fields of a config or places in a tuple.

    Raises:
        PruningError: If there is no such attribute.

    Example:
        >>> attribute_value(nn.Linear(2, 3), SizeAttribute("", "out_features", (("units",),)))
        3
    """
    try:
        value: Any = linear_at(model.get_submodule(number.module))
        for step in number_steps(number):
            value = value[step] if isinstance(step, int) else getattr(value, step)
    except (AttributeError, IndexError, TypeError, KeyError) as error:
        raise PruningError(
            f"{_path(number)!r} is no attribute of this {type(model).__name__}; was it replaced?"
        ) from error
    return value


def _path(number: SizeAttribute) -> str:
    return f"{number.module}.{number.attribute}".lstrip(".")


def number_steps(number: SizeAttribute) -> list[str | int]:
    """Attributes and places on the way to a number: ``"config.sizes.1"``."""
    steps = [int(s) if s.isdecimal() else s for s in number.attribute.split(".")]
    return [*steps, 0] if number.sequence else steps


def set_number(owner: Any, steps: Sequence[str | int], value: int) -> None:
    """Set a number; a tuple, list or object on the way is replaced by a copy.

    Args:
        owner: A module.
        steps: Attributes and places on the way to the number.
        value: The number.
    """
    first, *rest = steps
    inner: Any = value
    if rest:
        inner = copy.copy(owner[first] if isinstance(first, int) else getattr(owner, str(first)))
        if isinstance(inner, tuple):
            entries = list(inner)
            set_number(entries, rest, value)
            inner = tuple(entries)
        else:
            set_number(inner, rest, value)
    if isinstance(first, int):
        owner[first] = inner
    else:
        setattr(owner, first, inner)


def _check(model: nn.Module, group: DependencyGroup, number: SizeAttribute) -> None:
    value = attribute_value(model, number)
    if isinstance(value, bool) or not isinstance(value, int):
        raise PruningError(
            f"{_path(number)!r} is {value!r:.80}, no whole number; group {group.name!r} must set "
            "it after a cut. Exclude the group, or hold the width in a plain attribute."
        )
    module, (first, *_) = linear_at(model.get_submodule(number.module)), number_steps(number)
    whole = getattr(module, str(first))
    held = getattr(type(module), str(first), None)
    if isinstance(held, property) and held.fset is None:
        raise PruningError(
            f"{_path(number)!r} is computed by the {type(module).__name__} itself; group "
            f"{group.name!r} must set it after a cut. Exclude the group."
        )
    if number.sequence and len(whole) != 1:
        raise PruningError(
            f"{_path(number)!r} is {whole!r:.80}; group {group.name!r} expects one number in it. "
            "Exclude the group."
        )
