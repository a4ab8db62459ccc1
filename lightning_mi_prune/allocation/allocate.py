"""Allocate widths: what loses least for its cost goes first."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from lightning_mi_prune.allocation.budget import (
    NATS,
    Budget,
    check_reach,
    left_to_lose,
    ranking_of,
    uniform,
    uniform_informed,
)
from lightning_mi_prune.allocation.constraints import (
    Bounds,
    never_empty,
    resolve_bounds,
    step_of,
    widths_between,
)
from lightning_mi_prune.allocation.costs import Costs
from lightning_mi_prune.core.errors import PruningError, number
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.discovery.groups import DependencyGroup

__all__ = [
    "allocate",
    "allocate_by_loss",
]

_SLACK = 1e-12


def allocate(
    groups: Sequence[DependencyGroup],
    budget: Budget,
    *,
    costs: Costs,
    widths: Literal["global", "uniform"] = "global",
    rankings: Mapping[str, Ranking] | None = None,
    current: Mapping[str, int] | None = None,
    constraints: Constraints | None = None,
    progress: float = 1.0,
    kept: float = 1.0,
) -> dict[str, int]:
    """Width of every group that meets a budget; never more than there is now.

    Args:
        groups: What may shrink.
        budget: How small the model must get.
        costs: What widths cost, in the measure of the budget.
        widths: ``"global"`` lets all groups compete, ``"uniform"`` keeps the same share everywhere.
        rankings: What each group loses with every unit; needed for ``"global"`` and for
            ``keep_information``.
        current: Present width of each group (default: as built).
        constraints: Floors, caps and pins, and the step of widths.
        progress: How far to go from the model as built to the budget, above 0 and up to 1.
        kept: Share of the information that earlier cuts left, where the rankings begin after them.

    Raises:
        PruningError: If the budget is out of reach (with what is), or what it needs is missing.

    Example:
        >>> from lightning_mi_prune.discovery.groups import PrunableDim
        >>> from lightning_mi_prune.allocation.costs import ParameterCosts
        >>> groups = [
        ...     DependencyGroup(name, "heads", 2, 4, (PrunableDim(name, 0, (8, 8)),), ("down",))
        ...     for name in ("loud", "quiet")
        ... ]
        >>> losses = {"loud": (4.0, 8.0), "quiet": (1.0, 3.0)}
        >>> rankings = {name: Ranking((0, 1), loss, loss) for name, loss in losses.items()}
        >>> allocate(groups, Budget(sparsity=0.25), costs=ParameterCosts(groups), rankings=rankings)
        {'loud': 2, 'quiet': 1}
    """
    if widths not in ("global", "uniform"):
        raise PruningError(f"widths={widths!r}; expected 'global' or 'uniform'.")
    constraints = Constraints() if constraints is None else constraints
    multiple = constraints.multiple
    now = {group.name: group.size for group in groups} if current is None else current
    bounds = resolve_bounds(constraints, groups, now)
    if widths == "uniform":
        bounds = never_empty(groups, bounds, multiple)
    target = budget.target(groups, costs, progress)
    check_reach(
        groups,
        budget,
        costs=costs,
        widths=widths,
        current=now,
        constraints=constraints,
        progress=progress,
    )
    need = None
    if budget.kind == "keep_information":
        need = (1 - progress * (1 - budget.amount)) / kept
    if rankings is None and (widths == "global" or need is not None):
        raise PruningError(
            f"widths={widths!r} with {budget} needs rankings of the groups; rank them first."
        )
    known = rankings or {}
    if need is not None:
        ceiling = {name: most for name, (_, most) in bounds.items()}
        before, after = (left_to_lose(groups, known, w, need) for w in (now, ceiling))
        if before >= -NATS > after:
            raise PruningError(
                f"{budget} is out of reach: the caps and pins alone lose {number(-after)} nats "
                "more than may go. Raise them, or keep less information."
            )
    if widths == "global":
        return allocate_by_loss(
            groups, known, costs, target, bounds=bounds, multiple=multiple, need=need
        )
    if need is not None:
        return uniform_informed(groups, known, need, bounds, multiple)
    found = uniform(groups, costs, target, bounds=bounds, multiple=multiple)
    if progress < 1:
        # No step may go below the end: rounding heads up makes neurons go further down.
        last = budget.target(groups, costs)
        end = uniform(groups, costs, last, bounds=bounds, multiple=multiple)
        found = {name: max(width, end[name]) for name, width in found.items()}
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
    """Let all groups compete: again and again the jump with the least loss for its cost is taken.

    A jump spans one step or many, down to nothing where a group may vanish: losses of one group are
    not convex, and a whole sublayer can be cheaper to lose than half of it. The jump that meets
    the budget is the cheapest of any group that does, and steps that then fit come back.

    Args:
        groups: What may shrink.
        rankings: What each group loses with every unit; losses of several groups add up.
        costs: What widths cost.
        target: Cost that must not be exceeded.
        bounds: Fewest and most units of every group; the race starts at the most.
        multiple: Widths of groups with one entry a unit are multiples of this.
        need: Share of the summed information that must stay; the race then ends where the next
            jump would cost more.

    Raises:
        PruningError: If a ranking is missing or too short, or the target is out of reach.
    """
    race = _Allocator(costs, {name: most for name, (_, most) in bounds.items()})
    for group in groups:
        options = widths_between(*bounds[group.name], step_of(group, multiple))
        race.enter(group.name, options, ranking_of(group, rankings, options[0]))
    if need is None:
        race.run_to(target)
    else:
        race.run_while(left_to_lose(groups, rankings, race.widths, need))
    return {group.name: race.widths[group.name] for group in groups}


@dataclass
class _Candidate:
    """One group in the race: the widths it may take, from the most down, and what each loses."""

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
        self._lanes: dict[str, _Candidate] = {}
        self._heap: list[tuple[float, float, str, int]] = []

    def enter(self, name: str, options: list[int], ranking: Ranking) -> None:
        lost = [ranking.lost(width) for width in options]
        # Rounding may let a sum of losses dip; it cannot shrink.
        loss, nats = (list(accumulate(values, max)) for values in zip(*lost, strict=True))
        self._lanes[name] = _Candidate(options, loss, nats)
        self._push(name, fresh=True)

    def run_to(self, target: float) -> None:
        """Jump until the cost is met, by the cheapest last jump; then give back what fits."""
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
            ends = [end for lane in self._lanes if (end := self._last(lane, target)) is not None]
            self._move(*min(ends, key=lambda end: (end[0], end[1] != jump[0]))[1:])
        self._give_back(target)

    def run_while(self, left: float) -> None:
        """Jump while no more than ``left`` nats are lost in all; the last jump may be shorter."""
        while (jump := self._pop()) is not None:
            name, place = jump
            lane = self._lanes[name]
            while place > lane.place and lane.nats[place] - lane.nats[lane.place] > left + NATS:
                place -= 1
            left -= lane.nats[place] - lane.nats[lane.place]
            self._move(name, place)
            if place < jump[1]:
                return

    def _last(self, name: str, target: float) -> tuple[float, str, int] | None:
        """The smallest cut of one group that meets the target by itself, and its loss."""
        lane = self._lanes[name]
        saved = self._savings(name)
        wanted = self._cost - target - self._slack
        place = lane.place + bisect_left(saved, wanted)
        if place == len(lane.options):
            return None
        return lane.loss[place] - lane.loss[lane.place], name, place

    def _give_back(self, target: float) -> None:
        while True:
            gains = []
            for name, lane in self._lanes.items():
                if lane.place > 0:
                    gain = lane.loss[lane.place] - lane.loss[lane.place - 1]
                    cost = self._cost - self._saved(name, lane.place - 1)
                    if gain > 0 and cost <= target + self._slack:
                        gains.append((gain, name))
            if not gains:
                return
            _, name = max(gains)
            self._move(name, self._lanes[name].place - 1)

    def _savings(self, name: str) -> list[float]:
        lane = self._lanes[name]
        return self._costs.savings(name, self.widths, lane.options[lane.place :])

    def _saved(self, name: str, place: int) -> float:
        return self._costs.savings(name, self.widths, [self._lanes[name].options[place]])[0]

    def _move(self, name: str, place: int) -> None:
        lane = self._lanes[name]
        lane.place = place
        self.widths[name] = lane.options[place]
        self._cost = self._costs.total(self.widths)
        self._push(name)
        for other in self._costs.neighbours(name):
            if other in self._lanes:
                self._push(other, fresh=True)

    def _push(self, name: str, *, fresh: bool = False) -> None:
        """Offer the next jump of a group; ``fresh`` where its costs have changed."""
        lane = self._lanes[name]
        if fresh:
            lane.jumps = _jumps(self._savings(name), lane.loss, lane.place)
        while lane.jumps and lane.jumps[-1][1] <= lane.place:
            lane.jumps.pop()
        lane.version += 1
        if lane.jumps:
            gone = lane.place / len(lane.options)  # between equals, who has lost less so far
            heapq.heappush(self._heap, (lane.jumps[-1][0], gone, name, lane.version))

    def _pop(self) -> tuple[str, int] | None:
        while self._heap:
            _, _, name, version = heapq.heappop(self._heap)
            lane = self._lanes[name]
            if version == lane.version:
                return name, lane.jumps[-1][1]
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
