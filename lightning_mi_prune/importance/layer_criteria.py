"""Which layers of a stack go, by one of five criteria (no torch)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from lightning_mi_prune.calibration.data import LayerComparison, Matrix
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.untrusted import listed, mapping, number, text, whole

__all__ = [
    "Cluster",
    "LayerCriterion",
    "LayerSelector",
    "StackCut",
    "cheapest",
    "closest_run",
    "clusters_of",
    "last_layers",
    "least_turning",
    "random_layers",
    "redundant",
    "square",
]

Cluster = tuple[int, ...]


def clusters_of(similarity: Sequence[Sequence[float]], threshold: float = 0.98) -> list[Cluster]:
    """Runs of neighbouring layers, each as alike to the first of its run as the threshold asks.

    The leader scan of MPruner (Hu et al. 2024, arXiv 2408.13482; read off the authors' script): a
    layer joins while it is alike to the *first* of the cluster, else it begins the next.

    Args:
        similarity: Likeness of every pair of layers, bottom to top, 1 for copies.
        threshold: Least likeness to the first of a cluster, above 0 and up to 1.

    Raises:
        PruningError: If the threshold is out of range, or the matrix is not one of layers.

    Example:
        >>> alike = [[1.0, 0.99, 0.7], [0.99, 1.0, 0.99], [0.7, 0.99, 1.0]]
        >>> clusters_of(alike, 0.98)
        [(0, 1), (2,)]
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)):
        raise PruningError(f"threshold={threshold!r}; expected a number above 0 and up to 1.")
    if not 0 < threshold <= 1:
        raise PruningError(
            f"threshold={threshold}; expected a likeness above 0 and up to 1, such as 0.98 "
            "(not a percentage)."
        )
    count = square(similarity, "similarity")
    found = [[0]]
    for layer in range(1, count):
        if similarity[found[-1][0]][layer] >= threshold:
            found[-1].append(layer)
        else:
            found.append([layer])
    return [tuple(cluster) for cluster in found]


def redundant(clusters: Sequence[Cluster], every: int = 1) -> tuple[int, ...]:
    """The layers that may go: of each cluster ``cluster[1::every]``, never the first.

    Args:
        clusters: Clusters of layers.
        every: 1 leaves only the first of each cluster, 2 drops every second layer, and so on.

    Raises:
        PruningError: If ``every`` is no whole number from 1.

    Example:
        >>> redundant([(0, 1, 2, 3), (4,), (5, 6)]), redundant([(0, 1, 2, 3), (4,), (5, 6)], 2)
        ((1, 2, 3, 6), (1, 3, 6))
    """
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise PruningError(f"every={every!r}; expected a whole number from 1.")
    return tuple(sorted(layer for cluster in clusters for layer in cluster[1::every]))


def cheapest(similarity: Sequence[Sequence[float]], count: int, fixed: int = 0) -> list[Cluster]:
    """The clusters that can lose ``count`` layers, all but the first of each, at the least loss.

    A cluster that loses ``n`` layers is charged ``n (1 - CKA)`` of its first and its last layer:
    the first has to say alone what all of them said, and that gets harder with every layer.

    Args:
        similarity: Likeness of every pair of layers.
        count: Layers that shall go, fewer than there are.
        fixed: Layers at the bottom that must stay.

    Raises:
        PruningError: If so many cannot go.

    Example:
        >>> alike = [[1.0, 0.94, 0.83, 0.6], [0.94, 1.0, 0.9, 0.7], [0.83, 0.9, 1.0, 0.8]]
        >>> cheapest([*alike, [0.6, 0.7, 0.8, 1.0]], 2)
        [(0, 1), (2, 3)]
    """
    size = square(similarity, "similarity")
    best: dict[tuple[int, int], tuple[float, list[Cluster]]] = {(0, 0): (0.0, [])}
    for end in range(1, size + 1):
        for first in range(end):
            more = end - 1 - first
            if more and first + 1 < fixed:
                continue
            charge = more * (1 - similarity[first][end - 1])
            for gone in range(count - more + 1):
                loss, clusters = best.get((first, gone), (math.inf, []))
                found = (loss + charge, [*clusters, tuple(range(first, end))])
                known = best.get((end, gone + more), (math.inf, []))
                best[end, gone + more] = min(known, found, key=lambda pair: pair[0])
    loss, clusters = best.get((size, count), (math.inf, []))
    if math.isinf(loss):
        raise PruningError(
            f"{count} of {counted(size, 'layer')} cannot go, {fixed} of them must stay; expected "
            f"at most {size - max(1, fixed)}."
        )
    return clusters


def square(matrix: Sequence[Sequence[float]], name: str) -> int:
    """Rows of a matrix of finite numbers, as many as columns."""
    count = len(matrix)
    if not count or any(len(row) != count for row in matrix):
        raise PruningError(
            f"{name} has {count} rows of {[len(row) for row in matrix]} numbers; expected a square "
            "matrix, a row a layer."
        )
    odd = [i for i, row in enumerate(matrix) if not all(map(math.isfinite, row))]
    if odd:
        raise PruningError(f"Rows {odd} of {name} are not finite; nothing can be said of them.")
    return count


def least_turning(angles: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The layers that turn their input least, each by itself (ShortGPT's block influence).

    Men et al. 2024 (arXiv 2403.03853) rank by ``1 - cos`` of input and output; the angle gives the
    same order for one sample, and is what is averaged here.

    Args:
        angles: Mean angle between every pair of states, input of the first layer first
            (:class:`layer_similarity.LayerAngles`): one more than there are layers.
        count: Layers to remove.

    Example:
        >>> least_turning([[0.0, 0.4, 0.5], [0.4, 0.0, 0.1], [0.5, 0.1, 0.0]], 1)
        (1,)
    """
    layers = square(angles, "angles") - 1
    check_count(count, layers)
    rotated = [angles[layer][layer + 1] for layer in range(layers)]
    return tuple(sorted(sorted(range(layers), key=lambda layer: (rotated[layer], layer))[:count]))


def closest_run(angles: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The ``count`` neighbouring layers that together turn their input least.

    Gromov et al. 2024 (arXiv 2403.17887): the run from ``l`` with the least distance between the
    states ``l`` and ``l + count``.

    Args:
        angles: Mean angle between every pair of states, input of the first layer first.
        count: Layers to remove.

    Example:
        >>> closest_run([[0.0, 0.4, 0.5], [0.4, 0.0, 0.1], [0.5, 0.1, 0.0]], 1)
        (1,)
    """
    layers = square(angles, "angles") - 1
    check_count(count, layers)
    first = min(range(layers - count + 1), key=lambda at: (angles[at][at + count], at))
    return tuple(range(first, first + count))


def last_layers(layers: int, count: int) -> tuple[int, ...]:
    """The top ``count`` layers.

    Example:
        >>> last_layers(6, 2)
        (4, 5)
    """
    check_count(count, layers)
    return tuple(range(layers - count, layers))


def random_layers(layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """Any ``count`` layers; the same ones for the same seed.

    Example:
        >>> random_layers(6, 2, seed=1) == random_layers(6, 2, seed=1)
        True
    """
    check_count(count, layers)
    return tuple(sorted(random.Random(seed).sample(range(layers), count)))  # noqa: S311


def _layers(value: object) -> tuple[int, ...]:
    return tuple(whole(layer) for layer in listed(value))


def check_count(count: int, layers: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < layers:
        raise PruningError(
            f"count={count!r}; expected whole layers to remove, from 0 and below the {layers} "
            "there are."
        )


LayerCriterion = Literal["cka", "angle", "angular_run", "last", "random"]
"""``"cka"``: clusters of alike layers (MPruner); ``"angle"``: the layers that turn their input
least (ShortGPT); ``"angular_run"``: the run of layers that together turn it least (Gromov et al.);
``"last"``: the top ones; ``"random"``: any."""


@dataclass(frozen=True)
class StackCut:
    """What was decided about one stack, all layers as numbered when the model was built.

    Args:
        name: Path of the stack.
        before: Layers before.
        after: Layers that stay.
        similarity: CKA of every pair of layers before.
        clusters: Runs of alike layers; every layer by itself where clusters decide nothing.
        criterion: What decided.
        threshold: Least likeness to the first of its cluster that a layer has (``"cka"``).
        every: Of each cluster every so manieth layer goes, never the first.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    similarity: Matrix
    clusters: tuple[Cluster, ...]
    criterion: str
    threshold: float
    every: int = 1

    @property
    def removed(self) -> tuple[int, ...]:
        """Layers that go."""
        return tuple(layer for layer in self.before if layer not in self.after)

    @classmethod
    def read(cls, state: object) -> StackCut:
        """What :func:`dataclasses.asdict` made, also through a checkpoint or JSON.

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
            raise ValueError("a cluster is empty or holds a layer that was not there")
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
        )


@dataclass(frozen=True)
class LayerSelector:
    """How the layers that go are chosen.

    Args:
        threshold: Least CKA with the first layer of a cluster, above 0 and up to 1; None takes
            the clusters that lose least on the way to ``target`` (:func:`layer_criteria.cheapest`).
        target: Fewest layers that stay in every stack; None leaves it to the threshold.
        criterion: What decides (:data:`LayerCriterion`).
        seed: Seed of ``"random"``.

    Raises:
        PruningError: If an option is out of range, or the criterion needs a target.

    Example:
        >>> alike = ((1.0, 0.99, 0.9), (0.99, 1.0, 0.97), (0.9, 0.97, 1.0))
        >>> rotated = ((0.0,) * 4,) * 4
        >>> LayerSelector().choose("layers", LayerComparison((0, 1, 2), alike, rotated)).removed
        (1,)
        >>> LayerSelector(None, target=1).choose("layers", LayerComparison((0, 1, 2), alike, rotated)).removed
        (1, 2)
    """

    threshold: float | None = 0.98
    target: int | None = None
    criterion: LayerCriterion = "cka"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in get_args(LayerCriterion):
            raise PruningError(
                f"criterion={self.criterion!r}; expected one of {get_args(LayerCriterion)}."
            )
        if self.threshold is not None:
            clusters_of(((1.0,),), self.threshold)
        target = self.target
        if target is not None and (
            isinstance(target, bool) or not isinstance(target, int) or target < 1
        ):
            raise PruningError(f"target_layers={target!r}; expected a whole number from 1.")
        if target is None and (self.threshold is None or self.criterion != "cka"):
            asked = f"criterion={self.criterion!r}, threshold={self.threshold}"
            raise PruningError(
                f"{asked} says nothing of how many layers go; expected target_layers too."
            )

    def choose(
        self,
        name: str,
        compared: LayerComparison,
        *,
        every: int = 1,
        progress: float = 1.0,
        built: int = 0,
    ) -> StackCut:
        """Which layers of a stack go now.

        Args:
            name: Path of the stack.
            compared: How alike its layers are.
            every: Of each cluster every so manieth layer goes (``"cka"``).
            progress: Share of the way from the stack as built to the target.
            built: Layers as built; default: those that were compared.
        """
        count, size = len(compared.layers), built or len(compared.layers)
        most = count
        if self.target is not None:
            left = size - round(max(0, size - self.target) * progress)
            most = max(0, count - max(left, compared.fixed, 1))
        clusters: list[Cluster] = [(place,) for place in range(count)]
        threshold = self.threshold or 0.0
        if self.criterion == "cka":
            if self.threshold is not None:
                clusters = clusters_of(compared.similarity, self.threshold)
            elif most:
                clusters = cheapest(compared.similarity, most, compared.fixed)
                heads = {place: cluster[0] for cluster in clusters for place in cluster}
                threshold = min(compared.similarity[heads[place]][place] for place in heads)
            gone = _closest(clusters, redundant(clusters, every), compared, most)
        else:
            gone = set(self._rival(compared, most))
        places = compared.layers
        return StackCut(
            name=name,
            before=places,
            after=tuple(layer for place, layer in enumerate(places) if place not in gone),
            similarity=compared.similarity,
            clusters=tuple(tuple(places[place] for place in cluster) for cluster in clusters),
            criterion=self.criterion,
            threshold=threshold,
            every=every,
        )

    def _rival(self, compared: LayerComparison, count: int) -> Sequence[int]:
        """Places of ``count`` layers, none of the fixed ones."""
        fixed = compared.fixed
        angles = [row[fixed:] for row in compared.angles[fixed:]]
        layers = len(compared.layers) - fixed
        if count >= layers:  # all that are free
            return range(fixed, fixed + layers)
        if self.criterion == "angle":
            found = least_turning(angles, count)
        elif self.criterion == "angular_run":
            found = closest_run(angles, count)
        elif self.criterion == "last":
            found = last_layers(layers, count)
        else:
            found = random_layers(layers, count, self.seed)
        return [place + fixed for place in found]


def _closest(
    clusters: Sequence[Cluster], gone: Sequence[int], compared: LayerComparison, most: int
) -> set[int]:
    """At most so many of the layers that may go: those most alike to the first of their cluster."""
    first = {place: cluster[0] for cluster in clusters for place in cluster}
    free = [place for place in gone if place >= compared.fixed]
    free.sort(key=lambda place: (-compared.similarity[first[place]][place], place))
    return set(free[:most])
