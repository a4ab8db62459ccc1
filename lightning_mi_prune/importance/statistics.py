"""UnitStatistics: moments, weights above and relevance of a group, as one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_mi_prune.calibration.gradients import Relevance
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.consumers import stacked_weight
from lightning_mi_prune.core.errors import PruningError, counted, number
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.spilling import spilled
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.inputs import ConsumerInput, kept_now, read_dims, widths_now
from lightning_mi_prune.graph.layouts import (
    kept_positions,
    layout_names,
    layout_size,
    unit_positions,
)

__all__ = [
    "UnitStatistics",
    "entries_of",
    "input_statistics",
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
        covariance: Covariance of the entries ``(d, d)``; their second moments if ``around_zero``.
        readout: Linear map ``T (m, d)`` to the kept units above. Relevance only weights it:
            ``T = G^(1/2) W``.
        rows: The weight rows ``(units, w)`` that produce each unit, for criteria of weights.
        weight: The weights ``W (rows, d)`` that read the entries; default the readout.
        taylor: First-order change of the loss without each unit ``(units,)``, if it is known.
        outputs: Outputs above that the readout stands for, if it was reduced; default its rows.
        around_zero: Whether means count like what varies, because no bias makes up for them.
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
    outputs: int = 0
    around_zero: bool = False

    def __post_init__(self) -> None:
        if not self.weight.numel():
            object.__setattr__(self, "weight", self.readout)
        if not self.outputs:
            object.__setattr__(self, "outputs", len(self.readout))

    @property
    def units(self) -> int:
        """Number of units now."""
        return self.covariance.shape[0] // self.entries

    def mean_squares(self) -> Tensor:
        """Mean square of each entry ``(d,)``."""
        found = self.covariance.diagonal()
        return found if self.around_zero else found + self.mean.square()

    def above(self) -> Tensor:
        """Covariance ``(m, m)`` of the layer above, a linear map of the entries."""
        return self.readout @ self.covariance @ self.readout.mT

    def joint(self) -> tuple[Tensor, Tensor, Tensor]:
        """Covariances ``(Sxx, Sxy, Syy)`` of the entries and of the layer above."""
        cross = self.covariance @ self.readout.mT
        return self.covariance, cross, self.readout @ cross

    def gram(self) -> Tensor:
        """``T'T (d, d)``: how much the layer above reads of each entry."""
        return self.readout.mT @ self.readout

    def noise(self, ridge: float, gram: Tensor | None = None) -> float:
        """Noise variance on the layer above: ``ridge`` times its mean variance, 0 for no layer.

        Args:
            ridge: That share.
            gram: What :meth:`gram` returns, where that is known: it gives the variances of the
                layer above without its covariance.
        """
        if not len(self.readout):  # no unit is kept above
            return 0.0
        if gram is not None:
            return (
                ridge * float(torch.vdot(gram.flatten(), self.covariance.flatten())) / self.outputs
            )
        return ridge * float(self.variance(self.above()))

    def variance(self, above: Tensor) -> Tensor:
        """Mean variance of the outputs above, of their covariance ``(m, m)``."""
        return above.diagonal().mean() * (len(above) / self.outputs)

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
    within: Mapping[str, tuple[int, ...]] | None = None,
    *,
    biases: bool = True,
) -> list[UnitStatistics]:
    """Statistics of a group's units at each input that consists of them.

    The entries of a unit are put next to each other, wherever they are in the input; those of other
    groups are left out. Dimensions of heads that rotate stay in the order of the input.

    Args:
        group: The group.
        moments: Sums of activations, by key of the input (:attr:`DependencyGroup.inputs`).
        weights: Parameters of the model as it is now, by qualified name; only read.
        kept: Units kept of the groups above, in positions of the model as built.
        current: The plan the model carries now.
        groups: All groups that are being cut.
        relevance: How much the loss depends on each part of the layer above, by key; None weights
            all parts equally.
        within: Units of other groups to which the entries are confined, numbered as built.
        biases: As for :func:`input_statistics`.

    Raises:
        PruningError: If there are no samples at an input.
    """
    widths = widths_now(group, current)
    rows, found = _producer_rows(group, weights, widths), []
    inside = kept_now([*(within or {})], within or {}, current)
    for key, consumers in group.unit_inputs.items():
        given = ConsumerInput.of(group, consumers)
        units = given.units(group.name, widths, inside)
        index: list[int] | None = [position for unit in units for position in unit]
        if group.rotation is not None or index == [*range(layout_size(given.layout, widths))]:
            index = None
        known = None if relevance is None else relevance.get(key)
        whole = input_statistics(
            *(group, key, moments, weights, kept, current, groups),
            relevance=known,
            index=index,
            biases=biases,
        )
        entries = len(units[0]) if units else 1
        taylor = None if known is None else known.taylor
        found.append(replace(whole, entries=entries, rows=rows, taylor=taylor))
    return found


def input_statistics(
    group: DependencyGroup,
    key: str,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    *,
    relevance: Relevance | None = None,
    index: Sequence[int] | None = None,
    biases: bool = True,
) -> UnitStatistics:
    """Statistics of the entries of one input, one entry a unit.

    Where a consumer has a bias, a new one makes up for the mean of what is removed, so that only
    the covariance counts. Where none has, second moments about zero take its place.

    Args:
        group: A group whose units are in the input.
        key: Key of the input, one of :attr:`DependencyGroup.unit_inputs`.
        moments: As for :func:`unit_statistics`, like all that follow.
        weights: The same.
        kept: The same.
        current: The same.
        groups: The same.
        relevance: How much the loss depends on each part of the layer above.
        index: Positions of the entries; None for all in their order.
        biases: Whether biases may change.

    Raises:
        PruningError: If there are no samples.
    """
    sums = moments[key]
    samples = int(sums.count)
    if samples == 0:
        raise PruningError(
            f"No activations were collected at {key!r}, so its units cannot be scored. Run "
            "validation first."
        )
    consumers = group.unit_inputs[key]
    given = ConsumerInput.of(group, consumers)
    mean, covariance = sums.stabilized()
    del sums  # where they are made on demand, this was the only one to hold them
    stacks, above = _kept_weights(given, consumers, weights, kept, current, groups)
    matrix = None if relevance is None else relevance.matrix.to(covariance)
    if index is not None:
        at = torch.tensor(index, dtype=torch.long, device=mean.device)
        mean, covariance = mean[at], covariance[at][:, at]
        stacks = [stack[:, at.to(stack.device)] for stack in stacks]
        if relevance is not None and relevance.over_units and matrix is not None:
            matrix = matrix[at][:, at]
    around_zero = not (biases and any(f"{consumer}.bias" in weights for consumer in consumers))
    if around_zero:
        covariance.addr_(mean, mean)
    weight, outputs = _one_matrix(stacks, covariance)
    readout = weight
    if relevance is not None and matrix is not None:
        if relevance.over_units:
            readout, outputs = _factor(matrix), len(matrix)
        else:
            above = above.to(matrix.device)
            readout, outputs = _one_matrix(stacks, covariance, _factor(matrix[above][:, above]))
    return UnitStatistics(
        name=group.name,
        entries=1,
        samples=samples,
        mean=mean,
        covariance=spilled(covariance),
        readout=readout,
        weight=weight,
        outputs=outputs,
        around_zero=around_zero,
    )


def _kept_weights(
    given: ConsumerInput,
    consumers: Sequence[str],
    weights: Mapping[str, Tensor],
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
) -> tuple[list[Tensor], Tensor]:
    """The kept outputs of each consumer of an input, ``(m, d, k)``, and their indices at the first.

    Args:
        given: The input.
        consumers: Those that read it.
        weights: Parameters of the model as it is now, by qualified name.
        kept: Units kept of the groups above, in positions of the model as built.
        current: The plan the model carries now.
        groups: All groups that are being cut.
    """
    parts: list[Tensor] = []
    first = torch.empty(0, dtype=torch.long)
    for consumer in consumers:
        read = given.weight(consumer)
        stored = weights[read.tensor].detach()
        weight = stacked_weight(stored, read.read, given.fold, several=read.several)
        rows = kept_rows(read.tensor, kept, current, groups, read.output)
        rows = torch.arange(len(weight)) if rows is None else rows
        first = first if parts else rows
        parts.append(weight[rows.to(weight.device)])
    return parts, first


def _one_matrix(
    stacks: Sequence[Tensor], like: Tensor, factor: Tensor | None = None
) -> tuple[Tensor, int]:
    """A matrix of all kernel positions, one below the other, and how many rows they are.

    Of convolutions with more rows than entries it is the square matrix ``R`` with the same ``R'R``:
    nothing else of them matters.

    Args:
        stacks: Weights ``(m, d, k)``.
        like: A tensor of the wanted device and type.
        factor: Map of the outputs; None for the identity.
    """

    def mapped(part: Tensor) -> Tensor:
        return part.to(like) if factor is None else factor @ part.to(like)

    rows, entries = sum(len(stack) * stack.shape[2] for stack in stacks), stacks[0].shape[1]
    plain = all(stack.shape[2] == 1 for stack in stacks)
    if plain and factor is not None:
        return factor @ torch.cat([stack[..., 0].to(like) for stack in stacks]), len(factor)
    if plain or rows <= entries:
        parts = [mapped(part) for stack in stacks for part in stack.unbind(2)]
        return torch.cat(parts), rows
    gram = like.new_zeros(entries, entries)
    for part in (part for stack in stacks for part in stack.unbind(2)):
        gram += mapped(part).mT @ mapped(part)
    return _factor(gram), rows


def _producer_rows(
    group: DependencyGroup, weights: Mapping[str, Tensor], widths: Mapping[str, int]
) -> Tensor:
    """What produces each unit, ``(units, w)``: its part of all tensors that do not read units."""
    read, width = read_dims([group]), widths[group.name]
    parts = []
    for s in group.tensors:
        if s.tensor not in weights or read.get(s.tensor) == s.dim:
            continue  # a buffer, or a weight that reads the units
        units = unit_positions(s.layout, group.name, widths)
        tensor = weights[s.tensor].detach()
        index = torch.tensor(units, dtype=torch.long, device=tensor.device).flatten()
        part = tensor.index_select(s.dim, index).movedim(s.dim, 0)
        parts.append(part.reshape(width, part.numel() // max(1, width)))
    return torch.cat(parts, dim=1).double() if parts else torch.zeros(width, 0)


def kept_rows(
    tensor: str,
    kept: Mapping[str, tuple[int, ...]],
    current: PruningPlan,
    groups: Sequence[DependencyGroup],
    dim: int = 0,
) -> Tensor | None:
    """Positions of a dimension of a tensor that are kept, over all groups in it.

    Args:
        tensor: Name of the tensor.
        kept: Units kept, in positions of the model as built.
        current: The plan the model carries now.
        groups: Groups that may be cut.
        dim: The dimension.

    Returns:
        Positions in the tensor as it is now; None where no group cuts the dimension.
    """
    for group in groups:
        for s in group.tensors:
            if s.tensor == tensor and s.dim == dim:
                now = kept_now(layout_names(s.layout), kept, current)
                found = kept_positions(s.layout, now, widths_now(group, current))
                return torch.tensor(found, dtype=torch.long)
    return None


def entries_of(units: Tensor, entries: int) -> Tensor:
    """Positions of all entries of the given units."""
    return (units[:, None] * entries + torch.arange(entries, device=units.device)).flatten()


def _factor(matrix: Tensor) -> Tensor:
    """``F`` with ``F'F = G`` for a symmetric ``G`` that is positive up to rounding."""
    lower, failed = torch.linalg.cholesky_ex((matrix + matrix.mT) / 2)
    if not int(failed):
        transposed: Tensor = lower.mT
        return transposed
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    factor: Tensor = values.clamp_min(0).sqrt()[:, None] * vectors.mT
    return factor
