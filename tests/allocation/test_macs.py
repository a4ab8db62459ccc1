"""Multiply-accumulates of every family and operator, in report and cost model."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.utils import _python_dispatch as dispatch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from lightning_mi_prune import MutualInformationPruning
from lightning_mi_prune.allocation.macs import count_macs, macs_of_calls, measure_macs
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim
from lightning_mi_prune.pruner import prune
from lightning_mi_prune.surgery.units import apply_plan
from tests.conftest import count_hooks
from tests.support.boring import Classifier, trainer
from tests.support.graphs import groups_of
from tests.support.models import SOME, batch, build, inputs_of, random_plan


def first(inputs):
    return RecordedCall((), {name: value[:1] for name, value in inputs.items()})


def plain(network, call):
    """What torch's own counter finds, where no fused kernel hides anything."""
    network, counter = (
        copy.deepcopy(network).eval().requires_grad_(False),
        FlopCounterMode(display=False),
    )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(*call.args, **call.kwargs)
    return counter.get_total_flops() // 2


def widths_of(plan):
    return {name: len(kept) for name, kept in plan.kept.items()}


@pytest.mark.parametrize(("family", "head"), SOME)
def test_report_and_cost_model_agree_before_and_after_a_cut(family, head):
    model, one = build(family, head), first(inputs_of(head))
    groups = groups_of(model)
    costs = measure_macs(model, groups, {"": one})
    assert costs.total({}) == count_macs(model, one) == plain(model, one) > 0
    half = random_plan(groups)
    gone = {a.name: () if a.may_be_empty and "0" in a.name else range(a.size) for a in groups}
    empty = PruningPlan(half.sizes, {name: tuple(kept) for name, kept in gone.items()})
    for plan in (half, empty) if head in ("sequence", "image") else (half,):
        cut = copy.deepcopy(model)
        apply_plan(cut, groups, plan)
        widths = widths_of(plan)
        want = plain(cut, one)
        assert count_macs(cut, one) == costs.total(widths) == want
        assert measure_macs(cut, groups, {"": one}, widths).total({}) == want


RELATIVE = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "relative_attention": True,
    "position_buckets": 8,
    "num_labels": 3,
}


@pytest.mark.parametrize("kinds", [["p2c", "c2p"], ["c2p"], []])
def test_relative_attention_in_a_budget_and_in_the_report(kinds):
    """Its layers get a parameter as input, which torch's own counter cannot take."""
    config = DebertaV2Config(**RELATIVE, pos_att_type=kinds)
    module = Classifier()
    module.model = DebertaV2ForSequenceClassification(config)
    one = first(batch(1))
    dense = count_macs(module.model, one)
    assert dense == plain(module.model, one)
    net, goal = copy.deepcopy(module.model), int(0.7 * dense)
    prune(
        net,
        [batch(64, seed=seed) for seed in range(3)],
        target_macs=goal,
        loss=lambda net, inputs: net(**inputs).logits.square().mean(),
    )
    assert 0.9 * goal < count_macs(net, one) <= goal
    if len(kinds) < 2:
        return
    callback = MutualInformationPruning(target_macs=goal, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="MACs")
        trainer(callback).fit(module)
    assert callback.report.macs == dense
    assert callback.report.cuts[-1].macs == count_macs(module.model, one) <= goal


DECODERS = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ),
}


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_and_grouped_queries(family):
    model, one = DECODERS[family](), first({"input_ids": batch(1)["input_ids"]})
    assert count_macs(model, one) == plain(model, one) > 0


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=4, padding=1),
        nn.Conv2d(8, 8, 3, groups=8, stride=2),
        nn.ConvTranspose2d(8, 4, 2, groups=2),
    )


def test_convolutions_of_every_kind():
    picture = torch.randn(1, 4, 9, 9)
    places = 7 * 7
    expected = places * 8 * 4 * 9 + places * 8 * 2 * 9 + 9 * 8 * 9 + 9 * 8 * 2 * 4
    net = convolutions()
    assert count_macs(net, RecordedCall((picture,), {})) == expected
    assert measure_macs(net, [], {"": RecordedCall((picture,), {})}).total({}) == expected
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    model, one = (
        ResNetForImageClassification(config),
        first({"pixel_values": torch.randn(1, 3, 32, 32)}),
    )
    assert count_macs(model, one) == plain(model, one) > 0


def test_an_example_without_its_dimension():
    net = nn.Sequential(nn.Conv1d(3, 6, 2), nn.ReLU(), nn.Conv1d(6, 5, 1))
    one = RecordedCall((torch.randn(3, 8),), {})
    units = (("units",),)
    tensors = (
        PrunableDim("0.weight", 0, (6, 3, 2), units),
        PrunableDim("2.weight", 1, (5, 6, 1), units),
    )
    group = DependencyGroup("units", "channels", 6, tensors, ("2",))
    costs = measure_macs(net, [group], {"": one})
    assert costs.total({}) == count_macs(net, one) == 7 * (6 * 3 * 2 + 5 * 6)
    assert costs.savings("units", {}, [5]) == [7 * (3 * 2 + 5)]
    assert costs.fixed == 0


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("grads", [torch.no_grad, torch.inference_mode])
def test_recurrent_layers(packed, grads):
    x, lengths = torch.randn(2, 5, 8), [5, 3]
    steps = sum(lengths) if packed else 10
    call = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True) if packed else x
    gates = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}
    for kind, count in gates.items():
        net = kind(8, 6, 2, bidirectional=True, batch_first=True)
        with grads():
            found = count_macs(net, RecordedCall((call,), {}))
        assert found == steps * 2 * count * 6 * ((8 + 6) + (12 + 6)), kind
    cell = nn.LSTMCell(8, 6)
    assert count_macs(cell, RecordedCall((x[:, 0],), {})) == 2 * 4 * 6 * (8 + 6)


class Calls(nn.Module):
    """A function with a weight."""

    def __init__(self, function):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.function = function

    def forward(self, *inputs):
        return self.function(self.weight, *inputs)


OPERATORS = {
    "matrix by vector": (lambda w, x: w @ x, (8,), 32),
    "added": (lambda w, x: torch.addmv(torch.ones(4), w, x), (8,), 32),
    "dot": (lambda w, x: w[0] @ x, (8,), 8),
    "einsum": (lambda w, x: torch.einsum("oi,bli->blo", w, x), (2, 3, 8), 6 * 32),
    "batched": (lambda w, x: torch.matmul(x, w.mT), (2, 3, 8), 6 * 32),
    "summed": (
        lambda w, x: torch.addbmm(torch.ones(3, 4), x, w.mT.expand(2, 8, 4)),
        (2, 3, 8),
        192,
    ),
    "bilinear": (
        lambda w, x: nn.functional.bilinear(x, x, w[:, None] * torch.ones(4, 8, 8)),
        (6, 8),
        6 * 4 * 8 * 8,
    ),
    "nothing": (lambda w, x: (w * x).cumsum(0).sort().values, (8,), 0),
}


@pytest.mark.parametrize(("function", "shape", "expected"), OPERATORS.values(), ids=OPERATORS)
@pytest.mark.parametrize("grads", [torch.no_grad, torch.inference_mode])
def test_products_of_every_kind(function, shape, expected, grads):
    with grads():
        assert count_macs(Calls(function), RecordedCall((torch.randn(*shape),), {})) == expected


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("groups", [1, 2])
def test_both_products_of_attention_whatever_the_kernel(backend, groups):
    q, k, v = (
        torch.randn(2, 4, 5, 8),
        torch.randn(2, 4 // groups, 7, 8),
        torch.randn(2, 4 // groups, 7, 8),
    )
    attend = nn.functional.scaled_dot_product_attention
    net = Calls(lambda w, *x: attend(*x, enable_gqa=groups > 1))
    with sdpa_kernel([backend, SDPBackend.MATH]):
        assert count_macs(net, RecordedCall((q, k, v), {})) == 2 * (2 * 4 * 5 * 7 * 8)


def test_the_fast_path_of_torchs_attention():
    class Own(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=first)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    x = torch.randn(2, 5, 8)
    fast = count_macs(Own(True), RecordedCall((x,), {}))
    assert fast == count_macs(Own(False), RecordedCall((x.transpose(0, 1),), {})) == 10 * 256 + 800


def test_threads_count_separately_and_global_state_stays():
    def flags():
        cuda = torch.backends.cuda
        kernels = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
        return [f() for f in (*kernels, torch.backends.mha.get_fastpath_enabled)]

    def modes():
        return {name: value for name, value in vars(dispatch).items() if name.startswith("_is_in")}

    calls = {"bert": first(batch(1)), "deberta-v2": first(batch(1))}
    want = {family: count_macs(build(family), call) for family, call in calls.items()}
    before, found, seen, start = flags(), [], [], threading.Barrier(4)
    running = modes()

    def count(family, model):
        groups = groups_of(model)
        start.wait()
        for _ in range(6):
            costs = measure_macs(model, groups, {"": calls[family]})
            found.append((family, count_macs(model, calls[family]), costs.total({})))
            seen.append(flags())

    families = ["bert", "deberta-v2"] * 2
    models = [build(family) for family in families]
    threads = [
        threading.Thread(target=count, args=pair) for pair in zip(families, models, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert all(one == other == want[family] for family, one, other in found)
    assert flags() == before
    assert modes() == running
    assert all(flag == before for flag in seen)


class Restless(nn.Module):
    """Draws numbers and counts its calls, in evaluation mode too."""

    def __init__(self, *, fails=False):
        super().__init__()
        self.layer, self.norm, self.fails = nn.Linear(4, 4), nn.BatchNorm1d(4), fails
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("last", None)

    def forward(self, x):
        x = self.norm(self.layer(x)) + torch.randn(4)
        self.calls += 1
        self.mean[1:] += 1
        self.last = x
        if self.fails:
            raise ValueError("stop")
        return x


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("count", [count_macs, lambda net, call: measure_macs(net, [], {"": call})])
def test_the_network_stays_as_it_is(fails, count):
    net, x = Restless(fails=fails).train(), torch.randn(3, 4)
    net.norm.eval()
    net.layer(x).sum().backward()
    held = {name: value.clone() for name, value in net.state_dict().items()}
    gradient, buffers = net.layer.weight.grad.clone(), dict(net._buffers)
    modes, state, hooks = (
        [m.training for m in net.modules()],
        torch.get_rng_state(),
        count_hooks(net),
    )
    needs = [p.requires_grad for p in net.parameters()]
    if fails:
        with pytest.raises(ValueError, match="stop"):
            count(net, RecordedCall((x,), {}))
    else:
        count(net, RecordedCall((x,), {}))
    assert all(torch.equal(value, held[name]) for name, value in net.state_dict().items())
    assert all(net._buffers[name] is buffer for name, buffer in buffers.items())
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net.layer.weight.grad, gradient)
    assert [p.requires_grad for p in net.parameters()] == needs
    assert all(p.grad_fn is None and not p._backward_hooks for p in net.parameters())
    assert count_hooks(net) == hooks


def test_a_random_state_without_draws_is_not_written(monkeypatch):
    """Another thread may be drawing from it."""
    monkeypatch.setattr(torch, "set_rng_state", pytest.fail)
    count_macs(build(), first(batch(1)))


class Absent(nn.Module):
    """In the place of a linear layer that has lost all its rows or columns."""

    def __init__(self, layer, *, fresh):
        super().__init__()
        self.bias, self.fresh = layer.bias, fresh
        self.held = [layer.weight]

    @property
    def weight(self):
        (weight,) = self.held
        return nn.Parameter(weight.detach()) if self.fresh else weight

    def forward(self, x):
        output = x.new_zeros(*x.shape[:-1], len(self.weight))
        return output if self.bias is None else output + self.bias


@pytest.mark.parametrize("fresh", [True, False])
def test_a_layer_without_units_counts_the_positions_that_pass(fresh):
    """It may be of any class: a group cuts its weight."""
    model, one = build(), first(batch(1))
    groups, built = groups_of(model), count_macs(model, one)
    kept = {a.name: () if a.kind == "ffn" else tuple(range(a.size)) for a in groups}
    plan = PruningPlan({a.name: a.size for a in groups}, kept)
    apply_plan(model, groups, plan)
    widths = widths_of(plan)
    want = measure_macs(model, groups, {"": one}, widths)
    for group in groups:
        if group.kind == "ffn":
            for path in {s.tensor.rpartition(".")[0] for s in group.tensors}:
                layer = model.get_submodule(path)
                if isinstance(layer, nn.Linear):
                    model.set_submodule(path, Absent(layer, fresh=fresh))
    costs = measure_macs(model, groups, {"": one}, widths)
    assert costs.positions == want.positions
    assert costs.total({}) == count_macs(model, one)
    assert costs.total({a.name: a.size for a in groups}) == built


def test_several_networks_in_one_module():
    root = nn.ModuleDict({"a": build(), "b": build("distilbert")})
    calls = {"a": first(batch(1)), "b": first(batch(1))}
    want = sum(count_macs(root[name], call) for name, call in calls.items())
    assert macs_of_calls(root, calls) == want


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_parts_are_counted_and_stay_compiled(whole):
    """Under an ordinary mode torch would run them uncompiled ever after, or fail."""
    ran = []

    def backend(graph, inputs):
        def forward(*given):
            ran.append(1)
            return graph.forward(*given)

        return forward

    part = torch.compile(nn.Linear(4, 4), backend=backend, fullgraph=whole)
    net, call = nn.Sequential(nn.Linear(4, 4), part).eval(), RecordedCall((torch.randn(3, 4),), {})
    assert count_macs(net, call) == 96
    with torch.no_grad():
        net(*call.args)
    assert count_macs(net, call) == 96
    before = len(ran)
    with torch.no_grad():
        net(*call.args)
    assert len(ran) == before + 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_with_a_score_function():
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 7, 16)
    net = Calls(lambda w, q, k: flex_attention(q, k, k))
    assert count_macs(net, RecordedCall((q, k), {})) == 2 * 2 * 5 * 7 * 16


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*quantize:UserWarning")
def test_quantized_linear_layers():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    small = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    assert count_macs(small, RecordedCall((torch.randn(3, 4),), {})) == 72
