"""ALLOT    Budget: how small the model must get; the same share of every axis that meets it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.costs import Costs, ParameterCosts
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.limits import (
    Bounds,
    Limits,
    at_share,
    by_choices,
    never_empty,
    shares_of,
)
from lightning_mi_prune.plan import Ranking
from lightning_mi_prune.wording import counted, number

__all__ = [
    "NATS",
    "Budget",
    "asked_budget",
    "check_reach",
    "left_to_lose",
    "ranking_of",
    "sparsity_of",
    "uniform",
    "uniform_informed",
    "uniform_widths",
]

NATS = 1e-9  # information below this is rounding

_SLACK = 1e-12
_GRID = 10**6


@dataclass(frozen=True)
class Budget:
    """How small the model must get; exactly one of the five.

    Args:
        sparsity: Share of the prunable parameters to remove, against the model as built.
        target_parameters: Parameters of the whole module after the last cut.
        target_macs: Multiply-accumulates of one example after the last cut.
        target_latency_ms: Milliseconds of one forward pass of the benchmarked call.
        keep_information: Share of the information with the layers above, in nats and summed over
            the axes, that stays.

    Raises:
        PruningError: If none or several are given, or a value is out of range.

    Example:
        >>> budget = Budget(target_macs=2_000_000)
        >>> budget.kind, budget.amount, budget.measure
        ('target_macs', 2000000, 'MACs')
    """

    sparsity: float | None = None
    target_parameters: int | None = None
    target_macs: int | None = None
    target_latency_ms: float | None = None
    keep_information: float | None = None

    def __post_init__(self) -> None:
        names = [f.name for f in fields(self)]
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"{name}={getattr(self, name)!r}" for name in given)
            raise PruningError(
                f"A budget of {found or 'nothing'}; expected exactly one of {', '.join(names)}."
            )
        name, value = given[0], getattr(self, given[0])
        if name in ("sparsity", "keep_information"):
            if not _is_number(value) or not 0 < value < 1:
                raise PruningError(f"{name}={value!r}; expected a number above 0 and below 1.")
        elif name == "target_latency_ms":
            if not _is_number(value) or not 0 < value < math.inf:
                raise PruningError(f"{name}={value!r}; expected milliseconds above 0.")
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PruningError(f"{name}={value!r}; expected a whole number from 1.")

    @property
    def kind(self) -> str:
        """Name of the one that is given."""
        return next(f.name for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def amount(self) -> float:
        """Its value."""
        value: float = getattr(self, self.kind)
        return value

    @property
    def measure(self) -> str:
        """What costs must count for this budget: ``"parameters"``, ``"MACs"`` or ``"ms"``."""
        return {"target_macs": "MACs", "target_latency_ms": "ms"}.get(self.kind, "parameters")

    def __str__(self) -> str:
        return f"{self.kind}={self.amount}"

    def target(self, axes: Sequence[WidthAxis], costs: Costs, progress: float = 1.0) -> float:
        """Cost that must not be exceeded, ``progress`` of the way from the model as built.

        Args:
            axes: What may shrink.
            costs: What widths cost; must count :attr:`measure`.
            progress: Share of the way, above 0 and up to 1.

        Returns:
            The cost, in the unit of ``costs``; infinite for ``keep_information``.

        Raises:
            PruningError: If the costs count something else, or ``progress`` is out of range.
        """
        if costs.measure != self.measure:
            raise PruningError(
                f"{self} counts {self.measure}, but the costs given count {costs.measure}; "
                "give costs of the same kind."
            )
        if not _is_number(progress) or not 0 < progress <= 1:
            raise PruningError(f"progress={progress!r}; expected a share above 0 and up to 1.")
        built = costs.total({axis.name: axis.size for axis in axes})
        if self.kind == "keep_information":
            return math.inf
        if self.kind == "sparsity":
            prunable = built - costs.total({axis.name: 0 for axis in axes})
            return built - progress * self.amount * prunable
        return built - progress * (built - self.amount)


def asked_budget(
    sparsity: float | Budget | None = None,
    target_parameters: int | None = None,
    target_macs: int | None = None,
    target_latency_ms: float | None = None,
    keep_information: float | None = None,
) -> Budget:
    """The budget that options ask for: half of the prunable parameters go where none is given.

    Raises:
        PruningError: If several are given, or a value is out of range.

    Example:
        >>> asked_budget().amount, asked_budget(0.75).amount, asked_budget(target_macs=1000).kind
        (0.5, 0.75, 'target_macs')
    """
    targets = (target_parameters, target_macs, target_latency_ms, keep_information)
    none = all(target is None for target in targets)
    if isinstance(sparsity, Budget):
        if none:
            return sparsity
        raise PruningError(
            f"A budget of {sparsity} and another one beside it; expected one of the two."
        )
    return Budget(0.5 if sparsity is None and none else sparsity, *targets)


def sparsity_of(axes: Sequence[WidthAxis], widths: Mapping[str, int]) -> float:
    """Share of the prunable parameters that is gone, against the model as built."""
    return 1 - count_parameters(axes, widths) / count_parameters(axes)


def check_reach(
    axes: Sequence[WidthAxis],
    budget: Budget,
    *,
    costs: Costs,
    widths: Literal["global", "uniform"] = "global",
    current: Mapping[str, int] | None = None,
    limits: Limits | None = None,
    multiple: int = 8,
    progress: float = 1.0,
) -> None:
    """Refuse a budget that no ranking could meet, before anything is heard or trained.

    Raises:
        PruningError: If the fewest units that may stay still cost too much; it names what is
            reachable. Also if limits match nothing or contradict each other.
    """
    bounds = (limits or Limits()).resolve(axes, current, multiple=multiple)
    if widths == "uniform":
        bounds = never_empty(axes, bounds, multiple)
    target = budget.target(axes, costs, progress)
    fewest = costs.total({name: least for name, (least, _) in bounds.items()})
    built = costs.total({axis.name: axis.size for axis in axes})
    if fewest <= target + _SLACK * max(1.0, built):
        return
    if budget.kind == "sparsity":
        prunable = built - costs.total({axis.name: 0 for axis in axes})
        reach = (built - fewest) / prunable if prunable else 0.0
        best = f"at most {int(reach * 1e4) / 1e4:.4f} of the prunable parameters can go"
    else:
        best = (
            f"no fewer than {number(fewest)} {costs.measure} can be reached "
            f"(as built: {number(built)})"
        )
    raise PruningError(
        f"{budget} is out of reach: with the floors, pins and multiple={multiple} given, {best}. "
        "Loosen the budget, the limits or the multiple, or include more axes."
    )


def uniform_widths(
    axes: Sequence[WidthAxis],
    sparsity: float,
    *,
    multiple: int = 8,
    floor: float = 0.05,
) -> dict[str, int]:
    """Widths with the same share kept everywhere, that remove at least ``sparsity``.

    Args:
        axes: What may shrink.
        sparsity: Share of the prunable parameters to remove, against the model as built.
        multiple: Widths of axes with one entry a unit are multiples of this (where they were).
        floor: Smallest share of an axis that stays; at least one step always does.

    Raises:
        PruningError: If the floors do not let that much go.

    Example:
        >>> from lightning_mi_prune.axes import Slice
        >>> ffn = WidthAxis("ffn", "ffn", 64, 1, (Slice("w", 0, (64, 8)),), ("down",))
        >>> uniform_widths([ffn], 0.5)
        {'ffn': 32}
    """
    budget, limits, costs = Budget(sparsity=sparsity), Limits(floor=floor), ParameterCosts(axes)
    check_reach(axes, budget, costs=costs, widths="uniform", limits=limits, multiple=multiple)
    bounds = never_empty(axes, limits.resolve(axes, multiple=multiple), multiple)
    target = budget.target(axes, costs)
    return uniform(axes, costs, target, bounds=bounds, multiple=multiple)


def uniform(
    axes: Sequence[WidthAxis],
    costs: Costs,
    target: float,
    *,
    bounds: Bounds,
    multiple: int = 8,
) -> dict[str, int]:
    """The largest widths with the same share kept everywhere that cost no more than ``target``.

    Whole heads are few and neurons many: heads take the nearest whole number, and the neurons,
    in steps of ``multiple``, make up the difference, so the budget is met as closely as it can be.

    Args:
        axes: What may shrink.
        costs: What widths cost.
        target: Cost that must not be exceeded; the fewest units must cost no more.
        bounds: Fewest and most units of every axis.
        multiple: Widths of axes with one entry a unit are multiples of this.
    """
    fits = target + _SLACK * costs.total({axis.name: axis.size for axis in axes})

    def starts(gone: int) -> bool:
        share = 1 - gone / _GRID
        return costs.total({a.name: min(share * a.size, bounds[a.name][1]) for a in axes}) <= fits

    kept = 1 - bisect_left(range(_GRID), True, key=starts) / _GRID
    fine, coarse = by_choices(axes, multiple)
    shares = shares_of(fine, bounds, multiple)
    while True:
        rough = at_share(coarse, kept, bounds, multiple)

        def meets(share: float, rough: dict[str, int] = rough) -> bool:
            return costs.total(rough | at_share(fine, share, bounds, multiple, down=True)) <= fits

        place = bisect_left(shares, True, key=meets)
        if place < len(shares) or not coarse or kept <= 0:
            share = shares[min(place, len(shares) - 1)]
            found = rough | at_share(fine, share, bounds, multiple, down=True)
            return {axis.name: found[axis.name] for axis in axes}
        kept -= min(1 / axis.size for axis in coarse)


def uniform_informed(
    axes: Sequence[WidthAxis],
    rankings: Mapping[str, Ranking],
    need: float,
    bounds: Bounds,
    multiple: int,
) -> dict[str, int]:
    """The same share of every axis, the smallest that keeps the information."""
    for axis in axes:
        ranking_of(axis, rankings, bounds[axis.name][1])

    def spent(share: float) -> bool:
        widths = at_share(axes, share, bounds, multiple)
        return left_to_lose(axes, rankings, widths, need) < -NATS

    shares = shares_of(axes, bounds, multiple)
    place = max(0, bisect_left(shares, True, key=spent) - 1)
    return at_share(axes, shares[place], bounds, multiple)


def left_to_lose(
    axes: Sequence[WidthAxis],
    rankings: Mapping[str, Ranking],
    widths: Mapping[str, int],
    need: float,
) -> float:
    """Nats that may still go so that the share ``need`` stays; negative if too many are gone."""
    total = sum(ranking_of(axis, rankings, 0).lost(0)[1] for axis in axes)
    lost = sum(rankings[axis.name].lost(widths[axis.name])[1] for axis in axes)
    return (1 - need) * total - lost


def ranking_of(axis: WidthAxis, rankings: Mapping[str, Ranking], width: int) -> Ranking:
    """The ranking of an axis, if it covers ``width`` units; a PruningError otherwise."""
    if axis.name not in rankings:
        raise PruningError(f"{axis.name!r} has no ranking; rank every axis that competes.")
    ranking = rankings[axis.name]
    if len(ranking.order) < width:
        raise PruningError(
            f"The ranking of {axis.name!r} covers {number(len(ranking.order))} of "
            f"{counted(width, 'unit')}; expected all that are left. Rank the axis again."
        )
    return ranking


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
