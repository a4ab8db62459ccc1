"""A cut on probation: taken back when it costs more of the monitored metric than allowed."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import lightning.pytorch as pl

from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.records import Trial
from lightning_mi_prune.callbacks.run import is_last_validation
from lightning_mi_prune.callbacks.schedule import judging_epoch
from lightning_mi_prune.callbacks.state import RunState
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.optimizers import groups_of, restore, snapshot
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.surgery import cancel, recover

__all__ = ["begin_trial", "judge", "take_back"]


def begin_trial(
    trainer: pl.Trainer, module: pl.LightningModule, plan: Plan, epoch: int, run: RunState
) -> Trial:
    """Keep what it takes to undo the cut that comes now: copies on the CPU."""
    tensors = chain(module.named_parameters(), module.named_buffers())
    names = {id(p): name for name, p in module.named_parameters()}
    return Trial(
        epoch=epoch,
        reached=run.reached,
        kept=run.kept,
        plan=plan,
        weights={name: t.detach().to("cpu", copy=True) for name, t in tensors},
        optimizers=snapshot(trainer.strategy.optimizers, names),
        groups=groups_of(trainer.strategy.optimizers, names),
    )


def judge(
    trainer: pl.Trainer, budget: AccuracyBudget, run: RunState, end: float
) -> tuple[Trial | None, float | None]:
    """The trial and the best value after a validation: accepted, failed, or still open."""
    value, trial = budget.value(trainer), run.trial
    if trial is None:
        return None, budget.better(value, run.best)
    following = next((e for e in run.schedule.left(run.reached) if e > trial.epoch), None)
    every = trainer.check_val_every_n_epoch or 1
    due = judging_epoch(trial.epoch, following, end, every)
    if trainer.current_epoch < due or not is_last_validation(trainer):
        return trial, run.best
    if budget.exceeded(value, run.best):
        return replace(trial, failed_at=trainer.current_epoch), run.best
    return None, budget.better(value, run.best)


def take_back(
    trainer: pl.Trainer, module: pl.LightningModule, keeper: PlanKeeper, trial: Trial
) -> None:
    """Undo the last cut: shapes, weights, optimizer state and plan are as before it.

    Learning rates and everything else that follows time goes on.
    """
    before, current = {id(p) for p in module.parameters()}, keeper.plan
    done = recover(
        module, keeper.anatomy, trial.plan, trial.weights, current=current, spare=keeper.spare
    )
    module.zero_grad(set_to_none=True)  # of the model that is given up
    try:
        replaced = {id(r.old): r.new for r in done.rewrites if id(r.old) in before}
        known = before | {id(new) for new in replaced.values()}
        names = {id(p): name for name, p in module.named_parameters()}
        returned = {name: p for name, p in module.named_parameters() if id(p) not in known}
        optimizers, states = trainer.strategy.optimizers, trial.optimizers
        restore(optimizers, replaced, names, states, trial.groups, returned)
    except BaseException:
        keeper.store(cancel(module, keeper.anatomy, done))
        raise
    keeper.plan = trial.plan
