"""When to cut how much: pure functions from the length of a run to a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_mi_prune.errors import PruningError

__all__ = ["Ramp", "Schedule", "fit_schedule"]

Ramp = Literal["cubic", "linear", "one_shot"]
_MOST_CUTS = 4  # automatic schedules; each cut wants an epoch to recover in


@dataclass(frozen=True)
class Schedule:
    """Sparsity to reach at the start of each cutting epoch, in order.

    Args:
        epochs: Training epochs (from 0) that start with a cut.
        sparsities: Sparsity after each, against the model as built.
    """

    epochs: tuple[int, ...]
    sparsities: tuple[float, ...]

    def due(self, epoch: int, done: int) -> float | None:
        """Sparsity to reach at the start of ``epoch`` when ``done`` cuts were made, or None."""
        reached = [s for e, s in zip(self.epochs, self.sparsities, strict=True) if e <= epoch]
        return reached[-1] if len(reached) > done else None

    def count_until(self, epoch: int) -> int:
        """Number of cuts that are due by the start of ``epoch``."""
        return sum(e <= epoch for e in self.epochs)


def fit_schedule(
    length: float,
    sparsity: float,
    *,
    ramp: Ramp = "cubic",
    cuts: int | None = None,
    first_epoch: int | None = None,
    last_epoch: int | None = None,
    every: int = 1,
) -> Schedule:
    """Fit the cuts into a run.

    Cuts happen at the start of an epoch that follows a validation. Without ``last_epoch`` the last
    cut is no later than half-way; at least one whole epoch of recovery always follows it.

    Args:
        length: Epochs of the run; a fraction when ``max_steps`` ends it inside one.
        sparsity: Sparsity of the last cut.
        ramp: ``cubic`` removes much early and little late (Zhu and Gupta 2017), ``linear`` the
            same each time, ``one_shot`` everything at once.
        cuts: Number of cuts; None takes what fits, at most 4.
        first_epoch: Epoch of the first cut, from 1.
        last_epoch: Epoch of the last cut.
        every: Validation runs after every so many epochs.

    Raises:
        PruningError: If the run is too short, or the numbers contradict each other.

    Example:
        >>> fit_schedule(8, 0.8, ramp="linear")
        Schedule(epochs=(1, 2, 3, 4), sparsities=(0.2, 0.4, 0.6, 0.8))
    """
    latest = math.floor(length - 1 + 1e-9)
    last = math.floor(length / 2 + 1e-9) if last_epoch is None else last_epoch
    first = 1 if first_epoch is None else first_epoch
    if length < 2:
        raise PruningError(
            f"The run lasts {length:g} epochs; expected at least 2, one before a cut and one to "
            "recover. Raise max_epochs or max_steps."
        )
    if last_epoch is not None and last_epoch > latest:
        raise PruningError(
            f"last_epoch={last_epoch} leaves no epoch to recover in a run of {length:g}; expected "
            f"at most {latest}. Lower last_epoch or raise max_epochs."
        )
    if first > last:
        raise PruningError(
            f"first_epoch={first} comes after the last cut at epoch {last} (of {length:g}); "
            "lower first_epoch, set last_epoch, or raise max_epochs."
        )
    open_epochs = [epoch for epoch in range(first, last + 1) if epoch % every == 0]
    if not open_epochs:
        raise PruningError(
            f"No validation runs before epochs {first} to {last} "
            f"(check_val_every_n_epoch={every}); validate more often or raise max_epochs."
        )
    count = 1 if ramp == "one_shot" else (cuts or min(_MOST_CUTS, len(open_epochs)))
    if count > len(open_epochs):
        raise PruningError(
            f"cuts={count}, but only the epochs {open_epochs} can start with a cut; lower cuts, "
            "set last_epoch, or raise max_epochs."
        )
    if count == 1:
        place = 0 if first_epoch is not None or last_epoch is None else len(open_epochs) - 1
        return Schedule((open_epochs[place],), (sparsity,))
    spread = [round(i * (len(open_epochs) - 1) / (count - 1)) for i in range(count)]
    shares = [(i + 1) / count for i in range(count)]
    power = 3 if ramp == "cubic" else 1
    return Schedule(
        tuple(open_epochs[i] for i in spread),
        tuple(round(sparsity * (1 - (1 - share) ** power), 12) for share in shares),
    )
