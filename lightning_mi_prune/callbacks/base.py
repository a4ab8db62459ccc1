"""The hooks of the Trainer, and which step of a run each of them takes.

Every step is a function of another file.
"""

from __future__ import annotations

import inspect
import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mi_prune.calibration.activations import Recorder
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.callbacks.distributed import agree, on_all_ranks, refuse_unsupported
from lightning_mi_prune.callbacks.engine import PruningEngine, check_metric
from lightning_mi_prune.callbacks.monitors import check_monitor, without_best
from lightning_mi_prune.callbacks.resume import OptimizerPlan, check_snapshot
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.sizes import macs_of, sizes_of
from lightning_mi_prune.callbacks.state import RunState
from lightning_mi_prune.callbacks.trainer import (
    is_dev_run,
    is_last_validation,
    padded_rows,
    rerun_validation,
    run_length,
    validation_batches,
)
from lightning_mi_prune.callbacks.verification import DryRun
from lightning_mi_prune.checkpoint.state_dict import Find, PlanTracker
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.options import check_choice, check_count
from lightning_mi_prune.reporting.report import PruningReport

__all__ = [
    "PruningCallback",
    "as_misconfiguration",
    "checked_options",
]

# What each rank may have as it likes: of these, only those of rank 0 are looked at.
_PRIVATE = ("self", "__class__", "verbose", "latency.table")


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Turn the errors of options into those that Lightning raises for them."""
    try:
        yield
    except PruningError as error:
        raise MisconfigurationException(str(error)) from error


def checked_options(owner: type, given: Mapping[str, object]) -> dict[str, object]:
    """Refuse options of a wrong type; returns those that decide on the result, by name.

    Args:
        owner: Class whose constructor takes them.
        given: The ``locals()`` of its constructor, before anything else is there.

    Returns:
        What all ranks must have alike; fields of records as ``"schedule.cuts"``.

    Raises:
        MisconfigurationException: Naming the option and its value.
    """
    defaults, found = inspect.signature(owner).parameters, dict[str, object]()
    for name, value in given.items():
        kind = type(defaults[name].default) if name in defaults else object
        if is_dataclass(kind):
            if not isinstance(value, kind):
                raise MisconfigurationException(
                    f"{name}={value!r:.60}; expected options.{kind.__name__}(...)."
                )
            found |= {f"{name}.{field}": part for field, part in vars(value).items()}
        else:
            found[name] = value
    with as_misconfiguration():
        check_count("seed", given["seed"], least=0)
        check_choice("verbose", given["verbose"], (True, False))
    for name in {"module", "include", "exclude", "monitor"} & given.keys():
        if not isinstance(given[name], (str, type(None))):
            raise MisconfigurationException(f"{name}={given[name]!r}; expected text or None.")
        _check_expression(name, given[name])
    kinds = given.get("kinds")
    if kinds is not None and (isinstance(kinds, str) or not kinds):
        raise MisconfigurationException(
            f"kinds={kinds!r}; expected a list of kinds such as ['ffn', 'heads']."
        )
    return {name: value for name, value in found.items() if name not in _PRIVATE}


def _check_expression(name: str, value: object) -> None:
    try:
        re.compile(str(value or "") if name in ("include", "exclude") else "")
    except re.error as error:
        raise MisconfigurationException(
            f"{name}={value!r} is not a regular expression ({error}); expected one, such as 'ffn$'."
        ) from error


class PruningCallback(PruningEngine):
    """The run of a pruning method: which hook of the Trainer takes which step."""

    _footing = OptimizerPlan()  # setup makes one for each run

    @abstractmethod
    def finder(self) -> Find:
        """What finds all that a module can lose; it stays with copies of the module."""

    @abstractmethod
    def reconcile(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
        """Let go of what does not fit the options a run resumes with; says what, in sentences."""

    @abstractmethod
    def listen(self, trainer: pl.Trainer, module: pl.LightningModule) -> Recorder:
        """What hears the validation that comes now."""

    @abstractmethod
    def hear(self, trainer: pl.Trainer, recorder: Recorder) -> CalibrationData | None:
        """What all ranks heard together; None, with a warning, where it was too little."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the plan travel with the module's state dict; refuse what cannot work."""
        alike = [other for other in self._others(trainer) if other.order == self.order]
        if alike:
            raise MisconfigurationException(
                f"{len(alike) + 1} {type(self).__name__} in one Trainer would each cut by a plan "
                "of their own; expected one. Give one of them all there is to cut, or fit twice."
            )
        self._tracker = PlanTracker.of(pl_module, self.finder())
        if stage == "fit":
            refuse_unsupported(trainer, layers=self.order == 0)  # layers go first
            self._run, self.report, self._footing = RunState(), PruningReport(), OptimizerPlan()
            self._dry_run = DryRun()

    @override
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: schedule, pending cut, sums just heard, trial, report."""
        return self._run.to_dict(self.report)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._run, self.report = RunState.from_dict(state_dict)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A validation that is still to be heard is run again, whole, when the run resumes."""
        run = self._run
        hears = self._listens(trainer) and run.heard is None
        judges = run.trial is not None and run.trial.failed_at is None
        if (hears or judges) and "loops" in checkpoint:
            rerun_validation(trainer, checkpoint["loops"])
        self._footing.save(checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let the optimizers be made as those of the checkpoint were."""
        if trainer.state.fn == "fit":
            self._footing.load(pl_module, self._tracked(), checkpoint)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the groups and check everything that can be known before the first batch."""
        on_all_ranks(
            trainer.strategy,
            "what to prune and how",
            lambda: self.prepare(trainer, pl_module),
        )
        if self._budget is not None:
            check_monitor(trainer, pl_module, self._budget.monitor)
        for surprise in self.reconcile(trainer, pl_module):
            rank_zero_warn(surprise)
        for other in self._others(trainer):  # one run, one report: that of the first turn
            first, second = sorted((self, other), key=lambda callback: callback.order)
            second.report = first.report
        self._footing.begin(self._tracked())

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the metric that cuts are judged by is there."""
        if self._budget is not None:
            self._budget.value(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the schedule into the run, now that its length is known."""
        if self._run.trial is not None:  # of a resumed run, whose optimizers have their state now
            known = (self._run.trial, pl_module, self._tracked().graph, self._tracked().plan)
            on_all_ranks(
                trainer.strategy,
                "the snapshot before the last cut",
                lambda: check_snapshot(*known, trainer.strategy.optimizers),
            )
        if is_dev_run(trainer):
            rank_zero_info("fast_dev_run: calibration to validation, but no cut is made.")
            self._run.schedule = Schedule((trainer.current_epoch + 1,), (1.0,))
            return
        heard = validation_batches(trainer) != 0
        agree(trainer.strategy, "whether there are validation batches", str(heard))
        if not heard:
            raise MisconfigurationException(
                "Pruning listens to validation, but this run has none. Give the trainer a "
                "val_dataloader and a validation_step, with limit_val_batches above 0."
            )
        run, every = self._run, trainer.check_val_every_n_epoch or 1
        begin = self._begin(trainer)
        if self._others(trainer):
            self._share = (
                f" Layers and units share this run of "
                f"{counted(run_length(trainer), 'epoch')}: "
                f"{type(self).__name__} has epochs {begin} to {math.ceil(self._end(trainer)) - 1}."
            )
        fitted = on_all_ranks(
            trainer.strategy,
            "the schedule of the cuts",
            lambda: self.schedule(self._end(trainer), every, begin),
        )
        if fitted != run.fitted:
            run.fitted, run.schedule, run.begin = fitted, fitted, begin

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, if the next epoch starts with a cut; the last validation before it counts."""
        self._forget_stale(trainer)
        self._hold_patience(trainer)
        if not self._listens(trainer) or not is_last_validation(trainer):
            return
        self._close()
        self._run.heard = None
        self._recorder = self.listen(trainer, pl_module).__enter__()

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Try a cut on the first batch; give every batch its share of the positions."""
        self._try(trainer, pl_module, "validation_step", batch, dataloader_idx)
        if self._recorder is not None:
            self._recorder.start_batch(*padded_rows(trainer, batch_idx, dataloader_idx))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the last cut, add up what all ranks heard, and decide if the epoch is over."""
        run, recorder = self._run, self._close()
        if self._budget is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            trial, best = check_metric(trainer, self._budget, run, self._end(trainer))
            # What layers were allowed to cost before is not charged to units.
            if trainer.current_epoch >= self._begin(trainer):
                run.trial, run.best = trial, best
            if run.trial is None and run.pending is None:
                run.compared.ranks = ()  # accepted: nothing will be chosen from these calls again
        if recorder is None or self._is_failed():
            return
        heard = self.hear(trainer, recorder)
        if heard is None:
            return
        run.heard, run.heard_at = heard, trainer.current_epoch
        if run.examples and not self.report.macs:  # a logged curve begins before the first cut
            self.report.macs = macs_of(trainer, pl_module, run)
        if trainer.is_last_batch:
            self._decide(trainer, pl_module, trainer.current_epoch + 1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide what to cut at the start of the next epoch, if that is still open."""
        self._hold_patience(trainer)
        sizes = self.curves(pl_module)
        if self._is_last(trainer):
            sizes |= sizes_of(pl_module, self.report, self.sparsity(pl_module))
        for name, value in sizes.items():
            pl_module.log(
                f"prune/{name}", float(value), on_step=False, on_epoch=True, rank_zero_only=True
            )
        if not self._listens(trainer) or self._is_failed() or is_dev_run(trainer):
            return
        if self._run.heard is None and self._waits:
            self._waits = False  # and it was said why
            return
        if self._run.heard is None:
            rank_zero_warn(
                f"The cut of epoch {trainer.current_epoch + 1} waits: no validation ran in this "
                "epoch. Validate in every epoch that comes before a cut."
            )
            return
        self._decide(trainer, pl_module, trainer.current_epoch + 1)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Carry out what was decided: a cut, or taking the last one back.

        Some resumptions skip the end of an epoch, and what would have been decided there.
        """
        run, epoch = self._run, trainer.current_epoch
        if run.trial is not None and run.trial.failed_at is not None:
            if epoch > run.trial.failed_at:
                self._take_back(trainer, pl_module)
            else:
                return
        if run.pending is None and run.heard is not None and run.heard_at < epoch:
            self._decide(trainer, pl_module, epoch)
        if run.pending is not None and run.pending.epoch <= epoch:
            self._cut(trainer, pl_module, run.pending)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Try a cut on the first batch; some resumptions skip the start of an epoch."""
        self._try(trainer, pl_module, "training_step", batch)
        self.on_train_epoch_start(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before the schedule did."""
        run = self._run
        left = () if is_dev_run(trainer) else run.schedule.left(run.reached)
        if left:
            total = len(run.schedule.epochs)
            rank_zero_warn(
                f"Training ended after {total - len(left)} of {counted(total, 'cut')} (the next "
                f"was due at epoch {left[0]}); the model is larger than asked for."
            )
        if self._best_of != "any_size" and self.report.cuts and self._is_last(trainer):
            for metric in without_best(trainer):
                rank_zero_warn(
                    f"ModelCheckpoint(monitor={metric!r}) saved no model of the final size, so it "
                    "has no best one; save after the last cut, or pass best_of='any_size'."
                )
        if run.trial is not None:
            rank_zero_warn(
                f"Training ended before the cut of epoch {run.trial.epoch} could be judged or "
                "taken back; train longer, or compare the metric yourself."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the calibration hooks down and let the companions go."""
        self.quiet()
        self._patience.release()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the calibration hooks down and let the companions go."""
        self.quiet()
        self._patience.release()
        self._footing.abandon(pl_module)

    def _try(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        step: str,
        batch: Any,
        loader: int = 0,
    ) -> None:
        """Run a step once, on a copy of the whole module that was cut."""
        over = self._run.fitted.epochs and self._is_finished()
        if trainer.state.fn != "fit" or self._dry_run.knows(step) or over:
            return
        self._dry_run.remember(step, batch, loader)
        tracker, plan = self._tracked(), self.plan_to_verify()
        if plan is not None:
            on_all_ranks(
                trainer.strategy,
                f"a cut of a copy of the module, tried in {step}",
                lambda: self._dry_run.check(
                    trainer, module, tracker.graph, tracker.plan, plan, only=step
                ),
            )

    def _hold_patience(self, trainer: pl.Trainer) -> None:
        if not self._is_last(trainer):
            return
        held = trainer.state.fn == "fit" and self._best_of != "any_size"
        finished = all(callback._is_finished() for callback in (self, *self._others(trainer)))
        if held and not finished and not is_dev_run(trainer):
            self._patience.hold(trainer)
        else:
            self._patience.release()
