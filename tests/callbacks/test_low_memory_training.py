"""The callback with sums in temporary files: the same run, straight, resumed and on two ranks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lightning_mi_prune.core import spilling
from tests.support.runs import POINTS, fit, resumed_equals_straight

LOW = {"memory": "low"}
pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spilling, "_SMALLEST", 1)


def test_a_run_in_low_memory_is_the_same_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, ordinary = fit(tmp_path)
    with caplog.at_level(logging.INFO):
        _, _, low = fit(tmp_path, pruning=LOW)
    assert low.digests == ordinary.digests
    assert sum("memory='low'" in record.message for record in caplog.records) == 1


def test_a_resumed_run_in_low_memory_equals_the_straight_one(tmp_path: Path) -> None:
    """No checkpoint holds samples: where they are needed the validation runs again."""
    found = resumed_equals_straight(tmp_path, POINTS, pruning=LOW)
    assert not any(found.values()), found


def test_validation_inside_an_epoch_is_run_again(tmp_path: Path) -> None:
    points = {name: POINTS[name] for name in ("inside an epoch", "after its last batch")}
    found = resumed_equals_straight(tmp_path, points, pruning=LOW, val_check_interval=2)
    assert not any(found.values()), found
