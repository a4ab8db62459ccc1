"""Dimensions of heads: what they cost, what is refused, and rare cases."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_mi_prune import PruningError, from_pretrained, prune
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.latency import LatencyCosts
from lightning_mi_prune.allocation.measuring import measure_table
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.options import Constraints, Importance, Latency
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import PruningGraph, choose_groups
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.surgery.transaction import cut_model
from lightning_mi_prune.surgery.units import apply_plan
from tests.allocation.test_latency_table import ruler
from tests.support.graphs import graph_of, groups_of, stacks_of
from tests.support.head_dims import FAMILIES, SMALL, UNITS, lesson, loss, tiny
from tests.support.models import build, entries_of, outputs, partner_of

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
every = pytest.mark.parametrize("family", FAMILIES)


def test_dimensions_cannot_be_ranked_without_gradients():
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        PruningError, match="relevance='weights': ranking its dimensions needs gradients"
    ):
        prune(model, lesson("bert"), 0.5, kinds=UNITS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_milliseconds_are_shared_by_heads_and_their_dimensions(tmp_path):
    """The table's own clock, which counts products, times the model that a budget left."""
    model, inputs = tiny()
    groups, path = groups_of(model), tmp_path / "latency.json"
    call = RecordedCall((), inputs)
    table = measure_table(model, groups, {"": call}, clock=ruler, multiple=1)
    table.write(path)
    budget = Budget(target_latency_ms=0.6 * table.dense_ms)
    method = {
        "importance": Importance(relevance="gradient"),
        "constraints": Constraints(multiple=1),
        "latency": Latency(str(path)),
    }
    for attempt in (0.6, 0.4):  # in two cuts
        budget = Budget(target_latency_ms=attempt * table.dense_ms)
        done = prune(model, lesson("bert"), budget, loss=loss, kinds=UNITS, **method)
        costs = LatencyCosts(table, groups)
        widths = {name: len(kept) for name, kept in done.plan.kept.items()}
        assert costs.total(widths) <= attempt * table.dense_ms + 1e-9
        assert any(widths[group.name] < group.size for group in groups if group.kind == "head_dim")
    real = ruler({"x": lambda: model(**inputs)})["x"]
    assert real == pytest.approx(costs.total(widths), rel=0.02)


def test_a_table_without_dimensions_of_heads_is_refused(tmp_path):
    model, inputs = tiny()
    path = tmp_path / "latency.json"
    groups, call = groups_of(model), RecordedCall((), inputs)
    kinds = ["ffn", "heads", "hidden", "pooler"]
    measure_table(model, groups, {"": call}, kinds=kinds, clock=ruler).write(path)
    budget = Budget(target_latency_ms=0.5)
    method = {"importance": Importance(relevance="gradient"), "latency": Latency(str(path))}
    with pytest.raises(
        PruningError, match=r"does not have .*head_dim' of 6 units.*Measure it again"
    ):
        prune(model, lesson("bert"), budget, loss=loss, kinds=UNITS, **method)


def test_information_is_no_budget_for_heads_and_their_dimensions():
    budget = Budget(keep_information=0.8)
    with pytest.raises(PruningError, match=r"keep_information=0.8 cannot be shared by .*heads"):
        prune(build(), lesson("bert"), budget, loss=loss, kinds=UNITS)
    prune(build(), lesson("bert"), budget, loss=loss, kinds=["head_dim"])


@pytest.mark.parametrize(("one", "other"), [("query", "key"), ("key", "value")])
def test_projections_with_one_weight_cannot_be_rotated(one, other):
    model = build()
    inner = model.bert.encoder.layer[1].attention.self
    getattr(inner, other).weight = getattr(inner, one).weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match="names 'head_dim'; this model has"):
        prune(model, lesson("bert"), 0.5, loss=loss, kinds=UNITS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    prune(model, lesson("bert"), 0.5, loss=loss)  # heads alone may


@pytest.mark.parametrize("units", [["head_dim"], UNITS])
@pytest.mark.parametrize(
    ("zeroed", "heads"),
    [(names, count) for names in (("query", "key"), ("key",), ("value",)) for count in (1, 4)],
)
def test_heads_with_weights_of_zero(zeroed, heads, units):
    model = build()
    inner = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        for name in zeroed:
            getattr(inner, name).weight[: 6 * heads] = 0.0
    prune(model, lesson("bert"), 0.3, loss=loss, kinds=units)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(bool((p.abs() < 1e6).all()) for p in model.parameters())


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("bias", [2, 50])
def test_keys_that_hardly_change_keep_a_bias_that_half_precision_holds(size, bias):
    """Their directions are scaled up, and with them the mean, which softmax ignores."""
    model = build()
    inner = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        inner.key.weight.mul_(size)
        inner.key.bias.copy_(torch.linspace(-bias, bias, len(inner.key.bias)))
    prune(model, lesson("bert"), 0.3, loss=loss, kinds=["head_dim"])
    assert max(float(p.detach().abs().max()) for p in inner.parameters()) < 100


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mpnet"}))
def test_no_config_scales_attention_by_fewer_dimensions(family, tmp_path):
    """Four heads of 3 in a stream of 12 look like a smaller model, but scores were made for 6."""
    model, inputs = tiny(family)
    groups = groups_of(model)
    sizes = {"head_dim": 3, "hidden": 12, "pooler": 12}
    kept = {group.name: tuple(range(sizes.get(group.kind, group.size))) for group in groups}
    apply_plan(model, groups, PruningPlan({group.name: group.size for group in groups}, kept))
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path).eval()
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_a_rotation_of_another_model_is_refused():
    model = build()
    groups = groups_of(model)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    values = {name: model.get_parameter(name).detach().clone()}
    plan = full_plan(groups)
    for maps in (torch.eye(5).expand(4, 5, 5), torch.eye(6)):
        with pytest.raises(PruningError, match=r"expected \(heads, size, size\) of \(24, 24\)"):
            apply_plan(model, groups, plan, compensated=values, rotated={name: {0: maps}})
    with pytest.raises(PruningError, match="with compensated values"):
        apply_plan(model, groups, plan, rotated={name: {0: torch.eye(6).expand(4, 6, 6)}})


def test_attention_that_needs_more_than_products_is_not_rotated():
    groups = groups_of(build("deberta-v2"))
    assert not any(group.rotation for group in groups)
    with pytest.raises(PruningError, match="which no layer reads alone"):
        choose_groups(groups, kinds=["head_dim"])


def test_groups_found_after_a_layer_was_removed_are_paired_in_their_own_layer():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**{**SMALL, "num_hidden_layers": 3}))
    tracker = PlanTracker(model, PruningGraph(stacks=tuple(stacks_of(model))))
    (stack,) = tracker.graph.stacks
    plan = tracker.graph.keep_layers(tracker.plan, {stack.name: (0, 2)})
    done = cut_model(model, tracker.graph, plan, current=tracker.plan)
    tracker.plan = done.after
    tracker.store(done.removed)
    tracker.extend(graph_of(model))
    groups = {group.name: group for group in tracker.groups}
    crossing = {name: partner_of(group) for name, group in groups.items() if partner_of(group)}
    assert {name.rpartition(".")[0] for name in crossing} >= {f"{stack.name}.2"}
    for name, crossed in crossing.items():
        assert name.rpartition(".")[0] == crossed.rpartition(".")[0]


def test_groups_keep_their_pair_under_other_paths():
    net = nn.ModuleDict({"inner": build()})
    pairs = {group.name: partner_of(group) for group in groups_of(net) if partner_of(group)}
    assert pairs
    assert all(pairs[other] == name for name, other in pairs.items())
    group = next(group for group in groups_of(net) if group.rotation is not None)
    assert net.get_submodule(group.rotation.query).out_features == group.size * entries_of(group)
    assert replace(group, rotation=None).unit_inputs == group.inputs
