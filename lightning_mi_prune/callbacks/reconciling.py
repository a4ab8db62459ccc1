"""What a resumed run lets go of, where its options are others than those it stopped with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.state import RunState
from lightning_mi_prune.gradients import blank
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.relevance import GradientSums

__all__ = ["Asked", "reconcile", "watch_anew"]


@dataclass(frozen=True)
class Asked:
    """What the options of a run ask for.

    Args:
        budget: What a cut may cost.
        aim: What the schedule leads to, where that is not a sparsity.
        calls: Positions of calls to store; 0 stores none.
        steps: Training steps to take gradients from.
    """

    budget: AccuracyBudget | None = None
    aim: str = ""
    calls: int = 0
    steps: int = 0


def reconcile(
    run: RunState, axes: list[WidthAxis], module: nn.Module, plan: Plan, asked: Asked
) -> list[str]:
    """Let go of what does not fit the options a run resumes with.

    Args:
        run: The run, as it was read.
        axes: Axes that may be cut now.
        module: The model.
        plan: The plan it carries.
        asked: What is asked for now.

    Returns:
        What was let go of, in a sentence each.
    """
    budget, aim = asked.budget, asked.aim
    surprises, names = [], {axis.name for axis in axes}
    places = {key: readers[0] for axis in axes for key, readers in axis.places.items()}
    widths = {key: module.get_parameter(f"{r}.weight").shape[1] for key, r in places.items()}
    shapes, heard = _shapes(blank(module, axes, plan)), run.heard
    if run.felt is not None and (not asked.steps or _shapes(run.felt) != shapes):
        run.felt = None  # the rest of the epoch is felt anew
    if heard is not None and {key: m.dimension for key, m in heard.moments.items()} != widths:
        run.heard = None
        surprises.append("What was heard was of other axes; a cut waits for the next validation.")
    elif heard is not None and (
        (asked.calls and not any(stored for rank in heard.ranks for stored in rank.values()))
        or (asked.steps and _shapes(heard.gradients or {}) != shapes)
    ):
        run.heard = None
        surprises.append(
            "What was heard is less than the options ask for now; a cut waits for the next "
            "validation."
        )
    if run.pending is not None and set(run.pending.selection.information) != names:
        run.pending = None
        surprises.append("The pending cut was chosen for other axes; it will be chosen again.")
    if run.aim != aim and run.fitted.epochs:
        # Goals are counted from the model as built: what is reached already asks for no cut.
        run.reached, run.fitted, run.schedule, run.pending = 0.0, Schedule(), Schedule(), None
        surprises.append(f"The budget was {run.aim or 'a sparsity'}; the schedule begins anew.")
    run.aim = aim
    return surprises + watch_anew(run, budget)


def watch_anew(run: RunState, budget: AccuracyBudget | None) -> list[str]:
    """Forget what another metric said; says so, if a cut was on probation."""
    surprises = []
    watched = "" if budget is None else f"{budget.monitor} {budget.mode}"
    if run.watched != watched:
        if run.trial is not None:
            run.trial = None
            surprises.append("max_drop watches something else now: the last cut is kept.")
        run.best, run.watched = None, watched
    return surprises


def _shapes(sums: Mapping[str, GradientSums]) -> dict[str, tuple[int, int, bool]]:
    return {key: (s.dimension, s.units, s.inside) for key, s in sums.items()}
