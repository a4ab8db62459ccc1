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
from lightning_mi_prune.importance.information import NOTHING, mean_variance

__all__ = ["FOLDS", "LinearChange", "choose_strengths", "is_exact", "linear_changes"]

FOLDS = 4
# Shares of the mean variance of the inputs: from almost nothing to almost no change of the weights,
# then to a change of the bias alone.
_STRENGTHS = (*(10 ** (step / 2) for step in range(-8, 7)), math.inf)
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
        if not intercept:
            zero = torch.zeros_like(outer[0, 1:]), torch.zeros_like(cross[0])
            return cls(*zero, outer[1:, 1:] / count, cross[1:] / count)
        mean, shift = outer[0, 1:] / count, cross[0] / count
        centred = stabilize(outer[1:, 1:] / count - torch.outer(mean, mean), mean, count)
        products = cross[1:] / count - torch.outer(mean, shift)
        products[centred.diagonal() == 0] = 0.0  # constant inputs act on the bias alone
        return cls(mean, shift, centred, products)


def linear_changes(
    outer: Tensor, crosses: Sequence[Tensor], *, intercept: bool
) -> list[LinearChange | None]:
    """The changes of linear layers with one input that reduce the error on left-out folds most.

    Args:
        outer: Sums ``[1 x]' [1 x]`` of every fold ``(folds, 1 + inputs, 1 + inputs)``.
        crosses: Sums ``[1 x]' missing`` of every layer ``(folds, 1 + inputs, outputs)``.
        intercept: Whether the layers have a bias.

    Returns:
        A change of each layer, or None where none is better than no change.
    """
    if not crosses:
        return []
    chosen = choose_strengths(outer, crosses, intercept=intercept)
    total, found = outer.sum(0), list[LinearChange | None]()
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
        noise = strength * mean_variance(found.outer) * torch.eye(len(found.outer)).to(outer)
        change = torch.cholesky_solve(found.cross, torch.linalg.cholesky(found.outer + noise))
    else:
        change = found.cross
    return LinearChange(change.mT, found.shift - change.mT @ found.mean)


def choose_strengths(
    outer: Tensor, crosses: Sequence[Tensor], *, intercept: bool
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
    used = outer[:, 0, 0] > 0
    count = int(used.sum())
    if count < 2:
        return [None for _ in crosses]
    outputs = [cross.shape[2] for cross in crosses]
    outer, cross = outer[used], torch.cat([*crosses], 2)[used]
    total = outer.sum(0), cross.sum(0)
    whole = _Centred.of(*total, intercept=intercept)
    units = total[0].new_ones(2)
    if whole.cross.numel():  # else the bias is all there is
        largest = whole.cross.abs().amax().clamp_min(NOTHING)
        units = torch.stack([mean_variance(whole.outer), largest])
    found = [
        _gains((total[0] - o, total[1] - c), (o, c), outputs, units, intercept=intercept)
        for o, c in zip(outer, cross, strict=True)
    ]
    chosen: list[float | None] = []
    for gains in torch.stack(found).sum(0).unbind():
        best = int(gains.sum(1).argmin())
        better = bool(gains[best].sum() < -_ROUNDING * gains[best].abs().sum())
        chosen.append(_STRENGTHS[best] * (count - 1) / count if better else None)
    return chosen


def _gains(
    fitted: tuple[Tensor, Tensor],
    left_out: tuple[Tensor, Tensor],
    outputs: Sequence[int],
    units: Tensor,
    *,
    intercept: bool,
) -> Tensor:
    """Change of the squared error on a fold by what the others ask for.

    Args:
        fitted: Sums of the others, ``[1 x]' [1 x]`` and ``[1 x]' missing``.
        left_out: Those of the fold.
        outputs: Outputs of each layer.
        units: Mean variance of the inputs, and the largest product with what is missing: numbers
            near 1 are what single precision needs.
        intercept: Whether the layers have a bias.

    Returns:
        What the changes themselves add, and what they take from the error, for each layer and
        strength ``(layers, strengths, 2)``.
    """
    train, (scale, unit) = _Centred.of(*fitted, intercept=intercept), units
    outer, cross = left_out
    count, mean, shift, sums = outer[0, 0], train.mean, train.shift, outer[0, 1:]
    # Sums of the fold around the means of the others.
    square, product = outer[1:, 1:].clone(), cross[1:].clone()
    if intercept:
        square.addr_(sums, mean, alpha=-1).addr_(mean, sums - count * mean, alpha=-1)
        product.addr_(sums, shift, alpha=-1).addr_(mean, cross[0] - count * shift, alpha=-1)
    kind = torch.float32 if is_exact(outer) else outer.dtype  # enough to compare strengths
    values, vectors = torch.linalg.eigh((train.outer / scale).to(kind))
    asked = vectors.mT @ (train.cross / unit).to(kind)
    there = vectors.mT @ (product / unit).to(kind)
    turned = vectors.mT @ (square / scale).to(kind) @ vectors
    strengths = torch.tensor(_STRENGTHS).to(values)
    factors = (values.clamp_min(0) + strengths[:, None]).reciprocal()
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
