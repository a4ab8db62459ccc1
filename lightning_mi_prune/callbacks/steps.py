"""What happens at each step of a run: decide, cut, take back, tell."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.companions import BestOf, Patience, restart_comparison
from lightning_mi_prune.callbacks.feeling import Feeling, is_scaled, pooled
from lightning_mi_prune.callbacks.run import is_dev_run, run_length
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.state import Pending, RunState
from lightning_mi_prune.callbacks.telling import describe, macs_of
from lightning_mi_prune.callbacks.trial import begin_trial, take_back
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.gradients import blank
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.optimizers import rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.relevance import GradientSums, check_gradients
from lightning_mi_prune.report import PruningReport, print_cut
from lightning_mi_prune.sample import Heard
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.states import check_optimizers
from lightning_mi_prune.strategies import agree, decide_once, rewrap
from lightning_mi_prune.surgery import apply, revert

__all__ = ["PruningSteps"]


class PruningSteps(pl.Callback, ABC):
    """The steps of a pruning method; subclasses say what may go, when, and who judges.

    Args:
        module: Path of the submodule to search for prunable networks; "" searches all.
        positions: Samples to listen to on each axis in one validation run, over all ranks.
        calls: Positions of the inputs to store in it, over all ranks; 0 stores none.
        samples: Positions of each axis to store in it, over all ranks; 0 stores none.
        steps: Training steps to take gradients from, over all ranks; 0 takes none.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
        best_of: What monitors may compare (:func:`companions.restart_comparison`).
        budget: What a cut may cost before it is taken back; None keeps every cut.
    """

    def __init__(
        self,
        *,
        module: str,
        positions: int,
        calls: int,
        samples: int,
        steps: int,
        seed: int,
        verbose: bool,
        best_of: BestOf,
        budget: AccuracyBudget | None,
    ) -> None:
        super().__init__()
        self.report = PruningReport()
        self._within, self._positions, self._seed = module, positions, seed
        self._verbose, self._best_of, self._budget = verbose, best_of, budget
        self._calls, self._samples, self._steps = calls, samples, steps
        self._feeling = Feeling(steps)
        self._keeper: PlanKeeper | None = None
        self._chosen: list[WidthAxis] = []
        self._listener: Listener | None = None
        self._patience = Patience()
        self._run = RunState()
        self._waits = False

    @abstractmethod
    def choose(self, axes: list[WidthAxis]) -> list[WidthAxis]:
        """The axes that may be cut."""

    @abstractmethod
    def check(
        self, module: pl.LightningModule, axes: list[WidthAxis], widths: Mapping[str, int]
    ) -> None:
        """Refuse a budget that these axes cannot meet from their present widths."""

    @abstractmethod
    def aim(self) -> str:
        """What the schedule leads to, in words; empty where it counts sparsities."""

    @abstractmethod
    def schedule(self, length: float, every: int, begin: int) -> Schedule:
        """The cuts of a run of ``length`` epochs, from ``begin``, validated after ``every``."""

    @abstractmethod
    def decide(
        self, module: pl.LightningModule, heard: Heard, goal: float, kept: float
    ) -> Selection | None:
        """Which units stay at a goal of the schedule; None where the model is that small."""

    @abstractmethod
    def pull_back(
        self, trainer: pl.Trainer, module: pl.LightningModule, selection: Selection, heard: Heard
    ) -> Selection:
        """The selection with weights that make up for the cut; every rank comes by."""

    @property
    def plan(self) -> Plan | None:
        """The plan the module carries now; None before ``setup``."""
        return None if self._keeper is None else self._keeper.plan

    def _decide(self, trainer: pl.Trainer, module: pl.LightningModule, epoch: int) -> None:
        run = self._run
        sparsity = run.schedule.due(epoch, run.reached)
        if sparsity is None or run.heard is None or is_dev_run(trainer):
            return
        started, heard, plan = time.perf_counter(), run.heard, self._kept().plan
        agree(trainer.strategy, "the cut", f"epoch {epoch}, to {sparsity}, of {plan.digest()}")
        self._check_optimizers(trainer, module)
        run.heard = None  # validation runs again if this fails; training steps do not

        def choose() -> Selection | None:
            chosen = self.decide(module, heard, sparsity, run.kept)
            return None if chosen is None else _on_cpu(chosen)

        selection = decide_once(trainer.strategy, choose)
        run.seconds["scoring"] = time.perf_counter() - started
        if selection is None:
            rank_zero_info(f"The model is at sparsity {sparsity:.3f} or beyond already: no cut.")
            run.reached, run.felt = sparsity, None
            return
        started = time.perf_counter()
        heard.moments = {}  # as large as the model; what follows needs the room
        refitted = _on_cpu(self.pull_back(trainer, module, selection, heard))
        # All ranks solved the same sums; with other processors they may differ in the last digit.
        refitted = decide_once(trainer.strategy, lambda: refitted)
        run.pending, run.felt = Pending(epoch, sparsity, refitted), None
        run.seconds["refitting"] = time.perf_counter() - started

    def _cut(self, trainer: pl.Trainer, module: pl.LightningModule, pending: Pending) -> None:
        run, keeper, selection = self._run, self._kept(), pending.selection
        before, started, current = self._present_widths(), time.perf_counter(), keeper.plan
        macs_before = self.report.macs if self.report.cuts else macs_of(trainer, module, run)
        self._check_optimizers(trainer, module)
        after = current.then(selection.plan)
        if self._budget is not None:
            run.trial = begin_trial(trainer, module, current, pending.epoch, run)
        folded = selection.folded
        rewrites = apply(module, keeper.axes, selection.plan, current=current, folded=folded)
        try:
            cut = describe(trainer, module, run, self._chosen, pending, before, after)
            rebind(trainer.strategy.optimizers, rewrites)
        except BaseException:  # a checkpoint that is written now must hold a whole model
            revert(module, keeper.axes, current, rewrites)
            run.trial = None
            raise
        del rewrites  # the last to hold the old parameters
        keeper.plan, run.pending, run.reached = after, None, pending.sparsity
        run.kept *= selection.kept_share
        self.report.macs, self.report.cuts = macs_before, [*self.report.cuts, cut]
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
        self._feeling.close()
        run.felt = None
        failed, run.reached, run.trial, run.pending = run.reached, trial.reached, None, None
        run.kept = trial.kept
        schedule, every = Schedule(), trainer.check_val_every_n_epoch or 1
        if budget.on_drop == "halve":
            last = int(run_length(trainer) + 1e-9) - 2
            epoch = trainer.current_epoch + 1
            schedule = run.schedule.halved(epoch, run.reached, failed, last, every)
        run.schedule = schedule
        if self.report.cuts:
            self.report.undone.append(self.report.cuts.pop())
        self._resized(trainer)
        then = [f"{s:.3f} at epoch {e}" for e, s in zip(*vars(schedule).values(), strict=True)]
        rank_zero_info(
            f"The cut of epoch {trial.epoch} to sparsity {failed:.3f} cost more than "
            f"{budget.max_drop} of {budget.monitor} and was taken back; "
            f"next: {', '.join(then) or 'no further cut'}."
        )

    def _resized(self, trainer: pl.Trainer) -> None:
        """What must follow whenever the model has another size."""
        rewrap(trainer.strategy)
        agree(trainer.strategy, "the plan after the cut", self._kept().plan.digest())
        self._run.stale = True
        if self._best_of != "any_size":
            restart_comparison(trainer, self._best_of)

    def _kept(self) -> PlanKeeper:
        if self._keeper is None:
            raise MisconfigurationException("The callback was not set up by a Trainer.")
        return self._keeper

    def _check_optimizers(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        cut = [pl_module.get_parameter(s.tensor) for a in self._chosen for s in a.slices]
        check_optimizers(trainer.strategy.optimizers, cut)

    def _present_widths(self) -> dict[str, int]:
        plan = self._kept().plan
        return {axis.name: plan.width(axis.name) for axis in self._chosen}

    def _listens(self, trainer: pl.Trainer) -> bool:
        run, fitting = self._run, trainer.state.fn == "fit" and not trainer.sanity_checking
        epoch = trainer.current_epoch + 1
        if not fitting or run.pending is not None or run.schedule.due(epoch, run.reached) is None:
            return False
        # A cut that a missed validation made late must still be followed by training.
        return is_dev_run(trainer) or epoch < run_length(trainer)

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

    def _hold_patience(self, trainer: pl.Trainer) -> None:
        held = trainer.state.fn == "fit" and self._best_of != "any_size"
        if held and not self._is_finished() and not is_dev_run(trainer):
            self._patience.hold(trainer)
        else:
            self._patience.release()

    def _felt(self, trainer: pl.Trainer) -> dict[str, GradientSums] | None:
        """What all ranks felt in this epoch; None, with a warning, where all of it was missed."""
        self._feeling.close()
        if not self._steps:
            return None
        sums = pooled(trainer, self._run.felt or blank(trainer.lightning_module, self._chosen))
        missed = not any(s.counts.any() for s in sums.values())
        if missed and not (self._feeling.whole and trainer.is_last_batch):
            rank_zero_warn(
                f"The cut of epoch {trainer.current_epoch + 1} waits: no training step to take "
                "gradients from ran before the last validation of this epoch."
            )
            self._waits = True
            return None
        check_gradients(sums, scaled=is_scaled(trainer))
        return sums

    def _close(self) -> Listener | None:
        """Take our hooks down; returns what listened."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        return listener


def _on_cpu(selection: Selection) -> Selection:
    folded = {name: tensor.cpu() for name, tensor in selection.folded.items()}
    return replace(selection, folded=folded)
