"""Units that a parameter reads without a layer, and experts; what is refused, and why."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_mi_prune import PruningError, PruningPlan, apply_plan, discover
from lightning_mi_prune.discovery.verification import random_halves
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.inputs import ConsumerInput
from lightning_mi_prune.graph.layouts import kept_positions
from tests.support.functional_weights import ORDERS, Products, experts

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning"),
    pytest.mark.filterwarnings("ignore:The explicitly set RoPE"),
]
IDS = torch.arange(24).reshape(2, 12) % 37 + 3


def masked(model, groups, kept):
    """A copy in which the units that go are zero in every tensor, by layouts alone."""
    found = copy.deepcopy(model)
    sizes = {group.name: group.size for group in groups}
    with torch.no_grad():
        for group in groups:
            for s in group.tensors:
                tensor = found.get_parameter(s.tensor)
                gone = torch.ones(tensor.shape[s.dim], dtype=torch.bool)
                gone[kept_positions(s.layout, kept, sizes)] = False
                tensor.index_fill_(s.dim, gone.nonzero().flatten(), 0)
    return found


def cut_equals_masked(model, groups, run):
    kept = random_halves(groups, seed=3)
    want = run(masked(model, groups, kept))
    small = copy.deepcopy(model)
    apply_plan(small, groups, PruningPlan({g.name: g.size for g in groups}, kept))
    torch.testing.assert_close(run(small), want, rtol=1e-5, atol=1e-5)
    return small


@pytest.mark.parametrize("order", ORDERS)
def test_neurons_that_a_parameter_reads_are_a_group(order):
    net, x = Products(order), torch.randn(4, 6)
    group, other = sorted(discover(net, x).groups, key=lambda group: group.level)
    assert (group.kind, group.size, group.consumers) == ("ffn", 24, ("down",))
    weight = ConsumerInput.of(group, ("down",)).weight("down")
    assert (weight.tensor, weight.read) == ("down", 1 if order == "linear" else 0)
    assert weight.output == 1 - weight.read
    assert group.above == ("head",)
    assert other.consumers == ("head",)
    with torch.no_grad():
        cut_equals_masked(net, [group, other], lambda net: net(x))


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "GptOss"])
def test_the_inner_width_of_experts_is_a_group_and_their_number_is_refused(name, implementation):
    model = experts(name, implementation)
    graph = discover(model, input_ids=IDS, attention_mask=torch.ones_like(IDS))
    mine = [g for g in graph.groups if any("experts.down" in path for path in g.consumers)]
    assert [(group.kind, group.size) for group in mine] == [("ffn", 40)] * 2
    for layer, group in enumerate(mine):
        (consumer,) = group.consumers
        assert consumer == f"model.layers.{layer}.mlp.experts.down_proj"
        weight = ConsumerInput.of(group, group.consumers).weight(consumer)
        transposed = name == "GptOss"
        assert (weight.read, weight.output) == ((1, 2) if transposed else (2, 1))
        assert weight.several
        assert group.multiple == (8 if implementation == "grouped_mm" else 1)
    experts_refused = [r for r in graph.refused if r.name.endswith(("gate_up_proj", "down_proj"))]
    assert {r.size for r in experts_refused} == {4}
    assert all("(experts) are chosen by number" in r.reason for r in experts_refused)
    assert len(experts_refused) == 4

    def run(model):
        return model(input_ids=IDS, use_cache=False).logits

    with torch.no_grad():
        small = cut_equals_masked(model, mine, run)
    before = sum(p.numel() for p in model.parameters())
    assert sum(p.numel() for p in small.parameters()) < before
    assert PruningGraph.from_json(graph.to_json()) == graph


def test_a_width_that_grouped_mm_cannot_compute_is_refused():
    model = experts("Mixtral")
    graph = discover(model, input_ids=IDS)
    group = next(g for g in graph.groups if g.multiple > 1 and g.kind == "ffn")
    state = {name: p.clone() for name, p in model.named_parameters()}
    plan = PruningPlan({group.name: 40}, {group.name: tuple(range(13))})
    with pytest.raises(PruningError, match=r"keeps 13 units .* expected a multiple of 8"):
        apply_plan(model, graph.groups, plan)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


class Net(nn.Module):
    """Neurons, and some way in which ``w`` reads them."""

    def __init__(self, shape, use, dtype=torch.float32):
        super().__init__()
        self.up, self.head = nn.Linear(6, 16), nn.Linear(5, 3)
        self.w = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.use = use

    def forward(self, x):
        return self.head(self.use(self.up(x).relu(), self.w))


SUMS = {
    "rows": ((16, 5), "bd,dm->bm", 0, 1),
    "columns": ((5, 16), "...d,md->...m", 1, 0),
    "matrices": ((5, 16, 4), "bd,mdh->bhm", 1, 2),
    "heads": ((16, 4, 5), "bd,dhm->bhm", 0, 2),
}


@pytest.mark.parametrize("name", SUMS)
def test_einsum_with_a_parameter_is_a_product(name):
    shape, equation, read, output = SUMS[name]

    def use(h, w):
        found = torch.einsum(equation, h, w)
        return found if found.ndim == 2 else found.tanh().sum(1)

    net, x = Net(shape, use), torch.randn(4, 6)
    graph = discover(net, x)
    (group,) = (group for group in graph.groups if group.size == 16)
    assert group.consumers == ("w",)
    weight = ConsumerInput.of(group, ("w",)).weight("w")
    assert (weight.read, weight.output) == (read, output)
    with torch.no_grad():
        cut_equals_masked(net, graph.groups, lambda net: net(x))


REFUSED = {
    "not a product": (
        (16, 5),
        lambda h, w: torch.tensordot(h, w, dims=([1], [0])),
        "in a way that is not intercepted",
    ),
    "complex": ((16, 5), lambda h, w: (h.to(w.dtype) @ w).abs(), "it is complex"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_whose_input_cannot_be_calibrated_is_named_with_the_reason(name):
    shape, use, reason = REFUSED[name]
    dtype = torch.complex64 if name == "complex" else torch.float32
    graph = discover(Net(shape, use, dtype), torch.randn(4, 6))
    (refused,) = (part for part in graph.refused if part.size == 16)
    assert refused.reason.startswith("w: ")
    assert reason in refused.reason


class Outside(nn.Module):
    """Uses the weight of a grandchild, whose modules it does not call."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(6, 16), nn.Linear(5, 3)
        self.holder = nn.ModuleDict({"inner": nn.ModuleDict({"layer": nn.Linear(16, 5)})})

    def forward(self, x):
        weight = self.holder["inner"]["layer"].weight
        return self.head(functional.linear(self.up(x).relu(), weight).relu())


def test_a_weight_that_is_used_far_from_its_module_is_refused():
    graph = discover(Outside(), torch.randn(4, 6))
    (refused,) = (part for part in graph.refused if part.size == 16)
    assert "outside the forward of the module that holds it" in refused.reason


class Child(nn.Module):
    """Uses the weight of a layer that it does not call."""

    def __init__(self):
        super().__init__()
        self.up, self.layer, self.head = nn.Linear(6, 16), nn.Linear(16, 5), nn.Linear(5, 3)

    def forward(self, x):
        weight, bias = self.layer.weight, self.layer.bias
        return self.head(functional.linear(self.up(x).relu(), weight, bias).relu())


def test_the_weight_of_a_layer_that_is_not_called_is_a_consumer_by_itself():
    net, x = Child(), torch.randn(4, 6)
    groups = discover(net, x).groups
    assert [group.consumers for group in groups] == [("layer.weight",), ("head",)]
    with torch.no_grad():
        cut_equals_masked(net, groups, lambda net: net(x))


# ----------------------------------------------------------------------------- complex numbers


class ComplexActivations(nn.Module):
    """Real layers around complex activations."""

    def __init__(self):
        super().__init__()
        self.real, self.imaginary = nn.Linear(6, 16), nn.Linear(6, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        turned = torch.complex(self.real(x), self.imaginary(x))
        parts = torch.view_as_real(turned * turned)
        return self.head(torch.view_as_complex(parts).abs())


class ComplexWeights(nn.Module):
    """Complex layers, read by one more."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 16, dtype=torch.complex64)
        self.down = nn.Linear(16, 5, dtype=torch.complex64)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.down(self.up(x.to(torch.complex64)) ** 2).abs())


class Spectrum(nn.Module):
    """A Fourier transform over the units."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        y = self.down(self.up(x).relu())
        return self.head(torch.fft.fft(y, dim=-1).real)


def test_units_around_complex_activations_are_verified():
    net, x = ComplexActivations(), torch.randn(4, 6)
    (group,) = discover(net, x).groups
    assert (group.size, group.consumers) == (16, ("head",))
    with torch.no_grad():
        cut_equals_masked(net, [group], lambda net: net(x))


def test_complex_weights_are_refused_by_name():
    graph = discover(ComplexWeights(), torch.randn(4, 6))
    assert [group.consumers for group in graph.groups] == [("head",)]
    (refused,) = (part for part in graph.refused if part.size == 16)
    assert refused.reason.startswith("down.weight: Linear has a complex weight (torch.complex64)")


def test_what_a_fourier_transform_mixes_is_refused_by_name():
    graph = discover(Spectrum(), torch.randn(4, 6))
    assert [(group.size, group.consumers) for group in graph.groups] == [(16, ("down",))]
    (reason,) = {part.reason for part in graph.refused if part.size == 12}
    assert "_fft" in reason
    assert any("_fft" in label for label in graph.unknown)


# ----------------------------------------------------------------------------- sharded modules


class FullyShardedDataParallel(nn.Sequential):
    """Has the name of the wrapper."""


class FSDPModule:
    """Has the name of the class that ``fully_shard`` adds."""


class Sharded(FSDPModule, nn.Sequential):
    """A module after ``fully_shard``."""


@pytest.mark.parametrize("wrapper", [FullyShardedDataParallel, Sharded])
@pytest.mark.parametrize("inside", [False, True])
def test_a_sharded_module_is_refused(wrapper, inside):
    net = wrapper(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    where = "'0' is sharded" if inside else "the module is sharded"
    with pytest.raises(PruningError, match=f"{where} .{wrapper.__name__}.*before it is wrapped"):
        discover(nn.Sequential(net) if inside else net, torch.randn(4, 3))


def test_a_group_without_a_step_keeps_the_graph_readable():
    group = discover(Products("linear"), torch.randn(4, 6)).groups[0]
    aligned = PruningGraph((replace(group, multiple=8),))
    assert PruningGraph.from_json(aligned.to_json()) == aligned
    with pytest.raises(PruningError, match="0 is not a whole number from 1"):
        PruningGraph.from_json(aligned.to_json().replace('"multiple": 8', '"multiple": 0'))
