"""TURN     how far layers turn what they are given: mean angles between states (Metric)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.exact import ExactSums

__all__ = ["Angles"]


class Angles(ExactSums):
    """Mean angle between every pair of states of a stack, as a share of a half turn.

    ``arccos(cos(x, y)) / pi``, averaged over samples: 0 for the same direction, 1/2 for
    orthogonal states (Gromov et al. 2024, arXiv 2403.17887, eq. 7).

    Args:
        states: Number of states ``S``: the input of the first layer and every output.

    Raises:
        PruningError: If ``states`` is no whole number from 1.

    Example:
        >>> angles = Angles(states=2)
        >>> angles.update([torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0]])])
        >>> round(float(angles.compute()[0, 1]), 4)
        0.25
    """

    total: Tensor
    count: Tensor

    def __init__(self, states: int) -> None:
        super().__init__()
        if isinstance(states, bool) or not isinstance(states, int) or states < 1:
            raise PruningError(f"states={states!r}; expected a whole number from 1.")
        self.states = states
        zeros = torch.zeros(states, states, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[Tensor]) -> None:
        """Add samples of all states, each ``(n, d)`` of one width.

        Raises:
            PruningError: If their number, samples or widths differ.
        """
        shapes = [tuple(x.shape) for x in outputs]
        if len(shapes) != self.states or len(set(shapes)) != 1:
            raise PruningError(
                f"{len(shapes)} states of shapes {shapes}; expected {self.states} of one shape."
            )
        with torch.inference_mode(False), torch.autocast(outputs[0].device.type, enabled=False):
            home = self.total.device
            x = torch.stack([x.detach().to(home, torch.float64) for x in outputs])
            x = functional.normalize(x, dim=2)
            cosines = torch.einsum("and,bnd->abn", x, x).clamp(-1, 1)
            self.total = self.total + cosines.acos().sum(2) / math.pi
            self.count = self.count + x.shape[1]

    def compute(self) -> Tensor:
        """Mean angle of every pair ``(S, S)``; exactly 0 of a state with itself.

        Raises:
            PruningError: If nothing was heard, or values that are not finite.
        """
        if not self.count:
            raise PruningError("No state was heard; run validation first.")
        found = self.total / self.count
        odd = (~found.diagonal().isfinite()).nonzero().flatten().tolist()
        if odd:
            raise PruningError(
                f"States {odd} hold NaN or infinite values. Expected finite activations; look for "
                "a diverged loss or an overflow in half precision first."
            )
        return found.fill_diagonal_(0)
