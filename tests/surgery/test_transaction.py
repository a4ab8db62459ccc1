"""Layers and units together: out of a model, back into it, and through its state dict."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.surgery.layers import without_storage
from lightning_mi_prune.surgery.transaction import cancel_cut, cut_model, restore_model
from tests.support.graphs import graph_of, groups_of, stacks_of, tracker_of
from tests.support.models import batch, outputs
from tests.support.runs import sha
from tests.support.stacks import deep_bert

STACK = "bert.encoder.layer"


def parts(model):
    return [*groups_of(model), *stacks_of(model)]


def body():
    model = deep_bert().eval()
    return model, PruningGraph.of(parts(model))


def state(model):
    config = model.config.to_dict()
    return sha(*(x for item in model.state_dict().items() for x in item)), config


def units(graph, plan, share=0.5):
    """A plan that keeps some of the units of the layers that are there."""
    draw = random.Random(0)  # noqa: S311
    groups = [group for group in graph.groups_at(plan) if group.kind != "hidden"]
    counts = {a.name: max(1, int(share * plan.width(a.name))) for a in groups}
    kept = {n: tuple(sorted(draw.sample(plan.kept[n], count))) for n, count in counts.items()}
    return PruningPlan({a.name: a.size for a in groups}, kept)


@pytest.mark.parametrize("order", ["layers first", "units first", "both at once"])
def test_layers_and_units_may_go_in_any_order(order):
    model, graph = body()
    short = graph.keep_layers(graph.full, {STACK: (0, 2, 5)})
    small = units(graph, graph.full)
    kept = {
        name: short.kept[name] and small.kept.get(name, short.kept[name]) for name in short.sizes
    }
    both = PruningPlan(short.sizes, kept)
    steps = {
        "layers first": [short, both],
        "units first": [graph.full.then(small), both],
        "both at once": [both],
    }[order]
    current = graph.full
    for plan in steps:
        current = cut_model(model, graph, plan, current=current).after
    assert current == both
    other = deep_bert().eval()
    cut_model(other, graph, both, current=graph.full)
    assert state(model) == state(other)
    assert torch.equal(outputs(model, batch()), outputs(other, batch()))
    assert model.config.num_hidden_layers == 3


def test_cancelling_puts_the_very_parameters_back():
    model, graph = body()
    before, ids = state(model), [id(p) for p in model.parameters()]
    plan = graph.keep_layers(graph.full.then(units(graph, graph.full)), {STACK: (0, 1)})
    done = cut_model(model, graph, plan, current=graph.full)
    assert len(done.removed_parameters) == 16 * 4
    cancel_cut(model, graph, done)
    after, config = state(model)
    assert (after, config) == before
    assert [id(p) for p in model.parameters()] == ids


def test_recovering_brings_hollow_layers_back_to_the_bit():
    model, graph = body()
    values = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    expected = outputs(model, batch())
    plan = graph.keep_layers(graph.full.then(units(graph, graph.full)), {STACK: (0, 1)})
    done = cut_model(model, graph, plan, current=graph.full)
    available = {
        n: {i: without_storage(x) for i, x in layers.items()} for n, layers in done.removed.items()
    }
    assert all(
        p.is_meta for layers in available.values() for x in layers.values() for p in x.parameters()
    )
    back = restore_model(model, graph, graph.full, values, current=plan, available=available)
    assert back.after == graph.full
    assert torch.equal(outputs(model, batch()), expected)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("precision", [torch.float64, torch.float16, torch.bfloat16])
def test_layers_come_back_in_the_precision_of_those_that_stayed(precision):
    model, graph = body()
    for layer in model.bert.encoder.layer:
        layer.register_buffer("place", torch.arange(3))
        layer.register_buffer("scale", torch.ones(3))
    plan = graph.keep_layers(graph.full, {STACK: (0, 1)})
    done = cut_model(model, graph, plan, current=graph.full)
    available = {
        n: {i: without_storage(x) for i, x in layers.items()} for n, layers in done.removed.items()
    }
    model.to(precision)
    for layer in model.bert.encoder.layer:
        layer.output.LayerNorm.float()  # as some models keep parts of a layer
    values = {n: t.clone() for n, t in model.named_parameters()}
    for place in range(2, 6):
        mine = {n.replace("layer.1.", f"layer.{place}."): t for n, t in values.items()}
        values |= {n: t for n, t in mine.items() if n not in values}
    restore_model(model, graph, graph.full, values, current=plan, available=available)
    first, *others = ({n: t.dtype for n, t in x.state_dict().items()} for x in layers_of(model))
    assert all(other == first for other in others)
    assert first["output.dense.weight"] == first["scale"] == precision
    assert first["output.LayerNorm.weight"] == torch.float32
    assert first["place"] == torch.int64


def layers_of(model):
    return list(model.bert.encoder.layer)


def test_a_snapshot_that_does_not_fit_changes_nothing():
    model, graph = body()
    values = {n: t.clone() for n, t in model.named_parameters()}
    plan = graph.keep_layers(graph.full, {STACK: (0, 1)})
    done = cut_model(model, graph, plan, current=graph.full)
    available = {
        n: {i: without_storage(x) for i, x in layers.items()} for n, layers in done.removed.items()
    }
    before = state(model)
    values.pop("bert.encoder.layer.4.output.dense.bias")
    with pytest.raises(PruningError, match=r"snapshot has no 'bert\.encoder\.layer\.4"):
        restore_model(model, graph, graph.full, values, current=plan, available=available)
    assert state(model) == before


def test_without_available_layers_nothing_is_restored():
    model, graph = body()
    plan = graph.keep_layers(graph.full, {STACK: (0, 1)})
    cut_model(model, graph, plan, current=graph.full)
    with pytest.raises(PruningError, match=r"Layer 2 of .* was removed and no copy"):
        restore_model(model, graph, graph.full, {}, current=plan, available={})
    assert len(model.bert.encoder.layer) == 2


def test_a_layer_that_shares_a_weight_cannot_go():
    model, graph = body()
    layers = model.bert.encoder.layer
    layers[5].output.dense.weight = layers[0].output.dense.weight
    before = state(model)
    with pytest.raises(PruningError, match=r"Layer 5 .* 'output\.dense\.weight' is shared"):
        cut_model(
            model,
            graph,
            graph.keep_layers(graph.full, {STACK: (0, 1)}),
            current=graph.full,
        )
    assert state(model) == before


def test_an_error_while_units_go_puts_layers_back(monkeypatch):
    model, graph = body()
    before = state(model)

    def fail(*args, **options):
        raise RuntimeError("boom")

    monkeypatch.setattr("lightning_mi_prune.surgery.transaction.apply_plan", fail)
    with pytest.raises(RuntimeError, match="boom"):
        cut_model(model, graph, graph.keep_layers(graph.full, {STACK: (1,)}), current=graph.full)
    after, config = state(model)
    assert (after, config) == before


def kept(model):
    return tracker_of(nn.ModuleDict({"net": model}))


def shrink(tracker, layers, share=0.5):
    graph = tracker.graph
    plan = graph.keep_layers(tracker.plan, {f"net.{STACK}": layers})
    plan = plan.then(units(graph, plan, share))
    done = cut_model(tracker.module, graph, plan, current=tracker.plan)
    tracker.store(done.removed)
    tracker.plan = done.after


def test_state_dicts_of_any_depth_and_width_follow_one_another():
    tracker = kept(deep_bert().eval())
    root, saved = tracker.module, []
    for layers, share in (((0, 1, 2, 3, 4, 5), 0.9), ((0, 2, 3, 5), 0.8), ((2, 5), 0.7)):
        shrink(tracker, layers, share)
        saved.append(
            (copy.deepcopy(root.state_dict()), tracker.plan, outputs(root["net"], batch()))
        )
    fresh = kept(deep_bert().eval())
    for owner in (tracker, fresh):
        for place in (0, 2, 1, 0, 1, 2):
            weights, plan, expected = saved[place]
            owner.module.load_state_dict(copy.deepcopy(weights))
            assert owner.plan == plan
            assert torch.equal(outputs(owner.module["net"], batch()), expected)
            depth = len(plan.kept[f"net.{STACK}"])
            assert owner.module["net"].config.num_hidden_layers == depth
    full = {f"net.{n}": t for n, t in deep_bert().state_dict().items()}
    fresh.module.load_state_dict(full)
    assert fresh.plan.is_full


def test_weights_of_other_layers_than_the_plan_says_are_refused():
    tracker = kept(deep_bert())
    shrink(tracker, (0, 2))
    weights = tracker.module.state_dict()
    bad = {n: t for n, t in weights.items() if ".layer.1." not in n}
    fresh = kept(deep_bert())
    before = state(fresh.module["net"])
    with pytest.raises(
        PruningError, match=r"leaves 2 layers of .* holds weights of layers \['0'\]"
    ):
        fresh.module.load_state_dict(bad)
    assert state(fresh.module["net"]) == before


def test_a_tracker_of_the_whole_takes_over_from_that_of_a_part():
    inner = tracker_of(deep_bert().eval())
    graph = inner.graph
    plan = graph.keep_layers(graph.full, {STACK: (0, 3)})
    done = cut_model(inner.module, graph, plan, current=graph.full)
    inner.store(done.removed)
    inner.plan = done.after
    root = nn.ModuleDict({"net": inner.module})
    tracker = PlanTracker.of(root)
    assert tracker.plan.kept[f"net.{STACK}"] == (0, 3)
    top = [group for group in tracker.groups if group.name == f"net.{STACK}.3.ffn"]
    assert top[0].consumers == (f"net.{STACK}.1.output.dense",)
    fresh = kept(deep_bert().eval())
    fresh.module.load_state_dict(root.state_dict())
    assert torch.equal(outputs(fresh.module["net"], batch()), outputs(inner.module, batch()))
    root.load_state_dict({f"net.{n}": t for n, t in deep_bert().state_dict().items()})
    assert len(root["net"].bert.encoder.layer) == 6


def test_groups_found_later_are_named_as_built():
    """What is found on the shortened model."""
    model = deep_bert().eval()
    tracker = PlanTracker(model, PruningGraph(stacks=tuple(stacks_of(model))))
    plan = tracker.graph.keep_layers(tracker.plan, {STACK: (0, 3)})
    tracker.store(cut_model(model, tracker.graph, plan, current=tracker.plan).removed)
    tracker.plan = plan
    tracker.extend(graph_of(model))
    assert PlanTracker.of(model) is tracker
    names = {group.name for group in tracker.groups if group.kind == "ffn"}
    assert names == {f"{STACK}.0.ffn", f"{STACK}.3.ffn"}
    (top,) = (group for group in tracker.groups if group.name == f"{STACK}.3.ffn")
    assert top.consumers == (f"{STACK}.1.output.dense",)
