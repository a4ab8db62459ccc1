"""A cut on probation: taken back when it costs more of the monitored metric than allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_mi_prune.callbacks.run import is_last_validation, run_length
from lightning_mi_prune.callbacks.schedule import judging_epoch
from lightning_mi_prune.callbacks.state import RunState, Trial
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.optimizers import restore, snapshot
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.strategies import decide_once
from lightning_mi_prune.surgery import revert, undo

__all__ = ["AccuracyBudget", "begin_trial", "judge", "take_back"]


@dataclass(frozen=True)
class AccuracyBudget:
    """How much of a metric a cut may cost after its recovery.

    Args:
        max_drop: Largest loss against the best accepted model, in the metric's own unit.
        monitor: Name of the logged metric.
        mode: ``max`` if more is better, ``min`` if less is.
        on_drop: ``halve`` tries half of the step next, ``stop`` makes no further cut.
    """

    max_drop: float
    monitor: str
    mode: Literal["max", "min"] = "max"
    on_drop: Literal["halve", "stop"] = "halve"

    def value(self, trainer: pl.Trainer) -> float:
        """The metric after this validation, as rank 0 sees it.

        Raises:
            MisconfigurationException: If it was not logged.
        """
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            raise MisconfigurationException(
                f"max_drop watches monitor={self.monitor!r}, which was not logged in validation; "
                f"expected one of {sorted(logged)}. Log it in validation_step, or change monitor."
            )
        return decide_once(trainer.strategy, lambda: float(logged[self.monitor]))

    def better(self, value: float, best: float | None) -> float | None:
        """The better of two values; one that is not finite never is."""
        if not math.isfinite(value):
            return best
        return value if best is None else (max if self.mode == "max" else min)(value, best)

    def exceeded(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is more than ``max_drop`` worse than ``best``, or not a number."""
        if best is None:
            return False
        drop = best - value if self.mode == "max" else value - best
        return not drop <= self.max_drop


def begin_trial(
    trainer: pl.Trainer, module: pl.LightningModule, plan: Plan, epoch: int, reached: float
) -> Trial:
    """Keep what it takes to undo the cut that comes now: copies on the CPU."""
    tensors = chain(module.named_parameters(), module.named_buffers())
    names = {id(p): name for name, p in module.named_parameters()}
    return Trial(
        epoch=epoch,
        reached=reached,
        plan=plan,
        weights={name: t.detach().to("cpu", copy=True) for name, t in tensors},
        optimizers=snapshot(trainer.strategy.optimizers, names),
    )


def judge(
    trainer: pl.Trainer, budget: AccuracyBudget, run: RunState
) -> tuple[Trial | None, float | None]:
    """The trial and the best value after a validation: accepted, failed, or still open."""
    value, trial = budget.value(trainer), run.trial
    if trial is None:
        return None, budget.better(value, run.best)
    following = next((e for e in run.schedule.left(run.reached) if e > trial.epoch), None)
    every = trainer.check_val_every_n_epoch or 1
    due = judging_epoch(trial.epoch, following, run_length(trainer), every)
    if trainer.current_epoch < due or trial.failed or not is_last_validation(trainer):
        return trial, run.best
    if budget.exceeded(value, run.best):
        return replace(trial, failed=True), run.best
    return None, budget.better(value, run.best)


def take_back(
    trainer: pl.Trainer, module: pl.LightningModule, keeper: PlanKeeper, trial: Trial
) -> None:
    """Undo the last cut: shapes, weights, optimizer state and plan are as before it.

    Learning rates and everything else that follows time goes on.
    """
    rewrites = undo(module, keeper.axes, trial.plan, trial.weights)
    try:
        replaced = {id(rewrite.old): rewrite.new for rewrite in rewrites}
        names = {id(p): name for name, p in module.named_parameters()}
        restore(trainer.strategy.optimizers, replaced, names, trial.optimizers)
    except BaseException:
        revert(module, keeper.axes, keeper.plan, rewrites)
        raise
    keeper.plan = trial.plan
