"""What others do in place of this package's sums and scores, as plain functions to be timed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mi_prune.information import diagonal_blocks

__all__ = ["log_det_from_samples", "log_det_information", "neighbour_information", "symmetric_sum"]


def log_det_information(
    sxx: Tensor, sxy: Tensor, syy: Tensor, units: int, entries: int = 1
) -> Tensor:
    """``I(x_i; Y) = 1/2 (ln|S_ii| + ln|S_yy| - ln|S_(i,y)|)``, unit after unit, in nats.

    Both determinants with ``Y`` are taken anew for each unit, as the public re-implementation of
    Fan et al. (2021) does.

    Args:
        sxx: Covariance of the entries ``(d, d)``.
        sxy: With the layer above ``(d, m)``.
        syy: Of the layer above ``(m, m)``.
        units: How many units to score, from the first.
        entries: Entries per unit.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> log_det_information(one, 0.8 * one, one, units=1)
        tensor([0.5108], dtype=torch.float64)
    """
    blocks = diagonal_blocks(sxx, entries)
    scores = []
    for unit in range(units):
        rows = slice(unit * entries, (unit + 1) * entries)
        left = torch.cat([blocks[unit], sxy[rows].mT])
        joint = torch.cat([left, torch.cat([sxy[rows], syy])], dim=1)
        parts = [torch.linalg.slogdet(matrix).logabsdet for matrix in (blocks[unit], syy, joint)]
        scores.append((parts[0] + parts[1] - parts[2]) / 2)
    return torch.stack(scores)


def log_det_from_samples(x: Tensor, y: Tensor, units: int, entries: int = 1) -> Tensor:
    """The same from samples ``x (N, d)`` and ``y (N, m)``, one covariance matrix for each unit."""
    scores = []
    for unit in range(units):
        mine = x[:, unit * entries : (unit + 1) * entries]
        joint = torch.cat([mine, y], dim=1).mT.cov(correction=0)
        sxx, sxy = joint[:entries, :entries], joint[:entries, entries:]
        scores.append(log_det_information(sxx, sxy, joint[entries:, entries:], 1, entries))
    return torch.cat(scores)


def neighbour_information(x: Any, y: Any) -> Any:
    """Nearest-neighbour estimate for each column of ``x (N, k)`` with one read-out ``y (N,)``."""
    try:
        from sklearn.feature_selection import mutual_info_regression
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "scikit-learn is not installed, and one rival of the benchmark comes from it; run "
            "`pip install 'lightning-mi-prune[benchmark]'`",
            name="sklearn",
        ) from error
    return mutual_info_regression(x, y, random_state=0)


def symmetric_sum(x: Any, total: Any) -> Any:
    """``total += x' x`` with the BLAS routine that computes one triangle only.

    Args:
        x: Samples ``(N, d)``, a C-ordered numpy array.
        total: ``(d, d)`` in Fortran order, written in place.
    """
    from scipy.linalg.blas import dsyrk

    return dsyrk(1.0, x.T, beta=1.0, c=total, overwrite_c=True)
