"""When a run cuts how much: its length, its validations, and the cuts that fit into it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_mi_prune.core.errors import PruningError, counted

__all__ = [
    "CutSchedule",
    "Ramp",
    "decision_epoch",
    "fit_schedule",
    "is_dev_run",
    "is_last_validation",
    "run_length",
    "validates_after",
    "validation_batches",
]

Ramp = Literal["cubic", "linear", "one_shot"]

_MOST_CUTS = 4  # automatic schedules; each cut wants an epoch to recover in


@dataclass(frozen=True)
class CutSchedule:
    """Sparsity to reach at the start of each cutting epoch, in order.

    Args:
        epochs: Epochs that start with a cut (``trainer.current_epoch``, which counts from 0).
        sparsities: Sparsity after each, against the model as built.
    """

    epochs: tuple[int, ...] = ()
    sparsities: tuple[float, ...] = ()

    def due(self, epoch: int, reached: float) -> float | None:
        """Sparsity to reach at the start of ``epoch`` if only ``reached`` was, or None."""
        wanted = [s for e, s in zip(self.epochs, self.sparsities, strict=True) if e <= epoch]
        return wanted[-1] if wanted and wanted[-1] > reached else None

    def left(self, reached: float) -> tuple[int, ...]:
        """Epochs of the cuts that are still to come after sparsity ``reached``."""
        return tuple(e for e, s in zip(self.epochs, self.sparsities, strict=True) if s > reached)

    def halved(
        self, epoch: int, reached: float, failed: float, last: int, every: int
    ) -> CutSchedule:
        """Go on from ``reached`` with half of the step that ``failed``, as far as the run allows.

        Args:
            epoch: First epoch that may start with a cut.
            reached: Sparsity of the model before that cut.
            failed: Sparsity of the cut that was rolled back.
            last: Last epoch that may start with a cut.
            every: Validation runs after every so many epochs.

        Example:
            >>> CutSchedule((1, 3, 5), (0.2, 0.4, 0.6)).halved(6, 0.2, 0.4, last=8, every=1)
            CutSchedule(epochs=(6, 8), sparsities=(0.3, 0.4))
        """
        gaps = [b - a for a, b in pairwise(self.epochs)]
        stride = max(every, *gaps) if gaps else every
        first = -(-epoch // every) * every
        step, end = (failed - reached) / 2, self.sparsities[-1]
        cuts = [
            (e, min(end, reached + step * (i + 1)))
            for i, e in enumerate(range(first, last + 1, stride))
            if reached + step * i < end
        ]
        return CutSchedule(tuple(e for e, _ in cuts), tuple(round(s, 12) for _, s in cuts))


def decision_epoch(cut: int, following: int | None, length: float, every: int) -> int:
    """Epoch whose validation decides on the cut made at the start of epoch ``cut``.

    The last one before the ``following`` cut; after the last cut, half-way through what is left of
    the run, so that there is time to train on after a rollback, or to try a smaller step.

    Example:
        >>> decision_epoch(1, 3, 8, 1), decision_epoch(4, None, 8, 1), decision_epoch(4, None, 8, 2)
        (2, 5, 5)
    """
    end = math.ceil(length - 1e-9) - 1
    half = following if following is not None else cut + max(1, -(-(end - cut) // 2))
    found = -(-half // every) * every - 1
    return max(cut, found if found < end else end // every * every - 1)


def fit_schedule(
    length: float,
    sparsity: float,
    *,
    ramp: Ramp = "cubic",
    cuts: int | None = None,
    first_epoch: int | None = None,
    last_epoch: int | None = None,
    every: int = 1,
    begin: int = 0,
    recovery: int = 1,
    late: bool = False,
) -> CutSchedule:
    """Fit the cuts into a run.

    Cuts happen at the start of an epoch that follows a validation. Without ``last_epoch`` the last
    cut is no later than half-way; at least ``recovery`` whole epochs always follow it.

    Args:
        length: Epochs of the run; a fraction when ``max_steps`` ends it inside one.
        sparsity: Sparsity of the last cut.
        ramp: ``cubic`` removes much early and little late (Zhu and Gupta 2017), ``linear`` the
            same each time, ``one_shot`` everything at once.
        cuts: Number of cuts; None takes what fits, at most 4.
        first_epoch: Epoch that starts with the first cut, counted from 0 as all epochs are; at
            least 1.
        last_epoch: Epoch that starts with the last cut.
        every: Validation runs after every so many epochs.
        begin: Epochs that were over when pruning began.
        recovery: Epochs that must follow the last cut.
        late: Whether a single cut comes as late as it may, where no epoch is given.

    Raises:
        PruningError: If the run is too short, or the numbers contradict each other.

    Example:
        >>> fit_schedule(8, 0.8, ramp="linear")
        CutSchedule(epochs=(1, 2, 3, 4), sparsities=(0.2, 0.4, 0.6, 0.8))
    """
    epochs = f"{counted(length, 'epoch')}, which count from 0"
    latest = math.floor(length - recovery + 1e-9)
    half = begin + math.floor((length - begin) / 2 + 1e-9)
    last = min(latest, half) if last_epoch is None else last_epoch
    first = begin + 1 if first_epoch is None else max(first_epoch, begin + 1)
    if length - begin < 1 + recovery:
        raise PruningError(
            f"The run lasts {counted(length - begin, 'epoch')}; expected at least {1 + recovery}, "
            f"one before a cut and {recovery} to recover. Raise max_epochs or max_steps."
        )
    if last_epoch is not None and last_epoch > latest:
        raise PruningError(
            f"last_epoch={last_epoch} leaves no epoch to recover in a run of {epochs}; expected at "
            f"most {latest}, with {recovery} to recover. Lower last_epoch or raise max_epochs."
        )
    if first > last:
        given = first == first_epoch
        named = f"first_epoch={first}" if given else f"The next epoch to cut in, {first},"
        raise PruningError(
            f"{named} comes after the last cut at epoch {last} of {epochs}; lower first_epoch, "
            "set a later last_epoch, or raise max_epochs."
        )
    # A validation before it, to calibrate in, and one after it, to know what it cost.
    open_epochs = [
        epoch
        for epoch in range(first, last + 1)
        if epoch % every == 0 and epoch + every <= length + 1e-9
    ]
    if not open_epochs:
        raise PruningError(
            f"No validation runs before and after epochs {first} to {last} "
            f"(check_val_every_n_epoch={every}); validate more often or raise max_epochs."
        )
    count = 1 if ramp == "one_shot" else (cuts or min(_MOST_CUTS, len(open_epochs)))
    if count > len(open_epochs):
        raise PruningError(
            f"cuts={count}, but only the epochs {open_epochs} can start with a cut; lower cuts, "
            "set last_epoch, or raise max_epochs."
        )
    if count == 1:
        given = first_epoch is not None or (last_epoch is None and not late)
        place = 0 if given else len(open_epochs) - 1
        return CutSchedule((open_epochs[place],), (sparsity,))
    spread = [round(i * (len(open_epochs) - 1) / (count - 1)) for i in range(count)]
    shares = [(i + 1) / count for i in range(count)]
    power = 3 if ramp == "cubic" else 1
    return CutSchedule(
        tuple(open_epochs[i] for i in spread),
        tuple(round(sparsity * (1 - (1 - share) ** power), 12) for share in shares),
    )


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
            "Under manual optimization max_steps counts the steps of every optimizer, not epochs, "
            "so no schedule fits. Set max_epochs too."
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


def validates_after(trainer: pl.Trainer, batch: int) -> bool:
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
    return not any(validates_after(trainer, batch) for batch in range(done, int(batches)))
