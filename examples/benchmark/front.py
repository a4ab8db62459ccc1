"""The comparison in short, for the README: `python -m examples.benchmark.page` writes it there."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from examples.benchmark.losses import budget
from examples.benchmark.paired import averaged, by_seed
from examples.benchmark.records import Record
from examples.benchmark.summarize import INSIDE, MINE
from examples.benchmark.tables import Name, variant_of

FRONT = Path("README.md")
BEGIN = "<!-- comparison: written by python -m examples.benchmark.page -->"
END = "<!-- / comparison -->"
TASK = "trec-6"
COLUMNS = ((0, 0.75), (0, 0.9), (100, 0.5), (100, 0.75), (100, 0.9))
ROWS: dict[Name, str] = {
    MINE: "**ours**",
    INSIDE: "**ours**, dimensions of heads too",
    ("taylor", "global", "refit", 1): "Taylor, our widths and refit",
    ("activation-norm", "global", "refit", 1): "activation norm, our widths and refit",
    ("torch-pruning-taylor", "uniform", "none", 1): "torch-pruning, Taylor",
    ("activation-norm", "uniform", "none", 1): "activation norm",
    ("movement-units", "uniform", "none", 1): "movement of heads and neurons",
    ("magnitude-masks", "global", "none", 1): "magnitude masks (no faster)",
    ("torch-pruning-magnitude", "uniform", "none", 1): "torch-pruning, magnitude",
    ("small-dense", "uniform", "none", 1): "fewer layers, fine-tuned from the start",
    ("cka-layers", "uniform", "none", 1): "layers by CKA",
}


def front(records: Sequence[Record]) -> list[str]:
    """Points to the dense control on one task, then over all tasks with seeds enough for a mean.

    Args:
        records: Those that are compared.
    """
    lines = table(records, [TASK])
    for tasks in averaged(records):
        lines += ["", *table(records, tasks)]
    return lines


def table(records: Sequence[Record], tasks: Sequence[str]) -> list[str]:
    """Mean over the seeds (least .. most), each seed averaged over the tasks; no empty columns.

    Args:
        records: Those that are compared.
        tasks: Tasks that the means go over; a seed that lacks one is out.
    """
    groups: dict[tuple[Name, int, float], list[Record]] = {}
    for record in records:
        if record["task"] in tasks:
            about = variant_of(record), record["steps"], record["target_sparsity"]
            groups.setdefault(about, []).append(record)
    gaps = {about: [*by_seed(same, tasks).values()] for about, same in groups.items()}
    where = "TREC-6" if [*tasks] == [TASK] else f"mean of {len(tasks)} tasks"
    columns = [column for column in COLUMNS if any(gaps.get((name, *column)) for name in ROWS)]
    heads = [f"{budget(steps)}, {sparsity:.0%} gone" for steps, sparsity in columns]
    lines = [f"| {' | '.join([where, *heads])} |", "|---" * (1 + len(heads)) + "|"]
    seeds = [len(gaps.get((MINE, *column), ())) for column in columns]
    lines.append(f"| {' | '.join(['*seeds*', *(f'*{count}*' for count in seeds)])} |")
    for name, label in ROWS.items():
        values = [gaps.get((name, *column), []) for column in columns]
        cells = [shown(v) + other(v, count) for v, count in zip(values, seeds, strict=True)]
        if any(cells):
            lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def shown(gaps: Sequence[float]) -> str:
    """Mean and range of points to dense; empty without any."""
    if not gaps:
        return ""
    mean = f"{statistics.mean(gaps):+.1f}"
    if abs(statistics.mean(gaps)) < 10:
        mean = f"{statistics.mean(gaps):+.2f}"
    return f"{mean} ({min(gaps):+.1f} .. {max(gaps):+.1f})" if len(gaps) > 1 else mean


def other(gaps: Sequence[float], seeds: int) -> str:
    """How many seeds a cell has, where they are not as many as ours."""
    if not gaps or len(gaps) == seeds:
        return ""
    return f", {len(gaps)} seed{'s' if len(gaps) > 1 else ''}"
