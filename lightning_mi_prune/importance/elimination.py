"""Exact backward elimination on the joint information with the layer above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.importance.information import cholesky, diagonal_blocks, log_det_blocks

__all__ = [
    "Elimination",
    "eliminate",
]

_BLOCK = 64  # eliminations between two flushes of the delayed updates
_ROWS = 192  # of one product of matrices in a flush; what lies below them is left out


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they are removed, cheapest first, and the cost of each.

    Args:
        order: Positions of the removed units.
        costs: Cost of each step; for exact elimination nats of ``I(X_kept; Y)`` lost by the step.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]

    def keep(self, units: int, total: int) -> tuple[int, ...]:
        """The kept units, in increasing order, when ``units`` of ``total`` stay."""
        removed = set(self.order[: total - units])
        return tuple(i for i in range(total) if i not in removed)


class _Precisions:
    """``P`` and ``Q`` at one input, from which units are removed: down-dates are applied in blocks.

    They are symmetric, so only what lies above their diagonal is kept up to date.

    Args:
        pair: ``P (d, d)`` and ``Q (d, d)``; they stay as they are.
        entries: Entries per unit.
    """

    def __init__(self, pair: tuple[Tensor, Tensor], entries: int) -> None:
        self.matrices, self.entries = torch.stack(pair), entries
        self.factors = self.matrices.new_empty(2, _BLOCK * entries, self.matrices.shape[1])
        self.used = 0
        self.blocks = self._diagonals()

    def gains(self) -> Tensor:
        """``ln|Q_gg| - ln|P_gg|`` of every unit."""
        logs = log_det_blocks(self.blocks)
        return logs[1] - logs[0]

    def remove(self, unit: int) -> None:
        """Marginalize one unit with entries g: ``P -= P[:, g] P[g, g]^-1 P[g, :]``."""
        g, start = self.entries, unit * self.entries
        mine, done = slice(start, start + g), self.factors[:, : self.used]
        above, right = self.matrices[:, :start, mine].mT, self.matrices[:, mine, start:]
        rows = torch.baddbmm(torch.cat([above, right], 2), done[..., mine].mT, done, alpha=-1)
        own = rows[..., mine]
        own = (own + own.mT) / 2 if g > 1 else own.clone()
        factor = self.factors[:, self.used : self.used + g]
        if g == 1:
            torch.mul(rows, own.rsqrt(), out=factor)
            self.blocks[..., 0, 0].addcmul_(factor[:, 0], factor[:, 0], value=-1)
        else:
            factor.copy_(torch.linalg.solve_triangular(cholesky(own), rows, upper=False))
            parts = factor.view(2, g, -1, g).transpose(1, 2)
            self.blocks -= parts.mT @ parts
        self.used += g
        # The rest of the removed block is rounding; as it was, its logarithm is finite.
        self.blocks[:, unit] = own

    def flush(self, removed: Tensor) -> None:
        """Apply the delayed down-dates, as products of matrices."""
        done = self.factors[:, : self.used]
        for matrix, factor in zip(self.matrices, done, strict=True):
            for start in range(0, len(matrix), _ROWS):
                rows = factor[:, start : start + _ROWS]
                matrix[start : start + _ROWS, start:].addmm_(rows.mT, factor[:, start:], alpha=-1)
        before, self.blocks = self.blocks, self._diagonals()
        self.blocks[:, removed] = before[:, removed]
        self.used = 0

    def shrink(self, alive: Tensor) -> None:
        """Drop the rows and columns of removed units; call it right after a flush."""
        g = self.entries
        index = (alive[:, None] * g + torch.arange(g, device=alive.device)).flatten()
        smaller = self.matrices.new_empty(2, len(index), len(index))
        for matrix, new in zip(self.matrices, smaller, strict=True):
            new.copy_(matrix[index[:, None], index])
        self.matrices = smaller
        self.factors = self.factors.new_empty(2, _BLOCK * g, len(index))
        self.blocks = self.blocks[:, alive]

    def _diagonals(self) -> Tensor:
        """Diagonal blocks of both ``(2, n, g, g)``."""
        return torch.stack([diagonal_blocks(matrix, self.entries) for matrix in self.matrices])


@torch.inference_mode()  # thousands of small steps: a tenth faster
def eliminate(
    precisions: Sequence[tuple[Tensor, Tensor]],
    *,
    keep: int = 1,
    entries: int | Sequence[int] = 1,
) -> Elimination:
    """Exact backward elimination on the joint information with the layer above.

    With ``P = Cov(x)^-1`` and ``Q = Cov(x | y)^-1``, removing unit g from those that are left costs
    ``1/2 (ln|Q_gg| - ln|P_gg|)`` nats of ``I(X_kept; Y)``. The cheapest unit is removed from both
    inverses, and so on: the costs add up to the information lost (chain rule). Down-dates are
    delayed and applied in blocks, so nearly all of the ``O(d^3)`` work is matrix products. For
    units at several inputs, the costs of all of them add up.

    Args:
        precisions: ``P (d, d)`` and ``Q (d, d)`` at each input.
        keep: Units that stay; 0 gives the whole order.
        entries: Entries per unit, of which ``d`` is a multiple; at each input, if they differ.

    Raises:
        PruningError: If a matrix is not positive.

    Example:
        >>> precision = torch.eye(2, dtype=torch.float64)
        >>> posterior = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        >>> eliminate([(precision, posterior)]).order
        (1,)
    """
    sizes = [entries] * len(precisions) if isinstance(entries, int) else entries
    pairs = [_Precisions(pair, size) for pair, size in zip(precisions, sizes, strict=True)]
    first = precisions[0][0]
    units = first.shape[0] // sizes[0]
    names = torch.arange(units, device=first.device)
    alive = torch.ones(units, dtype=torch.bool, device=first.device)
    order: list[int] = []
    costs: list[float] = []
    for step in range(1, units - keep + 1):
        gains = [pair.gains() for pair in pairs]
        cost = gains[0] / 2 if len(gains) == 1 else torch.stack(gains).sum(0) / 2
        unit = int(torch.where(alive, cost, math.inf).argmin())
        nats = float(cost[unit])
        if not math.isfinite(nats):  # argmin takes NaN first, of a matrix that lost its digits
            raise PruningError(
                f"The information of {int(alive.sum())} of {counted(units, 'unit')} is {nats}, not "
                "a number of nats: their covariance is not positive. Validate on more data, raise "
                "positions, or give MutualInformation a larger ridge."
            )
        order.append(int(names[unit]))
        costs.append(max(0.0, nats))
        for pair in pairs:
            pair.remove(unit)
        alive[unit] = False
        if step % _BLOCK == 0:
            smaller = 4 * int(alive.sum()) <= 3 * len(alive)
            left = alive.nonzero().flatten()
            for pair in pairs:
                pair.flush(~alive)
                if smaller:
                    pair.shrink(left)
            if smaller:
                names, alive = names[left], alive[left]
    return Elimination(tuple(order), tuple(costs))
