"""Merges all records into `results/summary.json`, and prints what they say.

    python -m examples.benchmark.summarize
    python -m examples.benchmark.summarize --tables > tables.md

One-shot records come from `oneshot.json` and `recovery.json` (which wins), trained ones from the
latter; latencies and multiply-accumulates of their shapes from `latency.json`, CPU seconds of the
evidence that a method needs from `evidence.json`, null where that pass did not run.
"""

import argparse
import statistics
from collections.abc import Iterable, Mapping, Sequence
from math import isclose
from pathlib import Path

from examples.benchmark import evidence, latency, oneshot, recovery
from examples.benchmark.finetuned import RECIPES
from examples.benchmark.latency import shape_of
from examples.benchmark.paired import (
    CONFIDENCE,
    NATS,
    POINTS,
    Measure,
    averaged,
    by_seed,
    cell,
)
from examples.benchmark.records import Record, key_of, load, write
from examples.benchmark.tables import Name, variant_of
from examples.benchmark.variants import OURS

RESULTS = Path(__file__).parent / "results" / "summary.json"
FROM_SHAPES = (
    "macs",
    "dense_macs",
    "latency_ms_b1",
    "latency_ms_b32",
    "dense_latency_ms_b1",
    "dense_latency_ms_b32",
)
FIELDS = (
    "task",
    "model",
    "method",
    "widths",
    "fold_in",
    "cuts",
    "target_sparsity",
    "sparsity",
    "masked",
    "finetune_epochs",
    "steps",
    "learning_rate",
    "seed",
    "n_test",
    "accuracy",
    "dense_accuracy",
    "cross_entropy",
    "dense_cross_entropy",
    "parameters",
    "dense_parameters",
    "kept",
    *FROM_SHAPES,
    "seconds",
    "cpu_seconds",
    "evidence_cpu_seconds",
    "machine",
)
ONE_SHOT = {"masked": False, "finetune_epochs": 0, "steps": 0}
MINE: Name = (OURS.method, OURS.widths, OURS.fold_in, OURS.cuts)
INSIDE: Name = ("relevance-mi-dims", *MINE[1:])  # the same, and dimensions of heads may go
TOLERANCE = 0.02  # of the share that went, before a table says so


def merged(
    sources: Iterable[Sequence[Record]],
    shapes: Mapping[str, Record],
    evidences: Mapping[str, Record],
) -> list[Record]:
    """One record of each, with the fields of the summary; later sources win.

    Args:
        sources: Records of each file.
        shapes: Latencies and multiply-accumulates, by :func:`latency.shape_of`.
        evidences: What evidence takes, by task.
    """
    found = {key_of(record): ONE_SHOT | record for records in sources for record in records}
    records = [summarized(found[key], shapes.get(shape_of(found[key]))) for key in sorted(found)]
    for record in records:
        paid = evidence.charged(variant_of(record), evidences.get(record["task"]))
        record["evidence_cpu_seconds"] = paid
    return records


def summarized(record: Record, shape: Record | None) -> Record:
    """The fields of the summary; those of the shape go together, or all come from the record."""
    known = record if shape is None else record | {name: shape[name] for name in FROM_SHAPES}
    return {name: known.get(name) for name in FIELDS}


def compared(records: Iterable[Record] | None = None) -> list[Record]:
    """The records that tables and figures are made of: those of the benchmark's learning rate.

    Trials with other rates stay in the summary, but one seed must not stand there twice.

    Args:
        records: Of the summary; None reads it.
    """
    return [
        record
        for record in (load(RESULTS) if records is None else records)
        if not record["steps"]
        or isclose(record["learning_rate"], recovery.RATE * RECIPES[record["task"]].learning_rate)
    ]


def aside(records: Sequence[Record], asked: float) -> str:
    """What really went, where it is not what was asked: whole layers are coarse."""
    gone = statistics.mean(record["sparsity"] for record in records)
    return f" ({gone:.0%} gone)" if abs(gone - asked) > TOLERANCE else ""


def table(records: Sequence[Record], tasks: Sequence[str], measure: Measure = POINTS) -> list[str]:
    """Rows are methods, columns are sparsities; all records have one number of steps.

    Args:
        records: The records.
        tasks: Tasks that the means go over.
        measure: What is shown.
    """
    sparsities = sorted({r["target_sparsity"] for r in records if r["target_sparsity"]})
    names: dict[Name, dict[float, list[Record]]] = {}
    for record in records:
        if record["task"] in tasks and record["target_sparsity"]:
            groups = names.setdefault(variant_of(record), {})
            groups.setdefault(record["target_sparsity"], []).append(record)
    head = " | ".join(f"{sparsity:.0%} gone" for sparsity in sparsities)
    lines = [f"| method | widths | fold-in | cuts | seeds | {head} |"]
    lines += ["|---" * (5 + len(sparsities)) + "|"]
    rows: list[tuple[float, str]] = []
    for name, groups in names.items():
        values = {s: by_seed(groups.get(s, []), tasks, measure) for s in sparsities}
        cells = []
        for sparsity in sparsities:
            ours = by_seed(names.get(MINE, {}).get(sparsity, []), tasks, measure)
            shown = cell(values[sparsity], ours if name != MINE else None, measure.digits)
            cells.append(shown + aside(groups.get(sparsity, []), sparsity) if shown else "")
        seeds = max(map(len, values.values()))
        if seeds:
            average = statistics.mean(v for found in values.values() for v in found.values())
            label = " | ".join(map(str, (*name, seeds)))
            rows.append((-average, f"| {label} | {' | '.join(cells)} |"))
    return lines + [line for _, line in sorted(rows)]


def markdown(records: Sequence[Record]) -> list[str]:
    """For every number of steps a table over all tasks of a model, and one for each task."""
    lines = [
        "Points of accuracy to the dense control of the same seed and steps, mean over the seeds; "
        f"then how much better `{OURS.method}` with {OURS.widths} widths and a {OURS.fold_in} is, "
        f"paired by seed, with a {CONFIDENCE:.0%} Student interval (▲ ours is better, ▼ worse).",
    ]
    for steps in sorted({record["steps"] for record in records}):
        same = [record for record in records if record["steps"] == steps]
        tasks = sorted({record["task"] for record in same})
        title = f"{steps} steps" if steps else "One shot"
        for chosen in [*averaged(same), *([task] for task in tasks)]:
            where = f"mean of {len(chosen)} tasks" if len(chosen) > 1 else chosen[0]
            lines += ["", f"### {title}, {where}", "", *table(same, chosen)]
    return lines


def entropy_lines(records: Sequence[Record]) -> list[str]:
    """Cross-entropy over all tasks of a model, a table for every number of steps."""
    lines = []
    for steps in sorted({record["steps"] for record in records}):
        same = [record for record in records if record["steps"] == steps]
        for chosen in averaged(same):
            title = f"{steps} steps" if steps else "One shot"
            lines += ["", f"### {title}, nats, mean of {len(chosen)} tasks", ""]
            lines += table(same, chosen, NATS)
    if not lines:
        return []
    return [
        "## Cross-entropy",
        "",
        "Nats of cross-entropy on the test split, in the same way: below zero is worse than dense. "
        "It moves with every prediction, not only with those that change sides, so it "
        "tells methods apart that accuracy does not. The goals are about accuracy.",
        *lines,
        "",
    ]


def main(given: Sequence[str] | None = None) -> None:
    """Write the summary and print the tables."""
    parser = argparse.ArgumentParser("examples.benchmark.summarize", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tables", action="store_true", help="only print the tables")
    parser.add_argument("--of", type=Path, help="only print the tables of this list of records")
    asked = parser.parse_args(given)
    if asked.of:
        if not asked.of.exists():
            parser.error(f"--of {asked.of}: there is no such file; recovery --results writes one")
        print("\n".join(markdown(compared(merged([load(asked.of)], {}, {})))))
        return
    if asked.tables:
        print("\n".join(markdown(compared())))
        return
    shapes = {shape_of(record): record for record in load(latency.RESULTS)}
    evidences = {record["task"]: record for record in load(evidence.RESULTS)}
    records = merged([load(oneshot.RESULTS), load(recovery.RESULTS)], shapes, evidences)
    if records != load(RESULTS):
        write(RESULTS, records)
    print("\n".join(markdown(compared(records))))


if __name__ == "__main__":
    main()
