"""Rotate attention heads into their principal directions before dimensions are removed.

Single dimensions of a head do not matter, only the products of queries with keys and the output
projection of the values. So the coordinates of every head may change without a change of the
output, and in the right ones the first few carry nearly all of it (balanced truncation, Moore
1981, whose two Gramians are here the covariance of activations and the relevance of gradients).
All heads of a layer keep the same number of dimensions, so the layer stays an ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_mi_prune.calibration.gradients import Relevance
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.groups import DependencyGroup, RotatableProjections
from lightning_mi_prune.importance.statistics import UnitStatistics
from lightning_mi_prune.surgery.parameters import RotationMaps, rotate_along

__all__ = [
    "HeadRotation",
    "check_rotations",
    "head_rotation",
]

_SMALLEST = 1e-9  # directions with less of the layer's largest Gramian value count as rounding


# Least power of a key, as a share of that with its mean (which softmax ignores), when queries and
# keys are scaled: half precision must hold the mean, which may be 100 times as large as the rest.
_LEAST_POWER = 1e-4


@dataclass(frozen=True)
class HeadRotation:
    """New coordinates of all heads of a layer, and what is lost without the last of them.

    Args:
        rotation: The projections of the layer.
        query: Maps of the queries ``(heads, size, size)``, one row a new dimension, in the order in
            which dimensions are kept.
        key: Maps of the keys; products with the queries stay the same.
        value: Orthogonal maps of the values.
        scores: Expected rise of the loss, in nats an example, when the attention scores of each
            head lose each new dimension ``(heads, size)``.
    """

    rotation: RotatableProjections
    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor

    @property
    def maps(self) -> RotationMaps:
        """The maps by tensor and dimension; the consumer undoes those of the values."""
        rotation, found = self.rotation, dict[str, dict[int, Tensor]]()
        rows = {rotation.query: self.query, rotation.key: self.key, rotation.value: self.value}
        for path, maps in rows.items():
            found |= {f"{path}.{name}": {0: maps} for name in ("weight", "bias")}
        return found | {f"{rotation.consumer}.weight": {1: self.value}}

    def weights(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of the layer in the new coordinates, by name; the output is the same."""
        return {
            name: rotate_along(given[name].detach(), dim, maps)
            for name, dims in self.maps.items()
            for dim, maps in dims.items()
            if name in given
        }

    def rotate(self, statistics: UnitStatistics) -> UnitStatistics:
        """Statistics of the values in the new coordinates."""
        both = rotate_along(rotate_along(statistics.covariance, 0, self.value), 1, self.value)
        return replace(
            statistics,
            mean=rotate_along(statistics.mean, 0, self.value),
            covariance=both,
            readout=rotate_along(statistics.readout, 1, self.value),
            weight=rotate_along(statistics.weight, 1, self.value),
        )

    def select(self, statistics: UnitStatistics, heads: Sequence[int], size: int) -> UnitStatistics:
        """Statistics, in the new coordinates, of the first dimensions of some heads."""
        index = self._entries(statistics)[list(heads), :size]
        return replace(_selected(self.rotate(statistics), index.flatten()), entries=size)

    def by_dimension(self, statistics: UnitStatistics, heads: Sequence[int]) -> UnitStatistics:
        """The same with all dimensions, each a unit with one entry a head."""
        index = self._entries(statistics)[list(heads)]
        return replace(_selected(self.rotate(statistics), index.mT.flatten()), entries=len(heads))

    def _entries(self, statistics: UnitStatistics) -> Tensor:
        """Positions of entries ``(heads, size)``."""
        entries = torch.arange(len(statistics.mean), device=statistics.mean.device)
        return entries.view(self.value.shape[:2])


def head_rotation(
    group: DependencyGroup,
    values: UnitStatistics,
    moments: Mapping[str, Moments],
    weights: Mapping[str, Tensor],
    relevance: Mapping[str, Relevance] | None,
) -> HeadRotation:
    """The principal directions of all heads of a layer.

    Values are rotated so that the first ``d`` explain most of ``G^(1/2) W v``. Queries and keys are
    rotated so that truncating the product ``q'k'`` changes the loss least, by the covariance of
    the keys and the relevance of their gradients, which contain the queries.

    Args:
        group: The group of the dimensions.
        values: Statistics of the values, at the input of their consumer.
        moments: Sums of activations, by key of the input.
        weights: Parameters of the model as it is now, by qualified name; only read.
        relevance: How much the loss depends on queries and keys, by key of the input.

    Raises:
        PruningError: If the relevance of queries and keys is missing, or values are not finite.
    """
    rotation = group.rotation
    assert rotation is not None  # noqa: S101
    keys = [f"{group.name}@{path}" for path in (rotation.query, rotation.key)]
    if relevance is None or not set(keys) <= set(relevance):
        raise PruningError(
            f"{group.name!r} needs the gradients at queries and keys, but none were collected. Use "
            "relevance='gradient', or leave 'head_dim' out of kinds."
        )
    size = values.covariance.shape[0] // values.entries
    # The same vector added to all keys adds the same to all scores of a query, which softmax
    # ignores: keys count about their mean, queries about zero.
    (query, _), (key, key_covariance) = (
        tuple(_blocks(matrix, size) for matrix in _second_moments(path, group, moments, weights))
        for path in (rotation.query, rotation.key)
    )
    of_query, of_key = (_blocks(relevance[name].matrix.to(query), size) for name in keys)
    key_maps, query_maps = _balanced(key_covariance, of_key)
    query_power, key_power = _along(query_maps, query), _along(key_maps, key_covariance)
    by_query = query_power * _along(key_maps, of_query)
    by_key = key_power * _along(query_maps, of_key)
    # Their sum would predict the loss of cutting dimensions alone, but a budget would then cut
    # other groups instead; their mean is below that loss.
    scores = (by_query + by_key) / 2
    # Scaling one and dividing the other changes no score: both get the same power.
    largest = torch.maximum(key_power, _LEAST_POWER * _along(key_maps, key))
    both = (largest > 0) & (query_power > 0)  # a head without activations has no scale
    ratio = torch.where(both, largest, 1.0) / torch.where(both, query_power, 1.0)
    scale = ratio.pow(0.25)[..., None]
    query_maps, key_maps = query_maps * scale, key_maps / scale
    read = _blocks(values.readout.mT @ values.readout, size)
    first, _ = _balanced(_blocks(values.covariance, size), read)
    found = HeadRotation(rotation, query_maps, key_maps, _orthonormal(first), scores)
    if not all(bool(t.isfinite().all()) for t in (query_maps, key_maps, found.value, scores)):
        raise PruningError(
            f"The directions of {group.name!r} are not finite: activations or gradients of its "
            "heads are out of range. Leave 'head_dim' out of kinds, or exclude the group."
        )
    return found


def check_rotations(
    module: nn.Module,
    chosen: Sequence[DependencyGroup],
    *,
    relevance: str | None,
    keep_information: float | None,
) -> None:
    """Refuse dimensions of heads where they cannot be ranked or rotated.

    Args:
        module: The model as it is now.
        chosen: The groups that may shrink.
        relevance: Where relevance comes from, as in :class:`options.Importance`.
        keep_information: Share of the information that the budget keeps, if it is such a budget.

    Raises:
        PruningError: If dimensions may be removed without gradients, together with heads for a
            share of the information, or from projections that share a parameter.
    """
    rotating = [group.name for group in chosen if group.rotation is not None]
    if rotating and relevance != "gradient":
        raise PruningError(
            f"{rotating[0]!r} cannot shrink with relevance={relevance!r}: ranking its dimensions "
            "needs gradients. Use relevance='gradient', or leave 'head_dim' out of kinds."
        )
    heads = [
        group.name
        for group in chosen
        if not group.rotation and any(name in rotating for name, _ in group.partners)
    ]
    if heads and keep_information is not None:
        raise PruningError(
            f"keep_information={keep_information} cannot be shared by {heads[0]!r} and their "
            "dimensions: both lose the same information. Leave 'heads' or 'head_dim' out of kinds, "
            "or use sparsity or target_macs."
        )
    for group in chosen:
        if group.rotation is not None:
            _check_separate(module, group.name, group.rotation)


def _check_separate(module: nn.Module, name: str, rotation: RotatableProjections) -> None:
    """Refuse projections of a layer that share a parameter: each rotates differently."""
    owner: dict[int, str] = {}
    paths = (rotation.query, rotation.key, rotation.value, rotation.consumer)
    for path in dict.fromkeys(paths):
        for own, parameter in module.get_submodule(path).named_parameters():
            other = owner.setdefault(id(parameter), f"{path}.{own}")
            if other != f"{path}.{own}":
                raise PruningError(
                    f"{other!r} and {path + '.' + own!r} are one parameter, but {name!r} "
                    "would rotate them differently. Untie them, or leave 'head_dim' out of kinds."
                )


def _selected(statistics: UnitStatistics, index: Tensor) -> UnitStatistics:
    """Statistics of some entries."""
    return replace(
        statistics,
        mean=statistics.mean[index],
        covariance=statistics.covariance[index][:, index],
        readout=statistics.readout[:, index],
        weight=statistics.weight[:, index],
    )


def _along(maps: Tensor, matrix: Tensor) -> Tensor:
    """The diagonals of matrices in new coordinates ``(heads, size)``."""
    found: Tensor = (maps @ matrix @ maps.mT).diagonal(dim1=-2, dim2=-1)
    return found


def _balanced(covariance: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Maps ``B`` and ``A = B^-T`` that make both Gramians diagonal ``(n, g, g)``.

    ``B covariance B'`` is the identity, ``A relevance A' = diag(s)`` in falling order, and removing
    coordinate ``j`` costs ``s_j``.
    """
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    largest = values.max()
    floor = torch.where(largest > 0, largest * _SMALLEST, 1.0)
    root = torch.maximum(values, floor).sqrt()  # never too small to be inverted
    half = (vectors * root[..., None, :]) @ vectors.mT
    inverse = (vectors / root[..., None, :]) @ vectors.mT
    product = half @ relevance @ half
    _, directions = torch.linalg.eigh((product + product.mT) / 2)
    falling = directions.flip(-1).mT
    return falling @ inverse, falling @ half


def _orthonormal(maps: Tensor) -> Tensor:
    """Orthogonal maps whose first ``n`` rows span those of the given maps, for every ``n``."""
    basis, _ = torch.linalg.qr(maps.mT)
    rows: Tensor = basis.mT.contiguous()
    return rows


def _second_moments(
    path: str, group: DependencyGroup, moments: Mapping[str, Moments], weights: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Second moments of the outputs of a projection, about zero and about their mean."""
    mean, covariance = moments[f"{group.name}@{path}"].stabilized()
    weight = weights[f"{path}.weight"].detach().to(covariance)
    about_mean, center = weight @ covariance @ weight.mT, weight @ mean
    bias = weights.get(f"{path}.bias")
    center = center if bias is None else center + bias.detach().to(center)
    return about_mean + torch.outer(center, center), about_mean


def _blocks(matrix: Tensor, size: int) -> Tensor:
    """Diagonal blocks ``(heads, size, size)`` of a matrix over all entries of heads."""
    heads = matrix.shape[0] // size
    parts = matrix.reshape(heads, size, heads, size)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
