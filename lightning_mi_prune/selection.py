"""CHOOSE   scores + widths -> Selection, top-down; the fold-in comes from the same moments."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.criteria import Criterion, MutualInformation, copies_kept
from lightning_mi_prune.errors import PruningWarning
from lightning_mi_prune.evidence import Evidence, gather, kept_entries, kept_rows
from lightning_mi_prune.information import regression
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.plan import Plan, Ranking
from lightning_mi_prune.ranking import RelevanceSource, rank_axes
from lightning_mi_prune.turning import Turned, turned
from lightning_mi_prune.turns import TurnMaps
from lightning_mi_prune.wording import counted

__all__ = ["Information", "Selection", "select"]


@dataclass(frozen=True)
class Information:
    """What an axis says about the layer above, in nats, through the noise of the ridge.

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
class Selection:
    """What to cut: a plan, the readers' new weights, and what the cut costs.

    Args:
        plan: Survivors of every axis, in original positions.
        folded: New weights and biases of readers, in the shape they have after the cut, by tensor
            name; empty without fold-in.
        information: What each axis kept, by axis name.
        turned: New coordinates of heads that lose dimensions, by tensor; the new weights are in
            them already, an optimizer's state must follow.
    """

    plan: Plan
    folded: Mapping[str, Tensor]
    information: Mapping[str, Information]
    turned: TurnMaps = field(default_factory=dict)

    @property
    def kept_share(self) -> float:
        """Share of the ranked axes' information that stays, in nats and summed over them.

        Against the model just before this cut; the shares of successive cuts multiply.
        """
        ranked = self.plan.rankings
        total = sum(ranking.lost(0)[1] for ranking in ranked.values())
        lost = sum(ranking.lost(self.plan.width(name))[1] for name, ranking in ranked.items())
        return 1 - lost / total if total > 0 else 1.0


def select(
    axes: Sequence[WidthAxis],
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    widths: Mapping[str, int],
    current: Plan,
    criterion: Criterion | None = None,
    *,
    relevance: RelevanceSource = None,
    rankings: Mapping[str, Ranking] | None = None,
    fold_in: bool = True,
    ridge: float = 0.1,
) -> Selection:
    """Choose the survivors of every axis, from the top of the network down.

    Each axis is judged against the units that were kept above it. Cutting above does not change
    what is below, so one validation pass serves the whole sweep exactly.

    Args:
        axes: Axes to cut.
        moments: What was heard at each place, by key.
        weights: Parameters of the model as it stands, by qualified name; only read.
        widths: Units to keep on each axis; never more than it has now.
        current: The plan the model carries now.
        criterion: Who judges; default conditional mutual information.
        relevance: Which part of the layer above matters, as for :func:`ranking.rank_axes`.
        rankings: Orders of all axes, if they are known already; nobody judges then.
        fold_in: Whether the readers' weights absorb the dropped units by least squares.
        ridge: Noise of the information that is reported, as a share of the mean variance above.

    Raises:
        PruningError: If an axis was heard too little to score.
    """
    judge = MutualInformation() if criterion is None else criterion
    cut = [a for a in axes if widths[a.name] < len(current.kept[a.name])]
    if rankings is None:
        rankings = rank_axes(
            cut,
            moments,
            weights,
            current,
            judge,
            relevance=relevance,
            widths=widths,
        )
    kept = dict(current.kept)
    folded: dict[str, Tensor] = {}
    information: dict[str, Information] = {}
    thin: list[str] = []
    copies: list[str] = []
    anew: dict[str, Tensor] = {}
    maps: dict[str, Mapping[int, Tensor]] = {}
    names = {axis.name for axis in axes}
    for axis in sorted(axes, key=lambda axis: (-axis.level, axis.spread)):
        if axis in cut:
            kept[axis.name] = rankings[axis.name].kept(widths[axis.name])
        if axis.crossed in names and not axis.spread:
            continue  # what crosses it is read with it
        group = [a for a in axes if a.name in (axis.name, axis.crossed)]
        sites = gather(axis, moments, weights, kept, current, axes)
        if axis.turn is not None and axis in cut and len(sites[0].mean):
            new = _turn(axis, moments, weights, kept, current, axes, relevance)
            anew |= new.weights(weights)
            maps |= {name: dims for name, dims in new.maps.items() if name in weights}
            weights, sites = {**weights, **anew}, [new.seen(e) for e in sites]
        stay = kept_entries(axis, kept, current)
        splits = [_split(evidence, stay) for evidence in sites]
        parts = [_information(e, *s, ridge) for e, s in zip(sites, splits, strict=True)]
        share = Information(
            total=sum(part.total for part in parts), kept=sum(part.kept for part in parts)
        )
        information |= {one.name: share for one in group}
        gone = [one.name for one in group if one in cut]
        if not gone:
            continue
        wanted = max(max(20 * len(e.readout), 2 * len(e.mean)) for e in sites)
        thin += gone if min(e.samples for e in sites) < wanted else []
        topk = isinstance(judge, MutualInformation) and judge.selection == "topk"
        if topk and any(copies_kept(evidence, stay.tolist()) for evidence in sites):
            copies.append(axis.name)
        if fold_in:
            for readers, evidence, split in zip(axis.reads.values(), sites, splits, strict=True):
                for reader in readers:
                    folded |= _fold(reader, weights, evidence, *split)
    _warn(thin, copies)
    # Rows that go with an axis below are known only at the end of the sweep.
    rows = {name: kept_rows(name, kept, current, axes) for name in folded}
    final = {n: t if (r := rows[n]) is None else t[r.to(t.device)] for n, t in folded.items()}
    final |= _cut_out({n: t for n, t in anew.items() if n not in final}, kept, current, axes)
    known = {name: ranking for name, ranking in rankings.items() if name in current.sizes}
    return Selection(Plan(current.sizes, kept, known), final, information, maps)


def _turn(
    axis: WidthAxis,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: Plan,
    axes: Sequence[WidthAxis],
    relevance: RelevanceSource,
) -> Turned:
    """The principal directions of heads, as those that were ranked."""
    known = None if isinstance(relevance, str) else relevance
    (values,) = gather(axis, moments, weights, kept, current, axes, known)
    found = turned(axis, values, moments, weights, known)
    if not found.turn.rescaled:
        return found
    # Queries make up for attention that divides by the root of the size that a head has.
    factor = math.sqrt(len(kept[axis.name]) / current.width(axis.name))
    return replace(found, query=found.query * factor)


def _cut_out(
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: Plan,
    axes: Sequence[WidthAxis],
) -> dict[str, Tensor]:
    """What is kept of whole tensors."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        dims = {s.dim: axis for axis in axes for s in axis.slices if s.tensor == name}
        for dim, axis in dims.items():
            index = kept_entries(axis, kept, current).to(tensor.device)
            found[name] = found[name].index_select(dim, index)
    return found


def _split(evidence: Evidence, stay: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Regression of the dropped entries on the kept ones, and both index lists."""
    device = evidence.covariance.device
    mask = torch.zeros(len(evidence.mean), dtype=torch.bool, device=device)
    mask[stay.to(device)] = True
    kept, dropped = (m.nonzero().flatten() for m in (mask, ~mask))
    found = regression(evidence.covariance, kept, dropped, evidence.samples)
    return found, (kept, dropped)


def _information(
    evidence: Evidence, coefficients: Tensor, split: tuple[Tensor, Tensor], ridge: float
) -> Information:
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
    return Information(total=total, kept=min(total, max(0.0, float(full - residual) / 2)))


def _fold(
    reader: str,
    weights: Mapping[str, Tensor],
    evidence: Evidence,
    coefficients: Tensor,
    split: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """``W' = W_K + W_D M``, ``b' = b + W_D (mu_D - M mu_K)``; without a bias M is not centred."""
    kept, dropped = split
    stored = weights[f"{reader}.weight"].detach()
    weight = stored.to(evidence.covariance)
    bias = weights.get(f"{reader}.bias")
    if bias is None:
        raw = evidence.covariance + torch.outer(evidence.mean, evidence.mean)
        coefficients = regression(raw, kept, dropped, evidence.samples)
    new = weight[:, kept] + weight[:, dropped] @ coefficients
    folded = {f"{reader}.weight": new.to(stored)}
    if bias is not None:
        shift = evidence.mean[dropped] - coefficients @ evidence.mean[kept]
        folded[f"{reader}.bias"] = (bias.detach().to(weight) + weight[:, dropped] @ shift).to(bias)
    return folded


def _warn(thin: Sequence[str], copies: Sequence[str]) -> None:
    if thin:
        warnings.warn(
            f"{counted(len(thin), 'axis', 'axes')}, {thin[0]!r} first, had fewer than 20 samples "
            "for each unit above, or 2 for each entry; scores are noisy. A larger validation "
            "set or more positions helps.",
            PruningWarning,
            stacklevel=3,
        )
    if copies:
        warnings.warn(
            f"top-k kept copies of the same unit on {counted(len(copies), 'axis', 'axes')}, "
            f"{copies[0]!r} first; selection='conditional' keeps one of them.",
            PruningWarning,
            stacklevel=3,
        )
