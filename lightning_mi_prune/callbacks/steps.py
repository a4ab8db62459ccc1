"""What happens at each step of a run: decide, cut, take back, tell."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace

import lightning.pytorch as pl
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.budget import sparsity_of
from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.companions import BestOf, Patience, restart_comparison
from lightning_mi_prune.callbacks.run import is_dev_run, run_length
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.state import Pending, RunState
from lightning_mi_prune.callbacks.trial import begin_trial, take_back
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.listener import Example, Listener
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.optimizers import check_optimizers, rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.report import Cut, PruningReport, axis_cuts, count_macs, print_cut
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.strategies import agree, decide_once, rewrap
from lightning_mi_prune.surgery import apply, revert

__all__ = ["PruningSteps"]


class PruningSteps(pl.Callback, ABC):
    """The steps of a pruning method; subclasses say what may go, when, and who judges.

    Args:
        module: Path of the submodule to search for prunable networks; "" searches all.
        positions: Samples to listen to on each axis in one validation run, over all ranks.
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
        seed: int,
        verbose: bool,
        best_of: BestOf,
        budget: AccuracyBudget | None,
    ) -> None:
        super().__init__()
        self.report = PruningReport()
        self._within, self._positions, self._seed = module, positions, seed
        self._verbose, self._best_of, self._budget = verbose, best_of, budget
        self._keeper: PlanKeeper | None = None
        self._chosen: list[WidthAxis] = []
        self._listener: Listener | None = None
        self._patience = Patience()
        self._run = RunState()

    @abstractmethod
    def choose(self, axes: list[WidthAxis]) -> list[WidthAxis]:
        """The axes that may be cut."""

    @abstractmethod
    def check(self, axes: list[WidthAxis]) -> None:
        """Refuse a budget that these axes cannot meet."""

    @abstractmethod
    def schedule(self, length: float, every: int, begin: int) -> Schedule:
        """The cuts of a run of ``length`` epochs, from ``begin``, validated after ``every``."""

    @abstractmethod
    def widths(self, axes: list[WidthAxis], sparsity: float) -> dict[str, int]:
        """Width of every axis at a sparsity against the model as built."""

    @abstractmethod
    def select(
        self,
        axes: list[WidthAxis],
        moments: Mapping[str, Moments],
        weights: Mapping[str, Tensor],
        widths: Mapping[str, int],
        current: Plan,
    ) -> Selection:
        """Which units stay, given what was heard."""

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
        widths = self.widths(self._chosen, sparsity)
        run.heard = None
        if all(widths[axis.name] >= plan.width(axis.name) for axis in self._chosen):
            rank_zero_info(f"The model is at sparsity {sparsity:.3f} or beyond already: no cut.")
            run.reached = sparsity
            return
        weights = dict(module.named_parameters(remove_duplicate=False))

        def choose() -> Selection:
            chosen = self.select(self._chosen, heard, weights, widths, plan)
            folded = {name: tensor.cpu() for name, tensor in chosen.folded.items()}
            return replace(chosen, folded=folded)

        run.pending = Pending(epoch, sparsity, decide_once(trainer.strategy, choose))
        run.seconds["scoring"] = time.perf_counter() - started

    def _cut(self, trainer: pl.Trainer, module: pl.LightningModule, pending: Pending) -> None:
        run, keeper, selection = self._run, self._kept(), pending.selection
        before, started, current = self._present_widths(), time.perf_counter(), keeper.plan
        macs_before = self.report.macs if self.report.cuts else self._macs(trainer, module)
        self._check_optimizers(trainer, module)
        after = current.then(selection.plan)
        if self._budget is not None:
            run.trial = begin_trial(trainer, module, current, pending.epoch, run.reached)
        folded = selection.folded
        rewrites = apply(module, keeper.axes, selection.plan, current=current, folded=folded)
        try:
            cut = self._describe(trainer, module, pending, before, after)
            rebind(trainer.strategy.optimizers, rewrites)
        except BaseException:  # a checkpoint that is written now must hold a whole model
            revert(module, keeper.axes, current, rewrites)
            run.trial = None
            raise
        del rewrites  # the last to hold the old parameters
        keeper.plan, run.pending, run.reached = after, None, pending.sparsity
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
        failed, run.reached, run.trial, run.pending = run.reached, trial.reached, None, None
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

    def _describe(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        pending: Pending,
        before: Mapping[str, int],
        plan: Plan,
    ) -> Cut:
        after = {axis.name: plan.width(axis.name) for axis in self._chosen}
        return Cut(
            epoch=pending.epoch,
            sparsity=sparsity_of(self._chosen, after),
            parameters=sum(p.numel() for p in module.parameters()),
            prunable_parameters=count_parameters(self._chosen, after),
            macs=self._macs(trainer, module),
            axes=axis_cuts(self._chosen, before, after, pending.selection.information),
            seconds=self._run.seconds,
        )

    def _begin_report(self, module: pl.LightningModule, keeper: PlanKeeper) -> PruningReport:
        built = count_parameters(keeper.axes)
        present = count_parameters(keeper.axes, {n: len(k) for n, k in keeper.plan.kept.items()})
        parameters = sum(p.numel() for p in module.parameters())
        return PruningReport(
            parameters=parameters + built - present,
            prunable_parameters=count_parameters(self._chosen),
            start={
                "parameters": parameters,
                "prunable_parameters": count_parameters(self._chosen, self._present_widths()),
            },
        )

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

    def _sizes(self, module: pl.LightningModule) -> dict[str, float]:
        """What loggers are told after every epoch from the first cut on."""
        if self.report.cuts:
            return self.report.cuts[-1].metrics()
        if not self.report.undone:
            return {}
        widths = self._present_widths()
        sizes = {"parameters": sum(p.numel() for p in module.parameters())}
        sizes["macs"] = self.report.macs
        found = {f"prune/{name}": float(value) for name, value in sizes.items()}
        found["prune/sparsity"] = sparsity_of(self._chosen, widths)
        return found | {f"prune/width/{name}": float(width) for name, width in widths.items()}

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

    def _macs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        try:
            calls = {
                path: Example(*move_data_to_device((call.args, call.kwargs), pl_module.device))
                for path, call in self._run.examples.items()
            }
            with trainer.precision_plugin.forward_context():
                return sum(count_macs(pl_module.get_submodule(p), c) for p, c in calls.items())
        except Exception as error:  # a number for the report is not worth a training run
            rank_zero_warn(f"MACs could not be counted and are reported as 0: {error}")
            return 0

    def _close(self) -> Listener | None:
        """Take our hooks down; returns what listened."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        return listener
