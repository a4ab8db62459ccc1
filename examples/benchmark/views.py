"""What accuracy is drawn against, and which figures the records are enough for."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from examples.benchmark.looks import LOOKS
from examples.benchmark.records import Record
from examples.benchmark.recovery import DENSE, STEPS
from examples.benchmark.tables import Name, difference, variant_of


@dataclass(frozen=True)
class View:
    """What accuracy is drawn against.

    Args:
        name: For the name of the file.
        label: Of the horizontal axis.
        title: For the page.
        value: Where a record is on that axis; None where that was not measured.
        ticks: On the axis, which is logarithmic; none for matplotlib's own.
        percent: Whether values are shares.
        grouped: Whether methods share places, so that they must be moved apart.
        control: Whether the dense control has a place of its own there.
        remedy: What to do where no record has a value.
    """

    name: str
    label: str
    title: str
    value: Callable[[Record], float | None]
    ticks: tuple[float, ...] = ()
    percent: bool = False
    grouped: bool = False
    control: bool = False
    remedy: str = "python -m examples.benchmark.recovery"


class Point(NamedTuple):
    """A method at one sparsity, over the seeds."""

    place: float
    mean: float
    least: float
    most: float


class Plot(NamedTuple):
    """A figure that can be drawn."""

    name: str
    steps: int
    view: View
    records: list[Record]
    controls: list[Record]


def left(record: Record) -> float:
    """Share of the prunable parameters that is left."""
    return 1 - float(record["sparsity"])


def speed_up(rows: int) -> Callable[[Record], float | None]:
    """How many times as fast as the dense model at a batch size."""

    def value(record: Record) -> float | None:
        dense, pruned = (record.get(f"{side}latency_ms_b{rows}") for side in ("dense_", ""))
        return dense / pruned if dense and pruned else None

    return value


def cost(record: Record) -> float | None:
    """CPU seconds of pruning and training, and of the evidence that the method needs."""
    parts = record.get("cpu_seconds"), record.get("evidence_cpu_seconds")
    return None if None in parts else sum(part for part in parts if part)


VIEWS = (
    View(
        "parameters",
        "prunable parameters that are left (methods moved apart)",
        "Accuracy and size",
        left,
        ticks=(0.1, 0.25, 0.5),
        percent=True,
        grouped=True,
    ),
    *(
        View(
            f"speed-b{rows}",
            f"measured speed-up over the dense model, batch of {rows}",
            f"Accuracy and speed, batch of {rows}",
            speed_up(rows),
            ticks=(1, 1.5, 2, 3, 4, 6, 8),
            remedy="python -m examples.benchmark.latency",
        )
        for rows in (32, 1)
    ),
    View(
        "cost",
        "CPU seconds of evidence, pruning and training",
        "Accuracy and cost",
        cost,
        control=True,
        remedy="python -m examples.benchmark.evidence",
    ),
)


def plots(records: Sequence[Record]) -> Iterator[Plot | str]:
    """What can be drawn, and for the rest a sentence that says why not.

    Only the budgets that all methods are compared at: few were measured at others.
    """
    pruned = [r for r in records if r["target_sparsity"] and variant_of(r) in LOOKS]
    if not pruned:
        yield "There are no records yet: python -m examples.benchmark.recovery"
    for steps in sorted({record["steps"] for record in pruned} & set(STEPS)):
        prefix = f"{steps}-steps" if steps else "one-shot"
        for view in VIEWS:
            found = [r for r in pruned if r["steps"] == steps and view.value(r) is not None]
            # Without a training step the control costs nothing.
            own = view.control and steps
            controls = [r for r in records if own and r["steps"] == steps and is_control(r)]
            if found:
                yield Plot(f"{prefix}-{view.name}", steps, view, found, controls)
            else:
                yield f"No {prefix}-{view.name}: no record has it yet; {view.remedy} measures it."


def is_control(record: Record) -> bool:
    """Whether nothing was pruned."""
    return bool(record["method"] == DENSE.method)


def points(records: Sequence[Record], view: View) -> dict[Name, list[Point]]:
    """Methods of one task, in the order of `LOOKS`: a point for each sparsity."""
    found: dict[Name, dict[float, list[tuple[float, float]]]] = {name: {} for name in LOOKS}
    for record in records:
        place = view.value(record)
        if place is not None:
            groups = found[variant_of(record)].setdefault(record["target_sparsity"], [])
            groups.append((place, difference(record)))
    return {
        name: [
            Point(statistics.mean(p for p, _ in pairs), statistics.mean(gaps), min(gaps), max(gaps))
            for _, pairs in sorted(groups.items())
            if (gaps := [gap for _, gap in pairs])
        ]
        for name, groups in found.items()
        if groups
    }
