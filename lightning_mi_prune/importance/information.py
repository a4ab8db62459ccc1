"""Gaussian mutual information in nats, shrinkage and regression: pure functions on tensors.

Notation: ``x`` are the units of a layer ``(d,)``, ``y`` the kept units of the layer above ``(m,)``,
``N`` samples; ``sxx (d, d)``, ``syy (m, m)``, ``sxy (d, m)`` are covariances. The entries of a unit
with several of them (an attention head) are consecutive.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "JITTER",
    "NOTHING",
    "cholesky",
    "conditional_covariance",
    "diagonal_blocks",
    "inverse",
    "joint_information",
    "log_det_blocks",
    "mean_variance",
    "plugin_bias",
    "regression",
    "shrink",
    "shrinkage",
    "times_lower",
    "unit_information",
]

# Noise added to every unit, as a share of its variance, so that matrices with exact copies and
# constant units are invertible; float64 keeps ten digits beyond it.
JITTER = 1e-6


# Variance where all units of a layer are constant: negligible, but large enough that its inverse
# and a share of it are ordinary numbers of float64.
NOTHING = 1e-150


# Columns of one product with a triangular matrix.
_COLUMNS = 192


def cholesky(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor, with the type that torch leaves out."""
    factor: Tensor = torch.linalg.cholesky(matrix)
    return factor


def times_lower(matrix: Tensor, lower: Tensor) -> Tensor:
    """Product ``(m, d)`` with a lower triangular matrix ``(d, d)``, whose zeros are left out.

    Example:
        >>> times_lower(torch.ones(1, 2), torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
        tensor([[3., 3.]])
    """
    found = torch.empty_like(matrix)
    for start in range(0, len(lower), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        torch.mm(matrix[:, start:], lower[start:, columns], out=found[:, columns])
    return found


def log_det_blocks(blocks: Tensor) -> Tensor:
    """Log-determinants of ``(..., g, g)`` positive definite blocks."""
    if blocks.shape[-1] == 1:
        return blocks[..., 0, 0].log()
    return 2 * cholesky(blocks).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def diagonal_blocks(matrix: Tensor, entries: int) -> Tensor:
    """Diagonal ``(n, g, g)`` blocks of a ``(n g, n g)`` matrix."""
    n = matrix.shape[0] // entries
    return matrix.view(n, entries, n, entries).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()


def mean_variance(covariance: Tensor) -> Tensor:
    """Mean variance of the entries, in float64; above 0 even where all of them are constant.

    Example:
        >>> mean_variance(torch.zeros(2, 2, dtype=torch.float64)) > 0
        tensor(True)
    """
    return covariance.diagonal().mean().clamp_min(NOTHING)


def inverse(matrix: Tensor, jitter: float = JITTER, *, extra: Tensor | None = None) -> Tensor:
    """Inverse of a covariance ``(d, d)`` with a little noise added to its entries.

    The noise is a share ``jitter`` of each entry's own variance, or of the mean variance where the
    entry is constant.

    Args:
        matrix: The covariance.
        jitter: That share.
        extra: Variance ``(d,)`` to add to the entries before.
    """
    matrix = matrix.clone()
    if extra is not None:
        matrix.diagonal().add_(extra)
    variance = matrix.diagonal()
    mean = mean_variance(matrix)
    noise = torch.where(variance > JITTER * mean, variance, mean) * jitter
    matrix.diagonal().add_(noise)
    factor = cholesky(matrix)
    del matrix, variance  # as few matrices at a time as can be: they are the largest that there are
    return torch.cholesky_inverse(factor)


def conditional_covariance(sxx: Tensor, sxy: Tensor, syy: Tensor) -> Tensor:
    """``Cov(x | y) = sxx - sxy syy^-1 syx``, shape ``(d, d)``; one Cholesky of ``syy``."""
    half: Tensor = torch.linalg.solve_triangular(cholesky(syy), sxy.mT, upper=False)
    return sxx - half.mT @ half


def joint_information(sxx: Tensor, sxy: Tensor, syy: Tensor) -> Tensor:
    """``I(X; Y) = 1/2 ln(|sxx| / |Cov(x | y)|)`` of jointly Gaussian vectors, in nats.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> round(joint_information(one, 0.8 * one, one).item(), 6)
        0.510826
    """
    given = conditional_covariance(sxx, sxy, syy)
    return (log_det_blocks(sxx[None]) - log_det_blocks(given[None]))[0] / 2


def unit_information(sxx: Tensor, sxy: Tensor, syy: Tensor, entries: int = 1) -> Tensor:
    """Information of every single unit with all of ``y``, in nats, shape ``(d / entries,)``.

    ``I(x_i; Y) = -1/2 ln(1 - R_i^2)``; for a group of entries ``1/2 ln(|S_gg| / |B_gg|)`` with
    ``B = Cov(x | y)``. One Cholesky of ``syy`` scores the whole layer. A constant unit scores 0.

    Example:
        >>> sxx = torch.eye(2, dtype=torch.float64)
        >>> sxy = torch.tensor([[0.8], [0.0]], dtype=torch.float64)
        >>> unit_information(sxx, sxy, torch.ones(1, 1, dtype=torch.float64))
        tensor([0.5108, 0.0000], dtype=torch.float64)
    """
    half = torch.linalg.solve_triangular(cholesky(syy), sxy.mT, upper=False)  # (m, d)
    if entries == 1:
        variance = sxx.diagonal()
        explained = half.square().sum(0)
        share = torch.where(variance > 0, explained / variance.clamp_min(1e-300), 0.0)
        return -torch.log1p(-share.clamp(max=1 - 1e-12)) / 2
    blocks = diagonal_blocks(sxx, entries)
    halves = half.view(half.shape[0], -1, entries).permute(1, 2, 0)  # (n, g, m)
    noise = JITTER * blocks.diagonal(dim1=-2, dim2=-1).clamp_min(1e-200)
    blocks = blocks + torch.diag_embed(noise)
    return (log_det_blocks(blocks) - log_det_blocks(blocks - halves @ halves.mT)) / 2


def plugin_bias(samples: int, dimension: float, entries: int = 1) -> float:
    """Expected plug-in estimate of a unit's ``I(x_i; Y)`` when there is none, in nats.

    ``1/2 [psi((N-1)/2) - psi((N-1-m)/2)]`` for one entry, the same for every unit of a layer and
    for every true value, because the log-determinant of a Wishart matrix only shifts; several
    entries add one such term each, with one sample less each. With a ridge on ``y``, pass its
    effective dimension ``tr(syy (syy + ridge)^-1)``.

    Example:
        >>> round(plugin_bias(samples=100, dimension=10), 4)
        0.0538
    """
    if samples - entries <= dimension:
        return math.inf
    upper = (samples - 1 - torch.arange(entries, dtype=torch.float64)) / 2
    return float((torch.digamma(upper) - torch.digamma(upper - dimension / 2)).sum()) / 2


def shrink(covariance: Tensor, samples: int) -> Tensor:
    """Shrink correlations towards 0, the more the fewer samples there are.

    Oracle-approximating shrinkage (Chen et al. 2010, eq. 23) on the scale of correlations: next to
    nothing with many samples an entry, and still invertible with fewer samples than entries.

    Args:
        covariance: Plug-in covariance ``(d, d)``.
        samples: Samples it was estimated from.

    Example:
        >>> few = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        >>> shrink(few, 10_000)[0, 1] > 0.499, shrink(few, 4)[0, 1] < 0.3
        (tensor(True), tensor(True))
    """
    share = shrinkage(covariance, samples)
    mixed = (1 - share) * covariance
    mixed.diagonal().add_(share * covariance.diagonal())
    return mixed


def shrinkage(covariance: Tensor, samples: int) -> Tensor:
    """How far :func:`shrink` moves correlations towards 0: a share from 0 to 1."""
    size = covariance.shape[0]
    variance = covariance.diagonal()
    scale = torch.where(variance > 0, variance, 1.0).rsqrt()
    scaled = covariance * scale[:, None]
    squares = scaled.mul_(scale).square_().sum()
    trace = (variance > 0).sum()
    spread = (samples + 1 - 2 / size) * (squares - trace.square() / size)
    wanted = (1 - 2 / size) * squares + trace.square()
    share = torch.where(spread > wanted, wanted / spread, 1.0) if size > 1 else torch.tensor(0.0)
    return share.to(covariance)


def regression(covariance: Tensor, kept: Tensor, dropped: Tensor, samples: int) -> Tensor:
    """Least-squares coefficients of the dropped entries on the kept ones, ``(dropped, kept)``.

    ``M = S_DK S_KK^-1``, each row scaled by the share of its ``R^2`` that is expected to hold on
    new samples (Stein's formula, Darlington 1968), so that fitted noise is not used: exact
    relations stay exact, and with no more samples than kept entries all coefficients are 0.
    """
    skk, skd = covariance[kept[:, None], kept], covariance[kept[:, None], dropped]
    freedom = samples - len(kept) - 2
    if freedom <= 0 or not len(dropped):
        return torch.zeros_like(skd.mT)
    skk.diagonal().add_(JITTER * mean_variance(skk))
    factor = cholesky(skk)
    del skk
    plain = torch.cholesky_solve(skd, factor).mT
    total = covariance.diagonal()[dropped].clamp_min(NOTHING)
    explained = ((plain * skd.mT).sum(1) / total).clamp(1e-12, 1.0)
    loss = (samples - 1) / (freedom + 1) * (samples - 2) / freedom * (samples + 1) / samples
    lasting = 1 - (1 - explained) * loss
    return plain * (lasting / explained).clamp_min(0)[:, None]
