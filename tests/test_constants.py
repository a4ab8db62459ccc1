"""Layers whose units never change: they go first, at no loss, and what they added stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mi_prune import prune
from lightning_mi_prune.budget import Budget
from lightning_mi_prune.criteria import ActivationNorm, Magnitude, MutualInformation, Taylor
from lightning_mi_prune.elimination import eliminate
from lightning_mi_prune.information import NOTHING, inverse, mean_variance
from lightning_mi_prune.method import Method
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.refit import _norm_sums, _solve_norm
from tests.models import build, inputs_of, outputs
from tests.narrowed import lesson, loss

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")
F64 = torch.float64
HALF = Budget(sparsity=0.5)  # prune brings its own
LAYER = "bert.encoder.layer.0."
PARTS = {"heads": "attention.self.value", "ffn": "intermediate.dense"}


def constant(kind, size=1.0):
    """A model of which one layer says the same whatever it hears: only its bias is left."""
    model = build()
    with torch.no_grad():
        layer = model.get_submodule(LAYER + PARTS[kind])
        layer.weight.zero_()
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=torch.manual_seed(3)) * size)
    return model


@pytest.mark.parametrize("kind", sorted(PARTS))
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("refit", [False, True])
def test_what_never_changes_goes_at_no_loss(kind, size, refit):
    """All of it, also where no unit of the axis says anything."""
    model, inputs = constant(kind, size), inputs_of("sequence")
    before = outputs(model, inputs)
    method = Method(HALF, relevance="gradient", refit=refit)
    done = prune(
        model, lesson("bert"), 0.95, loss=loss, method=method, units=[kind], include=LAYER + kind
    )
    assert done.plan.width(LAYER + kind) < 4
    assert done.information[LAYER + kind].fraction == pytest.approx(1)
    assert torch.allclose(outputs(model, inputs), before, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(PARTS))
@pytest.mark.parametrize(
    ("judge", "relevance"),
    [
        (judge, relevance)
        for judge in (MutualInformation(), MutualInformation("topk"), ActivationNorm(), Magnitude())
        for relevance in ("gradient", "readers", None)
    ]
    + [(Taylor(), "gradient")],  # which reads gradients
)
@pytest.mark.parametrize("widths", ["global", "uniform"])
def test_every_way_to_judge_takes_constants(kind, judge, relevance, widths):
    model = constant(kind)
    method = Method(HALF, criterion=judge, relevance=relevance, widths=widths)
    done = prune(model, lesson("bert"), 0.4, loss=loss, method=method)
    assert done.sparsity >= 0.4
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", sorted(PARTS))
@pytest.mark.parametrize("units", [["residual"], ["dims"], ["ffn", "heads", "dims", "residual"]])
def test_other_axes_of_the_layer_may_be_cut_too(kind, units):
    model = constant(kind)
    relevance = "gradient" if "dims" in units and "residual" not in units else "readers"
    units = [unit for unit in units if relevance == "gradient" or unit != "dims"]
    done = prune(
        model, lesson("bert"), 0.3, loss=loss, method=Method(HALF, relevance=relevance), units=units
    )
    assert done.sparsity >= 0.3
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("mean", [1e-6, 1.0, 1e6])
def test_rounding_of_a_large_mean_is_no_variance(mean):
    """A third cannot be written down: its square and the mean square differ by rounding."""
    x = torch.randn(1_000, 3, generator=torch.manual_seed(0), dtype=F64)
    x[:, 0] = mean / 3
    moments = Moments(3)
    for part in x.split(77):
        moments.update(part)
    _, covariance = moments.statistics()
    assert torch.equal(covariance[0], torch.zeros(3, dtype=F64))
    assert torch.equal(covariance[:, 0], torch.zeros(3, dtype=F64))
    assert torch.allclose(covariance[1:, 1:], x[:, 1:].mT.cov(correction=0), atol=1e-12)


def test_a_small_change_about_a_large_mean_is_heard():
    """What single precision can tell from none counts, a hundred of its steps and less."""
    x = 1.0 + 1e-5 * torch.randn(1_000, 1, generator=torch.manual_seed(0))
    moments = Moments(1)
    moments.update(x)
    assert moments.statistics()[1].item() == pytest.approx(1e-10, rel=0.1)


def test_nothing_can_be_inverted_and_counted():
    zero = torch.zeros(4, 4, dtype=F64)
    precision = inverse(zero)
    assert torch.isfinite(precision).all()
    posterior = precision + torch.ones(4, 4, dtype=F64) / NOTHING
    for entries in (1, 2):
        costs = eliminate(precision, posterior, keep=0, entries=entries).costs
        assert 0 <= sum(costs) < 1e-4
    assert mean_variance(zero) == NOTHING
    assert mean_variance(torch.eye(2, dtype=F64)) == 1


@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30])
def test_elimination_does_not_see_the_scale(entries, scale):
    """Rounding grows with the numbers: what is left of a forgotten unit must not break the rest."""
    a = torch.randn(160, 400, generator=torch.manual_seed(0), dtype=F64)
    precision = torch.linalg.inv(a @ a.mT / 400)
    b = torch.randn(5, 160, generator=torch.manual_seed(1), dtype=F64)
    posterior = precision + b.mT @ b
    plain = eliminate(precision, posterior, keep=0, entries=entries)
    other = eliminate(precision / scale, posterior / scale, keep=0, entries=entries)
    assert other.order == plain.order
    assert other.costs == pytest.approx(plain.costs, rel=1e-6, abs=1e-9)


def test_a_norm_that_never_changes_keeps_its_gains():
    norm = nn.LayerNorm(3)
    plain = torch.full((50, 3), 1 / 3)
    found = _solve_norm(norm, _norm_sums(plain, plain * 2 + 1))
    assert torch.equal(found["weight"], torch.ones(3))
    assert torch.allclose(found["bias"], torch.full((3,), 4 / 3), atol=1e-6)
