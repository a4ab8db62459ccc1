"""The callback with sums in temporary files: the same run, straight, resumed and on two ranks."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lightning_mi_prune.callbacks import units
from lightning_mi_prune.core import spilling
from tests.support.boring import trainer
from tests.support.pruning import pruning_units
from tests.support.runs import POINTS, Module, fit, resumed_equals_straight

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


def test_positions_follow_the_model_of_each_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first fit needed is not what a later one was asked for."""
    pruning = pruning_units(sparsity=0.5, multiple=2, verbose=False)
    found = []
    for enough in (9000, 10_000):
        monkeypatch.setattr(units, "positions_while_training", lambda _, n=enough: n)
        trainer(pruning, max_epochs=2, num_sanity_val_steps=0).fit(Module())
        strategy = pruning.engine.strategy
        found.append((strategy._calibration.positions, strategy._stored))
    assert found == [(9000, 4500), (10_000, 5000)]
