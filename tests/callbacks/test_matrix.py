"""The matrix of docs/matrix.md: all pairs of values in one process, each value over two ranks."""

from __future__ import annotations

import re

import pytest

from tests.support.matrix import (
    EACH,
    EVERY,
    PAGE,
    REFUSED,
    STRATEGIES,
    compare,
    pairs,
    run,
    sentence,
)
from tests.support.runs import OPTIMIZERS, POINTS, PRECISIONS

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


POINTS_OF = pairs(EVERY)


@pytest.mark.parametrize("row", EVERY, ids=" ".join)
def test_a_resumed_run_equals_the_straight_one(tmp_path, row):
    found = compare(tmp_path, 1, [row], POINTS_OF)[row]
    assert list(found) == POINTS_OF[row]
    assert not any(found.values()), found


def test_so_it_does_over_two_ranks(tmp_path):
    found = run(tmp_path, 2, EACH, POINTS_OF)
    assert set(found) == set(EACH)
    assert all(list(row) == POINTS_OF[name] for name, row in found.items())
    assert not any(cell for row in found.values() for cell in row.values()), found


def test_every_pair_of_values_is_run():
    """``make matrix`` runs every cell; the tests above every pair of values."""
    met = {(value, point) for row in EVERY for value in row for point in POINTS_OF[row]}
    assert met == {(value, point) for value in (*PRECISIONS, *OPTIMIZERS) for point in POINTS}
    over_ranks = {value for row in EACH for value in (*row, *POINTS_OF[row])}
    assert over_ranks == {*PRECISIONS, *OPTIMIZERS, *POINTS}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_one_sentence(name):
    said = sentence(REFUSED[name])
    assert said != "not refused"
    assert len(said) < 250
    assert said in PAGE.read_text()


def test_the_page_shows_the_whole_matrix_and_every_cell_is_equal():
    text = PAGE.read_text()
    for strategy, (_, rows) in STRATEGIES.items():
        part = text.partition(f"## {strategy}\n")[2].partition("\n## ")[0]
        for precision, optimizer in rows:
            assert f"| {precision} | {optimizer} |" + " = |" * len(POINTS) in part
    assert re.search(r"(\d+) of \1 cells are equal", text)
