"""Select the units that stay, and compensate their consumers for the dropped ones."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.consumers import stacked_weight, stored_weight
from lightning_mi_prune.core.errors import PruningWarning, counted
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.core.spilling import spilled
from lightning_mi_prune.core.untrusted import number
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.inputs import ConsumerInput, kept_now, widths_now
from lightning_mi_prune.importance.criteria import Criterion, MutualInformation, copies_kept
from lightning_mi_prune.importance.head_rotation import HeadRotation, head_rotation
from lightning_mi_prune.importance.information import regression
from lightning_mi_prune.importance.ranking import RelevanceSource, rank_groups
from lightning_mi_prune.importance.stability import Agreement
from lightning_mi_prune.importance.statistics import (
    UnitStatistics,
    input_statistics,
    kept_rows,
    unit_statistics,
)
from lightning_mi_prune.surgery.parameters import RotationMaps

__all__ = [
    "Decision",
    "GroupInformation",
    "StandIns",
    "select_units",
]

_TOGETHER = 256  # removed units whose stand-ins are found at once


@dataclass(frozen=True)
class GroupInformation:
    """Mutual information, in nats, between the units of a group and the layer above.

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
class StandIns:
    """What the units that stay know of each unit of a group that is removed.

    Args:
        units: Removed units, as numbered when built.
        shares: Share of the variance of each that the kept units predict; what they do not is lost.
        best: The kept unit of the group that predicts most of it; None where all are removed.

    Raises:
        ValueError: If the three differ in length, or a share is none.
    """

    units: tuple[int, ...]
    shares: tuple[float, ...]
    best: tuple[int | None, ...]

    def __post_init__(self) -> None:
        if not len(self.units) == len(self.shares) == len(self.best):
            raise ValueError(f"{len(self.units)} units with {len(self.shares)} shares")
        for share in self.shares:
            number(share, 0, 1)


@dataclass(frozen=True)
class Decision:
    """What to cut: a plan, the consumers' new weights, and what the cut costs.

    Args:
        plan: Units of every group that stay, numbered as built.
        compensated: New weights and biases of consumers by tensor name, in the shape they have
            after the cut; empty without compensation.
        information: What each group kept, by group name.
        rotated: New coordinates of heads that lose dimensions, by tensor. The new weights are in
            them already; the state of an optimizer must follow.
        agreement: How far two halves of the calibration data agree, by group, where it was asked.
        stand_ins: What makes up for removed units, by group; empty without compensation.
    """

    plan: PruningPlan
    compensated: Mapping[str, Tensor]
    information: Mapping[str, GroupInformation]
    rotated: RotationMaps = field(default_factory=dict)
    agreement: Mapping[str, Agreement] = field(default_factory=dict)
    stand_ins: Mapping[str, StandIns] = field(default_factory=dict)

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
    """Choose the units of every group that stay, from the top of the network down.

    Each group is scored against the units that are kept above it. Cutting above does not change
    the activations below, so one validation pass serves all groups exactly.

    Args:
        groups: Groups to cut.
        moments: Moments of the consumers' inputs, by key.
        weights: Parameters of the model as it stands, by qualified name; only read.
        widths: Units to keep of each group; never more than it has now.
        current: The plan the model carries now.
        criterion: Scores the units; default conditional mutual information.
        relevance: Which part of the layer above matters, as for :func:`ranking.rank_groups`.
        rankings: Elimination orders of all groups; computed where they are not given.
        compensate: Whether the consumers' weights absorb the dropped units by least squares.
        ridge: Noise of the information that is reported, as a share of the mean variance above.

    Raises:
        PruningError: If a group has too few samples to score.
    """
    criterion = MutualInformation() if criterion is None else criterion
    cut = [group for group in groups if widths[group.name] < len(current.kept[group.name])]
    if rankings is None:
        rankings = rank_groups(
            *(cut, moments, weights, current, criterion),
            relevance=relevance,
            widths=widths,
            compensate=compensate,
        )
    topk = isinstance(criterion, MutualInformation) and criterion.selection == "topk"
    kept = dict(current.kept)
    compensated: dict[str, Tensor] = {}
    others: dict[str, tuple[int, ...]] = {}
    information: dict[str, GroupInformation] = {}
    few_samples: list[str] = []
    copies: list[str] = []
    rotated: dict[str, Tensor] = {}
    maps: dict[str, Mapping[int, Tensor]] = {}
    fits: dict[str, _Fit] = {}
    stand_ins: dict[str, StandIns] = {}
    uses = Counter(
        ConsumerInput.of(group, consumers).consumer
        for group in groups
        for consumers in group.unit_inputs.values()
    )
    for group, complete in _completed_inputs(groups):
        if group in cut:
            kept[group.name] = rankings[group.name].kept(widths[group.name])
        for one in complete:
            mine: list[_Fit] = []
            for key, consumers in one.unit_inputs.items():
                given = ConsumerInput.of(one, consumers)
                if given.consumer not in fits:
                    values = input_statistics(
                        *(one, key, moments, weights, kept, current, groups), biases=compensate
                    )
                    if one.rotation is not None and one in cut and len(values.mean):
                        new = _rotation(
                            *(one, moments, weights, kept, current, groups, relevance),
                            biases=compensate,
                        )
                        rotated |= new.weights(weights)
                        maps |= {name: dims for name, dims in new.maps.items() if name in weights}
                        weights, values = {**weights, **rotated}, new.rotate(values)
                    fits[given.consumer] = _Fit.of(one, given, values, kept, current)
                mine.append(fits[given.consumer])
                uses[given.consumer] -= 1
                if not uses[given.consumer]:  # it holds matrices of the size of the moments
                    del fits[given.consumer]
                if compensate and len(mine[-1].dropped):
                    for consumer in consumers:
                        if given.weight(consumer).tensor not in compensated:
                            found = mine[-1].compensate(consumer, weights)
                            compensated |= {name: spilled(new) for name, new in found.items()}
                            others |= {name: mine[-1].others(consumer, name) for name in found}
            parts = [fit.information(ridge) for fit in mine]
            information[one.name] = GroupInformation(
                total=sum(part.total for part in parts), kept=sum(part.kept for part in parts)
            )
            if one not in cut:
                continue
            if compensate and one.rotation is None:
                stand_ins[one.name] = _stand_ins(one, mine, kept, current)
            if any(fit.has_few_samples for fit in mine):
                few_samples.append(one.name)
            if topk and any(fit.copies(one, kept, current) for fit in mine):
                copies.append(one.name)
    _warn(few_samples, copies)
    # Which outputs a group below removes is known only now.
    final = {}
    for name, tensor in compensated.items():
        smaller = _cut_tensor(name, tensor, kept, current, groups, others[name])
        final[name] = smaller if smaller is tensor else spilled(smaller)
    for name, tensor in rotated.items():
        if name not in final:
            dims = {s.dim for group in groups for s in group.tensors if s.tensor == name}
            final[name] = _cut_tensor(name, tensor, kept, current, groups, sorted(dims))
    ranked = {name: ranking for name, ranking in rankings.items() if name in current.sizes}
    plan = PruningPlan(current.sizes, kept, ranked)
    return Decision(plan, final, information, maps, stand_ins=stand_ins)


def _stand_ins(
    group: DependencyGroup,
    fits: Sequence[_Fit],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
) -> StandIns:
    """What the kept units predict of each removed one, over all inputs that hold them."""
    now, widths, stay = current.kept[group.name], widths_now(group, current), set(kept[group.name])
    gone = [place for place, unit in enumerate(now) if unit not in stay]
    shares: list[float] = []
    best: list[int | None] = []
    for start in range(0, len(gone), _TOGETHER):
        some = gone[start : start + _TOGETHER]
        found = [fit.explained(fit.given.units(group.name, widths), some) for fit in fits]
        parts = torch.stack([part.cpu() for part, _ in found]).sum(0)
        total = torch.stack([variances.cpu() for _, variances in found]).sum(0)
        # A unit without variance is a constant, which a bias makes up for.
        share = torch.where(total > 0, parts.sum(1) / total.clamp_min(1e-300), 1.0)
        shares += [float(f"{value:.4g}") for value in share.clamp(0, 1)]
        best += [now[int(i)] if stay else None for i in parts[:, :-1].argmax(1)]
    return StandIns(tuple(now[place] for place in gone), tuple(shares), tuple(best))


def _rotation(
    group: DependencyGroup,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    relevance: RelevanceSource,
    *,
    biases: bool,
) -> HeadRotation:
    """The principal directions of heads, the same that were ranked."""
    known = None if isinstance(relevance, str) else relevance
    given = (group, moments, weights, kept, current, groups, known)
    (values,) = unit_statistics(*given, biases=biases)
    found = head_rotation(group, values, moments, weights, known)
    if not found.rotation.rescaled:
        return found
    # Attention divides by the root of the head size, which the cut changes; queries make up for it.
    factor = math.sqrt(len(kept[group.name]) / current.width(group.name))
    return replace(found, query=found.query * factor)


def _cut_tensor(
    name: str,
    tensor: Tensor,
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    dims: Iterable[int],
) -> Tensor:
    """The part of a tensor that stays, of some of its dimensions."""
    for dim in dims:
        rows = kept_rows(name, kept, current, groups, dim)
        if rows is not None:
            tensor = tensor.index_select(dim, rows.to(tensor.device))
    return tensor


def _completed_inputs(
    groups: Sequence[DependencyGroup],
) -> Iterator[tuple[DependencyGroup, list[DependencyGroup]]]:
    """Groups from the top down, each with those whose inputs hold no group that comes later.

    What a consumer keeps is known when all groups in its input are. Heads that rotate come first of
    those that are complete together, since others read the same input.
    """
    names = {group.name for group in groups}
    needed = {
        group.name: {
            name
            for consumers in group.unit_inputs.values()
            for name in ConsumerInput.of(group, consumers).names & names
        }
        | {group.name}
        for group in groups
    }
    ordered, known = sorted(groups, key=lambda group: -group.level), set[str]()
    left = list(ordered)
    for group in ordered:
        known.add(group.name)
        complete = [one for one in left if needed[one.name] <= known]
        left = [one for one in left if one not in complete]
        yield group, sorted(complete, key=lambda one: one.rotation is None)


@dataclass(frozen=True)
class _Fit:
    """Regression ``M (dropped, kept)`` of the dropped entries of an input on the kept ones.

    Entries of all groups in the input take part.
    """

    given: ConsumerInput
    values: UnitStatistics
    kept: Tensor
    dropped: Tensor
    coefficients: Tensor

    @classmethod
    def of(
        cls,
        group: DependencyGroup,
        given: ConsumerInput,
        values: UnitStatistics,
        kept: Mapping[str, tuple[int, ...]],
        current: PruningPlan,
    ) -> _Fit:
        now = kept_now([*given.names], kept, current)
        entries = given.kept(now, widths_now(group, current))
        device = values.covariance.device
        mask = torch.zeros(len(values.mean), dtype=torch.bool, device=device)
        mask[torch.tensor(entries, dtype=torch.long, device=device)] = True
        stay, dropped = (m.nonzero().flatten() for m in (mask, ~mask))
        found = regression(values.covariance, stay, dropped, values.samples)
        return cls(given, values, stay, dropped, found)

    @property
    def has_few_samples(self) -> bool:
        """Whether there are fewer than 20 for each unit above, or 2 for each entry."""
        values = self.values
        return values.samples < max(20 * len(values.readout), 2 * len(values.mean))

    def copies(
        self, group: DependencyGroup, kept: Mapping[str, tuple[int, ...]], current: PruningPlan
    ) -> bool:
        """Whether kept units of a group are copies of each other."""
        units = self.given.units(group.name, widths_now(group, current))
        stay = kept_now([group.name], kept, current)[group.name]
        single = all(len(units[unit]) == 1 for unit in stay)
        return single and copies_kept(self.values, [units[unit][0] for unit in stay]) > 0

    def explained(
        self, units: Sequence[Sequence[int]], some: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Variance of some dropped units, and the part of it that each kept unit predicts.

        Args:
            units: Entries of every present unit.
            some: The dropped units.

        Returns:
            ``(some, units + 1)``, the last column of entries of other groups, and ``(some,)``.
        """
        covariance, device = self.values.covariance, self.values.covariance.device
        owner = torch.full((len(covariance),), len(units), device=device)
        for place, entries in enumerate(units):
            owner[list(entries)] = place
        place_of = torch.full((len(units) + 1,), -1, device=device)
        place_of[list(some)] = torch.arange(len(some), device=device)
        rows = (place_of[owner[self.dropped]] >= 0).nonzero().flatten()
        mine = place_of[owner[self.dropped[rows]]]
        products = self.coefficients[rows] * covariance[self.dropped[rows]][:, self.kept]
        found = covariance.new_zeros(len(rows), len(units) + 1)
        found.index_add_(1, owner[self.kept], products)
        parts = covariance.new_zeros(len(some), len(units) + 1).index_add_(0, mine, found)
        variances = covariance.diagonal()[self.dropped[rows]]
        return parts, covariance.new_zeros(len(some)).index_add_(0, mine, variances)

    def others(self, consumer: str, tensor: str) -> tuple[int, ...]:
        """The dimensions of a weight or a bias of a consumer that do not count what it reads."""
        read = self.given.weight(consumer)
        if tensor != read.tensor:
            return (0,)
        return tuple({0, 1, 2} - {read.read}) if read.several else (read.output,)

    def information(self, ridge: float) -> GroupInformation:
        """Information with the layer above, whose noise is ``ridge`` of its mean variance."""
        values, readout, kept = self.values, self.values.readout, self.kept
        cross = readout @ values.covariance
        above = cross @ readout.mT
        variance = ridge * float(values.variance(above)) if len(above) else 0.0
        noise = (variance or 1.0) * torch.eye(len(above)).to(above)
        # What the layer above receives of the dropped entries, less what the kept ones tell of it:
        # its covariance with the entries is that of all less that of what the kept ones stand for.
        told = readout[:, self.dropped] @ self.coefficients
        cross -= (readout[:, kept] + told) @ values.covariance[kept]
        lost = cross[:, self.dropped] @ readout[:, self.dropped].mT - cross[:, kept] @ told.mT
        full, residual, floor = (torch.logdet(m) for m in (above + noise, lost + noise, noise))
        total = float(full - floor) / 2
        return GroupInformation(total=total, kept=min(total, max(0.0, float(full - residual) / 2)))

    def compensate(self, consumer: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``W' = W_K + W_D M``, ``b' = b + W_D (mu_D - M mu_K)``, at each position of a kernel.

        Without a bias, M is fitted to the raw second moments.
        """
        values, coefficients = self.values, self.coefficients
        read = self.given.weight(consumer)
        stored = weights[read.tensor].detach()
        bias = weights.get(f"{consumer}.bias")
        if bias is None and not values.around_zero:
            raw = spilled(torch.outer(values.mean, values.mean).add_(values.covariance))
            coefficients = regression(raw, self.kept, self.dropped, values.samples)
        shift = values.mean[self.dropped] - coefficients @ values.mean[self.kept]
        parts, shifts = [], []
        stacked = stacked_weight(stored, read.read, self.given.fold, several=read.several)
        for part in stacked.unbind(2):
            weight = part.to(values.covariance)
            dropped = weight[:, self.dropped]
            parts.append((weight[:, self.kept] + dropped @ coefficients).to(stored))
            shifts.append(dropped @ shift)
        new_weight = stored_weight(torch.stack(parts, 2), stored, read.read, several=read.several)
        new = {read.tensor: new_weight}
        if bias is not None:
            new[f"{consumer}.bias"] = (bias.detach().to(shift) + sum(shifts)).to(bias)
        return new


def _warn(few_samples: Sequence[str], copies: Sequence[str]) -> None:
    if few_samples:
        warnings.warn(
            f"{counted(len(few_samples), 'group')}, {few_samples[0]!r} first, had fewer than 20 "
            "samples for each unit above, or 2 for each entry; scores are noisy. A larger "
            "validation set or more positions helps.",
            PruningWarning,
            stacklevel=3,
        )
    if copies:
        warnings.warn(
            f"top-k kept copies of the same unit on {counted(len(copies), 'group')}, "
            f"{copies[0]!r} first; selection='conditional' keeps one of them.",
            PruningWarning,
            stacklevel=3,
        )
