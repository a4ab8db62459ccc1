"""CARRY    rebind(optimizers, rewrites): sliced state; the only file that changes an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.surgery import Rewrite

__all__ = ["check_optimizers", "rebind", "restore", "snapshot"]

# The dimension that Adafactor of transformers sums away: of a square matrix, no shape tells.
_SUMMED: dict[str, int] = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}


def rebind(optimizers: Iterable[Optimizer], rewrites: Sequence[Rewrite]) -> None:
    """Point optimizers at the cut parameters and keep the state of what survived.

    The optimizer objects, their groups, their order and their hyperparameters stay, so learning
    rate schedules and gradient scalers that hold them go on. State tensors of the parameter's old
    shape (Adam's moments, SGD's momentum) and their row and column means (Adafactor) are
    index-selected; scalars (the step) are kept.

    Args:
        optimizers: All optimizers of the run.
        rewrites: What :func:`surgery.apply` returned.

    Raises:
        PruningError: If an optimizer keeps state that cannot be cut; nothing is changed then.

    Example:
        >>> from lightning_mi_prune.families import linear_axis
        >>> from lightning_mi_prune.plan import Plan
        >>> from lightning_mi_prune.surgery import apply
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 3)).sum().backward(); adam.step()
        >>> axis = linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])
        >>> rebind([adam], apply(net, [axis], Plan({"hidden": 4}, {"hidden": (0, 2)})))
        >>> adam.state[net[0].weight]["exp_avg"].shape
        torch.Size([2, 3])
    """
    all_optimizers = list(optimizers)
    check_optimizers(all_optimizers, (rewrite.old for rewrite in rewrites))
    by_old = {id(rewrite.old): rewrite for rewrite in rewrites}
    moves = []  # everything that can fail comes before the first change
    for optimizer in all_optimizers:
        for group, place, parameter in _held(optimizer):
            if (rewrite := by_old.get(id(parameter))) is not None:
                state = optimizer.state.get(parameter)
                carried = state and {k: _carry(k, v, rewrite) for k, v in state.items()}
                moves.append((optimizer, group["params"], place, rewrite, carried))
    for optimizer, parameters, place, rewrite, carried in moves:
        parameters[place] = rewrite.new
        if optimizer.state.pop(rewrite.old, None) is not None:
            optimizer.state[rewrite.new] = carried


def snapshot(
    optimizers: Iterable[Optimizer], names: Mapping[int, str]
) -> list[dict[str, dict[str, Any]]]:
    """Copy the state of every named parameter to the CPU, to undo a cut later.

    Args:
        optimizers: All optimizers of the run.
        names: Qualified name of each parameter by its ``id``; parameters without are skipped.

    Returns:
        For each optimizer the state by parameter name, empty before a first step: tensors and
        plain numbers only, fit for ``torch.load(weights_only=True)``.

    Raises:
        PruningError: As :func:`check_optimizers` raises it for these parameters.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(torch.ones(1, 3)).sum().backward(); sgd.step()
        >>> snapshot([sgd], {id(p): name for name, p in net.named_parameters()})[0]["bias"]
        {'momentum_buffer': tensor([1., 1.])}
    """
    all_optimizers = list(optimizers)
    named = [[p for _, _, p in _held(o) if id(p) in names] for o in all_optimizers]
    check_optimizers(all_optimizers, (p for parameters in named for p in parameters))
    return [
        {
            names[id(p)]: {k: _plain(v) for k, v in optimizer.state.get(p, {}).items()}
            for p in parameters
        }
        for optimizer, parameters in zip(all_optimizers, named, strict=True)
    ]


def restore(
    optimizers: Iterable[Optimizer],
    replaced: Mapping[int, nn.Parameter],
    names: Mapping[int, str],
    states: Sequence[Mapping[str, Mapping[str, Any]]],
) -> None:
    """Point optimizers at parameters that grew back, with the state they had at a snapshot.

    Hyperparameters stay as they are now. A parameter that is not in the snapshot keeps its present
    state, unless it was replaced and the state does not fit: then it starts afresh.

    Args:
        optimizers: All optimizers of the run, in the order of the snapshot.
        replaced: New parameters by the ``id`` of the old ones.
        names: Qualified name of each new parameter by its ``id``.
        states: What :func:`snapshot` returned; it is not trusted.

    Raises:
        PruningError: If the snapshot does not fit; nothing is changed then.

    Example:
        >>> small, large = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([small], lr=0.1, momentum=0.9)
        >>> states = [{"weight": {"momentum_buffer": torch.tensor([3.0, 4.0])}}]
        >>> restore([sgd], {id(small): large}, {id(large): "weight"}, states)
        >>> sgd.state[sgd.param_groups[0]["params"][0]]
        {'momentum_buffer': tensor([3., 4.])}
    """
    all_optimizers = list(optimizers)
    count = len(states) if _readable(states) else 0
    if count != len(all_optimizers):
        raise PruningError(
            f"The snapshot holds {count} readable optimizer states; expected "
            f"{len(all_optimizers)}. Configure the optimizers the run had when it was taken."
        )
    # All state is built before the first parameter moves: a failure changes nothing.
    planned = []
    for optimizer, saved in zip(all_optimizers, states, strict=True):
        _check_kind(optimizer)
        for group, place, old in _held(optimizer):
            new = replaced.get(id(old), old)
            name, present = names.get(id(new)), optimizer.state.get(old, {})
            if name is not None and name in saved:
                what = f"{type(optimizer).__name__} and {name!r}"
                state = _revived(what, saved[name], group, present, old, new)
            else:
                fits = new is old or all(_known(k, v, new.shape) for k, v in present.items())
                state = dict(present) if fits else {}
            planned.append((optimizer, group, place, old, new, state))
    for optimizer, group, place, old, new, state in planned:
        group["params"][place] = new
        optimizer.state.pop(old, None)
        if state:
            optimizer.state[new] = state


def check_optimizers(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Refuse optimizers whose state cannot follow a cut of these parameters.

    Raises:
        PruningError: With the optimizer's name, the state it keeps, and what works instead.
    """
    cut = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        _check_kind(optimizer)
        name = type(optimizer).__name__
        held = [parameter for _, _, parameter in _held(optimizer) if id(parameter) in cut]
        if len({id(parameter) for parameter in held}) < len(held):
            raise PruningError(
                f"{name} holds a parameter twice; expected once. Remove one entry from its groups."
            )
        for parameter in held:
            _check_state(name, parameter, optimizer.state.get(parameter, {}))


def _check_kind(optimizer: Optimizer) -> None:
    """Refuse what is known before the first step, when there is no state to judge yet."""
    name, keeps = type(optimizer).__name__, None
    if isinstance(optimizer, torch.optim.LBFGS):
        keeps = "a history over all parameters flattened together"
    # bitsandbytes says so here; its state comes in blocks that ignore rows and columns.
    if getattr(getattr(optimizer, "args", None), "optim_bits", None) == 8:
        keeps = "its state in blocks of 8-bit numbers"
    if keeps is not None:
        raise PruningError(
            f"{name} keeps {keeps}, which cannot be cut. Use AdamW or SGD, or prune before "
            "training with it."
        )
    for attribute, value in vars(optimizer).items():
        for inner in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(inner, Optimizer) and inner is not optimizer:
                kind = type(inner).__name__
                raise PruningError(
                    f"{name} wraps {kind} (in {attribute!r}), whose state a cut would not reach: "
                    f"use {kind} directly."
                )


def _held(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], int, nn.Parameter]]:
    """Every parameter, with its group and its place there."""
    for group in optimizer.param_groups:
        for place, parameter in enumerate(group["params"]):
            yield group, place, parameter


def _along(key: str, value: Tensor, shape: Sequence[int]) -> tuple[int | None, ...] | None:
    """For each dimension of a state tensor the parameter's that it follows; None: not known."""
    drop = _SUMMED.get(key)
    if drop is not None and len(shape) >= 2:
        dims = [dim for dim in range(len(shape)) if dim != len(shape) + drop]
        if list(value.shape) == [shape[dim] for dim in dims]:
            return tuple(dims)
    if value.ndim == len(shape) and all(
        size in (1, full) for size, full in zip(value.shape, shape, strict=True)
    ):
        return tuple(dim if value.shape[dim] == full else None for dim, full in enumerate(shape))
    return (None,) * value.ndim if value.numel() == 1 else None


def _known(key: str, value: Any, shape: Sequence[int]) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, (bool, int, float))
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    return plain and not value.is_quantized and _along(key, value, shape) is not None


def _check_state(name: str, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if not _known(key, value, parameter.shape):
            raise PruningError(
                f"{name} keeps state {key!r} ({_described(value)}) for a parameter of shape "
                f"{tuple(parameter.shape)}; expected plain tensors of that shape or "
                "scalars. Use AdamW, Adam, SGD, RMSprop or Adafactor."
            )


def _described(value: Any) -> str:
    what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
    return f"{type(value).__name__}, {what}"


def _carry(key: str, value: Any, rewrite: Rewrite) -> Any:
    along = _along(key, value, rewrite.old.shape) if isinstance(value, Tensor) else None
    if along is None:
        return value
    for place, dim in enumerate(along):
        if dim is not None and dim in rewrite.kept:
            value = value.index_select(place, rewrite.kept[dim].to(value.device))
    return value.clone() if not rewrite.kept else value


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    # Subclasses (numpy's float64) would not load with weights_only.
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if kind is None else kind(value)


def _readable(states: Any) -> bool:
    return isinstance(states, Sequence) and all(
        isinstance(saved, Mapping) and all(isinstance(state, Mapping) for state in saved.values())
        for saved in states
    )


def _revived(
    what: str,
    saved: Mapping[str, Any],
    group: Mapping[str, Any],
    present: Mapping[str, Any],
    old: Tensor,
    new: Tensor,
) -> dict[str, Any]:
    """Saved state, checked, copied to where the optimizer wants it."""
    state = {}
    for key, value in saved.items():
        before = present.get(key)
        if not _known(key, value, new.shape) or not _alike(key, value, new, before, old):
            raise PruningError(
                f"The snapshot of {what} holds {key!r} ({_described(value)}), which does not fit "
                f"a parameter of shape {tuple(new.shape)}. Take one of this model and optimizer."
            )
        if isinstance(value, Tensor):
            # As torch's load_state_dict has it, unless the optimizer shows where it wants scalars.
            on_cpu = key == "step" and not (group.get("fused") or group.get("capturable"))
            on_cpu = before.device.type == "cpu" if isinstance(before, Tensor) else on_cpu
            home = "cpu" if on_cpu and value.ndim == 0 else new.device
            value = value.detach().to(home, copy=True)
        state[key] = value
    return state


def _alike(key: str, value: Any, new: Tensor, before: Any, old: Tensor) -> bool:
    """Whether a tensor follows the dimensions that the present one follows."""
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return True
    now, then = _along(key, value, new.shape) or (), _along(key, before, old.shape) or ()
    # Of a dimension one wide nobody can tell whether it is followed.
    sizes = enumerate(zip(new.shape, old.shape, strict=True))
    wide = {dim for dim, both in sizes if min(both) > 1}
    return value.ndim == before.ndim and wide & {*now} == wide & {*then}
