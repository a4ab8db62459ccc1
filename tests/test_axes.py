from __future__ import annotations

import pytest

from lightning_mi_prune.axes import Slice, WidthAxis, as_built, count_parameters
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.errors import PruningError


def axis(name, kind="ffn", size=8, entries=1, slices=()):
    return WidthAxis(name, kind, size, entries, slices, ("down",))


def test_a_tensor_cut_along_two_axes_counts_once():
    square = (Slice("w", 0, (6, 4)),), (Slice("w", 1, (6, 4)),)
    axes = [
        axis("rows", size=6, slices=square[0]),
        axis("columns", size=2, entries=2, slices=square[1]),
    ]
    assert count_parameters(axes) == 24
    assert count_parameters(axes, {"rows": 3, "columns": 1}) == 3 * 2


def test_axes_of_a_cut_model_are_restated_as_built():
    cut = axis("a", size=3, entries=2, slices=(Slice("w", 0, (6, 4)), Slice("v", 1, (5, 6))))
    (built,) = as_built([cut], {"a": 7})
    assert built.size == 7
    assert [s.shape for s in built.slices] == [(14, 4), (5, 14)]


def test_prefix_reaches_every_name():
    moved = axis("a", slices=(Slice("w", 0, (8,)),)).prefixed("net")
    assert (moved.name, moved.slices[0].tensor, moved.readers) == ("net.a", "net.w", ("net.down",))
    assert (moved.network, moved.scope) == ("net", "net")


AXES = [axis("layer.0.ffn"), axis("layer.1.ffn"), axis("layer.0.heads", "heads")]


def test_by_itself_neurons_and_heads_are_chosen_or_whatever_there_is():
    assert choose_axes(AXES) == AXES
    assert choose_axes([axis("a"), axis("b", "pooler")]) == [axis("a")]
    assert choose_axes([axis("b", "channels")]) == [axis("b", "channels")]


def test_choose_by_kind_and_name():
    def names(**options):
        return [a.name for a in choose_axes(AXES, **options)]

    assert names(units=["ffn"]) == ["layer.0.ffn", "layer.1.ffn"]
    assert names(units=["ffn", "heads"], include=r"layer\.0") == ["layer.0.ffn", "layer.0.heads"]
    assert names(units=["ffn", "heads"], exclude="heads$") == ["layer.0.ffn", "layer.1.ffn"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": ["pooler"]}, r"'pooler'.*only units=\['ffn', 'heads'\]"),
        ({"units": ["ffn"], "include": "decoder"}, "matches no axis; the names look like"),
        ({"units": ["ffn"], "exclude": "decoder"}, "matches no axis"),
        ({"units": ["ffn"], "include": "("}, "not a regular expression"),
        ({"units": ["ffn"], "exclude": "ffn"}, "Nothing is left to prune"),
    ],
)
def test_choices_that_leave_nothing_or_match_nothing(options, message):
    with pytest.raises(PruningError, match=message):
        choose_axes(AXES, **options)
