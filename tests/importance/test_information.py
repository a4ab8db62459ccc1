"""Oracles with known answers (nats)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.feature_selection import mutual_info_regression

from lightning_mi_prune.importance.information import (
    inverse,
    joint_information,
    plugin_bias,
    regression,
    shrink,
    times_lower,
    unit_information,
)

F64 = torch.float64


def moments(x, y):
    x, y = x - x.mean(0), y - y.mean(0)
    n = len(x)
    return x.mT @ x / n, x.mT @ y / n, y.mT @ y / n


def gaussian(d, m, *, seed=0):
    """Exact covariances of a random joint Gaussian (d, m)."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d + m, d + m + 5, generator=g, dtype=F64)
    s = a @ a.mT / (d + m)
    return s[:d, :d], s[:d, d:], s[d:, d:]


@pytest.mark.parametrize(
    ("rho", "nats"),
    [(0.1, 0.005025), (0.5, 0.143841), (0.8, 0.510826), (0.9, 0.830366), (0.99, 1.958518)],
)
def test_a_correlated_pair_has_its_textbook_information(rho, nats):
    one = torch.ones(1, 1, dtype=F64)
    assert unit_information(one, rho * one, one).item() == pytest.approx(nats, abs=1e-6)
    assert joint_information(one, rho * one, one).item() == pytest.approx(nats, abs=1e-6)


def test_set_information_equals_the_log_determinant_form():
    sxx, sxy, syy = gaussian(7, 5)
    scores = unit_information(sxx, sxy, syy)
    for i in range(7):
        joint = torch.cat(
            [
                torch.cat([sxx[i, i].view(1, 1), sxy[i : i + 1]], 1),
                torch.cat([sxy[i : i + 1].mT, syy], 1),
            ]
        )
        expected = (sxx[i, i].log() + torch.logdet(syy) - torch.logdet(joint)) / 2
        assert scores[i] == pytest.approx(expected.item(), abs=1e-12)


def test_group_information_equals_joint_information_of_the_group():
    sxx, sxy, syy = gaussian(6, 4)
    groups = unit_information(sxx, sxy, syy, entries=3)
    for k, rows in enumerate((slice(0, 3), slice(3, 6))):
        expected = joint_information(sxx[rows, rows], sxy[rows], syy)
        assert groups[k] == pytest.approx(expected.item(), rel=1e-4)


def test_uniform_noise_pair_against_its_exact_value_and_an_independent_estimator():
    """X ~ U(0,1), Y = X + U(0,a): I = a/2 - ln a; Gaussian MI -1/2 ln(a^2/(1+a^2)) is below it."""
    a, n = 0.5, 4000
    x = torch.rand(n, 1, dtype=F64)
    y = x + a * torch.rand(n, 1, dtype=F64)
    exact = a / 2 - math.log(a)
    assert exact == pytest.approx(0.943147, abs=1e-6)
    ksg = mutual_info_regression(x.numpy(), y.numpy().ravel(), random_state=0)[0]
    ours = joint_information(*moments(x, y)).item()
    assert ksg == pytest.approx(exact, abs=0.06)
    assert ours == pytest.approx(-0.5 * math.log(a * a / (1 + a * a)), abs=0.03)
    assert ours < exact


@pytest.mark.parametrize("rho", [0.3, 0.8])
def test_gaussian_pairs_agree_with_scikit_learn(rho):
    x = torch.randn(4000, 1, dtype=F64)
    y = rho * x + math.sqrt(1 - rho**2) * torch.randn(4000, 1, dtype=F64)
    ksg = mutual_info_regression(x.numpy(), y.numpy().ravel(), random_state=0)[0]
    assert joint_information(*moments(x, y)).item() == pytest.approx(ksg, abs=0.06)


def test_information_is_invariant_under_affine_maps_of_the_layer_above():
    sxx, sxy, syy = gaussian(5, 4)
    a = torch.randn(4, 4, dtype=F64)
    before = unit_information(sxx, sxy, syy)
    after = unit_information(sxx, sxy @ a.mT, a @ syy @ a.mT)
    assert torch.allclose(before, after, atol=1e-9)


@pytest.mark.parametrize("entries", [1, 3])
def test_bias_is_what_permuted_samples_score_on_average(entries):
    n, m, d = 120, 8, 3
    x, y = torch.randn(n, d, dtype=F64), torch.randn(n, m, dtype=F64)
    scores = [
        unit_information(*moments(x[torch.randperm(n)], y), entries=entries).mean().item()
        for _ in range(800)
    ]
    assert np.mean(scores) == pytest.approx(plugin_bias(n, m, entries), rel=0.04)


def test_bias_with_a_ridge_follows_the_effective_dimension():
    n, m = 400, 12
    y = torch.randn(n, m, dtype=F64) * torch.logspace(-1, 1, m, dtype=F64)
    scores, effective = [], 0.0
    for _ in range(400):
        sxx, sxy, syy = moments(torch.randn(n, 4, dtype=F64), y)
        noisy = syy + 0.5 * syy.diagonal().mean() * torch.eye(m, dtype=F64)
        effective = torch.linalg.solve(noisy, syy).trace().item()
        scores.append(unit_information(sxx, sxy, noisy).mean().item())
    assert np.mean(scores) == pytest.approx(plugin_bias(n, effective), rel=0.08)


@pytest.mark.parametrize("d", [5, 192, 500])
def test_zeros_of_a_triangular_matrix_are_left_out(d):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, d, generator=generator, dtype=torch.float64)
    lower = torch.randn(d, d, generator=generator, dtype=torch.float64).tril()
    torch.testing.assert_close(times_lower(matrix, lower), matrix @ lower)


def test_inverse_survives_dead_and_duplicated_entries():
    x = torch.randn(100, 4, dtype=F64)
    x[:, 1], x[:, 2] = x[:, 0], 0.0
    cov = x.mT @ x / 100
    assert torch.isfinite(inverse(cov)).all()


def test_shrinkage_fades_with_samples_and_rescues_few():
    x = torch.randn(20, 30, dtype=F64)
    few = x.mT @ x / 20
    assert torch.linalg.eigvalsh(shrink(few, 20)).min() > 0.1
    assert torch.equal(shrink(few, 20).diagonal(), few.diagonal())
    scale = torch.logspace(-6, 6, 30, dtype=F64)
    scaled = shrink(few * scale[:, None] * scale, 20)
    assert torch.allclose(scaled, shrink(few, 20) * scale[:, None] * scale)
    a = torch.randn(30, 30, dtype=F64)
    true = a @ a.mT / 30
    x = torch.randn(20, 30, dtype=F64) @ torch.linalg.cholesky(true).mT
    plugin = x.mT @ x / 20
    assert (shrink(plugin, 20) - true).norm() < (plugin - true).norm()
    assert torch.allclose(shrink(true, 10**9), true, atol=1e-6)


@pytest.mark.parametrize("n", [40, 100, 200])
def test_regression_on_noise_gives_nearly_nothing(n):
    """Independent entries: with few samples plain least squares would only fit noise."""
    x = torch.randn(n, 120, dtype=F64)
    cov = x.mT @ x / n
    kept, dropped = torch.arange(90), torch.arange(90, 120)
    found = regression(cov, kept, dropped, n)
    fresh = torch.randn(2000, 120, dtype=F64)
    error = (fresh[:, dropped] - fresh[:, kept] @ found.mT).square().mean()
    assert error < 1.2
    if n > 91:
        plain = torch.linalg.solve(cov[kept][:, kept], cov[kept][:, dropped]).mT
        assert error < (fresh[:, dropped] - fresh[:, kept] @ plain.mT).square().mean()


def test_regression_recovers_a_linear_dependence():
    x = torch.randn(500, 3, dtype=F64)
    x = torch.cat([x, x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=F64)], 1)
    cov = x.mT @ x / 500
    found = regression(cov, torch.tensor([0, 1, 2]), torch.tensor([3]), 500)
    assert torch.allclose(found, torch.tensor([[1.0, -2.0, 0.5]], dtype=F64), atol=1e-9)
