"""What it changes that dimensions of heads may go, too."""

import statistics
from collections.abc import Sequence

from examples.benchmark import latency
from examples.benchmark.losses import budget
from examples.benchmark.paired import NATS, POINTS, ahead, averaged, by_seed, cell
from examples.benchmark.records import Record
from examples.benchmark.summarize import INSIDE, MINE
from examples.benchmark.tables import Name, in_words, variant_of

TAYLOR: Name = ("taylor", *MINE[1:])
HEAD = ("steps", "gone", "task", "seeds")
ROWS = (1, 32)  # of the batches that are timed


def inside_lines(records: Sequence[Record], shapes: Sequence[Record] = ()) -> list[str]:
    """A row for each task, sparsity and number of steps; nothing without records.

    Args:
        records: Those that are compared.
        shapes: Latencies of shapes.
    """
    names = {name: [r for r in records if variant_of(r) == name] for name in (INSIDE, MINE, TAYLOR)}
    if not names[INSIDE]:
        return []
    head = [*HEAD]
    for what in ("points", "nats"):
        head += [what, f"than `{MINE[0]}`", f"than `{TAYLOR[0]}`"]
    lines = [
        "## Dimensions of heads",
        "",
        f"{in_words(INSIDE)}: heads may become narrower as well as fewer. Points and nats to the "
        "dense control, mean over the seeds, below zero is worse; beside them how much more that "
        "is than ours without, and than Taylor with our widths and refit, paired by seed, with a "
        "95% Student interval (▲ better, ▼ worse).",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for steps, sparsity in sorted({(r["steps"], r["target_sparsity"]) for r in names[INSIDE]}):
        same = {
            name: [r for r in of if (r["steps"], r["target_sparsity"]) == (steps, sparsity)]
            for name, of in names.items()
        }
        tasks = sorted({record["task"] for record in same[INSIDE]})
        for these in [*([task] for task in tasks), *averaged(same[INSIDE])]:
            where = these[0] if len(these) == 1 else f"**mean of {len(these)} tasks**"
            cells = [budget(steps), f"{sparsity:.0%}", where]
            cells.append(str(len(by_seed(same[INSIDE], these))))
            for measure in (POINTS, NATS):
                mine, *others = (by_seed(of, these, measure) for of in same.values())
                cells.append(cell(mine, None, measure.digits))
                cells += [ahead(mine, theirs, measure.digits) for theirs in others]
            if cells[3] != "0":  # else no seed has all tasks yet
                lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", *pace_lines(names[INSIDE] + names[MINE], shapes)]


def pace_lines(records: Sequence[Record], shapes: Sequence[Record]) -> list[str]:
    """What dimensions do to speed, of shapes of one model that one processor ran.

    Args:
        records: Those with and without dimensions.
        shapes: Latencies of shapes.
    """
    timed = {latency.shape_of(shape): shape for shape in shapes}
    pairs: dict[tuple[float, str, int, str], dict[Name, Record]] = {}
    for record in records:
        shape = None if record["steps"] else timed.get(latency.shape_of(record))
        if shape is not None:
            cpu = shape["machine"]["cpu"]
            place = record["target_sparsity"], record["task"], record["seed"], cpu
            pairs.setdefault(place, {})[variant_of(record)] = shape
    found: dict[float, list[tuple[float, float]]] = {}
    for (sparsity, *_), two in pairs.items():
        if len(two) == 2:
            rates = [two[MINE][f"latency_ms_b{n}"] / two[INSIDE][f"latency_ms_b{n}"] for n in ROWS]
            found.setdefault(sparsity, []).append((rates[0], rates[1]))
    if not found:
        return []
    said = [
        f"{sparsity:.0%} gone ({len(rates)} pairs): "
        + ", ".join(
            f"{statistics.median(of):.2f} ({min(of):.2f} .. {max(of):.2f}) at batch {n}"
            for n, of in zip(ROWS, zip(*rates, strict=True), strict=True)
        )
        for sparsity, rates in sorted(found.items())
    ]
    return [
        "More and narrower heads are not as fast as fewer whole ones. Speed as a share of that "
        "without dimensions, for the same task, seed and processor, median (least .. most): "
        f"{'; '.join(said)}.",
        "",
    ]
