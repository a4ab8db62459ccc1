from __future__ import annotations

import copy

import pytest

from lightning_mi_prune.allocation.constraints import resolve_bounds
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.graph.groups import DependencyGroup, EmptyForward, PrunableDim
from tests.allocation.test_budget import encoder


def tall(**options):
    tensors = (PrunableDim("t", 0, (100, 4), (("tall",),)),)
    return DependencyGroup("tall", "ffn", 100, tensors, ("down",), **options)


def test_constraints_count_units_or_shares():
    groups = encoder(2, 16, 64, 4)
    constraints = Constraints(
        floors={"ffn": 0.3, r"^0\.ffn": 30},
        caps={"ffn": 60, "heads": 0.8},
        pins={r"1\.heads": 2},
        floor=0.1,
    )
    assert resolve_bounds(constraints, groups) == {
        "0.heads": (1, 3),
        "0.ffn": (32, 56),
        "1.heads": (2, 2),
        "1.ffn": (24, 56),
    }
    now = {"0.heads": 2, "0.ffn": 24, "1.heads": 2, "1.ffn": 64}
    assert resolve_bounds(constraints, groups, now)["0.ffn"] == (24, 24)
    assert resolve_bounds(constraints, groups, now)["0.heads"] == (1, 2)
    assert copy.deepcopy(constraints) == constraints


def test_only_groups_that_may_not_be_empty_keep_a_step():
    empty, kept = tall(may_be_empty=True), tall()
    forward = tall(empty_forward=(EmptyForward("attention", ("query",)),))
    for one in (empty, forward):
        assert resolve_bounds(Constraints(), [one]) == {"tall": (0, 100)}
    assert resolve_bounds(Constraints(), [kept]) == {"tall": (8, 100)}
    assert resolve_bounds(Constraints(floor=0.05), [empty]) == {"tall": (8, 100)}
    for options in ({"pins": {"tall": 0}}, {"caps": {"tall": 0}, "floors": {"tall": 0}}):
        assert resolve_bounds(Constraints(**options), [empty]) == {"tall": (0, 0)}
    assert resolve_bounds(Constraints(pins={"tall": 5}, floor=0.5), [kept]) == {"tall": (5, 5)}
    assert resolve_bounds(Constraints(pins={"tall": 1.0}), [kept]) == {"tall": (100, 100)}


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
def test_constraints_that_contradict_or_match_nothing_are_refused(options, now, message):
    with pytest.raises(PruningError, match=message):
        resolve_bounds(Constraints(**options), [tall()], {"tall": now})
