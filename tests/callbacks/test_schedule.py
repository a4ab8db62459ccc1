from __future__ import annotations

import pytest

from lightning_mi_prune.callbacks.schedule import CutSchedule, fit_schedule
from lightning_mi_prune.core.errors import PruningError


@pytest.mark.parametrize("length", [2, 2.5, 3, 4, 5, 7, 8, 10, 30, 100.9])
@pytest.mark.parametrize("ramp", ["cubic", "linear", "one_shot"])
def test_by_itself_it_ends_half_way_and_leaves_an_epoch(length, ramp):
    schedule = fit_schedule(length, 0.7, ramp=ramp)
    assert schedule.epochs[0] >= 1
    assert schedule.epochs[-1] <= length / 2
    assert schedule.epochs[-1] + 1 <= length
    assert schedule.sparsities[-1] == pytest.approx(0.7)
    assert list(schedule.epochs) == sorted(set(schedule.epochs))
    assert list(schedule.sparsities) == sorted(set(schedule.sparsities))


def test_ramps():
    assert fit_schedule(8, 0.8, ramp="one_shot") == CutSchedule((1,), (0.8,))
    assert fit_schedule(8, 0.8, ramp="linear", cuts=2) == CutSchedule((1, 4), (0.4, 0.8))
    cubic = fit_schedule(8, 0.8, ramp="cubic").sparsities
    steps = [b - a for a, b in zip((0, *cubic), cubic, strict=False)]
    assert steps == sorted(steps, reverse=True)


def test_epochs_by_hand():
    assert fit_schedule(10, 0.5, first_epoch=3, last_epoch=8, cuts=2).epochs == (3, 8)
    assert fit_schedule(10, 0.5, ramp="one_shot", first_epoch=4).epochs == (4,)
    assert fit_schedule(10, 0.5, ramp="one_shot", last_epoch=4).epochs == (4,)


def test_a_single_late_cut_comes_half_way():
    assert fit_schedule(7, 1.0, cuts=1, late=True).epochs == (3,)
    assert fit_schedule(7, 1.0, cuts=1, late=True, first_epoch=2).epochs == (2,)
    assert fit_schedule(7, 1.0, cuts=1).epochs == (1,)


def test_only_epochs_after_a_validation():
    assert fit_schedule(12, 0.5, every=2).epochs == (2, 4, 6)


def test_due():
    schedule = CutSchedule((1, 3), (0.2, 0.5))
    assert [schedule.due(e, 0) for e in range(5)] == [None, 0.2, 0.2, 0.5, 0.5]
    assert [schedule.due(e, 0.2) for e in range(5)] == [None, None, None, 0.5, 0.5]
    assert schedule.due(4, 0.5) is None
    assert schedule.left(0) == (1, 3)
    assert schedule.left(0.2) == (3,)


@pytest.mark.parametrize(
    ("length", "options", "message"),
    [
        (1, {}, "lasts 1 epoch; expected at least 2"),
        (1.5, {}, "lasts 1.5 epochs"),
        (5, {"last_epoch": 5}, "leaves no epoch to recover"),
        (5, {"first_epoch": 4}, "first_epoch=4 comes after the last cut at epoch 2 of 5 epochs"),
        (9, {"last_epoch": 2, "begin": 5}, "The next epoch to cut in, 6, comes after"),
        (2, {"begin": 1}, "lasts 1 epoch;"),
        (5, {"cuts": 3}, r"only the epochs \[1, 2\]"),
        (4, {"every": 3}, "No validation runs before and after epochs 1 to 2"),
    ],
)
def test_schedules_that_do_not_fit(length, options, message):
    with pytest.raises(PruningError, match=message):
        fit_schedule(length, 0.5, **options)
