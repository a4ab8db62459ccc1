"""What positions count for relevance, computed one by one."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["weighted_rows"]


def weighted_rows(gradients: Tensor, values: Tensor) -> Tensor:
    """Gradients ``(examples, ..., d)`` as rows, each times the root of the weight of its position.

    A position weighs what the squared norm of its values ``(examples, ..., d)`` is of the (lower)
    median of its example, and at most 1.
    """
    rows = []
    for grads, there in zip(gradients.double(), values.double(), strict=True):
        grads, there = grads.reshape(-1, grads.shape[-1]), there.reshape(-1, there.shape[-1])
        power = [float(value @ value) for value in there]
        counted = sorted(p for p, g in zip(power, grads, strict=True) if g.any())
        median = counted[(len(counted) - 1) // 2] if counted else 0.0
        for grad, one in zip(grads, power, strict=True):
            rows.append(grad * min(1.0, one / median if median else 1.0) ** 0.5)
    return torch.stack(rows)
