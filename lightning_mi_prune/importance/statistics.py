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
from lightning_mi_prune.graph.groups import DependencyGroup, entry_positions

__all__ = [
    "UnitStatistics",
    "entries_of",
    "kept_entries",
    "kept_rows",
    "unit_statistics",
]


@dataclass(frozen=True)
class UnitStatistics:
    """Statistics of a group's units at one input of consumers; plain tensors in float64.

    Args:
        name: Name of the group.
        entries: Entries per unit ``g``.
        samples: Samples ``N`` of the moments.
        mean: Mean of the entries ``(d,)``.
        covariance: Covariance of the entries ``(d, d)``.
        readout: Linear map ``T (m, d)`` to the kept units above. Relevance only weights it:
            ``T = G^(1/2) W``.
        rows: The weight rows ``(units, w)`` that produce each unit, for criteria of weights.
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
        """Number of units now."""
        return self.covariance.shape[0] // self.entries

    def above(self) -> Tensor:
        """Covariance ``(m, m)`` of the layer above, a linear map of the entries."""
        return self.readout @ self.covariance @ self.readout.mT

    def joint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances ``(Sxx, Sxy, Syy)`` of the entries and of the layer above."""
        cross = self.covariance @ self.readout.mT
        return self.covariance, cross, self.readout @ cross

    def noise(self, ridge: float) -> float:
        """Noise variance on the layer above: ``ridge`` times its mean variance, 0 for no layer."""
        if not len(self.readout):  # no unit is kept above
            return 0.0
        return ridge * float(self.joint()[2].diagonal().mean())

    def check(self) -> None:
        """Refuse too few samples to score.

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
    """Statistics of a group's units at each input that consists of them.

    Args:
        group: The group.
        moments: Sums of activations, by key of the input (:attr:`DependencyGroup.inputs`).
        weights: Parameters of the model as it is now, by qualified name; only read.
        kept: Units kept of the groups above, in positions of the model as built.
        current: The plan the model carries now.
        groups: All groups that are being cut.
        relevance: How much the loss depends on each part of the layer above, by key; None weights
            all parts equally.

    Raises:
        PruningError: If there are no samples at an input.
    """
    width = len(current.kept[group.name])
    tensors = () if group.strided else group.tensors
    producers = [_by_unit(weights[s.tensor], width) for s in tensors if s.dim == 0]
    rows = torch.cat(producers, dim=1).double() if producers else torch.zeros(width, 0)
    found = []
    for key, consumers in group.unit_inputs.items():
        if int(moments[key].count) == 0:
            raise PruningError(
                f"No activations were collected at {key!r}, so its units cannot be scored. Run "
                "validation first."
            )
        mean, covariance = moments[key].stabilized()
        known = None if relevance is None else relevance.get(key)
        weight, above = _kept_weight(consumers, weights, kept, current, groups, covariance)
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


def _kept_weight(
    consumers: Sequence[str],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    like: Tensor,
) -> tuple[Tensor, Tensor]:
    """The kept rows of all consumers of one input, and the indices of those of the first one."""
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
    """Rows of a tensor that are kept, as it is now, or None where its rows are not cut."""
    for group in groups:
        if any(s.tensor == tensor and s.dim == 0 for s in group.tensors):
            return kept_entries(group, kept, current)
    return None


def kept_entries(
    group: DependencyGroup, kept: Mapping[str, tuple[int, ...]], current: PruningPlan
) -> Tensor:
    """Positions of the kept entries of a group, in the model as it is now.

    Args:
        group: The group; the kept units of :attr:`DependencyGroup.product_with` count too.
        kept: Units kept, in positions of the model as built.
        current: The plan the model carries now.
    """
    now = {}
    for name in {group.name, group.product_with} & set(current.kept):
        index = {unit: i for i, unit in enumerate(current.kept[name])}
        now[name] = [index[unit] for unit in kept[name]]
    return torch.tensor(entry_positions(group, now, current.widths), dtype=torch.long)


def entries_of(units: Tensor, entries: int) -> Tensor:
    """Positions of all entries of the given units."""
    return (units[:, None] * entries + torch.arange(entries, device=units.device)).flatten()


def _factor(matrix: Tensor) -> Tensor:
    """``F`` with ``F'F = G`` for a symmetric ``G`` that is positive up to rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    factor: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.mT
    return factor


def _by_unit(weight: Tensor, width: int) -> Tensor:
    """A weight with one row a unit; none for an empty group."""
    return weight.detach().reshape(width, weight.numel() // max(1, width))
