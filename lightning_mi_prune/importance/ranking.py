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
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.inputs import weight_name
from lightning_mi_prune.importance.criteria import Criterion, MutualInformation
from lightning_mi_prune.importance.head_rotation import HeadRotation, head_rotation
from lightning_mi_prune.importance.information import (
    JITTER,
    cholesky,
    conditional_covariance,
    mean_variance,
    shrink,
    times_lower,
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
    "uncompensated_loss_curve",
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
    compensate: bool = True,
) -> dict[str, Ranking]:
    """Rank the units of every group once for all budgets.

    Each group is scored against what is kept above it. Cutting above does not change what is below,
    so one validation pass is enough, and exact, for all groups.

    Args:
        groups: Groups to rank.
        moments: Sums of activations, by key of the input.
        weights: Parameters of the model as it is now, by qualified name; only read.
        current: The plan the model carries now.
        criterion: The criterion; default conditional mutual information.
        relevance: How much the loss depends on each part of the layer above: collected from
            training steps (:func:`gradients.relevance_of`), ``"weights"`` for the weights that are
            kept above, or None for all parts equally.
        widths: Units expected to stay of each group, for what is kept above others; default all.
        crossed_kept: Units expected to stay of the :attr:`DependencyGroup.partners` of others, in
            positions of the model as built: heads are scored by the dimensions that stay,
            dimensions by the heads.
        compensate: Whether weights that stay, and biases, make up for what is removed.

    Returns:
        A ranking of all present units by group name, in positions of the model as built.

    Raises:
        PruningError: If a group has not enough samples to score.
    """
    criterion = MutualInformation() if criterion is None else criterion
    kept, crossed = dict(current.kept), crossed_kept or {}
    found: dict[str, Ranking] = {}
    for group in sorted(groups, key=lambda group: -group.level):
        known: Mapping[str, Relevance] | None
        if relevance == "weights":
            known = relevance_of_weights(group, weights, _kept_above(group, kept, current, groups))
        else:
            known = relevance
        across = {name: crossed[name] for name, _ in group.partners if name in crossed}
        rotating = [other for other in groups if other.name in across and other.rotation]
        plain = across if not rotating and group.rotation is None else {}
        statistics = unit_statistics(
            *(group, moments, weights, kept, current, groups, known, plain), biases=compensate
        )
        now = current.kept[group.name]
        if group.rotation is not None:
            ((partner, count),) = group.partners
            heads = _positions(across.get(partner), current.kept.get(partner), count)
            order, loss, nats = [*reversed(range(len(now)))], [0.0] * len(now), [0.0] * len(now)
            if heads:  # else no head is left that could lose dimensions
                new = head_rotation(group, statistics[0], moments, weights, known)
                ridge = getattr(criterion, "ridge", 1.0)
                loss, nats = _curves_of_directions(new, statistics[0], heads, ridge)
        else:
            rotated = {other.rotation.consumer: other for other in rotating if other.rotation}
            for place, consumers in enumerate(group.unit_inputs.values()):
                dims = next((rotated[path] for path in consumers if path in rotated), None)
                if dims is None or len(across[dims.name]) >= current.width(dims.name):
                    continue
                values = replace(statistics[place], entries=len(now))
                new = head_rotation(dims, values, moments, weights, known)
                size = len(across[dims.name])
                statistics[place] = new.select(statistics[place], range(len(now)), size)
            order, costs = _whole_order(criterion, statistics)
            curve = loss_curve if compensate else uncompensated_loss_curve
            loss, nats = curve(statistics, order), [*accumulate(costs)]
        found[group.name] = Ranking(
            order=tuple(now[i] for i in order),
            loss=tuple(float(f"{lost:.6g}") for lost in loss),
            nats=tuple(float(f"{lost:.6g}") for lost in nats),
        )
        if widths is not None:
            kept[group.name] = found[group.name].kept(widths[group.name])
    return found


def loss_curve(statistics: Sequence[UnitStatistics], order: Sequence[int]) -> list[float]:
    """Expected rise of the loss after each unit of an order is removed, in nats an example.

    ``J = 1/2 tr(T Cov(x | x_kept) T')``, the least-squares residual of the layer above. In the
    basis of a Cholesky factor, with the units in reverse order, every unit adds its own share, so
    one factorization gives the whole curve.

    Args:
        statistics: Statistics at each input; losses add up.
        order: All units, the first to be removed first.

    Example:
        >>> two = torch.eye(2, dtype=torch.float64)
        >>> readout = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> statistics = UnitStatistics("ffn", 1, 100, torch.zeros(2), two, readout)
        >>> [round(loss, 6) for loss in loss_curve([statistics], (1, 0))]
        [0.5, 2.5]
    """
    total = torch.zeros(len(order), dtype=torch.float64)
    backwards = torch.tensor(tuple(reversed(order)), dtype=torch.long)
    for each in statistics:
        index = entries_of(backwards.to(each.mean.device), each.entries)
        covariance = each.covariance
        if each.samples < 2 * len(covariance):
            covariance = shrink(covariance, each.samples)
        jitter = JITTER**2 * mean_variance(covariance)
        covariance = covariance[index[:, None], index]
        covariance.diagonal().add_(jitter)
        factor = times_lower(each.readout[:, index], cholesky(covariance))
        shares = factor.square().sum(0).view(-1, each.entries).sum(1)
        total += shares.flip(0).cumsum(0).cpu() / 2
    return [float(loss) for loss in total]


def uncompensated_loss_curve(
    statistics: Sequence[UnitStatistics], order: Sequence[int]
) -> list[float]:
    """As :func:`loss_curve`, where the weights that stay do not change.

    ``J = 1/2 tr(T_D E[x_D x_D'] T_D')`` of the removed units ``D``: what they gave to the layer
    above is gone. Removing one may undo what the removal of another did, so it is the largest ``J``
    so far.

    Args:
        statistics: Statistics about zero at each input; losses add up.
        order: All units, the first to be removed first.

    Example:
        >>> copies = torch.ones(2, 2, dtype=torch.float64)
        >>> readout = torch.ones(1, 2, dtype=torch.float64)
        >>> statistics = UnitStatistics("ffn", 1, 100, torch.zeros(2), copies, readout)
        >>> uncompensated_loss_curve([statistics], (1, 0))
        [0.5, 2.0]
    """
    total = torch.zeros(len(order), dtype=torch.float64)
    for each in statistics:
        products = each.gram().mul_(each.covariance)
        units, entries = each.units, each.entries
        products = products.view(units, entries, units, entries).sum((1, 3))
        index = torch.tensor(tuple(order), dtype=torch.long, device=products.device)
        products = products[index[:, None], index]
        total += (products.tril().sum(1) - products.diagonal() / 2).cumsum(0).cpu()
    return [*accumulate(map(float, total.clamp_min(0)), max)]


def _whole_order(
    criterion: Criterion, statistics: Sequence[UnitStatistics]
) -> tuple[list[int], list[float]]:
    """Order and costs of all units, also of those that the criterion left out at the end."""
    found = criterion.rank(statistics, 0)
    rest = sorted(set(range(statistics[0].units)) - set(found.order))
    costs = [*found.costs, *([found.costs[-1] if found.costs else 0.0] * len(rest))]
    return [*found.order, *rest], [max(0.0, cost) for cost in costs]


def _kept_above(
    group: DependencyGroup,
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
) -> dict[tuple[str, int], Tensor | None]:
    """Outputs that are kept of all weights above a group, by tensor and dimension."""
    names = {s.tensor for other in groups for s in other.tensors}
    return {
        (name, dim): kept_rows(name, kept, current, groups, dim)
        for name in (weight_name(consumer, names) for consumer in group.above)
        for dim in (0, 1, 2)
    }


def _positions(
    kept: tuple[int, ...] | None, present: tuple[int, ...] | None, count: int
) -> list[int]:
    """Present positions of the kept units; of all units where ``kept`` is None."""
    now = range(count) if present is None else present
    return [i for i, unit in enumerate(now) if kept is None or unit in set(kept)]


def _curves_of_directions(
    new: HeadRotation, statistics: UnitStatistics, heads: Sequence[int], ridge: float
) -> tuple[list[float], list[float]]:
    """Loss and nats as the principal directions of heads are removed, from the last one."""
    by_dimension = new.by_dimension(statistics, heads)
    noise = by_dimension.noise(ridge) or 1.0  # a constant layer above has no information
    scores = new.scores[list(heads)].sum(0).flip(0).clamp_min(0)
    order = [*reversed(range(len(scores)))]
    loss = torch.tensor(loss_curve([by_dimension], order)) + scores.cumsum(0).cpu()
    score_nats = (2 * scores / noise).log1p() / 2
    nats = torch.tensor(_nats_lost(by_dimension, noise)) + score_nats.cumsum(0).cpu()
    # Neither falls as more is removed, but rounding could make it.
    losses, lost = ([*accumulate(map(float, x.clamp_min(0)), max)] for x in (loss, nats))
    return losses, lost


def _nats_lost(statistics: UnitStatistics, noise: float) -> list[float]:
    """Nats of ``I(X; Y)`` that are lost after each unit is removed, the last unit first.

    The leading minors of one Cholesky factor give the information of the first 1, 2, ... units.
    """
    covariance, readout = statistics.covariance, statistics.readout
    eye = torch.eye(len(covariance)).to(covariance)
    plain = covariance + JITTER * mean_variance(covariance) * eye
    cross = readout @ plain
    above = noise * torch.eye(len(readout)).to(plain) + cross @ readout.mT
    given = conditional_covariance(plain, cross.mT, above)
    logs = [
        2 * cholesky((m + m.mT) / 2).diagonal().log().view(-1, statistics.entries).sum(1)
        for m in (plain, given)
    ]
    kept = torch.nn.functional.pad(((logs[0] - logs[1]) / 2).cumsum(0), (1, 0))
    return [float(kept[-1] - part) for part in kept.flip(0)[1:]]
