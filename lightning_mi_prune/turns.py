"""MAP      entries of heads to new coordinates, along one dimension of a tensor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["TurnMaps", "turn_along"]

TurnMaps = Mapping[str, Mapping[int, Tensor]]
"""Maps ``(heads, size, size)`` to new coordinates by name and dimension of a tensor."""


def turn_along(tensor: Tensor, dim: int, maps: Tensor) -> Tensor:
    """A tensor with the entries of every head along one dimension in new coordinates.

    Example:
        >>> swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> turn_along(torch.tensor([[1.0, 2.0]]), 1, swap)
        tensor([[2., 1.]])
    """
    last = tensor.to(maps).movedim(dim, -1)
    heads = last.reshape(*last.shape[:-1], *maps.shape[:2])
    new = torch.einsum("hij,...hj->...hi", maps, heads)
    return new.flatten(-2).movedim(-1, dim).to(tensor)
