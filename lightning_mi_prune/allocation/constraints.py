"""Fewest and most units that every group may keep, and the widths in between."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence

from lightning_mi_prune.core.errors import PruningError, counted, number
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import innermost

__all__ = [
    "Bounds",
    "at_share",
    "by_choices",
    "check_left",
    "may_be_empty",
    "never_empty",
    "resolve_bounds",
    "shares_of",
    "step_of",
    "widths_between",
]

Bounds = Mapping[str, tuple[int, int]]
_SLACK = 1e-9


def resolve_bounds(
    constraints: Constraints,
    groups: Sequence[DependencyGroup],
    current: Mapping[str, int] | None = None,
) -> dict[str, tuple[int, int]]:
    """Fewest and most units of every group.

    Args:
        constraints: Floors, caps, pins and the step of widths.
        groups: What may shrink.
        current: Units that each group has now (default: as built); nothing grows beyond them.

    Raises:
        PruningError: If an expression matches no group, or constraints contradict each other, the
            group or the units it has left.

    Example:
        >>> groups = [DependencyGroup(f"{i}.ffn", "ffn", 64, (), ("down",)) for i in (0, 1)]
        >>> resolve_bounds(Constraints(floors={"ffn": 0.5}, pins={"^1": 48}), groups)
        {'0.ffn': (32, 64), '1.ffn': (48, 48)}
    """
    for option in ("floors", "caps", "pins"):
        for expression in getattr(constraints, option):
            if not any(re.search(expression, group.name) for group in groups):
                sample = [group.name for group in groups[:4]]
                raise PruningError(
                    f"{option}: {expression!r} matches no group; the names look like {sample}."
                )
    bounds = {}
    for group in groups:
        now = group.size if current is None else current[group.name]
        least, most = _range(constraints, group)
        pin = _pin(constraints, group, now)
        if pin is not None:
            _check_pin(constraints, group, pin)
            least = most = pin
        if most < group.size:
            _check_empty(group, most)
        bounds[group.name] = (min(least, now), min(most, now))
    return bounds


def step_of(group: DependencyGroup, multiple: int) -> int:
    """Units that leave a group together: ``multiple`` neurons or dimensions, or one head.

    Heads and other units of several adjacent entries leave one by one; operators that need aligned
    rows ask for a multiple of their own.

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> dims = (PrunableDim("q.weight", 0, (64, 9), (("heads", 4),)),)
        >>> step_of(DependencyGroup("heads", "heads", 16, dims, ("o",)), 8)
        1
    """
    fine = all(innermost(s.layout, group.name) for s in group.tensors[:1])
    return math.lcm(multiple if fine and group.size > multiple else 1, group.multiple)


def widths_between(least: int, most: int, step: int) -> list[int]:
    """Widths a group may take, from ``most`` down: multiples of ``step``, and both ends.

    Example:
        >>> widths_between(0, 20, 8)
        [20, 16, 8, 0]
    """
    if least >= most:
        return [most]
    inner = range(step * (-(-most // step) - 1), least, -step)
    return [most, *inner, least]


def at_share(
    groups: Sequence[DependencyGroup],
    share: float,
    bounds: Bounds,
    multiple: int,
    *,
    down: bool = False,
) -> dict[str, int]:
    """Width of every group at a share of its units: the nearest whole step, or the next below."""
    found = {}
    for group in groups:
        step, (least, most) = step_of(group, multiple), bounds[group.name]
        steps = share * group.size / step
        width = step * (math.floor(steps + 1e-9) if down else round(steps))
        found[group.name] = max(least, min(most, group.size if down and share >= 1 else width))
    return found


def shares_of(groups: Sequence[DependencyGroup], bounds: Bounds, multiple: int) -> list[float]:
    """Shares at which the width of one of the groups changes, the largest first."""
    found = {
        width / group.size
        for group in groups
        for width in widths_between(*bounds[group.name], step_of(group, multiple))
    }
    return sorted(found, reverse=True)


def never_empty(
    groups: Sequence[DependencyGroup], bounds: Bounds, multiple: int
) -> dict[str, tuple[int, int]]:
    """The bounds, raised so that every group keeps one step where it has one."""
    found = {}
    for group in groups:
        least, most = bounds[group.name]
        found[group.name] = (max(least, min(step_of(group, multiple), most)), most)
    return found


def by_choices(
    groups: Sequence[DependencyGroup], multiple: int
) -> tuple[list[DependencyGroup], list[DependencyGroup]]:
    """Groups with the most widths to choose from, and all others."""
    choices = {group.name: -(-group.size // step_of(group, multiple)) for group in groups}
    fine = [group for group in groups if choices[group.name] == max(choices.values())]
    return fine, [group for group in groups if group not in fine]


def check_left(
    groups: Sequence[DependencyGroup],
    widths: Mapping[str, int],
    emptied: Collection[str],
    budget: object,
) -> None:
    """Refuse a budget that leaves nothing, which is likelier an error than intended.

    Args:
        groups: All groups of the model.
        widths: Units that the budget leaves.
        emptied: Groups that a pin or cap empties.
        budget: The budget, for the error.

    Raises:
        PruningError: If the budget empties all groups that may be empty.
    """
    may = [group for group in groups if may_be_empty(group) and group.name not in emptied]
    if may and not any(widths[group.name] for group in may):
        raise PruningError(
            f"{budget} leaves nothing: all units of {counted(len(may), 'group')} of "
            f"{sorted({group.kind for group in may})} would go. Choose a smaller cut, or set "
            "floor (0.05 keeps a twentieth of each), or pins of 0 if that is what you want."
        )


def may_be_empty(group: DependencyGroup) -> bool:
    """Whether the group may lose all its units."""
    return group.may_be_empty or bool(group.empty_forward)


def _matching(
    constraints: Constraints, option: str, group: DependencyGroup
) -> list[tuple[str, int | float, float]]:
    """Expressions that match the group, their values, and these in units."""
    found = []
    for expression, value in getattr(constraints, option).items():
        if not re.search(expression, group.name):
            continue
        units = value * group.size if isinstance(value, float) else value
        if units > group.size and option != "caps":
            noun = {"floors": "floor", "pins": "pinned width"}[option]
            raise PruningError(
                f"{option}: {expression!r} asks for a {noun} of {counted(value, 'unit')}, "
                f"above the {number(group.size)} that {group.name!r} has as built; lower it."
            )
        found.append((expression, value, units))
    return found


def _range(constraints: Constraints, group: DependencyGroup) -> tuple[int, int]:
    """Fewest and most units, pins aside."""
    step = step_of(group, constraints.multiple)
    floors = [units for _, _, units in _matching(constraints, "floors", group)]
    floor = max([constraints.floor * group.size, *floors])
    least = min(group.size, step * math.ceil(floor / step - _SLACK))
    if least < step and not may_be_empty(group):
        least = step
    most = group.size
    for expression, value, units in _matching(constraints, "caps", group):
        if units >= group.size:
            continue
        cap = step * math.floor(units / step + _SLACK)
        if cap == 0 and units > 0:
            raise PruningError(
                f"caps: {expression!r} leaves {group.name!r} {value}, less than one step of "
                f"{counted(step, 'unit')}. Raise the cap, lower multiple={constraints.multiple}, "
                "or set it to 0."
            )
        _check_empty(group, cap)
        if least > cap:
            raise PruningError(
                f"caps: {expression!r} lets {group.name!r} keep {counted(cap, 'unit')} at most, "
                f"below its floor of {least}; raise the cap or lower the floor."
            )
        most = min(most, cap)
    return least, most


def _pin(constraints: Constraints, group: DependencyGroup, now: int) -> int | None:
    pins = _matching(constraints, "pins", group)
    if not pins:
        return None
    widths = {round(units) for _, _, units in pins}
    if len(widths) > 1:
        raise PruningError(
            f"pins: {[e for e, _, _ in pins]} pin {group.name!r} to {sorted(widths)} units; "
            "expected one number. Narrow one of the expressions."
        )
    (pin,) = widths
    if pin < group.size and pin % group.multiple:
        raise PruningError(
            f"pins: {pins[0][0]!r} pins {group.name!r} to {counted(pin, 'unit')}; expected a "
            f"multiple of {group.multiple}, which its operators need. Pin it to one."
        )
    if pin > now:
        raise PruningError(
            f"pins: {pins[0][0]!r} pins {group.name!r} to {counted(pin, 'unit')}, above the "
            f"{now} that earlier cuts left; pruned units do not come back. Lower the pin."
        )
    return pin


def _check_pin(constraints: Constraints, group: DependencyGroup, pin: int) -> None:
    for option, noun in (("floors", "below its floor"), ("caps", "above its cap")):
        for expression, value, units in _matching(constraints, option, group):
            if (pin < units - _SLACK) if option == "floors" else (pin > units + _SLACK):
                raise PruningError(
                    f"{group.name!r} is pinned to {counted(pin, 'unit')}, {noun} of {value} "
                    f"({expression!r}); change one of them."
                )


def _check_empty(group: DependencyGroup, units: int) -> None:
    if units == 0 and not may_be_empty(group):
        raise PruningError(
            f"{group.name!r} cannot run without units, but a cap or pin of 0 would empty it; leave "
            "it at least one."
        )
