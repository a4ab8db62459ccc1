"""Widths that compete by measured milliseconds, with as many parameters gone.

    python -m examples.benchmark.by_time
    python -m examples.benchmark.by_time --sparsities 0.75 --seeds 0

Run it on a machine that does nothing else. A table of latencies of a batch is measured first; then
the budget of milliseconds is sought that takes as many parameters as a budget of parameters would,
so that only the layout differs. `lengths` times these shapes beside the others.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from examples.benchmark.finetuned import SEEDS, finetuned
from examples.benchmark.oneshot import FOLDER, Subject, cut, examine, identity, machine, tested
from examples.benchmark.options import positive, quiet, share
from examples.benchmark.records import Record, load, write
from examples.benchmark.texts import inputs_of, typical
from examples.benchmark.variants import OURS
from lightning_mi_prune import Budget, PruningError
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.budget import sparsity_of
from lightning_mi_prune.clock import cached_table, device_of, measure_table
from lightning_mi_prune.competition import allot
from lightning_mi_prune.latency import LatencyTable
from lightning_mi_prune.method import Method
from lightning_mi_prune.milliseconds import LatencyCosts
from lightning_mi_prune.plan import Ranking
from lightning_mi_prune.sample import Example

RESULTS = Path(__file__).parent / "results" / "by_time.json"
TASK = "trec-6"
WIDTHS = "time"  # in the place of "global" or "uniform"
ROWS = 32  # of the batch that is timed
SPARSITIES = (0.5, 0.75, 0.9)
HALVINGS = 20  # a millionth of the dense time


@dataclass(frozen=True)
class Paced:
    """Ours with a budget of milliseconds.

    Args:
        ms: The budget.
        table: File of the latencies that it is counted in.
        cuts: Cuts on the way to the budget.
    """

    ms: float
    table: Path
    cuts: int = OURS.cuts

    def at(self, sparsity: float, seed: int, positions: int) -> Method:
        """The package's method; the sparsity is what the milliseconds were sought for."""
        method = OURS.at(sparsity, seed, positions)
        budget = Budget(target_latency_ms=self.ms)
        return replace(method, budget=budget, latency_table=str(self.table), latency_batch=ROWS)


def table_of(subject: Subject, path: Path, seconds: float) -> LatencyTable:
    """Latencies of the task's median batch; measured where the file is not there.

    Args:
        subject: The dense model and its evidence.
        path: The file.
        seconds: Time for each width.
    """
    call = Example((), inputs_of(ROWS, typical(subject.test)))
    calls = dict.fromkeys(subject.heard.examples, call)
    return cached_table(
        path,
        lambda: measure_table(subject.model, subject.axes, calls, seconds=seconds),
        device_of(subject.model, calls),
    )


def rankings_of(subject: Subject, sparsity: float) -> Mapping[str, Ranking]:
    """The order of every axis, as ours has it."""
    method, whole = OURS.at(sparsity, subject.seed, 1), full_plan(subject.axes)
    chosen = method.decide(subject.model, subject.axes, subject.chosen, whole, subject.heard)
    return {} if chosen is None else chosen.plan.rankings


def milliseconds(subject: Subject, table: LatencyTable, sparsity: float) -> float:
    """A budget of time that takes as many parameters, and a little more of which does not.

    Args:
        subject: The dense model and its evidence.
        table: What widths take.
        sparsity: Share of the prunable parameters that must go.

    Raises:
        LookupError: If none does: the last of the parameters saves no time.
    """
    rankings, costs = rankings_of(subject, sparsity), LatencyCosts(table, subject.axes)

    def gone(ms: float) -> float | None:
        budget = Budget(target_latency_ms=ms)
        try:
            widths = allot(subject.chosen, budget, costs=costs, rankings=rankings)
        except PruningError:  # faster than this model can be
            return None
        return sparsity_of(subject.chosen, widths)

    def enough(ms: float) -> bool:
        share = gone(ms)
        return share is None or share >= sparsity

    found = bisected(enough, table.dense_ms)
    if not found or gone(found) is None:
        raise LookupError(
            f"no budget of milliseconds takes {sparsity:.0%} of the parameters: in the table of "
            f"{table.dense_ms:.1f} ms narrower layers save nothing. Measure it on a quiet machine."
        )
    return found


def bisected(enough: Callable[[float], bool], most: float) -> float:
    """A budget at which a share is gone, next to one at which it is not.

    Example:
        >>> round(bisected(lambda ms: ms <= 10.0, 40.0), 3)
        10.0
    """
    low, high = 0.0, most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def measure(
    subject: Subject, sparsity: float, ms: float, table: LatencyTable, path: Path
) -> Record:
    """Prune a copy of the model within the milliseconds and test it.

    Args:
        subject: The dense model and its evidence.
        sparsity: Share of the prunable parameters that must go.
        ms: The budget that takes them.
        table: What widths take.
        path: Its file.
    """
    way = Paced(ms, path)
    model, plan = cut(subject, way, sparsity)
    return {
        **identity(subject.task, subject.seed, OURS, sparsity),
        "widths": WIDTHS,
        "steps": 0,
        **tested(subject, model, plan),
        "budget_ms": way.ms,
        "dense_ms": table.dense_ms,
        "length": table.length,
        "machine": machine(),
    }


def about(record: Record) -> tuple[str, int, float]:
    """What a record is about: whose milliseconds, which model, how much of it."""
    return record["machine"]["cpu"], record["seed"], record["target_sparsity"]


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser("examples.benchmark.by_time", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=(0,), help="default: 0")
    add("--sparsities", nargs="+", type=share, default=SPARSITIES, help="default: 0.5 0.75 0.9")
    add("--seconds", type=positive, default=1.0, help="for each width of the table")
    asked = parser.parse_args(given)
    quiet()
    found = {about(record): record for record in load(RESULTS)}
    here = machine()["cpu"]
    for seed in asked.seeds:
        missing = [s for s in asked.sparsities if (here, seed, s) not in found]
        if not missing:
            continue
        model, data = finetuned(TASK, seed)
        subject = examine(TASK, seed, model, [*data.val_dataloader()], [*data.test_dataloader()])
        path = FOLDER / f"milliseconds-{TASK}.json"
        table = table_of(subject, path, asked.seconds)
        for sparsity in missing:
            try:
                ms = milliseconds(subject, table, sparsity)
            except LookupError as error:
                parser.error(f"{error} (delete {path} first)")
            record = measure(subject, sparsity, ms, table, path)
            found[about(record)] = record
            write(RESULTS, [found[key] for key in sorted(found)])
            print(
                f"{sparsity:.0%} in {record['budget_ms']:.1f} of {table.dense_ms:.1f} ms: "
                f"{record['accuracy']:.2%}, {record['kept']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
