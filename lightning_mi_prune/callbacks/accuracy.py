"""How much of a metric a cut may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_mi_prune.callbacks.monitored import logged_in_validation
from lightning_mi_prune.strategies import decide_once
from lightning_mi_prune.wording import number

__all__ = ["AccuracyBudget"]


@dataclass(frozen=True)
class AccuracyBudget:
    """How much of a metric a cut may cost after its recovery.

    Args:
        max_drop: Largest loss against the best accepted model, in the metric's own unit.
        monitor: Name of the logged metric.
        mode: ``max`` if more is better, ``min`` if less is.
        on_drop: ``halve`` tries half of the step next, ``stop`` makes no further cut.
    """

    max_drop: float
    monitor: str
    mode: Literal["max", "min"] = "max"
    on_drop: Literal["halve", "stop"] = "halve"

    def __str__(self) -> str:
        return f"{number(self.max_drop)} in {self.monitor!r}"

    def value(self, trainer: pl.Trainer) -> float:
        """The metric after this validation, as rank 0 sees it.

        Raises:
            MisconfigurationException: If it was not logged.
        """
        logged = trainer.callback_metrics

        def read() -> float:
            if self.monitor in logged:
                return float(logged[self.monitor])
            raise MisconfigurationException(
                f"max_drop watches monitor={self.monitor!r}, which was not logged in validation; "
                f"expected one of {logged_in_validation(trainer)}. Log it in validation_step, or "
                "change monitor."
            )

        return decide_once(trainer.strategy, read)

    def better(self, value: float, best: float | None) -> float | None:
        """The better of two values; one that is not finite never is."""
        if not math.isfinite(value):
            return best
        return value if best is None else (max if self.mode == "max" else min)(value, best)

    def exceeded(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is more than ``max_drop`` worse than ``best``, or not a number."""
        if best is None:
            return False
        drop = best - value if self.mode == "max" else value - best
        return not drop <= self.max_drop
