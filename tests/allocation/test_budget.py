from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mi_prune.allocation.allocate import allocate
from lightning_mi_prune.allocation.budget import (
    Budget,
    check_reach,
    sparsity_of,
    uniform,
)
from lightning_mi_prune.allocation.costs import MacCosts, ParameterCosts
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    PrunableDim,
    count_parameters,
)


def encoder(layers=6, hidden=384, neurons=1536, heads=12):
    groups = []
    for i in range(layers):
        size = hidden // heads
        square, units, columns = (hidden, hidden), ((f"{i}.heads", size),), ((f"{i}.ffn",),)
        groups.append(
            DependencyGroup(
                f"{i}.heads",
                "heads",
                heads,
                (
                    *(PrunableDim(f"{i}.{p}", 0, square, units) for p in "qkv"),
                    PrunableDim(f"{i}.o", 1, square, units),
                ),
                (f"{i}.o",),
                level=2 * i,
            )
        )
        groups.append(
            DependencyGroup(
                f"{i}.ffn",
                "ffn",
                neurons,
                (
                    PrunableDim(f"{i}.up", 0, (neurons, hidden), columns),
                    PrunableDim(f"{i}.down", 1, (hidden, neurons), columns),
                ),
                (f"{i}.down",),
                level=2 * i + 1,
            )
        )
    return groups


def uniform_widths(groups, sparsity, floor=0.05):
    constraints, costs = Constraints(floor=floor), ParameterCosts(groups)
    return allocate(
        groups, Budget(sparsity), costs=costs, widths="uniform", constraints=constraints
    )


def test_half_is_exactly_half():
    widths = uniform_widths(encoder(), 0.5)
    assert {widths["0.heads"], widths["5.heads"]} == {6}
    assert {widths["0.ffn"], widths["5.ffn"]} == {768}


@pytest.mark.parametrize("sparsity", [0.05, 0.1, 0.25, 0.3, 0.5, 0.61, 0.75, 0.9])
def test_the_budget_is_met_closely_and_never_missed(sparsity):
    groups = encoder()
    widths = uniform_widths(groups, sparsity, floor=0.0)
    reached = sparsity_of(groups, widths)
    assert sparsity <= reached < sparsity + 0.005
    assert all(w % 8 == 0 for name, w in widths.items() if "ffn" in name)
    assert len({w for name, w in widths.items() if "ffn" in name}) == 1
    assert len({w for name, w in widths.items() if "heads" in name}) == 1


def test_heads_alone_round_up_to_whole_heads():
    groups = [a for a in encoder() if a.kind == "heads"]
    assert set(uniform_widths(groups, 0.3).values()) == {8}


def test_floors_hold():
    widths = uniform_widths(encoder(), 0.55, floor=0.4)
    assert min(w for n, w in widths.items() if "ffn" in n) >= 0.4 * 1536
    assert min(w for n, w in widths.items() if "heads" in n) >= 5


def test_the_error_of_an_impossible_budget_names_a_possible_one():
    with pytest.raises(PruningError, match=r"sparsity=0.97 is out of reach.*0\.9\d+"):
        uniform_widths(encoder(), 0.97)


def test_a_budget_knows_its_measure():
    kinds = [
        (Budget(sparsity=0.5), "sparsity", 0.5, "parameters"),
        (Budget(target_parameters=9), "target_parameters", 9, "parameters"),
        (Budget(target_macs=9), "target_macs", 9, "MACs"),
        (Budget(target_latency_ms=2.5), "target_latency_ms", 2.5, "ms"),
        (Budget(keep_information=0.98), "keep_information", 0.98, "parameters"),
    ]
    for budget, kind, amount, measure in kinds:
        assert (budget.kind, budget.amount, budget.measure) == (kind, amount, measure)
        assert str(budget) == f"{kind}={amount}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "A budget of nothing; expected exactly one of sparsity, target_parameters"),
        ({"sparsity": 0.5, "target_macs": 7}, "A budget of sparsity=0.5 and target_macs=7"),
        ({"sparsity": 1.0}, "sparsity=1.0; expected a number above 0 and below 1"),
        ({"sparsity": True}, "sparsity=True"),
        ({"keep_information": 0}, "keep_information=0; expected a number above 0"),
        ({"keep_information": float("nan")}, "keep_information=nan"),
        ({"target_parameters": 1e6}, "target_parameters=1000000.0; expected a whole number"),
        ({"target_macs": 0}, "target_macs=0; expected a whole number of at least 1"),
        ({"target_macs": True}, "target_macs=True"),
        ({"target_latency_ms": -1}, "target_latency_ms=-1; expected a number above 0"),
        ({"target_latency_ms": float("inf")}, "target_latency_ms=inf"),
        ({"target_latency_ms": "fast"}, "target_latency_ms='fast'"),
    ],
)
def test_incomplete_or_contradictory_budgets_are_refused(options, message):
    with pytest.raises(PruningError, match=message):
        Budget(**options)


def test_targets_lie_between_the_model_as_built_and_the_budget():
    groups = encoder(2, 16, 32, 4)
    costs = ParameterCosts(groups, fixed=1000)
    prunable = count_parameters(groups)
    assert Budget(sparsity=0.5).target(groups, costs) == 1000 + prunable / 2
    assert Budget(sparsity=0.5).target(groups, costs, 0.5) == 1000 + 0.75 * prunable
    assert Budget(target_parameters=1000).target(groups, costs, 0.25) == 1000 + 0.75 * prunable
    assert Budget(keep_information=0.5).target(groups, costs) == float("inf")


def test_an_impossible_budget_is_refused_before_anything_is_ranked():
    groups = encoder(2, 16, 32, 4)
    costs = ParameterCosts(groups, fixed=1000)
    check_reach(groups, Budget(target_parameters=2100), costs=costs)
    least = 1000 + 2 * (4 * 4 * 16 + 2 * 8 * 16)
    with pytest.raises(PruningError, match=rf"no fewer than {least:,} parameters can be reached"):
        check_reach(groups, Budget(target_parameters=least - 1), costs=costs)
    check_reach(groups, Budget(target_parameters=least), costs=costs)
    with pytest.raises(PruningError, match="target_macs=5 counts MACs, but the costs given count"):
        check_reach(groups, Budget(target_macs=5), costs=costs)


def test_uniform_widths_keep_a_step_where_global_ones_may_be_empty():
    groups = [replace(a, may_be_empty=True) for a in encoder(2, 16, 32, 4)]
    budget, costs = Budget(target_parameters=1), ParameterCosts(groups)
    check_reach(groups, Budget(target_parameters=1), costs=costs)
    with pytest.raises(PruningError, match="no fewer than 1,024 parameters"):
        check_reach(groups, budget, costs=costs, widths="uniform")


def test_uniform_widths_meet_any_cost_closely():
    groups = encoder()
    rows = {s.tensor: 10 for a in groups for s in a.tensors}
    macs = MacCosts(groups, fixed=12345, positions=rows)
    full = {a.name: (0, a.size) for a in groups}
    target = 0.4 * macs.total({})
    widths = uniform(groups, macs, target, bounds=full)
    assert 0.395 * macs.total({}) < macs.total(widths) <= target
    assert len({w for name, w in widths.items() if "ffn" in name}) == 1
