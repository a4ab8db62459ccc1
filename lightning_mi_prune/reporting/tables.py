"""Tables for the terminal; rich draws them where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mi_prune.importance.layer_criteria import StackCut
from lightning_mi_prune.reporting.records import Cut
from lightning_mi_prune.reporting.report import PruningReport

__all__ = [
    "Table",
    "cut_table",
    "print_cut",
    "print_table",
]


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        title: Text above it.
        columns: Names of the columns.
        rows: A text for each column.
        words: Columns that hold words; the others hold numbers, which are set to the right.
        caption: Text below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    caption: str = ""


def print_table(table: Table) -> None:
    """Print a table: with rich, or as plain text where rich is not installed."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ModuleNotFoundError:
        columns = zip(table.columns, *table.rows, strict=True)
        aligned = [_aligned(column, left=column[0] in table.words) for column in columns]
        lines = map("  ".join, zip(*aligned, strict=True))
        print("\n".join(filter(None, (table.title, *lines, table.caption))))  # noqa: T201
        return
    drawn = RichTable(title=table.title, caption=table.caption or None)
    for name in table.columns:
        to_left = name in table.words
        drawn.add_column(name, justify="left" if to_left else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    Console().print(drawn)


def _aligned(texts: Sequence[str], *, left: bool) -> list[str]:
    width = max(map(len, texts))
    return [text.ljust(width) if left else text.rjust(width) for text in texts]


def cut_table(cut: Cut, report: PruningReport) -> Table:
    """The groups, or the stacks, of a cut."""
    gone = f"Cut at epoch {cut.epoch}: {cut.sparsity:.1%} of the"
    sizes = (
        f"parameters {report.parameters:,} -> {cut.parameters:,}",
        f"MACs per example {report.macs:,} -> {cut.macs:,}",
    )
    kept = cut.information_kept
    shares = () if kept is None else (f"information kept of the model as built {kept:.1%}",)
    seconds = (f"{name} {value:.1f} s" for name, value in cut.seconds.items())
    caption = " | ".join((*sizes, *shares, *seconds))
    if cut.stacks:
        columns = ("stack", "before", "after", "removed", "clusters", "decided by")
        rows = [
            (
                stack.name,
                str(len(stack.before)),
                str(len(stack.after)),
                " ".join(map(str, stack.removed)),
                " | ".join(" ".join(map(str, cluster)) for cluster in stack.clusters),
                _decided_by(stack),
            )
            for stack in cut.stacks
        ]
        title, words = f"{gone} layers' parameters are gone", (columns[0], *columns[3:])
        return Table(title, columns, rows, words, caption)
    common = _common_path([group.name for group in cut.groups])
    rows = [
        (
            group.name.removeprefix(f"{common}."),
            group.kind,
            str(group.before),
            str(group.after),
            f"{group.information_nats:.2f}",
            f"{group.information_fraction:.1%}",
        )
        for group in reversed(cut.groups)
    ]
    title = f"{gone} prunable parameters{f' of {common}' if common else ''} are gone"
    columns = ("group", "kind", "before", "after", "nats left", "kept by this cut")
    return Table(title, columns, rows, ("group", "kind"), caption)


def _decided_by(stack: StackCut) -> str:
    """The criterion, with the numbers that decided."""
    if stack.criterion == "cka":
        return f"CKA >= {stack.threshold:.4f}"
    if stack.losses is None:
        return stack.criterion
    return f"loss {stack.losses.whole:.4f} -> {stack.losses.after:.4f}"


def _common_path(names: Sequence[str]) -> str:
    """The longest module path that all names share."""
    common: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def print_cut(cut: Cut, report: PruningReport) -> None:
    """Print the table of a cut."""
    print_table(cut_table(cut, report))
