"""Inferred groups: against the descriptions by hand, and on networks with known answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.discovery.inference import infer
from lightning_mi_prune.graph.layouts import layout_size
from tests.support.models import build, inputs_of


def sizes_fit(model, groups):
    """Every layout has the size of the dimension it describes."""
    widths = {group.name: group.size for group in groups}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for group in groups:
        for s in group.tensors:
            assert layout_size(s.layout, widths) == tensors[s.tensor].shape[s.dim] == s.shape[s.dim]


def test_queries_that_share_keys_are_a_product():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
    )
    model, ids = LlamaForCausalLM(config), torch.randint(40, (2, 5))
    found = infer(model, lambda model: model(input_ids=ids, use_cache=False))
    groups = {group.name: group for group in found.groups}
    sizes_fit(model, found.groups)
    heads = groups["model.layers.0.heads"]
    assert (heads.size, heads.consumers) == (2, ("model.layers.0.self_attn.o_proj",))
    partners = {name.rpartition(".")[2]: size for name, size in heads.partners}
    assert partners["query_heads"] == 3
    gated = groups["model.layers.1.ffn"]
    assert {s.tensor.split(".")[4] for s in gated.tensors} == {"gate_proj", "up_proj", "down_proj"}
    assert gated.residual == "model.layers.1.post_attention_layernorm"
    (stack,) = found.stacks
    assert (stack.name, stack.size, stack.fixed) == ("model.layers", 2, 0)
    assert stack.residual_branches == (
        ("self_attn.o_proj", "input_layernorm"),
        ("mlp.down_proj", "post_attention_layernorm"),
    )


def test_queries_keys_and_values_in_one_matrix_are_a_sum():
    config = GPT2Config(
        vocab_size=40, n_embd=24, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2
    )
    model, ids = GPT2LMHeadModel(config), torch.randint(40, (2, 5))
    groups = infer(model, lambda model: model(input_ids=ids, use_cache=False)).groups
    sizes_fit(model, groups)
    (heads,) = (group for group in groups if group.kind == "heads")
    (fused,) = (s for s in heads.tensors if s.tensor.endswith("c_attn.weight"))
    assert (fused.dim, len(fused.layout)) == (1, 3)
    assert all(block[0] == heads.name for block in fused.layout)
    assert heads.consumers == ("transformer.h.0.attn.c_proj",)


class Convolutions(nn.Module):
    """Two convolutions that are concatenated, pooled, flattened and read by a linear layer."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(10 * 4, 2)

    def forward(self, x):
        one = self.one(x).relu()
        both = self.norm(torch.cat([one, self.two(one)], 1))
        return self.head(nn.functional.adaptive_avg_pool2d(both, 2).flatten(1))


def test_channels_that_are_concatenated_and_flattened():
    x = torch.randn(2, 3, 8, 8)
    groups = {g.name: g for g in infer(Convolutions(), lambda model: model(x)).groups}
    sizes_fit(Convolutions(), groups.values())
    assert {name: (g.kind, g.size) for name, g in groups.items()} == {
        "one.channels": ("channels", 4),
        "two.channels": ("channels", 6),
    }
    layouts = {s.tensor: s.layout for s in groups["two.channels"].tensors}
    assert layouts["head.weight"] == (("one.channels", 4), ("two.channels", 4))
    assert layouts["norm.running_var"] == (("one.channels",), ("two.channels",))
    assert groups["one.channels"].consumers == ("two", "head")
    assert groups["two.channels"].consumers == ("head",)


class Block(nn.Module):
    """A residual block; ``wider`` projects the stream to more channels."""

    def __init__(self, inside, made, groups=1):
        super().__init__()
        self.one = nn.Conv2d(inside, 6, 3, padding=1)
        self.two = nn.Conv2d(6, made, 3, padding=1, groups=groups)
        self.wider = nn.Conv2d(inside, made, 1) if inside != made else nn.Identity()

    def forward(self, x):
        return (self.two(self.one(x).relu()) + self.wider(x)).relu()


class Residual(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        blocks = [Block(3, 8, groups), Block(8, 8, groups), Block(8, 8, groups)]
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


def test_a_stage_of_residual_blocks_is_one_stack_and_one_hidden_size():
    x = torch.randn(2, 3, 8, 8)
    found = infer(Residual(), lambda model: model(x))
    kinds = {group.name: group.kind for group in found.groups}
    assert sorted(kinds.values()) == ["channels"] * 3 + ["hidden"]
    assert [(s.name, s.size, s.fixed) for s in found.stacks] == [("blocks", 3, 1)]
    (hidden,) = (group for group in found.groups if group.kind == "hidden")
    assert set(hidden.consumers) == {"blocks.1.one", "blocks.2.one", "head"}


class Branch(nn.Module):
    """A residual branch whose output goes through another module before it is added."""

    def __init__(self, behind):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 6)
        self.behind = behind

    def forward(self, x):
        return x + self.behind(self.down(self.up(self.norm(x)).relu()))


class Scale(nn.Module):
    def __init__(self, size=None):
        super().__init__()
        self.factor = 0.1 if size is None else nn.Parameter(torch.full((size,), 0.1))

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize(
    ("behind", "residual"),
    [
        (nn.Identity(), "norm"),
        (nn.Dropout(0.5), "norm"),
        (nn.LayerNorm(6), None),
        (nn.RMSNorm(6), None),
        (Scale(6), None),
        (Scale(), None),
    ],
    ids=["nothing", "dropout", "layer norm", "rms norm", "layer scale", "factor"],
)
def test_what_is_scaled_before_it_is_added_is_not_solved_towards_the_stream(behind, residual):
    x = torch.randn(2, 5, 6)
    found = infer(Branch(behind), lambda model: model(x))
    (group,) = (group for group in found.groups if group.kind == "ffn")
    assert group.residual == residual


def test_groups_of_a_convolution_are_read_by_no_layer_that_can_be_solved():
    x = torch.randn(2, 3, 8, 8)
    found = infer(Residual(groups=2), lambda model: model(x))
    reasons = [refusal.reason for refusal in found.refused]
    assert any("groups=2" in reason for reason in reasons), reasons


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.up = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 8)
        self.down = nn.Linear(8, 2)

    def forward(self, x):
        return self.down(self.up(self.rnn(x)[0]).relu())


def test_what_no_rule_explains_is_left_out_by_name():
    x = torch.randn(2, 5, 4)
    found = infer(Recurrent(), lambda model: model(x))
    assert [group.consumers for group in found.groups] == [("down",)]
    assert any(label.endswith("in rnn") for label in found.unknown), found.unknown


def test_a_look_at_the_shape_fixes_nothing():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            up = self.up(x)
            assert up[:, 0].shape == (3,)
            return self.down(up.relu())

    x = torch.randn(3, 4)
    assert [g.size for g in infer(Net(), lambda model: model(x)).groups] == [8]


def test_the_model_stays_as_it_is():
    model, x = Convolutions().train(), torch.randn(2, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    infer(model, lambda model: model(x))
    assert model.training
    assert not model.one._forward_hooks
    assert not model.one._forward_pre_hooks
    assert torch.equal(random, torch.get_rng_state())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["scripted", "nothing"])
def test_a_call_that_cannot_be_recorded_is_refused(kind):
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3)
    if kind == "scripted":
        with pytest.warns(DeprecationWarning, match="jit"):
            net = nn.Sequential(torch.jit.trace(net, x))
        with pytest.raises(PruningError, match="'0' is a scripted module"):
            infer(net, lambda model: model(x))
    else:
        with pytest.raises(PruningError, match="ran no tensor operator"):
            infer(net, lambda model: None)


def structure(found):
    return [(g.name, g.kind, g.tensors, g.consumers, g.residual, g.norms) for g in found.groups]


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "eager"])
def test_precision_and_implementation_change_no_group(how):
    inputs = inputs_of("sequence")
    plain = infer(build("bert", "sequence"), lambda model: model(**inputs))
    options = {"attn_implementation": "eager"} if how == "eager" else {}
    model = build("bert", "sequence", **options)
    if how == "bfloat16":
        model = model.bfloat16()

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return model(**inputs)

    assert structure(infer(model.train(), run)) == structure(plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_are_followed(reentrant):
    class Checkpointed(Residual):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return self.head(x.mean((2, 3)))

    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    plain, again = (infer(net, lambda model: model(x)) for net in (Residual(), Checkpointed()))
    assert [g.tensors for g in again.groups] == [g.tensors for g in plain.groups]


class Penalised(nn.Module):
    """A loss with the squares of its own weights."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        weights = (self.up.weight, self.down.weight)
        penalty = sum(w.square().sum() for w in weights) + self.up.weight.norm()
        return self.down(self.up(x).relu()).square().mean() + 0.1 * penalty


def test_penalties_of_weights_keep_no_units():
    x = torch.randn(4, 3)
    (group,) = infer(Penalised(), lambda model: model(x)).groups
    assert (group.kind, group.size) == ("ffn", 8)
