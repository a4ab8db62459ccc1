"""Prints what the records of a benchmark say, over the seeds."""

import statistics
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table

from examples.benchmark.records import Record
from examples.benchmark.variants import METHODS, OURS

COLUMNS = ("method", "widths", "fold-in", "cuts", "to dense", "min .. max", "s", "seeds")
PAIRED = "ours minus this"
WIDTH = 110  # of a file or a pipe
Name = tuple[str, str, str, int]


def variant_of(record: Record) -> Name:
    """Method, widths and fold-in of a record."""
    return record["method"], record["widths"], record["fold_in"], record["cuts"]


def in_words(name: Name) -> str:
    """A method with its widths and, where there are such, its new weights and number of cuts.

    Example:
        >>> in_words(("taylor", "global", "refit", 1))
        '`taylor`, global, refit'
    """
    method, widths, fold_in, cuts = name
    parts = [f"`{method}`", widths]
    parts += [fold_in] if fold_in != "none" else []
    parts += [f"{cuts} cuts"] if cuts > 1 else []
    return ", ".join(parts)


def by_variant(records: Sequence[Record]) -> dict[Name, dict[int, Record]]:
    """Records of one task and sparsity by variant, in the order of `METHODS`, and by seed."""
    order = [(v.method, v.widths, v.fold_in, v.cuts) for group in METHODS.values() for v in group]
    found: dict[Name, dict[int, Record]] = {}
    for name in order:
        seeds = {r["seed"]: r for r in records if variant_of(r) == name}
        if seeds:
            found[name] = seeds
    return found


def difference(record: Record) -> float:
    """Accuracy less that of the dense model, in points."""
    return 100 * float(record["accuracy"] - record["dense_accuracy"])


def paired(ours: dict[int, Record], theirs: dict[int, Record]) -> tuple[float, float, int] | None:
    """Our accuracy less theirs over the seeds that both have.

    Returns:
        Mean and standard error in points, and the seeds; None where there are no such seeds. With
        one seed there is no standard error: not a number.
    """
    seeds = ours.keys() & theirs.keys()
    gaps = [100 * (ours[seed]["accuracy"] - theirs[seed]["accuracy"]) for seed in sorted(seeds)]
    if not gaps:
        return None
    error = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    return statistics.mean(gaps), error, len(gaps)


def shown(mean: float, error: float, seeds: int) -> str:
    """A paired difference as the table shows it."""
    return f"{mean:+.2f} ± {error:.2f}" if seeds > 1 else f"{mean:+.2f}"


def summary(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """The rows of one table: one task, one sparsity."""
    variants = by_variant(records)
    mine = (OURS.method, OURS.widths, OURS.fold_in, OURS.cuts)
    rows: list[tuple[str, ...]] = []
    for name, seeds in variants.items():
        values = [difference(record) for record in seeds.values()]
        seconds = statistics.mean(record["seconds"] for record in seeds.values())
        gap = paired(variants.get(mine, {}), seeds) if name != mine else None
        rows.append(
            (
                *map(str, name),
                f"{statistics.mean(values):+.2f}",
                f"{min(values):+.2f} .. {max(values):+.2f}",
                f"{seconds:.1f}",
                str(len(seeds)),
                "" if gap is None else shown(*gap),
            )
        )
    return rows


def print_tables(records: Sequence[Record]) -> None:
    """A table for each task and sparsity; ours are global widths with a refit."""

    def about(record: Record) -> tuple[str, float]:
        return record["task"], record["target_sparsity"]

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    if not records:
        console.print("There are no records yet.")
    for (task, sparsity), group in groupby(sorted(records, key=about), key=about):
        same = list(group)
        dense = {record["seed"]: record["dense_accuracy"] for record in same}
        table = Table(
            title=f"{task}, {sparsity:.0%} of the prunable parameters gone, no training step; "
            f"dense {statistics.mean(dense.values()):.2%}, {same[0]['n_test']} test rows",
            caption="Points of accuracy, means over seeds; paired differences ± standard error.",
        )
        for name in (*COLUMNS, PAIRED):
            table.add_column(name, no_wrap=True)
        for row in summary(same):
            table.add_row(*row)
        console.print(table)
