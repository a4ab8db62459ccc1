"""UnitStatistics: moments, weights above and relevance of a group, as one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_mi_prune.calibration.gradients import Relevance
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.errors import PruningError, counted, number
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.groups import DependencyGroup, entry_positions

__all__ = [
    "UnitStatistics",
    "entries_of",
    "kept_entries",
    "kept_rows",
    "unit_statistics",
]


@dataclass(frozen=True)
class UnitStatistics:
    """All that is known of the units of a group at one place; plain tensors in float64.

    Args:
        name: Name of the group.
        entries: Entries per unit ``g``.
        samples: Samples ``N`` behind the moments.
        mean: Mean of the entries ``(d,)``.
        covariance: Covariance of the entries ``(d, d)``.
        readout: Linear map ``T (m, d)`` to what is kept above. Weighting it by relevance,
            ``T = G^(1/2) W``, changes what counts as information, nothing else.
        rows: The weight rows ``(units, w)`` that make each unit, for criteria that look at them.
        weight: The weights ``W (rows, d)`` that read the entries; default the readout.
        taylor: First-order change of the loss without each unit ``(units,)``, if it is known.
    """

    name: str
    entries: int
    samples: int
    mean: Tensor
    covariance: Tensor
    readout: Tensor
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    weight: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    taylor: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.weight.numel():
            object.__setattr__(self, "weight", self.readout)

    @property
    def units(self) -> int:
        """Number of units on the group now."""
        return self.covariance.shape[0] // self.entries

    def above(self) -> Tensor:
        """Covariance ``(m, m)`` of the layer above, a linear read-out of the entries."""
        return self.readout @ self.covariance @ self.readout.mT

    def joint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances ``(Sxx, Sxy, Syy)`` of the entries and of the layer above."""
        cross = self.covariance @ self.readout.mT
        return self.covariance, cross, self.readout @ cross

    def noise(self, ridge: float) -> float:
        """Noise variance on the layer above: ``ridge`` times its mean variance, 0 for no layer."""
        if not len(self.readout):  # nothing was kept above
            return 0.0
        return ridge * float(self.joint()[2].diagonal().mean())

    def check(self) -> None:
        """Refuse evidence too thin to score.

        Raises:
            PruningError: If ``N <= m + g``: too few for the layer above and one unit.
        """
        dimension = self.readout.shape[0]
        if self.samples <= dimension + self.entries:
            raise PruningError(
                f"Only {counted(self.samples, 'sample')} at {self.name!r}, but scoring against "
                f"{counted(dimension, 'unit')} above needs more than "
                f"{number(dimension + self.entries)}, better {number(20 * dimension)}. Use a "
                "larger validation set, raise limit_val_batches or positions, or exclude the group."
            )


def unit_statistics(
    group: DependencyGroup,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    relevance: Mapping[str, Relevance] | None = None,
) -> list[UnitStatistics]:
    """What is known of a group at each place where it is read.

    Args:
        group: The group.
        moments: Sums at each place, by key (:attr:`DependencyGroup.inputs`).
        weights: Parameters of the model as it stands, by qualified name; only read.
        kept: What is kept on the groups above, in positions of the model as built.
        current: The plan the model carries now.
        groups: All groups that are being cut.
        relevance: Which part of what is above matters to the loss, by key; None: all of it alike.

    Raises:
        PruningError: If nothing was heard at a place.
    """
    width = len(current.kept[group.name])
    tensors = () if group.strided else group.tensors
    makers = [_by_unit(weights[s.tensor], width) for s in tensors if s.dim == 0]
    rows = torch.cat(makers, dim=1).double() if makers else torch.zeros(width, 0)
    found = []
    for key, consumers in group.unit_inputs.items():
        if int(moments[key].count) == 0:
            raise PruningError(f"Nothing was heard at {key!r}; run validation first.")
        mean, covariance = moments[key].stabilized()
        known = None if relevance is None else relevance.get(key)
        weight, above = _read(consumers, weights, kept, current, groups, covariance)
        readout = weight
        if known is not None:
            matrix = known.matrix.to(covariance)
            factor = _factor(matrix if known.over_units else matrix[above][:, above])
            readout = factor if known.over_units else factor @ weight
        found.append(
            UnitStatistics(
                name=group.name,
                entries=group.entries_at(current.widths),
                samples=int(moments[key].count),
                mean=mean,
                covariance=covariance,
                readout=readout,
                rows=rows,
                weight=weight,
                taylor=None if known is None else known.taylor,
            )
        )
    return found


def _read(
    consumers: Sequence[str],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """The kept rows of all consumers of one place, and which rows of the first consumer they are."""
    parts: list[Tensor] = []
    first = torch.empty(0, dtype=torch.long)
    for consumer in consumers:
        weight = weights[f"{consumer}.weight"].detach().to(like)
        rows = kept_rows(f"{consumer}.weight", kept, current, groups)
        rows = torch.arange(len(weight)) if rows is None else rows
        first = first if parts else rows.to(like.device)
        parts.append(weight[rows.to(weight.device)])
    return torch.cat(parts), first


def kept_rows(
    tensor: str,
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
) -> Tensor | None:
    """Rows of a tensor that survive, as it stands now, or None where its rows are not cut."""
    for group in groups:
        if any(s.tensor == tensor and s.dim == 0 for s in group.tensors):
            return kept_entries(group, kept, current)
    return None


def kept_entries(
    group: DependencyGroup, kept: Mapping[str, tuple[int, ...]], current: PruningPlan
) -> Tensor:
    """Positions of the entries of a group that survive, in the model as it stands.

    Args:
        group: The group; what is kept of a group that it crosses counts too.
        kept: What is kept, in positions of the model as built.
        current: The plan the model carries now.
    """
    now = {}
    for name in {group.name, group.product_with} & set(current.kept):
        place = {p: i for i, p in enumerate(current.kept[name])}
        now[name] = [place[p] for p in kept[name]]
    positions = entry_positions(group, now, current.widths)
    return torch.tensor(positions, dtype=torch.long)


def entries_of(units: Tensor, entries: int) -> Tensor:
    """Positions of all entries of the given units."""
    return (units[:, None] * entries + torch.arange(entries, device=units.device)).flatten()


def _factor(matrix: Tensor) -> Tensor:
    """``F`` with ``F'F = G`` for a symmetric ``G`` that is positive but for rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    factor: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.mT
    return factor


def _by_unit(weight: Tensor, width: int) -> Tensor:
    """A weight with a row for each unit; a group that is empty has none."""
    return weight.detach().reshape(width, weight.numel() // max(1, width))
