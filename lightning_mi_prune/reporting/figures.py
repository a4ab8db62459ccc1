"""Figures of a report as SVG: texts stay texts, colours are variables of the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_mi_prune.core.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Line",
    "bars",
    "curves",
    "drawing",
    "epochs",
    "shares",
    "stacked",
    "steps",
    "svg_of",
]

# Colours that no figure has by chance; the page replaces each by a variable, light or dark.
_INK, _LINE, _PAPER = "#010203", "#010204", "#010205"
_SERIES = tuple(f"#0102{place}0" for place in range(1, 7))
_VARIABLES = {
    _INK: "var(--ink)",
    _LINE: "var(--line)",
    _PAPER: "var(--paper)",
    "#ff0000": "var(--bad)",
    **{color: f"var(--s{place})" for place, color in enumerate(_SERIES, 1)},
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning-mi-prune",
    "text.parse_math": False,  # names of groups are no formulas
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.alpha": 0.45,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
_SIZE = (4.9, 2.9)
_WITHOUT_LABEL = 14  # bars that can each have a label


@dataclass(frozen=True)
class Line:
    """A curve with the point that was chosen on it.

    Args:
        x: Positions.
        y: Values.
        chosen: Place of the chosen point; None for none.
    """

    x: Sequence[float]
    y: Sequence[float]
    chosen: int | None = None


@contextmanager
def drawing() -> Iterator[None]:
    """A block with the style of a report; a missing glyph only leaves a box."""
    style = require("matplotlib", "plots")
    with style.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _new(width: float = _SIZE[0], height: float = _SIZE[1]) -> tuple[Figure, Axes]:
    figure: Figure = require("matplotlib.figure", "plots").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure, figure.add_subplot()


def svg_of(figure: Figure, label: str, name: str) -> str:
    """A figure as SVG for a page that holds several.

    Args:
        figure: The figure.
        label: What a screen reader reads instead.
        name: Start of all its ids, a letter and digits.
    """
    with drawing():
        for axes in figure.axes:
            for part in axes.collections:
                if type(part).__name__ == "QuadMesh":  # hundreds of paths of a colour bar
                    part.set_rasterized(True)
            for image in axes.images:
                image.set_interpolation("none")
        file = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=metadata)
    text = file.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)[0]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}" role="img" aria-label="{_attribute(label)}">'
    )
    text = head + text[text.index(">") + 1 :]
    text = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#([^")]*)', rf"\1#{name}-\2", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    return re.sub(r"\n\s*\n+", "\n", text)


def _attribute(text: str) -> str:
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ('"', "&quot;")):
        text = text.replace(sign, entity)
    return text


def curves(lines: Sequence[Line], *, x: str, y: str) -> Figure:
    """Loss curves of the layers of one kind, on a logarithmic scale; the higher, the darker."""
    with drawing():
        figure, axes = _new()
        ticker = require("matplotlib.ticker", "plots")
        top = max((max(line.y, default=0) for line in lines), default=0) or 1.0
        floor = top * 1e-6  # a logarithm has no 0
        for place, line in enumerate(lines):
            opacity = 0.3 + 0.7 * (place + 1) / len(lines)
            values = [max(floor, value) for value in line.y]
            seen = [(at, value) for at, value in zip(line.x, values, strict=True) if value > floor]
            axes.plot(
                *(zip(*seen, strict=True) if seen else ([], [])),
                color=_SERIES[0],
                alpha=opacity,
                zorder=2,
            )
            if line.chosen is not None:
                at = line.chosen
                axes.plot(
                    *([line.x[at]], [values[at]], "o"),
                    color=_SERIES[1],
                    markeredgecolor=_PAPER,
                    markersize=6.5,
                    zorder=3,
                )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlim(-2, 102)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure


def bars(
    names: Sequence[str], before: Sequence[float], after: Sequence[float], *, x: str, y: str
) -> Figure:
    """Widths: a filled bar for what stays, in an outlined one for what there was."""
    with drawing():
        figure, axes = _new()
        places = range(len(names))
        axes.bar(places, before, width=0.75, facecolor="none", edgecolor=_LINE, linewidth=1.1)
        axes.bar(places, after, width=0.75, color=_SERIES[0])
        _label(axes, names, x)
        axes.set_ylabel(y)
    return figure


def shares(
    names: Sequence[str],
    values: Sequence[float],
    marks: Sequence[float],
    *,
    x: str,
    y: str,
    labels: tuple[str, str],
) -> Figure:
    """Shares of groups, each with a mark to compare with."""
    with drawing():
        figure, axes = _new()
        places = [*range(len(names))]
        axes.vlines(places, marks, values, color=_LINE, linewidth=2, zorder=1)
        axes.plot(places, values, "o", color=_SERIES[0], markersize=6, label=labels[0])
        axes.plot(places, marks, "_", color=_SERIES[1], markersize=11, mew=2, label=labels[1])
        axes.set_ylim(-0.03, 1.05)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _label(axes, names, x)
        axes.set_ylabel(y)
        _legend(figure, 2)
    return figure


def _label(axes: Axes, names: Sequence[str], x: str) -> None:
    step = -(-len(names) // _WITHOUT_LABEL)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.set_xlabel(x)


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside upper left", ncols=columns, fontsize=8, handlelength=1.4)


def epochs(
    known: Sequence[tuple[int, float]],
    cuts: Sequence[int],
    undone: Sequence[int],
    *,
    y: str,
) -> Figure:
    """A metric over epochs; epochs that start with a cut are marked, and cuts rolled back."""
    with drawing():
        figure, axes = _new()
        ticker = require("matplotlib.ticker", "plots")
        for place, epoch in enumerate(cuts):
            label = "cut" if not place else None
            axes.axvline(epoch - 0.5, color=_SERIES[1], linewidth=1.2, label=label)
        for place, epoch in enumerate(undone):
            label = "cut that was rolled back" if not place else None
            axes.axvline(epoch - 0.5, color="#ff0000", linewidth=1.2, ls=(0, (3, 2)), label=label)
        axes.plot(*zip(*known, strict=True), "o-", color=_SERIES[0], markersize=4.5)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(y)
        if cuts or undone:
            _legend(figure, 2)
    return figure


def steps(names: Sequence[str], values: Sequence[float], *, x: str, y: str) -> Figure:
    """A share that falls from cut to cut."""
    with drawing():
        figure, axes = _new()
        axes.step(range(len(names)), values, where="post", color=_SERIES[0])
        axes.plot(range(len(names)), values, "o", color=_SERIES[0], markersize=5)
        axes.set_ylim(0, 1.05)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _label(axes, names, x)
        axes.set_ylabel(y)
    return figure


def stacked(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], *, together: bool, x: str
) -> Figure:
    """Horizontal bars of several parts, one after the other or one below the other."""
    with drawing():
        rows = len(names) * (1 if together else 0.9 + 0.4 * len(parts))
        figure, axes = _new(height=max(1.5, 0.9 + 0.36 * rows))
        left = [0.0] * len(names)
        for place, (part, values) in enumerate(parts.items()):
            color = _SERIES[place % len(_SERIES)]
            if together:
                at: list[float] = [*range(len(names))]
                axes.barh(at, values, left=left, height=0.62, color=color, label=part)
                left = [old + new for old, new in zip(left, values, strict=True)]
            else:
                size = 0.8 / len(parts)
                at = [row + (place - (len(parts) - 1) / 2) * size for row in range(len(names))]
                drawn: Any = axes.barh(at, values, height=size * 0.9, color=color, label=part)
                axes.bar_label(drawn, [f"{value:.3g}" for value in values], padding=3, fontsize=8)
        if not together:
            axes.set_xlim(right=1.13 * max((max(v, default=0) for v in parts.values()), default=1))
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(x)
        _legend(figure, 3)
    return figure
