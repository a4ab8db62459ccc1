"""Sizes before and after each cut, for the report and the loggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mi_prune.allocation.budget import sparsity_of
from lightning_mi_prune.allocation.macs import macs_of_calls
from lightning_mi_prune.callbacks.state import PendingCut, RunState
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningWarning
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.groups import DependencyGroup, count_parameters
from lightning_mi_prune.importance.layer_criteria import StackCut
from lightning_mi_prune.reporting.report import Cut, PruningReport, group_cuts

__all__ = [
    "begin_layer_report",
    "begin_report",
    "layer_cut_record",
    "layer_parameters",
    "macs_of",
    "report_no_cut",
    "sizes_of",
    "unit_cut_record",
]


def unit_cut_record(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    run: RunState,
    standing: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    pending: PendingCut,
    before: PruningPlan,
    plan: PruningPlan,
) -> Cut:
    """The cut that was just made.

    Args:
        trainer: The trainer.
        module: The smaller module.
        run: The run.
        standing: Groups that may be cut, of the layers that are there.
        chosen: The same, of all layers.
        pending: What was decided.
        before: Plan before it.
        plan: Plan after it.
    """
    widths = {group.name: before.width(group.name) for group in chosen}
    after = {group.name: plan.width(group.name) for group in chosen}
    return Cut(
        epoch=pending.epoch,
        sparsity=sparsity_of(chosen, after),
        parameters=sum(p.numel() for p in module.parameters()),
        prunable_parameters=count_parameters(chosen, after),
        macs=macs_of(trainer, module, run),
        groups=group_cuts(standing, widths, after, pending.selection.information),
        seconds=run.seconds,
        information_kept=run.kept * pending.selection.kept_share,
    )


def layer_cut_record(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    run: RunState,
    built: int,
    names: Sequence[str],
    pending: PendingCut,
    stacks: Sequence[StackCut],
) -> Cut:
    """The layers that were just taken out.

    Args:
        trainer: The trainer.
        module: The smaller module.
        run: The run.
        built: Parameters of all layers as built.
        names: Paths of all stacks.
        pending: What was decided.
        stacks: What was decided about those that lost layers.
    """
    left = layer_parameters(module, names)
    return Cut(
        epoch=pending.epoch,
        sparsity=1 - left / built,
        parameters=sum(p.numel() for p in module.parameters()),
        prunable_parameters=left,
        macs=macs_of(trainer, module, run),
        groups=(),
        seconds=run.seconds,
        stacks=tuple(stacks),
    )


def layer_parameters(module: pl.LightningModule, stacks: Sequence[str]) -> int:
    """Parameters of the layers of stacks."""
    return sum(p.numel() for name in stacks for p in module.get_submodule(name).parameters())


def _absent(module: pl.LightningModule, tracker: PlanTracker, stacks: Sequence[str]) -> int:
    """Parameters of layers that were there; hollow ones that came back are not absent."""
    present = {id(part) for part in module.modules()}
    return sum(
        p.numel()
        for name in stacks
        for layer in tracker.removed_layers.get(name, {}).values()
        if id(layer) not in present
        for p in layer.parameters()
    )


def begin_report(
    module: pl.LightningModule, tracker: PlanTracker, chosen: Sequence[DependencyGroup]
) -> PruningReport:
    """The report of a run that starts with the module as it stands."""
    present = {name: len(kept) for name, kept in tracker.plan.kept.items()}
    parameters = sum(p.numel() for p in module.parameters())
    groups = tracker.groups
    gone = count_parameters(groups) - count_parameters(groups, present)
    return PruningReport(
        parameters=parameters + gone + _absent(module, tracker, list(tracker.removed_layers)),
        prunable_parameters=count_parameters(chosen),
        start={
            "parameters": parameters,
            "prunable_parameters": count_parameters(chosen, present),
        },
    )


def begin_layer_report(
    module: pl.LightningModule, tracker: PlanTracker, stacks: Sequence[str]
) -> PruningReport:
    """The same where layers are what may go."""
    left = layer_parameters(module, stacks)
    built = left + _absent(module, tracker, stacks)
    begun = begin_report(module, tracker, [])
    start = {**begun.start, "prunable_parameters": left}
    return replace(begun, prunable_parameters=built, start=start)


def sizes_of(
    module: pl.LightningModule, report: PruningReport, sparsity: float
) -> dict[str, float]:
    """What loggers get of the whole module after every epoch; MACs from calibration on."""
    macs = report.cuts[-1].macs if report.cuts else report.macs
    found = {"parameters": sum(p.numel() for p in module.parameters()), "sparsity": sparsity}
    return found | ({"macs": macs} if macs else {})


def macs_of(trainer: pl.Trainer, module: pl.LightningModule, run: RunState) -> int:
    """Multiply-accumulates of one example of every network; 0 where they cannot be counted."""
    if not run.examples:  # layers of a stack that was given by path may be called one by one
        rank_zero_warn(
            "MACs are not counted and are reported as 0: the module that holds the layers was "
            "never called itself. Call it, as self(x), instead of its layers one by one."
        )
        return 0
    try:
        with trainer.precision_plugin.forward_context():
            return macs_of_calls(module, run.examples)
    except Exception as error:  # a number for the report is not worth a training run
        rank_zero_warn(f"MACs could not be counted and are reported as 0: {error}")
        return 0


def report_no_cut(report: PruningReport, met: str, remedy: str, *, last: bool = True) -> None:
    """Say that no cut is needed; a warning where the run ends as it began.

    Args:
        report: What the run has cut so far.
        met: What is met, in a sentence.
        remedy: What to change for a cut, in a sentence.
        last: Whether no goal is left.
    """
    if report.cuts or report.undone or not last:
        rank_zero_info(met)
    else:
        text = f"{met} Nothing was cut in this run. {remedy}"
        rank_zero_warn(text, category=PruningWarning)
