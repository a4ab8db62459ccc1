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


class _Precision:
    """A precision matrix from which units are removed: down-dates are applied in blocks."""

    def __init__(self, matrix: Tensor, entries: int) -> None:
        self.matrix, self.entries = matrix.clone(), entries
        self.factors = matrix.new_empty(matrix.shape[0], _BLOCK * entries)
        self.used = 0
        self.blocks = diagonal_blocks(matrix, entries)

    def remove(self, unit: int) -> None:
        """Marginalize one unit with entries g: ``P -= P[:, g] P[g, g]^-1 P[g, :]``."""
        g = self.entries
        rows = slice(unit * g, unit * g + g)
        done = self.factors[:, : self.used]
        column = self.matrix[rows].mT - done @ done[rows].mT
        own = (column[rows] + column[rows].mT) / 2
        if g == 1:
            factor = column * own.rsqrt()
        else:
            factor = torch.linalg.solve_triangular(cholesky(own), column.mT, upper=False).mT
        self.factors[:, self.used : self.used + g] = factor
        self.used += g
        parts = factor.view(-1, g, g)
        self.blocks -= parts @ parts.mT if g > 1 else parts.square()
        # The rest of the removed block is rounding; as it was, its logarithm is finite.
        self.blocks[unit] = own

    def flush(self, removed: Tensor) -> None:
        """Apply the delayed down-dates, as one product of matrices."""
        done = self.factors[:, : self.used]
        self.matrix.addmm_(done, done.mT, alpha=-1)
        before, self.blocks = self.blocks, diagonal_blocks(self.matrix, self.entries)
        self.blocks[removed] = before[removed]
        self.used = 0

    def shrink(self, alive: Tensor) -> None:
        """Drop the rows and columns of removed units; call it right after a flush."""
        g = self.entries
        index = (alive[:, None] * g + torch.arange(g, device=alive.device)).flatten()
        self.matrix = self.matrix[index[:, None], index]
        self.factors = self.factors[: len(index)]
        self.blocks = self.blocks[alive]


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
    pairs = [
        (_Precision(p, size), _Precision(q, size))
        for (p, q), size in zip(precisions, sizes, strict=True)
    ]
    first = precisions[0][0]
    units = first.shape[0] // sizes[0]
    names = torch.arange(units, device=first.device)
    alive = torch.ones(units, dtype=torch.bool, device=first.device)
    order: list[int] = []
    costs: list[float] = []
    for step in range(1, units - keep + 1):
        gains = [log_det_blocks(q.blocks) - log_det_blocks(p.blocks) for p, q in pairs]
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
        for matrix in (m for pair in pairs for m in pair):
            matrix.remove(unit)
        alive[unit] = False
        if step % _BLOCK == 0:
            smaller = 4 * int(alive.sum()) <= 3 * len(alive)
            left = alive.nonzero().flatten()
            for matrix in (m for pair in pairs for m in pair):
                matrix.flush(~alive)
                if smaller:
                    matrix.shrink(left)
            if smaller:
                names, alive = names[left], alive[left]
    return Elimination(tuple(order), tuple(costs))
