"""MEASURE  pure functions on tensors: Gaussian MI, its removal costs, copula scores, CKA (nats).

Notation: ``x`` are the units of a layer ``(d,)``, ``y`` the kept units of the layer above ``(m,)``,
``N`` samples; ``sxx (d, d)``, ``syy (m, m)``, ``sxy (d, m)`` are covariances. A unit may have
several entries (an attention head): then consecutive entries belong together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "Elimination",
    "conditional_covariance",
    "eliminate",
    "gaussian_copula",
    "inverse",
    "joint_information",
    "plugin_bias",
    "regression",
    "unbiased_cka",
    "unit_information",
]

# Units are observed through noise of this share of their variance, so that exact duplicates and
# dead units leave every matrix invertible; float64 keeps ten digits beyond it.
JITTER = 1e-6
_BLOCK = 64  # eliminations between two flushes of the delayed rank-1 updates


def _cholesky(matrix: Tensor) -> Tensor:
    factor: Tensor = torch.linalg.cholesky(matrix)
    return factor


def _log_det_blocks(blocks: Tensor) -> Tensor:
    """Log-determinants of ``(n, g, g)`` positive definite blocks."""
    if blocks.shape[-1] == 1:
        return blocks.flatten().log()
    return 2 * _cholesky(blocks).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def _diagonal_blocks(matrix: Tensor, entries: int) -> Tensor:
    """Diagonal ``(n, g, g)`` blocks of a ``(n g, n g)`` matrix."""
    n = matrix.shape[0] // entries
    return matrix.view(n, entries, n, entries).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def inverse(matrix: Tensor, jitter: float = JITTER) -> Tensor:
    """Inverse of a covariance whose entries are observed through a little noise.

    Args:
        matrix: Covariance ``(d, d)``.
        jitter: Noise variance as a share of each entry's own variance (of the mean variance where
            the entry is constant).
    """
    variance = matrix.diagonal()
    mean = variance.mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    noise = torch.where(variance > JITTER * mean, variance, mean) * jitter
    return torch.cholesky_inverse(_cholesky(matrix + torch.diag(noise)))


def conditional_covariance(sxx: Tensor, sxy: Tensor, syy: Tensor) -> Tensor:
    """``Cov(x | y) = sxx - sxy syy^-1 syx``, shape ``(d, d)``; one Cholesky of ``syy``."""
    half: Tensor = torch.linalg.solve_triangular(_cholesky(syy), sxy.mT, upper=False)
    return sxx - half.mT @ half


def joint_information(sxx: Tensor, sxy: Tensor, syy: Tensor) -> Tensor:
    """``I(X; Y) = 1/2 ln(|sxx| / |Cov(x | y)|)`` of jointly Gaussian vectors, in nats.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> round(joint_information(one, 0.8 * one, one).item(), 6)
        0.510826
    """
    given = conditional_covariance(sxx, sxy, syy)
    return (_log_det_blocks(sxx[None]) - _log_det_blocks(given[None]))[0] / 2


def unit_information(sxx: Tensor, sxy: Tensor, syy: Tensor, entries: int = 1) -> Tensor:
    """Information of every single unit with the whole kept set, in nats, shape ``(d / entries,)``.

    ``I(x_i; Y) = -1/2 ln(1 - R_i^2)``; for a group of entries ``1/2 ln(|S_gg| / |B_gg|)`` with
    ``B = Cov(x | y)``. One Cholesky of ``syy`` scores the whole layer. A constant unit scores 0.

    Example:
        >>> sxx = torch.eye(2, dtype=torch.float64)
        >>> sxy = torch.tensor([[0.8], [0.0]], dtype=torch.float64)
        >>> unit_information(sxx, sxy, torch.ones(1, 1, dtype=torch.float64))
        tensor([0.5108, 0.0000], dtype=torch.float64)
    """
    half = torch.linalg.solve_triangular(_cholesky(syy), sxy.mT, upper=False)  # (m, d)
    if entries == 1:
        variance = sxx.diagonal()
        explained = half.square().sum(0)
        share = torch.where(variance > 0, explained / variance.clamp_min(1e-300), 0.0)
        return -torch.log1p(-share.clamp(max=1 - 1e-12)) / 2
    blocks = _diagonal_blocks(sxx, entries)
    halves = half.view(half.shape[0], -1, entries).permute(1, 2, 0)  # (n, g, m)
    noise = JITTER * blocks.diagonal(dim1=-2, dim2=-1).mean().clamp_min(1e-300)
    blocks = blocks + noise * torch.eye(entries, dtype=sxx.dtype, device=sxx.device)
    return (_log_det_blocks(blocks) - _log_det_blocks(blocks - halves @ halves.mT)) / 2


def plugin_bias(samples: int, dimension: float, entries: int = 1) -> float:
    """Expected plug-in estimate of a unit's ``I(x_i; Y)`` when there is none, in nats.

    ``1/2 [psi((N-1)/2) - psi((N-1-m)/2)]`` for one entry, the same for every unit of a layer and
    for every true value, because the log-determinant of a Wishart matrix only shifts; a group
    adds one such term an entry, with one sample less each. With a ridge on the target, pass its
    effective dimension ``tr(syy (syy + ridge)^-1)``.

    Example:
        >>> round(plugin_bias(samples=100, dimension=10), 4)
        0.0538
    """
    if samples - entries <= dimension:
        return math.inf
    upper = (samples - 1 - torch.arange(entries, dtype=torch.float64)) / 2
    return float((torch.digamma(upper) - torch.digamma(upper - dimension / 2)).sum()) / 2


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they are given up, cheapest first, and what each one costs.

    Args:
        order: Positions of the eliminated units.
        costs: Loss at each step; for exact elimination nats of ``I(X_kept; Y)`` lost by the step.
    """

    order: tuple[int, ...]
    costs: tuple[float, ...]

    def keep(self, units: int, total: int) -> tuple[int, ...]:
        """Survivors, in increasing order, when ``units`` of ``total`` stay."""
        gone = set(self.order[: total - units])
        return tuple(i for i in range(total) if i not in gone)


class _Precision:
    """A precision matrix that forgets groups: down-dates are collected and applied in blocks."""

    def __init__(self, matrix: Tensor, entries: int) -> None:
        self.matrix, self.entries = matrix.clone(), entries
        self.factors = matrix.new_empty(matrix.shape[0], _BLOCK * entries)
        self.used = 0
        self.blocks = _diagonal_blocks(matrix, entries)

    def forget(self, group: int) -> None:
        """Marginalise one group: ``P -= P[:, g] P[g, g]^-1 P[g, :]``."""
        g = self.entries
        rows = slice(group * g, group * g + g)
        done = self.factors[:, : self.used]
        column = self.matrix[rows].mT - done @ done[rows].mT
        corner = _cholesky((column[rows] + column[rows].mT) / 2)
        factor = torch.linalg.solve_triangular(corner, column.mT, upper=False).mT
        self.factors[:, self.used : self.used + g] = factor
        self.used += g
        parts = factor.view(-1, g, g)
        self.blocks -= parts @ parts.mT if g > 1 else parts.square()
        # What is left of the forgotten block is rounding; a harmless one keeps its logarithm sane.
        self.blocks[group] = torch.eye(g).to(self.blocks)

    def flush(self, forgotten: Tensor) -> None:
        """Apply what was collected, as one product of matrices."""
        done = self.factors[:, : self.used]
        self.matrix.addmm_(done, done.mT, alpha=-1)
        self.used, self.blocks = 0, _diagonal_blocks(self.matrix, self.entries)
        self.blocks[forgotten] = torch.eye(self.entries).to(self.blocks)

    def shrink(self, alive: Tensor) -> None:
        """Drop the rows and columns of forgotten groups; to be called right after a flush."""
        g = self.entries
        index = (alive[:, None] * g + torch.arange(g, device=alive.device)).flatten()
        self.matrix = self.matrix[index][:, index]
        self.factors = self.factors[: len(index)]
        self.blocks = self.blocks[alive]


def eliminate(
    precision: Tensor, posterior: Tensor, *, keep: int = 1, entries: int = 1
) -> Elimination:
    """Exact backward elimination on the joint information with the layer above.

    With ``P = Cov(x)^-1`` and ``Q = Cov(x | y)^-1``, giving up group g of the units that are left
    costs ``1/2 (ln|Q_gg| - ln|P_gg|)`` nats of ``I(X_kept; Y)``. The cheapest goes, both inverses
    forget it, and so on: the costs add up to the information lost (chain rule). Down-dates are
    delayed and applied in blocks, so nearly all of the ``O(d^3)`` work is matrix products.

    Args:
        precision: ``P (d, d)``.
        posterior: ``Q (d, d)``.
        keep: Units that stay, at least 1.
        entries: Entries per unit ``g``; ``d`` is a multiple of it.

    Example:
        >>> sxx = torch.eye(2, dtype=torch.float64)
        >>> posterior = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        >>> eliminate(sxx, posterior).order
        (1,)
    """
    p, q = _Precision(precision, entries), _Precision(posterior, entries)
    units = precision.shape[0] // entries
    names = torch.arange(units, device=precision.device)
    alive = torch.ones(units, dtype=torch.bool, device=precision.device)
    order: list[int] = []
    costs: list[float] = []
    for step in range(1, units - keep + 1):
        cost = (_log_det_blocks(q.blocks) - _log_det_blocks(p.blocks)) / 2
        group = int(torch.where(alive, cost, math.inf).argmin())
        order.append(int(names[group]))
        costs.append(max(0.0, float(cost[group])))
        p.forget(group)
        q.forget(group)
        alive[group] = False
        if step % _BLOCK == 0:
            p.flush(~alive)
            q.flush(~alive)
            if 4 * int(alive.sum()) <= 3 * len(alive):
                left = alive.nonzero().flatten()
                p.shrink(left)
                q.shrink(left)
                names, alive = names[left], alive[left]
    return Elimination(tuple(order), tuple(costs))


def regression(covariance: Tensor, kept: Tensor, dropped: Tensor, jitter: float) -> Tensor:
    """Least-squares coefficients of the dropped entries on the kept ones, ``(dropped, kept)``.

    ``M = S_DK (S_KK + r I)^-1`` with ``r = jitter * mean variance``.
    """
    skk = covariance[kept][:, kept]
    variance = skk.diagonal().mean().clamp_min(torch.finfo(skk.dtype).tiny)
    skk = skk + jitter * variance * torch.eye(len(kept), dtype=skk.dtype, device=skk.device)
    return torch.cholesky_solve(covariance[kept][:, dropped], _cholesky(skk)).mT


def gaussian_copula(x: Tensor) -> Tensor:
    """Normal scores ``Phi^-1(rank / (N + 1))`` of every column; ties share their mean rank.

    Gaussian MI of normal scores is exact for every monotone distortion of Gaussian variables and
    a lower bound otherwise (Ince et al. 2017).

    Args:
        x: Samples ``(N, d)``.

    Example:
        >>> gaussian_copula(torch.tensor([[1.0], [8.0], [27.0]])).flatten()
        tensor([-0.6745,  0.0000,  0.6745])
    """
    columns = []
    for column in x.T:
        _, inverse_index, counts = column.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).to(x.dtype)
        mean_rank = last - (counts.to(x.dtype) - 1) / 2
        columns.append(torch.special.ndtri(mean_rank[inverse_index] / (len(column) + 1)))
    return torch.stack(columns, dim=1)


def unbiased_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centered kernel alignment from the unbiased HSIC (Song et al. 2012, eq. 5).

    About 0 for independent data at any ``N``, 1 for rotated and scaled copies.

    Args:
        x: Samples ``(N, d)`` with ``N`` above 3.
        y: Samples ``(N, m)``.

    Example:
        >>> x = torch.randn(16, 4, dtype=torch.float64)
        >>> round(unbiased_cka(x, 3 * x.flip(1)).item(), 6)
        1.0
    """
    kx, ky = _u_centered(x @ x.mT), _u_centered(y @ y.mT)
    return (kx * ky).sum() / ((kx * kx).sum() * (ky * ky).sum()).sqrt()


def _u_centered(gram: Tensor) -> Tensor:
    n = gram.shape[0]
    gram = gram - torch.diag(gram.diagonal())
    means = gram.sum(0) / (n - 2)
    gram = gram - means[:, None] - means[None, :] + means.sum() / (2 * (n - 1))
    return gram - torch.diag(gram.diagonal())
