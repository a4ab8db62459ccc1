"""Steps of pruning: every one that begins ends, and reaches its total."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lightning_mi_prune import discover, prune
from lightning_mi_prune.allocation.measuring import measure_table
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.progress import SILENT, is_shown, progress_step, showing
from lightning_mi_prune.pruner import prune_sizes
from tests.support.steps import Events


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def loss(model, batch):
    return model(batch).square().mean()


BATCHES = [torch.randn(300, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_every_step_of_a_prune_ends_and_reaches_its_total():
    events = Events()
    with showing(events):
        result = prune(net(), BATCHES, 0.5, loss=loss)
    events.check()
    found = {step.name: step for step in events.steps}
    assert [*found] == ["discovery", "calibration", "gradients", "ranking", "reconstruction"]
    assert (found["calibration"].total, found["gradients"].total) == (4, 4)
    assert found["ranking"].total == len(result.groups)
    assert found["discovery"].total is None


def test_measuring_latencies_is_a_step_too():
    events, model = Events(), net()
    calls = {"": RecordedCall((BATCHES[0],), {})}
    groups = discover(model, BATCHES[0]).groups
    with showing(events):
        measure_table(model, groups, calls, clock=lambda calls: dict.fromkeys(calls, 1.0))
    events.check()
    (step,) = events.steps
    assert (step.name, step.unit) == ("latency", "width")
    assert step.total > len(groups)


def test_a_step_that_fails_ends_and_is_not_logged(caplog):
    events = Events()
    with (
        caplog.at_level(logging.INFO, "lightning_mi_prune"),
        showing(events),
        pytest.raises(ValueError, match="stop"),
        progress_step("ranking", "group", 2),
    ):
        raise ValueError("stop")
    (step,) = events.steps
    assert step.failed
    assert [kind for kind, _ in events.all] == ["begin", "end"]
    with pytest.raises(ValueError), progress_step("ranking", "group", 2):
        raise ValueError
    assert caplog.records == []


def test_the_log_has_a_line_for_every_step_with_its_seconds(caplog):
    with caplog.at_level(logging.INFO, "lightning_mi_prune"):
        prune(net(), BATCHES, 0.5, loss=loss, verbose=False)
    lines = [r.getMessage() for r in caplog.records if " in " in r.getMessage()]
    assert [line.partition(":")[0] for line in lines] == [
        "Discovery",
        "Calibration",
        "Gradients",
        "Ranking",
        "Reconstruction",
    ]
    assert all(line.endswith(" s") for line in lines)
    assert "4 batches" in lines[1]


def test_nothing_is_printed_where_there_is_no_terminal(capfd):
    prune(net(), BATCHES, 0.5, loss=loss)
    assert capfd.readouterr() == ("", "")


def test_no_one_shows_anything_while_the_caller_has_a_copy():
    sizes = prune_sizes(net(), BATCHES, [0.25, 0.5], loss=loss)
    next(sizes)
    assert not is_shown()
    with showing(SILENT):
        next(sizes)
        assert is_shown()
    assert not is_shown()
