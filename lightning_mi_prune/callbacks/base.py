"""WHEN     the order of a run: listen in validation, decide as the epoch ends, cut as one starts.

Every step is a function of another file.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.budget import sparsity_of
from lightning_mi_prune.callbacks.run import (
    is_dev_run,
    run_length,
    validation_batches,
    without_frozen,
)
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.families import find_axes, is_within
from lightning_mi_prune.moments import Example, Listener
from lightning_mi_prune.optimizers import check_optimizers, rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.report import Cut, PruningReport, axis_cuts, count_macs, print_cut
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.strategies import refuse_second, refuse_unsupported
from lightning_mi_prune.surgery import apply, check

__all__ = ["PruningCallback"]


class PruningCallback(pl.Callback, ABC):
    """The run of a pruning method; subclasses say what may go, when, and who judges.

    Args:
        module: Path of the submodule to search for prunable networks; "" searches all.
        positions: Samples to listen to on each axis in one validation run.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
    """

    def __init__(self, *, module: str, positions: int, seed: int, verbose: bool) -> None:
        super().__init__()
        self.report = PruningReport()
        self._within, self._positions, self._seed = module, positions, seed
        self._verbose = verbose
        self._keeper: PlanKeeper | None = None
        self._schedule = Schedule((), ())
        self._chosen: list[WidthAxis] = []
        self._listener: Listener | None = None
        self._examples: dict[str, Example] = {}
        self._pending: tuple[int, Selection] | None = None
        self._done = 0
        self._heard = False
        self._seconds: dict[str, float] = {}

    @abstractmethod
    def choose(self, axes: list[WidthAxis]) -> list[WidthAxis]:
        """The axes that may be cut."""

    @abstractmethod
    def check(self, axes: list[WidthAxis]) -> None:
        """Refuse a budget that these axes cannot meet."""

    @abstractmethod
    def schedule(self, length: float, every: int) -> Schedule:
        """The cuts of a run of ``length`` epochs that validates after ``every`` of them."""

    @abstractmethod
    def widths(self, axes: list[WidthAxis], sparsity: float) -> dict[str, int]:
        """Width of every axis at a sparsity against the model as built."""

    @abstractmethod
    def select(
        self,
        axes: list[WidthAxis],
        listener: Listener,
        weights: Mapping[str, Tensor],
        widths: Mapping[str, int],
        current: Plan,
    ) -> Selection:
        """Which units stay, given what was heard."""

    @property
    def plan(self) -> Plan | None:
        """The plan the module carries now; None before ``setup``."""
        return None if self._keeper is None else self._keeper.plan

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let the plan travel with the module's state dict; refuse what cannot work."""
        refuse_second(trainer, self, PruningCallback)
        self._keeper = PlanKeeper.of(pl_module, partial(find_axes, within=self._within))
        if stage == "fit":
            refuse_unsupported(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the axes and check everything that can be known before the first batch."""
        keeper = self._kept()
        mine = [axis for axis in keeper.axes if is_within(axis.name, self._within)]
        self._chosen = self.choose(without_frozen(pl_module, mine))
        check(pl_module, self._chosen, keeper.plan)
        built = count_parameters(keeper.axes)
        present = count_parameters(keeper.axes, {n: len(k) for n, k in keeper.plan.kept.items()})
        self.report = PruningReport(
            parameters=sum(p.numel() for p in pl_module.parameters()) + built - present,
            prunable_parameters=count_parameters(self._chosen),
            start={
                "parameters": sum(p.numel() for p in pl_module.parameters()),
                "prunable_parameters": count_parameters(self._chosen, self._present_widths()),
            },
        )
        self._examples = {}
        self._done, self._pending = 0, None
        self._check_optimizers(trainer, pl_module)
        self.check(self._chosen)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fit the schedule into the run, now that its length is known."""
        if is_dev_run(trainer):
            rank_zero_info("fast_dev_run: listening to validation, but no cut is made.")
            self._schedule = Schedule((trainer.current_epoch + 1,), (0.0,))
            return
        if not trainer.enable_validation or validation_batches(trainer) == 0:
            raise MisconfigurationException(
                "Pruning listens to validation, but this run has none. Give the trainer a "
                "val_dataloader and a validation_step, with limit_val_batches above 0."
            )
        self._schedule = self.schedule(run_length(trainer), trainer.check_val_every_n_epoch or 1)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen, if the next epoch starts with a cut; the last validation before it counts."""
        if not self._listens(trainer):
            return
        self._close()
        self._listener = Listener(
            pl_module,
            self._chosen,
            positions=self._positions,
            batches=validation_batches(trainer),
            seed=self._seed,
        )
        self._heard = False
        self._listener.__enter__()

    @override
    def on_validation_batch_start(self, *_: Any, **__: Any) -> None:
        """Give the batch its share of the positions."""
        if self._listener is not None:
            self._listener.start_batch()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the hooks down and keep what was heard."""
        if self._listener is not None:
            self._listener.close()
            self._heard = not trainer.sanity_checking

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Decide what to cut at the start of the next epoch."""
        sparsity = self._schedule.due(trainer.current_epoch + 1, self._done)
        if sparsity is None:
            return
        if self._listener is None or not self._heard:
            rank_zero_warn(
                f"The cut of epoch {trainer.current_epoch + 1} waits: no validation ran in this "
                "epoch. Validate in every epoch that comes before a cut."
            )
            return
        listener, self._listener, self._heard = self._listener, None, False
        self._examples = self._examples or listener.calls(self._chosen)
        self._seconds = {"listening": listener.seconds}
        if is_dev_run(trainer):
            return
        started = time.perf_counter()
        listener.check()
        weights = dict(pl_module.named_parameters(remove_duplicate=False))
        widths = self.widths(self._chosen, sparsity)
        plan = self._kept().plan
        if all(widths[axis.name] >= plan.width(axis.name) for axis in self._chosen):
            rank_zero_info(f"The model is at sparsity {sparsity:.3f} or beyond already: no cut.")
            self._done = self._schedule.count_until(trainer.current_epoch + 1)
            return
        selection = self.select(self._chosen, listener, weights, widths, plan)
        self._pending = (trainer.current_epoch + 1, selection)
        self._seconds["scoring"] = time.perf_counter() - started

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Cut, if a plan is waiting: model, optimizers, report."""
        if self._pending is None:
            return
        epoch, selection = self._pending
        before, started = self._present_widths(), time.perf_counter()
        macs_before = self.report.macs if self.report.cuts else self._macs(trainer, pl_module)
        keeper, current = self._kept(), self._kept().plan
        self._check_optimizers(trainer, pl_module)
        rewrites = apply(
            pl_module, keeper.axes, selection.plan, current=current, folded=selection.folded
        )
        rebind(trainer.strategy.optimizers, rewrites)
        keeper.plan = current.then(selection.plan)
        self._pending = None
        self._done = self._schedule.count_until(epoch)
        self._seconds["cutting"] = time.perf_counter() - started
        self.report.macs = macs_before
        self._tell(trainer, pl_module, epoch, selection, before)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if the run ended before the schedule did."""
        schedule = self._schedule
        if not is_dev_run(trainer) and self._done < len(schedule.epochs):
            rank_zero_warn(
                f"Training ended after {self._done} of {len(schedule.epochs)} cuts (the next was "
                f"due at epoch {schedule.epochs[self._done]}); the model is larger than asked for."
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the listening hooks down."""
        self._close()
        self._schedule = Schedule((), ())

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Take the listening hooks down."""
        self._close()

    def _tell(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        epoch: int,
        selection: Selection,
        before: Mapping[str, int],
    ) -> None:
        after = self._present_widths()
        cut = Cut(
            epoch=epoch,
            sparsity=sparsity_of(self._chosen, after),
            parameters=sum(p.numel() for p in pl_module.parameters()),
            prunable_parameters=count_parameters(self._chosen, after),
            macs=self._macs(trainer, pl_module),
            axes=axis_cuts(self._chosen, before, after, selection.information),
            seconds=dict(self._seconds),
        )
        self.report.cuts.append(cut)
        for name, value in cut.metrics().items():
            pl_module.log(name, value, on_step=False, on_epoch=True, rank_zero_only=True)
        if self._verbose and trainer.is_global_zero:
            print_cut(cut, self.report)

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
        fitting = trainer.state.fn == "fit" and not trainer.sanity_checking
        return fitting and self._schedule.due(trainer.current_epoch + 1, self._done) is not None

    def _macs(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> int:
        calls = self._examples.items()
        try:
            with trainer.precision_plugin.forward_context():
                return sum(count_macs(pl_module.get_submodule(path), c) for path, c in calls)
        except Exception as error:  # a number for the report is not worth a training run
            rank_zero_warn(f"MACs could not be counted and are reported as 0: {error}")
            return 0

    def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
