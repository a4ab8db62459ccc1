"""What the records of `layer-choice` show: a table, and a figure by criterion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import points, row, with_head
from benchmarks.records import Record

__all__ = ["draw_layer_choice", "layer_choice"]

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


def layer_choice(records: Sequence[Record]) -> list[str]:
    """Layers removed in one shot by each criterion, best first, with and without compensation."""
    groups: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        about = r["model"], -r["layers"], r["criterion"]
        groups.setdefault(about, {})[r["compensation"]] = r
    rows = []
    for (model, number, criterion), found in sorted(groups.items(), key=_by_quality):
        first = next(iter(found.values()))
        cells = [model, f"{_quality(first, 'dense_'):.2f}", str(-number), f"`{criterion}`"]
        shown = {c: _quality(r) for c, r in found.items()}
        cells += [
            f"{shown[c]:,.{0 if shown[c] >= 1000 else 2}f}" if c in shown else ""
            for c in ("none", "layerwise")
        ]
        cells += [" ".join(map(str, first["removed"]))]
        cells += [f"{first.get('seconds'):.0f}" if first.get("seconds") else ""]
        rows.append(row(cells))
    head = ["model", "dense", "layers left", "removed by", "as they are", "compensated", "removed"]
    return with_head([*head, "seconds of losses"], rows)


def _quality(record: Record, prefix: str = "") -> float:
    """Perplexity, or accuracy in %."""
    perplexity: float | None = record.get(f"{prefix}perplexity")
    return perplexity if perplexity is not None else 100 * float(record[f"{prefix}accuracy"])


def _by_quality(entry: tuple[tuple[Any, ...], Mapping[str, Record]]) -> tuple[Any, ...]:
    (model, number, criterion), found = entry
    first = next(iter(found.values()))
    quality = _quality(first)
    return model, number, quality if "perplexity" in first.figures else -quality, criterion


# ----------------------------------------------------------------------------------------- figure


def draw_layer_choice(records: Sequence[Record]) -> Figure:
    """Perplexity as a multiple of the dense one, or points of accuracy; a panel a model."""
    models = sorted({r["model"] for r in records}, reverse=True)
    lines = -(-len(models) // 2)
    height = 3.2 * lines + 1.4
    figure = Figure(figsize=(9.0, height))
    panels = [*figure.subplots(lines, 2, squeeze=False).flat]
    for axes in panels[len(models) :]:
        axes.set_visible(False)
    for model, axes in zip(models, panels, strict=False):
        _panel(axes, model, [r for r in records if r["model"] == model])
    bottom = 1.25 / height
    figure.subplots_adjust(0.08, bottom, 0.99, 1 - 0.3 / height, wspace=0.18, hspace=0.3)
    figure.supxlabel(
        "layers left (hollow, dashed: as they are; filled: compensated)",
        fontsize=9,
        y=bottom - 0.5 / height,
    )
    handles = {h.get_label(): h for a in panels for h in a.get_legend_handles_labels()[0]}
    shown = [handles[label] for label, _, _ in LOOKS.values() if label in handles]
    figure.legend(handles=shown, loc="lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _panel(axes: Axes, model: str, records: Sequence[Record]) -> None:
    """One model: criteria by colour, compensation by line and filling."""
    by_perplexity = "perplexity" in records[0].figures
    depths = sorted({r["layers"] for r in records}, reverse=True)
    for name, (label, color, marker) in reversed(LOOKS.items()):  # ours above the others
        for compensation, style in STYLES.items():
            about = name, compensation
            same = [r for r in records if (r["criterion"], r["compensation"]) == about]
            mine = {r["layers"]: _height(r) for r in same}
            if not mine:
                continue
            places = sorted(mine, reverse=True)
            axes.plot(
                places,
                [mine[place] for place in places],
                color=color,
                marker=marker,
                markersize=9 if marker == "*" else 6,
                linewidth=1.0,
                label=label,
                clip_on=False,
                **style,
            )
    dense = _quality(records[0], "dense_")
    unit = f"perplexity {dense:.1f}" if by_perplexity else f"{dense:.1f} %"
    axes.set_title(f"{model}: dense {unit}", fontsize=9, loc="left")
    margin = 0.08 * max(1, depths[0] - depths[-1])
    axes.set_xlim(depths[0] + margin, depths[-1] - margin)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    if by_perplexity:
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


def _height(record: Record) -> float:
    """Where a record is drawn; what is beyond the edge stands on it."""
    if "perplexity" in record.figures:
        return min(RATIO, float(record["perplexity"] / record["dense_perplexity"]))
    return max(FLOOR, points(record))
