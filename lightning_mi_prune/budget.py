"""ALLOT    Budget: how small the model must get; the same share of every axis that meets it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.costs import Costs, ParameterCosts
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.limits import Limits, step_of, widths_between

__all__ = ["Bounds", "Budget", "at_share", "sparsity_of", "uniform", "uniform_widths"]

Bounds = Mapping[str, tuple[int, int]]

_SLACK = 1e-12


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
        return float(getattr(self, self.kind)) if self.is_share else getattr(self, self.kind)

    @property
    def is_share(self) -> bool:
        """Whether the amount is a share, not a size."""
        return self.kind in ("sparsity", "keep_information")

    @property
    def measure(self) -> str:
        """What costs must count for this budget: ``"parameters"``, ``"MACs"`` or ``"ms"``."""
        return {"target_macs": "MACs", "target_latency_ms": "ms"}.get(self.kind, "parameters")

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}" if self.is_share else f"{self.kind}={self.amount}"

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


def sparsity_of(axes: Sequence[WidthAxis], widths: Mapping[str, int]) -> float:
    """Share of the prunable parameters that is gone, against the model as built."""
    return 1 - count_parameters(axes, widths) / count_parameters(axes)


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
    bounds = never_empty(axes, Limits(floor=floor).resolve(axes, multiple=multiple), multiple)
    reach = sparsity_of(axes, {name: least for name, (least, _) in bounds.items()})
    if sparsity > reach + _SLACK:
        raise PruningError(
            f"sparsity={sparsity:g} is out of reach: with floor={floor:g} and multiple={multiple} "
            f"at most {math.floor(reach * 1e4) / 1e4:.4f} of the prunable parameters can go. "
            "Lower the sparsity, the floor or the multiple, or include more axes."
        )
    target = (1 - sparsity) * count_parameters(axes)
    return uniform(axes, ParameterCosts(axes), target, bounds=bounds, multiple=multiple)


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

    def cost(share: float) -> float:
        return costs.total({axis.name: share * axis.size for axis in axes})

    kept = round(_bisect(lambda share: cost(share) <= fits), 12)
    fine, coarse = _by_choices(axes, multiple)
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
    widths = {a: widths_between(*bounds[a.name], step_of(a, multiple)) for a in axes}
    return sorted({w / a.size for a, found in widths.items() for w in found}, reverse=True)


def never_empty(axes: Sequence[WidthAxis], bounds: Bounds, multiple: int) -> Bounds:
    """The bounds, with one step at least on every axis that has one to keep."""
    return {
        a.name: (max(bounds[a.name][0], min(step_of(a, multiple), bounds[a.name][1])), most)
        for a, most in ((axis, bounds[axis.name][1]) for axis in axes)
    }


def _by_choices(
    axes: Sequence[WidthAxis], multiple: int
) -> tuple[list[WidthAxis], list[WidthAxis]]:
    """Axes with the most widths to choose from, and the others."""
    choices = {axis.name: -(-axis.size // step_of(axis, multiple)) for axis in axes}
    fine = [axis for axis in axes if choices[axis.name] == max(choices.values())]
    return fine, [axis for axis in axes if axis not in fine]


def _bisect(meets: Callable[[float], bool]) -> float:
    """The largest share from 0 to 1 that meets a condition that small ones meet."""
    low, high = 0.0, 1.0
    if meets(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
