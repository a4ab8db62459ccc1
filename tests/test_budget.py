from __future__ import annotations

import pytest

from lightning_mi_prune.axes import Slice, WidthAxis
from lightning_mi_prune.budget import sparsity_of, uniform_widths
from lightning_mi_prune.errors import PruningError


def encoder(layers=6, hidden=384, neurons=1536, heads=12):
    axes = []
    for i in range(layers):
        size = hidden // heads
        square = (hidden, hidden)
        axes.append(
            WidthAxis(
                f"{i}.heads",
                "heads",
                heads,
                size,
                (*(Slice(f"{i}.{p}", 0, square) for p in "qkv"), Slice(f"{i}.o", 1, square)),
                (f"{i}.o",),
                level=2 * i,
            )
        )
        axes.append(
            WidthAxis(
                f"{i}.ffn",
                "ffn",
                neurons,
                1,
                (Slice(f"{i}.up", 0, (neurons, hidden)), Slice(f"{i}.down", 1, (hidden, neurons))),
                (f"{i}.down",),
                level=2 * i + 1,
            )
        )
    return axes


def test_half_is_exactly_half():
    widths = uniform_widths(encoder(), 0.5)
    assert {widths["0.heads"], widths["5.heads"]} == {6}
    assert {widths["0.ffn"], widths["5.ffn"]} == {768}


@pytest.mark.parametrize("sparsity", [0.05, 0.1, 0.25, 0.3, 0.5, 0.61, 0.75, 0.9])
def test_the_budget_is_met_closely_and_never_missed(sparsity):
    axes = encoder()
    widths = uniform_widths(axes, sparsity, floor=0.0)
    reached = sparsity_of(axes, widths)
    assert sparsity <= reached < sparsity + 0.005
    assert all(w % 8 == 0 for name, w in widths.items() if "ffn" in name)
    assert len({w for name, w in widths.items() if "ffn" in name}) == 1
    assert len({w for name, w in widths.items() if "heads" in name}) == 1


def test_heads_alone_round_up_to_whole_heads():
    axes = [a for a in encoder() if a.kind == "heads"]
    assert set(uniform_widths(axes, 0.3).values()) == {8}


def test_floors_hold():
    widths = uniform_widths(encoder(), 0.55, floor=0.4)
    assert min(w for n, w in widths.items() if "ffn" in n) >= 0.4 * 1536
    assert min(w for n, w in widths.items() if "heads" in n) >= 5


def test_an_impossible_budget_names_what_is_possible():
    with pytest.raises(PruningError, match=r"sparsity=0.97 is out of reach.*0\.9\d+"):
        uniform_widths(encoder(), 0.97)
