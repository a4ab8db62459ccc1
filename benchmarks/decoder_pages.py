"""What the records of `decoders` show: tables and a figure of perplexity against what is gone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.comparison import after, row, with_head
from benchmarks.decoders import DENSE, FLAP, LIBRARY, OURS, name_of
from benchmarks.methods import Name
from benchmarks.records import Record

__all__ = ["draw_decoders", "facts", "lost", "tables"]

PLACE = ("model", "units", "steps", "task")
RATIO = 5.0  # to the dense perplexity, at the edge of the figure
ORANGE, BLUE, SKY, GREEN, PURPLE, GREY = (
    "#D55E00",
    "#0072B2",
    "#56B4E9",
    "#009E73",
    "#CC79A7",
    "#777777",
)
LOOKS: dict[Name, tuple[str, str, str]] = {
    OURS.name: ("ours", ORANGE, "*"),
    ("relevance-mi", "global", "compensation"): ("ours without reconstruction", ORANGE, "v"),
    ("activation-norm", "uniform", "none"): ("activation norm (Wanda-like)", SKY, "o"),
    ("activation-norm", "global", "layerwise"): ("activation norm, ours else", SKY, "^"),
    ("activation-norm", "global", "compensation"): ("activation norm, our compensation", SKY, "v"),
    (FLAP, "global", "bias"): ("FLAP", GREEN, "s"),
    ("fluctuation", "global", "layerwise"): ("FLAP's score, ours else", GREEN, "^"),
    ("fluctuation", "global", "compensation"): ("FLAP's score, our compensation", GREEN, "v"),
    ("taylor", "global", "layerwise"): ("Taylor, ours else", BLUE, "^"),
    ("taylor", "global", "compensation"): ("Taylor, our compensation", BLUE, "v"),
    (f"{LIBRARY}taylor", "uniform", "none"): ("torch-pruning, Taylor", BLUE, "D"),
    ("magnitude", "uniform", "none"): ("magnitude", PURPLE, "o"),
    ("random", "uniform", "none"): ("random", GREY, "o"),
}


def ran(records: Iterable[Record]) -> list[Record]:
    """Records of methods that ran."""
    return [record for record in records if "failed" not in record.figures]


def mean_perplexity(records: Iterable[Record]) -> float | None:
    """Geometric mean over seeds; None without any."""
    values = [float(record["perplexity"]) for record in ran(records)]
    return statistics.geometric_mean(values) if values else None


def places(records: Iterable[Record]) -> dict[tuple[object, ...], list[Record]]:
    """Records by model, units, steps and task."""
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in PLACE), []).append(record)
    return dict(sorted(found.items(), key=str))


def named(place: Sequence[object]) -> str:
    """A model, what is cut of it and when, in words."""
    model, units, steps, _ = place
    what = {"ffn": "neurons", "ffn+heads": "neurons and KV heads with their queries"}[str(units)]
    return f"{model}, {what}, {after(int(str(steps)))}"


def facts(records: Sequence[Record]) -> list[str]:
    """Models, dense perplexities and what was measured on."""
    rows = []
    for model in sorted({record["model"] for record in records}):
        same = [record for record in ran(records) if record["model"] == model]
        if not same:
            continue
        seeds = ", ".join(map(str, sorted({record.seed for record in same})))
        dense = same[0]
        cells = [model, f"{dense['dense_parameters'] / 1e6:.1f}", f"{dense['n_test']:,}", seeds]
        cells += [f"{dense['dense_perplexity']:.1f}", f"{dense['dense_macs'] / 1e9:.1f}"]
        rows.append(row([*cells, str(len(same))]))
    head = ["model", "parameters, M", "tokens tested on", "seeds", "dense perplexity"]
    head += ["dense MACs of a piece, G", "records"]
    cpus = sorted({record.machine["cpu"] for record in records})
    return [*with_head(head, rows), "", f"Processors: {', '.join(cpus)}."]


def tables(records: Sequence[Record]) -> list[str]:
    """A table for each model, units and steps: rows are methods, columns are sparsities."""
    lines: list[str] = []
    for place, same in places(records).items():
        pruned = [record for record in same if record["method"] != DENSE.method]
        sparsities = sorted({record["sparsity"] for record in pruned})
        names = dict.fromkeys(name_of(record) for record in pruned)
        rows: list[tuple[float, str]] = []
        for name in names:
            mine = [record for record in pruned if name_of(record) == name]
            cells, values = [], []
            for sparsity in sparsities:
                found = [record for record in mine if record["sparsity"] == sparsity]
                value = mean_perplexity(found)
                failed = bool(found) and value is None
                cells.append("does not run" if failed else "" if value is None else shown(value))
                values.append(float("inf") if value is None else value)
            seconds = [record["cpu_seconds"] for record in ran(mine)]
            label = [f"**{part}**" if name == OURS.name else part for part in name]
            share = [record["macs"] / record["dense_macs"] for record in ran(mine)]
            cells.append(f"{min(share):.0%} .. {max(share):.0%}" if share else "")
            cells.append(f"{statistics.median(seconds):.0f}" if seconds else "")
            middle = values[len(values) // 2]
            rows.append((middle, row([*label, *cells])))
        dense = next(iter(ran(same)))["dense_perplexity"]
        control = mean_perplexity(r for r in same if r["method"] == DENSE.method)
        lead = f"Dense perplexity {dense:.1f}"
        lead += f"; {control:.1f} after as many steps." if control is not None else "."
        head = ["method", "widths", "compensation", *(f"{s:.0%} gone" for s in sparsities)]
        body = with_head([*head, "MACs left", "CPU s"], [line for _, line in sorted(rows)])
        lines += [f"### {named(place)}", "", lead, "", *body, ""]
    return lines[:-1]


def shown(perplexity: float) -> str:
    """Three digits or more, thousands apart."""
    return f"{perplexity:,.0f}" if perplexity >= 1000 else f"{perplexity:.1f}"


def lost(records: Sequence[Record]) -> list[str]:
    """Where another method, or another variant of ours, has the lower perplexity."""
    rows, cells = [], 0
    for place, same in places(records).items():
        for sparsity in sorted({r["sparsity"] for r in same if r["method"] != DENSE.method}):
            here = [r for r in ran(same) if r["sparsity"] == sparsity]
            mine = mean_perplexity(r for r in here if name_of(r) == OURS.name)
            if mine is None:
                continue
            for name in sorted({name_of(r) for r in here} - {OURS.name}):
                theirs = mean_perplexity(r for r in here if name_of(r) == name)
                cells += 1
                if theirs is not None and theirs < mine:
                    about = [named(place), f"{sparsity:.0%}", f"`{name[0]}`, {', '.join(name[1:])}"]
                    rows.append(row([*about, shown(theirs), shown(mine)]))
    lead = f"Another method, or another variant of ours, is better in {len(rows)} of {cells} cells."
    head = ["model, units, steps", "gone", "better than ours", "perplexity", "ours"]
    return [lead, *(["", *with_head(head, rows, 2)] if rows else [])]


# ----------------------------------------------------------------------------------------- figure


def draw_decoders(records: Sequence[Record]) -> Figure:
    """Perplexity, as a multiple of the dense one, against the share removed; a panel a model."""
    panels = {place: same for place, same in places(ran(records)).items() if place[2] == 0}
    lines = -(-len(panels) // 2)
    height = 3.0 * lines + 1.9
    figure = Figure(figsize=(9.0, height))
    axes_of = [*figure.subplots(lines, 2, sharex=True, sharey=True, squeeze=False).flat]
    for axes in axes_of[len(panels) :]:
        axes.set_visible(False)
    for (place, same), axes in zip(panels.items(), axes_of, strict=False):
        _frame(axes)
        axes.tick_params(labelbottom=axes in axes_of[: len(panels)][-2:])  # nothing is below these
        dense = same[0]["dense_perplexity"]
        axes.set_title(f"{place[0]}, {place[1]}: dense {dense:.1f}", fontsize=9, loc="left")
        for name, (label, color, marker) in LOOKS.items():
            mine = [record for record in same if name_of(record) == name]
            found = {
                sparsity: mean_perplexity(r for r in mine if r["sparsity"] == sparsity)
                for sparsity in sorted({r["sparsity"] for r in mine})
            }
            if not found:
                continue
            heights = [min(RATIO, (value or 0.0) / dense) for value in found.values()]
            ours = name == OURS.name
            axes.plot(
                [*found],
                heights,
                color=color,
                marker=marker,
                markersize=10 if ours else 5,
                linewidth=2.0 if ours else 0.8,
                markeredgecolor="white",
                markeredgewidth=0.5,
                label=label,
                zorder=4 if ours else 3,
                clip_on=False,
            )
    bottom = 1.6 / height
    figure.subplots_adjust(0.08, bottom, 0.99, 1 - 0.3 / height, wspace=0.06, hspace=0.2)
    figure.supxlabel(
        "share of the prunable parameters removed", fontsize=9, y=bottom - 0.5 / height
    )
    figure.supylabel("perplexity / dense perplexity", fontsize=9)
    handles = {h.get_label(): h for a in axes_of for h in a.get_legend_handles_labels()[0]}
    legend = [handles[label] for label, _, _ in LOOKS.values() if label in handles]
    figure.legend(handles=legend, loc="lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _frame(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.set_ylim(1.0, RATIO)
    axes.set_yticks([1, 1.5, 2, 3, RATIO], ["1", "1.5", "2", "3", f"{RATIO:g} +"])
    axes.set_xticks([0.15, 0.25, 0.4], ["15%", "25%", "40%"])
    axes.minorticks_off()
    axes.grid(color="#e6e6e6", linewidth=0.5, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
