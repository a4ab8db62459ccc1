"""BOUND    Limits: how few and how many units every axis may keep, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.wording import counted, number

__all__ = [
    "Bounds",
    "Limits",
    "at_share",
    "by_choices",
    "check_left",
    "may_vanish",
    "never_empty",
    "shares_of",
    "step_of",
    "widths_between",
]

Bounds = Mapping[str, tuple[int, int]]

_SLACK = 1e-9


@dataclass(frozen=True)
class Limits:
    """Floors, caps and pins of axes, by regular expressions searched in their names.

    A whole number counts units; a ``float`` from 0.0 to 1.0 is a share of the axis as built. Where
    several expressions find an axis, the highest floor and the lowest cap hold.

    Args:
        floors: Units that must stay; rounded up to whole steps.
        caps: Units that may stay at most; rounded down to whole steps.
        pins: Units that must stay exactly; not rounded, and stronger than ``floor``.
        floor: Smallest share of every axis that stays. An axis that may vanish can lose all its
            units where this is 0; the others always keep one step.

    Raises:
        PruningError: If a value is neither a number of units nor a share, or a key is no regular
            expression.

    Example:
        >>> axes = [WidthAxis(f"{i}.ffn", "ffn", 64, 1, (), ("down",)) for i in (0, 1)]
        >>> Limits(floors={"ffn": 0.5}, pins={"^1": 48}).resolve(axes)
        {'0.ffn': (32, 64), '1.ffn': (48, 48)}
    """

    floors: Mapping[str, int | float] = field(default_factory=dict)
    caps: Mapping[str, int | float] = field(default_factory=dict)
    pins: Mapping[str, int | float] = field(default_factory=dict)
    floor: float = 0.0

    def __post_init__(self) -> None:
        number = isinstance(self.floor, (int, float)) and not isinstance(self.floor, bool)
        if not number or not 0 <= self.floor < 1:
            raise PruningError(f"floor={self.floor!r}; expected a share from 0 and below 1.")
        for option in ("floors", "caps", "pins"):
            values = getattr(self, option)
            if not isinstance(values, Mapping):
                raise PruningError(
                    f"{option}={values!r:.60}; expected a mapping such as {{'ffn$': 0.25}}."
                )
            for expression, value in values.items():
                _check_expression(option, expression)
                _check_amount(option, expression, value)
            object.__setattr__(self, option, MappingProxyType(dict(values)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Limits, (dict(self.floors), dict(self.caps), dict(self.pins), self.floor)

    def resolve(
        self,
        axes: Sequence[WidthAxis],
        current: Mapping[str, int] | None = None,
        *,
        multiple: int = 8,
    ) -> dict[str, tuple[int, int]]:
        """Fewest and most units of every axis.

        Args:
            axes: What may shrink.
            current: Units that each axis has now (default: as built); nothing grows beyond them.
            multiple: Widths of axes with one entry a unit are multiples of this.

        Raises:
            PruningError: If an expression finds no axis, or limits contradict each other, the axis
                or what it has left.
        """
        for option in ("floors", "caps", "pins"):
            for expression in getattr(self, option):
                if not any(re.search(expression, axis.name) for axis in axes):
                    sample = [axis.name for axis in axes[:4]]
                    raise PruningError(
                        f"{option}: {expression!r} matches no axis; the names look like {sample}."
                    )
        bounds = {}
        for axis in axes:
            least, most = self._range(axis, multiple)
            now = axis.size if current is None else current[axis.name]
            pin = self._pin(axis, now)
            if pin is not None:
                _check_pin(axis, pin, self._given("floors", axis), self._given("caps", axis))
                least = most = pin
            if most < axis.size:
                _check_empty(axis, most)
            bounds[axis.name] = (min(least, now), min(most, now))
        return bounds

    def _given(self, option: str, axis: WidthAxis) -> list[tuple[str, int | float, float]]:
        """Expressions that find the axis, what they say, and that in units."""
        found = []
        for expression, value in getattr(self, option).items():
            if not re.search(expression, axis.name):
                continue
            units = value * axis.size if isinstance(value, float) else value
            if units > axis.size and option != "caps":
                noun = {"floors": "floor", "pins": "pinned width"}[option]
                raise PruningError(
                    f"{option}: {expression!r} asks for a {noun} of {counted(value, 'unit')}, "
                    f"above the {number(axis.size)} that {axis.name!r} has as built; lower it."
                )
            found.append((expression, value, units))
        return found

    def _range(self, axis: WidthAxis, multiple: int) -> tuple[int, int]:
        step = step_of(axis, multiple)
        floors = [self.floor * axis.size, *(units for _, _, units in self._given("floors", axis))]
        least = min(axis.size, step * math.ceil(max(floors) / step - _SLACK))
        if least < step and not may_vanish(axis):
            least = step
        most = axis.size
        for expression, value, units in self._given("caps", axis):
            if units >= axis.size:
                continue
            cap = step * math.floor(units / step + _SLACK)
            if cap == 0 and units > 0:
                raise PruningError(
                    f"caps: {expression!r} leaves {axis.name!r} {value}, less than one step of "
                    f"{counted(step, 'unit')}. Raise the cap, lower multiple={multiple}, or say 0."
                )
            _check_empty(axis, cap)
            if least > cap:
                raise PruningError(
                    f"caps: {expression!r} lets {axis.name!r} keep {counted(cap, 'unit')} at most, "
                    f"below its floor of {least}; raise the cap or lower the floor."
                )
            most = min(most, cap)
        return least, most

    def _pin(self, axis: WidthAxis, now: int) -> int | None:
        pins = self._given("pins", axis)
        if not pins:
            return None
        widths = {round(units) for _, _, units in pins}
        if len(widths) > 1:
            raise PruningError(
                f"pins: {[e for e, _, _ in pins]} pin {axis.name!r} to {sorted(widths)} units; "
                "expected one number. Narrow one of the expressions."
            )
        (pin,) = widths
        if pin > now:
            raise PruningError(
                f"pins: {pins[0][0]!r} pins {axis.name!r} to {counted(pin, 'unit')}, above the "
                f"{now} that earlier cuts left; pruned units do not come back. Lower the pin."
            )
        return pin


def step_of(axis: WidthAxis, multiple: int) -> int:
    """Units that leave an axis together: ``multiple`` neurons or dimensions, or one head."""
    return multiple if (axis.entries == 1 or axis.spread) and axis.size > multiple else 1


def widths_between(least: int, most: int, step: int) -> list[int]:
    """Widths an axis may take, from ``most`` down: multiples of ``step``, and both ends.

    Example:
        >>> widths_between(0, 20, 8)
        [20, 16, 8, 0]
    """
    if least >= most:
        return [most]
    inner = range(step * (-(-most // step) - 1), least, -step)
    return [most, *inner, least]


def at_share(
    axes: Sequence[WidthAxis],
    share: float,
    bounds: Bounds,
    multiple: int,
    *,
    down: bool = False,
) -> dict[str, int]:
    """Width of every axis where ``share`` of it stays: the nearest in steps, or the next below."""
    found = {}
    for axis in axes:
        step, (least, most) = step_of(axis, multiple), bounds[axis.name]
        steps = share * axis.size / step
        width = step * (math.floor(steps + 1e-9) if down else round(steps))
        found[axis.name] = max(least, min(most, axis.size if down and share >= 1 else width))
    return found


def shares_of(axes: Sequence[WidthAxis], bounds: Bounds, multiple: int) -> list[float]:
    """Every share at which one of the axes changes its width, the largest first."""
    found = {
        width / axis.size
        for axis in axes
        for width in widths_between(*bounds[axis.name], step_of(axis, multiple))
    }
    return sorted(found, reverse=True)


def never_empty(
    axes: Sequence[WidthAxis], bounds: Bounds, multiple: int
) -> dict[str, tuple[int, int]]:
    """The bounds, with one step at least on every axis that has one to keep."""
    found = {}
    for axis in axes:
        least, most = bounds[axis.name]
        found[axis.name] = (max(least, min(step_of(axis, multiple), most)), most)
    return found


def by_choices(axes: Sequence[WidthAxis], multiple: int) -> tuple[list[WidthAxis], list[WidthAxis]]:
    """Axes with the most widths to choose from, and the others."""
    choices = {axis.name: -(-axis.size // step_of(axis, multiple)) for axis in axes}
    fine = [axis for axis in axes if choices[axis.name] == max(choices.values())]
    return fine, [axis for axis in axes if axis not in fine]


def check_left(
    axes: Sequence[WidthAxis], widths: Mapping[str, int], told: Collection[str], budget: object
) -> None:
    """Refuse a budget that leaves nothing: a slip of the pen is likelier than such a wish.

    Args:
        axes: All axes of the model.
        widths: Units that the budget leaves.
        told: Axes that a pin or cap empties.
        budget: The budget, for the error.

    Raises:
        PruningError: If all that may vanish would, without being told to.
    """
    may = [axis for axis in axes if may_vanish(axis) and axis.name not in told]
    if may and not any(widths[axis.name] for axis in may):
        raise PruningError(
            f"{budget} leaves nothing: all units of {counted(len(may), 'group')} of "
            f"{sorted({axis.kind for axis in may})} would vanish. Ask for a larger model, or set "
            "floor (0.05 keeps a twentieth of each), or pins of 0 if that is what you want."
        )


def may_vanish(axis: WidthAxis) -> bool:
    """Whether the axis may lose all its units."""
    return axis.may_vanish or bool(axis.silence)


def _check_expression(option: str, expression: object) -> None:
    if not isinstance(expression, str):
        raise PruningError(f"{option}: {expression!r} is not text; expected a regular expression.")
    try:
        re.compile(expression)
    except re.error as error:
        raise PruningError(
            f"{option}: {expression!r} is not a regular expression ({error}); expected one "
            "such as 'ffn$'."
        ) from error


def _check_amount(option: str, expression: str, value: object) -> None:
    share = isinstance(value, float) and math.isfinite(value) and 0 <= value <= 1
    units = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not share and not units:
        raise PruningError(
            f"{option}: {expression!r} is {value!r}; expected a whole number of units, or a share "
            "from 0.0 to 1.0."
        )


def _check_empty(axis: WidthAxis, units: int) -> None:
    if units == 0 and not may_vanish(axis):
        raise PruningError(
            f"{axis.name!r} cannot run without units, but a cap or pin of 0 would empty it; leave "
            "it at least one."
        )


def _check_pin(
    axis: WidthAxis,
    pin: int,
    floors: Sequence[tuple[str, int | float, float]],
    caps: Sequence[tuple[str, int | float, float]],
) -> None:
    for noun, given in (("below its floor", floors), ("above its cap", caps)):
        for expression, value, units in given:
            if (pin < units - _SLACK) if given is floors else (pin > units + _SLACK):
                raise PruningError(
                    f"{axis.name!r} is pinned to {counted(pin, 'unit')}, {noun} of {value} "
                    f"({expression!r}); change one of them."
                )
