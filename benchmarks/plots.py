"""Accuracy against size and speed: a figure a number of steps and view, a panel a task."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import name_of, points
from benchmarks.decoder_pages import draw_decoders
from benchmarks.latency import BATCHES, shape_of
from benchmarks.layer_pages import draw_layer_choice
from benchmarks.methods import OURS, Name
from benchmarks.records import FOLDER, Record, Store

__all__ = ["FIGURES", "SHOWN", "drawn"]

FLOORS = {0: -20.0, 100: -10.0}  # of the axis, in points: one shot, and after so many steps
FLOOR = -4.0  # after a whole training
TICKS = (2, 1, 0.5, 0, -0.5, -1, -2, -5, -10, -20)
APART = 0.014  # between methods that would hide each other, as a share of their place
STYLE = {"font.size": 9.0, "svg.hashsalt": "benchmark", "axes.linewidth": 0.6}
# Figures of their own, from all records of the case of that name.
OWN = {"decoders": draw_decoders, "layer-choice": draw_layer_choice}
FRONT = "accuracy-latency"  # the one of the README
# By the docs; the others can be drawn.
SHOWN = (FRONT, "100-steps-size", "100-steps-speed-b32", "vision-macs", *OWN)

# Colours of Okabe and Ito, which people with any colour vision can tell apart: what ranks. Markers:
# what cuts. Methods without records in most tasks are not drawn.
BLUE, SKY, GREEN, PURPLE, BLACK = "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#222222"
LOOKS: dict[Name, tuple[str, str, str]] = {
    OURS.name: ("ours", "#D55E00", "*"),
    ("relevance-mi-head-dim", *OURS.name[1:]): ("ours, head dimensions too", "#D55E00", "v"),
    ("relevance-mi-macs", *OURS.name[1:]): ("ours, by MACs", "#D55E00", "^"),
    ("taylor", "uniform", "none"): ("Taylor", BLUE, "o"),
    ("activation-norm", "uniform", "none"): ("activation norm", SKY, "o"),
    ("taylor", "global", "reconstruction"): ("Taylor, our widths and reconstruction", BLUE, "^"),
    ("activation-norm", "global", "reconstruction"): ("activation norm, the same", SKY, "^"),
    ("torch-pruning-taylor", "uniform", "none"): ("torch-pruning, Taylor", BLUE, "s"),
    ("torch-pruning-taylor", "global", "none"): ("torch-pruning, Taylor, global", BLUE, "D"),
    ("torch-pruning-magnitude", "uniform", "none"): ("torch-pruning, magnitude", GREEN, "s"),
    ("torch-pruning-magnitude", "global", "none"): ("torch-pruning, magnitude, global", GREEN, "D"),
    ("magnitude-masks", "global", "none"): ("magnitude masks", GREEN, "X"),
    ("movement-units", "uniform", "none"): ("movement pruning", BLACK, "P"),
    ("first-layers", "uniform", "none"): ("first layers", PURPLE, "p"),
    ("cka-layers", "uniform", "none"): ("layers by CKA", PURPLE, ">"),
    ("small-dense", "uniform", "none"): ("small dense model", PURPLE, "d"),
}
LABELS = {"size": "prunable parameters that are left (methods moved apart)"}
LABELS |= {f"speed-b{rows}": f"measured speed-up, batch of {rows}" for rows in BATCHES}
XTICKS: dict[str, tuple[float, ...]] = {"size": (0.1, 0.25, 0.5)} | {
    f"speed-b{rows}": (1, 1.5, 2, 3, 4, 6, 8) for rows in BATCHES
}
FIGURES = [f"{steps}-{view}" for steps in ("one-shot", "100-steps") for view in LABELS]
LABELS["macs"] = "multiply-accumulates that are left"
XTICKS["macs"] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
FIGURES += ["vision-macs", FRONT, *OWN]
# What the README compares, on one task; names without the words of the other figures.
FRONT_TASK, FRONT_STEPS, FRONT_ROWS, FRONT_FLOOR = "trec-6", 100, 32, -12.0
FRONT_METHODS: dict[Name, tuple[str, str]] = {
    OURS.name: ("this package", "#D55E00"),
    ("taylor", "global", "reconstruction"): ("Taylor score in this package", BLUE),
    ("torch-pruning-taylor", "uniform", "none"): ("torch-pruning, Taylor", SKY),
    ("movement-units", "uniform", "none"): ("movement pruning", BLACK),
    ("torch-pruning-magnitude", "uniform", "none"): ("torch-pruning, magnitude", GREEN),
    ("cka-layers", "uniform", "none"): ("whole layers by CKA", PURPLE),
}


def place_of(record: Record, shapes: Mapping[str, Record], view: str) -> float | None:
    """Where a record is on the horizontal axis; None where that was not measured."""
    if view == "size":
        return float(1 - record["reached"])
    if view == "macs":
        return float(record["macs"] / record["dense_macs"])
    shape, rows = shapes.get(shape_of(record["task"], record["kept"])), view.partition("-")[2]
    return float(shape[f"dense_ms_{rows}"] / shape[f"ms_{rows}"]) if shape else None


def draw(records: Sequence[tuple[Record, float]], view: str) -> Figure:
    """A panel a task, and one legend below all of them."""
    tasks = sorted({record["task"] for record, _ in records})
    lines = -(-len(tasks) // 2)
    height = 2.6 * lines + 1.9
    figure = Figure(figsize=(9.0, height))
    panels = [*figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False).flat]
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    names = [name for name in LOOKS if any(name_of(record) == name for record, _ in records)]
    for task, axes in zip(tasks, panels, strict=False):
        same = [(record, place) for record, place in records if record["task"] == task]
        _frame(axes, view, FLOORS.get(records[0][0]["steps"], FLOOR))
        for index, name in enumerate(names):
            moved = (1 + APART) ** (index - len(names) // 2) if view == "size" else 1.0
            _method(axes, name, [(r, moved * x) for r, x in same if name_of(r) == name])
        dense = {record.seed: record["dense_accuracy"] for record, _ in same}
        title = f"{task}: dense {statistics.mean(dense.values()):.1%}, seeds: {len(dense)}"
        axes.set_title(title, fontsize=9, loc="left")
    bottom, top = 1.9 / height, 1 - 0.3 / height
    figure.subplots_adjust(0.08, bottom, 0.99, top, wspace=0.06, hspace=0.2)
    figure.supxlabel(LABELS[view], fontsize=9, y=bottom - 0.55 / height)
    figure.supylabel("points to the dense control", fontsize=9, y=(bottom + top) / 2)
    handles = {h.get_label(): h for axes in panels for h in axes.get_legend_handles_labels()[0]}
    shown = [*handles.values()]
    figure.legend(handles=shown, loc="lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _frame(axes: Axes, view: str, floor: float) -> None:
    axes.set_xscale("log")
    axes.set_yscale("asinh", linear_width=1.0)
    axes.set_ylim(floor, 2.0)
    axes.axhline(0, color="#444444", linewidth=0.9, zorder=1)
    axes.grid(color="#e6e6e6", linewidth=0.5, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_yticks(
        [t for t in TICKS if t >= floor], [f"{t:+g}" if t else "0" for t in TICKS if t >= floor]
    )
    shown = "{:g}" if view.startswith("speed") else "{:.0%}"
    axes.set_xticks(XTICKS[view], [shown.format(tick) for tick in XTICKS[view]])
    axes.minorticks_off()


def _method(axes: Axes, name: Name, records: Sequence[tuple[Record, float]]) -> None:
    """Means over the seeds with their range; those below the axis stand at its edge."""
    floor = axes.get_ylim()[0]
    places, heights, down, up = [], [], [], []
    for sparsity in sorted({record["sparsity"] for record, _ in records}):
        same = [(points(r), place) for r, place in records if r["sparsity"] == sparsity]
        gaps = [max(floor, gap) for gap, _ in same]
        places.append(statistics.mean(place for _, place in same))
        heights.append(max(floor, statistics.mean(gap for gap, _ in same)))
        down.append(max(0.0, heights[-1] - min(gaps)))
        up.append(max(0.0, max(gaps) - heights[-1]))
    label, color, marker = LOOKS[name]
    ours = name == OURS.name
    look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 10 if ours else 5}
    look |= {"markeredgecolor": "white", "markeredgewidth": 0.5, "elinewidth": 0.8}
    look |= {"linewidth": 2.0 if ours else 0.6, "label": label, "clip_on": False}
    axes.errorbar(places, heights, yerr=[down, up], **look)


def draw_front(records: Sequence[tuple[Record, float]]) -> Figure:
    """Means over the seeds of one task: points against measured speed-up."""
    figure = Figure(figsize=(7.2, 3.5))
    axes = figure.add_axes((0.09, 0.14, 0.89, 0.8))
    axes.set_xscale("log")
    axes.set_xlim(0.95, 9.0)
    axes.set_ylim(FRONT_FLOOR, 1.5)
    axes.axhline(0, color="#444444", linewidth=0.9, zorder=1)
    axes.text(8.9, 0.2, "the dense model, trained alike", ha="right", fontsize=8, color="#444444")
    axes.grid(color="#e6e6e6", linewidth=0.5, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xticks(XTICKS["speed-b32"], [f"{tick:g}x" for tick in XTICKS["speed-b32"]])
    axes.minorticks_off()
    axes.set_xlabel(f"times as fast as the dense model, measured with batches of {FRONT_ROWS}")
    axes.set_ylabel("accuracy, points to the dense model")
    for name, (label, color) in FRONT_METHODS.items():
        mine = [(record, place) for record, place in records if name_of(record) == name]
        means = []
        for sparsity in sorted({record["sparsity"] for record, _ in mine}):
            same = [(points(r), place) for r, place in mine if r["sparsity"] == sparsity]
            means.append((statistics.mean(x for _, x in same), statistics.mean(y for y, _ in same)))
        if not means:
            continue
        ours = name == OURS.name
        look: dict[str, Any] = {"color": color, "marker": "o", "markersize": 6 if ours else 4}
        look |= {"linewidth": 2.6 if ours else 1.2, "zorder": 3 if ours else 2}
        axes.plot(*zip(*means, strict=True), label=label, **look)
    axes.legend(loc="lower left", fontsize=8, frameon=False, borderaxespad=0.2)
    return figure


def records_of(name: str, folder: Path) -> tuple[list[Record], str]:
    """The records that a figure is drawn from, and what it has on its horizontal axis."""
    if name.startswith("vision-"):
        return [*Store("vision", folder)], name.removeprefix("vision-")
    if name == FRONT:
        found = Store("recovery", folder).find(steps=FRONT_STEPS, task=FRONT_TASK)
        return found, f"speed-b{FRONT_ROWS}"
    steps, view = (0 if name.startswith("one") else 100), name.split("-", 2)[2]
    return Store("recovery", folder).find(steps=steps), view


@matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
def drawn(names: Sequence[str], target: Path, folder: Path = FOLDER) -> list[Path]:
    """Draw figures by name; the same records give the same files."""
    shapes = {shape_of(r["task"], r["kept"]): r for r in Store("latency", folder)}
    paths = []
    for name in names:
        if name in OWN:
            if known := [*Store(name, folder)]:
                paths.append(_saved(OWN[name](known), target / f"{name}.svg"))
            continue
        records, view = records_of(name, folder)
        same = [r for r in records if r["sparsity"]]
        places = [(r, place_of(r, shapes, view)) for r in same if name_of(r) in LOOKS]
        if found := [(r, place) for r, place in places if place is not None]:
            figure = draw_front(found) if name == FRONT else draw(found, view)
            paths.append(_saved(figure, target / f"{name}.svg"))
    return paths


def _saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    return path
