"""Draw the figures that explain, which need no records: ``python -m tools.schematics``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

__all__ = ["FIGURES", "drawn"]

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
INK, GREY, PALE = "#222222", "#8a8a8a", "#e9eef3"
BLUE, SKY, ORANGE, AMBER = "#1f4e79", "#a9c8e4", "#D55E00", "#f2b27d"
STYLE = {"font.size": 9.0, "svg.hashsalt": "schematics", "font.family": "DejaVu Sans"}


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": GREY, "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style)


# --------------------------------------------------------------------------------- what a cut does

UNITS, INPUTS, OUTPUTS, CELL = 8, 6, 5, 0.21
REMOVED = (1, 3, 4, 6)


def _matrix(
    axes: Axes,
    left: float,
    middle: float,
    rows: int,
    columns: int,
    grey_rows: tuple[int, ...] = (),
    grey_columns: tuple[int, ...] = (),
    changed: bool = False,
) -> None:
    top = middle + rows * CELL / 2
    for row in range(rows):
        for column in range(columns):
            gone = row in grey_rows or column in grey_columns
            color = "white" if gone else AMBER if changed else SKY
            look: dict[str, Any] = {
                "facecolor": color,
                "edgecolor": GREY if gone else BLUE,
                "linewidth": 0.6,
            }
            if gone:
                look |= {"hatch": "/////"}
            place = (left + column * CELL, top - (row + 1) * CELL)
            axes.add_patch(Rectangle(place, CELL, CELL, **look))


def cut() -> Figure:
    """Two layers before and after: rows of one, columns of the other, one changed weight."""
    figure, axes = _canvas(9.0, 3.25)
    middle = 1.55
    kept = UNITS - len(REMOVED)
    first, second = 0.35, 2.35
    _matrix(axes, first, middle, UNITS, INPUTS, grey_rows=REMOVED)
    _matrix(axes, second, middle, OUTPUTS, UNITS, grey_columns=REMOVED)
    _arrow(axes, (first + INPUTS * CELL + 0.08, middle), (second - 0.08, middle))
    third, fourth = 5.55, 7.3
    _matrix(axes, third, middle, kept, INPUTS)
    _matrix(axes, fourth, middle, OUTPUTS, kept, changed=True)
    _arrow(axes, (third + INPUTS * CELL + 0.08, middle), (fourth - 0.08, middle))
    _arrow(axes, (4.3, middle), (5.25, middle))
    axes.text(4.77, middle + 0.14, "cut", ha="center", color=INK)

    def below(left: float, columns: int, text: str, color: str = INK) -> None:
        axes.text(left + columns * CELL / 2, 0.55, text, ha="center", va="top", color=color)

    below(first, INPUTS, "first layer\na row a unit")
    below(second, UNITS, "second layer\na column a unit")
    below(third, INPUTS, "the rows\nthat stay")
    below(fourth, kept, "solved again: makes up\nfor what was removed", ORANGE)
    axes.text(first, 2.95, "Before: 8 units, of which 4 will go", weight="bold", color=INK)
    axes.text(third, 2.95, "After: smaller dense layers", weight="bold", color=INK)
    axes.text(first, 2.7, "hatched: what belongs to them", color=GREY)
    axes.text(third, 2.7, "no masks, no zeros", color=GREY)
    return figure


# --------------------------------------------------------------------------------- when cuts happen


def run() -> Figure:
    """Four epochs: what is collected when, where the cut is, and how wide the model is."""
    figure, axes = _canvas(9.0, 3.2)
    begin, each, bottom = 0.35, 2.08, 0.75
    for epoch in range(4):
        left, tall = begin + epoch * each, 1.15 if epoch < 1 else 0.6
        share = 0.68  # of an epoch that is training
        for offset, width, face, label in (
            (0.0, share, SKY, "training"),
            (share, 1 - share, PALE, "validation" if not epoch else ""),
        ):
            place = (left + offset * each + 0.03, bottom)
            box = FancyBboxPatch(
                place,
                width * each - 0.06,
                tall,
                boxstyle="round,pad=0,rounding_size=0.05",
                facecolor=face,
                edgecolor=BLUE,
                linewidth=0.8,
            )
            axes.add_patch(box)
            x, y = place[0] + (width * each - 0.06) / 2, bottom + tall / 2
            axes.text(x, y, label, ha="center", va="center", fontsize=8, color=INK)
        axes.text(left + each / 2, bottom - 0.12, f"epoch {epoch}", ha="center", va="top")
    cut_at = begin + each
    axes.plot([cut_at, cut_at], [bottom - 0.02, 2.4], color=ORANGE, linewidth=2.2)
    axes.text(cut_at + 0.08, 2.27, "the cut", color=ORANGE, weight="bold", va="center")
    axes.text(
        cut_at + 0.08,
        2.02,
        "model and optimizer state become smaller,\nlearning rates and schedulers go on",
        va="top",
        color=INK,
        fontsize=8,
    )
    axes.text(begin + 0.03, 3.05, "gradients of some\ntraining steps", fontsize=8, va="top")
    _arrow(axes, (begin + 0.7, 2.6), (begin + 0.9, bottom + 1.19))
    axes.text(
        begin + 1.45, 3.05, "activations; at its end\nthe cut is decided", fontsize=8, va="top"
    )
    _arrow(axes, (begin + 1.85, 2.6), (begin + 1.72, bottom + 1.19))
    right = begin + 4 * each
    _arrow(axes, (cut_at + 0.1, 0.3), (right, 0.3))
    axes.text(
        (cut_at + right) / 2,
        0.25,
        "recovery: ordinary epochs, and faster ones",
        ha="center",
        va="top",
    )
    axes.text(begin + 0.06, 0.3, "full width", va="center", color=GREY)
    return figure


FIGURES = {"how-a-cut": cut, "how-a-run": run}


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def drawn(target: Path = FOLDER) -> list[Path]:
    """Draw all of them; the same script gives the same files."""
    paths = []
    for name, draw in FIGURES.items():
        paths.append(target / f"{name}.svg")
        draw().savefig(paths[-1], facecolor="white", metadata={"Date": None})
    return paths


if __name__ == "__main__":
    for path in drawn():
        print(path)
