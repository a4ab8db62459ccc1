"""Rank every group to its last unit, top-down, with the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from lightning_mi_prune.calibration.gradients import Relevance, relevance_of_weights
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.discovery.groups import DependencyGroup
from lightning_mi_prune.importance.criteria import Criterion, MutualInformation
from lightning_mi_prune.importance.head_rotation import HeadRotation, head_rotation
from lightning_mi_prune.importance.information import (
    JITTER,
    cholesky,
    conditional_covariance,
    mean_variance,
    shrink,
)
from lightning_mi_prune.importance.statistics import (
    UnitStatistics,
    entries_of,
    kept_rows,
    unit_statistics,
)

__all__ = [
    "RelevanceSource",
    "loss_curve",
    "rank_groups",
]

RelevanceSource = Mapping[str, Relevance] | Literal["weights"] | None


def rank_groups(
    groups: Sequence[DependencyGroup],
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    current: PruningPlan,
    criterion: Criterion | None = None,
    *,
    relevance: RelevanceSource = None,
    widths: Mapping[str, int] | None = None,
    crossed_kept: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Ranking]:
    """Put the units of every group in the order in which they may go, once for all budgets.

    Each group is judged against what is kept above it. Cutting above does not change what is below,
    so one validation pass serves the whole sweep exactly.

    Args:
        groups: Groups to rank.
        moments: What was heard at each place, by key.
        weights: Parameters of the model as it stands, by qualified name; only read.
        current: The plan the model carries now.
        criterion: Who judges; default conditional mutual information.
        relevance: Which part of the layer above matters: gathered from training steps
            (:func:`gradients.relevance_of`), ``"weights"`` for the weights that are kept above,
            or None for all of it alike.
        widths: Units expected to stay on each group, for what is kept above others; default all.
        crossed_kept: Units expected to stay on groups that are crossed by others, in positions of the
            model as built: heads are judged by the dimensions that stay, dimensions by the heads.

    Returns:
        A ranking of all present units by group name, in positions of the model as built.

    Raises:
        PruningError: If a group was heard too little to score.
    """
    judge = MutualInformation() if criterion is None else criterion
    kept = dict(current.kept)
    found: dict[str, Ranking] = {}
    for group in sorted(groups, key=lambda group: -group.level):
        known = _weigh(group, weights, kept, current, groups, relevance)
        consumer_sets = unit_statistics(group, moments, weights, kept, current, groups, known)
        now = current.kept[group.name]
        across = (crossed_kept or {}).get(group.product_with)
        if group.rotation is not None:
            heads = _places(across, current.kept.get(group.product_with), group.entries)
            order, loss, nats = _silent(len(now))
            if heads:
                new = head_rotation(group, consumer_sets[0], moments, weights, known)
                order, loss, nats = _directions(
                    new, consumer_sets[0], heads, getattr(judge, "ridge", 1.0)
                )
        else:
            if across is not None and len(across) < current.width(group.product_with):
                (dims,) = (other for other in groups if other.name == group.product_with)
                values = replace(consumer_sets[0], entries=len(now))
                new = head_rotation(dims, values, moments, weights, known)
                consumer_sets = [new.select(e, range(len(now)), len(across)) for e in consumer_sets]
            order, costs = _whole(judge, consumer_sets)
            loss, nats = loss_curve(consumer_sets, order), [*accumulate(costs)]
        found[group.name] = Ranking(
            order=tuple(now[i] for i in order),
            loss=tuple(float(f"{lost:.6g}") for lost in loss),
            nats=tuple(float(f"{lost:.6g}") for lost in nats),
        )
        if widths is not None:
            kept[group.name] = found[group.name].kept(widths[group.name])
    return found


def loss_curve(consumer_sets: Sequence[UnitStatistics], order: Sequence[int]) -> list[float]:
    """Expected rise of the loss after each unit of an order is gone, in nats an example.

    ``J = 1/2 tr(T Cov(x | x_kept) T')``, the least-squares residual of the layer above. In the
    basis of innovations (a Cholesky factor, the last survivors first) every unit adds its own
    share, so one factorisation gives the whole curve.

    Args:
        consumer_sets: What is known at each place; losses add up.
        order: All units, the first to go first.

    Example:
        >>> two = torch.eye(2, dtype=torch.float64)
        >>> readout = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> curve = loss_curve([UnitStatistics("ffn", 1, 100, torch.zeros(2), two, readout)], (1, 0))
        >>> [round(loss, 6) for loss in curve]
        [0.5, 2.5]
    """
    total = torch.zeros(len(order), dtype=torch.float64)
    backwards = torch.tensor(tuple(reversed(order)), dtype=torch.long)
    for evidence in consumer_sets:
        place = entries_of(backwards.to(evidence.mean.device), evidence.entries)
        covariance = evidence.covariance
        if evidence.samples < 2 * len(covariance):
            covariance = shrink(covariance, evidence.samples)
        jitter = JITTER**2 * mean_variance(covariance) * torch.eye(len(place)).to(covariance)
        innovations = evidence.readout[:, place] @ cholesky(covariance[place][:, place] + jitter)
        shares = innovations.square().sum(0).view(-1, evidence.entries).sum(1)
        total += shares.flip(0).cumsum(0).cpu() / 2
    return [float(loss) for loss in total]


def _whole(
    judge: Criterion, consumer_sets: Sequence[UnitStatistics]
) -> tuple[list[int], list[float]]:
    """The order of all units, whatever the criterion left out at its end."""
    found = judge.rank(consumer_sets, 0)
    rest = sorted(set(range(consumer_sets[0].units)) - set(found.order))
    costs = [*found.costs, *([found.costs[-1] if found.costs else 0.0] * len(rest))]
    return [*found.order, *rest], [max(0.0, cost) for cost in costs]


def _silent(units: int) -> tuple[list[int], list[float], list[float]]:
    """Order of the dimensions where no head is left to lose them: nothing is lost."""
    return [*reversed(range(units))], [0.0] * units, [0.0] * units


def _places(kept: tuple[int, ...] | None, present: tuple[int, ...] | None, count: int) -> list[int]:
    """Where units stand now: all of them where nothing is known of those that stay."""
    now = range(count) if present is None else present
    return [place for place, unit in enumerate(now) if kept is None or unit in set(kept)]


def _directions(
    new: HeadRotation, evidence: UnitStatistics, heads: Sequence[int], ridge: float
) -> tuple[list[int], list[float], list[float]]:
    """Order of the principal directions of heads, the loss and the nats as they go: last first."""
    apart = new.by_dimension(evidence, heads)
    order = [*reversed(range(new.value.shape[-1]))]
    noise = apart.noise(ridge) or 1.0  # where nothing changes above, nothing is told
    scores = new.scores[list(heads)].sum(0).flip(0).clamp_min(0)
    silent = (2 * scores / noise).log1p() / 2
    loss = torch.tensor(loss_curve([apart], order)) + scores.cumsum(0).cpu()
    nats = torch.tensor(_forgotten(apart, noise)) + silent.cumsum(0).cpu()
    lost, gone = ([*accumulate(map(float, x.clamp_min(0)), max)] for x in (loss, nats))
    return order, lost, gone


def _forgotten(evidence: UnitStatistics, noise: float) -> list[float]:
    """Nats of ``I(X; Y)`` that are lost after each unit is gone, the last unit first.

    Leading minors of one Cholesky factor tell of the first 1, 2, ... units.
    """
    covariance = evidence.covariance
    plain = covariance + JITTER * mean_variance(covariance) * torch.eye(len(covariance)).to(
        covariance
    )
    above = noise * torch.eye(len(evidence.readout)).to(plain)
    cross = evidence.readout @ plain
    given = conditional_covariance(plain, cross.mT, above + cross @ evidence.readout.mT)
    logs = [
        2 * cholesky((m + m.mT) / 2).diagonal().log().view(-1, evidence.entries).sum(1)
        for m in (plain, given)
    ]
    kept = torch.nn.functional.pad(((logs[0] - logs[1]) / 2).cumsum(0), (1, 0))
    return [float(kept[-1] - part) for part in kept.flip(0)[1:]]


def _weigh(
    group: DependencyGroup,
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    relevance: RelevanceSource,
) -> Mapping[str, Relevance] | None:
    if relevance != "weights":
        return relevance
    tensors = [f"{consumer}.weight" for consumer in group.above]
    rows = {name: kept_rows(name, kept, current, groups) for name in tensors}
    return relevance_of_weights(group, weights, rows)
