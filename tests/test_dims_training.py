"""Dimensions of heads in runs of the Trainer: resumed, reported, beside layers that go."""

from __future__ import annotations

import pytest

from lightning_mi_prune.families import find_axes
from tests.runs import OPTIMIZERS, POINTS, PRECISIONS, fit, resumed_equals_straight

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")
UNITS = ["ffn", "heads", "dims"]
PRUNING = {"units": UNITS, "relevance_steps": 4}
LAST = {name: POINTS[name] for name in ("cut pending, epoch over",)}


def test_a_resumed_run_equals_the_straight_one(tmp_path):
    found = resumed_equals_straight(tmp_path, POINTS, pruning=PRUNING)
    assert found == dict.fromkeys(POINTS, "")


def test_the_report_tells_of_dimensions(tmp_path):
    run, module, _ = fit(tmp_path, pruning={"units": UNITS})
    prune_callback = run.callbacks[0]
    cut = prune_callback.report.cuts[-1]
    assert {axis.kind for axis in cut.axes} == set(UNITS)
    assert cut.sparsity >= 0.5
    assert any(axis.after < axis.before for axis in cut.axes if axis.kind == "dims")
    for axis in find_axes(module):
        if axis.kind == "dims":
            attention = module.get_submodule(axis.counts[0].module)
            assert attention.attention_head_size == prune_callback.plan.width(axis.name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_turned_state_is_resumed_with_every_optimizer(tmp_path, optimizer):
    found = resumed_equals_straight(tmp_path, LAST, optimizer=optimizer, pruning=PRUNING)
    assert found == dict.fromkeys(LAST, "")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_turned_weights_are_resumed_in_every_precision(tmp_path, precision):
    found = resumed_equals_straight(tmp_path, LAST, precision=precision, pruning=PRUNING)
    assert found == dict.fromkeys(LAST, "")


def test_layers_go_first(tmp_path):
    both = {
        "layers": {"threshold": None, "target_layers": 1},
        "pruning": {**PRUNING, "sparsity": 0.75},  # one of two layers is half of it
    }
    found = resumed_equals_straight(tmp_path, LAST, **both)
    assert found == dict.fromkeys(LAST, "")
    run, module, _ = fit(tmp_path, **both)
    assert len(module.model.bert.encoder.layer) == 1
    plan = run.callbacks[0].plan
    assert any(plan.width(a.name) < a.size for a in find_axes(module) if a.kind == "dims")


@pytest.mark.parametrize("budget", [{"target_macs": 60_000}, {"target_parameters": 9_000}])
def test_every_budget_that_knows_dimensions_reaches_them(tmp_path, budget):
    run, module, _ = fit(tmp_path, pruning={**PRUNING, "sparsity": None, **budget})
    plan = run.callbacks[0].plan
    assert any(plan.width(a.name) < a.size for a in find_axes(module) if a.kind == "dims")
