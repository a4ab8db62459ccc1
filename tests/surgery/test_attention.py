"""``nn.MultiheadAttention`` that calls its output projection: equal to torch's own, of any size."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.gradients import GradientRecorder
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import SizeAttribute, full_plan
from lightning_mi_prune.reconstruction.compensation import select_units
from lightning_mi_prune.surgery.attention import (
    fit_attention,
    fit_attentions,
    is_open,
    open_attention,
    slow_path,
)
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.layouts import group_of, recorded

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*"),
    pytest.mark.filterwarnings("ignore:.*mismatched key_padding_mask and attn_mask.*"),
]
KINDS = {
    "plain": {},
    "rows first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 6, "vdim": 5},
    "added keys": {"add_bias_kv": True, "add_zero_attn": True},
}
MASKS = ("none", "matrix", "heads", "added")


def masks(kind, rows, heads, queries, keys, padded):
    generator = torch.Generator().manual_seed(1)
    found = {
        "none": None,
        "matrix": torch.ones(queries, keys).triu(1).bool(),
        "heads": torch.rand(rows * heads, queries, keys, generator=generator) > 0.7,
        "added": torch.randn(queries, keys, generator=generator),
    }[kind]
    if kind == "heads":
        found[..., 0] = False
    padding = torch.zeros(rows, keys, dtype=torch.bool)
    padding[0, -1] = True
    return found, (padding if padded else None)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_weights_are_those_of_torch(kind, batched, need_weights):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.2, **KINDS[kind])
    widths = (8, attention.kdim, attention.vdim)
    rows = 3 if batched else 1
    given = [torch.randn(rows, 5 - min(i, 1), width) for i, width in enumerate(widths)]
    if not batched:
        given = [x[0] for x in given]
    elif not attention.batch_first:
        given = [x.transpose(0, 1) for x in given]
    calls = [given] if "widths" in kind else [given, [given[0]] * 3]
    for (q, k, v), mask, padded, train in itertools.product(calls, MASKS, (0, 1), (False, True)):
        keys = k.shape[1] if batched and attention.batch_first else k.shape[0]
        found, padding = masks(mask, rows, 2, 5, keys, padded)
        options = {
            "attn_mask": found,
            "key_padding_mask": padding if padding is None or batched else padding[0],
            "need_weights": need_weights,
            "average_attn_weights": mask != "added",
        }
        attention.train(train)
        results = []
        for opened in (False, True):
            x = q.clone().requires_grad_()
            inputs = [x, x if k is q else k, x if v is q else v]
            torch.manual_seed(2)
            with open_attention(attention, None if opened else ()):
                assert is_open(attention) == opened
                output, weights = attention(*inputs, **options)
            attention.zero_grad()
            output.square().sum().backward()
            grads = [p.grad.clone() for p in attention.parameters()]
            results.append([output, weights, x.grad, *grads])
        assert not is_open(attention)
        for plain, other in zip(*results, strict=True):
            if plain is None:
                assert other is None
            else:
                torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-6)


def test_a_causal_hint_needs_a_mask_and_gives_the_same():
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    wanted, _ = attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    with open_attention(attention):
        found, _ = attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
        assert torch.allclose(found, wanted, atol=1e-6)
        with pytest.raises(RuntimeError, match="attn_mask"):
            attention(x, x, x, is_causal=True)


def test_the_fast_path_is_as_before_after_the_block():
    before = torch.backends.mha.get_fastpath_enabled()
    seen = []

    def fail():
        with slow_path():
            seen.append(torch.backends.mha.get_fastpath_enabled())
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert seen == [False]
    assert torch.backends.mha.get_fastpath_enabled() == before


def encoder(norm_first=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, 0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()


def heads_of(net, attention, name):
    size = 2
    three, one = (((name, size),) * 3), ((name, size),)
    dims = [
        (f"{attention}.in_proj_weight", 0, three),
        (f"{attention}.in_proj_bias", 0, three),
        (f"{attention}.out_proj.weight", 1, one),
    ]
    count = SizeAttribute(attention, "num_heads", ((name,),))
    out = f"{attention}.out_proj"
    return group_of(net, name, 4, dims, out, kind="heads", attributes=(count,))


def cut(net, kept=(1, 2, 3)):
    """Cut the heads of all layers, by hand, and give the attention its forward."""
    index = torch.tensor([2 * head + i for head in kept for i in range(2)])
    for layer in net.layers:
        attention = layer.self_attn
        rows = torch.cat([index + 8 * part for part in range(3)])
        for name in ("in_proj_weight", "in_proj_bias"):
            setattr(attention, name, nn.Parameter(getattr(attention, name).detach()[rows]))
        out = attention.out_proj
        out.weight = nn.Parameter(out.weight.detach()[:, index])
        out.in_features, attention.num_heads = len(index), len(kept)
    fit_attentions(net, [f"layers.{i}.self_attn.in_proj_weight" for i in range(2)])
    return net


def masked(net, removed=(0,)):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for layer in net.layers:
            for head in removed:
                layer.self_attn.out_proj.weight[:, 2 * head : 2 * head + 2] = 0.0
    return net


@pytest.mark.parametrize("kept", [(1, 2, 3), (0, 2)])
@pytest.mark.parametrize("norm_first", [False, True])
def test_an_encoder_without_heads_is_the_masked_one_in_every_mode(norm_first, kept):
    """Two heads would suit the fused operator, which assumes that they are as wide as the input."""
    net = encoder(norm_first)
    wanted = masked(net, [head for head in range(4) if head not in kept])
    small = cut(net, kept)
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for mask in (None, padding):
                found = small(x, src_key_padding_mask=mask)
                real = torch.ones(3, 5, dtype=torch.bool) if mask is None else ~mask
                expected = wanted(x, src_key_padding_mask=mask)
                assert torch.allclose(found[real], expected[real], atol=1e-5)
    with torch.no_grad():  # zeros at the padding, as torch's encoder returns them
        found = small(x, src_key_padding_mask=padding)
        expected = wanted(x, src_key_padding_mask=padding)
        assert torch.allclose(found[padding], expected[padding], atol=1e-5)


def test_a_cut_attention_survives_copies_and_pickles_and_takes_weights():
    net = encoder()
    small, x = cut(net), torch.randn(3, 5, 8)
    wanted = small(x).detach()
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301
        attention = other.layers[0].self_attn
        assert is_open(attention)
        assert attention.forward.args[0] is attention
        assert torch.allclose(other(x), wanted)
    fresh = cut(encoder())
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(small.state_dict())
    assert torch.allclose(fresh(x), wanted)


def test_heads_keep_the_scale_they_were_built_with():
    """Half of the dimensions of all heads, of queries and keys that are zero in the others."""
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(3, 5, 8)
    kept = torch.tensor([0, 1, 4, 5])
    others = torch.tensor([2, 3, 6, 7])
    with torch.no_grad():
        for part in range(3):
            attention.in_proj_weight[others + 8 * part] = 0.0
            attention.in_proj_bias.normal_()
            attention.in_proj_bias[others + 8 * part] = 0.0
        attention.in_proj_bias[torch.cat([others + 8 * part for part in range(3)])] = 0.0
    wanted, _ = attention(x, x, x)
    rows = torch.cat([kept + 8 * part for part in range(3)])
    attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach()[rows])
    attention.in_proj_bias = nn.Parameter(attention.in_proj_bias.detach()[rows])
    attention.out_proj.weight = nn.Parameter(attention.out_proj.weight.detach()[:, kept])
    fit_attention(attention)
    assert torch.allclose(attention(x, x, x)[0], wanted, atol=1e-6)


def test_an_attention_of_built_proportions_gets_the_forward_of_torch_back():
    attention = nn.MultiheadAttention(8, 2)
    whole = attention.in_proj_weight
    attention.in_proj_weight = nn.Parameter(whole.detach()[:, :6])
    fit_attention(attention)
    assert is_open(attention)
    assert not attention._qkv_same_embed_dim
    attention.in_proj_weight = whole
    fit_attention(attention)
    assert not is_open(attention)
    assert attention._qkv_same_embed_dim


def test_what_cannot_be_replaced_is_refused():
    attention = nn.MultiheadAttention(8, 2)
    attention.forward = lambda *inputs: inputs
    attention.num_heads = 1
    with pytest.raises(PruningError, match="forward of its own"):
        fit_attention(attention, "net.attention")
    small = cut(encoder()).layers[0].self_attn
    x = torch.zeros(2, 5, 8)
    with pytest.raises(PruningError, match="6 matrices, for 2 examples and the 3 heads"):
        small(x, x, x, attn_mask=torch.zeros(8, 5, 5))


@pytest.mark.parametrize("train", [False, True])
def test_the_input_of_the_output_projection_is_calibrated(train):
    net = encoder().train(train)
    groups = [heads_of(net, f"layers.{i}.self_attn", f"heads{i}") for i in range(2)]
    x = torch.randn(64, 5, 8)
    calls = []
    with open_attention(net):
        hook = net.layers[1].self_attn.out_proj.register_forward_pre_hook(
            lambda module, args: calls.append(args[0])
        )
        output = net(x)
    hook.remove()
    assert torch.allclose(output, net(x), atol=1e-5)
    moments = recorded(net, groups, x)
    mean, _ = moments["heads1"].statistics()
    assert torch.allclose(mean, calls[0].detach().double().mean((0, 1)), atol=1e-5)
    assert not any(is_open(layer.self_attn) for layer in net.layers)
    with GradientRecorder(net, groups) as recorder, recorder.step(0):
        net(x).square().mean().backward()
    assert all(sums.matrix.any() for sums in recorder.sums.values())


def test_padding_of_an_encoder_is_left_out_of_its_heads():
    net = encoder()
    groups = [heads_of(net, "layers.0.self_attn", "heads")]
    x, padding = torch.randn(4, 5, 8), torch.zeros(4, 5, dtype=torch.bool)
    padding[1, 2:] = True
    with ActivationRecorder(net, groups) as recorder, torch.no_grad():
        net(x, src_key_padding_mask=padding)
    assert int(recorder.moments["heads"].count) == int((~padding).sum())


def test_heads_of_an_encoder_are_ranked_cut_and_compensated():
    net = encoder()
    with torch.no_grad():  # head 3 of each layer does what head 1 does
        for layer in net.layers:
            attention = layer.self_attn
            for part in range(3):
                start = 8 * part
                for tensor in (attention.in_proj_weight, attention.in_proj_bias):
                    tensor[start + 6 : start + 8] = tensor[start + 2 : start + 4]
    groups = [heads_of(net, f"layers.{i}.self_attn", f"heads{i}") for i in range(2)]
    x = torch.randn(300, 5, 8)
    before = net(x[:8]).detach()
    weights = {name: p.detach() for name, p in net.named_parameters()}
    plan = full_plan(groups)
    widths = dict.fromkeys(("heads0", "heads1"), 3)
    decision = select_units(groups, recorded(net, groups, x), weights, widths, plan)
    assert all(len({1, 3} & set(kept)) == 1 for kept in decision.plan.kept.values())
    apply_plan(net, groups, decision.plan, compensated=decision.compensated)
    assert all(is_open(layer.self_attn) for layer in net.layers)
    assert net.layers[0].self_attn.num_heads == 3
    with torch.no_grad():
        assert torch.allclose(net(x[:8]), before, atol=1e-4)
    whole = PruningPlan.full({"heads0": 4, "heads1": 4})
    assert decision.plan.sizes == whole.sizes
