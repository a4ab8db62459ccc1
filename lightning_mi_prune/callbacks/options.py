"""Checks of options: the value, what was expected, the remedy."""

from __future__ import annotations

import math
import re

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = [
    "among",
    "at_least",
    "between",
    "check_budget",
    "check_order",
    "check_regex",
    "is_one_of",
]


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


def is_one_of(name: str, value: object, kinds: tuple[type, ...]) -> None:
    """Refuse a value of another type."""
    if not isinstance(value, kinds):
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise MisconfigurationException(f"{name}={value!r}; expected {wanted}.")


def among(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is none of the choices."""
    if value not in choices:
        raise MisconfigurationException(f"{name}={value!r}; expected one of {choices}.")


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuse anything but a whole number of at least ``least``."""
    if value is None and name in ("cuts", "first_epoch", "last_epoch"):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise MisconfigurationException(
            f"{name}={value!r}; expected a whole number of at least {least}."
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
    if expression is None:
        return
    try:
        re.compile(expression)
    except re.error as error:
        raise MisconfigurationException(
            f"{name}={expression!r} is not a regular expression: {error}."
        ) from error


def check_budget(max_drop: float | None, monitor: str | None, mode: str, on_drop: str) -> None:
    """Refuse an accuracy budget that says too little, or too much."""
    among("mode", mode, ("max", "min"))
    among("on_drop", on_drop, ("halve", "stop"))
    is_one_of("monitor", monitor, (str, type(None)))
    if max_drop is None:
        if monitor is not None:
            raise MisconfigurationException(
                f"monitor={monitor!r} is watched for max_drop only, which is None; set both."
            )
        return
    between("max_drop", max_drop, 0, math.inf, closed=True)
    if monitor is None:
        raise MisconfigurationException(
            f"max_drop={max_drop} needs monitor, the name of a metric that validation logs."
        )
