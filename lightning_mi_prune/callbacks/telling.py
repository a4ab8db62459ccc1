"""What a run tells of itself: sizes before and after each cut, for the report and the loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.budget import sparsity_of
from lightning_mi_prune.callbacks.state import Pending, RunState
from lightning_mi_prune.measure import count_macs
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.report import Cut, PruningReport, axis_cuts
from lightning_mi_prune.sample import Example, placed

__all__ = ["begin_report", "describe", "macs_of", "sizes_of"]


def describe(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    run: RunState,
    chosen: Sequence[WidthAxis],
    pending: Pending,
    before: Mapping[str, int],
    plan: Plan,
) -> Cut:
    """The cut that was just made.

    Args:
        trainer: The trainer.
        module: The smaller module.
        run: The run.
        chosen: Axes that may be cut.
        pending: What was decided.
        before: Widths before it.
        plan: Plan after it.
    """
    after = {axis.name: plan.width(axis.name) for axis in chosen}
    return Cut(
        epoch=pending.epoch,
        sparsity=sparsity_of(chosen, after),
        parameters=sum(p.numel() for p in module.parameters()),
        prunable_parameters=count_parameters(chosen, after),
        macs=macs_of(trainer, module, run),
        axes=axis_cuts(chosen, before, after, pending.selection.information),
        seconds=run.seconds,
    )


def begin_report(
    module: pl.LightningModule,
    axes: Sequence[WidthAxis],
    chosen: Sequence[WidthAxis],
    plan: Plan,
) -> PruningReport:
    """The report of a run that starts with the module as it stands."""
    present = {name: len(kept) for name, kept in plan.kept.items()}
    parameters = sum(p.numel() for p in module.parameters())
    return PruningReport(
        parameters=parameters + count_parameters(axes) - count_parameters(axes, present),
        prunable_parameters=count_parameters(chosen),
        start={
            "parameters": parameters,
            "prunable_parameters": count_parameters(chosen, present),
        },
    )


def sizes_of(
    module: pl.LightningModule, report: PruningReport, chosen: Sequence[WidthAxis], plan: Plan
) -> dict[str, float]:
    """What loggers are told after every epoch from the first cut on."""
    if report.cuts:
        return report.cuts[-1].metrics()
    if not report.undone:
        return {}
    widths = {axis.name: plan.width(axis.name) for axis in chosen}
    sizes = {"parameters": sum(p.numel() for p in module.parameters()), "macs": report.macs}
    found = {f"prune/{name}": float(value) for name, value in sizes.items()}
    found["prune/sparsity"] = sparsity_of(chosen, widths)
    return found | {f"prune/width/{name}": float(width) for name, width in widths.items()}


def macs_of(trainer: pl.Trainer, module: pl.LightningModule, run: RunState) -> int:
    """Multiply-accumulates of one example of every network; 0 where they cannot be counted."""
    try:
        calls = {
            path: Example(*placed((call.args, call.kwargs), module.device))
            for path, call in run.examples.items()
        }
        with trainer.precision_plugin.forward_context():
            return sum(count_macs(module.get_submodule(p), c) for p, c in calls.items())
    except Exception as error:  # a number for the report is not worth a training run
        rank_zero_warn(f"MACs could not be counted and are reported as 0: {error}")
        return 0
