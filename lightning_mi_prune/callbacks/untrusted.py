"""Plain values out of a checkpoint, which is untrusted input: of the right kind, or an error."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

__all__ = ["number", "tensors", "whole"]


def number(value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in a range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r:.60} is not a number")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{value!r:.60} is not a number from {low} to {high}")
    return float(value)


def whole(value: Any, high: int = 2**31) -> int:
    """A whole number from 0 to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
        raise ValueError(f"{value!r:.60} is not a whole number from 0 to {high}")
    return value


def tensors(value: Any) -> dict[str, Tensor]:
    """Tensors by name, each of which holds all of its elements.

    A view can claim gigabytes with the few bytes of a small file behind it.
    """
    found = dict(value)
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{name!r:.60} is not a tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name!r:.60} claims more elements than the file holds")
    return found
