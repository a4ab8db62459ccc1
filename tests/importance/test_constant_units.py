"""Units that are constant, or nearly: they are removed first, and their bias stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mi_prune import prune
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.options import Importance, Reconstruction
from lightning_mi_prune.importance.elimination import eliminate
from lightning_mi_prune.importance.information import NOTHING, inverse, mean_variance
from lightning_mi_prune.reconstruction.least_squares import _norm_sums, _solve_norm
from tests.support.covering import half
from tests.support.head_dims import lesson, loss
from tests.support.models import build, inputs_of, outputs

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
F64 = torch.float64
HALF = Budget(sparsity=0.5)  # prune brings its own
LAYER = "bert.encoder.layer.0."
PARTS = {"heads": "attention.self.value", "ffn": "intermediate.dense"}


def constant(kind, size=1.0):
    """A model in which the outputs of one layer are constant: only its bias is not zero."""
    model = build()
    with torch.no_grad():
        layer = model.get_submodule(LAYER + PARTS[kind])
        layer.weight.zero_()
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=torch.manual_seed(3)) * size)
    return model


@pytest.mark.parametrize("kind", sorted(PARTS))
@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_constant_units_are_removed_without_loss(kind, size, reconstruct):
    """Also where all units of the group are constant."""
    model, inputs = constant(kind, size), inputs_of("sequence")
    before = outputs(model, inputs)
    method = {
        "importance": Importance(relevance="gradient"),
        "reconstruction": Reconstruction("layerwise" if reconstruct else "compensation"),
    }
    done = prune(
        model, lesson("bert"), 0.95, loss=loss, **method, kinds=[kind], include=LAYER + kind
    )
    assert done.plan.width(LAYER + kind) < 4
    assert done.information[LAYER + kind].fraction == pytest.approx(1)
    assert torch.allclose(outputs(model, inputs), before, atol=1e-5)


SCORES = [
    (criterion, relevance)
    for criterion in (
        {},
        {"selection": "topk"},
        {"criterion": "activation_norm"},
        {"criterion": "magnitude"},
    )
    for relevance in ("gradient", "weights", None)
] + [({"criterion": "taylor"}, "gradient")]  # which reads gradients


@pytest.mark.parametrize(
    ("kind", "score", "widths"), half(sorted(PARTS), SCORES, ["global", "uniform"])
)
def test_every_criterion_accepts_constant_units(kind, score, widths):
    criterion, relevance = score
    model = constant(kind)
    method = {"importance": Importance(**criterion, relevance=relevance), "widths": widths}
    done = prune(model, lesson("bert"), 0.4, loss=loss, **method)
    assert done.sparsity >= 0.4
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("kind", sorted(PARTS))
@pytest.mark.parametrize(
    ("units", "relevance"),
    [
        (["hidden"], "weights"),
        (["ffn", "heads", "hidden"], "weights"),
        (["head_dim"], "gradient"),
        (["ffn", "heads", "head_dim"], "gradient"),
    ],
)
def test_other_groups_of_the_layer_may_be_cut_too(kind, units, relevance):
    model = constant(kind)
    done = prune(
        model,
        lesson("bert"),
        0.3,
        loss=loss,
        importance=Importance(relevance=relevance),
        kinds=units,
    )
    assert done.sparsity >= 0.3
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("kind", "size", "copies", "double"),
    half(sorted(PARTS), [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7], [False, True], [False, True]),
)
def test_nearly_constant_units_cause_no_error(kind, size, copies, double):
    """There is no scale between signal and rounding at which a cut breaks the layer."""
    model = build().double() if double else build()
    layer = model.get_submodule(LAYER + PARTS[kind])
    with torch.no_grad():
        layer.weight.mul_(size)
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=torch.manual_seed(3)))
        if copies:
            layer.weight[1::2] = layer.weight[::2]
            layer.bias[1::2] = layer.bias[::2]
    inputs = inputs_of("sequence")
    before = outputs(model, inputs)
    method = {"importance": Importance(relevance="gradient")}
    prune(model, lesson("bert"), 0.4, loss=loss, **method, kinds=[kind], include=LAYER + kind)
    assert torch.allclose(outputs(model, inputs), before, atol=50 * size)


def test_nats_do_not_depend_on_the_scale_of_the_loss():
    """A constant layer has no information, however steep the loss is."""
    lost = []
    for scale in (1.0, 1e6):
        done = prune(
            constant("ffn"),
            lesson("bert"),
            0.3,
            loss=lambda model, inputs, scale=scale: scale * loss(model, inputs),
            importance=Importance(relevance="gradient"),
            kinds=["ffn"],
        )
        lost.append([done.plan.rankings[f"bert.encoder.layer.{i}.ffn"].nats[-1] for i in (0, 1)])
        assert lost[-1][0] == 0 < lost[-1][1]
    assert lost[0][1] == pytest.approx(lost[1][1], rel=1e-6)


@pytest.mark.parametrize("mean", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("count", [1_000, 200_000])
def test_rounding_of_a_large_mean_is_no_variance(mean, count):
    """A third cannot be written down: its square and the mean square differ by rounding."""
    x = torch.randn(count, 3, generator=torch.manual_seed(0), dtype=F64)
    x[:, 0] = mean / 3
    moments = Moments(3)
    for part in x.split(count // 13):
        moments.update(part)
    _, covariance = moments.stabilized()
    assert torch.equal(covariance[0], torch.zeros(3, dtype=F64))
    assert torch.equal(covariance[:, 0], torch.zeros(3, dtype=F64))
    assert torch.allclose(covariance[1:, 1:], x[:, 1:].mT.cov(correction=0), atol=1e-9)


def test_a_small_variance_about_a_large_mean_counts():
    """Variance that single precision can represent counts, a hundred of its steps and less."""
    x = 1.0 + 1e-5 * torch.randn(1_000, 1, generator=torch.manual_seed(0))
    moments = Moments(1)
    moments.update(x)
    assert moments.stabilized()[1].item() == pytest.approx(1e-10, rel=0.1)


def test_a_zero_covariance_can_be_inverted():
    zero = torch.zeros(4, 4, dtype=F64)
    precision = inverse(zero)
    assert torch.isfinite(precision).all()
    posterior = precision + 1e6 * torch.ones(4, 4, dtype=F64)
    for entries in (1, 2):
        assert eliminate([(precision, posterior)], keep=0, entries=entries).costs == (0.0,) * (
            4 // entries
        )
    assert mean_variance(zero) == NOTHING
    assert mean_variance(torch.eye(2, dtype=F64)) == 1


@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30])
def test_elimination_does_not_depend_on_the_scale(entries, scale):
    """Rounding grows with the numbers: the rest of a removed unit must not change the others."""
    size = 300 * entries  # flushed once before removed units are dropped
    a = torch.randn(size, 2 * size, generator=torch.manual_seed(0), dtype=F64)
    precision = torch.linalg.inv(a @ a.mT / size)
    b = torch.randn(5, size, generator=torch.manual_seed(1), dtype=F64)
    posterior = precision + b.mT @ b
    plain = eliminate([(precision, posterior)], keep=0, entries=entries)
    other = eliminate([(precision / scale, posterior / scale)], keep=0, entries=entries)
    assert other.order == plain.order
    assert other.costs == pytest.approx(plain.costs, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("changing", [False, True])
def test_entries_of_a_norm_that_never_change_keep_their_gains(changing):
    """Also beside one that hardly changes: what is rounding depends on the entry's own mean."""
    norm = nn.LayerNorm(3)
    plain = torch.full((50_000, 3), 1 / 3)
    plain[:, 1] = 1_000 / 3
    if changing:
        plain[:, 0] = 1e-3 * torch.randn(50_000, generator=torch.manual_seed(0))
    found = _solve_norm(norm, _norm_sums(plain, plain * 2 + 1))
    gains = torch.tensor([2.0 if changing else 1.0, 1.0, 1.0])
    assert torch.allclose(found["weight"], gains, atol=1e-3)
    middle = plain.double().mean(0)
    assert torch.allclose(found["bias"], (2 * middle + 1 - gains * middle).float(), rtol=1e-4)
