"""Budget: how small the model must get."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from lightning_mi_prune.allocation.classes import WidthClass, choices_of
from lightning_mi_prune.allocation.constraints import (
    Bounds,
    at_share,
    by_choices,
    never_empty,
    resolve_bounds,
    shares_of,
)
from lightning_mi_prune.allocation.costs import Costs
from lightning_mi_prune.core.errors import PruningError, counted, number
from lightning_mi_prune.core.options import Constraints, Widths, check_count, check_number
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.graph.groups import DependencyGroup, count_parameters

__all__ = [
    "NATS",
    "Budget",
    "budget_of",
    "check_reach",
    "nats_left",
    "ranking_of",
    "sparsity_of",
    "uniform",
    "uniform_by_information",
]

NATS = 1e-9  # information below this is rounding
_SLACK = 1e-12
_GRID = 10**6


@dataclass(frozen=True)
class Budget:
    """How small the model must get; exactly one of the five is given.

    Args:
        sparsity: Share of the prunable parameters to remove, against the model as built.
        target_parameters: Parameters of the whole module after the last cut.
        target_macs: Multiply-accumulates of one example after the last cut.
        target_latency_ms: Milliseconds of one forward pass of the benchmarked call.
        keep_information: Share that stays of the information with the layers above, in nats and
            summed over the groups.

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
        if name in ("target_parameters", "target_macs"):
            check_count(name, value, least=1)
        else:
            check_number(name, value, above=0, below=math.inf if name.endswith("ms") else 1)

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

    def target(
        self, groups: Sequence[DependencyGroup], costs: Costs, progress: float = 1.0
    ) -> float:
        """Largest cost allowed, in the unit of ``costs``; infinite for ``keep_information``.

        Args:
            groups: What may shrink.
            costs: What widths cost; must count :attr:`measure`.
            progress: How far to go from the model as built to the budget, above 0 and up to 1.

        Raises:
            PruningError: If the costs count something else, or ``progress`` is out of range.
        """
        if costs.measure != self.measure:
            raise PruningError(
                f"{self} counts {self.measure}, but the costs given count {costs.measure}; "
                "give costs of the same measure."
            )
        if not 0 < progress <= 1:
            raise PruningError(f"progress={progress!r}; expected a share above 0 and up to 1.")
        built = costs.total({group.name: group.size for group in groups})
        if self.kind == "keep_information":
            return math.inf
        if self.kind == "sparsity":
            prunable = built - costs.total({group.name: 0 for group in groups})
            return built - progress * self.amount * prunable
        return built - progress * (built - self.amount)


def budget_of(
    sparsity: float | Budget | None = None,
    target_parameters: int | None = None,
    target_macs: int | None = None,
    target_latency_ms: float | None = None,
    keep_information: float | None = None,
) -> Budget:
    """The budget given by options; half of the prunable parameters where none is given.

    Raises:
        PruningError: If several are given, or a value is out of range.

    Example:
        >>> budget_of().amount, budget_of(0.75).amount, budget_of(target_macs=1000).kind
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


def sparsity_of(groups: Sequence[DependencyGroup], widths: Mapping[str, int]) -> float:
    """Share of the prunable parameters that is removed, against the model as built."""
    return 1 - count_parameters(groups, widths) / count_parameters(groups)


def check_reach(
    groups: Sequence[DependencyGroup],
    budget: Budget,
    *,
    costs: Costs,
    widths: Widths = "global",
    classes: Sequence[WidthClass] = (),
    current: Mapping[str, int] | None = None,
    constraints: Constraints | None = None,
    progress: float = 1.0,
) -> dict[str, tuple[int, int]]:
    """Refuse a budget that no ranking could meet, before anything is collected or trained.

    Takes the arguments of :func:`allocate.allocate`.

    Returns:
        Fewest and most units of every group.

    Raises:
        PruningError: If the fewest units that may stay cost too much; the message names what can
            be reached. Also if constraints match nothing or contradict each other.
    """
    constraints = Constraints() if constraints is None else constraints
    bounds = resolve_bounds(constraints, groups, current)
    if widths == "uniform":
        bounds = never_empty(groups, bounds, constraints.multiple)
    target = budget.target(groups, costs, progress)
    smallest = {name: least for name, (least, _) in bounds.items()}
    if widths == "config":
        now = {group.name: group.size for group in groups} if current is None else current
        smallest = choices_of(classes, groups, bounds, now, constraints.multiple).fewest
    fewest = costs.total(smallest)
    built = costs.total({group.name: group.size for group in groups})
    if fewest <= target + _SLACK * max(1.0, built):
        return bounds
    if budget.kind == "sparsity":
        prunable = built - costs.total({group.name: 0 for group in groups})
        reach = (built - fewest) / prunable if prunable else 0.0
        best = f"at most {int(reach * 1e4) / 1e4:.4f} of the prunable parameters can go"
    else:
        best = (
            f"no fewer than {number(fewest)} {costs.measure} can be reached "
            f"(as built: {number(built)})"
        )
    limited = ""
    if widths == "config":
        fields = ", ".join(map(str, classes))
        limited = f", and widths='config', which can only change {fields}"
    raise PruningError(
        f"{budget} is out of reach: with the floors, pins and multiple={constraints.multiple} "
        f"given{limited}, {best}. Loosen the budget or the constraints, or include more groups."
    )


def uniform(
    groups: Sequence[DependencyGroup],
    costs: Costs,
    target: float,
    *,
    bounds: Bounds,
    multiple: int = 8,
) -> dict[str, int]:
    """The largest widths with the same share kept everywhere that cost no more than ``target``.

    Heads are few and neurons many: heads take the nearest whole number, and the neurons, in steps
    of ``multiple``, make up the difference, so the budget is met as closely as possible.

    Args:
        groups: What may shrink.
        costs: What widths cost.
        target: Largest cost allowed; the fewest units must cost no more.
        bounds: Fewest and most units of every group.
        multiple: Widths of groups with one entry per unit are multiples of this.
    """
    limit = target + _SLACK * costs.total({group.name: group.size for group in groups})

    def fits(removed: int) -> bool:
        """Whether real-valued widths, without steps and floors, meet the target."""
        share = 1 - removed / _GRID
        widths = {one.name: min(share * one.size, bounds[one.name][1]) for one in groups}
        return costs.total(widths) <= limit

    kept = 1 - bisect_left(range(_GRID), True, key=fits) / _GRID
    fine, coarse = by_choices(groups, multiple)
    shares = shares_of(fine, bounds, multiple)
    while True:
        rough = at_share(coarse, kept, bounds, multiple)

        def meets(share: float, rough: dict[str, int] = rough) -> bool:
            return costs.total(rough | at_share(fine, share, bounds, multiple, down=True)) <= limit

        place = bisect_left(shares, True, key=meets)
        if place < len(shares) or not coarse or kept <= 0:
            share = shares[min(place, len(shares) - 1)]
            found = rough | at_share(fine, share, bounds, multiple, down=True)
            return {group.name: found[group.name] for group in groups}
        kept -= min(1 / group.size for group in coarse)


def uniform_by_information(
    groups: Sequence[DependencyGroup],
    rankings: Mapping[str, Ranking],
    need: float,
    bounds: Bounds,
    multiple: int,
) -> dict[str, int]:
    """The same share of every group, the smallest that keeps the information."""
    for group in groups:
        ranking_of(group, rankings, bounds[group.name][1])

    def too_much(share: float) -> bool:
        widths = at_share(groups, share, bounds, multiple)
        return nats_left(groups, rankings, widths, need) < -NATS

    shares = shares_of(groups, bounds, multiple)
    place = max(0, bisect_left(shares, True, key=too_much) - 1)
    return at_share(groups, shares[place], bounds, multiple)


def nats_left(
    groups: Sequence[DependencyGroup],
    rankings: Mapping[str, Ranking],
    widths: Mapping[str, int],
    need: float,
) -> float:
    """Nats that may still be lost so that the share ``need`` stays; negative if too many are."""
    total = sum(ranking_of(group, rankings, 0).lost(0)[1] for group in groups)
    lost = sum(rankings[group.name].lost(widths[group.name])[1] for group in groups)
    return (1 - need) * total - lost


def ranking_of(group: DependencyGroup, rankings: Mapping[str, Ranking], width: int) -> Ranking:
    """The ranking of a group, if it covers ``width`` units; a PruningError otherwise."""
    if group.name not in rankings:
        raise PruningError(f"{group.name!r} has no ranking; rank all groups.")
    ranking = rankings[group.name]
    if len(ranking.order) < width:
        raise PruningError(
            f"The ranking of {group.name!r} covers {number(len(ranking.order))} of "
            f"{counted(width, 'unit')}; expected all that it has now. Rank the group again."
        )
    return ranking
