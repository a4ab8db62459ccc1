"""EXACT    sums that stay in double precision, wherever and in whatever mode they are added up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self

__all__ = ["ExactSums"]


class ExactSums(Metric):
    """A metric of float64 sums, whose states move with a module and are never rounded with it.

    ``module.to(torch.bfloat16)`` leaves the type as it is, and where a device has no float64 (MPS)
    the states stay where they are. Subclasses add by assignment, never in place: states that were
    reset in inference mode could not be added to outside of it.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    @property
    def packed_size(self) -> int:
        """Numbers of all sums together."""
        return sum(getattr(self, name).numel() for name in self._defaults)

    def packed(self) -> Tensor:
        """All sums as one vector."""
        return torch.cat([getattr(self, name).reshape(-1) for name in self._defaults])

    def unpack(self, packed: Tensor) -> Self:
        """Take over the sums of such a vector."""
        sizes = [getattr(self, name).numel() for name in self._defaults]
        for name, part in zip(self._defaults, torch.split(packed, sizes), strict=True):
            setattr(self, name, part.reshape(getattr(self, name).shape).clone())
        self._update_count = max(1, self._update_count)  # else torchmetrics warns in compute()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        def move(x: Tensor) -> Tensor:
            place = fn(torch.zeros(0, device=x.device)).device
            return x if place.type == "mps" else x.to(place)

        super()._apply(move, *args, **kwargs)
        return self
