"""CKA: 0 for independent layers, 1 for copies, whatever the batch."""

from __future__ import annotations

import pytest
import torch

from lightning_mi_prune.calibration.layers import LayerCKA, u_centered
from lightning_mi_prune.core.errors import PruningError
from tests.support.ranks import grouped, launch, place


def unbiased_cka(x, y):
    """Linear CKA of all samples at once, from the unbiased HSIC (Song et al. 2012, eq. 5)."""
    kx, ky = u_centered(x @ x.mT), u_centered(y @ y.mT)
    return (kx * ky).sum() / ((kx * kx).sum() * (ky * ky).sum()).sqrt()


def rotation(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("batch", [8, 20, 64, 256])
def test_cka_of_independent_layers_is_0_and_of_copies_1(batch):
    draw, wide = torch.Generator().manual_seed(batch), 768
    alignment, rotate = LayerCKA(3), rotation(wide, draw)
    for _ in range(max(20, 12_000 // batch)):
        x, other = (torch.randn(batch, wide, generator=draw, dtype=torch.float64) for _ in "xy")
        alignment.update([x, -3 * x @ rotate + 5, other])
    cka = alignment.compute()
    assert cka[0, 1] == pytest.approx(1)
    assert cka.diagonal().tolist() == pytest.approx([1, 1, 1])
    assert abs(cka[0, 2]) < 0.03
    assert torch.allclose(cka, cka.mT)


def related(samples, draw):
    x = torch.randn(samples, 24, generator=draw, dtype=torch.float64)
    noise = torch.randn(samples, 24, generator=draw, dtype=torch.float64)
    return x, x + 1.5 * noise


def test_one_batch_is_the_u_statistic():
    x, y = related(50, torch.Generator().manual_seed(0))
    alignment = LayerCKA(2)
    alignment.update([x, y])
    assert float(alignment.compute()[0, 1]) == pytest.approx(float(unbiased_cka(x, y)))


def test_minibatches_agree_with_the_full_batch_within_the_standard_error():
    draw, errors = torch.Generator().manual_seed(1), []
    for _ in range(12):
        x, y = related(1024, draw)
        alignment = LayerCKA(2)
        for part in torch.randperm(1024, generator=draw).split(32):
            alignment.update([x[part], y[part]])
        errors.append(float(alignment.compute()[0, 1] - unbiased_cka(x, y)))
    errors = torch.tensor(errors)
    assert abs(errors.mean()) < 3 * errors.std() / 12**0.5
    assert errors.abs().max() < 0.05


def test_a_short_last_batch_counts_by_its_pairs():
    draw = torch.Generator().manual_seed(2)
    x, y = related(68, draw)
    whole, cut = LayerCKA(2), LayerCKA(2)
    whole.update([x[:64], y[:64]])
    cut.update([x[:64], y[:64]])
    cut.update([x[64:67], y[64:67]])  # three samples are left out
    assert torch.equal(whole.compute(), cut.compute())
    cut.update([x[64:], y[64:]])
    assert cut.pairs == 64 * 61 + 4


def test_a_kernel_may_be_gaussian():
    draw = torch.Generator().manual_seed(3)
    rotate = rotation(24, draw)
    alignment = LayerCKA(3, kernel="rbf", bandwidth=0.8)
    for _ in range(32):
        x, other = (torch.randn(64, 24, generator=draw, dtype=torch.float64) for _ in "xy")
        alignment.update([x, 7 * x @ rotate, other])
    cka = alignment.compute()
    assert cka[0, 1] == pytest.approx(1)
    assert abs(cka[0, 2]) < 0.03


def test_cka_of_a_constant_layer_is_0():
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(4))
    for kernel in ("linear", "rbf"):
        alignment = LayerCKA(2, kernel=kernel)
        alignment.update([x, torch.ones(16, 3)])
        cka = alignment.compute()
        assert cka[0, 1] == cka[1, 0] == 0
        assert cka[0, 0] == pytest.approx(1)
        constant = LayerCKA(2, kernel=kernel)
        constant.update([torch.full((30, 3), 0.1), torch.zeros(30, 3)])
        assert (constant.compute() == 0).all()


def test_sums_are_ordinary_tensors_in_inference_mode_and_under_autocast():
    x = torch.randn(16, 4)
    alignment = LayerCKA(2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        alignment.update([x, x @ x.mT])
    alignment.update([x, x])
    assert alignment.products.dtype == torch.float64
    assert not alignment.products.is_inference()


def test_a_metric_of_its_own_runs_in_any_mode_and_is_never_rounded():
    x = torch.randn(16, 4)
    with torch.inference_mode():
        alignment = LayerCKA(2)
        alignment.update([x, x])
        alignment.compute()
        alignment.reset()
    alignment.update([x, x])
    alignment([x, x])
    assert alignment.pairs == 2 * 16 * 13
    holder = torch.nn.ModuleDict({"metric": alignment}).to(torch.bfloat16)
    assert holder["metric"].products.dtype == torch.float64
    assert alignment.pairs == 2 * 16 * 13


def cka_of(batches):
    alignment = LayerCKA(2)
    for seed in batches:
        alignment.update(related(32, torch.Generator().manual_seed(seed)))
    return alignment.compute().tolist()


def cka_on_a_rank(shares):
    return cka_of(shares[place()[0]])


def test_one_rank_is_two_ranks():
    alone = cka_of(range(6))
    found = launch(2, grouped, cka_on_a_rank, [[[0, 2, 3], [1, 4, 5]]])
    for (both,) in found.values():
        assert both == [pytest.approx(row) for row in alone]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": 0}, "layers=0"),
        ({"layers": True}, "layers=True"),
        ({"layers": 2, "kernel": "cubic"}, "kernel='cubic'"),
        ({"layers": 2, "bandwidth": 0}, "bandwidth=0"),
        ({"layers": 2, "bandwidth": float("nan")}, "bandwidth=nan"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(PruningError, match=named):
        LayerCKA(**options)


def test_what_cannot_be_compared_is_refused():
    alignment, x = LayerCKA(2), torch.randn(8, 4)
    with pytest.raises(PruningError, match="expected 2, one a layer"):
        alignment.update([x])
    with pytest.raises(PruningError, match=r"\[8, 7\] samples"):
        alignment.update([x, x[:7]])
    with pytest.raises(PruningError, match="larger validation batches"):
        alignment.compute()
    alignment.update([x, x * float("nan")])
    with pytest.raises(PruningError, match=r"layers \[1\] hold NaN"):
        alignment.compute()


@pytest.mark.parametrize("n", [8, 20, 64, 256])
def test_unbiased_cka_of_independent_data_is_about_zero(n):
    values = [
        unbiased_cka(*torch.randn(2, n, 768, dtype=torch.float64)).item()
        for _ in range(max(20, 12_000 // n))
    ]
    assert abs(sum(values) / len(values)) < 0.03


def test_unbiased_hsic_is_the_formula_and_knows_no_means():
    """Song et al. 2012, eq. 5, term by term; a shift of the data changes nothing."""
    n = 9
    x, y = torch.randn(n, 5, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    k, g = (v @ v.mT - torch.diag((v @ v.mT).diagonal()) for v in (x, y))
    terms = (k @ g).trace() + k.sum() * g.sum() / ((n - 1) * (n - 2))
    expected = terms - 2 / (n - 2) * (k @ g).sum()
    assert (u_centered(x @ x.mT) * u_centered(y @ y.mT)).sum().item() == pytest.approx(
        expected.item()
    )
    assert unbiased_cka(x + 5, y).item() == pytest.approx(unbiased_cka(x, y).item())


def test_unbiased_cka_of_a_rotated_scaled_copy_is_one():
    x = torch.randn(40, 16, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    assert unbiased_cka(x, 3 * x @ rotation).item() == pytest.approx(1, abs=1e-12)
