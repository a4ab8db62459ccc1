"""Allocate widths: units that lose least for their cost go first."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product
from typing import get_args

from lightning_mi_prune.allocation.budget import (
    NATS,
    Budget,
    check_reach,
    nats_left,
    ranking_of,
    uniform,
    uniform_by_information,
)
from lightning_mi_prune.allocation.classes import Choices, WidthClass, choices_of
from lightning_mi_prune.allocation.constraints import (
    Bounds,
    step_of,
    widths_between,
)
from lightning_mi_prune.allocation.costs import Costs
from lightning_mi_prune.core.errors import PruningError, number
from lightning_mi_prune.core.options import Constraints, Widths, check_choice
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.graph.groups import DependencyGroup

__all__ = [
    "allocate",
    "allocate_by_class",
    "allocate_by_loss",
]

_SLACK = 1e-12
_MOST_TRIED = 2000  # widths of all classes but one, each with the best width of that one


def allocate(
    groups: Sequence[DependencyGroup],
    budget: Budget,
    *,
    costs: Costs,
    widths: Widths = "global",
    classes: Sequence[WidthClass] = (),
    rankings: Mapping[str, Ranking] | None = None,
    current: Mapping[str, int] | None = None,
    constraints: Constraints | None = None,
    progress: float = 1.0,
    kept: float = 1.0,
) -> dict[str, int]:
    """Width of every group that meets a budget; never more than it has now.

    Args:
        groups: What may shrink.
        budget: How small the model must get.
        costs: What widths cost, in the measure of the budget.
        widths: ``"global"`` compares the losses of all groups, ``"uniform"`` keeps the same share
            everywhere, ``"config"`` compares those of classes, each of one width.
        classes: Groups that share a width, for ``"config"``.
        rankings: What each group loses with every unit; not needed for ``"uniform"``, unless for
            ``keep_information``.
        current: Present width of each group (default: as built).
        constraints: Floors, caps and pins, and the step of widths.
        progress: How far to go from the model as built to the budget, above 0 and up to 1.
        kept: Share of the information that earlier cuts left, where the rankings begin after them.

    Raises:
        PruningError: If the budget is out of reach, or a ranking that it needs is missing.

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> from lightning_mi_prune.allocation.costs import ParameterCosts
        >>> names = ("first", "second")
        >>> dims = {name: PrunableDim(name, 0, (8, 8), ((name, 4),)) for name in names}
        >>> groups = [
        ...     DependencyGroup(name, "heads", 2, (dims[name],), ("down",)) for name in names
        ... ]
        >>> losses = {"first": (4.0, 8.0), "second": (1.0, 3.0)}
        >>> rankings = {name: Ranking((0, 1), loss, loss) for name, loss in losses.items()}
        >>> allocate(groups, Budget(sparsity=0.25), costs=ParameterCosts(groups), rankings=rankings)
        {'first': 2, 'second': 1}
    """
    check_choice("widths", widths, get_args(Widths))
    constraints = Constraints() if constraints is None else constraints
    multiple = constraints.multiple
    now = {group.name: group.size for group in groups} if current is None else current
    bounds = check_reach(
        groups,
        budget,
        costs=costs,
        widths=widths,
        classes=classes,
        current=now,
        constraints=constraints,
        progress=progress,
    )
    target = budget.target(groups, costs, progress)
    need = None
    if budget.kind == "keep_information":
        need = (1 - progress * (1 - budget.amount)) / kept
    if rankings is None and (widths != "uniform" or need is not None):
        raise PruningError(
            f"widths={widths!r} with {budget} needs rankings of the groups; rank them first."
        )
    ranked = rankings or {}
    choices = Choices((), {})
    if widths == "config":
        choices = choices_of(classes, groups, bounds, now, multiple)
    if need is not None:
        caps = {name: most for name, (_, most) in bounds.items()} | choices.most
        before, after = (nats_left(groups, ranked, w, need) for w in (now, caps))
        if before >= -NATS > after:
            raise PruningError(
                f"{budget} is out of reach: the caps and pins alone lose {number(-after)} nats "
                "more than is allowed. Raise them, or keep less information."
            )
    if widths == "config":
        if progress < 1 and need is None:
            # Never below the final widths: of few classes, another may be the first to go.
            least = budget.target(groups, costs)
            choices = choices.at_least(allocate_by_class(groups, ranked, costs, least, choices))
        return allocate_by_class(groups, ranked, costs, target, choices, need=need)
    if widths == "global":
        return allocate_by_loss(
            groups, ranked, costs, target, bounds=bounds, multiple=multiple, need=need
        )
    if need is not None:
        return uniform_by_information(groups, ranked, need, bounds, multiple)
    found = uniform(groups, costs, target, bounds=bounds, multiple=multiple)
    if progress < 1:
        # Never below the final widths: where heads are rounded up, fewer neurons stay.
        final = uniform(
            groups, costs, budget.target(groups, costs), bounds=bounds, multiple=multiple
        )
        found = {name: max(width, final[name]) for name, width in found.items()}
    return found


def allocate_by_loss(
    groups: Sequence[DependencyGroup],
    rankings: Mapping[str, Ranking],
    costs: Costs,
    target: float,
    *,
    bounds: Bounds,
    multiple: int = 8,
    need: float | None = None,
) -> dict[str, int]:
    """Repeat the jump, of any group, with the least loss for its cost until the target is met.

    A jump spans one step or many, down to nothing where a group may be empty: losses of one group
    are not convex, and a whole sublayer can be cheaper to lose than half of it. The jump that meets
    the target is the cheapest of any group that does; steps that then fit are undone.

    Args:
        groups: What may shrink.
        rankings: What each group loses with every unit; losses of several groups add up.
        costs: What widths cost.
        target: Largest cost allowed.
        bounds: Fewest and most units of every group; all start at the most.
        multiple: Widths of groups with one entry per unit are multiples of this.
        need: Share of the summed information that must stay; then the last jump is the one after
            which no other fits.

    Raises:
        PruningError: If a ranking is missing or too short, or the target is out of reach.
    """
    allocator = _Allocator(costs, {name: most for name, (_, most) in bounds.items()})
    for group in groups:
        options = widths_between(*bounds[group.name], step_of(group, multiple))
        ranking = ranking_of(group, rankings, options[0])
        allocator.add(group.name, options, [ranking.lost(width) for width in options])
    if need is None:
        allocator.shrink_to(target)
    else:
        allocator.shrink_while(nats_left(groups, rankings, allocator.widths, need))
    return {group.name: allocator.widths[group.name] for group in groups}


def allocate_by_class(
    groups: Sequence[DependencyGroup],
    rankings: Mapping[str, Ranking],
    costs: Costs,
    target: float,
    choices: Choices,
    *,
    need: float | None = None,
) -> dict[str, int]:
    """The widths of classes of groups that lose least within the target.

    Classes are few: all widths of all but the finest are tried, each with the widest of that one
    which meets the target. Where these are too many, the jump with the least loss for its cost is
    repeated, as for single groups.

    Args:
        groups: What may shrink.
        rankings: What each group loses with every unit; losses of the groups of a class add up.
        costs: What widths cost.
        target: Largest cost allowed.
        choices: The widths that each class may take.
        need: Share of the summed information that must stay; the smallest widths that keep it are
            then chosen, whatever the target.

    Raises:
        PruningError: If a ranking is missing or too short, or the target is out of reach.
    """
    sizes = {group.name: group for group in groups}
    for options in choices.options:
        for name, width in options[0].items():
            ranking_of(sizes[name], rankings, width)
    if math.prod(sorted(map(len, choices.options))[:-1]) <= _MOST_TRIED:
        found = _best(groups, rankings, costs, target, choices, need)
    else:
        found = _by_jumps(groups, rankings, costs, target, choices, need)
    if found is None and need is None:
        raise PruningError(
            f"A cost of {number(target)} {costs.measure} is out of reach; at least "
            f"{number(costs.total(choices.fewest))} is left. Raise the budget or loosen the "
            "constraints."
        )
    chosen = choices.most if found is None else found  # as much was lost before
    return {group.name: chosen[group.name] for group in groups}


def _losses(
    options: Sequence[Mapping[str, int]], rankings: Mapping[str, Ranking]
) -> list[tuple[float, float]]:
    """Loss and nats of a class at each of its widths; sums never fall, but for rounding."""
    each = [
        [sum(parts) for parts in zip(*(rankings[n].lost(w) for n, w in one.items()), strict=True)]
        for one in options
    ]
    loss, nats = (accumulate(values, max) for values in zip(*each, strict=True))
    return list(zip(loss, nats, strict=True))


def _best(
    groups: Sequence[DependencyGroup],
    rankings: Mapping[str, Ranking],
    costs: Costs,
    target: float,
    choices: Choices,
    need: float | None,
) -> dict[str, int] | None:
    """The best of all widths of classes; None if none meets the target."""
    *others, finest = sorted(choices.options, key=len)
    limit = target + _SLACK * max(1.0, costs.total(choices.most))
    left = math.inf
    if need is not None:
        left = nats_left(groups, rankings, choices.most, need)
    of_finest = _losses(finest, rankings)
    tables = [list(zip(options, _losses(options, rankings), strict=True)) for options in others]
    start = sum(_losses(options[:1], rankings)[0][1] for options in choices.options)
    best: tuple[tuple[float, float], dict[str, int]] | None = None
    for rows in product(*tables):
        widths = dict(choices.whole)
        for one, _ in rows:
            widths |= one
        loss, nats = (sum(values) for values in zip((0.0, 0.0), *(r for _, r in rows), strict=True))
        if need is None:
            place = bisect_left(
                range(len(finest)),
                True,
                key=lambda i: costs.total({**widths, **finest[i]}) <= limit,
            )
        else:
            allowed = left + start - nats + NATS
            place = bisect_right(of_finest, allowed, key=lambda lost: lost[1]) - 1
        if not 0 <= place < len(finest):
            continue
        whole = {**widths, **finest[place]}
        value = loss + of_finest[place][0], costs.total(whole)
        order = value if need is None else value[::-1]
        if best is None or order < best[0]:
            best = order, whole
    return None if best is None else best[1]


def _by_jumps(
    groups: Sequence[DependencyGroup],
    rankings: Mapping[str, Ranking],
    costs: Costs,
    target: float,
    choices: Choices,
    need: float | None,
) -> dict[str, int]:
    """Widths of many classes, by the jumps of single groups."""
    merged = _ClassCosts(costs, choices)
    allocator = _Allocator(merged, dict.fromkeys(merged.options, 0))
    for name, options in merged.options.items():
        allocator.add(name, list(range(0, -len(options), -1)), _losses(options, rankings))
    if need is None:
        allocator.shrink_to(target)
    else:
        allocator.shrink_while(nats_left(groups, rankings, merged.widths(allocator.widths), need))
    return merged.widths(allocator.widths)


class _ClassCosts:
    """What classes cost whose "widths" are places in their lists of options, counted down from 0.

    Args:
        costs: What the widths of groups cost.
        choices: The options.
    """

    def __init__(self, costs: Costs, choices: Choices) -> None:
        self.options = {str(i): options for i, options in enumerate(choices.options)}
        self._costs, self._whole = costs, choices.whole
        self._class = {n: name for name, options in self.options.items() for n in options[0]}

    @property
    def measure(self) -> str:
        return self._costs.measure

    def widths(self, places: Mapping[str, float]) -> dict[str, int]:
        """The width of every group."""
        found = dict(self._whole)
        for name, place in places.items():
            found |= self.options[name][-int(place)]
        return found

    def total(self, widths: Mapping[str, float]) -> float:
        return self._costs.total(self.widths(widths))

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        now = self.total(widths)
        return [now - self.total({**widths, name: place}) for place in options]

    def neighbours(self, name: str) -> frozenset[str]:
        near = (self._costs.neighbours(member) for member in self.options[name][0])
        found = {self._class[other] for names in near for other in names if other in self._class}
        return frozenset(found - {name})


@dataclass
class _Candidate:
    """One group: the widths it may take, from the most down, and its loss at each of them."""

    options: list[int]
    loss: list[float]
    nats: list[float]
    place: int = 0
    version: int = 0
    jumps: list[tuple[float, int]] = field(default_factory=list)


class _Allocator:
    def __init__(self, costs: Costs, widths: dict[str, int]) -> None:
        self.widths = widths
        self._costs, self._cost = costs, costs.total(widths)
        self._slack = _SLACK * max(1.0, self._cost)
        self._candidates: dict[str, _Candidate] = {}
        self._heap: list[tuple[float, float, str, int]] = []

    def add(self, name: str, options: list[int], lost: list[tuple[float, float]]) -> None:
        # Sums of losses never fall, but for rounding.
        loss, nats = (list(accumulate(values, max)) for values in zip(*lost, strict=True))
        self._candidates[name] = _Candidate(options, loss, nats)
        self._push(name, fresh=True)

    def shrink_to(self, target: float) -> None:
        """Jump until the cost is met, by the cheapest last jump; then undo the steps that fit."""
        while self._cost > target + self._slack:
            jump = self._pop()
            if jump is None:
                raise PruningError(
                    f"A cost of {number(target)} {self._costs.measure} is out of reach; at least "
                    f"{number(self._cost)} is left. Raise the budget or loosen the constraints."
                )
            name, place = jump
            if self._cost - self._saved(name, place) > target + self._slack:
                self._move(name, place)
                continue
            lasts = [self._last(one, target) for one in self._candidates]
            possible = [last for last in lasts if last is not None]
            self._move(*min(possible, key=lambda last: (last[0], last[1] != name))[1:])
        self._undo(target)

    def shrink_while(self, left: float) -> None:
        """Jump while no more than ``left`` nats are lost in all; the last jump may be shorter."""
        while (jump := self._pop()) is not None:
            name, place = jump
            one = self._candidates[name]
            while place > one.place and one.nats[place] - one.nats[one.place] > left + NATS:
                place -= 1
            left -= one.nats[place] - one.nats[one.place]
            self._move(name, place)
            if place < jump[1]:
                return

    def _last(self, name: str, target: float) -> tuple[float, str, int] | None:
        """Loss, name and place of the smallest cut of a group that alone meets the target."""
        one = self._candidates[name]
        place = one.place + bisect_left(self._savings(name), self._cost - target - self._slack)
        if place == len(one.options):
            return None
        return one.loss[place] - one.loss[one.place], name, place

    def _undo(self, target: float) -> None:
        """Undo single steps within the target, those with the largest loss first."""
        while True:
            gains = []
            for name, one in self._candidates.items():
                if one.place > 0:
                    gain = one.loss[one.place] - one.loss[one.place - 1]
                    cost = self._cost - self._saved(name, one.place - 1)
                    if gain > 0 and cost <= target + self._slack:
                        gains.append((gain, name))
            if not gains:
                return
            _, name = max(gains)
            self._move(name, self._candidates[name].place - 1)

    def _savings(self, name: str) -> list[float]:
        one = self._candidates[name]
        return self._costs.savings(name, self.widths, one.options[one.place :])

    def _saved(self, name: str, place: int) -> float:
        option = self._candidates[name].options[place]
        return self._costs.savings(name, self.widths, [option])[0]

    def _move(self, name: str, place: int) -> None:
        one = self._candidates[name]
        one.place = place
        self.widths[name] = one.options[place]
        self._cost = self._costs.total(self.widths)
        self._push(name)
        for other in self._costs.neighbours(name):
            if other in self._candidates:
                self._push(other, fresh=True)

    def _push(self, name: str, *, fresh: bool = False) -> None:
        """Offer the next jump of a group; ``fresh`` where its costs have changed."""
        one = self._candidates[name]
        if fresh:
            one.jumps = _jumps(self._savings(name), one.loss, one.place)
        while one.jumps and one.jumps[-1][1] <= one.place:
            one.jumps.pop()
        one.version += 1
        if one.jumps:
            share = one.place / len(one.options)  # between equals, the one that lost less so far
            heapq.heappush(self._heap, (one.jumps[-1][0], share, name, one.version))

    def _pop(self) -> tuple[str, int] | None:
        while self._heap:
            _, _, name, version = heapq.heappop(self._heap)
            one = self._candidates[name]
            if version == one.version:
                return name, one.jumps[-1][1]
        return None


def _jumps(saved: Sequence[float], loss: Sequence[float], place: int) -> list[tuple[float, int]]:
    """Edges of the lower convex hull of loss over cost saved, as (slope, end); the first is last.

    Example:
        >>> _jumps([0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 3.0, 9.0], 0)
        [(6.0, 3), (1.5, 2)]
    """
    hull = [(0.0, loss[place], place)]
    slopes: list[float] = []
    for i, x in enumerate(saved):
        y = loss[place + i]
        if x <= hull[-1][0]:
            continue
        slope = (y - hull[-1][1]) / (x - hull[-1][0])
        while slopes and slope < slopes[-1]:
            slopes.pop()
            hull.pop()
            slope = (y - hull[-1][1]) / (x - hull[-1][0])
        slopes.append(slope)
        hull.append((x, y, place + i))
    return [(slope, end) for slope, (_, _, end) in zip(slopes, hull[1:], strict=True)][::-1]
