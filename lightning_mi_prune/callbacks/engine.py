"""What happens at each step of a run: decide, cut, roll back."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_mi_prune.calibration.activations import Recorder
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.callbacks.distributed import (
    agree,
    broadcast_decision,
    on_all_ranks,
    rewrap_ddp,
)
from lightning_mi_prune.callbacks.monitors import (
    BestOf,
    EarlyStoppingHold,
    MetricGuard,
    restart_comparison,
)
from lightning_mi_prune.callbacks.schedule import Schedule, fit_schedule, judging_epoch
from lightning_mi_prune.callbacks.sizes import macs_of, report_no_cut
from lightning_mi_prune.callbacks.state import PendingCut, RunState, Snapshot
from lightning_mi_prune.callbacks.trainer import is_dev_run, is_last_validation, run_length
from lightning_mi_prune.callbacks.verification import DryRun
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reporting.report import Cut, PruningReport
from lightning_mi_prune.reporting.tables import print_cut
from lightning_mi_prune.surgery.optimizers import (
    parameter_names,
    restore_state,
    snapshot_state,
    update_optimizers,
)
from lightning_mi_prune.surgery.transaction import cancel_cut, cut_model, restore_model
from lightning_mi_prune.surgery.verification import held_elsewhere

__all__ = [
    "PruningEngine",
    "check_metric",
    "roll_back",
    "take_snapshot",
]


def take_snapshot(
    trainer: pl.Trainer, module: pl.LightningModule, plan: PruningPlan, epoch: int, run: RunState
) -> Snapshot:
    """Keep what it takes to undo the cut that comes now: copies on the CPU."""
    tensors = chain(module.named_parameters(), module.named_buffers())
    names = {id(p): name for name, p in module.named_parameters()}
    return Snapshot(
        epoch=epoch,
        reached=run.reached,
        kept=run.kept,
        plan=plan,
        weights={name: t.detach().to("cpu", copy=True) for name, t in tensors},
        optimizers=snapshot_state(trainer.strategy.optimizers, names),
        groups=parameter_names(trainer.strategy.optimizers, names),
    )


def check_metric(
    trainer: pl.Trainer, budget: MetricGuard, run: RunState, end: float
) -> tuple[Snapshot | None, float | None]:
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


def roll_back(
    trainer: pl.Trainer, module: pl.LightningModule, tracker: PlanTracker, trial: Snapshot
) -> None:
    """Undo the last cut: shapes, weights, optimizer state and plan are as before it.

    Learning rates and everything else that follows time goes on.
    """
    before, current = {id(p) for p in module.parameters()}, tracker.plan
    done = restore_model(
        module,
        tracker.graph,
        trial.plan,
        trial.weights,
        current=current,
        available=tracker.removed_layers,
    )
    module.zero_grad(set_to_none=True)  # of the model that is given up
    try:
        replaced = {id(r.old): r.new for r in done.rewrites if id(r.old) in before}
        known = before | {id(new) for new in replaced.values()}
        names = {id(p): name for name, p in module.named_parameters()}
        returned = {name: p for name, p in module.named_parameters() if id(p) not in known}
        optimizers, states = trainer.strategy.optimizers, trial.optimizers
        restore_state(optimizers, replaced, names, states, trial.groups, returned)
    except BaseException:
        tracker.store(cancel_cut(module, tracker.graph, done))
        raise
    tracker.plan = trial.plan


class PruningEngine(pl.Callback, ABC):
    """The steps of a pruning method; subclasses say what may go, when, and who judges.

    Args:
        module: Path of the submodule to search for prunable networks; "" searches all.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
        best_of: What monitors may compare (:func:`monitors.restart_comparison`).
        budget: What a cut may cost before it is taken back; None keeps every cut.
    """

    order: ClassVar[int]

    def __init__(
        self,
        *,
        module: str,
        seed: int,
        verbose: bool,
        best_of: BestOf,
        budget: MetricGuard | None,
    ) -> None:
        super().__init__()
        self.report = PruningReport()
        self._within, self._seed = module, seed
        self._verbose, self._best_of, self._budget = verbose, best_of, budget
        self._tracker: PlanTracker | None = None
        self._recorder: Recorder | None = None
        self._patience = EarlyStoppingHold()
        self._run = RunState()
        self._dry_run = DryRun()
        self._waits = False
        self._share = ""
        self._options: dict[str, object] = {}  # that decide on the result, for ranks to compare
        self._first: int | None = None
        self._last: int | None = None

    @abstractmethod
    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, object]:
        """Find what may go and check what can be known; returns what all ranks must agree on."""

    @abstractmethod
    def schedule(self, length: float, every: int, begin: int) -> Schedule:
        """The cuts of a run of ``length`` epochs, from ``begin``, validated after ``every``."""

    @abstractmethod
    def decide(
        self, module: pl.LightningModule, heard: CalibrationData, goal: float, kept: float
    ) -> Decision | None:
        """What stays at a goal of the schedule; None where the model is that small."""

    @abstractmethod
    def describe(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        pending: PendingCut,
        before: PruningPlan,
    ) -> Cut:
        """The cut that was just made, from the plan ``before`` it."""

    @abstractmethod
    def curves(self, module: pl.LightningModule) -> dict[str, float]:
        """What loggers get after every epoch of what this callback may cut."""

    @abstractmethod
    def sparsity(self, module: pl.LightningModule) -> float:
        """Share of the parameters this callback may cut that is gone, of the model as built."""

    @abstractmethod
    def check_state(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Refuse optimizers whose state could not follow."""

    @abstractmethod
    def retry(self, trainer: pl.Trainer, trial: Snapshot, failed: float) -> str:
        """Say in the run what comes after a cut to ``failed`` was taken back; and in words."""

    @abstractmethod
    def plan_to_verify(self) -> PruningPlan | None:
        """A cut to try on a copy of the module before the first one; None where none is left."""

    def reconstruct(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        selection: Decision,
        heard: CalibrationData,
    ) -> Decision:
        """The selection with weights that make up for the cut; every rank comes by."""
        return selection

    def warn_of_holders(
        self, trainer: pl.Trainer, module: pl.LightningModule, cut: Sequence[nn.Parameter]
    ) -> None:
        """Name what would go on holding parameters that a cut replaces."""
        others: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        strangers = {
            type(c).__name__: c
            for c in others
            if not isinstance(c, PruningEngine) and not type(c).__module__.startswith("lightning.")
        }
        held = held_elsewhere({"": module, **strangers}, cut)
        if held:
            rank_zero_warn(
                f"{', '.join(map(repr, held[:6]))} hold parameters that a cut replaces, and would "
                "go on with the old ones. Read them from the module where they are used "
                "(named_parameters), or collect them again in on_train_epoch_start.",
                category=PruningWarning,
            )

    def quiet(self) -> None:
        """Take down all hooks that are up."""
        self._close()

    @property
    def plan(self) -> PruningPlan | None:
        """The plan the module carries now; None before ``setup``."""
        return None if self._tracker is None else self._tracker.plan

    def _decide(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        run = self._run
        goal = run.schedule.due(epoch, run.reached)
        if goal is None or run.heard is None or is_dev_run(trainer):
            return
        started, heard, plan = time.perf_counter(), run.heard, self._tracked().plan
        agree(trainer.strategy, "the cut", f"epoch {epoch}, to {goal}, of {plan.digest()}")
        self.check_state(trainer, module)
        run.heard = None  # validation runs again if this fails; training steps do not

        def choose() -> Decision | None:
            chosen = self.decide(module, heard, goal, run.kept)
            return None if chosen is None else _on_cpu(chosen)

        selection = broadcast_decision(trainer.strategy, choose)
        run.seconds["ranking"] = time.perf_counter() - started
        if selection is None:
            self._reached(trainer, heard, goal)
            run.reached, run.felt = goal, None
            return
        self._check_steps(trainer, module, selection.plan)
        started = time.perf_counter()
        heard.moments = {}  # as large as the model; what follows needs the room
        refitted = _on_cpu(self.reconstruct(trainer, module, selection, heard))
        # All ranks solved the same sums; with other processors they may differ in the last digit.
        refitted = broadcast_decision(trainer.strategy, lambda: refitted)
        run.pending, run.felt = PendingCut(epoch, goal, refitted), None
        # Only a cut that may be taken back is chosen again from the same calls.
        ranks = heard.ranks if heard.stacks and self._budget is not None else ()
        run.compared = CalibrationData(stacks=heard.stacks, ranks=ranks)
        run.seconds["reconstruction"] = time.perf_counter() - started

    def _check_steps(
        self, trainer: pl.Trainer, module: pl.LightningModule, plan: PruningPlan
    ) -> None:
        """Try a cut that does more than the one before the first: it empties groups, or layers go.

        Raises:
            PruningError: If a step of the module cannot do without what the plan removes.
        """
        graph, current = self._tracked().graph, self._tracked().plan
        stacks = {stack.name for stack in graph.stacks}
        more = (n in stacks or not plan.width(n) for n in plan.sizes if current.width(n))
        if any(more):
            on_all_ranks(
                trainer.strategy,
                "a cut of a copy of the module",
                lambda: self._dry_run.check(trainer, module, graph, current, plan),
            )

    def _reached(self, trainer: pl.Trainer, heard: CalibrationData, goal: float) -> None:
        """Say that no cut is needed for a goal."""
        met = f"The model meets {self._named(goal)} already: no cut."
        report_no_cut(self.report, met, "Ask for less.", last=not self._run.schedule.left(goal))

    def _cut(self, trainer: pl.Trainer, module: pl.LightningModule, pending: PendingCut) -> None:
        run, tracker, selection = self._run, self._tracked(), pending.selection
        started, current = time.perf_counter(), tracker.plan
        macs_before = self.report.macs if self.report.cuts else macs_of(trainer, module, run)
        self.check_state(trainer, module)
        if self._budget is not None:
            run.trial = take_snapshot(trainer, module, current, pending.epoch, run)
        compensated, rotated = selection.compensated, selection.rotated
        done = cut_model(
            module,
            tracker.graph,
            selection.plan,
            current=current,
            compensated=compensated,
            rotated=rotated,
        )
        try:
            tracker.plan = done.after
            cut = self.describe(trainer, module, pending, current)
            names = {id(p): name for name, p in module.named_parameters()}
            update_optimizers(
                trainer.strategy.optimizers, done.rewrites, done.removed_parameters, names
            )
        except BaseException:  # a checkpoint that is written now must hold a whole model
            cancel_cut(module, tracker.graph, done)
            tracker.plan, run.trial = current, None
            raise
        tracker.store(done.removed)
        del done  # the last to hold the old parameters
        run.pending, run.reached = None, pending.sparsity
        run.kept *= selection.kept_share
        self.report.macs = macs_before
        self.report.cuts.append(cut)
        self._resized(trainer)
        seconds = {**run.seconds, "surgery": time.perf_counter() - started}
        self.report.cuts[-1] = replace(cut, seconds=seconds)
        if self._verbose and trainer.is_global_zero:
            print_cut(self.report.cuts[-1], self.report)

    def _take_back(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run, budget, trial = self._run, self._budget, self._run.trial
        if budget is None or trial is None:
            return
        roll_back(trainer, module, self._tracked(), trial)
        self.quiet()
        run.felt = None
        failed, run.reached, run.trial, run.pending = run.reached, trial.reached, None, None
        run.kept = trial.kept
        if self.report.cuts:
            self.report.undone.append(self.report.cuts.pop())
        then = self.retry(trainer, trial, failed)
        self._resized(trainer)
        rank_zero_info(
            f"The cut of epoch {trial.epoch} to {self._named(failed)} cost more than {budget} and "
            f"was taken back; next: {then}."
        )

    def _named(self, goal: float) -> str:
        return f"sparsity {goal:.3f}"

    def _resized(self, trainer: pl.Trainer) -> None:
        """What must follow whenever the model has another size."""
        rewrap_ddp(trainer.strategy)
        agree(trainer.strategy, "the plan after the cut", self._tracked().plan.digest())
        self._run.stale = True
        if self._best_of != "any_size":
            restart_comparison(trainer, self._best_of)

    def _tracked(self) -> PlanTracker:
        if self._tracker is None:
            raise MisconfigurationException(
                "The callback was not set up by a Trainer; expected Trainer(callbacks=[...])."
            )
        return self._tracker

    def _fit(self, length: float, goal: float, every: int, begin: int, **options: Any) -> Schedule:
        """:func:`fit_schedule` with the epochs and the recovery this callback asks for."""
        try:
            found = fit_schedule(
                length,
                goal,
                first_epoch=self._first,
                last_epoch=self._last,
                every=every,
                begin=begin,
                recovery=1 if self._budget is None else 2,
                **options,
            )
        except PruningError as error:
            raise MisconfigurationException(f"{error}{self._share}") from error
        judged = judging_epoch(found.epochs[-1], None, length, every)
        if self._budget is not None and (judged + 1) % every:
            raise MisconfigurationException(
                f"No validation comes after the last cut at epoch {found.epochs[-1]} in time to "
                f"take it back in a run of {counted(length, 'epoch')}; lower last_epoch or raise "
                "max_epochs."
            )
        return found

    def _others(self, trainer: pl.Trainer) -> list[PruningEngine]:
        """Other pruning callbacks of the run: layers go first, then units."""
        found: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in found if isinstance(c, PruningEngine) and c is not self]

    def _is_last(self, trainer: pl.Trainer) -> bool:
        return not any(other.order > self.order for other in self._others(trainer))

    def _begin(self, trainer: pl.Trainer) -> int:
        """Epochs that are over when this callback's part of the run begins."""
        begin = self._run.begin if self._run.fitted.epochs else trainer.current_epoch
        earlier = [other for other in self._others(trainer) if other.order < self.order]
        return max([begin, *(math.ceil(other._end(trainer)) for other in earlier)])

    def _end(self, trainer: pl.Trainer) -> float:
        """Epoch at which this callback's part of the run is over: half-way if one follows."""
        length, begin = run_length(trainer), self._begin(trainer)
        return length if self._is_last(trainer) else begin + (length - begin) // 2

    def _listens(self, trainer: pl.Trainer) -> bool:
        run, fitting = self._run, trainer.state.fn == "fit" and not trainer.sanity_checking
        epoch = trainer.current_epoch + 1
        if not fitting or run.pending is not None or run.schedule.due(epoch, run.reached) is None:
            return False
        # A cut that a missed validation made late must still be followed by training.
        return is_dev_run(trainer) or epoch < self._end(trainer)

    def _is_failed(self) -> bool:
        return self._run.trial is not None and self._run.trial.failed_at is not None

    def _is_finished(self) -> bool:
        run = self._run
        decided = run.pending is None and run.trial is None and not run.stale
        return decided and not run.schedule.left(run.reached)

    def _forget_stale(self, trainer: pl.Trainer) -> None:
        """What was compared between a change of size and the validation that starts now."""
        if not self._run.stale or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._run.stale = False
        if self._best_of != "any_size":
            restart_comparison(trainer, "final_size")

    def _close(self) -> Recorder | None:
        """Take our hooks down; returns what listened."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
        return recorder


def _on_cpu(selection: Decision) -> Decision:
    cpu = torch.device("cpu")
    compensated, rotated = (
        move_tensors(given, cpu) for given in (selection.compensated, selection.rotated)
    )
    return replace(selection, compensated=compensated, rotated=rotated)
