"""How strongly a least-squares change of weights is pulled towards no change at all.

Too weak a pull fits the noise of the sample, too strong a one leaves gains unused, and which is
which differs between models and between the layers of one. So the sample is divided into folds of
whole examples; the strength is taken whose changes, fitted to all folds but one, reduce the error
on the one left out most. None does: then the weights stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lightning_mi_prune.calibration.moments import stabilize
from lightning_mi_prune.core.spilling import spilled
from lightning_mi_prune.importance.information import NOTHING, mean_variance

__all__ = ["FOLDS", "LinearChange", "choose_strengths", "is_exact", "linear_changes"]

FOLDS = 4
# Shares of the mean variance of the inputs: from almost nothing to almost no change of the weights,
# then to a change of the bias alone.
_STRENGTHS = (*(10 ** (step / 2) for step in range(-8, 7)), math.inf)
# Weaker ones still, for sums in double precision; looked at where the weakest is best.
_FINE = (1e-8, 1e-6, 1e-5, _STRENGTHS[0])
# Share of what a change adds to the error and takes from it that may be rounding.
_ROUNDING = 1e-5


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
    def of(cls, outer: Tensor, cross: Tensor, *, intercept: bool) -> _Centred:
        count = outer[0, 0]
        centred, products = outer[1:, 1:] / count, cross[1:] / count
        if not intercept:
            return cls(
                torch.zeros_like(outer[0, 1:]), torch.zeros_like(cross[0]), centred, products
            )
        mean, shift = outer[0, 1:] / count, cross[0] / count
        centred = stabilize(centred.addr_(mean, mean, alpha=-1), mean, count)
        products.addr_(mean, shift, alpha=-1)
        products[centred.diagonal() == 0] = 0.0  # constant inputs act on the bias alone
        return cls(mean, shift, centred, products)


def linear_changes(
    outer: Tensor, crosses: Sequence[Tensor], *, intercept: bool, exact: bool = True
) -> list[LinearChange | None]:
    """The changes of linear layers with one input that reduce the error on left-out folds most.

    Args:
        outer: Sums ``[1 x]' [1 x]`` of every fold ``(folds, 1 + inputs, 1 + inputs)``.
        crosses: Sums ``[1 x]' missing`` of every layer ``(folds, 1 + inputs, outputs)``.
        intercept: Whether the layers have a bias.
        exact: Whether the products that were added up are of double precision.

    Returns:
        A change of each layer, or None where none is better than no change.
    """
    if not crosses:
        return []
    chosen = choose_strengths(outer, crosses, intercept=intercept, exact=exact)
    total, found = spilled(outer.sum(0)), list[LinearChange | None]()
    for cross, strength in zip(crosses, chosen, strict=True):
        known = total, cross.sum(0)
        change = None if strength is None else _solve(*known, strength, intercept=intercept)
        found.append(change)
    return found


def _solve(outer: Tensor, cross: Tensor, strength: float, *, intercept: bool) -> LinearChange:
    """The change of a linear layer that adds what is missing, pulled towards no change.

    Args:
        outer: ``[1 x]' [1 x]`` ``(1 + inputs, 1 + inputs)``.
        cross: ``[1 x]' missing`` ``(1 + inputs, outputs)``.
        strength: Ridge, as a share of the mean variance of the inputs; infinite changes the bias
            alone.
        intercept: Whether the layer has a bias.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> y = torch.tensor([[1.0], [3.0], [5.0]], dtype=torch.float64)
        >>> found = _solve(x.mT @ x, x.mT @ y, 0.0, intercept=True)
        >>> [round(float(value), 6) for value in (found.weight, found.bias)]
        [2.0, 1.0]
    """
    found = _Centred.of(outer, cross, intercept=intercept)
    if math.isinf(strength):
        change = torch.zeros_like(found.cross)
    elif len(found.outer):
        found.outer.diagonal().add_(strength * mean_variance(found.outer))
        torch.linalg.cholesky(found.outer, out=found.outer)
        change = torch.cholesky_solve(found.cross, found.outer)
    else:
        change = found.cross
    return LinearChange(change.mT, found.shift - change.mT @ found.mean)


def choose_strengths(
    outer: Tensor, crosses: Sequence[Tensor], *, intercept: bool, exact: bool = True
) -> list[float | None]:
    """The strengths whose changes reduce the error on left-out folds most; None if none does.

    The sums of a fold are subtracted from those of all, which gives the sums that the others were
    fitted to: one eigendecomposition a fold, in whose coordinates every strength is a division, for
    all layers that read the same input. What is fitted to all folds gets the same pull as what was
    fitted to all but one, on sums and not on means: so a smaller share.

    Args:
        outer: As for :func:`linear_changes`; folds without samples do not count.
        crosses: The same.
        intercept: The same.
        exact: The same.

    Returns:
        A strength for each layer.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(4, 50, 3, generator=generator, dtype=torch.float64)
        >>> x[..., 0] = 1.0
        >>> differs = torch.tensor([1.0, 1.0, -1.0, -1.0]).view(4, 1, 1)  # by fold
        >>> crosses = x.mT @ x[..., 1:2], x.mT @ (differs * x[..., 1:2])
        >>> first, second = choose_strengths(x.mT @ x, crosses, intercept=True)
        >>> first < 1e-4, second is None
        (True, True)
    """
    used = (outer[:, 0, 0] > 0).nonzero().flatten().tolist()
    if len(used) < 2:
        return [None for _ in crosses]
    outputs = [cross.shape[2] for cross in crosses]
    cross = crosses[0] if len(crosses) == 1 else torch.cat([*crosses], 2)
    total = spilled(outer.sum(0)), spilled(cross.sum(0))
    units = _units(_Centred.of(*total, intercept=intercept))

    def best(strengths: Sequence[float], kind: torch.dtype) -> list[float | None]:
        gains = [
            _gains(total, (outer[n], cross[n]), outputs, units, strengths, kind, intercept)
            for n in used
        ]
        return [_least(strengths, each) for each in torch.stack(gains).sum(0)]

    # Single precision is enough to compare strengths, but for the weakest ones.
    chosen = best(_STRENGTHS, torch.float32 if is_exact(outer) else outer.dtype)
    if exact and _STRENGTHS[0] in chosen:
        finer = best(_FINE, outer.dtype)
        pairs = zip(chosen, finer, strict=True)
        chosen = [fine if coarse == _STRENGTHS[0] else coarse for coarse, fine in pairs]
    share = (len(used) - 1) / len(used)
    return [None if strength is None else strength * share for strength in chosen]


def _least(strengths: Sequence[float], gains: Tensor) -> float | None:
    """The strength with the least error, of gains ``(strengths, 2)``; None if none reduces it."""
    best = int(gains.sum(1).argmin())
    better = bool(gains[best].sum() < -_ROUNDING * gains[best].abs().sum())
    return strengths[best] if better else None


def _units(whole: _Centred) -> tuple[Tensor, Tensor]:
    """Mean variance of the inputs, and the largest product with what is missing."""
    return mean_variance(whole.outer), whole.cross.abs().amax().clamp_min(NOTHING)


def _gains(
    total: tuple[Tensor, Tensor],
    left_out: tuple[Tensor, Tensor],
    outputs: Sequence[int],
    units: tuple[Tensor, Tensor],
    strengths: Sequence[float],
    kind: torch.dtype,
    intercept: bool,
) -> Tensor:
    """Change of the squared error on a fold by what the others ask for.

    Args:
        total: Sums of all folds, ``[1 x]' [1 x]`` and ``[1 x]' missing``.
        left_out: Those of the fold.
        outputs: Outputs of each layer.
        units: Mean variance of the inputs, and the largest product with what is missing: numbers
            near 1 are what single precision needs.
        strengths: What to compare.
        kind: Precision of the comparison.
        intercept: Whether the layers have a bias.

    Returns:
        What the changes themselves add, and what they take from the error, for each layer and
        strength ``(layers, strengths, 2)``.
    """
    (scale, unit), (outer, cross) = units, left_out
    train = _Centred.of(total[0] - outer, total[1] - cross, intercept=intercept)
    count, mean, shift, sums = outer[0, 0], train.mean, train.shift, outer[0, 1:]
    variance, products = train.outer.div_(scale).to(kind), train.cross.div_(unit).to(kind)
    del train  # the largest matrices that there are: as few at a time as can be
    values, vectors = torch.linalg.eigh(variance)
    del variance
    # Sums of the fold around the means of the others.
    square, product = outer[1:, 1:].clone(), cross[1:].clone()
    if intercept:
        square.addr_(sums, mean, alpha=-1).addr_(mean, sums - count * mean, alpha=-1)
        product.addr_(sums, shift, alpha=-1).addr_(mean, cross[0] - count * shift, alpha=-1)
    asked, there = vectors.mT @ products, vectors.mT @ (product / unit).to(kind)
    turned = vectors.mT @ square.div_(scale).to(kind) @ vectors
    del square
    pulls = torch.tensor(strengths).to(values)
    factors = (values.clamp_min(0) + pulls[:, None]).reciprocal()
    found = []
    for first, last in pairwise((0, *accumulate(outputs))):
        mine, error = asked[:, first:last], there[:, first:last]
        added = ((factors @ (turned * (mine @ mine.mT))) * factors).sum(1)
        taken = -2 * factors @ (mine * error).sum(1)
        bias, off = shift[first:last], cross[0, first:last]
        parts = torch.stack([added, taken], 1).to(outer) * (unit**2 / scale)
        found.append(parts + torch.stack([count * bias @ bias, -2 * bias @ off]))
    return torch.stack(found)


def is_exact(x: Tensor) -> bool:
    """Whether products in single precision are in single precision on the device of a tensor.

    Not on accelerators and where the user allows less: there they may keep three digits.
    """
    return x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
