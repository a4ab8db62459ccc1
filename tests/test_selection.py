from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mi_prune.axes import Count, Slice, WidthAxis, full_plan
from lightning_mi_prune.criteria import (
    ActivationNorm,
    Magnitude,
    MutualInformation,
    Random,
)
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.evidence import Evidence
from lightning_mi_prune.families import find_axes, linear_axis
from lightning_mi_prune.information import joint_information
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.selection import select
from lightning_mi_prune.surgery import apply
from tests.models import CONFIGS, HEADS, batch, build, duplicate, make_constant, outputs

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")


def hear(model, axes, rows=400):
    with Listener(model, axes) as heard, torch.no_grad():
        model(**batch(rows))
    return heard.moments


def choose(model, axes, widths, criterion=None, **options):
    weights = dict(model.named_parameters(remove_duplicate=False))
    return select(axes, hear(model, axes), weights, widths, full_plan(axes), criterion, **options)


def two_layers(d=8, m=3, *, bias=True):
    net = nn.Sequential(nn.Linear(6, d), nn.Tanh(), nn.Linear(d, m, bias=bias))
    return net, linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])


def listen_to(net, axis, n=2000):
    x = torch.randn(n, 6)
    with Listener(net, [axis], positions=n) as heard, torch.no_grad():
        net(x)
    return x, heard.moments


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("selection", ["conditional", "topk"])
def test_exact_duplicates_and_constants_can_go_without_a_trace(family, head, selection):
    """Neurons in pairs and two constant ones, heads in pairs: half of it is free."""
    model = build(family, head)
    axes = [a for a in find_axes(model) if a.kind in ("ffn", "heads")]
    for axis in axes:
        if axis.kind == "ffn":
            make_constant(model, axis, 0)
        for unit in range(0, axis.size, 2):
            duplicate(model, axis, unit, unit + 1)
    before = outputs(model, batch(16, seed=5))
    widths = {a.name: a.size // 2 for a in axes}
    if selection == "topk":  # keeps copies by nature; take the constants only
        widths = {a.name: a.size - 2 if a.kind == "ffn" else a.size for a in axes}
    chosen = choose(model, axes, widths, MutualInformation(selection, 0.1))
    apply(model, axes, chosen.plan, folded=chosen.folded)
    assert all(chosen.information[a.name].fraction > 0.999 for a in axes)
    # A copy is told by its twin through noise of a millionth of its variance (JITTER), layer after
    # layer; the one layer of ALBERT runs again and again.
    rounding = 1e-4 if family == "albert" else 2e-5
    assert torch.allclose(outputs(model, batch(16, seed=5)), before, atol=rounding)


def test_conditional_keeps_one_of_each_pair_where_topk_keeps_both():
    net, axis = two_layers(8, 3)
    with torch.no_grad():
        net[0].weight[4:] = net[0].weight[:4]
        net[0].bias[4:] = net[0].bias[:4]
        net[2].weight[:, 4:] = net[2].weight[:, :4]
    _, moments = listen_to(net, axis)
    weights = dict(net.named_parameters())

    def pairs(criterion):
        chosen = select([axis], moments, weights, {"hidden": 4}, full_plan([axis]), criterion)
        return len({unit % 4 for unit in chosen.plan.kept["hidden"]})

    assert pairs(MutualInformation("conditional", 0.1)) == 4
    with pytest.warns(PruningWarning, match="top-k kept copies"):
        assert pairs(MutualInformation("topk", 0.1)) == 2


def test_information_kept_is_total_less_the_costs():
    net, axis = two_layers(8, 3)
    _, moments = listen_to(net, axis, n=200_000)
    weights = dict(net.named_parameters())
    chosen = select(
        [axis],
        moments,
        weights,
        {"hidden": 5},
        full_plan([axis]),
        ridge=0.1,
        criterion=MutualInformation("conditional", 0.1),
    )
    mean, sxx = moments["hidden"].compute()
    readout = net[2].weight.detach().double()
    evidence = Evidence("hidden", 1, 200_000, mean, sxx, readout)
    order = MutualInformation("conditional", 0.1).rank([evidence], 5)
    syy = evidence.above() + evidence.noise(0.1) * torch.eye(3, dtype=torch.float64)
    total = joint_information(sxx, sxx @ readout.T, syy).item()
    info = chosen.information["hidden"]
    assert info.total == pytest.approx(total, rel=1e-6)
    assert info.total - info.kept == pytest.approx(sum(order.costs[:3]), rel=1e-3)


def test_fold_in_is_the_least_squares_solution():
    net, axis = two_layers(8, 3)
    x, moments = listen_to(net, axis, n=200_000)
    weights = {k: v.detach().clone() for k, v in net.named_parameters()}
    chosen = select([axis], moments, weights, {"hidden": 4}, full_plan([axis]))
    kept = list(chosen.plan.kept["hidden"])
    with torch.no_grad():
        h, z = net[1](net[0](x)).double(), net(x).double()
        design = torch.cat([h[:, kept], torch.ones(len(x), 1)], 1)
        best = torch.linalg.lstsq(design, z).solution
    assert torch.allclose(chosen.folded["2.weight"].double(), best[:-1].T, atol=1e-4)
    assert torch.allclose(chosen.folded["2.bias"].double(), best[-1], atol=1e-4)


def test_fold_in_without_a_bias_fits_raw_moments():
    net, axis = two_layers(8, 3, bias=False)
    x, moments = listen_to(net, axis, n=200_000)
    chosen = select([axis], moments, dict(net.named_parameters()), {"hidden": 4}, full_plan([axis]))
    kept = list(chosen.plan.kept["hidden"])
    with torch.no_grad():
        h, z = net[1](net[0](x)).double(), net(x).double()
        best = torch.linalg.lstsq(h[:, kept], z).solution
    assert set(chosen.folded) == {"2.weight"}
    assert torch.allclose(chosen.folded["2.weight"].double(), best.T, atol=1e-4)


def test_fold_in_can_be_left_out():
    net, axis = two_layers()
    _, moments = listen_to(net, axis)
    chosen = select(
        [axis],
        moments,
        dict(net.named_parameters()),
        {"hidden": 4},
        full_plan([axis]),
        fold_in=False,
    )
    assert chosen.folded == {}


def test_the_sweep_judges_against_what_was_kept_above():
    """Units that feed only dropped units above are worth nothing."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    low = linear_axis(net, "low", kind="ffn", producers=["0"], readers=["1"], level=0)
    high = linear_axis(net, "high", kind="ffn", producers=["1"], readers=["2"], level=1)
    with torch.no_grad():
        net[0].weight.copy_(torch.cat([torch.eye(4), torch.eye(4)[:2]]) + 0.1 * torch.randn(6, 4))
        net[1].weight.zero_()
        net[1].weight[:2, :3] = torch.randn(2, 3)  # above 0, 1 read below 0..2
        net[1].weight[2:, 3:] = 9 * torch.randn(2, 3)  # above 2, 3 read below 3..5
        net[2].weight[:, 2:] = 0  # nobody reads above 2, 3
    with Listener(net, [low, high]) as heard, torch.no_grad():
        net(torch.randn(3000, 4))
    weights = dict(net.named_parameters())
    widths = {"low": 3, "high": 2}
    chosen = select(
        [low, high], heard.moments, weights, widths, full_plan([low, high]), fold_in=False
    )
    assert chosen.plan.kept["high"] == (0, 1)
    alone = select(
        [low], {"low": heard.moments["low"]}, weights, widths, full_plan([low]), fold_in=False
    )
    lost = Evidence(
        "low", 1, 3000, *heard.moments["low"].compute(), net[1].weight[:2].detach().double()
    )
    order = MutualInformation().rank([lost], 3)
    assert chosen.plan.kept["low"] == order.keep(3, 6)
    assert chosen.plan.kept["low"] != alone.plan.kept["low"]


def test_a_second_cut_speaks_in_original_positions():
    net, axis = two_layers(8, 3)
    x, moments = listen_to(net, axis)
    first = select([axis], moments, dict(net.named_parameters()), {"hidden": 6}, full_plan([axis]))
    apply(net, [axis], first.plan, folded=first.folded)
    with Listener(net, [axis]) as heard, torch.no_grad():
        net(x)
    second = select([axis], heard.moments, dict(net.named_parameters()), {"hidden": 3}, first.plan)
    assert set(second.plan.kept["hidden"]) < set(first.plan.kept["hidden"])
    apply(net, [axis], second.plan, current=first.plan, folded=second.folded)
    assert net[2].in_features == 3


@pytest.mark.parametrize(
    "criterion", [Magnitude(), ActivationNorm(), Random(), MutualInformation()]
)
def test_every_criterion_orders_every_kind_of_unit(criterion):
    model = build()
    axes = [axis for axis in find_axes(model) if axis.kind != "dims"]  # no unit by itself
    widths = {a.name: a.size // 2 for a in axes}
    chosen = choose(model, axes, widths, criterion)
    assert {n: chosen.plan.width(n) for n in widths} == widths
    assert choose(model, axes, widths, criterion).plan == chosen.plan


def test_magnitude_and_activation_norm_know_what_matters():
    net, axis = two_layers()
    with torch.no_grad():
        net[0].weight[2] *= 0.01
        net[2].weight[:, 2] *= 0.01
    _, moments = listen_to(net, axis)
    for criterion in (Magnitude(), ActivationNorm()):
        chosen = select(
            [axis],
            moments,
            dict(net.named_parameters()),
            {"hidden": 7},
            full_plan([axis]),
            criterion,
        )
        assert 2 not in chosen.plan.kept["hidden"]


def evidence(samples=1000, m=3, d=8, name="hidden"):
    torch.manual_seed(1)
    a = torch.randn(d, 2 * d, dtype=torch.float64)
    return Evidence(
        name,
        1,
        samples,
        torch.zeros(d, dtype=torch.float64),
        a @ a.T,
        torch.randn(m, d, dtype=torch.float64),
    )


def test_too_few_samples_are_refused_and_few_are_warned_about():
    with pytest.raises(
        PruningError, match=r"Only 4 samples at 'hidden'.*3 units above needs more than 4"
    ):
        MutualInformation().rank([evidence(samples=4)], 4)
    net, axis = two_layers()
    _, moments = listen_to(net, axis, n=30)
    with pytest.warns(PruningWarning, match="fewer than 20 samples"):
        select([axis], moments, dict(net.named_parameters()), {"hidden": 4}, full_plan([axis]))


@pytest.mark.parametrize("m", [8, 20])
def test_a_layer_above_that_determines_every_unit_is_no_ranking(m):
    with pytest.raises(PruningError, match="ridge=0 gives no ranking"):
        MutualInformation("topk", 0.0).rank([evidence(m=m)], 4)
    MutualInformation("topk", 0.01).rank([evidence(m=m)], 4)


def test_equal_scores_are_warned_about():
    same = evidence(m=8)
    same = Evidence(
        "hidden",
        1,
        1000,
        same.mean,
        torch.eye(8, dtype=torch.float64),
        torch.eye(8, dtype=torch.float64),
    )
    with pytest.warns(PruningWarning, match="no ranking"):
        MutualInformation("topk", 0.01).rank([same], 4)


def test_bias_does_not_move_a_ranking():
    few, many = evidence(samples=50), evidence(samples=10**9)
    criterion = MutualInformation("topk", 0.01)
    assert criterion.rank([few], 4).order == criterion.rank([many], 4).order
    assert (criterion.scores(few) < criterion.scores(many)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "greedy"}, "selection='greedy'"),
        ({"ridge": -1.0, "selection": "topk"}, "ridge=-1.0"),
        ({"ridge": 0.0}, "above 0"),
        ({"ridge": float("nan")}, "ridge=nan"),
    ],
)
def test_criterion_options(options, message):
    with pytest.raises(PruningError, match=message):
        MutualInformation(**options)


def test_nothing_heard_is_refused():
    net, axis = two_layers()
    with Listener(net, [axis]) as heard:
        pass
    with pytest.raises(PruningError, match="Nothing was heard"):
        select(
            [axis],
            heard.moments,
            dict(net.named_parameters()),
            {"hidden": 4},
            Plan.full({"hidden": 8}),
        )


@pytest.mark.parametrize("n", [180, 200, 260, 400])
def test_with_few_samples_fold_in_does_not_fit_noise(n):
    """Independent units: the kept ones know nothing of the dropped ones, whatever n suggests."""
    d, m, keep = 256, 8, 192
    net = nn.Sequential(nn.Identity(), nn.Linear(d, m)).double()
    axis = WidthAxis(
        "x", "ffn", d, 1, (Slice("1.weight", 1, (m, d)),), ("1",), (Count("1", "in_features"),)
    )
    x, fresh = torch.randn(n, d, dtype=torch.float64), torch.randn(4000, d, dtype=torch.float64)
    with Listener(net, [axis]) as heard, torch.no_grad():
        net(x)
    with torch.no_grad():
        target = net(fresh)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.warns(PruningWarning, match="or 2 for each entry"):
        chosen = select([axis], heard.moments, weights, {"x": keep}, full_plan([axis]))
    kept = list(chosen.plan.kept["x"])
    with torch.no_grad():
        folded = fresh[:, kept] @ chosen.folded["1.weight"].mT + chosen.folded["1.bias"]
        plain = fresh[:, kept] @ weights["1.weight"][:, kept].mT + weights["1.bias"]
    error, without = ((z - target).square().mean() for z in (folded, plain))
    assert error < 1.1 * without
    assert chosen.information["x"].fraction < 0.95


def test_an_axis_of_one_entry_and_an_axis_that_stays_are_no_trouble():
    net = nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))
    one = linear_axis(net, "one", kind="ffn", producers=["0"], readers=["2"])
    many = linear_axis(net, "many", kind="ffn", producers=["2"], readers=["4"], level=1)
    with Listener(net, [one, many]) as heard, torch.no_grad():
        net(torch.randn(9, 4))
    weights = dict(net.named_parameters())
    chosen = select(
        [one, many], heard.moments, weights, {"one": 1, "many": 4}, full_plan([one, many])
    )
    assert chosen.plan.width("many") == 4
    assert chosen.information["one"].fraction == pytest.approx(1)


def test_heads_are_scored_whatever_their_scale():
    torch.manual_seed(0)
    a = torch.randn(12, 40, dtype=torch.float64)
    cov, readout = a @ a.mT / 40, torch.randn(6, 12, dtype=torch.float64)
    scale = torch.ones(12, dtype=torch.float64)
    scale[3:6] = 1e-6
    first = Evidence("h", 3, 10_000, torch.zeros(12), cov, readout)
    other = Evidence("h", 3, 10_000, torch.zeros(12), cov * scale[:, None] * scale, readout / scale)
    criterion = MutualInformation("topk", 0.01)
    assert torch.allclose(criterion.scores(first), criterion.scores(other), rtol=1e-4)
