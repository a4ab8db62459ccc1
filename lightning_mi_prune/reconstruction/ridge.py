"""How strongly a least-squares change of weights is pulled towards no change at all.

Too weak a pull fits the noise of the sample, too strong a one leaves gains unused, and which is
which differs between models and between the layers of one. So the sample is divided into folds of
whole examples; the strength is taken whose changes, fitted to all folds but one, reduce the error
on the one left out most. None does: then the weights stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mi_prune.calibration.moments import stabilize
from lightning_mi_prune.importance.information import mean_variance

__all__ = ["FOLDS", "LinearChange", "choose_strength", "linear_change"]

FOLDS = 4
# Shares of the mean variance of the inputs: from almost nothing to almost no change of the weights,
# then to a change of the bias alone.
_STRENGTHS = (1e-8, 1e-6, 1e-5, *(10 ** (step / 2) for step in range(-8, 7)), math.inf)


@dataclass(frozen=True)
class LinearChange:
    """What to add to a linear layer.

    Args:
        weight: Change of the weight ``(outputs, inputs)``.
        bias: Change of the bias ``(outputs,)``; zero where there is none.
    """

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Centred:
    """Mean squares of inputs and products with what is missing, around the means.

    Args:
        mean: Means of the inputs ``(inputs,)``; zero without an intercept.
        shift: Means of what is missing ``(outputs,)``; zero without an intercept.
        outer: ``(inputs, inputs)``.
        cross: ``(inputs, outputs)``.
    """

    mean: Tensor
    shift: Tensor
    outer: Tensor
    cross: Tensor

    @classmethod
    def of(cls, sums: Tensor, *, intercept: bool) -> _Centred:
        size = sums.shape[0]
        outer, cross, count = sums[:, :size], sums[:, size:], sums[0, 0]
        if not intercept:
            zero = torch.zeros_like(outer[0, 1:]), torch.zeros_like(cross[0])
            return cls(*zero, outer[1:, 1:] / count, cross[1:] / count)
        mean, shift = outer[0, 1:] / count, cross[0] / count
        centred = stabilize(outer[1:, 1:] / count - torch.outer(mean, mean), mean, count)
        products = cross[1:] / count - torch.outer(mean, shift)
        products[centred.diagonal() == 0] = 0.0  # constant inputs act on the bias alone
        return cls(mean, shift, centred, products)


def linear_change(sums: Tensor, strength: float, *, intercept: bool) -> LinearChange:
    """The change of a linear layer that adds what is missing, pulled towards no change.

    Args:
        sums: ``[1 x]' [1 x]`` beside ``[1 x]' missing``, ``(1 + inputs, 1 + inputs + outputs)``.
        strength: Ridge, as a share of the mean variance of the inputs; infinite changes the bias
            alone.
        intercept: Whether the layer has a bias.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> y = torch.tensor([[1.0], [3.0], [5.0]], dtype=torch.float64)
        >>> found = linear_change(torch.cat([x.mT @ x, x.mT @ y], 1), 0.0, intercept=True)
        >>> [round(float(value), 6) for value in (found.weight, found.bias)]
        [2.0, 1.0]
    """
    found = _Centred.of(sums, intercept=intercept)
    outer, cross = found.outer, found.cross
    if math.isinf(strength):
        change = torch.zeros_like(cross)
    elif len(outer):
        noise = strength * mean_variance(outer) * torch.eye(len(outer)).to(outer)
        change = torch.cholesky_solve(cross, torch.linalg.cholesky(outer + noise))
    else:
        change = cross
    return LinearChange(change.mT, found.shift - change.mT @ found.mean)


def choose_strength(folds: Tensor, *, intercept: bool) -> float | None:
    """The strength whose changes reduce the error on left-out folds most; None if none does.

    The sums of a fold are subtracted from those of all, which gives the sums that the others were
    fitted to: one eigendecomposition a fold, in whose coordinates every strength is a division.
    What is fitted to all folds gets the same pull as what was fitted to all but one, on sums and
    not on means: so a smaller share.

    Args:
        folds: Sums of every fold as for :func:`linear_change`; folds without samples do not count.
        intercept: Whether the layer has a bias.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(4, 50, 3, generator=generator, dtype=torch.float64)
        >>> x[..., 0] = 1.0
        >>> def sums(y):
        ...     return torch.cat([x.mT @ x, x.mT @ y], -1)
        >>> choose_strength(sums(x[..., 1:2]), intercept=True) < 1e-4
        True
        >>> differs = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(4, 1, 1)  # by fold
        >>> choose_strength(sums(differs * x[..., 1:2]), intercept=True) is None
        True
    """
    used = folds[folds[:, 0, 0] > 0]
    if len(used) < 2:
        return None
    total = used.sum(0)
    scale = mean_variance(_Centred.of(total, intercept=intercept).outer)
    gains = [_gains(total - fold, fold, scale, intercept=intercept) for fold in used]
    errors = torch.stack(gains).sum(0)
    best = int(errors.argmin())
    if not errors[best] < 0:
        return None
    return _STRENGTHS[best] * (len(used) - 1) / len(used)


def _gains(fitted: Tensor, left_out: Tensor, scale: Tensor, *, intercept: bool) -> Tensor:
    """Change of the squared error on a fold by what the others ask for, for every strength."""
    size = fitted.shape[0]
    train = _Centred.of(fitted, intercept=intercept)
    values, vectors = torch.linalg.eigh(train.outer)
    outer, cross, count = left_out[:, :size], left_out[:, size:], left_out[0, 0]
    mean, shift, sums = train.mean, train.shift, outer[0, 1:]
    # Sums of the fold around the means of the others.
    mixed = torch.outer(sums, mean)
    square = outer[1:, 1:] - mixed - mixed.mT + count * torch.outer(mean, mean)
    product = cross[1:] - torch.outer(sums, shift) - torch.outer(mean, cross[0] - count * shift)
    asked, there = vectors.mT @ train.cross, vectors.mT @ product
    quadratic = (vectors.mT @ square @ vectors) * (asked @ asked.mT)
    linear = (asked * there).sum(1)
    moved = count * shift @ shift - 2 * shift @ cross[0]
    found = []
    for strength in _STRENGTHS:
        factor = (values.clamp_min(0) + strength * scale).reciprocal()
        factor = factor.nan_to_num(0.0, posinf=0.0)
        found.append(moved + factor @ quadratic @ factor - 2 * factor @ linear)
    return torch.stack(found)
