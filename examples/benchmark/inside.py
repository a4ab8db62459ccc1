"""What it changes that dimensions of heads may go, too."""

from collections.abc import Sequence

from examples.benchmark.losses import budget
from examples.benchmark.records import Record
from examples.benchmark.summarize import INSIDE, MINE, NATS, POINTS, ahead, averaged, by_seed, cell
from examples.benchmark.tables import Name, in_words, variant_of

TAYLOR: Name = ("taylor", *MINE[1:])
HEAD = ("steps", "gone", "task", "seeds")


def inside_lines(records: Sequence[Record]) -> list[str]:
    """A row for each task, sparsity and number of steps; nothing without records.

    Args:
        records: Those that are compared.
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
    return [*lines, ""]
