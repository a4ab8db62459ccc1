"""Which layers may go: clusters of what is alike, and the rivals' choices."""

from __future__ import annotations

import pytest

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.redundancy import clusters_of, loosest, redundant
from lightning_mi_prune.rivals import closest_run, last_layers, least_turning, random_layers

ALIKE = [
    [1.00, 0.99, 0.98, 0.90, 0.50],
    [0.99, 1.00, 0.99, 0.99, 0.60],
    [0.98, 0.99, 1.00, 0.99, 0.70],
    [0.90, 0.99, 0.99, 1.00, 0.98],
    [0.50, 0.60, 0.70, 0.98, 1.00],
]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.98, [(0, 1, 2), (3, 4)]),  # 3 is alike to 2, but not to the first of the cluster
        (0.995, [(0,), (1,), (2,), (3,), (4,)]),
        (0.5, [(0, 1, 2, 3, 4)]),
        (1, [(0,), (1,), (2,), (3,), (4,)]),
    ],
)
def test_clusters_are_runs_alike_to_their_first(threshold, expected):
    assert clusters_of(ALIKE, threshold) == expected


def test_of_a_cluster_every_kth_goes_and_never_the_first():
    clusters = [(0, 1, 2, 3, 4, 5, 6, 7), (8,)]
    assert redundant(clusters) == (1, 2, 3, 4, 5, 6, 7)
    assert redundant(clusters, 2) == (1, 3, 5, 7)
    assert redundant(clusters, 3) == (1, 4, 7)
    assert redundant([(0,), (1,)]) == ()


@pytest.mark.parametrize("threshold", [0, -1, 98, 1.01, float("nan"), True, "0.9"])
def test_a_threshold_out_of_range_is_named(threshold):
    with pytest.raises(PruningError, match="threshold="):
        clusters_of(ALIKE, threshold)


def test_a_matrix_that_is_none_is_refused():
    with pytest.raises(PruningError, match="square"):
        clusters_of([[1.0, 0.5]])
    with pytest.raises(PruningError, match="square"):
        clusters_of([])
    with pytest.raises(PruningError, match=r"Rows \[1\] of similarity are not finite"):
        clusters_of([[1.0, 0.5], [float("nan"), 1.0]])
    with pytest.raises(PruningError, match="every=0"):
        redundant([(0, 1)], 0)


# Angles between the input of four layers and their outputs: the third turns least by itself, the
# first two together.
ANGLES = [
    [0.00, 0.20, 0.15, 0.30, 0.50],
    [0.20, 0.00, 0.22, 0.25, 0.45],
    [0.15, 0.22, 0.00, 0.10, 0.35],
    [0.30, 0.25, 0.10, 0.00, 0.30],
    [0.50, 0.45, 0.35, 0.30, 0.00],
]


def test_rivals_choose_what_their_papers_say():
    assert least_turning(ANGLES, 1) == closest_run(ANGLES, 1) == (2,)
    assert least_turning(ANGLES, 2) == (0, 2)
    assert closest_run(ANGLES, 2) == (0, 1)
    assert closest_run(ANGLES, 3) == (0, 1, 2)
    assert last_layers(4, 2) == (2, 3)
    assert last_layers(4, 0) == least_turning(ANGLES, 0) == ()


def test_any_layers_are_the_same_for_the_same_seed():
    draws = {random_layers(12, 4, seed) for seed in range(20)}
    assert len(draws) > 10
    assert random_layers(12, 4, 3) == random_layers(12, 4, 3)
    assert all(len(set(d)) == 4 and d == tuple(sorted(d)) for d in draws)


@pytest.mark.parametrize("count", [-1, 4, True, 1.5])
def test_a_count_out_of_range_is_named(count):
    for choose in (lambda: least_turning(ANGLES, count), lambda: closest_run(ANGLES, count)):
        with pytest.raises(PruningError, match=r"count=.*below the 4"):
            choose()
    for choose in (lambda: last_layers(4, count), lambda: random_layers(4, count)):
        with pytest.raises(PruningError, match=r"count=.*below the 4"):
            choose()


def test_the_loosest_threshold_lets_enough_go_or_as_many_as_any():
    assert loosest(ALIKE, 3) == 0.98
    assert loosest(ALIKE, 4) == 0.5
    noise = [[1.0, -0.1, 0.0], [-0.1, 1.0, 0.05], [0.0, 0.05, 1.0]]
    assert loosest(noise, 2) == 0.05
    assert clusters_of(noise, loosest(noise, 2)) == [(0,), (1, 2)]
