"""Rotate attention heads into their principal directions before dimensions are removed.

Of a head no one sees single dimensions: only products of queries with keys, and what the output
projection makes of the values. So every head may be given other coordinates without a change of
the output, and in the right ones the first few say nearly everything (balanced truncation, Moore
1981, with the covariance of what is said and the relevance of what is heard as the two Gramians).
All heads of a layer keep the same number of them, so the layer stays an ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_mi_prune.calibration.gradients import Relevance
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.discovery.groups import DependencyGroup, RotatableProjections
from lightning_mi_prune.importance.statistics import UnitStatistics
from lightning_mi_prune.surgery.parameters import RotationMaps, rotate_along

__all__ = [
    "HeadRotation",
    "check_rotations",
    "head_rotation",
]

_SMALLEST = 1e-9  # directions with less of the layer's largest Gramian value count as rounding


_LOUDEST = 1e-4  # of the power of a key that softmax does not see, what counts for its scale


@dataclass(frozen=True)
class HeadRotation:
    """New coordinates of all heads of a layer, and what is lost without the last of them.

    Args:
        rotation: Whose coordinates.
        query: Maps of the queries ``(heads, size, size)``, a row a new dimension, the first to be
            the last to go.
        key: Maps of the keys; products with the queries stay as they are.
        value: Orthogonal maps of the values.
        scores: Expected rise of the loss, in nats an example, by what the scores of each head
            lose without each new dimension ``(heads, size)``.
    """

    rotation: RotatableProjections
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor

    @property
    def maps(self) -> RotationMaps:
        """The maps by tensor and dimension; those of the values undo themselves in the consumer."""
        turn, found = self.rotation, dict[str, dict[int, Tensor]]()
        rows = {turn.query: self.query, turn.key: self.key, turn.value: self.value}
        for path, maps in rows.items():
            found |= {f"{path}.{name}": {0: maps} for name in ("weight", "bias")}
        return found | {f"{turn.consumer}.weight": {1: self.value}}

    def weights(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of the layer in the new coordinates, by name; the output is the same."""
        return {
            name: rotate_along(given[name].detach(), dim, maps)
            for name, dims in self.maps.items()
            for dim, maps in dims.items()
            if name in given
        }

    def rotate(self, evidence: UnitStatistics) -> UnitStatistics:
        """What is known of the values, in the new coordinates."""
        both = rotate_along(rotate_along(evidence.covariance, 0, self.value), 1, self.value)
        return replace(
            evidence,
            mean=rotate_along(evidence.mean, 0, self.value),
            covariance=both,
            readout=rotate_along(evidence.readout, 1, self.value),
            weight=rotate_along(evidence.weight, 1, self.value),
        )

    def select(self, evidence: UnitStatistics, heads: Sequence[int], size: int) -> UnitStatistics:
        """What is known, in the new coordinates, of some heads and their first dimensions."""
        place = self._places(evidence)[list(heads), :size]
        return replace(_taken(self.rotate(evidence), place.flatten()), entries=size)

    def by_dimension(self, evidence: UnitStatistics, heads: Sequence[int]) -> UnitStatistics:
        """The same by dimension: the first of these heads, then the second."""
        place = self._places(evidence)[list(heads)]
        return replace(_taken(self.rotate(evidence), place.mT.flatten()), entries=len(heads))

    def _places(self, evidence: UnitStatistics) -> Tensor:
        return torch.arange(len(evidence.mean), device=evidence.mean.device).view(
            self.value.shape[:2]
        )


def head_rotation(
    group: DependencyGroup,
    values: UnitStatistics,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    relevance: Mapping[str, Relevance] | None,
) -> HeadRotation:
    """The principal directions of all heads of a layer.

    Values are rotated so that the first ``d`` tell most of ``G^(1/2) W v``. Queries and keys are
    rotated so that the truncated product ``q'k'`` misses least of what the loss listens to: the
    query's covariance against the relevance of its gradients, which keys weigh.

    Args:
        group: The group of the dimensions.
        values: What is known of the values, where they are read.
        moments: What was heard, by key.
        weights: Parameters of the model as it stands, by qualified name; only read.
        relevance: What the loss listens to, by key.

    Raises:
        PruningError: If that is not known of queries and keys.
    """
    turn = group.rotation
    assert turn is not None  # noqa: S101
    felt = [f"{group.name}@{path}" for path in (turn.query, turn.key)]
    if relevance is None or not set(felt) <= set(relevance):
        raise PruningError(
            f"{group.name!r} needs to know what the loss hears of queries and keys, but no training "
            "steps were felt. Use relevance='gradient', or leave 'head_dim' out of units."
        )
    size = values.covariance.shape[0] // values.entries
    # A share of all keys adds the same to all scores of a query, which softmax takes away: keys
    # are heard about their mean, queries about zero.
    (query, _), (whole, heard) = (
        tuple(_blocks(matrix, size) for matrix in _second(path, group, moments, weights))
        for path in (turn.query, turn.key)
    )
    of_queries, of_keys = (_blocks(relevance[key].matrix.to(query), size) for key in felt)
    duals, maps = _balanced(heard, of_keys)
    asking, asked = _along(maps, query), _along(duals, heard)
    # What queries lack and what keys lack: with the sum of both, what a truncation of scores alone
    # would cost comes out right, and a budget goes to other groups; their mean is too low.
    by_queries, by_keys = asking * _along(duals, of_queries), asked * _along(maps, of_keys)
    scores = (by_queries + by_keys) / 2
    # Either may be scaled by what the other is divided by: both are made as loud as the other.
    # The mean of keys is taken away, but half precision must hold it: it may be 100 times as loud.
    loud = torch.maximum(asked, _LOUDEST * _along(duals, whole))
    heard_both = (loud > 0) & (asking > 0)  # a head that is silent says nothing of its scale
    ratio = torch.where(heard_both, loud, 1.0) / torch.where(heard_both, asking, 1.0)
    scale = ratio.pow(0.25)[..., None]
    maps, duals = maps * scale, duals / scale
    read = _blocks(values.readout.mT @ values.readout, size)
    first, _ = _balanced(_blocks(values.covariance, size), read)
    found = HeadRotation(turn, maps, duals, _orthonormal(first), scores)
    if not all(bool(t.isfinite().all()) for t in (maps, duals, found.value, scores)):
        raise PruningError(
            f"The directions of {group.name!r} are not finite: what its heads say, or the gradients "
            "there, are out of range. Leave 'head_dim' out of units, or exclude the group."
        )
    return found


def check_rotations(
    module: nn.Module,
    chosen: Sequence[DependencyGroup],
    *,
    relevance: str | None,
    keep_information: float | None,
) -> None:
    """Refuse dimensions of heads where nothing tells which matter.

    Args:
        module: The model as it stands.
        chosen: The groups that may shrink.
        relevance: What tells which part of the layer above matters.
        keep_information: Share of the information that the budget keeps, if it is such a budget.

    Raises:
        PruningError: If dimensions may go without gradients, beside heads for a share of the
            information, or from projections that are one.
    """
    turns = [group.name for group in chosen if group.rotation is not None]
    if turns and relevance != "gradient":
        raise PruningError(
            f"{turns[0]!r} cannot shrink with relevance={relevance!r}: gradients tell which "
            "dimensions of a head matter. Use relevance='gradient', or leave 'head_dim' out of units."
        )
    crossed = [
        group.name for group in chosen if group.product_with in turns and group.rotation is None
    ]
    if crossed and keep_information is not None:
        raise PruningError(
            f"keep_information={keep_information} cannot be shared by {crossed[0]!r} and their dimensions: both lose the same "
            "information. Leave 'heads' or 'head_dim' out of units, or use sparsity or target_macs."
        )
    for group in (group for group in chosen if group.name in turns):
        _check_apart(module, group)


def _check_apart(module: nn.Module, group: DependencyGroup) -> None:
    """Refuse projections of a layer that are one parameter: each turns its own way."""
    turn = group.rotation
    assert turn is not None  # noqa: S101
    owner: dict[int, str] = {}
    for path in dict.fromkeys((turn.query, turn.key, turn.value, turn.consumer)):
        for name, parameter in module.get_submodule(path).named_parameters():
            other = owner.setdefault(id(parameter), f"{path}.{name}")
            if other != f"{path}.{name}":
                raise PruningError(
                    f"{other!r} and {path + '.' + name!r} are one parameter, but {group.name!r} "
                    "would turn them differently. Untie them, or leave 'head_dim' out of units."
                )


def _taken(evidence: UnitStatistics, place: Tensor) -> UnitStatistics:
    """What is known of some entries."""
    return replace(
        evidence,
        mean=evidence.mean[place],
        covariance=evidence.covariance[place][:, place],
        readout=evidence.readout[:, place],
        weight=evidence.weight[:, place],
    )


def _along(maps: Tensor, matrix: Tensor) -> Tensor:
    """How large each matrix is along each new coordinate ``(heads, size)``."""
    found: Tensor = (maps @ matrix @ maps.mT).diagonal(dim1=-2, dim2=-1)
    return found


def _balanced(said: Tensor, heard: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``B`` and ``A = B^-T`` that make both Gramians diagonal ``(n, g, g)``.

    ``B said B'`` is one, ``A heard A' = diag(s)`` falls, and losing coordinate ``j`` costs ``s_j``.
    """
    values, vectors = torch.linalg.eigh((said + said.mT) / 2)
    largest = values.max()
    floor = torch.where(largest > 0, largest * _SMALLEST, 1.0)
    root = torch.maximum(values, floor).sqrt()  # what is next to nothing counts as a little
    half = (vectors * root[..., None, :]) @ vectors.mT
    inverse = (vectors / root[..., None, :]) @ vectors.mT
    product = half @ heard @ half
    _, directions = torch.linalg.eigh((product + product.mT) / 2)
    falling = directions.flip(-1).mT
    return falling @ inverse, falling @ half


def _orthonormal(maps: Tensor) -> Tensor:
    """Orthogonal maps whose first rows span the same as the first rows given, for every number."""
    basis, _ = torch.linalg.qr(maps.mT)
    rows: Tensor = basis.mT.contiguous()
    return rows


def _second(
    path: str, group: DependencyGroup, moments: Mapping[str, Moments], weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Second moments of what a projection says, about zero and about its mean."""
    mean, covariance = moments[f"{group.name}@{path}"].stabilized()
    weight = weights[f"{path}.weight"].detach().to(covariance)
    said, middle = weight @ covariance @ weight.mT, weight @ mean
    bias = weights.get(f"{path}.bias")
    middle = middle if bias is None else middle + bias.detach().to(middle)
    return said + torch.outer(middle, middle), said


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """Diagonal blocks ``(heads, size, size)`` of a matrix over all entries of heads."""
    heads = matrix.shape[0] // size
    parts = matrix.reshape(heads, size, heads, size)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
