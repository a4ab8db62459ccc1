"""WHEN     the order of a run: listen in validation, decide as it ends, cut as an epoch starts.

Every step is a function of another file.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mi_prune.callbacks.companions import without_best
from lightning_mi_prune.callbacks.feeling import write_felt
from lightning_mi_prune.callbacks.run import (
    is_dev_run,
    is_last_validation,
    padded_rows,
    rerun_validation,
    run_length,
    validation_batches,
    without_frozen,
)
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.state import Asked, RunState, reconcile
from lightning_mi_prune.callbacks.steps import PruningSteps
from lightning_mi_prune.callbacks.telling import begin_report, sizes_of
from lightning_mi_prune.callbacks.trial import judge
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.families import find_axes, is_within
from lightning_mi_prune.gradients import blank
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.moments import check_moments
from lightning_mi_prune.report import PruningReport
from lightning_mi_prune.sample import Heard, placed, refreshed
from lightning_mi_prune.strategies import (
    agree,
    gather,
    pool,
    refuse_second,
    refuse_unsupported,
    together,
    world_size,
)
from lightning_mi_prune.surgery import check

__all__ = ["PruningCallback"]


class PruningCallback(PruningSteps):
    """The run of a pruning method: which hook of the Trainer takes which step."""

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the plan travel with the module's state dict; refuse what cannot work."""
        refuse_second(trainer, self, PruningCallback)
        self._keeper = PlanKeeper.of(pl_module, partial(find_axes, within=self._within))
        if stage == "fit":
            refuse_unsupported(trainer, pl_module)
            self._run, self.report = RunState(), PruningReport()

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
        if self._listens(trainer) and self._run.heard is None and "loops" in checkpoint:
            rerun_validation(trainer, checkpoint["loops"])
        write_felt(trainer, self._run.felt, checkpoint.get("callbacks", {}).get(self.state_key))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the axes and check everything that can be known before the first batch."""

        def prepare() -> str:
            keeper = self._kept()
            mine = [axis for axis in keeper.axes if is_within(axis.name, self._within)]
            self._chosen = self.choose(without_frozen(pl_module, mine))
            check(pl_module, self._chosen, keeper.plan)
            if not self._run.fitted.epochs:
                axes, plan = keeper.axes, keeper.plan
                self.report = begin_report(pl_module, axes, self._chosen, plan)
            self._check_optimizers(trainer, pl_module)
            present = {name: len(kept) for name, kept in keeper.plan.kept.items()}
            self.check(pl_module, self._chosen, present)
            sizes = [(axis.name, axis.size) for axis in self._chosen]
            sampling = (self._positions, self._calls, self._samples, self._steps, self._seed)
            options = (self._budget, self._best_of, sampling)
            return f"{keeper.plan.digest()} {sizes} {options}"

        together(trainer.strategy, "what to prune and how", prepare)
        asked = Asked(self._budget, self.aim(), self._calls, self._samples, self._steps)
        for surprise in reconcile(self._run, self._chosen, pl_module, asked):
            rank_zero_warn(surprise)
        if trainer.global_rank and self._run.felt is not None:  # rank 0 goes on with all of it
            self._run.felt = blank(pl_module, self._chosen)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the schedule into the run, now that its length is known."""
        if is_dev_run(trainer):
            rank_zero_info("fast_dev_run: listening to validation, but no cut is made.")
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
        begin = run.begin if run.fitted.epochs else trainer.current_epoch
        fitted = together(
            trainer.strategy,
            "the schedule of the cuts",
            lambda: self.schedule(run_length(trainer), every, begin),
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
        world = world_size(trainer.strategy)
        self._listener = Listener(
            pl_module,
            self._chosen,
            positions=-(-self._positions // world),
            batches=validation_batches(trainer),
            seed=self._seed,
            calls=-(-self._calls // world),
            samples=-(-self._samples // world),
        ).__enter__()

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Give the batch its share of the positions."""
        if self._listener is not None:
            self._listener.start_batch(*padded_rows(trainer, batch_idx, dataloader_idx))

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Judge the last cut, add up what all ranks heard, and decide if the epoch is over."""
        run, listener = self._run, self._close()
        if self._budget is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            run.trial, run.best = judge(trainer, self._budget, run)
        if listener is None or self._is_failed():
            return
        run.examples = refreshed(run.examples, listener.calls(self._chosen))
        run.seconds = {"listening": listener.seconds}
        pool(trainer.strategy, listener.moments)
        check_moments(listener.moments)
        gradients = self._felt(trainer)
        if self._steps and gradients is None:
            return
        run.heard, run.heard_at = Heard(listener.moments, gradients), trainer.current_epoch
        if self._calls:
            stored = placed(listener.stored, torch.device("cpu"))
            run.heard.ranks = gather(trainer.strategy, stored)
        if self._samples:
            parts = gather(trainer.strategy, listener.samples)
            keys = listener.samples or parts[0]
            run.heard.samples = {
                key: torch.cat([p[key] for p in parts if key in p]) for key in keys
            }
        if trainer.is_last_batch:
            self._decide(trainer, pl_module, trainer.current_epoch + 1)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide what to cut at the start of the next epoch, if that is still open."""
        self._hold_patience(trainer)
        sizes = sizes_of(pl_module, self.report, self._chosen, self._kept().plan)
        for name, value in sizes.items():
            pl_module.log(name, value, on_step=False, on_epoch=True, rank_zero_only=True)
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
            return
        if run.pending is None and run.heard is not None and run.heard_at < epoch:
            self._decide(trainer, pl_module, epoch)
        if run.pending is not None and run.pending.epoch <= epoch:
            self._cut(trainer, pl_module, run.pending)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Some resumptions skip the start of an epoch too; nothing must wait for another one."""
        self.on_train_epoch_start(trainer, pl_module)

        if self._steps and self._run.heard is None and self._listens(trainer):
            self._feeling.begin(trainer, pl_module, self._chosen, self._run, batch_idx)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add what the training step let feel to the sums."""
        self._feeling.end()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before the schedule did."""
        run = self._run
        left = () if is_dev_run(trainer) else run.schedule.left(run.reached)
        if left:
            total = len(run.schedule.epochs)
            rank_zero_warn(
                f"Training ended after {total - len(left)} of {total} cuts (the next was due at "
                f"epoch {left[0]}); the model is larger than asked for."
            )
        if self._best_of != "any_size" and self.report.cuts:
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
        """Take the listening hooks down and let the companions go."""
        self._close()
        self._feeling.close()
        self._patience.release()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the listening hooks down and let the companions go."""
        self._close()
        self._feeling.close()
        self._patience.release()
