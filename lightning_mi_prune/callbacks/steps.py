"""What happens at each step of a run: decide, cut, take back, tell."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.companions import BestOf, Patience, restart_comparison
from lightning_mi_prune.callbacks.dry_run import DryRun
from lightning_mi_prune.callbacks.records import Pending, Trial
from lightning_mi_prune.callbacks.run import is_dev_run, run_length
from lightning_mi_prune.callbacks.schedule import Schedule, fit_schedule, judging_epoch
from lightning_mi_prune.callbacks.state import RunState
from lightning_mi_prune.callbacks.telling import macs_of, tell_no_cut
from lightning_mi_prune.callbacks.trial import begin_trial, take_back
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.dry_run import held_elsewhere
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.hooks import Ear
from lightning_mi_prune.optimizers import rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.report import Cut, PruningReport, print_cut
from lightning_mi_prune.sample import Heard, placed
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.strategies import agree, decide_once, rewrap, together
from lightning_mi_prune.surgery import cancel, operate
from lightning_mi_prune.wording import counted

__all__ = ["PruningSteps"]


class PruningSteps(pl.Callback, ABC):
    """The steps of a pruning method; subclasses say what may go, when, and who judges.

    Args:
        module: Path of the submodule to search for prunable networks; "" searches all.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
        best_of: What monitors may compare (:func:`companions.restart_comparison`).
        budget: What a cut may cost before it is taken back; None keeps every cut.
    """

    turn: ClassVar[int]

    def __init__(
        self,
        *,
        module: str,
        seed: int,
        verbose: bool,
        best_of: BestOf,
        budget: AccuracyBudget | None,
    ) -> None:
        super().__init__()
        self.report = PruningReport()
        self._within, self._seed = module, seed
        self._verbose, self._best_of, self._budget = verbose, best_of, budget
        self._keeper: PlanKeeper | None = None
        self._listener: Ear | None = None
        self._patience = Patience()
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
        self, module: pl.LightningModule, heard: Heard, goal: float, kept: float
    ) -> Selection | None:
        """What stays at a goal of the schedule; None where the model is that small."""

    @abstractmethod
    def describe(
        self, trainer: pl.Trainer, module: pl.LightningModule, pending: Pending, before: Plan
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
    def retry(self, trainer: pl.Trainer, trial: Trial, failed: float) -> str:
        """Say in the run what comes after a cut to ``failed`` was taken back; and in words."""

    @abstractmethod
    def trial_plan(self) -> Plan | None:
        """A cut to try on a copy of the module before the first one; None where none is left."""

    def pull_back(
        self, trainer: pl.Trainer, module: pl.LightningModule, selection: Selection, heard: Heard
    ) -> Selection:
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
            if not isinstance(c, PruningSteps) and not type(c).__module__.startswith("lightning.")
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
    def plan(self) -> Plan | None:
        """The plan the module carries now; None before ``setup``."""
        return None if self._keeper is None else self._keeper.plan

    def _decide(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        run = self._run
        goal = run.schedule.due(epoch, run.reached)
        if goal is None or run.heard is None or is_dev_run(trainer):
            return
        started, heard, plan = time.perf_counter(), run.heard, self._kept().plan
        agree(trainer.strategy, "the cut", f"epoch {epoch}, to {goal}, of {plan.digest()}")
        self.check_state(trainer, module)
        run.heard = None  # validation runs again if this fails; training steps do not

        def choose() -> Selection | None:
            chosen = self.decide(module, heard, goal, run.kept)
            return None if chosen is None else _on_cpu(chosen)

        selection = decide_once(trainer.strategy, choose)
        run.seconds["scoring"] = time.perf_counter() - started
        if selection is None:
            self._reached(trainer, heard, goal)
            run.reached, run.felt = goal, None
            return
        self._check_steps(trainer, module, selection.plan)
        started = time.perf_counter()
        heard.moments = {}  # as large as the model; what follows needs the room
        refitted = _on_cpu(self.pull_back(trainer, module, selection, heard))
        # All ranks solved the same sums; with other processors they may differ in the last digit.
        refitted = decide_once(trainer.strategy, lambda: refitted)
        run.pending, run.felt = Pending(epoch, goal, refitted), None
        # Only a cut that may be taken back is chosen again from the same calls.
        ranks = heard.ranks if heard.stacks and self._budget is not None else ()
        run.compared = Heard(stacks=heard.stacks, ranks=ranks)
        run.seconds["refitting"] = time.perf_counter() - started

    def _check_steps(self, trainer: pl.Trainer, module: pl.LightningModule, plan: Plan) -> None:
        """Try a cut that does more than the one before the first: it empties groups, or layers go.

        Raises:
            PruningError: If a step of the module cannot do without what the plan removes.
        """
        anatomy, current = self._kept().anatomy, self._kept().plan
        stacks = {stack.name for stack in anatomy.stacks}
        more = (n in stacks or not plan.width(n) for n in plan.sizes if current.width(n))
        if any(more):
            together(
                trainer.strategy,
                "a cut of a copy of the module",
                lambda: self._dry_run.check(trainer, module, anatomy, current, plan),
            )

    def _reached(self, trainer: pl.Trainer, heard: Heard, goal: float) -> None:
        """Say that no cut is needed for a goal."""
        met = f"The model meets {self._named(goal)} already: no cut."
        tell_no_cut(self.report, met, "Ask for less.", last=not self._run.schedule.left(goal))

    def _cut(self, trainer: pl.Trainer, module: pl.LightningModule, pending: Pending) -> None:
        run, keeper, selection = self._run, self._kept(), pending.selection
        started, current = time.perf_counter(), keeper.plan
        macs_before = self.report.macs if self.report.cuts else macs_of(trainer, module, run)
        self.check_state(trainer, module)
        if self._budget is not None:
            run.trial = begin_trial(trainer, module, current, pending.epoch, run)
        folded, turned = selection.folded, selection.turned
        done = operate(
            module, keeper.anatomy, selection.plan, current=current, folded=folded, turned=turned
        )
        try:
            keeper.plan = done.after
            cut = self.describe(trainer, module, pending, current)
            names = {id(p): name for name, p in module.named_parameters()}
            rebind(trainer.strategy.optimizers, done.rewrites, done.lost, names)
        except BaseException:  # a checkpoint that is written now must hold a whole model
            cancel(module, keeper.anatomy, done)
            keeper.plan, run.trial = current, None
            raise
        keeper.store(done.removed)
        del done  # the last to hold the old parameters
        run.pending, run.reached = None, pending.sparsity
        run.kept *= selection.kept_share
        self.report.macs = macs_before
        self.report.cuts.append(cut)
        self._resized(trainer)
        seconds = {**run.seconds, "cutting": time.perf_counter() - started}
        self.report.cuts[-1] = replace(cut, seconds=seconds)
        if self._verbose and trainer.is_global_zero:
            print_cut(self.report.cuts[-1], self.report)

    def _take_back(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        run, budget, trial = self._run, self._budget, self._run.trial
        if budget is None or trial is None:
            return
        take_back(trainer, module, self._kept(), trial)
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
        rewrap(trainer.strategy)
        agree(trainer.strategy, "the plan after the cut", self._kept().plan.digest())
        self._run.stale = True
        if self._best_of != "any_size":
            restart_comparison(trainer, self._best_of)

    def _kept(self) -> PlanKeeper:
        if self._keeper is None:
            raise MisconfigurationException(
                "The callback was not set up by a Trainer; expected Trainer(callbacks=[...])."
            )
        return self._keeper

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

    def _others(self, trainer: pl.Trainer) -> list[PruningSteps]:
        """Other pruning callbacks of the run: layers go first, then units."""
        found: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return [c for c in found if isinstance(c, PruningSteps) and c is not self]

    def _is_last_turn(self, trainer: pl.Trainer) -> bool:
        return not any(other.turn > self.turn for other in self._others(trainer))

    def _begin(self, trainer: pl.Trainer) -> int:
        """Epochs that are over when this callback's part of the run begins."""
        begin = self._run.begin if self._run.fitted.epochs else trainer.current_epoch
        earlier = [other for other in self._others(trainer) if other.turn < self.turn]
        return max([begin, *(math.ceil(other._end(trainer)) for other in earlier)])

    def _end(self, trainer: pl.Trainer) -> float:
        """Epoch at which this callback's part of the run is over: half-way if one follows."""
        length, begin = run_length(trainer), self._begin(trainer)
        return length if self._is_last_turn(trainer) else begin + (length - begin) // 2

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

    def _close(self) -> Ear | None:
        """Take our hooks down; returns what listened."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        return listener


def _on_cpu(selection: Selection) -> Selection:
    cpu = torch.device("cpu")
    folded, turned = (placed(given, cpu) for given in (selection.folded, selection.turned))
    return replace(selection, folded=folded, turned=turned)
