"""The matrix of docs/matrix.md: all of it in one process, every value of it over two ranks."""

from __future__ import annotations

import re

import pytest

from tests.matrix import EACH, EVERY, PAGE, POINTS, REFUSED, STRATEGIES, compare, run, sentence

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")


@pytest.mark.parametrize("row", EVERY, ids=" ".join)
def test_a_resumed_run_equals_the_straight_one(tmp_path, row):
    found = compare(tmp_path, 1, [row])[row]
    assert set(found) == set(POINTS)
    assert not any(found.values()), found


def test_so_it_does_over_two_ranks(tmp_path):
    found = run(tmp_path, 2, EACH)
    assert set(found) == set(EACH)
    assert not any(cell for row in found.values() for cell in row.values()), found


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
