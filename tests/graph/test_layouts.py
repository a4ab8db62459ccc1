"""Layouts against the same blocks as tensors of indices, on random nested ones."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.layouts import (
    kept_positions,
    layout_from_json,
    layout_names,
    layout_size,
    layout_terms,
    map_layout,
    unit_positions,
)

NAMES = ("a", "b", "c")


def random_layout(draw, depth=2):
    def factor():
        choice = draw.random()
        if choice < 0.5:
            return draw.choice(NAMES)
        return draw.randint(1, 3) if choice < 0.8 or not depth else random_layout(draw, depth - 1)

    blocks = range(draw.randint(1, 3))
    return tuple(tuple(factor() for _ in range(draw.randint(1, 3))) for _ in blocks)


def drawn(seed):
    draw = random.Random(seed)  # noqa: S311
    widths = {name: draw.randint(1, 4) for name in NAMES}
    kept = {
        name: sorted(draw.sample(range(size), draw.randint(0, size)))
        for name, size in widths.items()
        if draw.random() < 0.8
    }
    return random_layout(draw), kept, widths


def size_of(layout, widths):
    def size(factor):
        if isinstance(factor, tuple):
            return size_of(factor, widths)
        return widths[factor] if isinstance(factor, str) else factor

    return sum(math.prod(map(size, block)) for block in layout)


def selected(layout, kept, widths):
    """Kept positions as tensors: each block has a dimension for each factor."""
    found, start = [], 0
    for block in layout:
        alone = [((factor,),) for factor in block]
        index = torch.arange(size_of((block,), widths)) + start
        start += len(index)
        index = index.reshape([size_of(one, widths) for one in alone])
        for dim, factor in enumerate(block):
            if isinstance(factor, tuple):
                index = index.index_select(dim, selected(factor, kept, widths))
            elif factor in kept:
                index = index.index_select(dim, torch.tensor(kept[factor], dtype=torch.long))
        found.append(index.flatten())
    return torch.cat(found)


@pytest.mark.parametrize("seed", range(60))
def test_kept_positions_are_those_of_tensors_with_a_dimension_for_each_factor(seed):
    layout, kept, widths = drawn(seed)
    assert layout_size(layout, widths) == size_of(layout, widths)
    assert kept_positions(layout, kept, widths) == selected(layout, kept, widths).tolist()
    narrow = widths | {name: len(units) for name, units in kept.items()}
    assert len(kept_positions(layout, kept, widths)) == layout_size(layout, narrow)


@pytest.mark.parametrize("seed", range(60))
def test_terms_are_the_size_as_a_polynomial(seed):
    layout, _, widths = drawn(seed)
    terms = layout_terms(layout)
    for at in (widths, {name: width + 3 for name, width in widths.items()}):
        value = sum(n * math.prod(at[name] for name in names) for names, n in terms.items())
        assert value == layout_size(layout, at)
    assert {name for names in terms for name in names} == set(layout_names(layout))


@pytest.mark.parametrize("seed", range(60))
def test_units_have_entries_of_their_own_and_equally_many(seed):
    layout, _, widths = drawn(seed)
    for name in layout_names(layout):
        units = unit_positions(layout, name, widths)
        places = [place for unit in units for place in unit]
        assert len(units) == widths[name]
        assert len(places) == len(set(places))
        assert len({len(unit) for unit in units}) == 1
        for unit, mine in enumerate(units):  # without one of several units its entries go
            others = [other for other in range(widths[name]) if other != unit]
            assert not {*mine} & {*kept_positions(layout, {name: others}, widths)}


@pytest.mark.parametrize("seed", range(20))
def test_cuts_one_after_another_are_one_cut(seed):
    layout, kept, widths = drawn(seed)
    places = torch.arange(layout_size(layout, widths))
    now = dict(widths)
    for name, units in kept.items():
        places = places[kept_positions(layout, {name: units}, now)]
        now[name] = len(units)
    assert places.tolist() == kept_positions(layout, kept, widths)


@pytest.mark.parametrize("seed", range(20))
def test_layouts_return_from_json_and_follow_names(seed):
    layout, _, widths = drawn(seed)
    assert layout_from_json(json.loads(json.dumps(layout))) == layout
    moved = map_layout(layout, "net.{}".format)
    assert layout_names(moved) == tuple(f"net.{name}" for name in layout_names(layout))
    assert map_layout(moved, lambda name: name.removeprefix("net.")) == layout
    (fixed,) = layout_terms(map_layout(layout, widths.__getitem__)).items()
    assert fixed == ((), layout_size(layout, widths))


@pytest.mark.parametrize(
    "value",
    [None, "a", 3, {}, ["a"], [[None]], [[1.5]], [[True]], [[-1]], [[["a"]]], [[{"a": 1}]]],
)
def test_what_is_no_layout_is_refused(value):
    with pytest.raises(PruningError, match="is not a layout"):
        layout_from_json(value)


def test_a_layout_nested_too_deep_is_refused():
    value = ["a"]
    for _ in range(100):
        value = [[value]]
    with pytest.raises(PruningError, match="is not a layout"):
        layout_from_json(value)
