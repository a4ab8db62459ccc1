"""What was heard and felt, as plain containers and tensors of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_mi_prune.callbacks.untrusted import number, tensors, whole
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.sample import Example, Heard, is_plain
from lightning_mi_prune.sparing import Compared

__all__ = [
    "read_example",
    "read_gradients",
    "read_heard",
    "write_gradients",
    "write_heard",
]

_LARGEST = 2**20


def write_heard(heard: Heard) -> dict[str, Any]:
    """Everything a cut is decided from; calls that hold more than plain values are left out."""
    return {
        "moments": {n: (m.dimension, m.packed()) for n, m in heard.moments.items()},
        "gradients": None if heard.gradients is None else write_gradients(heard.gradients),
        "calls": [
            {
                path: plain
                for path, calls in rank.items()
                if (plain := [vars(call) for call in calls if is_plain(vars(call))])
            }
            for rank in heard.ranks
        ],
        "stacks": _write_compared(heard.stacks),
    }


def read_heard(state: Mapping[str, Any]) -> Heard:
    """What :func:`write_heard` wrote; raises a plain exception for anything else."""
    moments = {}
    for name, (dimension, packed) in state["moments"].items():
        sums = tensors({name: packed})[name]
        if sums.numel() < whole(dimension, _LARGEST) ** 2 // 2:  # before it is made that large
            raise ValueError(f"{sums.numel()} sums for an axis of {dimension}")
        _check_finite(name, sums)
        moments[name] = Moments(dimension).unpack(sums)
    gradients = state["gradients"]
    return Heard(
        moments=moments,
        gradients=None if gradients is None else read_gradients(gradients),
        ranks=[
            {str(path): [read_example(call) for call in calls] for path, calls in rank.items()}
            for rank in state["calls"]
        ],
        stacks=_read_compared(state["stacks"]),
    )


def write_gradients(sums: Mapping[str, GradientSums]) -> dict[str, Any]:
    """Sums of gradients by key."""
    return {n: (s.dimension, s.units, s.inside, s.packed()) for n, s in sums.items()}


def read_gradients(state: Mapping[str, Any]) -> dict[str, GradientSums]:
    """What :func:`write_gradients` wrote; raises a plain exception for anything else."""
    found = {}
    for name, (dimension, units, inside, packed) in state.items():
        sums = tensors({name: packed})[name]
        if sums.numel() < whole(dimension, _LARGEST) ** 2 // 2 + whole(units, _LARGEST):
            raise ValueError(f"{sums.numel()} sums of gradients for {dimension} outputs")
        _check_finite(name, sums)
        found[name] = GradientSums(dimension, units, inside=bool(inside)).unpack(sums)
    return found


def _write_compared(stacks: Mapping[str, Compared]) -> dict[str, Any]:
    """How alike the layers of stacks are, as plain lists."""
    return {name: asdict(compared) for name, compared in stacks.items()}


def _read_compared(state: Mapping[str, Any]) -> dict[str, Compared]:
    """What :func:`_write_compared` wrote; raises a plain exception for anything else."""
    found = {}
    for name, parts in state.items():
        layers = tuple(whole(layer) for layer in parts["layers"])
        sizes = {"similarity": len(layers), "angles": len(layers) + 1}
        matrices = {
            key: tuple(tuple(number(value) for value in row) for row in parts[key]) for key in sizes
        }
        for key, size in sizes.items():
            if [len(row) for row in matrices[key]] != [size] * size:
                raise ValueError(f"{key} of {name!r:.60} is no square of {size} layers")
        found[str(name)] = Compared(layers, **matrices, fixed=whole(parts["fixed"], len(layers)))
    return found


def read_example(state: Mapping[str, Any]) -> Example:
    """One call; raises a plain exception for anything else."""
    args, kwargs, mask = state["args"], state["kwargs"], state["mask"]
    if not isinstance(args, tuple) or not isinstance(kwargs, dict):
        raise TypeError("a call without arguments")
    if not isinstance(mask, (Tensor, type(None))):
        raise TypeError("an attention mask that is no tensor")
    _check_tensors((args, kwargs, mask))
    autocast = state.get("autocast", "")
    if autocast not in ("", "bfloat16", "float16"):
        raise ValueError(f"autocast to {autocast!r:.40}")
    return Example(args, kwargs, mask, autocast)


def _check_finite(name: str, sums: Tensor) -> None:
    if not sums.isfinite().all():
        raise ValueError(f"{name!r:.60} holds sums that are not finite")


def _check_tensors(value: Any) -> None:
    if isinstance(value, Tensor):
        tensors({"call": value})
    elif isinstance(value, Mapping):
        for part in value.values():
            _check_tensors(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            _check_tensors(part)
