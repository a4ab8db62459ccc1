"""RunEngine: collect, decide, cut and roll back in one run of the Trainer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

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
    padded_rows,
    refuse_unsupported,
    rewrap_ddp,
)
from lightning_mi_prune.callbacks.monitors import (
    BestOf,
    EarlyStoppingHold,
    MetricGuard,
    check_monitor,
    compare_metric,
    restart_comparison,
    validated_metrics,
    without_best,
)
from lightning_mi_prune.callbacks.resume import (
    OptimizerPlan,
    check_snapshot,
    forget_metric,
    reconcile_budget,
    rerun_validation,
    resumed,
    roll_back,
    take_snapshot,
)
from lightning_mi_prune.callbacks.schedule import (
    CutSchedule,
    decision_epoch,
    fit_schedule,
    is_dev_run,
    is_last_validation,
    run_length,
    validation_batches,
)
from lightning_mi_prune.callbacks.state import PendingCut, RunState, Session, saved_graph
from lightning_mi_prune.callbacks.verification import DryRun, discover_in_step
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted
from lightning_mi_prune.core.options import Schedule
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reporting.records import Cut
from lightning_mi_prune.reporting.report import PruningReport
from lightning_mi_prune.reporting.tables import print_cut
from lightning_mi_prune.surgery.optimizer_state import check_optimizers
from lightning_mi_prune.surgery.optimizers import update_optimizers
from lightning_mi_prune.surgery.transaction import cancel_cut, cut_model

__all__ = [
    "PruningStrategy",
    "RunEngine",
    "StepRecorder",
]


class StepRecorder(Protocol):
    """Records training steps of the epoch before a cut, into the state of the run."""

    def begin(self, session: Session, batch: Any, index: int) -> None:
        """A training step begins on a batch."""

    def end(self) -> None:
        """A training step is over."""

    def close(self) -> None:
        """Take all hooks down."""

    def save(self, session: Session, state: dict[str, Any]) -> None:
        """Complete the state of the callback in a checkpoint; every rank must call it."""


class PruningStrategy(Protocol):
    """What is removed, units or layers, and how it is chosen; the engine knows when.

    Attributes:
        order: Strategies of one run take turns in this order: layers go first.
        schedule: When to cut, as the user asks for it.
        goal: Where the schedule ends: a sparsity, or 1 for all of the way to another budget.
        budget: The budget in words; "" for a sparsity.
        late: Whether a single cut comes as late as it may.
        needs_graph: Whether it can only remove what a batch shows.
    """

    order: int
    schedule: Schedule
    goal: float
    budget: str
    late: bool
    needs_graph: bool

    @property
    def steps(self) -> StepRecorder | None:
        """What records training steps; None needs none."""

    def check_paths(self, module: nn.Module) -> None:
        """Refuse paths that the module does not have, before the first batch."""

    def prepare(self, session: Session) -> Mapping[str, object]:
        """Choose what may go and check what can be known; what all ranks must have alike."""

    def reconcile(self, session: Session) -> list[str]:
        """Drop what does not fit the options a run resumes with; one sentence for each."""

    def parameters(self, session: Session) -> list[nn.Parameter]:
        """All parameters that a cut may replace or remove."""

    def plan_to_verify(self, session: Session) -> PruningPlan | None:
        """A cut to try on a copy before the first one; None where nothing is left to cut."""

    def recorder(self, session: Session) -> Recorder:
        """What records the validation that begins."""

    def collect(self, session: Session, recorder: Recorder) -> CalibrationData | None:
        """What all ranks recorded; None, with a warning, where that is not enough."""

    def decide(self, session: Session, data: CalibrationData, goal: float) -> Decision | None:
        """What stays at a goal of the schedule; None where the model is that small."""

    def reconstruct(self, session: Session, decision: Decision, data: CalibrationData) -> Decision:
        """The decision with weights that make up for the cut; every rank must call it."""

    def record(self, session: Session, pending: PendingCut, before: PruningPlan) -> Cut:
        """The cut that was just made, for the report."""

    def sizes(self, session: Session) -> dict[str, float]:
        """What loggers get after every epoch, and the ``"sparsity"``."""

    def retry(self, session: Session, failed: float, end: float) -> str:
        """Schedule what comes after a cut to ``failed`` was rolled back; returns a description."""

    def name_goal(self, goal: float) -> str:
        """A goal of the schedule, in words."""

    def no_cut(self, session: Session, data: CalibrationData, goal: float) -> tuple[str, str]:
        """Why nothing is cut for a goal, and what to change for a cut, in a sentence each."""


class RunEngine:
    """The steps of a run; the callback calls each from the hook of that name.

    Args:
        strategy: What is removed, and how it is chosen.
        name: Name of the callback, for messages.
        options: Options that decide on the result, by name; all ranks must have them alike.
        graph: What the module can lose, where the user gives that; None finds it.
        guard: What a cut may cost before it is rolled back; None keeps every cut.
        best_of: What monitors may compare (:func:`monitors.restart_comparison`).
        verbose: Whether each cut prints a table on rank zero.
        write_report: Whether, or where, a run ends with its report.
    """

    def __init__(
        self,
        strategy: PruningStrategy,
        *,
        name: str,
        options: Mapping[str, object],
        graph: PruningGraph | None,
        guard: MetricGuard | None,
        best_of: BestOf,
        verbose: bool,
        write_report: bool | str,
    ) -> None:
        self.strategy, self.name, self.options = strategy, name, options
        self._given = graph
        self.guard, self.best_of, self.verbose = guard, best_of, verbose
        self.write_report = write_report
        self.state = RunState()
        self.recorder: Recorder | None = None
        self._tracker: PlanTracker | None = None
        self._patience = EarlyStoppingHold()
        self._optimizers = OptimizerPlan()
        self._dry_run = DryRun()
        self._awaits_batch = False  # which shows what can be pruned
        self._warned = False  # why a cut waits
        self._turn = ""

    @property
    def plan(self) -> PruningPlan | None:
        """The plan the module carries now; None before ``setup``, or before the first batch."""
        tracker = self._tracker
        return None if tracker is None or not tracker.is_known else tracker.plan

    @property
    def graph(self) -> PruningGraph | None:
        """What the module can lose; None before that is known."""
        if self._tracker is None or self.plan is None:
            return None
        return self.state.graph or self._given or self._tracker.graph

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Attach the plan to the module's state dict; refuse what cannot work."""
        alike = [e for e in self._others(trainer) if e.strategy.order == self.strategy.order]
        if alike:
            raise MisconfigurationException(
                f"{len(alike) + 1} {self.name} in one Trainer would each cut by a plan of their "
                "own; expected one. Give one of them all there is to cut, or fit twice."
            )
        self._tracker = PlanTracker.of(module)
        if stage == "fit":
            refuse_unsupported(trainer, layers=self.strategy.order == 0)
            self.state, self._optimizers, self._dry_run = RunState(), OptimizerPlan(), DryRun()
            self._awaits_batch = False

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self.state = RunState.from_dict(state)

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any], key: str) -> None:
        """Complete a checkpoint: a validation that is needed is run again, whole, on resuming."""
        state = self.state
        collects = self._collects(trainer) and not state.has_saved_calibration
        compares = state.snapshot is not None and state.snapshot.failed_epoch is None
        if (collects or compares) and "loops" in checkpoint:
            rerun_validation(trainer, checkpoint["loops"])
        self._optimizers.save(checkpoint)
        mine = checkpoint.get("callbacks", {}).get(key)
        if self.strategy.steps is not None and mine is not None and self._tracker is not None:
            session = self._session(trainer, trainer.lightning_module)
            self.strategy.steps.save(session, mine)

    def load_optimizers(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        checkpoint: Mapping[str, Any],
        key: str,
    ) -> None:
        """Let the optimizers be made as those of the checkpoint were."""
        if trainer.state.fn != "fit":
            return
        graph = saved_graph(checkpoint, key)  # the state of the callback is loaded after this
        if graph is not None:
            self._tracked().adopt(graph)
        self._optimizers.load(module, self._tracked(), checkpoint)

    def begin_fit(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check everything that can be known before the first batch."""
        self._prepare(trainer, module)
        state = self.state
        dropped = reconcile_budget(state, self.strategy.budget)
        for sentence in [*dropped, *forget_metric(state, self.guard)]:
            rank_zero_warn(sentence)
        if self.guard is not None:
            check_monitor(trainer, module, self.guard.monitor)
        if not self._awaits_batch:
            self._begin_run(trainer, module)

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Choose what may go; unless a graph is given, a batch has to show what there is."""
        session, graph = self._session(trainer, module), self.state.graph or self._given

        def prepare() -> Mapping[str, object]:
            if graph is not None:
                session.tracker.adopt(graph)
            self.strategy.check_paths(module)
            self._awaits_batch = not session.tracker.is_whole
            if self._awaits_batch:
                return {**self.options, "whether the graph is known": False}
            found = self.strategy.prepare(session)
            return {**self.options, **found, **resumed(self.state, session.plan)}

        on_all_ranks(trainer.strategy, "what to prune and how", prepare)

    def _begin_run(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Reconcile what a run resumes with and the options, now that it is known what may go."""
        session = self._session(trainer, module)
        if self._given is None and self.state.graph is None:  # known from an earlier fit
            self.state.graph = session.graph
        for dropped in self.strategy.reconcile(session):
            rank_zero_warn(dropped)
        for other in self._others(trainer):  # one run, one report: that of the first turn
            first, second = sorted((self, other), key=lambda engine: engine.strategy.order)
            second.state.report = first.state.report
        self._optimizers.begin(session.tracker)

    def check_metric_is_logged(self, trainer: pl.Trainer) -> None:
        """Refuse a run whose sanity check logs no metric to compare."""
        if self.guard is not None:
            self.guard.value(trainer)

    def begin_training(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Fit the schedule into the run, now that its length is known."""
        state, session = self.state, self._session(trainer, module)
        if state.snapshot is not None:  # of a resumed run, whose optimizers have their state now
            known = (state.snapshot, module, session.graph, session.plan)
            on_all_ranks(
                trainer.strategy,
                "the snapshot before the last cut",
                lambda: check_snapshot(*known, trainer.strategy.optimizers),
            )
        if is_dev_run(trainer):
            rank_zero_info("fast_dev_run: calibration to validation, but no cut is made.")
            state.schedule = CutSchedule((trainer.current_epoch + 1,), (1.0,))
            return
        validates = validation_batches(trainer) != 0
        agree(trainer.strategy, "whether there are validation batches", str(validates))
        if not validates:
            raise MisconfigurationException(
                "Pruning calibrates in validation, but this run has none. Give the trainer a "
                "val_dataloader and a validation_step, with limit_val_batches above 0."
            )
        begin = self._begin(trainer)
        if self._others(trainer):
            self._turn = (
                f" Layers and units share this run of {counted(run_length(trainer), 'epoch')}: "
                f"{self.name} has epochs {begin} to {math.ceil(self._end(trainer)) - 1}."
            )
        fitted = on_all_ranks(
            trainer.strategy,
            "the schedule of the cuts",
            lambda: self._fit(self._end(trainer), trainer.check_val_every_n_epoch or 1, begin),
        )
        if fitted != state.fitted:
            state.fitted, state.schedule, state.begin = fitted, fitted, begin

    def begin_validation(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Record, if the next epoch starts with a cut; the last validation before it counts."""
        self._forget_outdated(trainer)
        self._hold_patience(trainer)
        if not self._awaits_batch:  # else its first batch shows first what there is to record
            self._record(trainer, module)

    def _record(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self._collects(trainer) or not is_last_validation(trainer):
            return
        if self._awaits_batch:
            raise PruningError(
                f"What {type(module).__name__} can lose is not known: neither its training_step "
                "nor its validation_step runs a network whose outputs could be compared. Expected "
                "steps that call it; or give graph=discover(model, ...)."
            )
        self._stop_recording()
        self.state.calibration = None
        self.recorder = self.strategy.recorder(self._session(trainer, module)).__enter__()

    def begin_validation_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int, loader: int
    ) -> None:
        """Try a cut on the first batch; give every batch its share of the positions."""
        if self._awaits_batch:
            self._discover(trainer, module, "validation_step", batch, loader)
            self._record(trainer, module)
        self._try(trainer, module, "validation_step", batch, loader)
        if self.recorder is not None:
            self.recorder.start_batch(*padded_rows(trainer, index, loader))

    def end_validation(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Accept or refuse the last cut, add up what all ranks recorded, decide if it is time."""
        state, recorder = self.state, self._stop_recording()
        if self.guard is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            snapshot, best = compare_metric(trainer, self.guard, state, self._end(trainer))
            # What layers were allowed to cost before is not charged to units.
            if trainer.current_epoch >= self._begin(trainer):
                state.snapshot, state.best = snapshot, best
            if state.snapshot is None and state.pending is None:
                state.comparison.ranks = ()  # accepted: nothing will be chosen from it again
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._is_last(trainer):
            state.report.monitor = self.guard.monitor if self.guard is not None else ""
            state.report.add_metrics(trainer.current_epoch, validated_metrics(trainer))
        if recorder is None or self._has_failed():
            return
        data = self.strategy.collect(self._session(trainer, module), recorder)
        if data is None:
            self._warned = True
            return
        state.calibration, state.calibration_epoch = data, trainer.current_epoch
        if state.examples and not state.report.macs:  # a logged curve begins before the first cut
            state.report.macs = self._session(trainer, module).count_macs()
        if trainer.is_last_batch:
            self._decide(trainer, module, trainer.current_epoch + 1)

    def end_epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Log sizes; decide what to cut at the start of the next epoch, if that is open."""
        self._hold_patience(trainer)
        sizes = {} if self._awaits_batch else self._logged(trainer, module)
        for name, value in sizes.items():
            module.log(
                f"prune/{name}", float(value), on_step=False, on_epoch=True, rank_zero_only=True
            )
        if not self._collects(trainer) or self._has_failed() or is_dev_run(trainer):
            return
        if self.state.calibration is None and self._warned:
            self._warned = False
            return
        if self.state.calibration is None:
            rank_zero_warn(
                f"The cut of epoch {trainer.current_epoch + 1} waits: no validation ran in this "
                "epoch. Validate in every epoch that comes before a cut."
            )
            return
        self._decide(trainer, module, trainer.current_epoch + 1)

    def carry_out(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """As an epoch starts: cut, or roll the last cut back.

        Some resumptions skip the end of an epoch, and what would have been decided there.
        """
        state, epoch = self.state, trainer.current_epoch
        if state.snapshot is not None and state.snapshot.failed_epoch is not None:
            if epoch <= state.snapshot.failed_epoch:
                return
            self._roll_back(trainer, module)
        collected = state.calibration is not None and state.calibration_epoch < epoch
        if state.pending is None and collected:
            self._decide(trainer, module, epoch)
        if state.pending is not None and state.pending.epoch <= epoch:
            self._cut(trainer, module, state.pending)

    def begin_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int
    ) -> None:
        """Try a cut on the first batch; some resumptions skip the start of an epoch."""
        if self._awaits_batch:
            self._discover(trainer, module, "training_step", batch)
        self._try(trainer, module, "training_step", batch)
        self.carry_out(trainer, module)
        steps = self.strategy.steps
        collects = self._collects(trainer) and not self._awaits_batch
        if steps is not None and self.state.calibration is None and collects:
            steps.begin(self._session(trainer, module), batch, index)

    def end_step(self) -> None:
        """Add what a training step recorded."""
        if self.strategy.steps is not None:
            self.strategy.steps.end()

    def end_training(self, trainer: pl.Trainer) -> None:
        """Warn if the run ended before the schedule did."""
        state = self.state
        left = () if is_dev_run(trainer) else state.schedule.left(state.reached)
        if left:
            total = len(state.schedule.epochs)
            rank_zero_warn(
                f"Training ended after {total - len(left)} of {counted(total, 'cut')} (the next "
                f"was due at epoch {left[0]}); the model is larger than asked for."
            )
        if self.best_of != "any_size" and state.report.cuts and self._is_last(trainer):
            for metric in without_best(trainer):
                rank_zero_warn(
                    f"ModelCheckpoint(monitor={metric!r}) saved no model of the final size, so it "
                    "has no best one; save after the last cut, or pass "
                    "monitoring=Monitoring(best_of='any_size')."
                )
        if state.snapshot is not None:
            rank_zero_warn(
                f"Training ended before the cut of epoch {state.snapshot.epoch} could be accepted "
                "or rolled back; train longer, or compare the metric yourself."
            )
        self._write_report(trainer)

    def _write_report(self, trainer: pl.Trainer) -> None:
        """Write the report of a run that cut something; every rank must call it."""
        report, where = self.state.report, self.write_report
        happened = bool(report.cuts or report.undone) and not is_dev_run(trainer)
        if not where or not happened or not self._is_last(trainer):
            return
        paths = [Path(where)] if isinstance(where, str) else []
        if not paths and trainer.loggers:
            folder = trainer.log_dir  # rank 0 broadcasts it
            paths = [Path(folder, f"report.{end}") for end in ("html", "json") if folder]
        for path in paths if trainer.is_global_zero else ():
            _write(report, path)

    def close(self, module: pl.LightningModule | None = None) -> None:
        """Take all hooks down and release early stopping; after an error, with the module."""
        self._stop_all()
        self._patience.release()
        if module is not None:
            self._optimizers.abandon(module)

    # Cuts

    def _decide(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        state, session = self.state, self._session(trainer, module)
        goal, data = state.schedule.due(epoch, state.reached), state.calibration
        if goal is None or data is None or is_dev_run(trainer):
            return
        started, strategy = time.perf_counter(), trainer.strategy
        agree(strategy, "the cut", f"epoch {epoch}, to {goal}, of {session.plan.digest()}")
        check_optimizers(strategy.optimizers, self.strategy.parameters(session))
        state.calibration = None  # validation runs again if this fails; training steps do not

        def choose() -> Decision | None:
            chosen = self.strategy.decide(session, data, goal)
            return None if chosen is None else _on_cpu(chosen)

        decision = broadcast_decision(strategy, choose)
        state.seconds["ranking"] = time.perf_counter() - started
        if decision is None:
            _report_no_cut(
                state.report, *self.strategy.no_cut(session, data, goal), state.schedule.left(goal)
            )
            state.reached, state.gradients = goal, None
            return
        self._verify(session, decision.plan)
        started = time.perf_counter()
        # As large as the model; what follows needs the room.
        data.moments, data.half, data.gradients = {}, {}, None
        solved = _on_cpu(self.strategy.reconstruct(session, decision, data))
        # All ranks solved the same sums; with other processors they may differ in the last digit.
        solved = broadcast_decision(strategy, lambda: solved)
        state.pending, state.gradients = PendingCut(epoch, goal, solved), None
        # Only a cut that may be rolled back is chosen again from the same calls.
        ranks = data.ranks if data.stacks and self.guard is not None else ()
        state.comparison = CalibrationData(stacks=data.stacks, ranks=ranks)
        state.seconds["reconstruction"] = time.perf_counter() - started

    def _verify(self, session: Session, plan: PruningPlan) -> None:
        """Try a cut that does more than the one before the first: it empties groups, or layers go.

        Raises:
            PruningError: If a step of the module cannot do without what the plan removes.
        """
        current = session.plan
        stacks = {stack.name for stack in session.graph.stacks}
        smaller = [name for name in plan.sizes if plan.width(name) < current.width(name)]
        if any(name in stacks or not plan.width(name) for name in smaller):
            started = time.perf_counter()
            check = partial(self._dry_run.check, session.trainer, session.module, session.graph)
            on_all_ranks(
                session.trainer.strategy,
                "a cut of a copy of the module",
                lambda: check(current, plan),
            )
            self._spend("discovery", started)

    def _discover(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: str,
        batch: Any,
        loader: int = 0,
    ) -> None:
        """Find what can be pruned by what a step does, if that is not known.

        Rank 0 finds it for all; with two callbacks the first one does. A step that runs no network
        shows nothing: then one of another kind has to.
        """
        tracker, started = self._tracked(), time.perf_counter()
        if not tracker.is_whole:

            def find() -> str:
                needed = any(engine.strategy.needs_graph for engine in _engines(trainer))
                try:
                    found = discover_in_step(trainer, module, step, batch, loader)
                except PruningError:
                    if needed:
                        raise
                    found = None
                if found is None and needed:
                    return ""
                return (found or PruningGraph()).to_json()

            text = broadcast_decision(trainer.strategy, find)
            if not text:
                return
            tracker.extend(PruningGraph.from_json(text))
            rank_zero_info(f"Found in the first batch of {type(module).__name__}:\n{tracker.graph}")
            for engine in _engines(trainer):
                engine.state.graph = tracker.graph
        self._prepare(trainer, module)
        self._begin_run(trainer, module)
        if self.state.graph is not None:
            refused = self.state.graph.refused
            self.state.report.left_out = [f"{part.name}: {part.reason}" for part in refused]
        self._spend("discovery", started)

    def _try(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: str,
        batch: Any,
        loader: int = 0,
    ) -> None:
        """Run a step once, on a copy of the whole module that was cut."""
        over = self.state.fitted.epochs and self._is_finished()
        if trainer.state.fn != "fit" or self._dry_run.has(step) or over or self._awaits_batch:
            return
        self._dry_run.remember(step, batch, loader)
        session, started = self._session(trainer, module), time.perf_counter()
        plan = self.strategy.plan_to_verify(session)
        if plan is not None:
            check = partial(self._dry_run.check, trainer, module, session.graph, session.plan)
            on_all_ranks(
                trainer.strategy,
                f"a cut of a copy of the module, tried in {step}",
                lambda: check(plan, only=step),
            )
            self._spend("discovery", started)

    def _spend(self, part: str, started: float) -> None:
        """Count the time since ``started`` for a part of the cut that comes next."""
        seconds = self.state.seconds
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started

    def _cut(self, trainer: pl.Trainer, module: pl.LightningModule, pending: PendingCut) -> None:
        state, session, decision = self.state, self._session(trainer, module), pending.decision
        tracker, optimizers = session.tracker, trainer.strategy.optimizers
        started, current, report = time.perf_counter(), session.plan, state.report
        macs_before = report.macs if report.cuts else session.count_macs()
        check_optimizers(optimizers, self.strategy.parameters(session))
        if self.guard is not None:
            state.snapshot = take_snapshot(module, optimizers, current, pending.epoch, state)
        done = cut_model(
            module,
            tracker.graph,
            decision.plan,
            current=current,
            compensated=decision.compensated,
            rotated=decision.rotated,
        )
        try:
            tracker.plan = done.after
            cut = self.strategy.record(session, pending, current)
            names = {id(p): name for name, p in module.named_parameters()}
            update_optimizers(optimizers, done.rewrites, done.removed_parameters, names)
        except BaseException:  # a checkpoint that is written now must hold a whole model
            cancel_cut(module, tracker.graph, done)
            tracker.plan, state.snapshot = current, None
            raise
        tracker.store(done.removed)
        del done  # the last to hold the old parameters
        state.pending, state.reached = None, pending.sparsity
        state.information_kept *= decision.kept_share
        report.macs = macs_before
        report.cuts.append(cut)
        self._follow_size(trainer)
        seconds = {**state.seconds, "surgery": time.perf_counter() - started}
        report.cuts[-1], state.seconds = replace(cut, seconds=seconds), {}
        if self.verbose and trainer.is_global_zero:
            print_cut(report.cuts[-1], report)

    def _roll_back(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        state, session, snapshot = self.state, self._session(trainer, module), self.state.snapshot
        if self.guard is None or snapshot is None:
            return
        roll_back(module, trainer.strategy.optimizers, session.tracker, snapshot)
        self._stop_all()
        failed, state.reached = state.reached, snapshot.reached
        state.information_kept = snapshot.information_kept
        state.snapshot = state.pending = state.gradients = None
        if state.report.cuts:
            state.report.undone.append(state.report.cuts.pop())
        then = self.strategy.retry(session, failed, self._end(trainer))
        self._follow_size(trainer)
        rank_zero_info(
            f"The cut of epoch {snapshot.epoch} to {self.strategy.name_goal(failed)} cost more "
            f"than {self.guard} and was rolled back; next: {then}."
        )

    def _follow_size(self, trainer: pl.Trainer) -> None:
        """What must follow whenever the model has another size."""
        rewrap_ddp(trainer.strategy)
        agree(trainer.strategy, "the plan after the cut", self._tracked().plan.digest())
        self.state.outdated = True
        if self.best_of != "any_size":
            restart_comparison(trainer, self.best_of)

    # Time

    def _fit(self, length: float, every: int, begin: int) -> CutSchedule:
        """The cuts of a run of ``length`` epochs, from ``begin``, validated after ``every``."""
        asked = self.strategy.schedule
        try:
            found = fit_schedule(
                length,
                self.strategy.goal,
                ramp=asked.ramp or "cubic",
                cuts=asked.cuts,
                first_epoch=asked.first_epoch,
                last_epoch=asked.last_epoch,
                every=every,
                begin=begin,
                recovery=1 if self.guard is None else 2,
                late=self.strategy.late,
            )
        except PruningError as error:
            raise MisconfigurationException(f"{error}{self._turn}") from error
        due = decision_epoch(found.epochs[-1], None, length, every)
        if self.guard is not None and (due + 1) % every:
            raise MisconfigurationException(
                f"No validation comes after the last cut at epoch {found.epochs[-1]} in time to "
                f"roll it back in a run of {counted(length, 'epoch')}; lower last_epoch or raise "
                "max_epochs."
            )
        return found

    def _begin(self, trainer: pl.Trainer) -> int:
        """Epochs that are over when the turn of this strategy begins."""
        begin = self.state.begin if self.state.fitted.epochs else trainer.current_epoch
        order = self.strategy.order
        earlier = [other for other in self._others(trainer) if other.strategy.order < order]
        return max([begin, *(math.ceil(other._end(trainer)) for other in earlier)])

    def _end(self, trainer: pl.Trainer) -> float:
        """Epoch at which the turn of this strategy is over: half-way if one follows."""
        length, begin = run_length(trainer), self._begin(trainer)
        return length if self._is_last(trainer) else begin + (length - begin) // 2

    def _others(self, trainer: pl.Trainer) -> list[RunEngine]:
        return [engine for engine in _engines(trainer) if engine is not self]

    def _is_last(self, trainer: pl.Trainer) -> bool:
        order = self.strategy.order
        return not any(other.strategy.order > order for other in self._others(trainer))

    def _collects(self, trainer: pl.Trainer) -> bool:
        """Whether the epoch that runs ends with a decision."""
        state, epoch = self.state, trainer.current_epoch + 1
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        due = state.schedule.due(epoch, state.reached)
        if not fitting or state.pending is not None or due is None:
            return False
        # A cut that a missed validation made late must be followed by training.
        return is_dev_run(trainer) or epoch < self._end(trainer)

    def _has_failed(self) -> bool:
        return self.state.snapshot is not None and self.state.snapshot.failed_epoch is not None

    def _is_finished(self) -> bool:
        state = self.state
        accepted = state.pending is None and state.snapshot is None and not state.outdated
        return accepted and not state.schedule.left(state.reached)

    # Metrics

    def _logged(self, trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
        """Sizes of what this strategy removes; of the whole module once a run."""
        found, report = self.strategy.sizes(self._session(trainer, module)), self.state.report
        sparsity = found.pop("sparsity")
        if self._is_last(trainer):
            found["parameters"] = sum(p.numel() for p in module.parameters())
            found["sparsity"] = sparsity
            macs = report.cuts[-1].macs if report.cuts else report.macs
            found |= {"macs": macs} if macs else {}
        return found

    def _hold_patience(self, trainer: pl.Trainer) -> None:
        if not self._is_last(trainer):
            return
        held = trainer.state.fn == "fit" and self.best_of != "any_size"
        finished = all(engine._is_finished() for engine in (self, *self._others(trainer)))
        if held and not finished and not is_dev_run(trainer):
            self._patience.hold(trainer)
        else:
            self._patience.release()

    def _forget_outdated(self, trainer: pl.Trainer) -> None:
        """Forget what was compared between a change of size and the validation that starts now."""
        if not self.state.outdated or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self.state.outdated = False
        if self.best_of != "any_size":
            restart_comparison(trainer, "final_size")

    # Hooks

    def _session(self, trainer: pl.Trainer, module: pl.LightningModule) -> Session:
        return Session(trainer, module, self._tracked(), self.state)

    def _tracked(self) -> PlanTracker:
        if self._tracker is None:
            raise MisconfigurationException(
                "The callback was not set up by a Trainer; expected Trainer(callbacks=[...])."
            )
        return self._tracker

    def _stop_recording(self) -> Recorder | None:
        """Take the hooks of validation down; returns their recorder."""
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.close()
        return recorder

    def _stop_all(self) -> None:
        self._stop_recording()
        if self.strategy.steps is not None:
            self.strategy.steps.close()


def _engines(trainer: pl.Trainer) -> list[RunEngine]:
    """Engines of all pruning callbacks of a run: layers go first, then units."""
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    found = (getattr(callback, "engine", None) for callback in callbacks)
    return [engine for engine in found if isinstance(engine, RunEngine)]


def _report_no_cut(report: PruningReport, met: str, remedy: str, left: Sequence[int]) -> None:
    """Say that no cut is needed; a warning where the run ends as it began."""
    if report.cuts or report.undone or left:
        rank_zero_info(met)
    else:
        text = f"{met} Nothing was cut in this run. {remedy}"
        rank_zero_warn(text, category=PruningWarning)


def _write(report: PruningReport, path: Path) -> None:
    try:
        report.write(path)
    except PruningError as error:  # training is over, and worth more than its report
        rank_zero_warn(str(error))
    else:
        rank_zero_info(f"The report is in {path}")


def _on_cpu(decision: Decision) -> Decision:
    move: Callable[[Any], Any] = partial(move_tensors, device=torch.device("cpu"))
    return replace(decision, compensated=move(decision.compensated), rotated=move(decision.rotated))
