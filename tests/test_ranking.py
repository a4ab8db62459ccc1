"""Orders of whole axes, what they lose, and which part of the layer above matters."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.criteria import (
    ActivationNorm,
    Magnitude,
    MutualInformation,
    Random,
    Taylor,
)
from lightning_mi_prune.elimination import eliminate_together
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.evidence import Evidence, gather
from lightning_mi_prune.families import find_axes, linear_axis
from lightning_mi_prune.gradients import GradientListener
from lightning_mi_prune.information import inverse
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.ranking import loss_curve, rank_axes
from lightning_mi_prune.relevance import Relevance, relevance_of, relevance_of_readers
from lightning_mi_prune.selection import select
from lightning_mi_prune.surgery import apply
from tests.models import batch, build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")


def covariance(d, seed=0):
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(d, 3 * d, generator=g, dtype=torch.float64)
    return root @ root.mT / (3 * d)


def evidence(d=6, m=3, entries=1, seed=0, samples=100_000):
    g = torch.Generator().manual_seed(seed + 1)
    readout = torch.randn(m, d, generator=g, dtype=torch.float64)
    zeros = torch.zeros(d, dtype=torch.float64)
    return Evidence("ffn", entries, samples, zeros, covariance(d, seed), readout)


def residual(site, kept):
    """Least-squares residual of the layer above given some units, straight from its definition."""
    place = [i * site.entries + e for i in kept for e in range(site.entries)]
    s, t = site.covariance, site.readout
    if not place:
        return float((t @ s @ t.mT).trace()) / 2
    cross, inner = (t @ s)[:, place], s[place][:, place]
    return float((t @ s @ t.mT - cross @ torch.linalg.solve(inner, cross.mT)).trace()) / 2


@pytest.mark.parametrize("entries", [1, 2])
@pytest.mark.parametrize("sites", [1, 3])
def test_the_loss_curve_is_the_brute_force_residual_at_every_step(entries, sites):
    found = [evidence(8, 3, entries, seed) for seed in range(sites)]
    order = torch.randperm(8 // entries, generator=torch.Generator().manual_seed(3)).tolist()
    curve = loss_curve(found, order)
    for step in range(1, len(order) + 1):
        wanted = sum(residual(site, sorted(order[step:])) for site in found)
        assert curve[step - 1] == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("sites", [1, 2])
def test_every_step_drops_what_costs_least_over_all_sites(sites):
    """Brute force: log-determinants of the joint information after each possible step."""
    found = [evidence(6, 3, 1, seed) for seed in range(sites)]
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

    result = eliminate_together(pairs, keep=0)
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
    return net, linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])


def listen(net, axes, inputs, **options):
    with Listener(net, axes, **options) as heard, torch.no_grad():
        net(**inputs) if isinstance(inputs, dict) else net(inputs)
    return heard


def test_relevance_keeps_what_the_loss_listens_to():
    """Two halves feed two outputs; the loss reads one of them, the louder one is ignored."""
    torch.manual_seed(0)
    net, axis = two_layers(8, 2)
    with torch.no_grad():
        net[2].weight[0, 4:], net[2].weight[1, :4] = 0.0, 0.0
        net[2].weight[1] *= 20
    x = torch.randn(3000, 6)
    heard = listen(net, [axis], x)
    with GradientListener(net, [axis]) as felt, felt.step(0):
        net(x)[:, 0].square().mean().backward()
    weights = dict(net.named_parameters())
    options = (heard.moments, weights, {"hidden": 4}, full_plan([axis]))
    blind = select([axis], *options)
    seeing = select([axis], *options, relevance=relevance_of(felt.sums))
    assert seeing.plan.kept["hidden"] == (0, 1, 2, 3)
    assert set(blind.plan.kept["hidden"]) & {4, 5, 6, 7}
    assert seeing.plan.rankings["hidden"].loss[3] == pytest.approx(0, abs=1e-9)


def test_loss_of_an_order_predicts_the_rise_of_a_quadratic_loss():
    """``J`` is exact where the loss is quadratic in the outputs and its gradient is noise."""
    torch.manual_seed(0)
    net, axis = two_layers(8, 3)
    x = torch.randn(20_000, 6)
    heard = listen(net, [axis], x, positions=20_000)
    scale = torch.tensor([1.0, 2.0, 0.5])
    # Of targets drawn around the outputs, the gradient has the Hessian as its second moment.
    with GradientListener(net, [axis], steps=1) as felt, felt.step(0):
        z = net(x)
        target = z.detach() + torch.randn_like(z) / scale.sqrt()
        ((z - target).square() * scale).sum(1).mean().div(2).backward()
    plan = full_plan([axis])
    chosen = select(
        [axis],
        heard.moments,
        dict(net.named_parameters()),
        {"hidden": 5},
        plan,
        relevance=relevance_of(felt.sums),
    )
    before = net(x).detach()
    apply(net, [axis], chosen.plan, folded=chosen.folded)
    rise = float((scale * (net(x).detach() - before).square()).sum(1).mean()) / 2
    assert chosen.plan.rankings["hidden"].lost(5)[0] == pytest.approx(rise, rel=0.05)


def test_without_gradients_the_kept_readers_above_say_what_matters():
    net, axis = build(), None
    axes = [a for a in find_axes(net) if a.kind in ("ffn", "heads")]
    axis = next(a for a in axes if a.kind == "heads")
    weights = dict(net.named_parameters())
    rows = {f"{r}.weight": torch.arange(3) for r in axis.above if "intermediate" in r}
    found = relevance_of_readers(axis, weights, rows)[axis.name].matrix
    wanted = torch.zeros_like(found)
    for reader in axis.above:
        w = weights[f"{reader}.weight"].detach().double()
        w = w[:3] if "intermediate" in reader else w
        wanted += w.mT @ w
    assert len(axis.above) > 4
    assert torch.allclose(found, wanted)
    heard = listen(net, axes, batch(64))
    widths = {a.name: a.size // 2 for a in axes}
    first = rank_axes(axes, heard.moments, weights, full_plan(axes), relevance="readers")
    second = rank_axes(
        axes, heard.moments, weights, full_plan(axes), relevance="readers", widths=widths
    )
    top = max(axes, key=lambda a: a.level).name
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
def test_every_criterion_ranks_every_kind_of_axis_to_its_last_unit(criterion):
    net = build()
    axes = [axis for axis in find_axes(net) if axis.kind != "dims"]  # no criterion's own
    assert {a.kind for a in axes} == {"ffn", "heads", "pooler", "residual"}
    inputs = batch(128)
    heard = listen(net, axes, inputs)
    with GradientListener(net, axes, taylor=True) as felt, felt.step(0):
        net(**inputs, labels=torch.randint(0, 3, (128,))).loss.backward()
    found = rank_axes(
        axes,
        heard.moments,
        dict(net.named_parameters()),
        full_plan(axes),
        criterion,
        relevance=relevance_of(felt.sums),
    )
    for axis in axes:
        ranking = found[axis.name]
        assert sorted(ranking.order) == list(range(axis.size))
        assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(ranking.loss))
        assert ranking.loss[-1] > 0
        assert ranking.kept(axis.size) == tuple(range(axis.size))


def test_taylor_is_the_first_order_change_of_each_example():
    net, axis = two_layers(4, 2)
    x = torch.randn(7, 3, 6)
    with GradientListener(net, [axis], taylor=True) as felt, felt.step(0):
        net(x).pow(3).sum((1, 2)).mean().backward()
    hidden = torch.tanh(net[0](x)).detach().requires_grad_()
    net[2](hidden).pow(3).sum().backward()
    change = (hidden * hidden.grad).sum(1).square().mean(0).sqrt()
    found = relevance_of(felt.sums)["hidden"].taylor
    assert torch.allclose(found, change.detach().double(), rtol=1e-4)
    with pytest.raises(PruningError, match="needs gradients at 'ffn'"):
        Taylor().rank([evidence()], 2)


def test_a_smaller_budget_needs_no_new_pass():
    net = build()
    axes = [a for a in find_axes(net) if a.kind in ("ffn", "heads")]
    heard = listen(net, axes, batch(256))
    weights, plan = dict(net.named_parameters()), full_plan(axes)
    half = {a.name: a.size // 2 for a in axes}
    rankings = rank_axes(axes, heard.moments, weights, plan)
    large = select(axes, heard.moments, weights, half, plan, rankings=rankings)
    for axis in axes:
        known = large.plan.rankings[axis.name]
        quarter = known.kept(axis.size // 4)
        assert set(quarter) < set(large.plan.kept[axis.name])
        direct = select(axes, heard.moments, weights, {**half, axis.name: len(quarter)}, plan)
        assert direct.plan.kept[axis.name] == quarter


def test_evidence_of_a_stream_has_one_site_wherever_it_is_read():
    net = build()
    axes = find_axes(net)
    stream = next(a for a in axes if a.kind == "residual")
    heard = listen(net, axes, batch(64))
    sites = gather(
        stream,
        heard.moments,
        dict(net.named_parameters()),
        full_plan(axes).kept,
        full_plan(axes),
        axes,
    )
    assert len(sites) == len(stream.sites) == 2 * 2 + 1
    assert all(len(site.mean) == stream.size for site in sites)
    whole = Relevance(torch.eye(stream.size, dtype=torch.float64), inside=True)
    seen = gather(
        stream,
        heard.moments,
        dict(net.named_parameters()),
        full_plan(axes).kept,
        full_plan(axes),
        axes,
        dict.fromkeys(stream.places, whole),
    )
    assert all(torch.allclose(s.above(), s.covariance) for s in seen)


def test_a_matrix_that_is_not_positive_is_named_before_an_order_comes_of_it():
    identity = torch.eye(3, dtype=torch.float64)
    broken = torch.tensor([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 9.0]]).double()
    with pytest.raises(PruningError, match=r"information of \d of 3 units .* larger ridge"):
        eliminate_together([(identity, broken)], keep=0)
