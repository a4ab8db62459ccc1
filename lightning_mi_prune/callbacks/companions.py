"""Callbacks and schedulers that compare metrics, kept from comparing models of different size."""

from __future__ import annotations

import math
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau

__all__ = ["BestOf", "Patience", "restart_comparison", "without_best"]

BestOf = Literal["final_size", "each_size", "any_size"]


class Patience:
    """Keeps early stopping from ending a run before its last cut.

    A stop because of a metric that is not finite, or past ``divergence_threshold``, stays a stop.
    """

    def __init__(self) -> None:
        self._thresholds: dict[EarlyStopping, float | None] = {}

    def hold(self, trainer: pl.Trainer) -> None:
        """Call before every check: nothing counts as too late, or as good enough, yet."""
        for stopping in _early_stoppings(trainer):
            self._thresholds.setdefault(stopping, stopping.stopping_threshold)
            stopping.stopping_threshold = None
            stopping.best_score = torch.tensor(_worst(stopping.mode))
            stopping.wait_count = 0

    def release(self) -> None:
        """From now on early stopping is on its own again."""
        for stopping, threshold in self._thresholds.items():
            stopping.stopping_threshold = threshold
        self._thresholds.clear()


def restart_comparison(trainer: pl.Trainer, best_of: BestOf) -> None:
    """Make every monitor forget what models of another size reached.

    Args:
        trainer: Trainer of the run, at the moment the size changes.
        best_of: ``final_size`` lets checkpoints of other sizes be the first to be replaced,
            ``each_size`` leaves the best of every size on disk.
    """
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor is not None:
            _restart_checkpoint(checkpoint, best_of)
    for stopping in _early_stoppings(trainer):
        stopping.best_score = torch.tensor(_worst(stopping.mode))
        stopping.wait_count = 0
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.best = config.scheduler.mode_worse
            config.scheduler.num_bad_epochs = 0


def without_best(trainer: pl.Trainer) -> list[str]:
    """Metrics of the checkpoint callbacks that have saved no model of the present size."""
    return [
        checkpoint.monitor
        for checkpoint in trainer.checkpoint_callbacks
        if isinstance(checkpoint, ModelCheckpoint)
        and checkpoint.monitor is not None
        and checkpoint.save_top_k != 0
        and not checkpoint.best_model_path
    ]


def _restart_checkpoint(checkpoint: ModelCheckpoint, best_of: BestOf) -> None:
    worst = torch.tensor(_worst(checkpoint.mode))
    old = list(checkpoint.best_k_models) if best_of == "final_size" else []
    checkpoint.best_k_models = dict.fromkeys(old, worst)
    checkpoint.kth_best_model_path = old[0] if old else ""
    checkpoint.kth_value = worst
    checkpoint.best_model_path, checkpoint.best_model_score = "", None
    checkpoint.current_score = None


def _worst(mode: str) -> float:
    return math.inf if mode == "min" else -math.inf


def _early_stoppings(trainer: pl.Trainer) -> list[EarlyStopping]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
