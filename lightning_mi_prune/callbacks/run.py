"""What a Trainer says of its run: how long it is, and how much validation there is."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_mi_prune.axes import WidthAxis

__all__ = ["is_dev_run", "run_length", "validation_batches", "without_frozen"]


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Whether this is ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))


def validation_batches(trainer: pl.Trainer) -> int | None:
    """Batches of one validation run, over all loaders; 0 without validation, None if unknown."""
    counts = trainer.num_val_batches
    numbers = counts if isinstance(counts, list) else [counts]
    return None if any(math.isinf(n) for n in numbers) else sum(int(n) for n in numbers)


def without_frozen(module: pl.LightningModule, axes: list[WidthAxis]) -> list[WidthAxis]:
    """Leave out networks that are frozen whole, such as a teacher, beside one that is trained."""
    trained = {
        path
        for path in {axis.network for axis in axes}
        if any(p.requires_grad for p in module.get_submodule(path).parameters())
    }
    return [axis for axis in axes if axis.network in trained] or axes


def run_length(trainer: pl.Trainer) -> float:
    """Epochs of the run, a fraction when ``max_steps`` ends it inside one.

    Raises:
        MisconfigurationException: If neither ``max_epochs`` nor ``max_steps`` bounds the run.
    """
    length = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        length = float(trainer.max_epochs)
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        batches = trainer.num_training_batches
        steps = batches / max(1, trainer.accumulate_grad_batches)
        length = min(
            length, trainer.max_steps / max(1, steps if math.isinf(steps) else math.ceil(steps))
        )
    if math.isinf(length) or length == 0:
        raise MisconfigurationException(
            "The length of the run is not known, so no schedule fits. Set max_epochs, or max_steps "
            "with a training set of known length."
        )
    return length
