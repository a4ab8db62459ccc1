from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mi_prune import discover
from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_graph
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.graph import check_within
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, EVERY, batch, build, entries_of, random_plan


@pytest.mark.parametrize(("family", "head"), EVERY)
def test_every_family_and_head_has_its_groups(family, head):
    groups = groups_of(build(family, head))
    kinds = [group.kind for group in groups]
    assert kinds.count("ffn") == kinds.count("heads") == 2
    assert kinds.count("pooler") == (1 if head == "sequence" else 0)
    assert {(a.size, entries_of(a)) for a in groups if a.kind == "ffn"} == {(40, 1)}
    assert {(a.size, entries_of(a)) for a in groups if a.kind == "heads"} == {(4, 6)}
    assert {(a.size, entries_of(a)) for a in groups if a.kind == "head_dim"} <= {(6, 4)}
    assert (24, 1) in [(a.size, entries_of(a)) for a in groups if a.kind == "hidden"]
    rotated = sum(a.rotation is not None for a in groups)
    assert len({a.level for a in groups}) == len(groups) - rotated


@pytest.mark.parametrize("family", CONFIGS)
def test_the_sweep_goes_from_the_classifier_to_the_first_layer(family):
    groups = [g for g in groups_of(build(family)) if g.kind not in ("head_dim", "hidden")]
    order = sorted(groups, key=lambda group: -group.level)
    kinds = [group.kind for group in order]
    assert kinds == ["pooler", "ffn", "heads", "ffn", "heads"]
    assert ".1." in order[1].name
    assert ".0." in order[-1].name


def test_networks_are_named_from_the_top():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.ModuleDict({"net": build()})
            self.right = build("distilbert")

        def forward(self, ids):
            return self.left["net"](ids).logits + self.right(ids).logits

    groups = discover(Pair().eval(), batch(2)["input_ids"]).groups
    assert {group.network for group in groups} == {"left.net", "right"}
    assert {g.scope for g in groups if g.kind == "ffn"} == {"left.net.bert", "right.distilbert"}
    names = {group.name for group in groups if group.kind == "hidden"}
    assert names == {"left.net.bert.hidden", "right.distilbert.hidden"}


def test_a_layer_that_stands_twice_is_one_set_of_groups():
    model = build()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    kinds = sorted(a.kind for a in groups_of(model))
    assert kinds == ["ffn", "head_dim", "heads", "hidden", "pooler"]


def test_a_wrong_submodule_lists_what_there_is():
    with pytest.raises(PruningError, match=r"module='enc' is not part of .*\['bert', 'dropout'"):
        check_within(build(), "enc")


@pytest.mark.parametrize("family", CONFIGS)
def test_groups_of_a_cut_model_are_those_as_built(family):
    model = build(family)
    groups = groups_of(model)
    plan = random_plan(groups)
    apply_plan(model, groups, plan)
    assert groups_of(model) == groups
    assert present_plan(model, groups) == plan
    assert present_plan(build(family), groups).is_full


@pytest.mark.parametrize(("record", "message"), [(3, "expected text"), ("{}", "has version None")])
def test_a_damaged_record_is_refused(record, message):
    model = build()
    model.config.pruning_graph = record
    with pytest.raises(PruningError, match=message):
        recorded_graph(model)


def test_groups_hold_no_tensors():
    for group in groups_of(build()):
        assert not any(isinstance(value, torch.Tensor) for value in vars(group).values())


def test_layers_after_a_repeated_one_keep_their_place():
    model = build()
    layers = model.bert.encoder.layer
    model.bert.encoder.layer = nn.ModuleList([layers[0], layers[0], layers[1]])
    names = [a.name for a in groups_of(model) if a.kind == "ffn"]
    assert names == ["bert.encoder.layer.0.ffn", "bert.encoder.layer.2.ffn"]


def test_chunked_sequences_are_refused():
    with pytest.raises(PruningError, match="chunk_size_feed_forward=0"):
        groups_of(build(chunk_size_feed_forward=4))


def test_head_sizes_that_need_a_rotation_go_only_with_one(monkeypatch):
    """MPNet divides by the present size: without queries that make up for it no cut is right."""
    monkeypatch.setattr("lightning_mi_prune.discovery.heads._unchanged", lambda *_: False)
    graph = discover(build("mpnet"))
    assert not any(group.kind == "head_dim" for group in graph.groups)
    assert {each.size for each in graph.refused if each.kind == "head_dim"} == {6}
    assert {size for g in graph.groups if g.kind == "heads" for _, size in g.partners} == set()
