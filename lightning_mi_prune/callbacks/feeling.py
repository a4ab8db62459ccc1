"""Gradients of ordinary training steps, gathered beside them: which part of a layer matters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.callbacks.heard import write_gradients
from lightning_mi_prune.callbacks.state import RunState
from lightning_mi_prune.gradients import GradientListener
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.strategies import pool, world_size

__all__ = ["Feeling", "copies", "is_scaled", "pooled", "write_felt"]


class Feeling:
    """Hooks that are up in the training steps of an epoch that ends with a choice.

    Args:
        steps: Training steps to take gradients from, over all ranks.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._listener: GradientListener | None = None
        self._scale = 1.0
        self.whole = False

    def begin(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        axes: Sequence[WidthAxis],
        plan: Plan,
        run: RunState,
        index: int,
    ) -> None:
        """A training step begins; the first of an epoch begins anew."""
        if index == 0:
            self.close()
            run.felt, self.whole = None, True
        if self._listener is None:
            batches = trainer.num_training_batches
            self.whole = self.whole and index == 0
            self._listener = GradientListener(
                module,
                axes,
                steps=-(-self._steps // world_size(trainer.strategy)),
                batches=None if math.isinf(batches) else int(batches),
                plan=plan,
            )
            if run.felt is not None:  # of a run that stopped inside this epoch
                self._listener.sums = dict(run.felt)
            run.felt = self._listener.sums
            self._listener.__enter__()
        # The scale of this step: the optimizer step inside it may change that of the next.
        accumulated = trainer.accumulate_grad_batches if module.automatic_optimization else 1
        self._scale = _scaler(trainer) / accumulated
        self._listener.begin(index)

    def end(self) -> None:
        """A training step is over."""
        if self._listener is not None:
            self._listener.end(scale=self._scale)

    def close(self) -> None:
        """Take the hooks down; what was felt stays in the run."""
        if self._listener is not None:
            self._listener.close()
        self._listener = None


def copies(felt: Mapping[str, GradientSums]) -> dict[str, GradientSums]:
    """The same sums once more."""
    return {
        key: GradientSums(s.dimension, s.units, inside=s.inside).unpack(s.packed())
        for key, s in felt.items()
    }


def pooled(trainer: pl.Trainer, felt: Mapping[str, GradientSums]) -> dict[str, GradientSums]:
    """What all ranks felt; every rank must call it."""
    together = copies(felt)
    pool(trainer.strategy, together)
    return together


def is_scaled(trainer: pl.Trainer) -> bool:
    """Whether a gradient scaler runs."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def _scaler(trainer: pl.Trainer) -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def write_felt(
    trainer: pl.Trainer, felt: Mapping[str, GradientSums] | None, state: dict[str, Any] | None
) -> None:
    """Put what all ranks felt into the callback's part of a checkpoint.

    Only rank 0 writes; the others go on from nothing, so the sum over ranks is the same.
    """
    if felt is not None and state is not None and world_size(trainer.strategy) > 1:
        state["felt"] = write_gradients(pooled(trainer, felt))
