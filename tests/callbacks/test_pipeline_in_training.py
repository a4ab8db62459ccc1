"""Every budget and unit inside a real Trainer."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_mi_prune import load_pruned
from lightning_mi_prune import pipeline as method
from lightning_mi_prune.allocation.measuring import measure_table
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningWarning
from tests.support.boring import Classifier, trainer
from tests.support.crashing import Falling
from tests.support.graphs import groups_of
from tests.support.pruning import pruning_units

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def fit(epochs=3, family="bert", **options):
    module = Classifier(family=family, validation_rows=256)
    callback = pruning_units(verbose=False, **options)
    run = trainer(callback, max_epochs=epochs)
    run.fit(module)
    return module, callback, run


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": 9000},
        {"target_macs": 70_000},
        {"keep_information": 0.9},
        {"sparsity": 0.5, "relevance": "weights"},
        {"sparsity": 0.5, "relevance": None, "method": "compensation", "widths": "uniform"},
        {
            "sparsity": 0.5,
            "floors": {"heads": 2},
            "caps": {"layer.0.ffn": 0.5},
            "pins": {"1.ffn": 7},
        },
    ],
    ids=lambda options: "-".join(options),
)
def test_it_is_met_by_the_last_cut_and_training_goes_on(options):
    module, callback, run = fit(4, cuts=2, **options)
    cuts = callback.report.cuts
    assert len(cuts) == 2
    assert cuts[0].parameters > cuts[1].parameters == parameters(module)
    budget = callback.method.budget
    if budget.kind == "target_parameters":
        assert cuts[-1].parameters <= 9000
    elif budget.kind == "target_macs":
        assert cuts[-1].macs <= 70_000
    elif budget.kind == "sparsity":
        assert cuts[-1].sparsity >= 0.5
    if "pins" in options:
        widths = {group.name: group.after for group in cuts[-1].groups}
        assert widths["model.bert.encoder.layer.1.ffn"] == 7
        assert widths["model.bert.encoder.layer.0.ffn"] <= 20
        assert all(width >= 2 for name, width in widths.items() if "heads" in name)
    assert run.current_epoch == 4
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("budget", [{"target_macs": 10**9}, {"target_latency_ms": 1e6}])
def test_a_run_that_cuts_nothing_since_its_budget_is_met_says_so(budget, monkeypatch):
    monkeypatch.setattr(method, "measure_table", partial(measure_table, seconds=0.005))
    ((name, value),) = budget.items()
    with pytest.warns(PruningWarning, match="already: no cut. Nothing was cut") as caught:
        _, callback, _ = fit(4, relevance="weights", **budget)
    assert not callback.report.cuts
    said = [str(w.message) for w in caught if "Nothing was cut" in str(w.message)]
    assert len(said) == 1  # at the last goal only
    assert f"{name}={value}" in said[0]
    assert "sparsity" not in said[0]


def test_a_small_model_that_is_trained_on_with_the_same_sparsity_says_so():
    module, _, _ = fit(4, relevance="weights", sparsity=0.5)
    again = pruning_units(verbose=False, relevance="weights", sparsity=0.5)
    before = parameters(module)
    with pytest.warns(PruningWarning, match=r"meets sparsity 0\.500 already: no cut. Nothing was"):
        trainer(again, max_epochs=4).fit(module)
    assert parameters(module) == before


def test_a_cut_that_is_taken_back_is_named_by_its_budget(caplog):
    module = Classifier(validation_rows=256)
    callback = pruning_units(
        target_macs=70_000,
        relevance="weights",
        verbose=False,
        max_drop=1e-9,
        monitor="val_falling",
        first_epoch=1,
        cuts=1,
    )
    run = trainer(callback, max_epochs=4)
    run.callbacks.insert(0, Falling())
    with caplog.at_level("INFO"):
        run.fit(module)
    assert callback.report.undone
    said = [r.getMessage() for r in caplog.records if "rolled back" in r.getMessage()]
    assert said
    assert said[0].startswith("The cut of epoch 1 to target_macs=70000 cost more than")


def test_a_goal_that_a_cut_of_the_run_has_met_is_no_warning(recwarn):
    _, callback, _ = fit(8, relevance="weights", sparsity=0.5, multiple=40, cuts=4, kinds=["ffn"])
    assert 0 < len(callback.report.cuts) < 4  # steps of 40 neurons are coarser than four goals
    assert not [w for w in recwarn if "Nothing was cut" in str(w.message)]


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "albert", "mpnet"])
def test_the_width_of_the_stream_shrinks_with_its_optimizer(family, tmp_path):
    units = ["ffn", "heads", "hidden"]
    module, callback, run = fit(family=family, sparsity=0.5, kinds=units, pins={"hidden": 16})
    streams = [a for a in callback.report.cuts[-1].groups if a.kind == "hidden"]
    assert {(a.before, a.after) for a in streams} - {(16, 16)} == {(24, 16)}  # words have their own
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    for parameter, state in run.optimizers[0].state.items():
        assert state["exp_avg"].shape == parameter.shape
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_pruned(Classifier(family=family), tmp_path / "small.ckpt").eval()
    batch = next(iter(module.val_dataloader()))
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, module.eval().model(**batch).logits)


def test_whole_sublayers_may_vanish_and_training_goes_on():
    module, callback, run = fit(sparsity=0.93)
    gone = [group.name for group in callback.report.cuts[-1].groups if group.after == 0]
    assert gone
    assert any(group.size for group in groups_of(module))
    before = {n: p.clone() for n, p in module.named_parameters()}
    run.fit_loop.max_epochs += 1
    module.loss(next(iter(module.train_dataloader()))).backward()
    run.optimizers[0].step()
    assert any(not torch.equal(p, before[n]) for n, p in module.named_parameters())


def test_the_order_travels_in_the_checkpoint(tmp_path):
    _module, callback, run = fit(sparsity=0.5)
    run.save_checkpoint(tmp_path / "small.ckpt")
    again = load_pruned(Classifier(), tmp_path / "small.ckpt")

    plan = PlanTracker.of(again).plan
    assert plan.rankings == callback.plan.rankings
    assert set(plan.rankings) == {group.name for group in callback.report.cuts[-1].groups}
    name, ranking = next(iter(plan.rankings.items()))
    assert set(ranking.kept(1)) < set(plan.kept[name])
