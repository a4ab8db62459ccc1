"""Optimizer state of parameters: which of it can be cut, and how."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.untrusted import described
from lightning_mi_prune.surgery.parameters import rotate_along

__all__ = [
    "NAMES",
    "as_given",
    "check_kind",
    "check_optimizers",
    "cut_state",
    "followed_dims",
    "is_plain_tensor",
    "is_state_known",
    "is_state_list",
    "parameters_in",
    "plain_state",
    "renumbered",
    "state_fits",
]

NAMES = "param_names"
"""Key of the parameter names in an optimizer's parameter group, if it has them."""


# The dimension that Adafactor of transformers sums over, which the shape of a square matrix hides.
_SUMMED: dict[str, int] = {"exp_avg_sq_row": -1, "exp_avg_sq_col": -2}

# Gradients rotate inversely to weights. State in the coordinates of weights, by name:
_OF_WEIGHTS = {"ax", "z", "p0", "acc_delta", "step_size"}  # averages, starting points, steps
_SIZES = {"exp_inf", "step_size"}  # nonnegative, but not squares
_SQUARES = {"square_avg", "acc_delta"}  # though rounding may make them negative
_MEANS = {"square_avg": "grad_avg"}  # never less than the square of this mean


def check_optimizers(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Refuse optimizers whose state cannot follow a cut of these parameters.

    Raises:
        PruningError: Naming the optimizer, the state and what works instead.
    """
    cut = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        check_kind(optimizer)
        name = type(optimizer).__name__
        mine = [parameter for _, _, parameter in parameters_in(optimizer) if id(parameter) in cut]
        if len({id(parameter) for parameter in mine}) < len(mine):
            raise PruningError(
                f"{name} holds a parameter twice; expected once. Remove one entry from its groups."
            )
        for parameter in mine:
            _check_state(name, parameter, optimizer.state.get(parameter, {}))


def check_kind(optimizer: Optimizer) -> None:
    """Refuse optimizers that are known to be unsupported before their first step."""
    name, keeps = type(optimizer).__name__, None
    if isinstance(optimizer, torch.optim.LBFGS):
        keeps = "a history over all parameters flattened together"
    # Of bitsandbytes: blocks of its state ignore rows and columns.
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
                    f"{name} wraps {kind} (in {attribute!r}), whose state would not be cut; use "
                    f"{kind} directly."
                )
    follow = _followed(optimizer)
    for attribute, value in vars(optimizer).items():
        own = _own_tensor(value, follow)
        if own is not None:
            raise PruningError(
                f"{name} keeps a tensor of shape {tuple(own.shape)} in its attribute "
                f"{attribute!r}, which would not be cut; expected all that belongs to parameters "
                "in its state. Use AdamW, Adam, SGD, RMSprop or Adafactor."
            )


def _followed(optimizer: Optimizer) -> set[int]:
    """Ids of an optimizer's objects that are updated in a cut, or hold no parameters."""
    groups = optimizer.param_groups
    parts = (optimizer.state, optimizer.defaults, groups, *groups, *(g["params"] for g in groups))
    return {id(part) for part in parts}


def _own_tensor(value: Any, follow: set[int], depth: int = 5) -> Tensor | None:
    """A parameter or a tensor of several numbers, itself or inside plain containers."""
    if isinstance(value, Tensor):
        return value if isinstance(value, nn.Parameter) or value.numel() > 1 else None
    inside: Iterable[Any] = ()
    if depth and id(value) not in follow:
        if isinstance(value, Mapping):
            inside = chain(value.keys(), value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inside = value
    found = (_own_tensor(part, follow, depth - 1) for part in inside)
    return next((tensor for tensor in found if tensor is not None), None)


def parameters_in(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], int, nn.Parameter]]:
    """Every parameter, with its parameter group and its index there."""
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            yield group, index, parameter


def followed_dims(key: str, value: Tensor, shape: Sequence[int]) -> tuple[int | None, ...] | None:
    """For each dimension of a state tensor, that of the parameter it belongs to.

    None instead of a dimension means that it belongs to none, None instead of all: not known.
    """
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


def cut_state(
    state: Mapping[str, Any],
    shape: Sequence[int],
    kept: Mapping[int, Tensor],
    rotated: Mapping[int, Tensor],
) -> dict[str, Any]:
    """The optimizer state of a parameter after a cut.

    Gradients of rotated heads rotate inversely to weights; absolute values and squares as if the
    entries of a head were independent. Squares whose mean is known (RMSprop) rotate as a variance
    about it, since their difference must not be negative.

    Args:
        state: State of the parameter.
        shape: Its shape before the cut.
        kept: Kept positions, by dimension.
        rotated: Maps ``(heads, size, size)`` to new coordinates, by dimension.
    """
    found = {}
    for key, value in state.items():
        dims = followed_dims(key, value, shape) if isinstance(value, Tensor) else None
        if dims is None:
            found[key] = value
            continue
        maps = {at: rotated[d] for at, d in enumerate(dims) if d is not None and d in rotated}
        new = _rotated_state(key, value, state.get(_MEANS.get(key, "")), maps) if maps else value
        for index, dim in enumerate(dims):
            if dim is not None and dim in kept:
                new = new.index_select(index, kept[dim].to(new.device))
        found[key] = new if new is not value or kept else value.clone()
    return found


def _rotated_state(key: str, value: Tensor, mean: Any, rotations: Mapping[int, Tensor]) -> Tensor:
    """A state tensor in new coordinates, given by maps for some of its dimensions."""
    # Nonnegative state of an unknown name is taken for squares.
    sizes = key in _SIZES
    unsigned = key not in _SIZES | _OF_WEIGHTS and bool((value >= 0).all())
    squares = unsigned or key in _SQUARES
    paired = squares and isinstance(mean, Tensor) and mean.shape == value.shape
    rest = (value - mean.square()).clamp_min(0) if paired else value
    for index, given in rotations.items():
        # Not moved to the state: MPS has no double precision.
        maps = given if key in _OF_WEIGHTS else torch.linalg.inv(given).mT
        rest = rotate_along(
            rest, index, maps.square() if squares else maps.abs() if sizes else maps
        )
        mean = rotate_along(mean, index, maps) if paired else mean
    return rest + mean.square() if paired else rest


def is_state_known(key: str, value: Any, shape: Sequence[int]) -> bool:
    """Whether the entries of a state can be assigned to those of a parameter of that shape."""
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, (bool, int, float))
    return is_plain_tensor(value) and followed_dims(key, value, shape) is not None


def is_plain_tensor(value: Tensor) -> bool:
    """Whether a tensor is dense and of no subclass."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
    return plain and not value.is_quantized and not value.is_nested


def _check_state(name: str, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if not is_state_known(key, value, parameter.shape):
            raise PruningError(
                f"{name} keeps state {key!r} ({described(value)}) for a parameter of shape "
                f"{tuple(parameter.shape)}; expected plain tensors of that shape or "
                "scalars. Use AdamW, Adam, SGD, RMSprop or Adafactor."
            )


def is_state_list(states: Any) -> bool:
    """Whether a value is a list of states by name."""
    return isinstance(states, Sequence) and all(
        isinstance(saved, Mapping) and all(isinstance(state, Mapping) for state in saved.values())
        for saved in states
    )


def _same_dims(key: str, value: Any, new: Tensor, before: Any, old: Tensor) -> bool:
    """Whether a tensor belongs to the same dimensions as the present one."""
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return True
    now = followed_dims(key, value, new.shape) or ()
    then = followed_dims(key, before, old.shape) or ()
    # A dimension of size one can be assigned to any.
    sizes = enumerate(zip(new.shape, old.shape, strict=True))
    wide = {dim for dim, both in sizes if min(both) > 1}
    return value.ndim == before.ndim and wide & {*now} == wide & {*then}


def state_fits(key: str, value: Any, new: Tensor, present: Mapping[str, Any], old: Tensor) -> bool:
    """Whether a saved value can replace an entry of a parameter's present state.

    Args:
        key: Its name.
        value: The value, which is not trusted.
        new: The parameter it is for; only the shape matters.
        present: Present state of the parameter.
        old: The parameter as it is now.

    Example:
        >>> weight, now = torch.ones(2), {"exp_avg": torch.ones(2)}
        >>> state_fits("exp_avg", torch.zeros(2), weight, now, weight)
        True
        >>> state_fits("exp_avg", 3, weight, now, weight)
        False
    """
    before = present.get(key)
    if not is_state_known(key, value, new.shape) or not _same_dims(key, value, new, before, old):
        return False
    if not isinstance(value, Tensor) or not isinstance(before, Tensor):
        return before is None or isinstance(value, Tensor) == isinstance(before, Tensor)
    same = value.is_complex() == before.is_complex()
    return same and value.is_floating_point() == before.is_floating_point()


def renumbered(own: str, name: str) -> str:
    """A name given to an optimizer, with the numbers of the parameter's present name.

    Names may be relative to any module; names of the user's own are not changed.

    Example:
        >>> renumbered("layer.4.bias", "model.layer.2.bias"), renumbered("top", "model.bias")
        ('layer.2.bias', 'top')
    """
    parts, present = own.split("."), name.split(".")
    tail = present[-len(parts) :]
    same = len(tail) == len(parts) and all(
        a == b or (a.isdigit() and b.isdigit()) for a, b in zip(parts, tail, strict=True)
    )
    return ".".join(tail) if same else own


def as_given(optimizer: Optimizer, name: str, names: Mapping[int, str]) -> str:
    """A name relative to the module that the optimizer's other names are relative to."""
    for group in optimizer.param_groups:
        for parameter, own in zip(group["params"], group.get(NAMES, ()), strict=False):
            whole = names.get(id(parameter), "")
            if whole == own or whole.endswith(f".{own}"):
                return name.removeprefix(whole[: -len(own)])
    return name


def plain_state(value: Any) -> Any:
    """A state entry as a tensor on the CPU or a plain number, for a checkpoint."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    # Subclasses (float64 of NumPy) do not load with weights_only.
    kind = next((kind for kind in (bool, int, float) if isinstance(value, kind)), None)
    return value if kind is None else kind(value)
