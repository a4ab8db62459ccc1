"""A shorter stack is an ordinary model: numbers, caches and generation right, folders that open."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import LayerStack, full_depth
from lightning_mi_prune.surgery.layers import remove_layers
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import graph_of, groups_of, stacks_of
from tests.support.models import CONFIGS, PICTURES, build, inputs_of, outputs, random_plan

ENCODERS = [(f, "sequence") for f in CONFIGS if f != "albert"] + [(f, "image") for f in PICTURES]
_SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
DECODERS = {
    "llama": LlamaConfig(**_SMALL),
    "mistral": MistralConfig(**_SMALL, sliding_window=4),
    "qwen2": Qwen2Config(**_SMALL, **_WINDOW),
    "qwen3": Qwen3Config(**_SMALL, head_dim=6),
    "gpt2": GPT2Config(
        vocab_size=64, n_embd=24, n_layer=4, n_head=4, bos_token_id=1, eos_token_id=2
    ),
}
_TOKENS = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
BOTH = {
    "t5": T5Config(
        **_TOKENS, d_model=24, d_kv=6, d_ff=40, num_layers=4, num_decoder_layers=3, num_heads=4
    ),
    "bart": BartConfig(
        **_TOKENS,
        d_model=24,
        encoder_layers=4,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        forced_eos_token_id=None,
        bos_token_id=1,
    ),
}


def plan_of(groups, drop=(1,)):
    kept = {a.name: tuple(i for i in range(a.size) if i not in drop) for a in groups}
    return PruningPlan({a.name: a.size for a in groups}, kept)


def made(kind):
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind in DECODERS else AutoModelForSeq2SeqLM
    config = copy.deepcopy({**DECODERS, **BOTH}[kind])
    return auto.from_config(config).eval()


@pytest.mark.parametrize(("family", "head"), ENCODERS)
def test_an_encoder_without_a_layer_is_the_model_built_without_it(family, head, tmp_path):
    model = build(family, head)
    stacks = stacks_of(model)
    (stack,) = stacks
    wanted = [
        id(p)
        for i, layer in enumerate(model.get_submodule(stack.name))
        if i != 0
        for p in layer.parameters()
    ]
    (gone,) = remove_layers(model, stacks, plan_of(stacks, drop=(0,)))
    assert isinstance(gone, nn.Module)
    assert [id(p) for p in model.get_submodule(stack.name).parameters()] == wanted
    assert model.config.num_hidden_layers == stack.size - 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    inputs = inputs_of(head)
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_a_layer_that_adds_nothing_is_not_missed():
    model = build("vit", "image", seed=1)
    stacks = stacks_of(model)
    idle = model.get_submodule(stacks[0].name)[1]
    with torch.no_grad():
        for part in (idle.attention.o_proj, idle.mlp.fc2):
            part.weight.zero_()
            part.bias.zero_()
    before = outputs(model, inputs_of("image"))
    remove_layers(model, stacks, plan_of(stacks))
    assert torch.allclose(outputs(model, inputs_of("image")), before, atol=1e-6)


@pytest.mark.parametrize("kind", [*DECODERS, *BOTH])
def test_generation_and_caches_are_right(kind, tmp_path):
    model = made(kind)
    stacks = stacks_of(model)
    gone = remove_layers(model, stacks, plan_of(stacks))
    assert len(gone) == len(stacks) == (2 if kind in BOTH else 1)
    for stack in stacks:
        layers = model.get_submodule(stack.name)
        places = {
            m.layer_idx
            for i, layer in enumerate(layers)
            for m in layer.modules()
            if hasattr(m, "layer_idx")
        }
        assert places in (set(range(len(layers))), set())
    prompt = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(cached, again.generate(prompt, **options))
    config = AutoConfig.from_pretrained(tmp_path)
    if getattr(config, "layer_types", None) is not None:
        assert len(config.layer_types) == config.num_hidden_layers == 3


def test_kinds_of_layers_go_with_their_layers():
    model = made("qwen2")
    before = model.config.layer_types
    assert len(set(before)) == 2
    stacks = stacks_of(model)
    remove_layers(model, stacks, plan_of(stacks, drop=(0, 3)))
    assert model.config.layer_types == before[1:3]


def test_cuts_compose_in_the_numbering_as_built():
    model = made("llama")
    stacks, names = stacks_of(model), "model.layers"
    layers = list(model.get_submodule(names))
    first = PruningPlan({names: 4}, {names: (0, 1, 3)})
    remove_layers(model, stacks, first)
    remove_layers(model, stacks, PruningPlan({names: 4}, {names: (0, 3)}), current=first)
    assert list(model.get_submodule(names)) == [layers[0], layers[3]]
    assert model.config.num_hidden_layers == 2


def test_two_halves_are_shortened_apart_and_alone():
    model = made("t5")
    stacks = {a.name: a for a in stacks_of(model)}
    assert {n: a.size for n, a in stacks.items()} == {"encoder.block": 4, "decoder.block": 3}
    plan = PruningPlan({"encoder.block": 4}, {"encoder.block": (0, 3)})
    remove_layers(model, [stacks["encoder.block"]], plan)
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 3)
    assert (model.encoder.config.num_layers, model.decoder.config.num_layers) == (2, 3)


def test_what_would_break_is_refused_and_changes_nothing():
    model = made("t5")
    stacks = stacks_of(model)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(PruningError, match="cannot lose its first 1"):
        remove_layers(model, stacks, plan_of(stacks, drop=(0,)))
    with pytest.raises(PruningError, match=r"No layer of 'encoder\.block' would stay"):
        remove_layers(model, stacks, plan_of(stacks, drop=range(4)))
    assert model.config.to_dict() == before
    assert [len(model.get_submodule(a.name)) for a in stacks] == [4, 3]
    with pytest.raises(PruningError, match="changed without the plan"):
        remove_layers(model, stacks, plan_of(stacks, drop=(1, 2)), current=plan_of(stacks))
    cut = build("bert")
    groups, stacks = groups_of(cut), stacks_of(cut)
    apply_plan(cut, groups, random_plan(groups))
    with pytest.raises(PruningError, match="Remove layers first"):
        remove_layers(cut, stacks, plan_of(stacks, drop=(0,)))
    shared = nn.ModuleDict({"stack": nn.ModuleList([nn.Linear(2, 2)] * 2)})
    twice = LayerStack("stack", 2)
    with pytest.raises(PruningError, match="holds a layer twice"):
        remove_layers(shared, [twice], plan_of([twice]))
    single = LayerStack("stack.0", 2)
    with pytest.raises(PruningError, match="is a Linear"):
        remove_layers(shared, [single], plan_of([single]))


def test_layers_that_cannot_go_are_no_stack():
    """ALBERT runs one layer many times; this GPT-2 scales attention by the index of a layer."""
    assert not stacks_of(build("albert"))
    scaled = made("gpt2")
    scaled.config.scale_attn_by_inverse_layer_idx = True
    graph = graph_of(scaled)
    assert not graph.stacks
    (refused,) = (each for each in graph.refused if each.kind == "depth")
    assert "scale_attn_by_inverse_layer_idx=False" in refused.reason


def test_the_first_block_of_t5_stays_for_its_position_biases():
    assert [stack.fixed for stack in stacks_of(made("t5"))] == [1, 1]


def test_an_error_in_the_middle_puts_everything_back(monkeypatch):
    model = made("llama")
    stacks = stacks_of(model)
    layers, before = list(model.model.layers), copy.deepcopy(model.config.to_dict())
    last = layers[-1].self_attn
    frozen = type("Frozen", (type(last),), {"__setattr__": None})

    def refuse(self, name, value):
        if name == "layer_idx" and value != 3:
            raise RuntimeError("no")
        nn.Module.__setattr__(self, name, value)

    frozen.__setattr__ = refuse
    last.__class__ = frozen
    with pytest.raises(RuntimeError, match="no"):
        remove_layers(model, stacks, plan_of(stacks))
    assert list(model.model.layers) == layers
    assert model.config.to_dict() == before
    assert [layer.self_attn.layer_idx for layer in layers] == [0, 1, 2, 3]


def test_a_stack_inside_another_module_keeps_its_neighbours_config():
    shared = build("bert").config
    two = nn.ModuleDict({"a": build("bert"), "b": build("bert")})
    for model in two.values():
        for part in model.modules():
            if getattr(part, "config", None) is not None:
                part.config = shared
    mine = [group for group in stacks_of(two) if group.name.startswith("a.")]
    assert full_depth(mine).width(mine[0].name) == 2
    remove_layers(two, mine, plan_of(mine))
    assert (two["a"].config.num_hidden_layers, two["b"].config.num_hidden_layers) == (1, 2)
