"""How strongly a least-squares change of weights is pulled towards no change at all.

Too weak a pull fits the noise of the sample, too strong a one leaves gains unused, and which is
which differs between models and between the layers of one. So the sample is divided into folds of
whole examples; the strength is taken whose changes, fitted to all folds but one, reduce the error
on the one left out most. None does: then the weights stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
class _Inputs:
    """Mean squares of inputs around their means.

    Args:
        count: Samples.
        mean: Means of the inputs ``(inputs,)``; zero without an intercept.
        outer: ``(inputs, inputs)``.
        constant: Inputs that do not vary ``(inputs,)``, which act on the bias alone.
        intercept: Whether there is a bias.
    """

    count: Tensor
    mean: Tensor
    outer: Tensor
    constant: Tensor
    intercept: bool

    @classmethod
    def of(cls, sums: Tensor, *, intercept: bool) -> _Inputs:
        """From sums ``[1 x]' [1 x]``."""
        count, outer = sums[0, 0], sums[1:, 1:] / sums[0, 0]
        if not intercept:
            mean = torch.zeros_like(sums[0, 1:])
            return cls(count, mean, outer, torch.zeros_like(mean, dtype=torch.bool), intercept)
        mean = sums[0, 1:] / count
        outer = stabilize(outer.addr_(mean, mean, alpha=-1), mean, count)
        return cls(count, mean, outer, outer.diagonal() == 0, intercept)

    def products(self, cross: Tensor) -> tuple[Tensor, Tensor]:
        """Means of what is missing ``(outputs,)``, and products with it ``(inputs, outputs)``."""
        products = cross[1:] / self.count
        if not self.intercept:
            return torch.zeros_like(cross[0]), products
        shift = cross[0] / self.count
        products.addr_(self.mean, shift, alpha=-1)
        products[self.constant] = 0.0
        return shift, products


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
    inputs = _Inputs.of(outer, intercept=intercept)
    shift, change = inputs.products(cross)
    if math.isinf(strength):
        change = torch.zeros_like(change)
    elif len(inputs.outer):
        factor = inputs.outer
        factor.diagonal().add_(strength * mean_variance(factor))
        torch.linalg.cholesky(factor, out=factor)
        change = torch.cholesky_solve(change, factor)
    return LinearChange(change.mT, shift - change.mT @ inputs.mean)


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
    total = spilled(outer.sum(0)), [spilled(cross.sum(0)) for cross in crosses]
    inputs = _Inputs.of(total[0], intercept=intercept).outer
    scale = mean_variance(inputs) if len(inputs) else torch.ones_like(total[0][0, 0])
    del inputs

    def best(strengths: Sequence[float], kind: torch.dtype) -> list[float | None]:
        gains = [
            _gains(
                total,
                (outer[n], [cross[n] for cross in crosses]),
                scale,
                strengths,
                kind,
                intercept,
            )
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


def _gains(
    total: tuple[Tensor, Sequence[Tensor]],
    left_out: tuple[Tensor, Sequence[Tensor]],
    scale: Tensor,
    strengths: Sequence[float],
    kind: torch.dtype,
    intercept: bool,
) -> Tensor:
    """Change of the squared error on a fold by what the others ask for.

    As few of the largest matrices are alive at a time as can be.

    Args:
        total: Sums of all folds: ``[1 x]' [1 x]``, and ``[1 x]' missing`` of every layer.
        left_out: Those of the fold.
        scale: Mean variance of the inputs.
        strengths: What to compare.
        kind: Precision of the comparison.
        intercept: Whether the layers have a bias.

    Returns:
        What the changes themselves add, and what they take from the error, for each layer and
        strength ``(layers, strengths, 2)``.
    """
    outer, crosses = left_out
    train = _Inputs.of(total[0] - outer, intercept=intercept)
    count, mean, sums = outer[0, 0], train.mean, outer[0, 1:]
    variance = train.outer.div_(scale).to(kind)
    train = replace(train, outer=torch.empty(0))
    values, vectors = torch.linalg.eigh(variance)
    del variance
    # Sums of the fold around the means of the others.
    square = outer[1:, 1:].clone()
    if intercept:
        square.addr_(sums, mean, alpha=-1).addr_(mean, sums - count * mean, alpha=-1)
    turned = vectors.mT @ square.div_(scale).to(kind) @ vectors
    del square
    pulls = torch.tensor(strengths).to(values)
    factors = (values.clamp_min(0) + pulls[:, None]).reciprocal()
    found = []
    for whole, cross in zip(total[1], crosses, strict=True):
        shift, products = train.products(whole - cross)
        # Single precision needs numbers near 1; without inputs the bias is all there is.
        unit = products.abs().amax().clamp_min(NOTHING) if products.numel() else scale
        asked = vectors.mT @ products.div_(unit).to(kind)
        product = cross[1:].clone()
        if intercept:
            product.addr_(sums, shift, alpha=-1).addr_(mean, cross[0] - count * shift, alpha=-1)
        there = vectors.mT @ product.div_(unit).to(kind)
        added = ((factors @ (turned * (asked @ asked.mT))) * factors).sum(1)
        taken = -2 * factors @ (asked * there).sum(1)
        parts = torch.stack([added, taken], 1).to(outer) * (unit**2 / scale)
        found.append(parts + torch.stack([count * shift @ shift, -2 * shift @ cross[0]]))
    return torch.stack(found)


def is_exact(x: Tensor) -> bool:
    """Whether products in single precision are in single precision on the device of a tensor.

    Not on accelerators and where the user allows less: there they may keep three digits.
    """
    return x.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
