"""Checks of options: the value, what was expected, the remedy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_mi_prune.callbacks.monitors import BestOf, MetricGuard

__all__ = [
    "accuracy_budget",
    "between",
    "check_choices",
    "check_counts",
    "check_order",
    "check_regex",
    "check_types",
    "check_units",
    "without_private",
]

_TEXT: tuple[type, ...] = (str, type(None))


# What each rank may have as it likes: of these, only those of rank 0 are looked at.
_PRIVATE = {"self", "__class__", "verbose", "latency_table"}


_LEAST = {
    "seed": 0,
    "multiple": 1,
    "positions": 2,
    "reconstruction_positions": 2,
    "relevance_steps": 1,
    "latency_batch": 1,
    "cuts": 1,
    "first_epoch": 1,
    "last_epoch": 1,
}


_EPOCHS = ": epochs count from 0, as trainer.current_epoch does, and validation precedes a cut"


_TYPES: dict[str, tuple[type, ...]] = {
    "include": _TEXT,
    "exclude": _TEXT,
    "module": _TEXT,
    "monitor": _TEXT,
    "latency_table": _TEXT,
    "compensate": (bool,),
    "reconstruct": (bool,),
    "verbose": (bool,),
}


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "widths": ("global", "uniform"),
    "relevance": ("gradient", "weights", None),
    "kernel": ("linear", "rbf"),
    "mode": ("max", "min"),
    "on_drop": ("halve", "stop"),
    "best_of": get_args(BestOf),
}


def without_private(given: Mapping[str, object]) -> dict[str, object]:
    """All arguments of a constructor that all ranks must share: those that decide on the result.

    Args:
        given: Its ``locals()``, before anything else is there.

    Example:
        >>> without_private({"self": 1, "__class__": 2, "seed": 3, "verbose": True})
        {'seed': 3}
    """
    return {name: given[name] for name in given if name not in _PRIVATE}


def between(name: str, value: float, low: float, high: float, *, closed: bool = False) -> None:
    """Refuse a number outside a range."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (
        not number
        or not math.isfinite(value)
        or not (low <= value < high if closed else low < value < high)
    ):
        raise MisconfigurationException(
            f"{name}={value!r}; expected a number {'from' if closed else 'above'} {low} "
            f"and below {high}."
        )


def check_types(**given: object) -> None:
    """Refuse values of another type, by name."""
    for name, value in given.items():
        if not isinstance(value, _TYPES[name]):
            wanted = ["None" if k is type(None) else k.__name__ for k in _TYPES[name]]
            raise MisconfigurationException(f"{name}={value!r}; expected {' or '.join(wanted)}.")


def check_choices(**given: object) -> None:
    """Refuse values that are none of the choices, by name."""
    for name, value in given.items():
        if value not in _CHOICES[name]:
            raise MisconfigurationException(f"{name}={value!r}; expected one of {_CHOICES[name]}.")


def check_counts(least: int = 0, **given: object) -> None:
    """Refuse anything but whole numbers that are large enough, by name."""
    for name, value in given.items():
        fewest = max(least, _LEAST[name])
        if value is None and name in ("cuts", "first_epoch", "last_epoch"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < fewest:
            raise MisconfigurationException(
                f"{name}={value!r}; expected a whole number of at least {fewest}"
                f"{_EPOCHS if name in ('first_epoch', 'last_epoch') else ''}."
            )


def check_order(ramp: str, cuts: int | None, first: int | None, last: int | None) -> None:
    """Refuse a ramp, number and epochs of cuts that contradict each other."""
    if ramp not in ("cubic", "linear", "one_shot"):
        raise MisconfigurationException(f"ramp={ramp!r}; expected 'cubic', 'linear' or 'one_shot'.")
    if ramp == "one_shot" and cuts not in (None, 1):
        raise MisconfigurationException(
            f"ramp='one_shot' makes one cut, but cuts={cuts}; drop cuts or choose another ramp."
        )
    if first is not None and last is not None:
        if first > last:
            raise MisconfigurationException(
                f"first_epoch={first} comes after last_epoch={last}; swap or drop one of them."
            )
        if cuts is not None and cuts > last - first + 1:
            raise MisconfigurationException(
                f"cuts={cuts} do not fit into epochs {first} to {last}; expected at most "
                f"{last - first + 1}."
            )


def check_regex(name: str, expression: str | None) -> None:
    """Refuse what is no regular expression."""
    try:
        re.compile(expression or "")
    except re.error as error:
        raise MisconfigurationException(
            f"{name}={expression!r} is not a regular expression ({error}); expected one, such as "
            "'ffn$'."
        ) from error


def check_units(units: object) -> None:
    """Refuse anything but kinds of units."""
    if units is not None and (isinstance(units, str) or not units):
        raise MisconfigurationException(
            f"units={units!r}; expected a list of kinds such as ['ffn', 'heads']."
        )


def accuracy_budget(
    max_drop: float | None,
    monitor: str | None,
    mode: Literal["max", "min"],
    on_drop: Literal["halve", "stop"] = "halve",
) -> MetricGuard | None:
    """The accuracy budget that options ask for; refuses one that says too little, or too much."""
    check_choices(mode=mode, on_drop=on_drop)
    check_types(monitor=monitor)
    if max_drop is None:
        if monitor is not None:
            raise MisconfigurationException(
                f"monitor={monitor!r} is watched for max_drop only, which is None; set both."
            )
        return None
    between("max_drop", max_drop, 0, math.inf, closed=True)
    if monitor is None:
        raise MisconfigurationException(
            f"max_drop={max_drop} needs monitor; expected the name of a metric that validation "
            "logs."
        )
    return MetricGuard(float(max_drop), monitor, mode, on_drop)
