"""Layers to remove: clusters of similar layers, and the other criteria."""

from __future__ import annotations

import itertools
import random

import pytest

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.importance.layer_criteria import (
    cheapest_clusters,
    clusters_of,
    last_layers,
    random_layers,
    redundant_layers,
    smallest_angle_run,
    smallest_angles,
)

SIMILARITY = [
    [1.00, 0.99, 0.98, 0.90, 0.50],
    [0.99, 1.00, 0.99, 0.99, 0.60],
    [0.98, 0.99, 1.00, 0.99, 0.70],
    [0.90, 0.99, 0.99, 1.00, 0.98],
    [0.50, 0.60, 0.70, 0.98, 1.00],
]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.98, [(0, 1, 2), (3, 4)]),  # 3 is similar to 2, but not to the first of the cluster
        (0.995, [(0,), (1,), (2,), (3,), (4,)]),
        (0.5, [(0, 1, 2, 3, 4)]),
        (1, [(0,), (1,), (2,), (3,), (4,)]),
    ],
)
def test_clusters_are_runs_similar_to_their_first(threshold, expected):
    assert clusters_of(SIMILARITY, threshold) == expected


def test_of_a_cluster_every_kth_is_removed_and_never_the_first():
    clusters = [(0, 1, 2, 3, 4, 5, 6, 7), (8,)]
    assert redundant_layers(clusters) == (1, 2, 3, 4, 5, 6, 7)
    assert redundant_layers(clusters, 2) == (1, 3, 5, 7)
    assert redundant_layers(clusters, 3) == (1, 4, 7)
    assert redundant_layers([(0,), (1,)]) == ()


@pytest.mark.parametrize("threshold", [0, -1, 98, 1.01, float("nan"), True, "0.9"])
def test_a_threshold_out_of_range_is_named(threshold):
    with pytest.raises(PruningError, match="threshold="):
        clusters_of(SIMILARITY, threshold)


def test_a_malformed_matrix_is_refused():
    with pytest.raises(PruningError, match="square"):
        clusters_of([[1.0, 0.5]])
    with pytest.raises(PruningError, match="square"):
        clusters_of([])
    with pytest.raises(PruningError, match=r"Rows \[1\] of similarity are not finite"):
        clusters_of([[1.0, 0.5], [float("nan"), 1.0]])
    with pytest.raises(PruningError, match="every=0"):
        redundant_layers([(0, 1)], 0)


# Angles between the input of four layers and their outputs: that of the third is the smallest of
# a single layer, that of the first two the smallest of a pair.
ANGLES = [
    [0.00, 0.20, 0.15, 0.30, 0.50],
    [0.20, 0.00, 0.22, 0.25, 0.45],
    [0.15, 0.22, 0.00, 0.10, 0.35],
    [0.30, 0.25, 0.10, 0.00, 0.30],
    [0.50, 0.45, 0.35, 0.30, 0.00],
]


def test_other_criteria_choose_as_in_their_papers():
    assert smallest_angles(ANGLES, 1) == smallest_angle_run(ANGLES, 1) == (2,)
    assert smallest_angles(ANGLES, 2) == (0, 2)
    assert smallest_angle_run(ANGLES, 2) == (0, 1)
    assert smallest_angle_run(ANGLES, 3) == (0, 1, 2)
    assert last_layers(4, 2) == (2, 3)
    assert last_layers(4, 0) == smallest_angles(ANGLES, 0) == ()


def test_random_layers_are_the_same_for_the_same_seed():
    draws = {random_layers(12, 4, seed) for seed in range(20)}
    assert len(draws) > 10
    assert random_layers(12, 4, 3) == random_layers(12, 4, 3)
    assert all(len(set(d)) == 4 and d == tuple(sorted(d)) for d in draws)


@pytest.mark.parametrize("count", [-1, 4, True, 1.5])
def test_a_count_out_of_range_is_named(count):
    for choose in (
        lambda: smallest_angles(ANGLES, count),
        lambda: smallest_angle_run(ANGLES, count),
    ):
        with pytest.raises(PruningError, match=r"count=.*below the 4"):
            choose()
    for choose in (lambda: last_layers(4, count), lambda: random_layers(4, count)):
        with pytest.raises(PruningError, match=r"count=.*below the 4"):
            choose()


def every_way(size, count, fixed):
    """All ways to lose so many layers, as clusters."""
    for gone in itertools.combinations(range(max(1, fixed), size), count):
        starts = [place for place in range(size) if place not in gone]
        ends = [*starts[1:], size]
        yield [tuple(range(a, b)) for a, b in zip(starts, ends, strict=True)]


def loss(similarity, clusters):
    return sum((len(c) - 1) * (1 - similarity[c[0]][c[-1]]) for c in clusters)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fixed", [0, 1, 2])
def test_the_cheapest_clusters_are_the_best_of_all(seed, fixed):
    draw = random.Random(seed)  # noqa: S311
    size = 7
    similarity = [[1.0] * size for _ in range(size)]
    for a, b in itertools.combinations(range(size), 2):
        similarity[a][b] = similarity[b][a] = draw.uniform(-0.1, 1)
    for count in range(size - max(1, fixed) + 1):
        found = cheapest_clusters(similarity, count, fixed)
        assert sum(len(c) - 1 for c in found) == count
        assert [place for cluster in found for place in cluster] == list(range(size))
        ways = [loss(similarity, way) for way in every_way(size, count, fixed)]
        assert loss(similarity, found) == pytest.approx(min(ways))
    with pytest.raises(PruningError, match=f"expected at most {size - max(1, fixed)}"):
        cheapest_clusters(similarity, size - max(1, fixed) + 1, fixed)


def test_copies_are_removed_together_and_others_one_by_one():
    copies = [[1.0, 1.0, 1.0, 0.9], [1.0, 1.0, 1.0, 0.9], [1.0, 1.0, 1.0, 0.9], [0.9] * 3 + [1.0]]
    assert cheapest_clusters(copies, 2) == [(0, 1, 2), (3,)]
    far = [[1.0, 0.94, 0.83, 0.6], [0.94, 1.0, 0.91, 0.7], [0.83, 0.91, 1.0, 0.82]]
    assert cheapest_clusters([*far, [0.6, 0.7, 0.82, 1.0]], 2) == [(0, 1), (2, 3)]
