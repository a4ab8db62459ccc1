"""Moments: exact sums whose ranks add up."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mi_prune.calibration.moments import Moments


def test_sums_over_batches_are_the_moments_of_all():
    x = torch.randn(300, 7, dtype=torch.float64) * 5 + 3
    moments = Moments(7)
    for part in x.split([1, 99, 200]):
        moments.update(part.float())
    mean, covariance = moments.compute()
    x = x.float().double()
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(covariance, x.T.cov(correction=0), atol=1e-10)


@pytest.mark.parametrize("dimension", [1, 383, 384, 385, 900])
def test_only_one_triangle_is_summed_and_nothing_is_lost(dimension):
    """Sums of whole numbers are exact in whatever order; what a checkpoint holds goes on."""
    x = torch.randint(-9, 10, (64, dimension))
    moments = Moments(dimension)
    moments.update(x[:40].float())
    again = Moments(dimension).unpack(moments.packed())
    for each in (moments, again):
        each.update(x[40:].float())
        each.count += 64  # 128 samples: what follows is exact as well
        mean, covariance = each.statistics()
        outer = (x.T @ x).double() / 128
        assert torch.equal(mean, x.sum(0) / 128.0)
        assert torch.equal(covariance, outer - torch.outer(mean, mean))
    rows, columns = torch.triu_indices(dimension, dimension)
    assert torch.equal(again.packed()[1 + dimension :], (x.T @ x)[rows, columns].double())


def test_one_triangle_is_as_accurate_as_the_whole_product():
    x = torch.randn(2000, 500, dtype=torch.float64) * 3 + 1
    moments = Moments(500)
    for part in x.split(300):
        moments.update(part)
    left, right = torch.randint(500, (2, 200)).tolist()
    exact = [math.fsum((x[:, i] * x[:, j]).tolist()) for i, j in zip(left, right, strict=True)]
    mean, covariance = moments.statistics()
    found = (covariance + torch.outer(mean, mean))[left, right] * 2000
    bound = 20 * torch.finfo(torch.float64).eps * (x.abs().T @ x.abs())[left, right]
    assert ((found - torch.tensor(exact, dtype=torch.float64)).abs() <= bound).all()
    assert torch.equal(covariance, covariance.mT)


def test_two_ranks_add_up_and_reset_starts_again():
    x = torch.randn(50, 4)
    whole, left, right = Moments(4), Moments(4), Moments(4)
    whole.update(x)
    left.update(x[:20])
    right.update(x[20:])
    for state, how in left._reductions.items():
        summed = how(torch.stack([getattr(left, state), getattr(right, state)]))
        assert torch.allclose(summed, getattr(whole, state))
    whole.reset()
    assert int(whole.count) == 0
    assert not whole.outer.any()
    whole.update(x)
    assert torch.allclose(whole.outer, left.outer + right.outer)


def test_memory_is_one_matrix_a_group():
    moments = Moments(64)
    for _ in range(3):
        moments.update(torch.ones(5, 64))
    held = [*vars(moments).values(), *moments._defaults.values()]
    size = sum(t.untyped_storage().nbytes() for t in held if isinstance(t, torch.Tensor))
    assert size < 8 * 64 * (64 + 4)
