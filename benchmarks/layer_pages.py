"""What the records of `layer-choice` show: tables, and a figure by criterion."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import row, with_head
from benchmarks.layer_choice import CONTROL
from benchmarks.records import Record

__all__ = ["draw_layer_choice", "layer_choice", "lost", "short"]

# Edges of the figure: perplexity as a multiple of the dense one, and points of accuracy.
RATIO, FLOOR = 3.0, -10.0
LOOKS = {
    "measured_loss": ("measured loss (ours)", "#D55E00", "*"),
    "cka": ("CKA (default)", "#CC79A7", "p"),
    "angular_run": ("run of smallest angle (Gromov et al.)", "#0072B2", "s"),
    "angle": ("angle (ShortGPT)", "#56B4E9", "o"),
    "last": ("last layers", "#009E73", "D"),
    "random": ("random", "#777777", "X"),
}
# As they are: hollow and dashed. Compensated: filled.
STYLES: dict[str, dict[str, Any]] = {
    "none": {"linestyle": (0, (3, 2)), "markerfacecolor": "white", "markeredgewidth": 1.0},
    "layerwise": {"linestyle": "-", "markeredgecolor": "white", "markeredgewidth": 0.5},
}
RIVALS = ("measured_loss", "cka", "angular_run")  # a comparison has all of them
Weights = tuple[str, int]  # the compensation and the steps after it


def mean_quality(records: Iterable[Record], prefix: str = "") -> float:
    """Accuracy in %, mean over seeds, or perplexity, geometric mean."""
    found = [*records]
    if by_perplexity(found[0]):
        return statistics.geometric_mean(float(r[f"{prefix}perplexity"]) for r in found)
    return statistics.mean(100 * float(r[f"{prefix}accuracy"]) for r in found)


def by_perplexity(record: Record) -> bool:
    """Whether a record has a perplexity, where less is better."""
    return "perplexity" in record.figures


def weights_of(record: Record) -> Weights:
    """What was done to the weights of a record."""
    return record["compensation"], record["steps"]


def in_words(weights: Weights) -> str:
    """What was done to the weights."""
    compensation, steps = weights
    if steps:
        return f"{steps} steps"
    return "as they are" if compensation == "none" else "compensated"


def shown(value: float) -> str:
    """Two digits behind the point, where it is not in thousands."""
    return f"{value:,.{0 if value >= 1000 else 2}f}"


def layer_choice(records: Sequence[Record]) -> list[str]:
    """Layers removed by each criterion, best first: in one shot, and after equal steps."""
    groups: dict[tuple[str, int, str], dict[Weights, list[Record]]] = {}
    for r in records:
        about = r["model"], -r["layers"], r["criterion"]
        groups.setdefault(about, {}).setdefault(weights_of(r), []).append(r)
    rows = []
    for (model, number, criterion), found in sorted(groups.items(), key=_by_quality):
        first = max(found.values(), key=len)
        cells = [model, str(-number), "" if criterion == CONTROL else f"`{criterion}`"]
        cells += [str(len(first)), shown(mean_quality(first, "dense_"))]
        for weights in (("none", 0), ("layerwise", 0)):
            cells.append(shown(mean_quality(found[weights])) if weights in found else "")
        after = [weights for weights in sorted(found) if weights[1]]
        values = [(mean_quality(found[w]), w[1], len(found[w])) for w in after]
        seeds = [f", {n} seed{'s' if n > 1 else ''}" if n < len(first) else "" for *_, n in values]
        parts = [f"{shown(v)} ({n}{s})" for (v, n, _), s in zip(values, seeds, strict=True)]
        cells.append("; ".join(parts))
        cells.append("; ".join(dict.fromkeys(" ".join(map(str, r["removed"])) for r in first)))
        seconds = [r["seconds"] for r in first if r.get("seconds")]
        cells.append(f"{statistics.median(seconds):.0f}" if seconds else "")
        rows.append(row(cells))
    head = ["model", "layers left", "removed by", "seeds", "dense", "as they are", "compensated"]
    return with_head([*head, "after steps", "removed", "seconds of losses"], rows)


def _by_quality(entry: tuple[tuple[str, int, str], Mapping[Weights, list[Record]]]) -> Any:
    (model, number, criterion), found = entry
    first = found[min(found, key=lambda weights: (weights[1], weights != ("none", 0)))]
    quality = mean_quality(first)
    return model, number, quality if by_perplexity(first[0]) else -quality, criterion


def short(records: Sequence[Record]) -> list[str]:
    """What each criterion costs, mean over the numbers of layers left that are compared."""
    places: dict[tuple[str, int, bool], list[Record]] = {}
    for r in records:
        if r["criterion"] != CONTROL:
            about = r["model"], r["steps"], r["compensation"] != "none"
            places.setdefault(about, []).append(r)
    rows = []
    for (model, steps, _), same in sorted(places.items()):
        found: dict[str, dict[int, list[Record]]] = {name: {} for name in LOOKS}
        for r in same:
            found[r["criterion"]].setdefault(r["layers"], []).append(r)
        common = set.intersection(*({*found[name]} for name in RIVALS))
        if not common:
            continue
        controls = controls_of(records, model, steps)
        costs = {
            name: statistics.mean(cost(mine[layers], controls) for layers in common)
            for name, mine in found.items()
            if mine.keys() >= common
        }
        ratio = by_perplexity(same[0])
        best = min(costs.values()) if ratio else max(costs.values())
        cells = [model, ", ".join(map(str, sorted(common, reverse=True)))]
        cells.append(in_words(weights_of(same[0])))
        for name in LOOKS:
            value = costs.get(name)
            word = "" if value is None else _times(value) if ratio else f"{value:+.2f}"
            cells.append(f"**{word}**" if value == best else word)
        rows.append(row(cells))
    return with_head(["model", "layers left", "weights", *(f"`{n}`" for n in LOOKS)], rows, 6)


def _times(value: float) -> str:
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3f}x"


def controls_of(records: Iterable[Record], model: str, steps: int) -> dict[int, Record]:
    """The whole model after as many steps, by seed."""
    wanted = model, CONTROL, steps
    return {r.seed: r for r in records if (r["model"], r["criterion"], r["steps"]) == wanted}


def cost(records: Sequence[Record], controls: Mapping[int, Record]) -> float:
    """What cuts cost, by their mean over seeds: points, or the perplexity in times the dense one.

    After steps, the dense model is the control of as many steps.
    """
    mine, dense = mean_quality(records), dense_quality(records, controls)
    return mine / dense if by_perplexity(records[0]) else mine - dense


def dense_quality(records: Sequence[Record], controls: Mapping[int, Record]) -> float:
    """That of the dense model that records are compared with: after steps, of the control."""
    if records[0]["steps"]:
        return mean_quality(controls[r.seed] for r in records)
    return mean_quality(records, "dense_")


def lost(records: Sequence[Record]) -> list[str]:
    """Where another criterion has a better mean than the measured loss, with the best of all."""
    cells: dict[tuple[Any, ...], dict[str, list[Record]]] = {}
    for r in records:
        if r["criterion"] != CONTROL:
            about = r["model"], -r["layers"], r["steps"], r["compensation"] != "none"
            cells.setdefault(about, {}).setdefault(r["criterion"], []).append(r)
    ranked: dict[str, list[bool]] = {name: [] for name in LOOKS}  # whether another is better
    rows, complete = [], 0
    for (model, number, *_), found in sorted(cells.items()):
        if not found.keys() >= {*RIVALS}:
            continue
        complete += 1
        sign = 1 if by_perplexity(found["cka"][0]) else -1
        qualities = {name: mean_quality(same) for name, same in found.items()}
        best = min(qualities, key=lambda name: (sign * qualities[name], name))
        for name, value in qualities.items():
            ranked[name].append(value != qualities[best])
        if qualities["measured_loss"] != qualities[best]:
            weights = in_words(weights_of(found["cka"][0]))
            names = (best, "measured_loss", "cka")
            cells_of = [model, str(-number), weights, f"`{best}`"]
            rows.append(row([*cells_of, *(shown(qualities[name]) for name in names)]))
    counts = [f"`{name}` in {sum(them)} of {len(them)}" for name, them in ranked.items()]
    lead = f"Of {complete} cells (model, layers left, what happened to the weights) another "
    lead += f"criterion is better than {', '.join(counts)}."
    head = ["model", "layers left", "weights", "best", "it has", "`measured_loss`", "`cka`"]
    return [lead, *(["", *with_head(head, rows, 3)] if rows else [])]


# ----------------------------------------------------------------------------------------- figure


def draw_layer_choice(records: Sequence[Record]) -> Figure:
    """Perplexity as a multiple of the dense one, or points of accuracy; a panel a model.

    After steps, in a panel of its own, the dense one is the control of as many steps.
    """
    places: dict[tuple[str, int], list[Record]] = {}
    for r in records:
        if r["criterion"] != CONTROL:
            places.setdefault((r["model"], r["steps"]), []).append(r)
    order = sorted(places, key=lambda place: place[1])
    order.sort(key=lambda place: place[0], reverse=True)
    lines = -(-len(order) // 2)
    height = 3.2 * lines + 1.4
    figure = Figure(figsize=(9.0, height))
    panels = [*figure.subplots(lines, 2, squeeze=False).flat]
    for axes in panels[len(order) :]:
        axes.set_visible(False)
    for (model, steps), axes in zip(order, panels, strict=False):
        _panel(axes, places[model, steps], controls_of(records, model, steps))
    bottom = 1.25 / height
    figure.subplots_adjust(0.08, bottom, 0.99, 1 - 0.3 / height, wspace=0.18, hspace=0.3)
    figure.supxlabel(
        "layers left (hollow, dashed: as they are; filled: compensated)",
        fontsize=9,
        y=bottom - 0.5 / height,
    )
    handles = {h.get_label(): h for a in panels for h in a.get_legend_handles_labels()[0]}
    legend = [handles[label] for label, _, _ in LOOKS.values() if label in handles]
    figure.legend(handles=legend, loc="lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, records: Sequence[Record], controls: Mapping[int, Record]) -> None:
    """One model: criteria by colour, compensation by line and filling; means over seeds."""
    model, steps = records[0]["model"], records[0]["steps"]
    depths = sorted({r["layers"] for r in records}, reverse=True)
    for name, (label, color, marker) in reversed(LOOKS.items()):  # ours above the others
        for compensation, style in STYLES.items():
            about = name, compensation
            same = [r for r in records if (r["criterion"], r["compensation"]) == about]
            mine = {
                place: _height([r for r in same if r["layers"] == place], controls)
                for place in sorted({r["layers"] for r in same}, reverse=True)
            }
            if not mine:
                continue
            axes.plot(
                [*mine],
                [*mine.values()],
                color=color,
                marker=marker,
                markersize=9 if marker == "*" else 6,
                linewidth=1.0,
                label=label,
                clip_on=False,
                **style,
            )
    dense = dense_quality([*{r.seed: r for r in records}.values()], controls)
    unit = f"perplexity {dense:.1f}" if by_perplexity(records[0]) else f"{dense:.1f} %"
    title = f"{model}, {steps} steps" if steps else model
    axes.set_title(f"{title}: dense {unit}", fontsize=9, loc="left")
    margin = 0.08 * max(1, depths[0] - depths[-1])
    axes.set_xlim(depths[0] + margin, depths[-1] - margin)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    if by_perplexity(records[0]):
        axes.set_yscale("log")
        axes.set_ylim(1.0, RATIO)
        axes.set_yticks([1, 1.5, 2, RATIO], ["1", "1.5", "2", f"{RATIO:g} +"])
        axes.set_ylabel("perplexity / dense perplexity", fontsize=9)
    else:
        axes.set_yscale("asinh", linear_width=1.0)
        axes.set_ylim(FLOOR, 1.0)
        ticks = [t for t in (0.5, 0, -1, -2, -5, -10) if t >= FLOOR]
        axes.set_yticks(ticks, [f"{t:+g}" if t else "0" for t in ticks])
        axes.axhline(0, color="#444444", linewidth=0.9, zorder=1)
        axes.set_ylabel("points to the dense model", fontsize=9)
    axes.minorticks_off()
    axes.grid(color="#e6e6e6", linewidth=0.5, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def _height(records: Sequence[Record], controls: Mapping[int, Record]) -> float:
    """Where a cut is drawn; what is beyond the edge stands on it."""
    found = cost(records, controls)
    return min(RATIO, found) if by_perplexity(records[0]) else max(FLOOR, found)
