"""Classes of groups compete for a budget; the widths are the best that a config can describe."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mi_prune.allocation import allocate as allocation
from lightning_mi_prune.allocation.allocate import allocate
from lightning_mi_prune.allocation.budget import Budget, check_reach, nats_left
from lightning_mi_prune.allocation.classes import (
    Choices,
    WidthClass,
    choices_of,
    classes_of,
    groups_left_whole,
)
from lightning_mi_prune.allocation.constraints import resolve_bounds
from lightning_mi_prune.allocation.costs import ParameterCosts
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim

STEPS = Constraints(multiple=1)


def layer(index: int, ffn: int = 6, heads: int = 3, hidden: int = 6) -> list[DependencyGroup]:
    """Neurons and heads of one layer beside a hidden size, as in an encoder."""
    up = PrunableDim(f"{index}.up", 0, (ffn, hidden), ((f"{index}.ffn",),))
    query = PrunableDim(f"{index}.q", 0, (heads * 2, hidden), ((f"{index}.heads", 2),))
    return [
        DependencyGroup(f"{index}.ffn", "ffn", ffn, (up,), ("down",), config="inner_size"),
        DependencyGroup(f"{index}.heads", "heads", heads, (query,), ("o",), config="n_heads"),
    ]


def tied(groups: list[DependencyGroup], hidden: int = 6) -> list[DependencyGroup]:
    """The same with a hidden size that is the product of the heads and their size."""
    dims = tuple(
        PrunableDim(s.tensor, 1, s.shape, (("hidden",),)) for g in groups for s in g.tensors
    )
    stream = DependencyGroup("hidden", "hidden", hidden, dims, ("head",), config="dim")
    return [replace(g, tie="dim") if g.kind == "heads" else g for g in groups] + [stream]


def classes(groups, accepts=lambda widths: True):
    return classes_of(groups, {group.name for group in groups}, {"": accepts})


def widths_said(found, groups):
    """Whether widths are such that fields of a config can hold them."""
    inner = {found[g.name] for g in groups if g.kind == "ffn"}
    heads = {found[g.name] for g in groups if g.kind == "heads"}
    return len(inner) == len(heads) == 1 and 0 not in inner | heads


losses = st.lists(st.floats(0, 8).map(lambda x: round(x, 3)), min_size=6, max_size=6)


@st.composite
def cases(draw, *, hidden: bool):
    groups = [g for i in range(draw(st.integers(1, 3))) for g in layer(i)]
    if hidden:
        groups = tied(groups)
    rankings = {}
    for group in groups:
        each = draw(losses)[: group.size]
        total = tuple(itertools.accumulate(each))
        rankings[group.name] = Ranking(tuple(range(group.size)), total, total)
    return groups, rankings, draw(st.sampled_from([0.1, 0.25, 0.4, 0.55, 0.6]))


def brute_force(groups, rankings, limit, costs):
    """The least loss over all widths that a config can describe."""
    names = {kind: [g.name for g in groups if g.kind == kind] for kind in ("ffn", "heads")}
    best = math.inf
    for inner, heads in itertools.product(range(1, 7), range(1, 4)):
        widths = dict.fromkeys(names["ffn"], inner) | dict.fromkeys(names["heads"], heads)
        if any(g.kind == "hidden" for g in groups):
            widths["hidden"] = 2 * heads
        if costs.total(widths) <= limit + 1e-9:
            best = min(best, sum(rankings[n].lost(w)[0] for n, w in widths.items()))
    return best


@settings(max_examples=60, deadline=None)
@given(case=cases(hidden=False))
def test_the_loss_is_the_least_of_all_widths(case):
    check_least(*case)


@settings(max_examples=60, deadline=None)
@given(case=cases(hidden=True))
def test_the_loss_is_the_least_where_a_hidden_size_is_tied_to_heads(case):
    check_least(*case)


def check_least(groups, rankings, sparsity):
    costs = ParameterCosts(groups)
    budget = Budget(sparsity=sparsity)
    limit = budget.target(groups, costs)
    options = {"costs": costs, "widths": "config", "classes": classes(groups)}
    found = allocate(groups, budget, rankings=rankings, constraints=STEPS, **options)
    assert widths_said(found, groups)
    assert costs.total(found) <= limit + 1e-9
    assert all(found[n] == 2 * found["0.heads"] for n in found if n == "hidden")
    loss = sum(rankings[n].lost(w)[0] for n, w in found.items())
    assert loss == pytest.approx(brute_force(groups, rankings, limit, costs), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(case=cases(hidden=True))
def test_with_many_classes_jumps_meet_the_budget_as_well(case):
    groups, rankings, sparsity = case
    costs, budget = ParameterCosts(groups), Budget(sparsity=sparsity)
    options = {"costs": costs, "widths": "config", "classes": classes(groups)}
    best = allocate(groups, budget, rankings=rankings, constraints=STEPS, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "_MOST_TRIED", 0)
        found = allocate(groups, budget, rankings=rankings, constraints=STEPS, **options)
    assert widths_said(found, groups)
    assert costs.total(found) <= budget.target(groups, costs) + 1e-9
    lost = [sum(rankings[n].lost(w)[0] for n, w in each.items()) for each in (best, found)]
    assert lost[0] <= lost[1] + 1e-9


@settings(max_examples=40, deadline=None)
@given(case=cases(hidden=False), share=st.sampled_from([0.2, 0.5, 0.9]))
def test_a_cut_on_the_way_never_goes_below_the_last(case, share):
    groups, rankings, sparsity = case
    options = {"costs": ParameterCosts(groups), "widths": "config", "classes": classes(groups)}
    options |= {"rankings": rankings, "constraints": STEPS}
    last = allocate(groups, Budget(sparsity=sparsity), **options)
    first = allocate(groups, Budget(sparsity=sparsity), progress=share, **options)
    assert all(first[name] >= width for name, width in last.items())
    again = allocate(groups, Budget(sparsity=sparsity), current=first, **options)
    assert all(again[name] <= width for name, width in first.items())
    assert widths_said(first, groups)
    assert widths_said(again, groups)


@settings(max_examples=40, deadline=None)
@given(case=cases(hidden=False), need=st.sampled_from([0.9, 0.6, 0.3]))
def test_information_is_kept_by_the_smallest_widths_that_keep_it(case, need):
    groups, rankings, _ = case
    costs = ParameterCosts(groups)
    options = {"costs": costs, "widths": "config", "classes": classes(groups)}
    budget = Budget(keep_information=need)
    found = allocate(groups, budget, rankings=rankings, constraints=STEPS, **options)
    assert widths_said(found, groups)
    assert nats_left(groups, rankings, found, need) >= -1e-9
    for inner, heads in itertools.product(range(1, 7), range(1, 4)):
        other = {g.name: inner if g.kind == "ffn" else heads for g in groups}
        if nats_left(groups, rankings, other, need) >= 0:
            assert costs.total(found) <= costs.total(other)


def test_a_group_that_may_be_empty_keeps_units_in_a_class():
    groups = [replace(g, may_be_empty=True) for i in (0, 1) for g in layer(i)]
    bounds = resolve_bounds(STEPS, groups)
    assert {least for least, _ in bounds.values()} == {0}
    now = {g.name: g.size for g in groups}
    found = choices_of(classes(groups), groups, bounds, now, 1)
    assert min(found.fewest.values()) == 1


def test_the_tightest_bound_of_its_members_holds_for_a_class():
    groups = [*layer(0, ffn=40), *layer(1, ffn=40)]
    constraints = Constraints(floors={"0.ffn": 16}, caps={"1.ffn": 30}, multiple=8)
    bounds = resolve_bounds(constraints, groups)
    now = {g.name: g.size for g in groups}
    [inner, _] = choices_of(classes(groups), groups, bounds, now, 8).options
    assert [set(one.values()) for one in inner] == [{24}, {16}]
    pinned = resolve_bounds(Constraints(pins={"0.ffn": 20}), groups)  # which no step meets
    [inner, _] = choices_of(classes(groups), groups, pinned, now, 8).options
    assert inner == ({"0.ffn": 20, "1.ffn": 20},)
    earlier = {**now, "1.ffn": 32}
    bounds = resolve_bounds(Constraints(), groups, earlier)
    [inner, _] = choices_of(classes(groups), groups, bounds, earlier, 8).options
    assert inner[0] == {"0.ffn": 32, "1.ffn": 32}


def test_contradictions_of_a_class_are_one_error():
    groups = [*layer(0, ffn=40), *layer(1, ffn=40)]
    now = {g.name: g.size for g in groups}
    bounds = resolve_bounds(Constraints(pins={"0.ffn": 16, "1.ffn": 24}), groups)
    with pytest.raises(PruningError, match=r"'0.ffn': 16 to 16; '1.ffn': 24 to 24, which have no"):
        choices_of(classes(groups), groups, bounds, now, 8)
    empty = [replace(g, may_be_empty=True) for g in groups]
    bounds = resolve_bounds(Constraints(pins={"0.ffn": 0}), empty)
    with pytest.raises(PruningError, match="which have no width in common"):
        choices_of(classes(empty), empty, bounds, now, 8)
    refuses = classes(groups, lambda widths: False)
    with pytest.raises(PruningError, match="of which the config takes none"):
        choices_of(refuses, groups, resolve_bounds(Constraints(), groups), now, 8)


def test_numbers_that_a_config_refuses_are_no_choices():
    groups = [g for i in (0, 1) for g in layer(i, heads=8)]
    now = {g.name: g.size for g in groups}
    even = classes(groups, lambda widths: 8 % widths["0.heads"] == 0)
    [_, heads] = choices_of(even, groups, resolve_bounds(STEPS, groups), now, 1).options
    assert [one["1.heads"] for one in heads] == [8, 4, 2, 1]


def test_a_class_with_a_group_that_must_stay_stays_whole():
    groups = tied([*layer(0), *layer(1)])
    names = {g.name for g in groups} - {"hidden"}
    found = classes_of(groups, names, {"": lambda widths: True})
    assert [str(one) for one in found] == ["inner_size"]
    chosen = [g for g in groups if g.name in names]
    assert [g.name for g in groups_left_whole(chosen, found)] == ["0.heads", "1.heads"]
    whole = classes_of(groups, {g.name for g in groups}, {"": lambda widths: True})
    assert [str(one) for one in whole] == ["inner_size", "dim and n_heads"]
    assert classes_of(groups, names, {}) == ()


def test_a_budget_out_of_reach_names_the_fields():
    groups = tied([*layer(0), *layer(1)])
    chosen = groups[:-1]
    found = classes_of(groups, {g.name for g in chosen}, {"": lambda widths: True})
    options = {"costs": ParameterCosts(chosen), "widths": "config", "classes": found}
    with pytest.raises(PruningError, match=r"which can only change inner_size, at most 0\.4166"):
        check_reach(chosen, Budget(sparsity=0.9), constraints=STEPS, **options)
    with pytest.raises(PruningError, match="found no field of a Hugging Face config"):
        check_reach(chosen, Budget(sparsity=0.1), **(options | {"classes": ()}))


def test_a_class_is_named_by_its_fields():
    one = WidthClass(("dim", "n_heads"), ())
    assert str(one) == "dim and n_heads"
    assert Choices((({"a": 4}, {"a": 2}),), {"b": 3}).most == {"a": 4, "b": 3}
