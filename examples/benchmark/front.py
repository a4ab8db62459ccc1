"""The comparison in short, for the README: `python -m examples.benchmark.page` writes it there."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from examples.benchmark.losses import budget
from examples.benchmark.records import Record
from examples.benchmark.summarize import MINE
from examples.benchmark.tables import Name, difference, variant_of

FRONT = Path("README.md")
BEGIN = "<!-- comparison: written by python -m examples.benchmark.page -->"
END = "<!-- / comparison -->"
TASK = "trec-6"
COLUMNS = ((0, 0.75), (0, 0.9), (100, 0.5), (100, 0.75), (100, 0.9))
ROWS: dict[Name, str] = {
    MINE: "**ours**",
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
    """Points to the dense control on one task: mean over the seeds (least .. most).

    Args:
        records: Those that are compared.
    """
    mine = [record for record in records if record["task"] == TASK]
    groups: dict[tuple[Name, int, float], list[Record]] = {}
    for record in mine:
        about = variant_of(record), record["steps"], record["target_sparsity"]
        groups.setdefault(about, []).append(record)
    heads = [f"{budget(steps)}, {sparsity:.0%} gone" for steps, sparsity in COLUMNS]
    lines = [f"| {' | '.join(['TREC-6', *heads])} |", "|---" * (1 + len(heads)) + "|"]
    seeds = [f"{len(groups.get((MINE, *column), ()))}" for column in COLUMNS]
    lines.append(f"| {' | '.join(['*seeds*', *(f'*{count}*' for count in seeds)])} |")
    for name, label in ROWS.items():
        cells = [shown(groups.get((name, *column), ())) for column in COLUMNS]
        if any(cells):
            lines.append(f"| {' | '.join([label, *cells])} |")
    return lines


def shown(records: Sequence[Record]) -> str:
    """Mean and range of points to dense; empty without records."""
    if not records:
        return ""
    gaps = [difference(record) for record in records]
    mean = f"{statistics.mean(gaps):+.1f}"
    if abs(statistics.mean(gaps)) < 10:
        mean = f"{statistics.mean(gaps):+.2f}"
    return f"{mean} ({min(gaps):+.1f} .. {max(gaps):+.1f})" if len(gaps) > 1 else mean
