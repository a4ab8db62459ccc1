"""Tables of a cut for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lightning_mi_prune.reporting.report import Cut, PruningReport

__all__ = [
    "cut_table",
    "print_cut",
]


def cut_table(cut: Cut, report: PruningReport) -> Table:
    """The cut as a Rich table."""
    if cut.stacks:
        return _stack_table(cut, report)
    common = _common_path([group.name for group in cut.groups])
    table = Table(
        title=(
            f"Cut at epoch {cut.epoch}: {cut.sparsity:.1%} of the prunable parameters"
            + (f" of {common}" if common else "")
            + " are gone"
        ),
        caption=_caption(cut, report),
    )
    table.add_column("group", overflow="fold")
    for name in ("kind", "before", "after", "nats left", "kept by this cut"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for group in reversed(cut.groups):
        table.add_row(
            group.name.removeprefix(f"{common}."),
            group.kind,
            str(group.before),
            str(group.after),
            f"{group.information_nats:.2f}",
            f"{group.information_fraction:.1%}",
        )
    return table


def _caption(cut: Cut, report: PruningReport) -> str:
    kept = cut.information_kept
    return (
        f"parameters {report.parameters:,} -> {cut.parameters:,} | "
        f"MACs an example {report.macs:,} -> {cut.macs:,} | "
        + ("" if kept is None else f"information kept of the model as built {kept:.1%} | ")
        + " | ".join(f"{name} {s:.1f} s" for name, s in cut.seconds.items())
    )


def _stack_table(cut: Cut, report: PruningReport) -> Table:
    """The layers of every stack, and in which cluster they were."""
    table = Table(
        title=f"Cut at epoch {cut.epoch}: {cut.sparsity:.1%} of the layers' parameters are gone",
        caption=_caption(cut, report),
    )
    table.add_column("stack", overflow="fold")
    for name in ("before", "after", "removed", "clusters", "decided by"):
        table.add_column(name, justify="right" if name in ("before", "after") else "left")
    for stack in cut.stacks:
        table.add_row(
            stack.name,
            str(len(stack.before)),
            str(len(stack.after)),
            " ".join(map(str, stack.removed)),
            " | ".join(" ".join(map(str, cluster)) for cluster in stack.clusters),
            f"CKA >= {stack.threshold:.4f}" if stack.criterion == "cka" else stack.criterion,
        )
    return table


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
    Console().print(cut_table(cut, report))
