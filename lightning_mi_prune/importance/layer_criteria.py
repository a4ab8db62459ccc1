"""Which layers of a stack are removed, by one of six criteria (no torch)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from lightning_mi_prune.calibration.data import LayerComparison, LayerLosses, Matrix
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.options import check_choice, check_count
from lightning_mi_prune.core.untrusted import listed, mapping, number, text, whole

__all__ = [
    "Cluster",
    "LayerCriterion",
    "LayerSelector",
    "StackCut",
    "cheapest_clusters",
    "clusters_of",
    "last_layers",
    "random_layers",
    "redundant_layers",
    "smallest_angle_run",
    "smallest_angles",
]

Cluster = tuple[int, ...]


def clusters_of(similarity: Sequence[Sequence[float]], threshold: float = 0.98) -> list[Cluster]:
    """Runs of neighboring layers that are similar to the first of their run.

    The leader scan of MPruner (Hu et al. 2024, arXiv 2408.13482, as in the authors' script): a
    layer joins while it is similar to the *first* of the cluster, else it starts the next.

    Args:
        similarity: Similarity of every pair of layers, bottom to top, 1 for copies.
        threshold: Least similarity to the first of a cluster, above 0 and up to 1.

    Raises:
        PruningError: If the threshold is out of range, or the matrix is not one of layers.

    Example:
        >>> similar = [[1.0, 0.99, 0.7], [0.99, 1.0, 0.99], [0.7, 0.99, 1.0]]
        >>> clusters_of(similar, 0.98)
        [(0, 1), (2,)]
    """
    numeric = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not numeric or not 0 < threshold <= 1:
        raise PruningError(
            f"threshold={threshold!r}; expected a number above 0 and up to 1, such as 0.98 (not a "
            "percentage)."
        )
    count = _check_square(similarity, "similarity")
    found = [[0]]
    for layer in range(1, count):
        if similarity[found[-1][0]][layer] >= threshold:
            found[-1].append(layer)
        else:
            found.append([layer])
    return [tuple(cluster) for cluster in found]


def redundant_layers(clusters: Sequence[Cluster], every: int = 1) -> tuple[int, ...]:
    """The layers to remove: of each cluster ``cluster[1::every]``, never the first.

    Args:
        clusters: Clusters of layers.
        every: 1 leaves only the first of each cluster, 2 removes every second layer, and so on.

    Raises:
        PruningError: If ``every`` is no whole number of at least 1.

    Example:
        >>> clusters = [(0, 1, 2, 3), (4,), (5, 6)]
        >>> redundant_layers(clusters), redundant_layers(clusters, 2)
        ((1, 2, 3, 6), (1, 3, 6))
    """
    check_count("every", every, least=1)
    return tuple(sorted(layer for cluster in clusters for layer in cluster[1::every]))


def cheapest_clusters(
    similarity: Sequence[Sequence[float]], count: int, fixed: int = 0
) -> list[Cluster]:
    """The clusters that lose ``count`` layers, all but the first of each, at the least cost.

    A cluster that loses ``n`` layers costs ``n (1 - CKA)`` of its first and its last layer, as its
    first layer replaces all of them.

    Args:
        similarity: Similarity of every pair of layers.
        count: Layers to remove, fewer than there are.
        fixed: Layers at the bottom that must stay.

    Raises:
        PruningError: If so many cannot be removed.

    Example:
        >>> similar = [[1.0, 0.94, 0.83, 0.6], [0.94, 1.0, 0.9, 0.7], [0.83, 0.9, 1.0, 0.8]]
        >>> cheapest_clusters([*similar, [0.6, 0.7, 0.8, 1.0]], 2)
        [(0, 1), (2, 3)]
    """
    size = _check_square(similarity, "similarity")
    best: dict[tuple[int, int], tuple[float, list[Cluster]]] = {(0, 0): (0.0, [])}
    for end in range(1, size + 1):
        for first in range(end):
            more = end - 1 - first
            if more and first + 1 < fixed:
                continue
            cost = more * (1 - similarity[first][end - 1])
            for removed in range(count - more + 1):
                total, clusters = best.get((first, removed), (math.inf, []))
                found = (total + cost, [*clusters, tuple(range(first, end))])
                known = best.get((end, removed + more), (math.inf, []))
                best[end, removed + more] = min(known, found, key=lambda pair: pair[0])
    total, clusters = best.get((size, count), (math.inf, []))
    if math.isinf(total):
        raise PruningError(
            f"{count} of {counted(size, 'layer')} cannot be removed, {fixed} of them must stay; "
            f"expected at most {size - max(1, fixed)}."
        )
    return clusters


def _check_square(matrix: Sequence[Sequence[float]], name: str) -> int:
    """Rows of a matrix of finite numbers, as many as columns."""
    count = len(matrix)
    if not count or any(len(row) != count for row in matrix):
        raise PruningError(
            f"{name} has {count} rows of {[len(row) for row in matrix]} numbers; expected a square "
            "matrix, a row a layer."
        )
    odd = [i for i, row in enumerate(matrix) if not all(map(math.isfinite, row))]
    if odd:
        raise PruningError(
            f"Rows {odd} of {name} are not finite; expected finite numbers. Collect them again."
        )
    return count


def smallest_angles(angles: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The layers with the smallest angles between input and output (ShortGPT's block influence).

    Men et al. 2024 (arXiv 2403.03853) rank by the mean of ``1 - cos`` instead of the mean angle;
    for one sample the order is the same.

    Args:
        angles: Mean angle between every pair of states, input of the first layer first
            (:class:`layers.LayerAngles`): one more than there are layers.
        count: Layers to remove.

    Example:
        >>> smallest_angles([[0.0, 0.4, 0.5], [0.4, 0.0, 0.1], [0.5, 0.1, 0.0]], 1)
        (1,)
    """
    layers = _check_square(angles, "angles") - 1
    _check_removable(count, layers)
    order = sorted(range(layers), key=lambda layer: (angles[layer][layer + 1], layer))
    return tuple(sorted(order[:count]))


def smallest_angle_run(angles: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The run of ``count`` layers with the smallest angle between its input and output.

    Gromov et al. 2024 (arXiv 2403.17887): the angle between the states ``l`` and ``l + count``.

    Args:
        angles: Mean angle between every pair of states, input of the first layer first.
        count: Layers to remove.

    Example:
        >>> smallest_angle_run([[0.0, 0.4, 0.5], [0.4, 0.0, 0.1], [0.5, 0.1, 0.0]], 1)
        (1,)
    """
    layers = _check_square(angles, "angles") - 1
    _check_removable(count, layers)
    first = min(range(layers - count + 1), key=lambda at: (angles[at][at + count], at))
    return tuple(range(first, first + count))


def last_layers(layers: int, count: int) -> tuple[int, ...]:
    """The top ``count`` layers.

    Example:
        >>> last_layers(6, 2)
        (4, 5)
    """
    _check_removable(count, layers)
    return tuple(range(layers - count, layers))


def random_layers(layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """Any ``count`` layers; the same ones for the same seed.

    Example:
        >>> random_layers(6, 2, seed=1) == random_layers(6, 2, seed=1)
        True
    """
    _check_removable(count, layers)
    return tuple(sorted(random.Random(seed).sample(range(layers), count)))  # noqa: S311


def _layers(value: object) -> tuple[int, ...]:
    return tuple(whole(layer) for layer in listed(value))


def _read_losses(state: object, layers: Sequence[int]) -> LayerLosses:
    found = mapping(state, [f.name for f in fields(LayerLosses)])
    single = listed(found["single"], len(layers))
    removed = _layers(found["removed"])
    if not set(removed) <= set(layers):
        raise ValueError("the loss is that without an unknown layer")
    return LayerLosses(
        whole=number(found["whole"]),
        single=tuple(None if loss is None else number(loss) for loss in single),
        removed=removed,
        after=number(found["after"]),
        measured=whole(found["measured"]),
    )


def _check_removable(count: int, layers: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < layers:
        raise PruningError(
            f"count={count!r}; expected a whole number of layers to remove, from 0 and below the "
            f"{layers} there are."
        )


LayerCriterion = Literal["cka", "measured_loss", "angle", "angular_run", "last", "random"]
"""``"cka"``: clusters of similar layers (MPruner); ``"measured_loss"``: the layers without which
the loss is lowest (:func:`layer_losses.cheapest_removal`); ``"angle"``: the layers with the
smallest angles between input and output (ShortGPT); ``"angular_run"``: the run of layers with the
smallest angle (Gromov et al.); ``"last"``: the top ones; ``"random"``: any."""


@dataclass(frozen=True)
class StackCut:
    """What was decided about one stack, all layers as numbered when the model was built.

    Args:
        name: Path of the stack.
        before: Layers before.
        after: Layers that stay.
        similarity: CKA of every pair of layers before.
        clusters: Runs of similar layers; single layers unless the criterion is ``"cka"``.
        criterion: The :data:`LayerCriterion`.
        threshold: Least similarity of a layer to the first of its cluster (``"cka"``).
        every: Of each cluster every ``every``-th layer is removed, never the first.
        losses: What the loss is without layers (``"measured_loss"``).
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    similarity: Matrix
    clusters: tuple[Cluster, ...]
    criterion: str
    threshold: float
    every: int = 1
    losses: LayerLosses | None = None

    @property
    def removed(self) -> tuple[int, ...]:
        """Layers that are removed."""
        return tuple(layer for layer in self.before if layer not in self.after)

    @classmethod
    def read(cls, state: object) -> StackCut:
        """Read what :func:`dataclasses.asdict` made, also after a checkpoint or JSON.

        Raises:
            TypeError: If a part is of another type.
            ValueError: If it is no such cut.
        """
        found = mapping(state, [f.name for f in fields(cls)])
        before = _layers(found["before"])
        after = _layers(found["after"])
        clusters = tuple(_layers(cluster) for cluster in listed(found["clusters"]))
        if not before or len(set(before)) < len(before) or not set(after) <= set(before):
            raise ValueError(f"{len(after)} layers stay of {len(before)}, or one occurs twice")
        if not all(cluster and set(cluster) <= set(before) for cluster in clusters):
            raise ValueError("a cluster is empty or holds an unknown layer")
        rows = listed(found["similarity"], len(before))
        return cls(
            name=text(found["name"]),
            before=before,
            after=after,
            similarity=tuple(tuple(map(number, listed(row, len(before)))) for row in rows),
            clusters=clusters,
            criterion=text(found["criterion"]),
            threshold=number(found["threshold"]),
            every=whole(found["every"], low=1),
            losses=None if found["losses"] is None else _read_losses(found["losses"], before),
        )


@dataclass(frozen=True)
class LayerSelector:
    """Selects the layers to remove.

    Args:
        threshold: Least CKA with the first layer of a cluster, above 0 and up to 1; None takes the
            :func:`cheapest_clusters` that lead to ``target``.
        target: Fewest layers that stay in every stack; None leaves it to the threshold.
        criterion: The :data:`LayerCriterion`.
        seed: Seed of ``"random"``.

    Raises:
        PruningError: If an option is out of range, or the criterion needs a target.

    Example:
        >>> similarity = ((1.0, 0.99, 0.9), (0.99, 1.0, 0.97), (0.9, 0.97, 1.0))
        >>> compared = LayerComparison((0, 1, 2), similarity, angles=((0.0,) * 4,) * 4)
        >>> LayerSelector().choose("layers", compared).removed
        (1,)
        >>> LayerSelector(None, target=1).choose("layers", compared).removed
        (1, 2)
    """

    threshold: float | None = 0.98
    target: int | None = None
    criterion: LayerCriterion = "cka"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, get_args(LayerCriterion))
        if self.threshold is not None:
            clusters_of(((1.0,),), self.threshold)
        if self.target is not None:
            check_count("target_layers", self.target, least=1)
        elif self.threshold is None or self.criterion != "cka":
            raise PruningError(
                f"criterion={self.criterion!r}, threshold={self.threshold} do not determine how "
                "many layers to remove; expected target_layers too."
            )

    def number_to_remove(
        self, compared: LayerComparison, progress: float = 1.0, built: int = 0
    ) -> int:
        """Most layers of a stack that may go now.

        Args:
            compared: How similar its layers are.
            progress: Share of the way from the stack as built to the target.
            built: Layers as built; default: those that were compared.

        Example:
            >>> compared = LayerComparison((0, 1, 2, 3), ((1.0,) * 4,) * 4, ((0.0,) * 5,) * 5)
            >>> LayerSelector(None, target=2).number_to_remove(compared, progress=0.5)
            1
        """
        count, size = len(compared.layers), built or len(compared.layers)
        if self.target is None:
            return count
        left = size - round(max(0, size - self.target) * progress)
        return max(0, count - max(left, compared.fixed, 1))

    def choose(
        self,
        name: str,
        compared: LayerComparison,
        *,
        every: int = 1,
        progress: float = 1.0,
        built: int = 0,
    ) -> StackCut:
        """Select the layers of a stack to remove now.

        Args:
            name: Path of the stack.
            compared: How similar its layers are.
            every: Of each cluster every ``every``-th layer is removed (``"cka"``).
            progress: Share of the way from the stack as built to the target.
            built: Layers as built; default: those that were compared.

        Raises:
            PruningError: If no loss was measured without so many layers (``"measured_loss"``).
        """
        most = self.number_to_remove(compared, progress, built)
        clusters: list[Cluster] = [(place,) for place in range(len(compared.layers))]
        threshold = self.threshold or 0.0
        if self.criterion == "cka":
            if self.threshold is not None:
                clusters = clusters_of(compared.similarity, self.threshold)
            elif most:
                clusters = cheapest_clusters(compared.similarity, most, compared.fixed)
                threshold = min(compared.similarity[c[0]][place] for c in clusters for place in c)
            removed = _most_similar(clusters, every, compared, most)
        else:
            removed = set(self._without_clusters(name, compared, most))
        places = compared.layers
        return StackCut(
            name=name,
            before=places,
            after=tuple(layer for place, layer in enumerate(places) if place not in removed),
            similarity=compared.similarity,
            clusters=tuple(tuple(places[place] for place in cluster) for cluster in clusters),
            criterion=self.criterion,
            threshold=threshold,
            every=every,
            losses=compared.losses if self.criterion == "measured_loss" else None,
        )

    def _without_clusters(self, name: str, compared: LayerComparison, count: int) -> Sequence[int]:
        """Places of ``count`` layers by the other criteria, none of the fixed ones."""
        fixed = compared.fixed
        if self.criterion == "measured_loss":
            removed = compared.losses.removed if compared.losses else ()
            if len(removed) != count:
                raise PruningError(
                    f"The loss of a model without {counted(count, 'layer')} of {name!r} was not "
                    f"measured, but without {len(removed)}; expected losses of the same number. "
                    "Validate again."
                )
            return [compared.layers.index(layer) for layer in removed]
        angles = [row[fixed:] for row in compared.angles[fixed:]]
        layers = len(compared.layers) - fixed
        if count >= layers:  # all that are free
            return range(fixed, fixed + layers)
        if self.criterion == "angle":
            found = smallest_angles(angles, count)
        elif self.criterion == "angular_run":
            found = smallest_angle_run(angles, count)
        elif self.criterion == "last":
            found = last_layers(layers, count)
        else:
            found = random_layers(layers, count, self.seed)
        return [place + fixed for place in found]


def _most_similar(
    clusters: Sequence[Cluster], every: int, compared: LayerComparison, most: int
) -> set[int]:
    """At most so many redundant layers, those most similar to the first of their cluster."""
    first = {place: cluster[0] for cluster in clusters for place in cluster}
    free = [place for place in redundant_layers(clusters, every) if place >= compared.fixed]
    free.sort(key=lambda place: (-compared.similarity[first[place]][place], place))
    return set(free[:most])
