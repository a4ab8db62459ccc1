"""Draws what the records of `results/summary.json` say: accuracy against size, speed and cost.

    python -m examples.benchmark.plots
    python -m examples.benchmark.plots --format png --folder runs/figures

One panel a task, one shot and every number of steps in figures of their own. What has no record, or
no latency, is not drawn, and a line says so. `python -m examples.benchmark.page` draws them too.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import CARETDOWNBASE
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from examples.benchmark.finetuned import TASKS
from examples.benchmark.looks import GROUPS, LOOKS, PACKAGE, Look
from examples.benchmark.losses import GOALS
from examples.benchmark.records import Record
from examples.benchmark.summarize import MINE, compared
from examples.benchmark.tables import Name, variant_of
from examples.benchmark.views import Plot, Point, plots, points

FOLDER = Path("docs", "figures")
FLOORS = {False: -20.0, True: -10.0}  # of one shot, and after training, in points
CURVE = 1.0  # points around zero where the axis is about linear; beyond them it is logarithmic
TICKS = (2, 1, 0.5, 0, -0.5, -1, -2, -5, -10, -20)
APART = 0.014  # between neighbours that would hide each other, as a share of their place
WIDTH, PANEL, LEGEND = 9.0, 2.6, 1.45  # inches
STYLE = {"font.size": 9.0, "svg.hashsalt": "benchmark", "axes.linewidth": 0.6}
INK = "#444444"
AIMED: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": (0, (2, 1))}
CONTROL: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": (0, (5, 2, 1, 2))}


def draw(plot: Plot) -> Figure:
    """The figure: a panel a task, and one legend below all of them."""
    tasks = sorted({record["task"] for record in plot.records})
    columns = min(2, len(tasks))
    rows = -(-len(tasks) // columns)
    height = PANEL * max(rows, 1.2) + LEGEND  # one row alone would be too flat
    figure = Figure(figsize=(WIDTH, height))
    panels = [*figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat]
    # Inches, as shares of the figure: legends of several columns are too much for automatic layout.
    figure.subplots_adjust(
        left=0.85 / WIDTH,
        right=1 - 0.1 / WIDTH,
        bottom=(LEGEND + 0.55) / height,
        top=1 - 0.3 / height,
        wspace=0.06,
        hspace=0.2,
    )
    floor, shown = FLOORS[plot.steps > 0], {variant_of(record) for record in plot.records}
    names = [name for name in LOOKS if name in shown]
    factors = apart(names) if plot.view.grouped else dict.fromkeys(names, 1.0)
    for task, axes in zip(tasks, panels, strict=False):
        records = [record for record in plot.records if record["task"] == task]
        methods = points(records, plot.view)
        panel(axes, methods, plot, factors, aimed=plot.view.grouped and task in TASKS)
        costs = [plot.view.value(r) for r in plot.controls if r["task"] == task]
        if known := [value for value in costs if value is not None]:
            axes.axvline(statistics.mean(known), zorder=2, **CONTROL)
        axes.set_title(title(task, records), fontsize=9, loc="left")
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
        panels[len(tasks) - columns].tick_params(labelbottom=True)  # nothing stands below it
    figure.supxlabel(plot.view.label, fontsize=9, y=(LEGEND + 0.1) / height, va="bottom")
    below = f"points to the dense control\n(▼ at the edge: below {signed(floor)})"
    middle = (LEGEND + 0.25 + height) / 2 / height
    figure.supylabel(below, fontsize=9, x=0.05 / WIDTH, y=middle, ha="left", ma="center")
    marks = {"goal": AIMED} if plot.view.grouped else {}
    marks |= {"dense control": CONTROL} if plot.controls else {}
    legend(figure, shown, LEGEND / height, marks)
    return figure


def apart(names: Sequence[Name]) -> dict[Name, float]:
    """Factors that move methods which share a place apart; ours stays where it is."""
    others = [name for name in names if name != MINE]
    order = [*others[: len(others) // 2], MINE, *others[len(others) // 2 :]]
    return {name: (1 + APART) ** (i - len(others) // 2) for i, name in enumerate(order)}


def title(task: str, records: Sequence[Record]) -> str:
    """A task, how good its dense control is, and how many seeds that is the mean of."""
    dense = {record["seed"]: record["dense_accuracy"] for record in records}
    seeds = f"{len(dense)} seed{'s' if len(dense) > 1 else ''}"
    return f"{task}: dense {statistics.mean(dense.values()):.1%}, {seeds}"


def panel(
    axes: Axes,
    methods: dict[Name, list[Point]],
    plot: Plot,
    factors: Mapping[Name, float],
    *,
    aimed: bool,
) -> None:
    """One task: the control at zero, what was aimed at, and every method with its spread.

    Args:
        axes: Where to draw.
        methods: The points of each.
        plot: What the figure shows.
        factors: How far each method is moved aside, the same in all panels.
        aimed: Whether goals are drawn; the larger model has none.
    """
    view, floor = plot.view, FLOORS[plot.steps > 0]
    axes.set_xscale("log")
    axes.set_yscale("asinh", linear_width=CURVE)
    axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
    axes.grid(color="#e6e6e6", linewidth=0.5, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2, width=0.6)
    for name, found in methods.items():
        there = [point._replace(place=point.place * factors[name]) for point in found]
        line(axes, LOOKS[name], there, floor)
    if aimed:
        reach = (1 + APART) ** (len(factors) / 2 + 1)
        for goal in GOALS:
            if goal.trained == (plot.steps > 0):
                place = 1 - goal.sparsity
                ends = [place / reach, place * reach]
                axes.plot(ends, [-goal.allowed] * 2, zorder=2, **AIMED)
    tops = [point.most for found in methods.values() for point in found]
    axes.set_ylim(floor, max(1.0, *axes.get_ylim()[1:], *(1.2 * top for top in tops)))
    axes.yaxis.set_major_locator(FixedLocator([t for t in TICKS if t >= floor]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: signed(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = FixedLocator(list(view.ticks)) if view.ticks else LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
    axes.xaxis.set_major_locator(ticks)
    shown = "{:.0%}" if view.percent else "{:g}"
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: shown.format(value)))


def signed(value: float) -> str:
    """A number of points with its sign, a real minus."""
    return f"{value:+g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def line(axes: Axes, look: Look, found: Sequence[Point], floor: float) -> None:
    """One method: its points with their spread, joined; those below the floor at the edge."""
    mine = look.group == PACKAGE
    places = [point.place for point in found]
    heights = [max(floor, point.mean) for point in found]
    down = [
        height - max(floor, min(p.least, height)) for p, height in zip(found, heights, strict=True)
    ]
    up = [max(p.most, height) - height for p, height in zip(found, heights, strict=True)]
    axes.errorbar(
        places,
        heights,
        yerr=[down, up],
        color=look.color,
        elinewidth=1.4 if mine else 0.8,
        linewidth=weight(look),
        alpha=1.0 if mine else 0.85,
        zorder=5 if mine else 3,
        clip_on=False,
        **marking(look),
    )
    beyond = [point.place for point in found if point.mean < floor]
    axes.plot(
        beyond,
        [floor] * len(beyond),
        linestyle="",
        marker=CARETDOWNBASE,
        color=look.color,
        markersize=6,
        clip_on=False,
        zorder=4,
    )


def weight(look: Look) -> float:
    """Width of the line of a method; ours stands out."""
    return 2.0 if look.group == PACKAGE else 0.6


def marking(look: Look) -> dict[str, Any]:
    """The marker, with a white rim that parts it from those behind it."""
    size = {"*": 11.0, "D": 4.2, "s": 4.6}.get(look.marker, 5.4)
    return {
        "marker": look.marker,
        "markersize": size,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
    }


def legend(
    figure: Figure, shown: set[Name], top: float, marks: Mapping[str, dict[str, Any]]
) -> None:
    """A column a group of methods; only those that are drawn.

    Args:
        figure: The figure.
        shown: The methods.
        top: Upper edge, as a share of the height.
        marks: Other lines that are drawn, by name.
    """
    groups = {
        group: [n for n in LOOKS if n in shown and LOOKS[n].group == group] for group in GROUPS
    }
    columns = [(group, names) for group, names in groups.items() if names]
    for index, (group, names) in enumerate(columns):
        handles = []
        for name in names:
            look = LOOKS[name]
            style = {"color": look.color, "linewidth": weight(look), **marking(look)}
            handles.append(Line2D([], [], label=look.label, **style))
        if group == PACKAGE:
            handles += [Line2D([], [], label=label, **style) for label, style in marks.items()]
        figure.legend(
            handles=handles,
            title=group,
            loc="upper left",
            bbox_to_anchor=(0.06 + 0.94 * index / len(columns), top),
            frameon=False,
            fontsize=8,
            title_fontproperties={"size": 8, "weight": "bold"},
            alignment="left",
            borderaxespad=0,
            handlelength=1.6,
            labelspacing=0.3,
        )


def save(records: Sequence[Record], folder: Path = FOLDER, ending: str = "svg") -> list[str]:
    """Draw all there is; the same records give the same files.

    Returns:
        A sentence for each figure: its path, or why there is none.
    """
    told = []
    for plot in plots(records):
        if isinstance(plot, str):
            told.append(plot)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{plot.name}.{ending}"
        with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
            undated = {"Date": None} if ending == "svg" else None
            draw(plot).savefig(path, dpi=150, facecolor="white", metadata=undated)
        told.append(str(path))
    return told


def main(given: Sequence[str] | None = None) -> None:
    """Draw the figures."""
    parser = argparse.ArgumentParser("examples.benchmark.plots", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: docs/figures")
    parser.add_argument("--format", choices=("svg", "png", "pdf"), default="svg")
    asked = parser.parse_args(given)
    print("\n".join(save(compared(), asked.folder, asked.format)))


if __name__ == "__main__":
    main()
