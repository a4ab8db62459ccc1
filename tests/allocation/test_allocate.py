from __future__ import annotations

import itertools
import random
from itertools import accumulate

import pytest

from lightning_mi_prune.allocation.allocate import allocate, allocate_by_loss
from lightning_mi_prune.allocation.budget import Budget, sparsity_of
from lightning_mi_prune.allocation.costs import MacCosts, ParameterCosts
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim
from tests.allocation.test_budget import encoder
from tests.support.models import entries_of

SINGLE = Constraints(multiple=1)


def group(name, size, entries=1, columns=4, **options):
    shape = (size * entries, columns)
    tensors = (PrunableDim(name, 0, shape, ((name, entries),)),)
    return DependencyGroup(name, "any", size, tensors, ("down",), **options)


def ranking(losses, nats=None):
    """Losses of the units, the first to go first."""
    return Ranking(
        tuple(range(len(losses))), tuple(accumulate(losses)), tuple(accumulate(nats or losses))
    )


def dice(seed):
    return random.Random(seed)  # noqa: S311


def ranked(groups, seed=0, *, convex=True):
    draw, found = dice(seed), {}
    for one in groups:
        losses = [draw.lognormvariate(0, 1) / one.size for _ in range(one.size)]
        found[one.name] = ranking(sorted(losses) if convex else losses)
    return found


def lost(rankings, widths):
    return sum(rankings[name].lost(width)[0] for name, width in widths.items())


def optimum(groups, rankings, costs, target):
    """The smallest loss of all widths that cost no more than the target."""
    names = [one.name for one in groups]
    choices = itertools.product(*(range(one.size + 1) for one in groups))
    every = (dict(zip(names, widths, strict=True)) for widths in choices)
    return min(lost(rankings, w) for w in every if costs.total(w) <= target + 1e-9)


def stream(layers=3, hidden=16, neurons=32, heads=4):
    """Neurons and heads of some layers, and the residual stream that all of them share."""
    groups = encoder(layers, hidden, neurons, heads)
    cut = {(s.tensor, s.dim): s.shape for one in groups for s in one.tensors}
    units = (("hidden",),)
    shared = tuple(
        PrunableDim(tensor, 1 - dim, shape, units) for (tensor, dim), shape in cut.items()
    )
    words = PrunableDim("words", 1, (50, hidden), units)
    return [*groups, DependencyGroup("hidden", "hidden", hidden, (*shared, words), ("down",))]


@pytest.mark.parametrize("seed", range(40))
def test_convex_losses_of_equal_units_are_cut_as_well_as_can_be(seed):
    draw = dice(seed)
    groups = [group(name, draw.randint(2, 6), may_be_empty=True) for name in "abcd"]
    rankings, costs = ranked(groups, seed), ParameterCosts(groups)
    budget = Budget(sparsity=draw.uniform(0.1, 0.95))
    target = budget.target(groups, costs)
    widths = allocate(groups, budget, costs=costs, rankings=rankings, constraints=SINGLE)
    assert costs.total(widths) <= target
    assert lost(rankings, widths) == pytest.approx(optimum(groups, rankings, costs, target))


@pytest.mark.parametrize("convex", [True, False])
def test_other_losses_and_units_are_cut_nearly_as_well(convex):
    ratios = []
    for seed in range(60):
        draw = dice(seed)
        groups = [
            group(n, draw.randint(3, 6), draw.choice([1, 2, 3]), may_be_empty=True) for n in "abc"
        ]
        rankings, costs = ranked(groups, seed, convex=convex), ParameterCosts(groups)
        budget = Budget(sparsity=draw.uniform(0.2, 0.8))
        target = budget.target(groups, costs)
        widths = allocate(groups, budget, costs=costs, rankings=rankings, constraints=SINGLE)
        assert costs.total(widths) <= target
        ratios.append(lost(rankings, widths) / optimum(groups, rankings, costs, target))
    assert min(ratios) >= 1 - 1e-9
    assert max(ratios) < 1.6
    assert sum(ratios) / len(ratios) < 1.05


def test_a_whole_sublayer_goes_when_half_of_it_is_no_cheaper():
    groups = [group("a", 4, may_be_empty=True), group("b", 4, may_be_empty=True)]
    rankings = {"a": ranking([2.0, 0, 0, 0]), "b": ranking([1.0, 1.0, 1.0, 1.0])}
    options = {"costs": ParameterCosts(groups), "rankings": rankings, "constraints": SINGLE}
    assert allocate(groups, Budget(sparsity=0.5), **options) == {"a": 0, "b": 4}
    rankings["a"] = ranking([5.0, 0, 0, 0])
    assert allocate(groups, Budget(sparsity=0.5), **options) == {"a": 4, "b": 0}


def test_only_groups_that_may_be_empty_lose_all_units():
    groups = [group("a", 16), group("b", 4, entries=4), group("c", 16, may_be_empty=True)]
    rankings = {one.name: ranking([1e-9] * one.size) for one in groups}
    costs = ParameterCosts(groups)
    least = (8 + 4) * 4
    widths = allocate(groups, Budget(target_parameters=least), costs=costs, rankings=rankings)
    assert widths == {"a": 8, "b": 1, "c": 0}
    with pytest.raises(PruningError, match="no fewer than 48 parameters can be reached"):
        allocate(groups, Budget(target_parameters=least - 1), costs=costs, rankings=rankings)


def test_the_last_jump_is_as_short_as_possible_and_steps_that_fit_are_undone():
    groups = [group("big", 4, entries=10, may_be_empty=True), group("small", 8, may_be_empty=True)]
    small = ranking([0.1 * i for i in range(1, 9)])
    rankings = {"big": ranking([5.0, 0.2, 0.2, 0.2]), "small": small}
    costs = ParameterCosts(groups)

    def found(parameters):
        budget = Budget(target_parameters=parameters)
        return allocate(groups, budget, costs=costs, rankings=rankings, constraints=SINGLE)

    assert found(180) == {"big": 4, "small": 5}
    # All of "big" loses less for its cost than the fifth small unit, and one of it is enough.
    assert found(148) == {"big": 3, "small": 7}
    assert found(152) == {"big": 3, "small": 8}


def one_step_more(groups, widths, current, costs, multiple=8):
    for one in groups:
        step = multiple if entries_of(one) == 1 and one.size > multiple else 1
        if widths[one.name] < current[one.name]:
            yield costs.total({**widths, one.name: widths[one.name] + step})


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_size_budgets_are_met_and_no_further_step_fits(coupled, convex, share):
    groups = stream() if coupled else encoder(3, 16, 32, 4)
    rankings = ranked(groups, 3, convex=convex)
    parameters = ParameterCosts(groups, fixed=100)
    rows = {s.tensor: 7 for one in groups for s in one.tensors if s.tensor != "words"}
    products = [(((one.name,),), 64.0) for one in groups if one.kind == "heads"]
    macs = MacCosts(groups, fixed=100, positions=rows, products=products)
    built = {one.name: one.size for one in groups}
    for costs, option in ((parameters, "target_parameters"), (macs, "target_macs")):
        target = round(share * costs.total(built))
        widths = allocate(groups, Budget(**{option: target}), costs=costs, rankings=rankings)
        assert costs.total(widths) <= target
        assert all(cost > target for cost in one_step_more(groups, widths, built, costs))
        assert all(w % 8 == 0 for n, w in widths.items() if "heads" not in n)


def test_sparsity_counts_prunable_parameters_only():
    groups = encoder(3, 16, 32, 4)
    widths = allocate(
        groups,
        Budget(sparsity=0.6),
        costs=ParameterCosts(groups, fixed=10**6),
        rankings=ranked(groups),
    )
    assert 0.6 <= sparsity_of(groups, widths) < 0.65
    assert len(set(widths.values())) > 2


@pytest.mark.parametrize("keep", [0.99, 0.9, 0.5])
@pytest.mark.parametrize("widths", ["global", "uniform"])
def test_information_stays_and_one_step_more_would_lose_it(keep, widths):
    groups = [group(name, 64, may_be_empty=True) for name in "abc"]
    rankings = ranked(groups, 5)
    total = sum(r.nats[-1] for r in rankings.values())
    budget, costs = Budget(keep_information=keep), ParameterCosts(groups)
    found = allocate(groups, budget, costs=costs, rankings=rankings, widths=widths)

    def kept(at):
        return 1 - sum(rankings[n].lost(w)[1] for n, w in at.items()) / total

    assert kept(found) >= keep
    less = [{**found, n: w - 8} for n, w in found.items() if w]
    if widths == "uniform":
        assert len(set(found.values())) == 1
        less = [{n: w - 8 for n, w in found.items()}]
    assert min(kept(at) for at in less) < keep
    # What an earlier cut lost is lost: the same pass from there ends at the same place.
    rest = {
        n: Ranking(r.order[8:], *(tuple(v - x[7] for v in x[8:]) for x in (r.loss, r.nats)))
        for n, r in rankings.items()
    }
    now = {one.name: 56 for one in groups}
    left = kept(now)
    options = {"costs": costs, "widths": widths, "current": now, "kept": left}
    if left > keep:
        assert allocate(groups, budget, rankings=rest, **options) == found


def test_progress_goes_part_of_the_way_and_no_further_than_the_end():
    groups = encoder(3, 16, 32, 4)
    rankings, costs = ranked(groups), ParameterCosts(groups, fixed=50)
    for budget in (Budget(sparsity=0.6), Budget(target_parameters=2000)):
        for mode in ("global", "uniform"):
            options = {"costs": costs, "rankings": rankings, "widths": mode}
            half = allocate(groups, budget, progress=0.5, **options)
            end = allocate(groups, budget, **options)
            assert costs.total(end) <= budget.target(groups, costs) < costs.total(half)
            if mode == "global":
                assert costs.total(half) <= budget.target(groups, costs, 0.5)
            else:
                assert all(half[name] >= end[name] for name in end)
    budget = Budget(keep_information=0.8)
    half, ninety = (
        allocate(groups, b, costs=costs, rankings=rankings, progress=p)
        for b, p in ((budget, 0.5), (Budget(keep_information=0.9), 1.0))
    )
    assert half == ninety


@pytest.mark.parametrize("mode", ["global", "uniform"])
def test_a_small_enough_model_stays_and_no_group_grows(mode):
    groups = encoder(2, 16, 32, 4)
    now = {one.name: 3 if one.kind == "heads" else 16 for one in groups} | {"0.ffn": 8}
    rankings = {n: ranking([1.0] * w) for n, w in now.items()}
    costs = ParameterCosts(groups)
    options = {"costs": costs, "rankings": rankings, "current": now, "widths": mode}
    for budget in (
        Budget(sparsity=0.05),
        Budget(target_parameters=10**6),
        Budget(keep_information=0.999),
    ):
        assert allocate(groups, budget, **options) == now
    found = allocate(groups, Budget(sparsity=0.7), **options)
    assert all(width <= now[name] for name, width in found.items())
    assert sparsity_of(groups, found) >= 0.7


@pytest.mark.parametrize("mode", ["global", "uniform"])
def test_constraints_hold(mode):
    groups = encoder(3, 16, 64, 4)
    constraints = Constraints(floors={"heads": 2}, caps={r"^1\.ffn": 0.5}, pins={r"^2\.ffn": 20})
    options = {
        "costs": ParameterCosts(groups),
        "rankings": ranked(groups),
        "constraints": constraints,
    }
    for sparsity in (0.05, 0.3, 0.6):
        found = allocate(groups, Budget(sparsity=sparsity), widths=mode, **options)
        assert min(w for n, w in found.items() if "heads" in n) >= 2
        assert found["1.ffn"] <= 32
        assert found["2.ffn"] == 20
        assert sparsity_of(groups, found) >= sparsity


def test_rankings_of_the_model_as_built_serve_a_later_cut():
    groups = [group("a", 4), group("b", 4)]
    rankings = {"a": ranking([0.0, 0.0, 3.0, 3.0]), "b": ranking([1.0, 1.0, 1.0, 5.0])}
    options = {"costs": ParameterCosts(groups), "rankings": rankings, "constraints": SINGLE}
    budget = Budget(sparsity=0.5)
    assert allocate(groups, budget, current={"a": 2, "b": 4}, **options) == {"a": 2, "b": 2}
    assert allocate(groups, budget, **options) == {"a": 2, "b": 2}


def test_equal_groups_share_the_loss():
    groups = encoder(4, 16, 64, 4)
    rankings = {one.name: ranking([1.0 / one.size] * one.size) for one in groups}
    widths = allocate(groups, Budget(sparsity=0.5), costs=ParameterCosts(groups), rankings=rankings)
    neurons = [w for n, w in widths.items() if "ffn" in n]
    assert max(neurons) - min(neurons) <= 8


def test_widths_of_bert_base():
    groups = stream(layers=12, hidden=768, neurons=3072, heads=12)
    rankings, costs = ranked(groups), ParameterCosts(groups)
    widths = allocate(groups, Budget(sparsity=0.75), costs=costs, rankings=rankings)
    assert 0.75 <= sparsity_of(groups, widths) < 0.7501


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": "fair"}, "widths='fair'; expected one of .'global', 'uniform', 'config'"),
        ({"rankings": None}, "needs rankings of the groups"),
        ({"rankings": {}}, "'a' has no ranking"),
        ({"rankings": {"a": ranking([1.0]), "b": ranking([1.0])}}, "covers 1 of 16 units"),
        ({"costs": MacCosts([])}, "sparsity=0.5 counts parameters, but the costs given count MACs"),
        ({"progress": 0}, "progress=0; expected a share above 0"),
        ({"progress": 1.5}, "progress=1.5"),
        ({"budget": Budget(sparsity=0.9)}, r"at most 0.5000 of the prunable parameters can go"),
        ({"constraints": Constraints(floor=0.75)}, r"sparsity=0.5 is out of reach.*at most 0.0000"),
        (
            {"budget": Budget(keep_information=0.9), "constraints": Constraints(caps={"a": 8})},
            r"keep_information=0.9 is out of reach: the caps and pins alone lose 4.8 nats more",
        ),
        (
            {"budget": Budget(keep_information=0.9), "rankings": None, "widths": "uniform"},
            "widths='uniform' with keep_information=0.9 needs rankings",
        ),
    ],
)
def test_contradictory_arguments_are_refused(change, message):
    groups = [group("a", 16), group("b", 16)]
    options = {
        "budget": Budget(sparsity=0.5),
        "costs": ParameterCosts(groups),
        "rankings": {one.name: ranking([1.0] * 16) for one in groups},
    } | change
    with pytest.raises(PruningError, match=message):
        allocate(groups, options.pop("budget"), **options)


def test_an_unreachable_target_is_refused():
    groups = [group("a", 16)]
    with pytest.raises(PruningError, match="A cost of 10 parameters is out of reach; at least 32"):
        allocate_by_loss(groups, ranked(groups), ParameterCosts(groups), 10, bounds={"a": (8, 16)})
