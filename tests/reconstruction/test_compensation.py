from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    PrunableDim,
    SizeAttribute,
    full_plan,
)
from lightning_mi_prune.importance.criteria import (
    ActivationNorm,
    Magnitude,
    MutualInformation,
    Random,
)
from lightning_mi_prune.importance.information import joint_information
from lightning_mi_prune.importance.ranking import rank_groups
from lightning_mi_prune.importance.statistics import UnitStatistics
from lightning_mi_prune.reconstruction.compensation import select_units
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, HEADS, batch, build, duplicate, make_constant, outputs

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def moments_of(model, groups, rows=400):
    with ActivationRecorder(model, groups) as recorder, torch.no_grad():
        model(**batch(rows))
    return recorder.moments


def choose(model, groups, widths, criterion=None, **options):
    weights = dict(model.named_parameters(remove_duplicate=False))
    return select_units(
        groups, moments_of(model, groups), weights, widths, full_plan(groups), criterion, **options
    )


def two_layers(d=8, m=3, *, bias=True):
    net = nn.Sequential(nn.Linear(6, d), nn.Tanh(), nn.Linear(d, m, bias=bias))
    return net, linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])


def record(net, group, n=2000):
    x = torch.randn(n, 6)
    with ActivationRecorder(net, [group], positions=n) as recorder, torch.no_grad():
        net(x)
    return x, recorder.moments


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("selection", ["conditional", "topk"])
def test_removing_duplicates_and_constants_keeps_the_outputs(family, head, selection):
    """Neurons in pairs and two constant ones, heads in pairs: half of it is free."""
    model = build(family, head)
    groups = [a for a in groups_of(model) if a.kind in ("ffn", "heads")]
    for group in groups:
        if group.kind == "ffn":
            make_constant(model, group, 0)
        for unit in range(0, group.size, 2):
            duplicate(model, group, unit, unit + 1)
    before = outputs(model, batch(16, seed=5))
    widths = {a.name: a.size // 2 for a in groups}
    if selection == "topk":  # keeps copies by nature; take the constants only
        widths = {a.name: a.size - 2 if a.kind == "ffn" else a.size for a in groups}
    chosen = choose(model, groups, widths, MutualInformation(selection, 0.1))
    apply_plan(model, groups, chosen.plan, compensated=chosen.compensated)
    assert all(chosen.information[a.name].fraction > 0.999 for a in groups)
    # Regression on the copy has a ridge of a millionth of its variance (JITTER) in every layer, and
    # the one layer of ALBERT runs many times.
    rounding = 1e-4 if family == "albert" else 2e-5
    assert torch.allclose(outputs(model, batch(16, seed=5)), before, atol=rounding)


def test_conditional_keeps_one_of_each_pair_where_topk_keeps_both():
    net, group = two_layers(8, 3)
    with torch.no_grad():
        net[0].weight[4:] = net[0].weight[:4]
        net[0].bias[4:] = net[0].bias[:4]
        net[2].weight[:, 4:] = net[2].weight[:, :4]
    _, moments = record(net, group)
    weights = dict(net.named_parameters())

    def pairs(criterion):
        chosen = select_units(
            [group], moments, weights, {"hidden": 4}, full_plan([group]), criterion
        )
        return len({unit % 4 for unit in chosen.plan.kept["hidden"]})

    assert pairs(MutualInformation("conditional", 0.1)) == 4
    with pytest.warns(PruningWarning, match="top-k kept copies"):
        assert pairs(MutualInformation("topk", 0.1)) == 2


def test_information_kept_is_total_less_the_costs():
    net, group = two_layers(8, 3)
    _, moments = record(net, group, n=200_000)
    weights = dict(net.named_parameters())
    chosen = select_units(
        [group],
        moments,
        weights,
        {"hidden": 5},
        full_plan([group]),
        ridge=0.1,
        criterion=MutualInformation("conditional", 0.1),
    )
    mean, sxx = moments["hidden"].compute()
    readout = net[2].weight.detach().double()
    statistics = UnitStatistics("hidden", 1, 200_000, mean, sxx, readout)
    order = MutualInformation("conditional", 0.1).rank([statistics], 5)
    syy = statistics.above() + statistics.noise(0.1) * torch.eye(3, dtype=torch.float64)
    total = joint_information(sxx, sxx @ readout.T, syy).item()
    info = chosen.information["hidden"]
    assert info.total == pytest.approx(total, rel=1e-6)
    assert info.total - info.kept == pytest.approx(sum(order.costs[:3]), rel=1e-3)


def test_compensation_is_the_least_squares_solution():
    net, group = two_layers(8, 3)
    x, moments = record(net, group, n=200_000)
    weights = {k: v.detach().clone() for k, v in net.named_parameters()}
    chosen = select_units([group], moments, weights, {"hidden": 4}, full_plan([group]))
    kept = list(chosen.plan.kept["hidden"])
    with torch.no_grad():
        h, z = net[1](net[0](x)).double(), net(x).double()
        design = torch.cat([h[:, kept], torch.ones(len(x), 1)], 1)
        best = torch.linalg.lstsq(design, z).solution
    assert torch.allclose(chosen.compensated["2.weight"].double(), best[:-1].T, atol=1e-4)
    assert torch.allclose(chosen.compensated["2.bias"].double(), best[-1], atol=1e-4)


def test_compensation_without_a_bias_fits_raw_moments():
    net, group = two_layers(8, 3, bias=False)
    x, moments = record(net, group, n=200_000)
    chosen = select_units(
        [group], moments, dict(net.named_parameters()), {"hidden": 4}, full_plan([group])
    )
    kept = list(chosen.plan.kept["hidden"])
    with torch.no_grad():
        h, z = net[1](net[0](x)).double(), net(x).double()
        best = torch.linalg.lstsq(h[:, kept], z).solution
    assert set(chosen.compensated) == {"2.weight"}
    assert torch.allclose(chosen.compensated["2.weight"].double(), best.T, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compensate", [True, False])
def test_the_mean_of_a_unit_counts_unless_a_bias_makes_up_for_it(bias, compensate):
    net, group = two_layers(4, 3, bias=bias)
    with torch.no_grad():
        net[0].weight[0], net[0].bias[0] = 0, 1.0  # unit 0 is constant, and the others small
        net[0].weight[1:] *= 0.1
    _, moments = record(net, group)
    weights, plan = dict(net.named_parameters()), full_plan([group])
    chosen = select_units([group], moments, weights, {"hidden": 2}, plan, compensate=compensate)
    assert (0 in chosen.plan.kept["hidden"]) == (not (bias and compensate))


def ranked_with_means(*, bias, compensate):
    """The ranking of units with means, their samples, and the weight that reads them."""
    net, group = two_layers(8, 3, bias=bias)
    with torch.no_grad():
        net[0].bias += 1.0
    x, moments = record(net, group, n=20_000)
    weights, plan = dict(net.named_parameters()), full_plan([group])
    ranking = rank_groups([group], moments, weights, plan, compensate=compensate)["hidden"]
    with torch.no_grad():
        return ranking, net[1](net[0](x)).double(), net[2].weight.double()


@pytest.mark.parametrize("bias", [True, False])
def test_the_expected_loss_without_compensation_is_what_removed_units_gave(bias):
    """Half the mean square of what the layer above no longer gets; the largest one so far."""
    ranking, h, weight = ranked_with_means(bias=bias, compensate=False)
    parts = h[:, None] * weight
    most = 0.0
    for width in reversed(range(8)):
        gone = parts[..., list(ranking.order[: 8 - width])].sum(-1)
        most = max(most, float(gone.square().sum(1).mean() / 2))
        assert ranking.lost(width)[0] == pytest.approx(most, rel=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_the_expected_loss_is_the_residual_of_least_squares(bias):
    """Half the squared error of the layer above, with an intercept only where there is a bias."""
    ranking, h, weight = ranked_with_means(bias=bias, compensate=True)
    z = h @ weight.T
    for width in (2, 5, 7):
        design = h[:, list(ranking.kept(width))]
        if bias:
            design = torch.cat([design, torch.ones(len(h), 1)], 1)
        error = z - design @ torch.linalg.lstsq(design, z).solution
        lost = float(error.square().sum(1).mean() / 2)
        assert ranking.lost(width)[0] == pytest.approx(lost, rel=1e-3)


def test_compensation_can_be_left_out():
    net, group = two_layers()
    _, moments = record(net, group)
    chosen = select_units(
        [group],
        moments,
        dict(net.named_parameters()),
        {"hidden": 4},
        full_plan([group]),
        compensate=False,
    )
    assert chosen.compensated == {}


def test_units_are_scored_against_the_units_kept_above():
    """Units that feed only dropped units above have no importance."""
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    low = linear_group(net, "low", kind="ffn", producers=["0"], consumers=["1"], level=0)
    high = linear_group(net, "high", kind="ffn", producers=["1"], consumers=["2"], level=1)
    with torch.no_grad():
        net[0].weight.copy_(torch.cat([torch.eye(4), torch.eye(4)[:2]]) + 0.1 * torch.randn(6, 4))
        net[1].weight.zero_()
        net[1].weight[:2, :3] = torch.randn(2, 3)  # above 0, 1 read below 0..2
        net[1].weight[2:, 3:] = 9 * torch.randn(2, 3)  # above 2, 3 read below 3..5
        net[2].weight[:, 2:] = 0  # no consumer of above 2, 3
    with ActivationRecorder(net, [low, high]) as recorder, torch.no_grad():
        net(torch.randn(3000, 4))
    weights = dict(net.named_parameters())
    widths = {"low": 3, "high": 2}
    chosen = select_units(
        [low, high], recorder.moments, weights, widths, full_plan([low, high]), compensate=False
    )
    assert chosen.plan.kept["high"] == (0, 1)
    alone = select_units(
        [low], {"low": recorder.moments["low"]}, weights, widths, full_plan([low]), compensate=False
    )
    lost = UnitStatistics(
        "low", 1, 3000, *recorder.moments["low"].compute(), net[1].weight[:2].detach().double()
    )
    order = MutualInformation().rank([lost], 3)
    assert chosen.plan.kept["low"] == order.keep(3, 6)
    assert chosen.plan.kept["low"] != alone.plan.kept["low"]


def test_a_second_cut_numbers_units_as_built():
    net, group = two_layers(8, 3)
    x, moments = record(net, group)
    first = select_units(
        [group], moments, dict(net.named_parameters()), {"hidden": 6}, full_plan([group])
    )
    apply_plan(net, [group], first.plan, compensated=first.compensated)
    with ActivationRecorder(net, [group]) as recorder, torch.no_grad():
        net(x)
    second = select_units(
        [group], recorder.moments, dict(net.named_parameters()), {"hidden": 3}, first.plan
    )
    assert set(second.plan.kept["hidden"]) < set(first.plan.kept["hidden"])
    apply_plan(net, [group], second.plan, current=first.plan, compensated=second.compensated)
    assert net[2].in_features == 3


@pytest.mark.parametrize(
    "criterion", [Magnitude(), ActivationNorm(), Random(), MutualInformation()]
)
def test_every_criterion_orders_every_kind_of_unit(criterion):
    model = build()
    groups = [group for group in groups_of(model) if group.kind != "head_dim"]  # no unit by itself
    widths = {a.name: a.size // 2 for a in groups}
    chosen = choose(model, groups, widths, criterion)
    assert {n: chosen.plan.width(n) for n in widths} == widths
    assert choose(model, groups, widths, criterion).plan == chosen.plan


def test_magnitude_and_activation_norm_drop_a_small_unit():
    net, group = two_layers()
    with torch.no_grad():
        net[0].weight[2] *= 0.01
        net[2].weight[:, 2] *= 0.01
    _, moments = record(net, group)
    for criterion in (Magnitude(), ActivationNorm()):
        chosen = select_units(
            [group],
            moments,
            dict(net.named_parameters()),
            {"hidden": 7},
            full_plan([group]),
            criterion,
        )
        assert 2 not in chosen.plan.kept["hidden"]


def statistics(samples=1000, m=3, d=8, name="hidden"):
    torch.manual_seed(1)
    a = torch.randn(d, 2 * d, dtype=torch.float64)
    return UnitStatistics(
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
        MutualInformation().rank([statistics(samples=4)], 4)
    net, group = two_layers()
    _, moments = record(net, group, n=30)
    with pytest.warns(PruningWarning, match="fewer than 20 samples"):
        select_units(
            [group], moments, dict(net.named_parameters()), {"hidden": 4}, full_plan([group])
        )


@pytest.mark.parametrize("m", [8, 20])
def test_a_layer_above_that_determines_every_unit_is_no_ranking(m):
    with pytest.raises(PruningError, match="ridge=0 gives no ranking"):
        MutualInformation("topk", 0.0).rank([statistics(m=m)], 4)
    MutualInformation("topk", 0.01).rank([statistics(m=m)], 4)


def test_equal_scores_are_warned_about():
    same = statistics(m=8)
    same = UnitStatistics(
        "hidden",
        1,
        1000,
        same.mean,
        torch.eye(8, dtype=torch.float64),
        torch.eye(8, dtype=torch.float64),
    )
    with pytest.warns(PruningWarning, match="no ranking"):
        MutualInformation("topk", 0.01).rank([same], 4)


def test_correction_for_few_samples_does_not_change_a_ranking():
    few, many = statistics(samples=50), statistics(samples=10**9)
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


def test_no_samples_are_refused():
    net, group = two_layers()
    with ActivationRecorder(net, [group]) as recorder:
        pass
    with pytest.raises(PruningError, match="No activations were collected"):
        select_units(
            [group],
            recorder.moments,
            dict(net.named_parameters()),
            {"hidden": 4},
            PruningPlan.full({"hidden": 8}),
        )


@pytest.mark.parametrize("n", [180, 200, 260, 400])
def test_with_few_samples_compensation_does_not_fit_noise(n):
    """Independent units: the kept ones do not predict the dropped ones, whatever n suggests."""
    d, m, keep = 256, 8, 192
    net = nn.Sequential(nn.Identity(), nn.Linear(d, m)).double()
    units = (("x",),)
    group = DependencyGroup(
        "x",
        "ffn",
        d,
        (PrunableDim("1.weight", 1, (m, d), units),),
        ("1",),
        (SizeAttribute("1", "in_features", units),),
    )
    x, fresh = torch.randn(n, d, dtype=torch.float64), torch.randn(4000, d, dtype=torch.float64)
    with ActivationRecorder(net, [group]) as recorder, torch.no_grad():
        net(x)
    with torch.no_grad():
        target = net(fresh)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    with pytest.warns(PruningWarning, match="or 2 for each entry"):
        chosen = select_units([group], recorder.moments, weights, {"x": keep}, full_plan([group]))
    kept = list(chosen.plan.kept["x"])
    with torch.no_grad():
        compensated = (
            fresh[:, kept] @ chosen.compensated["1.weight"].mT + chosen.compensated["1.bias"]
        )
        plain = fresh[:, kept] @ weights["1.weight"][:, kept].mT + weights["1.bias"]
    error, without = ((z - target).square().mean() for z in (compensated, plain))
    assert error < 1.1 * without
    assert chosen.information["x"].fraction < 0.95


def test_a_group_of_one_entry_and_a_group_that_stays():
    net = nn.Sequential(nn.Linear(4, 1), nn.Tanh(), nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 2))
    one = linear_group(net, "one", kind="ffn", producers=["0"], consumers=["2"])
    many = linear_group(net, "many", kind="ffn", producers=["2"], consumers=["4"], level=1)
    with ActivationRecorder(net, [one, many]) as recorder, torch.no_grad():
        net(torch.randn(9, 4))
    weights = dict(net.named_parameters())
    chosen = select_units(
        [one, many], recorder.moments, weights, {"one": 1, "many": 4}, full_plan([one, many])
    )
    assert chosen.plan.width("many") == 4
    assert chosen.information["one"].fraction == pytest.approx(1)


def test_heads_are_scored_whatever_their_scale():
    torch.manual_seed(0)
    a = torch.randn(12, 40, dtype=torch.float64)
    cov, readout = a @ a.mT / 40, torch.randn(6, 12, dtype=torch.float64)
    scale = torch.ones(12, dtype=torch.float64)
    scale[3:6] = 1e-6
    first = UnitStatistics("h", 3, 10_000, torch.zeros(12), cov, readout)
    other = UnitStatistics(
        "h", 3, 10_000, torch.zeros(12), cov * scale[:, None] * scale, readout / scale
    )
    criterion = MutualInformation("topk", 0.01)
    assert torch.allclose(criterion.scores(first), criterion.scores(other), rtol=1e-4)
