"""SPARE    layers that others make up for: clusters of alike ones, and what of them may go."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.wording import counted

__all__ = ["Cluster", "cheapest", "clusters_of", "redundant", "square"]

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
