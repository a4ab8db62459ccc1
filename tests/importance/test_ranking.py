"""Orders of whole groups, what they lose, and which part of the layer above matters."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.gradients import (
    GradientRecorder,
    Relevance,
    relevance_of,
    relevance_of_weights,
)
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.importance.criteria import (
    ActivationNorm,
    Magnitude,
    MutualInformation,
    Random,
    Taylor,
)
from lightning_mi_prune.importance.elimination import eliminate
from lightning_mi_prune.importance.information import inverse
from lightning_mi_prune.importance.ranking import loss_curve, rank_groups
from lightning_mi_prune.importance.statistics import UnitStatistics, unit_statistics
from lightning_mi_prune.reconstruction.compensation import select_units
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import batch, build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def covariance(d, seed=0):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(d, 3 * d, generator=g, dtype=torch.float64)
    return root @ root.mT / (3 * d)


def statistics(d=6, m=3, entries=1, seed=0, samples=100_000):
    g = torch.Generator().manual_seed(seed + 1)
    readout = torch.randn(m, d, generator=g, dtype=torch.float64)
    zeros = torch.zeros(d, dtype=torch.float64)
    return UnitStatistics("ffn", entries, samples, zeros, covariance(d, seed), readout)


def residual(each, kept):
    """Least-squares residual of the layer above given some units, straight from its definition."""
    place = [i * each.entries + e for i in kept for e in range(each.entries)]
    s, t = each.covariance, each.readout
    if not place:
        return float((t @ s @ t.mT).trace()) / 2
    cross, inner = (t @ s)[:, place], s[place][:, place]
    return float((t @ s @ t.mT - cross @ torch.linalg.solve(inner, cross.mT)).trace()) / 2


@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("inputs_count", [1, 3])
def test_the_loss_curve_is_the_brute_force_residual_at_every_step(entries, inputs_count):
    found = [statistics(8, 3, entries, seed) for seed in range(inputs_count)]
    order = torch.randperm(8 // entries, generator=torch.Generator().manual_seed(3)).tolist()
    curve = loss_curve(found, order)
    for step in range(1, len(order) + 1):
        wanted = sum(residual(each, sorted(order[step:])) for each in found)
        assert curve[step - 1] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("inputs_count", [1, 2])
def test_every_step_removes_the_unit_that_costs_least_over_all_inputs(inputs_count):
    """Brute force: log-determinants of the joint information after each possible step."""
    found = [statistics(6, 3, 1, seed) for seed in range(inputs_count)]
    noise = 0.3
    pairs = [((p := inverse(e.covariance)), p + e.readout.mT @ e.readout / noise) for e in found]

    def information(kept):
        total = 0.0
        for e in found:
            s, t = e.covariance[kept][:, kept], e.readout
            above = t @ e.covariance @ t.mT + noise * torch.eye(len(t), dtype=torch.float64)
            cross = (t @ e.covariance)[:, kept]
            given = above - cross @ torch.linalg.solve(s, cross.mT)
            total += float(torch.logdet(above) - torch.logdet(given)) / 2
        return total

    result = eliminate(pairs, keep=0)
    left = list(range(6))
    for unit, cost in zip(result.order, result.costs, strict=True):
        options = {
            u: information([v for v in left if v != u]) if len(left) > 1 else 0.0 for u in left
        }
        assert options[unit] == pytest.approx(max(options.values()), abs=1e-5)
        assert cost == pytest.approx(information(left) - options[unit], abs=1e-4)
        left.remove(unit)
    assert sorted(result.order) == list(range(6))


def two_layers(d=8, m=3):
    net = nn.Sequential(nn.Linear(6, d), nn.Tanh(), nn.Linear(d, m))
    return net, linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])


def collect(net, groups, inputs, **options):
    with ActivationRecorder(net, groups, **options) as recorder, torch.no_grad():
        net(**inputs) if isinstance(inputs, dict) else net(inputs)
    return recorder


def test_relevance_keeps_what_the_loss_depends_on():
    """Two halves feed two outputs; the loss reads one of them, the larger one is ignored."""
    torch.manual_seed(0)
    net, group = two_layers(8, 2)
    with torch.no_grad():
        net[2].weight[0, 4:], net[2].weight[1, :4] = 0.0, 0.0
        net[2].weight[1] *= 20
    x = torch.randn(3000, 6)
    recorder = collect(net, [group], x)
    with GradientRecorder(net, [group]) as gradients, gradients.step(0):
        net(x)[:, 0].square().mean().backward()
    weights = dict(net.named_parameters())
    options = (recorder.moments, weights, {"hidden": 4}, full_plan([group]))
    plain = select_units([group], *options)
    weighted = select_units([group], *options, relevance=relevance_of(gradients.sums))
    assert weighted.plan.kept["hidden"] == (0, 1, 2, 3)
    assert set(plain.plan.kept["hidden"]) & {4, 5, 6, 7}
    assert weighted.plan.rankings["hidden"].loss[3] == pytest.approx(0, abs=1e-9)


def test_loss_of_an_order_predicts_the_rise_of_a_quadratic_loss():
    """``J`` is exact where the loss is quadratic in the outputs and its gradient is noise."""
    torch.manual_seed(0)
    net, group = two_layers(8, 3)
    x = torch.randn(20_000, 6)
    recorder = collect(net, [group], x, positions=20_000)
    scale = torch.tensor([1.0, 2.0, 0.5])
    # Of targets drawn around the outputs, the gradient has the Hessian as its second moment.
    with GradientRecorder(net, [group], steps=1) as gradients, gradients.step(0):
        z = net(x)
        target = z.detach() + torch.randn_like(z) / scale.sqrt()
        ((z - target).square() * scale).sum(1).mean().div(2).backward()
    plan = full_plan([group])
    chosen = select_units(
        [group],
        recorder.moments,
        dict(net.named_parameters()),
        {"hidden": 5},
        plan,
        relevance=relevance_of(gradients.sums),
    )
    before = net(x).detach()
    apply_plan(net, [group], chosen.plan, compensated=chosen.compensated)
    rise = float((scale * (net(x).detach() - before).square()).sum(1).mean()) / 2
    assert chosen.plan.rankings["hidden"].lost(5)[0] == pytest.approx(rise, rel=0.05)


def test_without_gradients_the_kept_weights_above_give_the_relevance():
    net, group = build(), None
    groups = [a for a in groups_of(net) if a.kind in ("ffn", "heads")]
    group = next(a for a in groups if a.kind == "heads")
    weights = dict(net.named_parameters())
    rows = {(f"{r}.weight", 0): torch.arange(3) for r in group.above if "intermediate" in r}
    found = relevance_of_weights(group, weights, rows)[group.name].matrix
    wanted = torch.zeros_like(found)
    for consumer in group.above:
        w = weights[f"{consumer}.weight"].detach().double()
        w = w[:3] if "intermediate" in consumer else w
        wanted += w.mT @ w
    assert len(group.above) > 4
    assert torch.allclose(found, wanted)
    recorder = collect(net, groups, batch(64))
    widths = {a.name: a.size // 2 for a in groups}
    first = rank_groups(groups, recorder.moments, weights, full_plan(groups), relevance="weights")
    second = rank_groups(
        groups, recorder.moments, weights, full_plan(groups), relevance="weights", widths=widths
    )
    top = max(groups, key=lambda a: a.level).name
    assert first[top] == second[top]  # nothing is cut above the top
    assert first != second


@pytest.mark.parametrize(
    "criterion",
    [
        MutualInformation(),
        MutualInformation("topk"),
        Magnitude(),
        ActivationNorm(),
        Random(),
        Taylor(),
    ],
    ids=lambda c: f"{type(c).__name__}-{getattr(c, 'selection', '')}",
)
def test_every_criterion_ranks_every_kind_of_group_to_its_last_unit(criterion):
    net = build()
    groups = [group for group in groups_of(net) if group.kind != "head_dim"]  # no criterion's own
    assert {a.kind for a in groups} == {"ffn", "heads", "pooler", "hidden"}
    inputs = batch(128)
    recorder = collect(net, groups, inputs)
    with GradientRecorder(net, groups, taylor=True) as gradients, gradients.step(0):
        net(**inputs, labels=torch.randint(0, 3, (128,))).loss.backward()
    found = rank_groups(
        groups,
        recorder.moments,
        dict(net.named_parameters()),
        full_plan(groups),
        criterion,
        relevance=relevance_of(gradients.sums),
    )
    for group in groups:
        ranking = found[group.name]
        assert sorted(ranking.order) == list(range(group.size))
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(ranking.loss))
        assert ranking.loss[-1] > 0
        assert ranking.kept(group.size) == tuple(range(group.size))


def test_taylor_is_the_first_order_change_of_each_example():
    net, group = two_layers(4, 2)
    x = torch.randn(7, 3, 6)
    with GradientRecorder(net, [group], taylor=True) as gradients, gradients.step(0):
        net(x).pow(3).sum((1, 2)).mean().backward()
    hidden = torch.tanh(net[0](x)).detach().requires_grad_()
    net[2](hidden).pow(3).sum().backward()
    change = (hidden * hidden.grad).sum(1).square().mean(0).sqrt()
    found = relevance_of(gradients.sums)["hidden"].taylor
    assert torch.allclose(found, change.detach().double(), rtol=1e-4)
    with pytest.raises(PruningError, match="needs gradients at 'ffn'"):
        Taylor().rank([statistics()], 2)


def test_a_smaller_budget_needs_no_new_pass():
    net = build()
    groups = [a for a in groups_of(net) if a.kind in ("ffn", "heads")]
    recorder = collect(net, groups, batch(256))
    weights, plan = dict(net.named_parameters()), full_plan(groups)
    half = {a.name: a.size // 2 for a in groups}
    rankings = rank_groups(groups, recorder.moments, weights, plan)
    large = select_units(groups, recorder.moments, weights, half, plan, rankings=rankings)
    for group in groups:
        known = large.plan.rankings[group.name]
        quarter = known.kept(group.size // 4)
        assert set(quarter) < set(large.plan.kept[group.name])
        direct = select_units(
            groups, recorder.moments, weights, {**half, group.name: len(quarter)}, plan
        )
        assert direct.plan.kept[group.name] == quarter


def test_the_hidden_size_has_statistics_of_each_input():
    net = build()
    groups = groups_of(net)
    hidden = next(a for a in groups if a.kind == "hidden")
    recorder = collect(net, groups, batch(64))
    found = unit_statistics(
        hidden,
        recorder.moments,
        dict(net.named_parameters()),
        full_plan(groups).kept,
        full_plan(groups),
        groups,
    )
    assert len(found) == len(hidden.consumers_by_input) == 2 * 2 + 1
    assert all(len(each.mean) == hidden.size for each in found)
    whole = Relevance(torch.eye(hidden.size, dtype=torch.float64), over_units=True)
    seen = unit_statistics(
        hidden,
        recorder.moments,
        dict(net.named_parameters()),
        full_plan(groups).kept,
        full_plan(groups),
        groups,
        dict.fromkeys(hidden.inputs, whole),
    )
    assert all(torch.allclose(s.above(), s.covariance) for s in seen)


def test_a_matrix_that_is_not_positive_is_named_before_an_order_comes_of_it():
    identity = torch.eye(3, dtype=torch.float64)
    broken = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 9.0]]).double()
    with pytest.raises(PruningError, match=r"information of \d of 3 units .* larger ridge"):
        eliminate([(identity, broken)], keep=0)
