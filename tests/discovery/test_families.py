from __future__ import annotations

import pytest
import torch
from lightning_mi_prune.discovery.families import _FAMILIES, present_plan, register_family
from lightning_mi_prune.graph.describe import linear_group
from torch import nn
from transformers import BertModel, GPT2Config, GPT2LMHeadModel

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, EVERY, build, entries_of, random_plan


@pytest.mark.parametrize(("family", "head"), EVERY)
def test_every_family_and_head_has_its_groups(family, head):
    groups = groups_of(build(family, head))
    kinds = [group.kind for group in groups]
    assert kinds.count("ffn") == kinds.count("heads") == 2
    assert kinds.count("pooler") == (1 if head == "sequence" else 0)
    assert {(a.size, entries_of(a)) for a in groups if a.kind == "ffn"} == {(40, 1)}
    assert {(a.size, entries_of(a)) for a in groups if a.kind == "heads"} == {(4, 6)}
    assert {(a.size, entries_of(a)) for a in groups if a.kind == "head_dim"} <= {(6, 4)}
    assert [(a.size, entries_of(a)) for a in groups if a.kind == "hidden"] == [(24, 1)]
    assert len({a.level for a in groups}) == len(groups) - kinds.count("head_dim")


@pytest.mark.parametrize("family", CONFIGS)
def test_the_sweep_goes_from_the_classifier_to_the_first_layer(family):
    groups = [group for group in groups_of(build(family)) if group.kind != "head_dim"]
    order = sorted(groups, key=lambda group: -group.level)
    kinds = [group.kind for group in order]
    assert kinds == ["pooler", "ffn", "heads", "ffn", "heads", "hidden"]
    assert ".1." in order[1].name
    assert ".0." in order[-2].name


def test_networks_are_found_at_any_depth_and_named_from_the_top():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.left = nn.ModuleDict({"net": build()})
            self.right = BertModel(CONFIGS["bert"](), add_pooling_layer=False)

    groups = groups_of(Pair())
    assert {group.network for group in groups} == {"left.net", "right"}
    assert {group.scope for group in groups} == {"left.net.bert", "right"}
    assert {group.network for group in groups_of(Pair(), "left")} == {"left.net"}


def test_a_layer_that_stands_twice_is_one_set_of_groups():
    model = build()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    assert [a.kind for a in groups_of(model)] == ["heads", "head_dim", "ffn", "pooler", "hidden"]


def test_a_wrong_submodule_lists_what_there_is():
    with pytest.raises(PruningError, match=r"module='enc' is not part of .*\['bert', 'dropout'"):
        groups_of(build(), "enc")


def test_an_unknown_transformer_is_named_and_the_remedy_shown():
    model = nn.ModuleDict(
        {"lm": GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=10))}
    )
    with pytest.raises(
        PruningError, match=r"GPT2LMHeadModel \(model type 'gpt2'\)(.|\n)*register_family"
    ):
        groups_of(model)


def test_an_unknown_module_is_named():
    with pytest.raises(PruningError, match="found in Linear"):
        groups_of(nn.Linear(2, 2))


def test_the_snippet_in_the_error_is_the_way_to_register():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

    with pytest.raises(PruningError, match=r"\['first', 'second'\]") as caught:
        groups_of(Mine())
    snippet = str(caught.value).split("):\n", 1)[1].replace("\n    ", "\n")
    try:
        exec(compile(snippet, "snippet", "exec"), {})  # noqa: S102
        assert [group.name for group in groups_of(Mine())] == ["ffn"]
        with pytest.raises(PruningError, match="registered already"):
            register_family("mine", matches=lambda m: False)
    finally:
        _FAMILIES[:] = [f for f in _FAMILIES if f.name != "mine"]


def test_adapters_and_quantized_layers_are_refused_by_name():
    class LoraLinear(nn.Linear):
        pass

    model = build()
    attention = model.bert.encoder.layer[0].attention.self
    attention.query = LoraLinear(24, 24)
    with pytest.raises(PruningError, match="LoraLinear; expected a plain"):
        groups_of(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"producers": ["gone"], "consumers": ["1"]}, "'gone', which Sequential does not have"),
        ({"producers": ["0"], "consumers": ["2"]}, "expected one common width"),
        ({"producers": ["0"], "consumers": ["1"], "entries": 3}, "a multiple of 3"),
    ],
)
def test_layers_that_do_not_fit_together(options, message):
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(6, 2))
    with pytest.raises(PruningError, match=message):
        linear_group(net, "x", kind="ffn", **options)


@pytest.mark.parametrize("family", CONFIGS)
def test_groups_of_a_cut_model_are_those_as_built(family):
    model = build(family)
    groups = groups_of(model)
    plan = random_plan(groups)
    apply_plan(model, groups, plan)
    assert groups_of(model) == groups
    assert present_plan(model, groups) == plan
    assert present_plan(build(family), groups).is_full


def test_a_damaged_record_is_refused():
    model = build()
    model.config.pruning_plan = 3
    with pytest.raises(PruningError, match="expected text"):
        groups_of(model)


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
