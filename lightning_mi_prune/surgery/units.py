"""Units cut off: apply(model, axes, plan) -> list[Rewrite]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis, full_plan
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.incisions import (
    Incision,
    check_empty,
    config_numbers,
    incisions,
    owners,
    parameter_of,
    shapes_at,
)
from lightning_mi_prune.plan import CONFIG_FIELD, Plan
from lightning_mi_prune.standins import (
    KEPT_UNITS,
    is_ours,
    linear_at,
    parameters_of,
    place_linears,
    selecting,
    silent,
)
from lightning_mi_prune.surgery.configs import own_config
from lightning_mi_prune.turns import TurnMaps

__all__ = ["Rewrite", "apply", "check", "reshape", "revert", "undo"]


class Rewrite(NamedTuple):
    """One parameter before and after a cut; enough to carry its optimizer state across.

    Args:
        old: The parameter that was replaced.
        new: The parameter that took its place, everywhere it was used.
        kept: Surviving indices of every dimension that was cut.
        turned: Maps ``(heads, size, size)`` to new coordinates, by dimension; what is kept is kept
            of the turned parameter.
    """

    old: nn.Parameter
    new: nn.Parameter
    kept: Mapping[int, Tensor]
    turned: Mapping[int, Tensor] = MappingProxyType({})


def apply(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    plan: Plan,
    *,
    current: Plan | None = None,
    folded: Mapping[str, Tensor] | None = None,
    turned: TurnMaps | None = None,
) -> list[Rewrite]:
    """Cut a model down to a plan: dense smaller parameters, true sizes, a config that knows.

    Everything is checked first; a refused plan leaves the model as it was. New parameters keep
    device, dtype and ``requires_grad``; a shared parameter stays shared; gradients are dropped.

    Args:
        model: Module from which the axes are named.
        axes: Axes of the plan.
        plan: Survivors, in original positions.
        current: Plan the model carries now; default: as built.
        folded: New values of parameters in the shape the plan gives them, by tensor name
            (:attr:`Selection.folded`).
        turned: New coordinates of heads in which those values are (:attr:`Selection.turned`).

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
    check_empty(model, axes, target)
    rewrites = [_rewrite(i) for i in incisions(model, axes, now, places, folded or {}, turned)]
    _swap(model, rewrites)
    try:
        _follow(model, axes, target, _touched(model, axes, target, [r.new for r in rewrites]))
    except BaseException:
        revert(model, axes, now, rewrites)
        raise
    return rewrites


def check(model: nn.Module, axes: Sequence[WidthAxis], current: Plan) -> None:
    """Refuse, as :func:`apply` would, a model that a cut of these axes would break."""
    incisions(model, axes, current, {axis.name: () for axis in axes}, {})


def reshape(
    model: nn.Module, axes: Sequence[WidthAxis], plan: Plan, only: Sequence[WidthAxis] | None = None
) -> list[Rewrite]:
    """Give every tensor the shape a plan asks for, growing or shrinking; values are not kept.

    For loading: weights of the right shape follow.

    Args:
        model: Module from which the axes are named.
        axes: Axes of the plan.
        plan: The plan.
        only: The axes that change; default: all. Nothing else of the model is looked at.

    Returns:
        One record for each parameter that was replaced.

    Raises:
        PruningError: If the plan lacks an axis, or has another size for it.
    """
    odd = sorted(axis.name for axis in axes if plan.sizes.get(axis.name) != axis.size)
    if odd:
        raise PruningError(
            f"The stored plan was made for another model: axes {odd[:6]} or their sizes differ. "
            "Build the model with the configuration it was trained with."
        )
    mine = axes if only is None else only
    check_empty(model, mine, plan)
    shapes = shapes_at(model, mine, plan)
    parameters = {name: parameter_of(model, name) for name in shapes}
    changed = {id(p): (p, shapes[n]) for n, p in parameters.items() if list(p.shape) != shapes[n]}
    rewrites = [
        Rewrite(old, nn.Parameter(old.detach().new_zeros(shape), old.requires_grad), {})
        for old, shape in changed.values()
    ]
    _swap(model, rewrites)
    _follow(model, axes, plan, mine)
    return rewrites


@torch.no_grad()
def undo(
    model: nn.Module, axes: Sequence[WidthAxis], plan: Plan, values: Mapping[str, Tensor]
) -> list[Rewrite]:
    """Give a model back the shape and the values it had at an earlier plan.

    Args:
        model: Module from which the axes are named.
        axes: All axes of the model.
        plan: The earlier plan.
        values: Parameters and buffers of that time, by name.

    Returns:
        One record for each parameter that was replaced.

    Raises:
        PruningError: If the values are not those of this model at this plan; it stays as it was.
    """
    check_empty(model, axes, plan)
    every, named = parameters_of(model), shapes_at(model, axes, plan)
    old = dict({id(p): (name, p) for name, p in reversed(every.items())}.values())
    shapes = {id(p): named[n] for n, p in every.items() if n in named}  # tied ones by any name
    for name, parameter in list(old.items()):
        shape = shapes.get(id(parameter), list(parameter.shape))
        if 0 in shape and name not in values:  # without entries then and now
            del old[name]
        elif name not in values or list(values[name].shape) != shape:
            raise PruningError(
                f"The snapshot has no {name!r} of shape {tuple(shape)}; expected one of this model."
            )
    for name, value in values.items():
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.is_quantized:
            raise PruningError(
                f"The snapshot holds {name!r} as a {type(value).__name__} without plain values; "
                "expected a dense tensor. Take another checkpoint."
            )
    rewrites = [
        Rewrite(p, nn.Parameter(values[n].to(p, copy=True), requires_grad=p.requires_grad), {})
        for n, p in old.items()
        if p.shape != values[n].shape
    ]
    buffers = [
        # A queue may have another length by now, and an expanded one takes no copy.
        (module, name, values[saved].to(buffer, copy=True))
        for path, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and (saved := f"{path}.{name}" if path else name) in values
    ]
    _swap(model, rewrites)  # everything that can fail came before
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    _follow(model, axes, plan, _touched(model, axes, plan, [r.new for r in rewrites]))
    return rewrites


def revert(
    model: nn.Module, axes: Sequence[WidthAxis], plan: Plan, rewrites: Sequence[Rewrite]
) -> None:
    """Put the old parameters back where the new ones are, and the numbers of ``plan``."""
    _swap(model, [Rewrite(r.new, r.old, {}) for r in rewrites])
    _follow(model, axes, plan, _touched(model, axes, plan, [r.old for r in rewrites]))


def _swap(model: nn.Module, rewrites: Sequence[Rewrite]) -> None:
    """Replace parameters wherever they live: all of them, or none."""
    places = owners(model)
    moves = [(module, name, r) for r in rewrites for module, name in places.get(id(r.old), ())]
    try:
        for module, name, rewrite in moves:
            setattr(module, name, rewrite.new)
    except BaseException:
        for module, name, rewrite in moves:
            module._parameters[name] = rewrite.old
        raise


@torch.no_grad()
def _rewrite(incision: Incision) -> Rewrite:
    old = incision.old
    values = old.detach()
    if incision.folded is not None:
        values = incision.folded.to(old)
    else:
        for dim, index in incision.kept.items():
            values = values.index_select(dim, index)
    new = nn.Parameter(values.clone(), requires_grad=old.requires_grad)
    return Rewrite(old, new, incision.kept, incision.turned)


def _follow(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    plan: Plan,
    only: Sequence[WidthAxis] | None = None,
) -> None:
    """Keep the numbers on modules and in configs true, and record the plan in the config."""
    widths = plan.widths
    mine = axes if only is None else only
    place_linears(model, dict.fromkeys(s.tensor.rpartition(".")[0] for a in mine for s in a.slices))
    for axis in mine:
        for count in axis.counts:
            each = axis.entries_at(widths) if count.entries else 1
            value = widths[axis.name] * count.per_unit * each
            module = linear_at(model.get_submodule(count.module))
            setattr(module, count.attribute, (value,) if count.sequence else value)
        _stand_in(model, axis, plan.kept[axis.name])
    for path in sorted({axis.network for axis in mine}):
        config = own_config(model, path)
        if config is None:
            continue
        inside = [axis for axis in axes if axis.network == path]
        for name, number in config_numbers(inside, plan).items():
            setattr(config, name, number)
        record = _record(inside, plan).under(path)
        if record.is_full:
            vars(config).pop(CONFIG_FIELD, None)
        else:
            setattr(config, CONFIG_FIELD, record.to_json())


def _touched(
    model: nn.Module, axes: Sequence[WidthAxis], plan: Plan, changed: Sequence[nn.Parameter]
) -> list[WidthAxis]:
    """Axes that are cut at a plan, or that cut one of the parameters."""
    ids = set(map(id, changed))
    mine = {name for name, parameter in parameters_of(model).items() if id(parameter) in ids}
    return [
        axis
        for axis in axes
        if plan.width(axis.name) < axis.size or any(s.tensor in mine for s in axis.slices)
    ]


def _record(axes: Sequence[WidthAxis], plan: Plan) -> Plan:
    """What a config says: whoever opens the folder finds only the layers that are there."""
    names = {axis.here or axis.name: axis.name for axis in axes}
    kept = {here: plan.kept[name] for here, name in names.items()}
    return Plan({here: plan.sizes[name] for here, name in names.items()}, kept)


def _stand_in(model: nn.Module, axis: WidthAxis, kept: Sequence[int]) -> None:
    """Put the stand-ins of an axis in place, or take them away."""
    for path in {s.module for s in axis.silence} | {s.module for s in axis.selects}:
        module = model.get_submodule(path)
        if is_ours(module.__dict__.get("forward")):
            del module.__dict__["forward"]
        module._buffers.pop(KEPT_UNITS, None)
    for selects in axis.selects if len(kept) < axis.size else ():
        module = model.get_submodule(selects.module)
        index = torch.tensor(kept, dtype=torch.long, device=_device(module))
        module.register_buffer(KEPT_UNITS, index, persistent=False)
        module.__dict__["forward"] = partial(selecting, module, selects)
    for silence in axis.silence if not kept else ():
        module = model.get_submodule(silence.module)
        inside = silence.prefixed(partial(_below, silence.module))
        module.__dict__["forward"] = partial(silent, module, inside)


def _below(top: str, path: str) -> str:
    return path[len(top) + 1 :]


def _device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)
