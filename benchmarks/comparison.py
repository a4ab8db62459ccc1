"""What the records of `recovery` show: means over seeds, paired differences, where ours loses."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.methods import OURS, Name
from benchmarks.records import Record

__all__ = [
    "facts",
    "front",
    "lost",
    "name_of",
    "nats",
    "points",
    "row",
    "spread",
    "tables",
    "with_head",
]

CONFIDENCE = 0.95
ROUNDING = 1e-9  # points by which sums of the same accuracies may differ
TOLERANCE = 0.02  # by which the removed share may differ before a table shows it
MINE = OURS.name
INSIDE: Name = ("relevance-mi-head-dim", *MINE[1:])


def points(record: Record) -> float:
    """Accuracy less that of the dense control, in points."""
    return 100 * float(record["accuracy"] - record["dense_accuracy"])


def nats(record: Record) -> float:
    """Cross-entropy of the dense control less that of the record: below zero is worse."""
    return float(record["dense_cross_entropy"] - record["cross_entropy"])


MEASURES = {"points": (points, 2), "nats": (nats, 3)}  # with digits; more is better


def name_of(record: Record) -> Name:
    """Method, widths and weights of a record."""
    return record["method"], record["widths"], record["weights"]


def after(steps: int) -> str:
    """A number of steps in words."""
    return f"{steps} steps" if steps else "one shot"


def row(cells: Iterable[str]) -> str:
    """A row of a table in markdown."""
    return f"| {' | '.join(cells)} |"


def with_head(head: Sequence[str], rows: Iterable[str], numbers: int = 0) -> list[str]:
    """A table in markdown, whose last columns may be numbers."""
    columns = "|---" * (len(head) - numbers) + "|---:" * numbers + "|"
    return [row(head), columns, *rows]


def interval(gaps: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its two-sided Student interval; not a number for one value.

    Example:
        >>> mean, half = interval([1.0, 2.0, 3.0])
        >>> round(mean, 2), round(half, 2)
        (2.0, 2.48)
    """
    if len(gaps) < 2:
        return statistics.mean(gaps), float("nan")
    from scipy.stats import t  # nothing else here needs it

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(gaps) - 1))
    return statistics.mean(gaps), quantile * statistics.stdev(gaps) / len(gaps) ** 0.5


def spread(gaps: Sequence[float], digits: int = 2) -> str:
    """Mean with its interval, where there are several."""
    mean, half = interval(gaps)
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if len(gaps) > 1 else "")


def by_seed(
    records: Iterable[Record], tasks: Sequence[str], measure: str = "points"
) -> dict[int, float]:
    """A measure by seed, averaged over the tasks; seeds that lack one are out."""
    found: dict[int, dict[str, float]] = {}
    for record in records:
        found.setdefault(record.seed, {})[record["task"]] = MEASURES[measure][0](record)
    return {
        seed: statistics.mean(values[task] for task in tasks)
        for seed, values in sorted(found.items())
        if set(tasks) <= values.keys()
    }


def averaged(records: Iterable[Record]) -> list[list[str]]:
    """Tasks to average over: those of one model with two seeds or more, where it has several.

    A task with one seed would leave one seed of all others, too.
    """
    found: dict[tuple[str, str], set[int]] = {}
    for record in records:
        found.setdefault((record["model"], record["task"]), set()).add(record.seed)
    tasks: dict[str, list[str]] = {}
    for (model, task), seeds in sorted(found.items()):
        if len(seeds) > 1:
            tasks.setdefault(model, []).append(task)
    return [same for same in tasks.values() if len(same) > 1]


def cell(theirs: Mapping[int, float], ours: Mapping[int, float] | None, digits: int) -> str:
    """Mean to the dense control, and how much better ours is on the seeds that both have."""
    if not theirs:
        return ""
    shown = f"{statistics.mean(theirs.values()):+.{digits}f}"
    common = sorted(theirs.keys() & (ours or {}).keys())
    if not ours or not common:
        return shown
    gaps = [ours[seed] - theirs[seed] for seed in common]
    mean, half = interval(gaps)
    sign = "▲" if mean - half > 0 else "▼" if mean + half < 0 else ""
    return f"{shown}; {sign}{spread(gaps, digits)}"


def aside(records: Sequence[Record], asked: float) -> str:
    """The share that was removed, where it is not the asked one: whole layers are coarse."""
    removed = statistics.mean(record["reached"] for record in records)
    return f" ({removed:.0%} removed)" if abs(removed - asked) > TOLERANCE else ""


def facts(records: Sequence[Record]) -> list[str]:
    """Tasks, seeds and dense controls, and what was measured on."""
    counts = sorted({record["steps"] for record in records})
    rows = []
    for task in sorted({record["task"] for record in records}):
        same = [record for record in records if record["task"] == task]
        known = (sorted({record[name] for record in same}) for name in ("n_test", "seed"))
        cells = [task, *(", ".join(map(str, values)) for values in known)]
        for steps in counts:
            # A dense control belongs to a seed, however many records name it.
            dense = {r.seed: r["dense_accuracy"] for r in same if r["steps"] == steps}
            cells.append(f"{statistics.mean(dense.values()):.2%}" if dense else "")
        rows.append(row(cells))
    head = ["task", "test rows", "seeds", *(f"dense, {after(steps)}" for steps in counts)]
    models, cpus = {r["model"] for r in records}, {r.machine["cpu"] for r in records}
    means = "; ".join(", ".join(tasks) for tasks in averaged(records)) or "none yet"
    lead = f"{len(records)} records; model: {', '.join(sorted(models))}; processors: "
    lead += f"{', '.join(sorted(cpus))}. Means are over tasks of one model with two seeds or more: "
    return [*with_head(head, rows), "", f"{lead}{means}."]


def table(records: Sequence[Record], tasks: Sequence[str], measure: str = "points") -> list[str]:
    """Rows are methods, columns are sparsities; all records have one number of steps."""
    digits = MEASURES[measure][1]
    sparsities = sorted({r["sparsity"] for r in records if r["sparsity"]})
    names: dict[Name, dict[float, list[Record]]] = {}
    for record in records:
        if record["task"] in tasks and record["sparsity"]:
            groups = names.setdefault(name_of(record), {})
            groups.setdefault(record["sparsity"], []).append(record)
    rows: list[tuple[float, str]] = []
    for name, groups in names.items():
        values = {s: by_seed(groups.get(s, []), tasks, measure) for s in sparsities}
        cells = []
        for sparsity in sparsities:
            ours = by_seed(names.get(MINE, {}).get(sparsity, []), tasks, measure)
            shown = cell(values[sparsity], ours if name != MINE else None, digits)
            cells.append(shown + aside(groups.get(sparsity, []), sparsity) if shown else "")
        if seeds := max(map(len, values.values())):
            average = statistics.mean(v for found in values.values() for v in found.values())
            rows.append((-average, row([*name, str(seeds), *cells])))
    head = ["method", "widths", "weights", "seeds", *(f"{s:.0%} sparsity" for s in sparsities)]
    return with_head(head, [line for _, line in sorted(rows)])


def tables(records: Sequence[Record], measure: str = "points") -> list[str]:
    """For every number of steps a table over all tasks of a model; of points one a task, too."""
    lines: list[str] = []
    for steps in sorted({record["steps"] for record in records}):
        same = [record for record in records if record["steps"] == steps]
        single = [[task] for task in sorted({record["task"] for record in same})]
        for chosen in [*averaged(same), *(single if measure == "points" else [])]:
            title = after(steps).capitalize() + ("" if measure == "points" else f", {measure}")
            where = chosen[0] if len(chosen) == 1 else f"mean of {len(chosen)} tasks"
            lines += [f"### {title}, {where}", ""]
            lines += [*table(same, chosen, measure), ""]
    return lines[:-1]


def lost(records: Sequence[Record]) -> list[str]:
    """Where another method is better than ours: task, sparsity and steps, the clearest first."""
    groups: dict[tuple[int, float, str], dict[Name, list[Record]]] = {}
    for record in records:
        if record["sparsity"]:
            about = record["steps"], record["sparsity"], record["task"]
            groups.setdefault(about, {}).setdefault(name_of(record), []).append(record)
    rows, cells, clear = [], 0, 0
    for (steps, sparsity, task), names in sorted(groups.items()):
        ours, found = by_seed(names.get(MINE, []), [task]), []
        for name, same in names.items():
            theirs = by_seed(same, [task])
            if name == MINE or not ours:
                continue
            cells += 1
            means = [statistics.mean(side.values()) for side in (ours, theirs)]
            gaps = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
            mean, half = interval(gaps or [means[0] - means[1]])
            if mean < -ROUNDING or means[1] > means[0] + ROUNDING:
                clear += mean + half < 0
                method = f"`{name[0]}`, {', '.join(name[1:])}".removesuffix(", none")
                masks = " (masks)" if any(record["masked"] for record in same) else ""
                shown = cell(theirs, ours, 2) + aside(same, sparsity)
                line = [after(steps), f"{sparsity:.0%}", task, method + masks, shown]
                found.append((mean, name, row([*line, f"{means[0]:+.2f}"])))
        rows += [line for *_, line in sorted(found)]
    head = ["steps", "sparsity", "task", "better than ours", "points; ours minus it", "ours"]
    lead = (
        f"Another method, or another variant of ours, has the better mean in {len(rows)} of {cells}"
        f" cells (method, task, sparsity, steps); in {clear} of them the {CONFIDENCE:.0%} interval"
        " of the paired difference lies below zero (▼). With so many cells, some do by chance."
    )
    return [lead, "", *with_head(head, rows)]


# --------------------------------------------------------------------------------------- in short

FRONT_COLUMNS = ((0, 0.75), (0, 0.9), (100, 0.5), (100, 0.75), (100, 0.9))
FRONT_ROWS: dict[Name, str] = {
    MINE: "**ours**",
    INSIDE: "**ours**, head dimensions too",
    ("taylor", "global", "reconstruction"): "Taylor, our widths and reconstruction",
    ("activation-norm", "global", "reconstruction"): "activation norm, the same",
    ("torch-pruning-taylor", "uniform", "none"): "torch-pruning, Taylor",
    ("activation-norm", "uniform", "none"): "activation norm",
    ("movement-units", "uniform", "none"): "movement pruning of heads and neurons",
    ("magnitude-masks", "global", "none"): "magnitude masks (not faster)",
    ("torch-pruning-magnitude", "uniform", "none"): "torch-pruning, magnitude",
    ("small-dense", "uniform", "none"): "fewer layers, fine-tuned from the start",
    ("cka-layers", "uniform", "none"): "layers by CKA",
}


def front(records: Sequence[Record]) -> list[str]:
    """The comparison in short: one task, then the mean over all of a model; for the README."""
    lines: list[str] = []
    for tasks in [["trec-6"], *averaged(records)]:
        gaps: dict[tuple[Name, int, float], list[float]] = {}
        for name in FRONT_ROWS:
            for steps, sparsity in FRONT_COLUMNS:
                about = name, steps, sparsity
                same = [r for r in records if (name_of(r), r["steps"], r["sparsity"]) == about]
                gaps[about] = [*by_seed(same, tasks).values()]
        seeds = [len(gaps[MINE, steps, sparsity]) for steps, sparsity in FRONT_COLUMNS]
        rows = [row(["*seeds*", *(f"*{number}*" for number in seeds)])]
        for name, label in FRONT_ROWS.items():
            values = [gaps[name, steps, sparsity] for steps, sparsity in FRONT_COLUMNS]
            cells = [_front_cell(v, number) for v, number in zip(values, seeds, strict=True)]
            rows += [row([label, *cells])] if any(cells) else []
        title = "TREC-6" if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
        head = [title, *(f"{after(n)}, {sparsity:.0%} sparsity" for n, sparsity in FRONT_COLUMNS)]
        lines += [*with_head(head, rows), ""]
    return lines[:-1]


FEW_ROWS = {
    MINE: "**this package**",
    INSIDE: "**this package**, dimensions of heads too",
    ("taylor", "global", "reconstruction"): "Taylor score in this package",
    ("torch-pruning-taylor", "uniform", "none"): "torch-pruning, Taylor score",
}


def few(records: Sequence[Record]) -> list[str]:
    """Means over all tasks of a model, for the README."""
    (tasks,) = averaged(records)
    rows = []
    for name, label in FEW_ROWS.items():
        cells = []
        for steps, sparsity in FRONT_COLUMNS:
            about = name, steps, sparsity
            same = [r for r in records if (name_of(r), r["steps"], r["sparsity"]) == about]
            found = [*by_seed(same, tasks).values()]
            cells.append(f"{statistics.mean(found):+.1f}" if found else "")
        rows.append(row([label, *cells]))
    head = [f"{after(n)}, {sparsity:.0%} removed" for n, sparsity in FRONT_COLUMNS]
    return with_head(["", *head], rows, len(head))


def _front_cell(gaps: Sequence[float], seeds: int) -> str:
    if not gaps:
        return ""
    mean = statistics.mean(gaps)
    shown = f"{mean:+.2f}" if abs(mean) < 10 else f"{mean:+.1f}"
    shown += f" ({min(gaps):+.1f} .. {max(gaps):+.1f})" if len(gaps) > 1 else ""
    return shown + (f", {len(gaps)} seeds" if len(gaps) != seeds else "")
