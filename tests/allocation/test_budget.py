from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from lightning_mi_prune.allocation.budget import (
    Budget,
    check_reach,
    sparsity_of,
    uniform,
    uniform_widths,
)
from lightning_mi_prune.allocation.constraints import Constraints
from lightning_mi_prune.allocation.costs import MacCosts, ParameterCosts
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.discovery.groups import (
    DependencyGroup,
    EmptyForward,
    PrunableDim,
    count_parameters,
)


def encoder(layers=6, hidden=384, neurons=1536, heads=12):
    groups = []
    for i in range(layers):
        size = hidden // heads
        square = (hidden, hidden)
        groups.append(
            DependencyGroup(
                f"{i}.heads",
                "heads",
                heads,
                size,
                (
                    *(PrunableDim(f"{i}.{p}", 0, square) for p in "qkv"),
                    PrunableDim(f"{i}.o", 1, square),
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
                1,
                (
                    PrunableDim(f"{i}.up", 0, (neurons, hidden)),
                    PrunableDim(f"{i}.down", 1, (hidden, neurons)),
                ),
                (f"{i}.down",),
                level=2 * i + 1,
            )
        )
    return groups


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


def test_an_impossible_budget_names_what_is_possible():
    with pytest.raises(PruningError, match=r"sparsity=0.97 is out of reach.*0\.9\d+"):
        uniform_widths(encoder(), 0.97)


def tall(**options):
    return DependencyGroup(
        "tall", "ffn", 100, 1, (PrunableDim("t", 0, (100, 4)),), ("down",), **options
    )


def test_a_budget_says_what_it_counts():
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
        ({"target_macs": 0}, "target_macs=0; expected a whole number from 1"),
        ({"target_macs": True}, "target_macs=True"),
        ({"target_latency_ms": -1}, "target_latency_ms=-1; expected milliseconds above 0"),
        ({"target_latency_ms": float("inf")}, "target_latency_ms=inf"),
        ({"target_latency_ms": "fast"}, "target_latency_ms='fast'"),
    ],
)
def test_budgets_that_say_too_little_too_much_or_nonsense(options, message):
    with pytest.raises(PruningError, match=message):
        Budget(**options)


def test_targets_lie_on_the_way_from_the_model_as_built():
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


def test_uniform_cuts_keep_a_step_where_a_competition_could_empty():
    vanishing = [replace(a, may_be_empty=True) for a in encoder(2, 16, 32, 4)]
    budget, costs = Budget(target_parameters=1), ParameterCosts(vanishing)
    check_reach(vanishing, Budget(target_parameters=1), costs=costs)
    with pytest.raises(PruningError, match="no fewer than 1,024 parameters"):
        check_reach(vanishing, budget, costs=costs, widths="uniform")


def test_uniform_widths_meet_any_cost_closely():
    groups = encoder()
    rows = {s.tensor: 10 for a in groups for s in a.tensors}
    macs = MacCosts(groups, fixed=12345, positions=rows)
    full = {a.name: (0, a.size) for a in groups}
    target = 0.4 * macs.total({})
    widths = uniform(groups, macs, target, bounds=full)
    assert 0.395 * macs.total({}) < macs.total(widths) <= target
    assert len({w for name, w in widths.items() if "ffn" in name}) == 1


def test_limits_speak_of_units_or_shares():
    groups = encoder(2, 16, 64, 4)
    constraints = Constraints(
        floors={"ffn": 0.3, r"^0\.ffn": 30},
        caps={"ffn": 60, "heads": 0.8},
        pins={r"1\.heads": 2},
        floor=0.1,
    )
    assert constraints.resolve(groups) == {
        "0.heads": (1, 3),
        "0.ffn": (32, 56),
        "1.heads": (2, 2),
        "1.ffn": (24, 56),
    }
    now = {"0.heads": 2, "0.ffn": 24, "1.heads": 2, "1.ffn": 64}
    assert constraints.resolve(groups, now)["0.ffn"] == (24, 24)
    assert constraints.resolve(groups, now)["0.heads"] == (1, 2)
    assert copy.deepcopy(constraints) == constraints


def test_an_axis_that_may_vanish_has_no_floor_of_its_own():
    empty, kept = tall(may_be_empty=True), tall()
    silent = tall(empty_forward=(EmptyForward("attention", ("query",)),))
    assert Constraints().resolve([empty]) == Constraints().resolve([silent]) == {"tall": (0, 100)}
    assert Constraints().resolve([kept]) == {"tall": (8, 100)}
    assert Constraints(floor=0.05).resolve([empty]) == {"tall": (8, 100)}
    assert Constraints(pins={"tall": 0}).resolve([empty]) == {"tall": (0, 0)}
    assert Constraints(caps={"tall": 0}, floors={"tall": 0}).resolve([empty]) == {"tall": (0, 0)}
    assert Constraints(pins={"tall": 5}, floor=0.5).resolve([kept]) == {"tall": (5, 5)}
    assert Constraints(pins={"tall": 1.0}).resolve([kept]) == {"tall": (100, 100)}


@pytest.mark.parametrize(
    ("options", "now", "message"),
    [
        ({"floors": {"short": 5}}, 100, r"floors: 'short' matches no group; the names look like"),
        ({"caps": {"(": 5}}, 100, "caps: '\\(' is not a regular expression"),
        ({"caps": {5: 5}}, 100, "caps: 5 is not text"),
        ({"pins": 5}, 100, "pins=5; expected a mapping"),
        ({"pins": {"tall": 101}}, 100, "a pinned width of 101 units, above the 100"),
        ({"floors": {"tall": 101}}, 100, "a floor of 101 units, above the 100"),
        ({"pins": {"tall": 64}}, 40, "pins 'tall' to 64 units, above the 40 that earlier cuts"),
        ({"floors": {"tall": 64}, "caps": {"ta": 50}}, 100, "keep 48 units at most, below its fl"),
        ({"pins": {"tall": 64}, "caps": {"ta": 50}}, 100, "pinned to 64 units, above its cap of"),
        ({"pins": {"tall": 64}, "floors": {"ta": 0.7}}, 100, "64 units, below its floor of 0.7"),
        ({"pins": {"tall": 64, "ta": 32}}, 100, r"pin 'tall' to \[32, 64\] units; expected one"),
        ({"pins": {"tall": 0}}, 100, "'tall' cannot run without units"),
        ({"caps": {"tall": 0.0}}, 100, "'tall' cannot run without units"),
        ({"caps": {"tall": 5}}, 100, "less than one step of 8 units"),
        ({"floors": {"tall": True}}, 100, "'tall' is True; expected a whole number of units"),
        ({"floors": {"tall": 1.5}}, 100, "'tall' is 1.5; expected"),
        ({"floors": {"tall": -1}}, 100, "'tall' is -1; expected"),
        ({"floors": {"tall": "half"}}, 100, "'tall' is 'half'; expected"),
        ({"floor": 1.0}, 100, "floor=1.0; expected a share from 0 and below 1"),
        ({"floor": False}, 100, "floor=False"),
    ],
)
def test_limits_that_contradict_or_match_nothing(options, now, message):
    with pytest.raises(PruningError, match=message):
        Constraints(**options).resolve([tall()], {"tall": now})
