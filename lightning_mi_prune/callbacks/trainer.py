"""Facts about a Trainer's run: its length, its validation runs, its batches."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, TypeVar

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DistributedSampler

from lightning_mi_prune.discovery.groups import DependencyGroup, LayerStack

__all__ = [
    "is_dev_run",
    "is_last_validation",
    "padded_rows",
    "rerun_validation",
    "run_length",
    "validation_batches",
    "without_frozen",
]

Part = TypeVar("Part", DependencyGroup, LayerStack)


def is_dev_run(trainer: pl.Trainer) -> bool:
    """Whether this is ``fast_dev_run``."""
    return bool(getattr(trainer, "fast_dev_run", False))


def validation_batches(trainer: pl.Trainer) -> int | None:
    """Batches of one validation run, over all loaders; 0 without validation, None if unknown."""
    if not trainer.enable_validation:
        return 0
    counts = trainer.num_val_batches or [math.inf]  # empty until the loaders were asked for
    numbers = counts if isinstance(counts, list) else [counts]
    if not numbers and trainer.enable_validation:  # the loaders come with the first validation
        return None
    return None if any(math.isinf(n) for n in numbers) else sum(int(n) for n in numbers)


def without_frozen(module: pl.LightningModule, groups: list[Part]) -> list[Part]:
    """Leave out networks that are frozen whole, such as a teacher, beside one that is trained."""
    trained = {
        path
        for path in {group.network for group in groups}
        if any(p.requires_grad for p in module.get_submodule(path).parameters())
    }
    return [group for group in groups if group.network in trained] or groups


def run_length(trainer: pl.Trainer) -> float:
    """Epochs of the run, a fraction when ``max_steps`` ends it inside one.

    Raises:
        MisconfigurationException: If neither ``max_epochs`` nor ``max_steps`` bounds the run.
    """
    length = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        length = float(trainer.max_epochs)
    module = trainer.lightning_module
    if not module.automatic_optimization and math.isinf(length):
        raise MisconfigurationException(
            "Under manual optimization max_steps counts the steps of every optimizer, which says "
            "nothing of epochs, so no schedule fits. Set max_epochs too."
        )
    if trainer.max_steps is not None and trainer.max_steps >= 0 and module.automatic_optimization:
        length = min(length, _epochs_of(trainer, trainer.max_steps))
    if math.isinf(length) or length == 0:
        raise MisconfigurationException(
            "The length of the run is not known, so no schedule fits. Set max_epochs, or max_steps "
            "with a training set of known length."
        )
    return length


def _epochs_of(trainer: pl.Trainer, steps: int) -> float:
    """How many epochs so many optimizer steps last, with gradient accumulation as scheduled."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return math.inf
    factors: dict[int, int] = {0: trainer.accumulate_grad_batches}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            factors = dict(callback.scheduling)
    changes = [*sorted(factors), math.inf]
    epochs, left = 0.0, float(steps)
    for start, end in pairwise(changes):
        in_an_epoch = math.ceil(batches / factors[int(start)])
        span = min(end - start, left / in_an_epoch)
        epochs, left = epochs + span, left - span * in_an_epoch
    return epochs


def _validates_after(trainer: pl.Trainer, batch: int) -> bool:
    """Whether validation follows a training batch (index within the epoch), as far as is known."""
    every_epochs, interval = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if every_epochs is not None and (trainer.current_epoch + 1) % every_epochs:
        return False
    if interval is None:  # every so many minutes
        return False
    progress = trainer.fit_loop.epoch_loop.batch_progress
    if math.isinf(interval):  # of unknown length: the loader knows when it is over
        return bool(progress.is_last_batch)
    before = progress.total.ready - progress.current.ready if every_epochs is None else 0
    return bool((before + batch + 1) % interval == 0)


def is_last_validation(trainer: pl.Trainer) -> bool:
    """Whether the validation that runs now is the last of its epoch, as far as is known."""
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return True
    done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return not any(_validates_after(trainer, batch) for batch in range(done, int(batches)))


def rerun_validation(trainer: pl.Trainer, loops: dict[str, Any]) -> None:
    """Let a run that resumes here go through the validation it stopped in, from its start.

    Lightning skips what is left of a validation when it resumes, and with it the epoch's end when
    the checkpoint was written after the last training batch. Does nothing for a checkpoint that was
    written elsewhere.

    Args:
        trainer: Trainer that writes a checkpoint.
        loops: Its entry ``"loops"``, changed in place.
    """
    fit = loops["fit_loop"]
    epoch, batches = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]
    current = batches["current"]
    in_epoch = epoch["ready"] == epoch["started"] == epoch["processed"] + 1
    if not in_epoch or not current["ready"] == current["processed"] > 0:
        return
    if not _validates_after(trainer, current["ready"] - 1):
        return
    for counts in (batches["total"], current):
        counts["completed"] = counts["processed"]
    validation = fit["epoch_loop.val_loop.batch_progress"]
    ready = max(1, validation["total"]["ready"])
    validation["total"] |= {"ready": ready, "started": ready}
    validation["total"] |= {"processed": ready - 1, "completed": ready - 1}
    validation["current"] = dict.fromkeys(validation["current"], 0)
    validation["is_last_batch"] = False


def padded_rows(trainer: pl.Trainer, batch: int, loader: int) -> tuple[int | None, int]:
    """Examples of a validation batch, and how many at its end a distributed sampler repeated.

    A DistributedSampler gives the last ranks one example of another rank when the data do not
    divide evenly; it comes last.
    """
    found = trainer.val_dataloaders
    loaders = list(found.values()) if isinstance(found, dict) else found
    source = loaders[loader] if isinstance(loaders, (list, tuple)) else loaders
    samplers = (
        getattr(source, "sampler", None),
        getattr(getattr(source, "batch_sampler", None), "sampler", None),
    )
    sampler = next((s for s in samplers if isinstance(s, DistributedSampler)), None)
    size = getattr(source, "batch_size", None)
    if sampler is None or size is None:
        return None, 0
    extra = len(sampler.dataset) % sampler.num_replicas  # type: ignore[arg-type]
    rows = min(size, sampler.num_samples - batch * size)
    ends = batch * size + rows == sampler.num_samples
    repeats = ends and not sampler.drop_last and extra > 0 and sampler.rank >= extra
    return rows, int(repeats)
