"""Units off layers: what a callback that prunes them hears, feels, and checks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.budget import sparsity_of
from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.base import PruningCallback
from lightning_mi_prune.callbacks.companions import BestOf
from lightning_mi_prune.callbacks.feeling import Feeling, is_scaled, pooled, write_felt
from lightning_mi_prune.callbacks.reconciling import Asked, reconcile, resumed
from lightning_mi_prune.callbacks.records import Pending, Trial
from lightning_mi_prune.callbacks.run import validation_batches, without_frozen
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.telling import begin_report, describe
from lightning_mi_prune.checkpoints import Find
from lightning_mi_prune.choosing import summary
from lightning_mi_prune.dry_run import half_plan
from lightning_mi_prune.families import find_axes, is_within, untouched
from lightning_mi_prune.gradients import blank
from lightning_mi_prune.hooks import Ear
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.moments import check_moments
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.relevance import GradientSums, check_gradients
from lightning_mi_prune.report import Cut
from lightning_mi_prune.sample import Heard, placed, refreshed
from lightning_mi_prune.states import check_optimizers
from lightning_mi_prune.strategies import gather, pool, refuse_compiled, world_size
from lightning_mi_prune.surgery import check

__all__ = ["WidthPruning"]


class WidthPruning(PruningCallback):
    """Prunes units: neurons, heads, the width of the stream.

    Args:
        module: Path of the submodule to search for prunable networks; "" searches all.
        positions: Samples to listen to on each axis in one validation run, over all ranks.
        calls: Positions of the inputs to store in it, over all ranks; 0 stores none.
        steps: Training steps to take gradients from, over all ranks; 0 takes none.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
        best_of: What monitors may compare (:func:`companions.restart_comparison`).
        budget: What a cut may cost before it is taken back; None keeps every cut.
    """

    turn: ClassVar[int] = 1

    def __init__(
        self,
        *,
        module: str,
        positions: int,
        calls: int,
        steps: int,
        seed: int,
        verbose: bool,
        best_of: BestOf,
        budget: AccuracyBudget | None,
    ) -> None:
        super().__init__(module=module, seed=seed, verbose=verbose, best_of=best_of, budget=budget)
        self._positions, self._calls, self._steps = positions, calls, steps
        self._feeling = Feeling(steps)
        self._chosen: list[WidthAxis] = []

    @abstractmethod
    def choose(self, axes: list[WidthAxis], modules: list[str]) -> list[WidthAxis]:
        """The axes that may be cut; ``modules`` are those without any."""

    @abstractmethod
    def check(
        self, module: pl.LightningModule, axes: list[WidthAxis], widths: Mapping[str, int]
    ) -> None:
        """Refuse a budget that these axes cannot meet from their present widths."""

    @abstractmethod
    def aim(self) -> str:
        """What the schedule leads to, in words; empty where it counts sparsities."""

    @override
    def finder(self) -> Find:
        return partial(find_axes, within=self._within)

    @override
    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> Mapping[str, object]:
        keeper = self._kept()
        mine = [axis for axis in keeper.anatomy.axes if is_within(axis.name, self._within)]
        others = untouched(module, keeper.anatomy.axes, self._within)
        self._chosen = self.choose(without_frozen(module, mine), others)
        rank_zero_info(f"Pruning may cut {summary(self._chosen)}.")
        check(module, self._standing, keeper.plan)
        tensors = {s.tensor for axis in self._standing for s in axis.slices}
        refuse_compiled(module, {name.rpartition(".")[0] for name in tensors})
        self.warn_of_holders(trainer, module, [module.get_parameter(name) for name in tensors])
        if not self._run.fitted.epochs:
            self.report = begin_report(module, keeper, self._chosen)
        self.check_state(trainer, module)
        present = {name: len(kept) for name, kept in keeper.plan.kept.items()}
        self.check(module, self._standing, present)
        sizes = {f"the size of {axis.name!r}": axis.size for axis in self._chosen}
        return self._options | sizes | resumed(self._run, keeper.plan)

    @override
    def reconcile(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[str]:
        asked = Asked(self._budget, self.aim(), self._calls, self._steps)
        surprises = reconcile(self._run, self._standing, module, self._kept().plan, asked)
        if trainer.global_rank and self._run.felt is not None:  # rank 0 goes on with all of it
            self._run.felt = blank(module, self._standing, self._kept().plan)
        return surprises

    @override
    def trial_plan(self) -> Plan | None:
        return half_plan(self._standing, self._kept().plan) if self._standing else None

    @override
    def listen(self, trainer: pl.Trainer, module: pl.LightningModule) -> Listener:
        world = world_size(trainer.strategy)
        return Listener(
            module,
            self._standing,
            positions=-(-self._positions // world),
            batches=validation_batches(trainer),
            seed=self._seed,
            calls=-(-self._calls // world),
        )

    @override
    def hear(self, trainer: pl.Trainer, listener: Ear) -> Heard | None:
        assert isinstance(listener, Listener)  # noqa: S101
        run = self._run
        run.examples = refreshed(run.examples, listener.calls(self._standing))
        run.seconds = {"listening": listener.seconds}
        pool(trainer.strategy, listener.moments)
        check_moments(listener.moments)
        gradients = self._felt(trainer)
        if self._steps and gradients is None:
            return None
        heard = Heard(listener.moments, gradients)
        if self._calls:
            stored = placed(listener.stored, torch.device("cpu"))
            heard.ranks = gather(trainer.strategy, stored)
        return heard

    @override
    def describe(
        self, trainer: pl.Trainer, module: pl.LightningModule, pending: Pending, before: Plan
    ) -> Cut:
        return describe(
            trainer,
            module,
            self._run,
            self._standing,
            self._chosen,
            pending,
            before,
            self._kept().plan,
        )

    @override
    def curves(self, module: pl.LightningModule) -> dict[str, float]:
        plan = self._kept().plan
        widths = {f"width/{axis.name}": plan.width(axis.name) for axis in self._chosen}
        return {"information_kept": self._run.kept, **widths}

    @override
    def sparsity(self, module: pl.LightningModule) -> float:
        plan = self._kept().plan
        return sparsity_of(self._chosen, {a.name: plan.width(a.name) for a in self._chosen})

    @override
    def check_state(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        cut = [module.get_parameter(s.tensor) for a in self._standing for s in a.slices]
        check_optimizers(trainer.strategy.optimizers, cut)

    @override
    def retry(self, trainer: pl.Trainer, trial: Trial, failed: float) -> str:
        run, every = self._run, trainer.check_val_every_n_epoch or 1
        schedule, run.schedule = run.schedule, Schedule()
        if self._budget is not None and self._budget.on_drop == "halve":
            last = int(self._end(trainer) + 1e-9) - 2
            epoch = trainer.current_epoch + 1
            run.schedule = schedule.halved(epoch, run.reached, failed, last, every)
        steps = zip(*vars(run.schedule).values(), strict=True)
        return ", ".join(f"{s:.3f} at epoch {e}" for e, s in steps) or "no further cut"

    @override
    def _named(self, goal: float) -> str:
        aim = self.aim()
        if not aim:
            return super()._named(goal)
        return aim if goal >= 1 else f"{goal:.3f} of the way to {aim}"

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        write_felt(trainer, self._run.felt, checkpoint.get("callbacks", {}).get(self.state_key))

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._steps and self._run.heard is None and self._listens(trainer):
            known = (self._standing, self._kept().plan)
            self._feeling.begin(trainer, pl_module, *known, self._run, batch_idx)

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
    def quiet(self) -> None:
        super().quiet()
        self._feeling.close()

    def left_to_reach(self, sparsity: float) -> float:
        """Sparsity of the layers that are there which makes up for one of all: gone ones count."""
        built, standing = count_parameters(self._chosen), count_parameters(self._standing)
        return sparsity if built == standing else 1 - (1 - sparsity) * built / standing

    @property
    def _standing(self) -> list[WidthAxis]:
        """The axes that may be cut, of the layers that are there."""
        names = {axis.name for axis in self._chosen}
        return [axis for axis in self._kept().axes if axis.name in names]

    def _felt(self, trainer: pl.Trainer) -> dict[str, GradientSums] | None:
        """What all ranks felt in this epoch; None, with a warning, where all of it was missed."""
        self._feeling.close()
        if not self._steps:
            return None
        empty = blank(trainer.lightning_module, self._standing, self._kept().plan)
        sums = pooled(trainer, self._run.felt or empty)
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
