"""Differences between two methods on the same seeds, in means with Student intervals."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from examples.benchmark.records import Record
from examples.benchmark.tables import difference

CONFIDENCE = 0.95


class Measure(NamedTuple):
    """What a table shows of a record beside its dense control: more is better."""

    of: Callable[[Record], float]
    digits: int


def nats(record: Record) -> float:
    """Cross-entropy of the dense control less that of the record: below zero is worse."""
    return float(record["dense_cross_entropy"] - record["cross_entropy"])


POINTS = Measure(difference, 2)
NATS = Measure(nats, 3)


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


def by_seed(
    records: Iterable[Record], tasks: Sequence[str], measure: Measure = POINTS
) -> dict[int, float]:
    """A measure by seed, averaged over the tasks; seeds that lack one are out."""
    found: dict[int, dict[str, float]] = {}
    for record in records:
        found.setdefault(record["seed"], {})[record["task"]] = measure.of(record)
    return {
        seed: statistics.mean(values[task] for task in tasks)
        for seed, values in sorted(found.items())
        if set(tasks) <= values.keys()
    }


def cell(
    theirs: Mapping[int, float], ours: Mapping[int, float] | None, digits: int = POINTS.digits
) -> str:
    """Mean to the dense control, and how much better ours is on the seeds that both have."""
    if not theirs:
        return ""
    shown = f"{statistics.mean(theirs.values()):+.{digits}f}"
    better = "" if ours is None else ahead(ours, theirs, digits)
    return f"{shown}; {better}" if better else shown


def ahead(ours: Mapping[int, float], theirs: Mapping[int, float], digits: int) -> str:
    """How much better ours is on the seeds that both have; nothing where there are none."""
    common = sorted(theirs.keys() & ours.keys())
    if not common:
        return ""
    gaps = [ours[seed] - theirs[seed] for seed in common]
    mean, half = interval(gaps)
    # A leading mark where the interval says that ours is better or worse.
    mark = "▲" if mean - half > 0 else "▼" if mean + half < 0 else ""
    return mark + spread(gaps, digits)


def spread(gaps: Sequence[float], digits: int = POINTS.digits) -> str:
    """Mean with its interval, where there are several.

    Example:
        >>> spread([1.0, 2.0, 3.0]), spread([0.25], 3)
        ('+2.00 ± 2.48', '+0.250')
    """
    mean, half = interval(gaps)
    return f"{mean:+.{digits}f}" + (f" ± {half:.{digits}f}" if len(gaps) > 1 else "")


def averaged(records: Iterable[Record]) -> list[list[str]]:
    """Tasks that means go over: those of one model with two seeds or more, where it has several.

    A task with one seed would leave one seed of all others, too.
    """
    found: dict[tuple[str, str], set[int]] = {}
    for record in records:
        found.setdefault((record["model"], record["task"]), set()).add(record["seed"])
    tasks: dict[str, list[str]] = {}
    for (model, task), seeds in sorted(found.items()):
        if len(seeds) > 1:
            tasks.setdefault(model, []).append(task)
    return [same for same in tasks.values() if len(same) > 1]
