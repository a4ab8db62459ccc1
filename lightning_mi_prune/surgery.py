"""CUT      apply(model, axes, plan) -> list[Rewrite]; the only file that changes a model."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis, full_plan
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.plan import CONFIG_FIELD, Plan

__all__ = ["Rewrite", "apply", "check", "reshape", "undo"]


class Rewrite(NamedTuple):
    """One parameter before and after a cut; enough to carry its optimizer state across.

    Args:
        old: The parameter that was replaced.
        new: The parameter that took its place, everywhere it was used.
        kept: Surviving indices of every dimension that was cut.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Mapping[int, Tensor]


@dataclass
class _Incision:
    """One parameter, everywhere it lives, and what is to be cut off it."""

    name: str
    old: nn.Parameter
    owners: list[tuple[nn.Module, str]]
    kept: dict[int, Tensor] = field(default_factory=dict)
    folded: Tensor | None = None


def apply(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    plan: Plan,
    *,
    current: Plan | None = None,
    folded: Mapping[str, Tensor] | None = None,
) -> list[Rewrite]:
    """Cut a model down to a plan: dense smaller parameters, true sizes, a config that knows.

    Everything is checked first; a refused plan leaves the model as it was. New parameters keep
    device, dtype and ``requires_grad``; a shared parameter stays shared; gradients are dropped.

    Args:
        model: Module from which the axes are named.
        axes: Axes of the plan.
        plan: Survivors, in original positions.
        current: Plan the model carries now; default: as built.
        folded: New values for readers (:attr:`Selection.folded`), cut along their columns already.

    Returns:
        One record for each parameter that was replaced, to give to :func:`optimizers.rebind`.

    Raises:
        PruningError: If the plan and the model do not belong together.

    Example:
        >>> from lightning_mi_prune.families import linear_axis
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> axis = linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])
        >>> rewrites = apply(net, [axis], Plan({"hidden": 4}, {"hidden": (0, 2)}))
        >>> net
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    now = full_plan(axes) if current is None else current
    places = plan.positions_in(now)
    target = now.then(plan)
    incisions = _incisions(model, axes, now, places, folded or {})
    rewrites = [_rewrite(incision) for incision in incisions]
    for incision, rewrite in zip(incisions, rewrites, strict=True):
        for module, attribute in incision.owners:
            setattr(module, attribute, rewrite.new)
    _follow(model, axes, target)
    return rewrites


def check(model: nn.Module, axes: Sequence[WidthAxis], current: Plan) -> None:
    """Refuse, as :func:`apply` would, a model that a cut of these axes would break."""
    _incisions(model, axes, current, {axis.name: () for axis in axes}, {})


def reshape(model: nn.Module, axes: Sequence[WidthAxis], plan: Plan) -> None:
    """Give every tensor the shape a plan asks for, growing or shrinking; values are not kept.

    For loading: weights of the right shape follow.
    Raises PruningError if the plan names other axes than the model has.
    """
    by_name = {axis.name: axis for axis in axes}
    if dict(plan.sizes) != {name: axis.size for name, axis in by_name.items()}:
        odd = sorted(set(plan.sizes) ^ set(by_name))
        raise PruningError(
            f"The stored plan was made for another model: axes {odd[:6]} or their sizes differ. "
            "Build the model with the configuration it was trained with."
        )
    shapes = _shapes_at(axes, plan)
    owners = _owners(model)
    parameters = {name: _parameter(model, name) for name in shapes}
    for name, shape in shapes.items():
        old = parameters[name]
        if list(old.shape) != shape:
            new = nn.Parameter(old.detach().new_zeros(shape), requires_grad=old.requires_grad)
            for module, attribute in owners[id(old)]:
                setattr(module, attribute, new)
    _follow(model, axes, plan)


def _shapes_at(axes: Sequence[WidthAxis], plan: Plan) -> dict[str, list[int]]:
    """Shape of every tensor that the axes cut, at a plan."""
    shapes: dict[str, list[int]] = {}
    for axis in axes:
        for s in axis.slices:
            shape = shapes.setdefault(s.tensor, list(s.shape))
            shape[s.dim] = plan.width(axis.name) * axis.entries
    return shapes


@torch.no_grad()
def undo(
    model: nn.Module, axes: Sequence[WidthAxis], plan: Plan, values: Mapping[str, Tensor]
) -> dict[int, nn.Parameter]:
    """Give a model back the shape and the values it had at an earlier plan.

    Returns the parameter that took the place of each replaced one, by the identity of the old one;
    ``values`` are the parameters and buffers of that time, by name.

    Raises:
        PruningError: If the values are not those of this model at this plan; it stays as it was.
    """
    old = dict(model.named_parameters())
    shapes = _shapes_at(axes, plan)
    for name, parameter in old.items():
        shape = shapes.get(name, list(parameter.shape))
        if name not in values or list(values[name].shape) != shape:
            raise PruningError(f"The snapshot has no {name!r} of shape {shape}; wrong model?")
    reshape(model, axes, plan)
    now = dict(model.named_parameters())
    for name, tensor in (*now.items(), *model.named_buffers()):
        if name in values:
            tensor.copy_(values[name])
    return {id(old[name]): now[name] for name in old if old[name] is not now[name]}


def _owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place where each parameter lives, by identity."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((module, attribute))
    return owners


def _incisions(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    current: Plan,
    places: Mapping[str, tuple[int, ...]],
    folded: Mapping[str, Tensor],
) -> list[_Incision]:
    owners = _owners(model)
    described = {id(model.get_submodule(_module(s.tensor))) for a in axes for s in a.slices}
    found: dict[int, _Incision] = {}
    cut_by: dict[tuple[int, int], str] = {}
    for axis in axes:
        if axis.name not in places or len(places[axis.name]) == current.width(axis.name):
            continue
        for s in axis.slices:
            old = _parameter(model, s.tensor)
            key = (id(old), s.dim)
            if key in cut_by:
                raise PruningError(
                    f"{s.tensor!r} is cut by {cut_by[key]!r} and {axis.name!r} at once: layers "
                    "share it. Exclude one of the axes, or untie the parameter."
                )
            cut_by[key] = axis.name
            stranger = next((m for m, _ in owners[id(old)] if id(m) not in described), None)
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
            incision = found.setdefault(id(old), _Incision(s.tensor, old, owners[id(old)]))
            incision.kept[s.dim] = (units[:, None] * axis.entries + entries).flatten()
    for name, values in folded.items():
        old = _parameter(model, name)
        incision = found.setdefault(id(old), _Incision(name, old, owners[id(old)]))
        incision.folded = values
    for incision in found.values():
        _check_folded(incision)
    return list(found.values())


def _module(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
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


def _check_folded(incision: _Incision) -> None:
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


@torch.no_grad()
def _rewrite(incision: _Incision) -> Rewrite:
    old = incision.old
    values = old.detach() if incision.folded is None else incision.folded.to(old)
    for dim, index in incision.kept.items():
        if incision.folded is None or dim != 1:
            values = values.index_select(dim, index)
    new = nn.Parameter(values.clone(), requires_grad=old.requires_grad)
    return Rewrite(old, new, incision.kept)


def _follow(model: nn.Module, axes: Sequence[WidthAxis], plan: Plan) -> None:
    """Keep the numbers on modules and in configs true, and record the plan in the config."""
    for axis in axes:
        for count in axis.counts:
            value = plan.width(axis.name) * count.per_unit
            setattr(model.get_submodule(count.module), count.attribute, value)
    for path in sorted({axis.network for axis in axes}):
        config = _own_config(model, path)
        if config is None:
            continue
        mine = [axis for axis in axes if axis.network == path]
        for name in {axis.config for axis in mine if axis.config is not None}:
            named = [axis for axis in mine if axis.config == name]
            widths = {plan.width(axis.name) for axis in named}
            # One number cannot say several widths: the field then stays as built, the plan tells.
            setattr(config, name, widths.pop() if len(widths) == 1 else named[0].size)
        setattr(config, CONFIG_FIELD, plan.under(path).to_json())


def _own_config(model: nn.Module, path: str) -> Any:
    """The config of a network; a copy of its own if other networks hold the same object."""
    network = model.get_submodule(path)
    config = getattr(network, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    inside = set(network.modules())
    holders = [part for part in model.modules() if getattr(part, "config", None) is config]
    if any(part not in inside for part in holders):
        config = copy.deepcopy(config)
        for part in holders:
            if part in inside:
                part.config = config
    return config
