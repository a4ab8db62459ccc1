from __future__ import annotations

import pytest

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    PrunableDim,
    count_parameters,
)


def group(name, kind="ffn", size=8, tensors=()):
    return DependencyGroup(name, kind, size, tensors, ("down",))


def test_a_tensor_in_two_groups_counts_once():
    rows = PrunableDim("w", 0, (6, 4), (("rows",),))
    columns = PrunableDim("w", 1, (6, 4), (("columns", 2),))
    groups = [
        group("rows", size=6, tensors=(rows,)),
        group("columns", size=2, tensors=(columns,)),
    ]
    assert count_parameters(groups) == 24
    assert count_parameters(groups, {"rows": 3, "columns": 1}) == 3 * 2


def test_prefix_reaches_every_name():
    moved = group("a", tensors=(PrunableDim("w", 0, (8,), (("a",),)),)).prefixed("net")
    assert (moved.name, moved.tensors[0].tensor, moved.consumers) == (
        "net.a",
        "net.w",
        ("net.down",),
    )
    assert (moved.network, moved.scope) == ("net", "net")


GROUPS = [group("layer.0.ffn"), group("layer.1.ffn"), group("layer.0.heads", "heads")]


def test_by_itself_neurons_and_heads_are_chosen_or_whatever_there_is():
    assert choose_groups(GROUPS) == GROUPS
    assert choose_groups([group("a"), group("b", "pooler")]) == [group("a")]
    assert choose_groups([group("b", "channels")]) == [group("b", "channels")]


def test_choose_by_kind_and_name():
    def names(**options):
        return [a.name for a in choose_groups(GROUPS, **options)]

    assert names(kinds=["ffn"]) == ["layer.0.ffn", "layer.1.ffn"]
    assert names(kinds=["ffn", "heads"], include=r"layer\.0") == ["layer.0.ffn", "layer.0.heads"]
    assert names(kinds=["ffn", "heads"], exclude="heads$") == ["layer.0.ffn", "layer.1.ffn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["pooler"]}, r"'pooler'.*this model has \['ffn', 'heads'\]"),
        ({"kinds": ["ffn"], "include": "decoder"}, "matches no group; the names look like"),
        ({"kinds": ["ffn"], "exclude": "decoder"}, "matches no group"),
        ({"kinds": ["ffn"], "include": "("}, "not a regular expression"),
        ({"kinds": ["ffn"], "exclude": "ffn"}, "Nothing is left to prune"),
    ],
)
def test_choices_that_leave_nothing_or_match_nothing(options, message):
    with pytest.raises(PruningError, match=message):
        choose_groups(GROUPS, **options)


def test_dimensions_of_heads_that_nothing_ranks_are_refused_by_name():
    dims = DependencyGroup("0.head_dim", "head_dim", 8, (), ("out",))
    ffn = DependencyGroup("0.ffn", "ffn", 8, (), ("down",))
    assert choose_groups([dims, ffn]) == [ffn]
    with pytest.raises(PruningError, match=r"'head_dim'.* names 0\.head_dim, which no layer reads"):
        choose_groups([dims, ffn], kinds=["ffn", "head_dim"])
