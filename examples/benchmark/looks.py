"""How each method looks in every figure: one colour and marker, and where the legend has it.

Colours say what ranks, markers say what cuts. Colours are those of Okabe and Ito, which people with
any colour vision can tell apart; markers tell all methods of one colour apart in grey, too.
"""

from dataclasses import dataclass

from examples.benchmark.summarize import INSIDE, MINE
from examples.benchmark.tables import Name

VERMILLION, ORANGE, BLUE, SKY = "#D55E00", "#E69F00", "#0072B2", "#56B4E9"
GREEN, PURPLE, GREY, BLACK = "#009E73", "#CC79A7", "#999999", "#222222"

PACKAGE = "this\npackage"
SCORES = "other scores,\nnothing of ours"
HELPED = "other scores,\nour widths and refit"
LIBRARY = "torch-pruning\n(DepGraph)"
OTHERS = "whole layers, masks,\nmovement"
GROUPS = (PACKAGE, SCORES, HELPED, LIBRARY, OTHERS)


@dataclass(frozen=True)
class Look:
    """How a method is drawn.

    Args:
        label: Its name below the heading of its group.
        group: One of `GROUPS`.
        color: Of markers, lines and spreads.
        marker: Of matplotlib.
    """

    label: str
    group: str
    color: str
    marker: str


RANKED = {
    "taylor": ("Taylor", BLUE),
    "activation-norm": ("activation norm", SKY),
    "magnitude": ("magnitude", GREEN),
    "random": ("random", GREY),
}
LOOKS: dict[Name, Look] = {
    MINE: Look("relevance MI", PACKAGE, VERMILLION, "*"),
    INSIDE: Look("inside heads too", PACKAGE, VERMILLION, "v"),
    ("mi-topk", "uniform", "none", 1): Look("MI, top-k", SCORES, ORANGE, "o"),
    **{
        (method, "uniform", "none", 1): Look(label, SCORES, color, "o")
        for method, (label, color) in RANKED.items()
    },
    **{
        (method, "global", "refit", 1): Look(label, HELPED, color, "^")
        for method, (label, color) in RANKED.items()
    },
    **{
        (f"torch-pruning-{method}", widths, "none", 1): Look(
            f"{RANKED[method][0]}, {widths}", LIBRARY, RANKED[method][1], marker
        )
        for method in ("taylor", "magnitude")
        for widths, marker in (("uniform", "s"), ("global", "D"))
    },
    ("first-layers", "uniform", "none", 1): Look("first layers", OTHERS, PURPLE, "p"),
    ("cka-layers", "uniform", "none", 1): Look("layers by CKA", OTHERS, PURPLE, ">"),
    ("small-dense", "uniform", "none", 1): Look("small dense model", OTHERS, PURPLE, "d"),
    ("magnitude-masks", "global", "none", 1): Look("magnitude masks", OTHERS, GREEN, "X"),
    ("movement-masks", "uniform", "none", 1): Look("movement masks", OTHERS, BLACK, "P"),
    ("movement-masks", "global", "none", 1): Look("the same, global", OTHERS, BLACK, "X"),
    ("movement-units", "uniform", "none", 1): Look("movement of units", OTHERS, BLACK, "s"),
}
