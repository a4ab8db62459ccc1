"""Select the units that stay; their weights take over the dropped ones by least squares."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.errors import PruningWarning, counted
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.discovery.groups import DependencyGroup
from lightning_mi_prune.importance.criteria import Criterion, MutualInformation, copies_kept
from lightning_mi_prune.importance.head_rotation import HeadRotation, head_rotation
from lightning_mi_prune.importance.information import regression
from lightning_mi_prune.importance.ranking import RelevanceSource, rank_groups
from lightning_mi_prune.importance.statistics import (
    UnitStatistics,
    kept_entries,
    kept_rows,
    unit_statistics,
)
from lightning_mi_prune.surgery.parameters import RotationMaps

__all__ = [
    "Decision",
    "GroupInformation",
    "select_units",
]


@dataclass(frozen=True)
class GroupInformation:
    """What a group says about the layer above, in nats, through the noise of the ridge.

    Args:
        total: ``I(X; Y)`` before the cut.
        kept: ``I(X_kept; Y)`` after it.
    """

    total: float
    kept: float

    @property
    def fraction(self) -> float:
        """Share of the information that stays (1 where there was none)."""
        return self.kept / self.total if self.total > 0 else 1.0


@dataclass(frozen=True)
class Decision:
    """What to cut: a plan, the consumers' new weights, and what the cut costs.

    Args:
        plan: Survivors of every group, in original positions.
        compensated: New weights and biases of consumers, in the shape they have after the cut, by tensor
            name; empty without fold-in.
        information: What each group kept, by group name.
        rotated: New coordinates of heads that lose dimensions, by tensor; the new weights are in
            them already, an optimizer's state must follow.
    """

    plan: PruningPlan
    compensated: Mapping[str, Tensor]
    information: Mapping[str, GroupInformation]
    rotated: RotationMaps = field(default_factory=dict)

    @property
    def kept_share(self) -> float:
        """Share of the ranked groups' information that stays, in nats and summed over them.

        Against the model just before this cut; the shares of successive cuts multiply.
        """
        ranked = self.plan.rankings
        total = sum(ranking.lost(0)[1] for ranking in ranked.values())
        lost = sum(ranking.lost(self.plan.width(name))[1] for name, ranking in ranked.items())
        return 1 - lost / total if total > 0 else 1.0


def select_units(
    groups: Sequence[DependencyGroup],
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    widths: Mapping[str, int],
    current: PruningPlan,
    criterion: Criterion | None = None,
    *,
    relevance: RelevanceSource = None,
    rankings: Mapping[str, Ranking] | None = None,
    compensate: bool = True,
    ridge: float = 0.1,
) -> Decision:
    """Choose the survivors of every group, from the top of the network down.

    Each group is judged against the units that were kept above it. Cutting above does not change
    what is below, so one validation pass serves the whole sweep exactly.

    Args:
        groups: Groups to cut.
        moments: What was heard at each place, by key.
        weights: Parameters of the model as it stands, by qualified name; only read.
        widths: Units to keep on each group; never more than it has now.
        current: The plan the model carries now.
        criterion: Who judges; default conditional mutual information.
        relevance: Which part of the layer above matters, as for :func:`ranking.rank_groups`.
        rankings: Orders of all groups, if they are known already; nobody judges then.
        compensate: Whether the consumers' weights absorb the dropped units by least squares.
        ridge: Noise of the information that is reported, as a share of the mean variance above.

    Raises:
        PruningError: If a group was heard too little to score.
    """
    judge = MutualInformation() if criterion is None else criterion
    cut = [a for a in groups if widths[a.name] < len(current.kept[a.name])]
    if rankings is None:
        rankings = rank_groups(
            cut,
            moments,
            weights,
            current,
            judge,
            relevance=relevance,
            widths=widths,
        )
    kept = dict(current.kept)
    compensated: dict[str, Tensor] = {}
    information: dict[str, GroupInformation] = {}
    thin: list[str] = []
    copies: list[str] = []
    anew: dict[str, Tensor] = {}
    maps: dict[str, Mapping[int, Tensor]] = {}
    names = {group.name for group in groups}
    for group in sorted(groups, key=lambda group: (-group.level, group.strided)):
        if group in cut:
            kept[group.name] = rankings[group.name].kept(widths[group.name])
        if group.product_with in names and not group.strided:
            continue  # what crosses it is read with it
        subset = [a for a in groups if a.name in (group.name, group.product_with)]
        consumer_sets = unit_statistics(group, moments, weights, kept, current, groups)
        if group.rotation is not None and group in cut and len(consumer_sets[0].mean):
            new = _turn(group, moments, weights, kept, current, groups, relevance)
            anew |= new.weights(weights)
            maps |= {name: dims for name, dims in new.maps.items() if name in weights}
            weights, consumer_sets = {**weights, **anew}, [new.rotate(e) for e in consumer_sets]
        stay = kept_entries(group, kept, current)
        splits = [_split(evidence, stay) for evidence in consumer_sets]
        parts = [_information(e, *s, ridge) for e, s in zip(consumer_sets, splits, strict=True)]
        share = GroupInformation(
            total=sum(part.total for part in parts), kept=sum(part.kept for part in parts)
        )
        information |= {one.name: share for one in subset}
        gone = [one.name for one in subset if one in cut]
        if not gone:
            continue
        wanted = max(max(20 * len(e.readout), 2 * len(e.mean)) for e in consumer_sets)
        thin += gone if min(e.samples for e in consumer_sets) < wanted else []
        topk = isinstance(judge, MutualInformation) and judge.selection == "topk"
        if topk and any(copies_kept(evidence, stay.tolist()) for evidence in consumer_sets):
            copies.append(group.name)
        if compensate:
            for consumers, evidence, split in zip(
                group.unit_inputs.values(), consumer_sets, splits, strict=True
            ):
                for consumer in consumers:
                    compensated |= _fold(consumer, weights, evidence, *split)
    _warn(thin, copies)
    # Rows that go with a group below are known only at the end of the sweep.
    rows = {name: kept_rows(name, kept, current, groups) for name in compensated}
    final = {n: t if (r := rows[n]) is None else t[r.to(t.device)] for n, t in compensated.items()}
    final |= _cut_out({n: t for n, t in anew.items() if n not in final}, kept, current, groups)
    known = {name: ranking for name, ranking in rankings.items() if name in current.sizes}
    return Decision(PruningPlan(current.sizes, kept, known), final, information, maps)


def _turn(
    group: DependencyGroup,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    relevance: RelevanceSource,
) -> HeadRotation:
    """The principal directions of heads, as those that were ranked."""
    known = None if isinstance(relevance, str) else relevance
    (values,) = unit_statistics(group, moments, weights, kept, current, groups, known)
    found = head_rotation(group, values, moments, weights, known)
    if not found.rotation.rescaled:
        return found
    # Queries make up for attention that divides by the root of the size that a head has.
    factor = math.sqrt(len(kept[group.name]) / current.width(group.name))
    return replace(found, query=found.query * factor)


def _cut_out(
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
) -> dict[str, Tensor]:
    """What is kept of whole tensors."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        dims = {s.dim: group for group in groups for s in group.tensors if s.tensor == name}
        for dim, group in dims.items():
            index = kept_entries(group, kept, current).to(tensor.device)
            found[name] = found[name].index_select(dim, index)
    return found


def _split(evidence: UnitStatistics, stay: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Regression of the dropped entries on the kept ones, and both index lists."""
    device = evidence.covariance.device
    mask = torch.zeros(len(evidence.mean), dtype=torch.bool, device=device)
    mask[stay.to(device)] = True
    kept, dropped = (m.nonzero().flatten() for m in (mask, ~mask))
    found = regression(evidence.covariance, kept, dropped, evidence.samples)
    return found, (kept, dropped)


def _information(
    evidence: UnitStatistics, coefficients: Tensor, split: tuple[Tensor, Tensor], ridge: float
) -> GroupInformation:
    kept, dropped = split
    above = evidence.above()
    noise = (evidence.noise(ridge) or 1.0) * torch.eye(len(above)).to(above)
    block = evidence.covariance[dropped]
    mixed = coefficients @ block[:, kept].mT
    fitted = coefficients @ evidence.covariance[kept][:, kept] @ coefficients.mT
    unexplained = block[:, dropped] - mixed - mixed.mT + fitted
    lost = evidence.readout[:, dropped] @ unexplained @ evidence.readout[:, dropped].mT
    full, residual, floor = (torch.logdet(m) for m in (above + noise, lost + noise, noise))
    total = float(full - floor) / 2
    return GroupInformation(total=total, kept=min(total, max(0.0, float(full - residual) / 2)))


def _fold(
    consumer: str,
    weights: Mapping[str, Tensor],
    evidence: UnitStatistics,
    coefficients: Tensor,
    split: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """``W' = W_K + W_D M``, ``b' = b + W_D (mu_D - M mu_K)``; without a bias M is not centred."""
    kept, dropped = split
    stored = weights[f"{consumer}.weight"].detach()
    weight = stored.to(evidence.covariance)
    bias = weights.get(f"{consumer}.bias")
    if bias is None:
        raw = evidence.covariance + torch.outer(evidence.mean, evidence.mean)
        coefficients = regression(raw, kept, dropped, evidence.samples)
    new = weight[:, kept] + weight[:, dropped] @ coefficients
    compensated = {f"{consumer}.weight": new.to(stored)}
    if bias is not None:
        shift = evidence.mean[dropped] - coefficients @ evidence.mean[kept]
        compensated[f"{consumer}.bias"] = (
            bias.detach().to(weight) + weight[:, dropped] @ shift
        ).to(bias)
    return compensated


def _warn(thin: Sequence[str], copies: Sequence[str]) -> None:
    if thin:
        warnings.warn(
            f"{counted(len(thin), 'group', 'groups')}, {thin[0]!r} first, had fewer than 20 samples "
            "for each unit above, or 2 for each entry; scores are noisy. A larger validation "
            "set or more positions helps.",
            PruningWarning,
            stacklevel=3,
        )
    if copies:
        warnings.warn(
            f"top-k kept copies of the same unit on {counted(len(copies), 'group', 'groups')}, "
            f"{copies[0]!r} first; selection='conditional' keeps one of them.",
            PruningWarning,
            stacklevel=3,
        )
