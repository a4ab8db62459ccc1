"""CHOOSE   scores + widths -> Selection, top-down; the fold-in comes from the same moments."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.criteria import Criterion, MutualInformation, copies_kept
from lightning_mi_prune.errors import PruningWarning
from lightning_mi_prune.evidence import Evidence, entries_of, gather, kept_rows
from lightning_mi_prune.information import regression
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.plan import Plan, Ranking
from lightning_mi_prune.ranking import RelevanceSource, rank_axes

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
    """

    plan: Plan
    folded: Mapping[str, Tensor]
    information: Mapping[str, Information]

    @property
    def kept_share(self) -> float:
        """Share of the ranked axes' information that stays, in nats and summed over them."""
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
    for axis in sorted(axes, key=lambda axis: -axis.level):
        now = current.kept[axis.name]
        sites = gather(axis, moments, weights, kept, current, axes)
        stay = tuple(range(len(now)))
        if axis in cut:
            kept[axis.name] = rankings[axis.name].kept(widths[axis.name])
            place = {position: index for index, position in enumerate(now)}
            stay = tuple(place[position] for position in kept[axis.name])
            wanted = max(max(20 * len(e.readout), 2 * len(e.mean)) for e in sites)
            thin += [axis.name] if min(e.samples for e in sites) < wanted else []
        splits = [_split(evidence, stay) for evidence in sites]
        parts = [_information(e, *s, ridge) for e, s in zip(sites, splits, strict=True)]
        information[axis.name] = Information(
            total=sum(part.total for part in parts), kept=sum(part.kept for part in parts)
        )
        if axis not in cut:
            continue
        topk = isinstance(judge, MutualInformation) and judge.selection == "topk"
        if topk and any(copies_kept(evidence, stay) for evidence in sites):
            copies.append(axis.name)
        if fold_in:
            for readers, evidence, split in zip(axis.places.values(), sites, splits, strict=True):
                for reader in readers:
                    folded |= _fold(reader, weights, evidence, *split)
    _warn(thin, copies)
    # Rows that go with an axis below are known only at the end of the sweep.
    rows = {name: kept_rows(name, kept, current, axes) for name in folded}
    final = {n: t if (r := rows[n]) is None else t[r.to(t.device)] for n, t in folded.items()}
    known = {name: ranking for name, ranking in rankings.items() if name in current.sizes}
    return Selection(Plan(current.sizes, kept, known), final, information)


def _split(evidence: Evidence, stay: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Regression of the dropped entries on the kept ones, and both index lists."""
    device = evidence.covariance.device
    units = torch.arange(evidence.units, device=device)
    mask = torch.zeros(evidence.units, dtype=torch.bool, device=device)
    mask[list(stay)] = True
    kept, dropped = (entries_of(units[m], evidence.entries) for m in (mask, ~mask))
    found = regression(evidence.covariance, kept, dropped, evidence.samples)
    return found, (kept, dropped)


def _information(
    evidence: Evidence, coefficients: Tensor, split: tuple[Tensor, Tensor], ridge: float
) -> Information:
    kept, dropped = split
    above = evidence.above()
    noise = torch.eye(len(above), dtype=above.dtype, device=above.device) * max(
        evidence.noise(ridge), torch.finfo(above.dtype).tiny
    )
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
            f"{len(thin)} axes, {thin[0]!r} first, were heard with fewer than 20 samples for each "
            "unit above, or 2 for each entry; scores are noisy. A larger validation set or more "
            "positions helps.",
            PruningWarning,
            stacklevel=3,
        )
    if copies:
        warnings.warn(
            f"top-k kept copies of the same unit on {len(copies)} axes, {copies[0]!r} first; "
            "selection='conditional' keeps one of them.",
            PruningWarning,
            stacklevel=3,
        )
