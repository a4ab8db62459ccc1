from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.surgery.units import apply_plan, reshape_tensors
from tests.support import models
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, batch, build, inputs_of, masked_copy, outputs, random_plan

SOME = pytest.mark.parametrize(("family", "head"), models.SOME)


@SOME
def test_keeping_everything_changes_no_bit(family, head):
    model = build(family, head)
    groups = groups_of(model)
    before, parameters = outputs(model, inputs_of(head)), list(model.parameters())
    assert apply_plan(model, groups, full_plan(groups)) == []
    assert torch.equal(outputs(model, inputs_of(head)), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


@SOME
def test_a_cut_model_computes_what_the_masked_model_computes(family, head):
    model = build(family, head)
    groups = groups_of(model)
    plan = random_plan(groups)
    masked = masked_copy(model, groups, plan)
    apply_plan(model, groups, plan)
    inputs = inputs_of(head)
    assert torch.allclose(outputs(model, inputs), outputs(masked, inputs), atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in masked.parameters())


@SOME
def test_two_cuts_are_one_cut(family, head):
    twice, once = build(family, head), build(family, head)
    groups = groups_of(twice)
    first = random_plan(groups, 0.75)
    second = PruningPlan(first.sizes, {n: k[: max(1, len(k) // 2)] for n, k in first.kept.items()})
    apply_plan(twice, groups, first)
    apply_plan(twice, groups, second, current=first)
    apply_plan(once, groups, second)
    for a, b in zip(twice.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"mpnet", "deberta-v2"}))
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_kernels_take_fewer_heads(family, attention):
    model = build(family, attn_implementation=attention)
    groups = groups_of(model)
    plan = random_plan(groups)
    masked = masked_copy(model, groups, plan)
    apply_plan(model, groups, plan)
    assert torch.allclose(outputs(model, batch()), outputs(masked, batch()), atol=1e-5)


@SOME
def test_numbers_on_modules_follow(family, head):
    model = build(family, head)
    groups = groups_of(model)
    plan = random_plan(groups)
    apply_plan(model, groups, plan)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
    for group in groups:
        for count in group.attributes:
            value = getattr(model.get_submodule(count.module), count.attribute)
            number = layout_size(count.layout, group.all_widths(plan.widths))
            assert value == ((number,) if count.sequence else number)


def test_the_config_tells_one_width_or_stays_as_built():
    model = build()
    groups = groups_of(model)
    apply_plan(model, groups, random_plan(groups, 0.5))
    assert model.config.intermediate_size == 20
    other = build()
    one = choose_groups(groups, kinds=["ffn"], include=r"layer\.0")[0]
    apply_plan(other, groups, PruningPlan({one.name: 40}, {one.name: tuple(range(8))}))
    assert other.config.intermediate_size == 40
    assert other.config.num_attention_heads == 4
    assert PruningPlan.from_json(other.config.pruning_plan).width(one.name) == 8


def test_a_uniform_neuron_cut_is_an_ordinary_model(tmp_path):
    model = build()
    groups = groups_of(model)
    ffn = [a for a in groups if a.kind == "ffn"]
    apply_plan(model, groups, random_plan(ffn, 0.5))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))


def test_rewrites_tell_what_survived():
    model = build()
    groups = groups_of(model)
    before = dict(model.named_parameters())
    rewrites = apply_plan(model, groups, random_plan(groups))
    names = {id(p): n for n, p in before.items()}
    for rewrite in rewrites:
        expected = rewrite.old.detach()
        for dim, index in rewrite.kept.items():
            expected = expected.index_select(dim, index)
        assert torch.equal(rewrite.new, expected)
        assert model.get_parameter(names[id(rewrite.old)]) is rewrite.new


def test_frozen_dtype_and_gradients():
    model = build().to(torch.bfloat16)
    for parameter in model.bert.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    model(**batch()).logits.sum().backward()
    groups = groups_of(model)
    rewrites = apply_plan(model, groups, random_plan(groups))
    assert all(r.new.requires_grad == r.old.requires_grad for r in rewrites)
    assert {r.new.requires_grad for r in rewrites} == {True, False}
    assert all(r.new.grad is None and r.new.is_leaf and r.new.is_contiguous() for r in rewrites)
    assert {r.new.dtype for r in rewrites} == {torch.bfloat16}


def test_a_tied_decoder_stays_tied():
    model = build("bert", "masked-lm")
    groups = groups_of(model)
    apply_plan(model, groups, random_plan(groups))
    embeddings = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embeddings


def test_a_module_under_two_names_stays_one():
    root = nn.ModuleDict({"a": build()})
    root["b"] = root["a"]
    groups = groups_of(root)
    apply_plan(root, groups, random_plan(groups))
    assert all(p is q for p, q in zip(root["a"].parameters(), root["b"].parameters(), strict=True))
    outputs(root["b"], batch())


def test_a_layer_used_twice_is_cut_once():
    model = build()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    groups = groups_of(model)
    plan = random_plan(groups)
    masked = masked_copy(model, groups, plan)
    apply_plan(model, groups, plan)
    assert torch.allclose(outputs(model, batch()), outputs(masked, batch()), atol=1e-5)


def snapshot(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    return state, [id(p) for p in model.parameters()], copy.deepcopy(model.config.to_dict())


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert all(torch.equal(after[0][k], before[0][k]) for k in before[0])


def tie_layers(model, groups):
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    return random_plan(groups), {}


def tie_layers_and_cut_one(model, groups):
    tie_layers(model, groups)
    name = "bert.encoder.layer.0.ffn"
    return PruningPlan({name: 40}, {name: (0, 1)}), {}


def tie_to_another_group(model, groups):
    model.bert.encoder.layer[0].attention.self.query.bias = model.bert.pooler.dense.bias
    name = "bert.encoder.layer.0.heads"
    return PruningPlan({name: 4}, {name: (0, 1)}), {}


def tie_to_stranger(model, groups):
    model.extra = nn.Linear(24, 40)
    model.extra.weight = model.bert.encoder.layer[1].intermediate.dense.weight
    return random_plan(groups), {}


def shrink_behind(model, groups):
    layer = model.bert.encoder.layer[1].intermediate
    layer.dense = nn.Linear(24, 32)
    return random_plan(groups), {}


def hook_a_parameter(model, groups):
    model.bert.encoder.layer[1].output.dense.weight.register_hook(lambda g: g)
    return random_plan(groups), {}


def subclass_a_parameter(model, groups):
    class Sharded(nn.Parameter):
        pass

    dense = model.bert.encoder.layer[1].output.dense
    dense.weight = Sharded(dense.weight.detach())
    return random_plan(groups), {}


def values_of_another_plan(model, groups):
    name = "bert.encoder.layer.1.output.dense.weight"
    return random_plan(groups), {name: torch.zeros(24, 3)}


def values_of_nothing(model, groups):
    return random_plan(groups), {"bert.nothing.weight": torch.zeros(1)}


def plan_of_another_model(model, groups):
    return PruningPlan.full({"elsewhere": 3}), {}


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (tie_layers, "is cut by .* and .* at once"),
        (tie_layers_and_cut_one, "shared with a Linear outside the group"),
        (tie_to_another_group, "shared with a Linear outside the group"),
        (tie_to_stranger, "shared with a Linear outside the group"),
        (shrink_behind, "changed without the plan"),
        (hook_a_parameter, "has gradient hooks"),
        (subclass_a_parameter, "is a Sharded; expected a plain"),
        (values_of_another_plan, r"has shape \(24, 3\); expected \(24, 20\)"),
        (values_of_nothing, "has no parameter 'bert.nothing.weight'"),
        (plan_of_another_model, "not in the earlier plan"),
    ],
)
def test_what_cannot_be_cut_is_refused_whole(sabotage, message):
    model = build()
    groups = groups_of(model)
    plan, compensated = sabotage(model, groups)
    before = snapshot(model)
    with pytest.raises(PruningError, match=message):
        apply_plan(model, groups, plan, compensated=compensated)
    assert_untouched(model, before)


def test_reshape_grows_and_shrinks():
    model, fresh = build(), build()
    groups = groups_of(model)
    state = model.state_dict()
    small = random_plan(groups)
    apply_plan(fresh, groups, small)
    reshape_tensors(fresh, groups, full_plan(groups))
    fresh.load_state_dict(state)
    assert torch.equal(outputs(fresh, batch()), outputs(model, batch()))
    assert fresh.config.intermediate_size == 40
    with pytest.raises(PruningError, match="made for another model"):
        reshape_tensors(fresh, groups, PruningPlan.full({"ffn": 3}))
