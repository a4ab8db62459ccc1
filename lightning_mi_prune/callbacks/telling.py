"""What a run tells of itself: sizes before and after each cut, for the report and the loggers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.budget import sparsity_of
from lightning_mi_prune.callbacks.records import Pending
from lightning_mi_prune.callbacks.state import RunState
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.errors import PruningWarning
from lightning_mi_prune.measure import macs_of_calls
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.report import Cut, PruningReport, axis_cuts
from lightning_mi_prune.sparing import StackCut

__all__ = [
    "begin_layer_report",
    "begin_report",
    "describe",
    "describe_layers",
    "layer_parameters",
    "macs_of",
    "sizes_of",
    "tell_no_cut",
]


def describe(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    run: RunState,
    standing: Sequence[WidthAxis],
    chosen: Sequence[WidthAxis],
    pending: Pending,
    before: Plan,
    plan: Plan,
) -> Cut:
    """The cut that was just made.

    Args:
        trainer: The trainer.
        module: The smaller module.
        run: The run.
        standing: Axes that may be cut, of the layers that are there.
        chosen: The same, of all layers.
        pending: What was decided.
        before: Plan before it.
        plan: Plan after it.
    """
    widths = {axis.name: before.width(axis.name) for axis in chosen}
    after = {axis.name: plan.width(axis.name) for axis in chosen}
    return Cut(
        epoch=pending.epoch,
        sparsity=sparsity_of(chosen, after),
        parameters=sum(p.numel() for p in module.parameters()),
        prunable_parameters=count_parameters(chosen, after),
        macs=macs_of(trainer, module, run),
        axes=axis_cuts(standing, widths, after, pending.selection.information),
        seconds=run.seconds,
        information_kept=run.kept * pending.selection.kept_share,
    )


def describe_layers(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    run: RunState,
    built: int,
    names: Sequence[str],
    pending: Pending,
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
        axes=(),
        seconds=run.seconds,
        stacks=tuple(stacks),
    )


def layer_parameters(module: pl.LightningModule, stacks: Sequence[str]) -> int:
    """Parameters of the layers of stacks."""
    return sum(p.numel() for name in stacks for p in module.get_submodule(name).parameters())


def _absent(module: pl.LightningModule, keeper: PlanKeeper, stacks: Sequence[str]) -> int:
    """Parameters of layers that were there; hollow ones that came back are not absent."""
    present = {id(part) for part in module.modules()}
    return sum(
        p.numel()
        for name in stacks
        for layer in keeper.spare.get(name, {}).values()
        if id(layer) not in present
        for p in layer.parameters()
    )


def begin_report(
    module: pl.LightningModule, keeper: PlanKeeper, chosen: Sequence[WidthAxis]
) -> PruningReport:
    """The report of a run that starts with the module as it stands."""
    present = {name: len(kept) for name, kept in keeper.plan.kept.items()}
    parameters = sum(p.numel() for p in module.parameters())
    axes = keeper.axes
    gone = count_parameters(axes) - count_parameters(axes, present)
    return PruningReport(
        parameters=parameters + gone + _absent(module, keeper, list(keeper.spare)),
        prunable_parameters=count_parameters(chosen),
        start={
            "parameters": parameters,
            "prunable_parameters": count_parameters(chosen, present),
        },
    )


def begin_layer_report(
    module: pl.LightningModule, keeper: PlanKeeper, stacks: Sequence[str]
) -> PruningReport:
    """The same where layers are what may go."""
    left = layer_parameters(module, stacks)
    built = left + _absent(module, keeper, stacks)
    begun = begin_report(module, keeper, [])
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


def tell_no_cut(report: PruningReport, met: str, remedy: str, *, last: bool = True) -> None:
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
