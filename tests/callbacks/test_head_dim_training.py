"""Dimensions of heads in runs of the Trainer: resumed, reported, beside layers that go."""

from __future__ import annotations

import pytest

from tests.support.graphs import groups_of
from tests.support.runs import OPTIMIZERS, POINTS, PRECISIONS, fit, resumed_equals_straight

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
UNITS = ["ffn", "heads", "head_dim"]
PRUNING = {"kinds": UNITS, "gradient_steps": 4}
LAST = {name: POINTS[name] for name in ("cut pending, epoch over",)}


def test_a_resumed_run_equals_the_straight_one(tmp_path):
    found = resumed_equals_straight(tmp_path, POINTS, pruning=PRUNING)
    assert found == dict.fromkeys(POINTS, "")


def test_the_report_tells_of_dimensions(tmp_path):
    run, module, _ = fit(tmp_path, pruning={"kinds": UNITS})
    prune_callback = run.callbacks[0]
    cut = prune_callback.report.cuts[-1]
    assert {group.kind for group in cut.groups} == set(UNITS)
    assert cut.sparsity >= 0.5
    assert any(group.after < group.before for group in cut.groups if group.kind == "head_dim")
    for group in groups_of(module):
        if group.kind == "head_dim":
            attention = module.get_submodule(group.attributes[0].module)
            assert attention.attention_head_size == prune_callback.plan.width(group.name)


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
    assert any(plan.width(a.name) < a.size for a in groups_of(module) if a.kind == "head_dim")


@pytest.mark.parametrize("budget", [{"target_macs": 60_000}, {"target_parameters": 9_000}])
def test_every_budget_that_knows_dimensions_reaches_them(tmp_path, budget):
    run, module, _ = fit(tmp_path, pruning={**PRUNING, "sparsity": None, **budget})
    plan = run.callbacks[0].plan
    assert any(plan.width(a.name) < a.size for a in groups_of(module) if a.kind == "head_dim")
