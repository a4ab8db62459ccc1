"""SPARE    which layers of a stack may go: clusters of alike ones, and the rivals (no torch)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from lightning_mi_prune.errors import PruningError

__all__ = [
    "Cluster",
    "closest_run",
    "clusters_of",
    "last_layers",
    "least_turning",
    "random_layers",
    "redundant",
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
    count = _square(similarity, "similarity")
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


def least_turning(angles: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The layers that turn their input least, each by itself (ShortGPT's block influence).

    Men et al. 2024 (arXiv 2403.03853) rank by ``1 - cos`` of input and output; the angle gives the
    same order for one sample, and is what is averaged here.

    Args:
        angles: Mean angle between every pair of states, input of the first layer first
            (:class:`angles.Angles`): one more than there are layers.
        count: Layers to remove.

    Example:
        >>> least_turning([[0.0, 0.4, 0.5], [0.4, 0.0, 0.1], [0.5, 0.1, 0.0]], 1)
        (1,)
    """
    layers = _square(angles, "angles") - 1
    _check_count(count, layers)
    turned = [angles[layer][layer + 1] for layer in range(layers)]
    return tuple(sorted(sorted(range(layers), key=lambda layer: (turned[layer], layer))[:count]))


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
    layers = _square(angles, "angles") - 1
    _check_count(count, layers)
    first = min(range(layers - count + 1), key=lambda at: (angles[at][at + count], at))
    return tuple(range(first, first + count))


def last_layers(layers: int, count: int) -> tuple[int, ...]:
    """The top ``count`` layers.

    Example:
        >>> last_layers(6, 2)
        (4, 5)
    """
    _check_count(count, layers)
    return tuple(range(layers - count, layers))


def random_layers(layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """Any ``count`` layers; the same ones for the same seed.

    Example:
        >>> random_layers(6, 2, seed=1) == random_layers(6, 2, seed=1)
        True
    """
    _check_count(count, layers)
    return tuple(sorted(random.Random(seed).sample(range(layers), count)))  # noqa: S311


def _square(matrix: Sequence[Sequence[float]], name: str) -> int:
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


def _check_count(count: int, layers: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < layers:
        raise PruningError(
            f"count={count!r}; expected whole layers to remove, from 0 and below the {layers} "
            "there are."
        )
