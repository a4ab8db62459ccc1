from __future__ import annotations

import copy
import json
import pickle

import pytest

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan

PLAN = PruningPlan({"b": 3, "a": 4}, {"b": (0, 2), "a": (1, 2, 3)})


def test_json_is_canonical_and_comes_back_equal():
    other_order = PruningPlan({"a": 4, "b": 3}, {"a": (1, 2, 3), "b": (0, 2)})
    assert other_order.to_json() == PLAN.to_json()
    assert other_order.digest() == PLAN.digest()
    assert PruningPlan.from_json(PLAN.to_json()) == PLAN


def test_a_plan_cannot_be_changed():
    with pytest.raises(TypeError):
        PLAN.kept["a"] = (1,)


def test_a_plan_can_be_copied_and_sent():
    assert copy.deepcopy(PLAN) == PLAN
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN  # noqa: S301


def test_two_cuts_are_one_plan():
    later = PruningPlan({"a": 4}, {"a": (1, 3)})
    both = PLAN.then(later)
    assert dict(both.kept) == {"a": (1, 3), "b": (0, 2)}
    assert later.positions_in(PLAN) == {"a": (0, 2)}


def test_full_and_width():
    assert PruningPlan.full({"a": 2}).is_full
    assert not PLAN.is_full
    assert PLAN.width("a") == 3


def test_prefixes_come_and_go():
    assert PLAN.prefixed("net").under("net") == PLAN
    assert PLAN.prefixed("net").under("other").sizes == {}
    assert PLAN.under("") == PLAN


@pytest.mark.parametrize(
    ("sizes", "kept", "message"),
    [
        ({"a": 2}, {}, "expected both for every group"),
        ({"a": 2}, {"a": (0, 2)}, "unit 2"),
        ({"a": 2}, {"a": (-1,)}, "unit -1"),
        ({"a": 2}, {"a": (True,)}, "unit True"),
        ({"a": 3}, {"a": (0, None)}, "keeps unit None; expected 0 to 2"),
        ({"a": 3}, {"a": (False, 1)}, "keeps unit False; expected 0 to 2"),
        ({"a": 3}, {"a": (1, 0)}, "out of order"),
        ({"a": 3}, {"a": (1, 1)}, "out of order"),
        ({"a": 0}, {"a": (0,)}, "size 0"),
        ({"a": 10**12}, {"a": (0,)}, "size 1000000000000"),
        ({"a": "3"}, {"a": (0,)}, "size '3'"),
    ],
)
def test_a_wrong_plan_is_refused(sizes, kept, message):
    with pytest.raises(PruningError, match=message):
        PruningPlan(sizes, kept)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        (PruningPlan({"a": 4}, {"a": (0,)}), r"units \[0\].*already removed"),
        (PruningPlan({"a": 5}, {"a": (1,)}), "not in the earlier plan"),
        (PruningPlan({"c": 4}, {"c": (1,)}), "not in the earlier plan"),
    ],
)
def test_plans_that_do_not_compose(later, message):
    with pytest.raises(PruningError, match=message):
        PLAN.then(later)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is a list of 0; expected a JSON object"),
        ('{"version": 99}', "version 99"),
        ('{"version": 1, "sizes": {}}', "'sizes' and 'kept'"),
        ('{"version": 1, "sizes": {"a": 2}, "kept": {"a": "0"}}', "expected integers"),
        ('{"version": 1, "sizes": {"a": 2}, "kept": {"a": [0.5]}}', "unit 0.5"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_untrusted_text_is_refused(text, message):
    with pytest.raises(PruningError, match=message):
        PruningPlan.from_json(text)


def test_text_of_absurd_length_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr("lightning_mi_prune.core.plan.LARGEST_TEXT", 10)
    with pytest.raises(PruningError, match="characters"):
        PruningPlan.from_json(json.dumps({"version": 1}))
