"""CHOOSE   scores + widths -> Selection, top-down; the fold-in comes from the same moments."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.criteria import Criterion, Evidence, MutualInformation, copies_kept
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.information import regression
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.plan import Plan

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
        folded: New weight ``(rows, kept columns)`` and bias of each reader, by tensor name; empty
            without fold-in.
        information: What each axis kept, by axis name.
    """

    plan: Plan
    folded: Mapping[str, Tensor]
    information: Mapping[str, Information]


def select(
    axes: Sequence[WidthAxis],
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    widths: Mapping[str, int],
    current: Plan,
    criterion: Criterion | None = None,
    *,
    fold_in: bool = True,
    ridge: float = 0.1,
) -> Selection:
    """Choose the survivors of every axis, from the top of the network down.

    Each axis is judged against the units that were kept above it. Cutting above does not change
    what is below, so one validation pass serves the whole sweep exactly.

    Args:
        axes: Axes to cut.
        moments: What was heard at each, by axis name.
        weights: Parameters of the model as it stands, by qualified name; only read.
        widths: Units to keep on each axis; never more than it has now.
        current: The plan the model carries now.
        criterion: Who judges; default conditional mutual information.
        fold_in: Whether the readers' weights absorb the dropped units by least squares.
        ridge: Noise of the information that is reported, as a share of the mean variance above.

    Raises:
        PruningError: If an axis was heard too little to score.
    """
    judge = MutualInformation() if criterion is None else criterion
    kept = dict(current.kept)
    folded: dict[str, Tensor] = {}
    information: dict[str, Information] = {}
    thin: list[str] = []
    copies: list[str] = []
    for axis in sorted(axes, key=lambda axis: -axis.level):
        now = current.kept[axis.name]
        evidence = _evidence(axis, moments[axis.name], weights, kept, current, axes)
        keep = min(widths[axis.name], len(now))
        stay = tuple(range(len(now)))
        if keep < len(now):
            evidence.check()
            wanted = max(20 * evidence.readout.shape[0], 2 * len(evidence.mean))
            thin += [axis.name] if evidence.samples < wanted else []
            stay = judge.rank(evidence, keep).keep(keep, len(now))
        kept[axis.name] = tuple(now[i] for i in stay)
        coefficients, left = _split(evidence, stay)
        information[axis.name] = _information(evidence, coefficients, left, ridge)
        topk = isinstance(judge, MutualInformation) and judge.selection == "topk"
        if topk and keep < len(now) and copies_kept(evidence, stay):
            copies.append(axis.name)
        if fold_in and keep < len(now):
            for reader in axis.readers:
                folded |= _fold(reader, weights, evidence, coefficients, left)
    _warn(thin, copies)
    return Selection(Plan(current.sizes, kept), folded, information)


def _evidence(
    axis: WidthAxis,
    moments: Moments,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: Plan,
    axes: Sequence[WidthAxis],
) -> Evidence:
    if int(moments.count) == 0:
        raise PruningError(f"Nothing was heard at {axis.name!r}; run validation first.")
    mean, covariance = moments.statistics()
    readouts = []
    for reader in axis.readers:
        weight = weights[f"{reader}.weight"].detach().to(covariance)
        rows = _kept_rows(f"{reader}.weight", kept, current, axes)
        readouts.append(weight if rows is None else weight[rows.to(weight.device)])
    width = len(current.kept[axis.name])
    makers = [
        weights[s.tensor].detach().to(covariance).reshape(width, -1)
        for s in axis.slices
        if s.dim == 0
    ]
    return Evidence(
        name=axis.name,
        entries=axis.entries,
        samples=int(moments.count),
        mean=mean,
        covariance=covariance,
        readout=torch.cat(readouts),
        rows=torch.cat(makers, dim=1) if makers else torch.zeros(width, 0),
    )


def _kept_rows(
    tensor: str,
    kept: Mapping[str, tuple[int, ...]],
    current: Plan,
    axes: Sequence[WidthAxis],
) -> Tensor | None:
    """Rows of a reader that survive the cut above it, or None where nothing above is cut."""
    for axis in axes:
        if any(s.tensor == tensor and s.dim == 0 for s in axis.slices):
            place = {p: i for i, p in enumerate(current.kept[axis.name])}
            units = torch.tensor([place[p] for p in kept[axis.name]])
            return _entries(units, axis.entries)
    return None


def _entries(units: Tensor, entries: int) -> Tensor:
    """Positions of all entries of the given units."""
    return (units[:, None] * entries + torch.arange(entries, device=units.device)).flatten()


def _split(evidence: Evidence, stay: tuple[int, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Regression of the dropped entries on the kept ones, and both index lists."""
    device = evidence.covariance.device
    units = torch.arange(evidence.units, device=device)
    mask = torch.zeros(evidence.units, dtype=torch.bool, device=device)
    mask[list(stay)] = True
    kept, dropped = (_entries(units[m], evidence.entries) for m in (mask, ~mask))
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
