"""Where another method is better than ours, and which goals are missed, from the records."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from examples.benchmark.finetuned import TASKS
from examples.benchmark.paired import CONFIDENCE, averaged, by_seed, cell, interval, spread
from examples.benchmark.records import Record
from examples.benchmark.recovery import STEPS
from examples.benchmark.summarize import INSIDE, MINE, aside
from examples.benchmark.tables import Name, in_words, variant_of

ROUNDING = 1e-9  # points by which sums of the same accuracies may differ


class Goal(NamedTuple):
    """What was aimed at before anything was measured: at most so many points below dense."""

    trained: bool
    sparsity: float
    allowed: float

    @property
    def aim(self) -> str:
        """Points to dense, as tables show them."""
        return f"{0 - self.allowed:.1f}"

    def counts(self, record: Record) -> bool:
        """Whether a record is of the size and the kind of training that it was set for."""
        same_size: bool = record["target_sparsity"] == self.sparsity
        return same_size and (record["steps"] > 0) == self.trained


GOALS = (
    Goal(False, 0.75, 0.5),
    Goal(False, 0.9, 2.5),
    Goal(True, 0.5, 0.0),
    Goal(True, 0.75, 0.5),
    Goal(True, 0.9, 1.5),
    Goal(True, 0.95, 3.0),
)


class Cell(NamedTuple):
    """A rival beside ours: one task, one sparsity, one number of steps."""

    steps: int
    sparsity: float
    task: str
    name: Name
    ours: dict[int, float]
    theirs: dict[int, float]
    records: list[Record]

    @property
    def gap(self) -> tuple[float, float]:
        """Ours less theirs, and half its interval: by seed where both have some, else of means."""
        common = sorted(self.ours.keys() & self.theirs.keys())
        if common:
            return interval([self.ours[seed] - self.theirs[seed] for seed in common])
        ours, theirs = (statistics.mean(side.values()) for side in (self.ours, self.theirs))
        return ours - theirs, float("nan")


def budget(steps: int) -> str:
    """A number of steps in words."""
    return f"{steps} steps" if steps else "one shot"


def cells(records: Sequence[Record]) -> list[Cell]:
    """Every cell in which there is a rival, or another way of ours, beside ours."""
    groups: dict[tuple[int, float, str], dict[Name, list[Record]]] = {}
    for record in records:
        if record["target_sparsity"]:
            about = record["steps"], record["target_sparsity"], record["task"]
            groups.setdefault(about, {}).setdefault(variant_of(record), []).append(record)
    return [
        Cell(*about, name, by_seed(names[MINE], [about[2]]), by_seed(theirs, [about[2]]), theirs)
        for about, names in sorted(groups.items())
        if MINE in names
        for name, theirs in sorted(names.items())
        if name != MINE
    ]


def lost(records: Sequence[Record]) -> list[Cell]:
    """Cells in which theirs is better, on the seeds of both or on all; the clearest come first."""

    def better(found: Cell) -> bool:
        ours, theirs = (statistics.mean(side.values()) for side in (found.ours, found.theirs))
        return found.gap[0] < -ROUNDING or theirs > ours + ROUNDING

    return sorted(
        filter(better, cells(records)), key=lambda found: (*found[:3], found.gap[0], found.name)
    )


def lost_lines(records: Sequence[Record]) -> list[str]:
    """Those cells as a table, with how many there are of how many."""
    everything, found = cells(records), lost(records)
    clear = sum(mean + half < 0 for mean, half in (each.gap for each in found))
    lines = [
        "Another method, or another way of this package, has the better mean in "
        f"{len(found)} of {len(everything)} cells (method, task, sparsity, steps); in {clear} of "
        f"them the {CONFIDENCE:.0%} interval of the paired difference lies below zero (▼). So "
        "many comparisons put some intervals there by chance.",
    ]
    if not found:
        return lines
    lines += [
        "",
        "| steps | gone | task | better than ours | points to dense; ours minus it | ours |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for each in found:
        masks = " (masks)" if any(record["masked"] for record in each.records) else ""
        shown = cell(each.theirs, each.ours) + aside(each.records, each.sparsity)
        about = [budget(each.steps), f"{each.sparsity:.0%}", each.task]
        about += [in_words(each.name) + masks, shown, f"{statistics.mean(each.ours.values()):+.2f}"]
        lines.append(f"| {' | '.join(about)} |")
    return lines


def goal_lines(records: Sequence[Record]) -> list[str]:
    """Every goal that our mean misses on a task or over all of them; how many were met.

    They were set for the smaller model and the budgets that all methods get, so the larger one and
    longer trainings have none. Beside our mean stands that with dimensions of heads, where it is.
    """
    mine, inside = (
        [r for r in records if variant_of(r) == name and r["task"] in TASKS and r["steps"] in STEPS]
        for name in (MINE, INSIDE)
    )
    met, rows, absent = 0, [], []
    for goal in GOALS:
        same, narrow = ([record for record in of if goal.counts(record)] for of in (mine, inside))
        if lacking := set(TASKS) - {record["task"] for record in same}:
            when = "after training" if goal.trained else "in one shot"
            where = f" ({', '.join(sorted(lacking))})" if same else ""
            absent.append(f"{goal.sparsity:.0%} {when}{where}")
        for steps in sorted({record["steps"] for record in same}):
            at, beside = ([r for r in of if r["steps"] == steps] for of in (same, narrow))
            tasks = sorted({record["task"] for record in at})
            for these in [*([task] for task in tasks), *averaged(at)]:
                gaps = [*by_seed(at, these).values()]
                if not gaps:  # no seed has all tasks yet
                    continue
                if statistics.mean(gaps) >= -goal.allowed - ROUNDING:
                    met += 1
                    continue
                where = these[0] if len(these) == 1 else f"mean of {len(these)} tasks"
                about = [budget(steps), f"{goal.sparsity:.0%}", where, goal.aim]
                for of in (gaps, [*by_seed(beside, these).values()]):
                    about += [spread(of), str(len(of))] if of else ["", ""]
                rows.append(f"| {' | '.join(about)} |")
    lines = [
        f"Of {met + len(rows)} goals, each for one task or for the mean of all, {met} "
        f"{'is' if met == 1 else 'are'} met "
        f"and {len(rows)} missed by our mean. "
        + (f"Not measured yet: {'; '.join(absent)}." if absent else "All goals were measured.")
    ]
    if rows:
        head = ["steps", "gone", "task", "goal", "points to dense", "seeds"]
        head += ["dimensions of heads too", "seeds"]
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    return lines
