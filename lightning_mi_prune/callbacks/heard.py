"""What was heard and felt, as plain containers and tensors of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from lightning_mi_prune.callbacks.tensors import check_finite, tensor
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.sample import Example, Heard, is_plain
from lightning_mi_prune.sparing import Compared
from lightning_mi_prune.untrusted import described, flag, listed, mapping, number, whole

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
    for name, entry in mapping(mapping(state)["moments"]).items():
        dimension, packed = listed(entry, 2)
        sums = tensor(packed)
        if sums.numel() < whole(dimension, _LARGEST) ** 2 // 2:  # before it is made that large
            raise ValueError(f"{sums.numel()} sums for an axis of {dimension}")
        check_finite({name: sums})
        moments[name] = Moments(dimension).unpack(sums)
    gradients = state["gradients"]
    return Heard(
        moments=moments,
        gradients=None if gradients is None else read_gradients(gradients),
        ranks=[
            {path: [read_example(call) for call in listed(calls)] for path, calls in rank.items()}
            for rank in map(mapping, listed(state["calls"]))
        ],
        stacks=_read_compared(state["stacks"]),
    )


def write_gradients(sums: Mapping[str, GradientSums]) -> dict[str, Any]:
    """Sums of gradients by key."""
    return {n: (s.dimension, s.units, s.inside, s.packed()) for n, s in sums.items()}


def read_gradients(state: Mapping[str, Any]) -> dict[str, GradientSums]:
    """What :func:`write_gradients` wrote; raises a plain exception for anything else."""
    found = {}
    for name, entry in mapping(state).items():
        dimension, units, inside, packed = listed(entry, 4)
        sums = tensor(packed)
        if sums.numel() < whole(dimension, _LARGEST) ** 2 // 2 + whole(units, _LARGEST):
            raise ValueError(f"{sums.numel()} sums of gradients for {dimension} outputs")
        check_finite({name: sums})
        found[name] = GradientSums(dimension, units, inside=flag(inside)).unpack(sums)
    return found


def _write_compared(stacks: Mapping[str, Compared]) -> dict[str, Any]:
    """How alike the layers of stacks are, as plain lists."""
    return {name: asdict(compared) for name, compared in stacks.items()}


def _read_compared(state: Mapping[str, Any]) -> dict[str, Compared]:
    """What :func:`_write_compared` wrote; raises a plain exception for anything else."""
    found = {}
    for name, parts in mapping(state).items():
        layers = tuple(whole(layer) for layer in listed(mapping(parts)["layers"]))
        sizes = {"similarity": len(layers), "angles": len(layers) + 1}
        matrices = {
            key: tuple(
                tuple(number(value) for value in listed(row, size))
                for row in listed(parts[key], size)
            )
            for key, size in sizes.items()
        }
        found[name] = Compared(layers, **matrices, fixed=whole(parts["fixed"], len(layers)))
    return found


def read_example(state: Mapping[str, Any]) -> Example:
    """One call; raises a plain exception for anything else."""
    args, kwargs, mask = (mapping(state)[key] for key in ("args", "kwargs", "mask"))
    if not isinstance(args, tuple) or not isinstance(mask, (Tensor, type(None))):
        raise TypeError(f"a call with {described(args)} and the mask {described(mask)}")
    autocast = state.get("autocast", "")
    if not is_plain([args, mapping(kwargs), mask]):
        raise TypeError("a call with something else than tensors and plain values")
    if not isinstance(autocast, str) or autocast not in ("", "bfloat16", "float16"):
        raise ValueError(f"autocast to {described(autocast)}")
    return Example(args, dict(kwargs), mask, autocast)
