"""Whether two halves of the calibration data put the units of a group in the same order."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted, shortened
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.untrusted import whole
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.importance.criteria import Criterion
from lightning_mi_prune.importance.ranking import RelevanceSource, rank_groups

__all__ = [
    "Agreement",
    "agreement_of_halves",
    "warn_of_chance",
]

_log = logging.getLogger(__name__)
_DEVIATIONS = 2  # above what chance gives, that an overlap has to be


@dataclass(frozen=True)
class Agreement:
    """How many of the units that stay two halves of the calibration data agree on.

    Args:
        units: Units that were ranked.
        kept: Units that stay.
        both: Units that stay by the order of either half.

    Raises:
        ValueError: If no unit or every unit stays, or ``both`` is more than that.

    Example:
        >>> found = Agreement(units=100, kept=25, both=20)
        >>> found.share, found.chance, found.is_chance
        (0.8, 0.25, False)
    """

    units: int
    kept: int
    both: int

    def __post_init__(self) -> None:
        whole(self.units, low=2)
        whole(self.kept, self.units - 1, 1)
        whole(self.both, self.kept)

    @property
    def share(self) -> float:
        """Share of the kept units that both halves keep."""
        return self.both / self.kept

    @property
    def chance(self) -> float:
        """The share that two orders drawn at random give on average."""
        return self.kept / self.units

    @property
    def limit(self) -> float:
        """Two standard deviations above :attr:`chance`, of two orders drawn at random."""
        chance, left = self.chance, (self.units - self.kept) / (self.units - 1)
        return chance + _DEVIATIONS * math.sqrt(chance * (1 - chance) * left / self.kept)

    @property
    def is_chance(self) -> bool:
        """Whether the overlap is no better than chance.

        Of a few units even full agreement may be chance; such groups are not counted.
        """
        return self.share <= self.limit < 1


class _Rest(Mapping[str, Moments]):
    """The sums that are in the whole and not in its half, each made when it is read."""

    def __init__(self, every: Mapping[str, Moments], half: Mapping[str, Moments]) -> None:
        self.every, self.half = every, half

    def __getitem__(self, key: str) -> Moments:
        return self.every[key].without(self.half[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self.every)

    def __len__(self) -> int:
        return len(self.every)


def agreement_of_halves(
    groups: Sequence[DependencyGroup],
    moments: Mapping[str, Moments],
    half: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    current: PruningPlan,
    criterion: Criterion,
    widths: Mapping[str, int],
    *,
    relevance: RelevanceSource = None,
    compensate: bool = True,
) -> dict[str, Agreement]:
    """Rank the units by each half of the calibration data, and compare which of them stay.

    Gradients are those of all training steps in both halves: what differs are the activations.
    Dimensions of heads are left out, as their order is that of their principal directions.

    Args:
        groups: Groups that may be cut.
        moments: Sums of all samples, by key of the input.
        half: Sums of one half of them.
        weights: Parameters of the model as it is now, by qualified name; only read.
        current: The plan the model carries now.
        criterion: The criterion.
        widths: Units to keep of each group.
        relevance: Which part of the layer above matters, as for :func:`ranking.rank_groups`.
        compensate: The same.

    Returns:
        The agreement on each group that is cut; nothing, and a line in the log, where a half is
        too small to be ranked.
    """
    compared = [
        group
        for group in groups
        if group.rotation is None and 0 < widths[group.name] < current.width(group.name)
    ]
    if not compared:
        return {}
    try:
        _check_halves(moments, half)
        orders = [
            rank_groups(
                *(groups, sums, weights, current, criterion),
                relevance=relevance,
                widths=widths,
                compensate=compensate,
            )
            for sums in (half, _Rest(moments, half))
        ]
    except PruningError as error:
        _log.warning("The stability of the order is not known: %s", error)
        return {}
    found = {}
    for group in compared:
        kept = widths[group.name]
        first, second = (set(order[group.name].kept(kept)) for order in orders)
        found[group.name] = Agreement(current.width(group.name), kept, len(first & second))
    return found


def _check_halves(moments: Mapping[str, Moments], half: Mapping[str, Moments]) -> None:
    """Refuse halves that are not two.

    Raises:
        PruningError: If a half of the sums has no samples, or belongs to other groups.
    """
    if set(half) != set(moments):
        raise PruningError("the halves belong to other groups; calibrate again.")
    for key, sums in half.items():
        if not 0 < int(sums.count) < int(moments[key].count):
            raise PruningError(
                f"all samples at {key!r} are of one half; expected at least two batches that run "
                "its layer."
            )


def warn_of_chance(found: Mapping[str, Agreement]) -> None:
    """Warn of groups on which two halves of the data agree no better than chance."""
    names = [name for name, agreement in found.items() if agreement.is_chance]
    if names:
        warnings.warn(
            f"Two halves of the calibration data agree no better than chance on the units that "
            f"stay in {counted(len(names), 'group')} of {len(found)}: {shortened(names)}. Their "
            "order is noise; calibrate on more data (positions, a larger validation set), or "
            "exclude them.",
            PruningWarning,
            stacklevel=2,
        )
