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
from lightning_mi_prune.standins import is_ours, linear_at, modules_of
from lightning_mi_prune.turns import TurnMaps
from lightning_mi_prune.wording import counted

__all__ = [
    "Incision",
    "check_empty",
    "config_numbers",
    "incisions",
    "owners",
    "parameter_of",
    "positions",
    "shapes_at",
]


@dataclass
class Incision:
    """One parameter, what is cut off it, new values if it takes over others' work, and turns."""

    name: str
    old: nn.Parameter
    kept: dict[int, Tensor] = field(default_factory=dict)
    folded: Tensor | None = None
    turned: Mapping[int, Tensor] = field(default_factory=dict)


def shapes_at(model: nn.Module, axes: Sequence[WidthAxis], plan: Plan) -> dict[str, list[int]]:
    """Shape of every tensor that the axes cut, at a plan; what they do not cut is as it is now.

    A tensor that is not there now, as of a layer that is gone, is as it was built.
    """
    shapes: dict[str, list[int]] = {}
    widths = plan.widths
    for axis in axes:
        for s in axis.slices:
            if s.tensor not in shapes:
                try:
                    shapes[s.tensor] = list(model.get_parameter(s.tensor).shape)
                except AttributeError:
                    shapes[s.tensor] = list(s.shape)
            shape = shapes[s.tensor]
            shape[s.dim] = widths[axis.name] * axis.entries_at(widths)
    return shapes


def positions(
    axis: WidthAxis, kept: Mapping[str, Sequence[int]], widths: Mapping[str, int]
) -> Tensor:
    """Where the entries of an axis that survive stand now, in the order of the tensor.

    Args:
        axis: The axis; what survives of an axis that it crosses is looked at too.
        kept: Survivors of each axis that is cut, as positions in the present model.
        widths: Present width of every axis.

    Example:
        >>> heads = WidthAxis("heads", "heads", 2, 3, (), ("o",), crossed="dims")
        >>> positions(heads, {"heads": (1,), "dims": (0, 1)}, {"heads": 2, "dims": 3})
        tensor([3, 4])
    """
    across = axis.entries_at(widths)
    mine = kept.get(axis.name, range(widths[axis.name]))
    others = kept.get(axis.crossed, range(across)) if axis.crossed in widths else range(across)
    outer, inner = (others, mine) if axis.spread else (mine, others)
    stride = widths[axis.name] if axis.spread else across
    rows = torch.tensor([*outer], dtype=torch.long)[:, None] * stride
    return (rows + torch.tensor([*inner], dtype=torch.long)).flatten()


def config_numbers(axes: Sequence[WidthAxis], plan: Plan) -> dict[str, int]:
    """What the config fields of one network must say at a plan.

    One number cannot say several widths, and none can say that nothing is left: the field then
    stays as built, and the plan tells. Fields that are tied are written together or not at all.

    Example:
        >>> parts = {"slices": (), "readers": ()}
        >>> heads = WidthAxis("h", "heads", 4, 6, config="n_heads", tie="dim", **parts)
        >>> stream = WidthAxis("r", "residual", 24, 1, config="dim", **parts)
        >>> kept = {"h": (0, 1), "r": tuple(range(12))}
        >>> config_numbers([heads, stream], Plan({"h": 4, "r": 24}, kept))
        {'n_heads': 2, 'dim': 12}
        >>> config_numbers([heads, stream], Plan({"h": 4, "r": 24}, kept | {"h": (0,)}))
        {'n_heads': 4, 'dim': 24}
    """
    named: dict[str, list[WidthAxis]] = {}
    for axis in axes:
        for name in () if axis.config is None else (axis.config, *axis.twins):
            named.setdefault(name, []).append(axis)
    numbers: dict[str, int] = {}
    for name, holders in named.items():
        widths = {plan.width(axis.name) for axis in holders}
        uniform = len(widths) == 1 and 0 not in widths
        numbers[name] = widths.pop() if uniform else holders[0].size
    for field_name in {axis.tie for axis in axes if axis.tie is not None}:
        tied = [axis for axis in axes if axis.tie == field_name]
        entries = {plan.width(axis.name) * axis.entries_at(plan.widths) for axis in tied}
        ends = [axis for axis in axes if axis.config == field_name]
        # A config of fewer, narrower heads would scale attention by the size that they have now.
        narrow = any(axis.entries_at(plan.widths) != axis.entries for axis in tied)
        if (
            narrow
            or not ends
            or entries | {plan.width(axis.name) for axis in ends} != {numbers[field_name]}
        ):
            for axis in (*tied, *ends):
                for name in () if axis.config is None else (axis.config, *axis.twins):
                    numbers[name] = axis.size
    return numbers


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place where each parameter lives, by identity."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for _, module in modules_of(model):
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
    turned: TurnMaps | None = None,
) -> list[Incision]:
    """What a cut would do to each parameter.

    Args:
        model: Module from which the axes are named; only read.
        axes: Axes of the plan.
        current: Plan the model carries now.
        places: Survivors of every axis that is cut, as positions in the present model.
        folded: New values of parameters in their final shape, by tensor name.
        turned: New coordinates in which those values are, by tensor and dimension.

    Raises:
        PruningError: If a parameter cannot be cut, or does not fit the plan.
    """
    homes, widths = owners(model), current.widths
    cut = [a for a in axes if a.name in places and len(places[a.name]) < widths[a.name]]
    paths = {_module(s.tensor) for a in cut for s in a.slices}
    paths |= {count.module for a in cut for count in a.counts}
    found_at = [model.get_submodule(path) for path in paths]
    described = {id(part) for module in found_at for part in (module, linear_at(module))}
    found: dict[int, Incision] = {}
    cut_by: dict[tuple[int, int], str] = {}
    for axis in cut:
        for s in axis.slices:
            old = parameter_of(model, s.tensor)
            key = (id(old), s.dim)
            if cut_by.get(key) in (axis.name, axis.crossed or axis.name):
                continue  # a tied parameter, reached by its other name, or by what crosses the axis
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
            width = widths[axis.name] * axis.entries_at(widths)
            if old.shape[s.dim] != width:
                raise PruningError(
                    f"{s.tensor!r} has {old.shape[s.dim]} entries along dimension {s.dim}; the "
                    f"plan expects {width}. The model was changed behind the plan: put a whole new "
                    "network there, with a config of its own, or load the weights the plan is of."
                )
            incision = found.setdefault(id(old), Incision(s.tensor, old))
            incision.kept[s.dim] = positions(axis, places, widths).to(old.device)
    for name, values in folded.items():
        old = parameter_of(model, name)
        incision = found.setdefault(id(old), Incision(name, old))
        incision.folded = values
    for name, dims in (turned or {}).items():
        old = parameter_of(model, name)
        incision = found.setdefault(id(old), Incision(name, old))
        incision.turned = dims
    for incision in found.values():
        _check_folded(incision)
        _check_turned(incision)
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


def check_empty(model: nn.Module, axes: Sequence[WidthAxis], plan: Plan) -> None:
    """Refuse a plan that empties an axis which cannot be empty.

    Raises:
        PruningError: If there is such an axis, or a stand-in's place on a module is taken.
    """
    for axis in axes:
        if axis.name not in plan.sizes:
            continue
        width = plan.width(axis.name)
        if not width and not axis.may_vanish and not axis.silence:
            raise PruningError(
                f"The plan keeps none of {counted(axis.size, 'unit')} of axis {axis.name!r}, which "
                "cannot be empty; expected at least one. Lower the sparsity, or exclude the axis."
            )
        places = [s.module for s in axis.silence if not width]
        places += [s.module for s in axis.selects if width < axis.size]
        for path in places:
            forward = vars(model.get_submodule(path)).get("forward")
            if forward is not None and not is_ours(forward):
                raise PruningError(
                    f"{path!r} has a forward of its own, {forward!r:.80}; expected that of its "
                    "class, because the cut must replace it. Remove it, or exclude the axis "
                    f"{axis.name!r}."
                )


def _check_folded(incision: Incision) -> None:
    if incision.folded is None:
        return
    shape = list(incision.old.shape)
    for dim, index in incision.kept.items():
        shape[dim] = len(index)
    if list(incision.folded.shape) != shape:
        raise PruningError(
            f"The fold-in of {incision.name!r} has shape {tuple(incision.folded.shape)}; expected "
            f"{tuple(shape)}. It belongs to another plan."
        )


def _check_turned(incision: Incision) -> None:
    for dim, maps in incision.turned.items():
        shape, size = tuple(incision.old.shape), 0
        square = maps.ndim == 3 and maps.shape[1] == maps.shape[2]
        if square and 0 <= dim < len(shape):
            size = maps.shape[0] * maps.shape[1]
        real = maps.is_floating_point() and not maps.is_meta and bool(maps.isfinite().all())
        if size and real:
            real = not bool(torch.linalg.inv_ex(maps.double().cpu()).info.any())
        if incision.folded is None or not real or size != shape[dim]:
            raise PruningError(
                f"The turn of {incision.name!r} along dimension {dim} has shape "
                f"{tuple(maps.shape)} and type {maps.dtype}; expected (heads, size, size) of "
                f"{shape}, numbers that can be undone, beside new values. It belongs to another "
                "plan."
            )
