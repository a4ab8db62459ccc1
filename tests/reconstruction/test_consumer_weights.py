"""Compensation and reconstruction of every class of consumer: exact where that is possible."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph import inputs
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.reconstruction.compensation import select_units
from lightning_mi_prune.reconstruction.least_squares import (
    is_gain,
    is_solvable,
    reconstruct_network,
    reconstruct_networks,
)
from lightning_mi_prune.reconstruction.targets import (
    ReconstructedLayer,
    Targets,
    layers_to_reconstruct,
)
from lightning_mi_prune.surgery.batch_norm import reestimate_batch_norm
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.layouts import (
    Convolutions,
    Flattened,
    Grouped,
    Joined,
    group_of,
    pairs,
    recorded,
)

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def chosen(net, groups, x, widths, **options):
    weights = {name: p.detach() for name, p in net.named_parameters()}
    moments = recorded(net, groups, x)
    return select_units(groups, moments, weights, widths, full_plan(groups), **options)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        Convolutions,
        lambda: Convolutions(1),
        lambda: Convolutions(3, bias=False),
        Flattened,
    ],
)
def test_of_two_equal_channels_one_stays_and_the_output_is_the_same(make, fold, monkeypatch):
    if fold:
        monkeypatch.setattr(inputs, "_MOST_ENTRIES", 8)
    net = seeded(make)
    groups, x = net.groups(), torch.randn(200, 3, 8, 8, dtype=torch.float64)
    before = net(x[:8]).detach()
    decision = chosen(net, groups, x, {"channels": 5})
    assert len({2, 5} & set(decision.plan.kept["channels"])) == 1
    apply_plan(net, groups, decision.plan, compensated=decision.compensated)
    assert net.up.weight.shape[0] == 5
    assert torch.allclose(net(x[:8]), before, atol=1e-5)


def test_without_compensation_a_cut_convolution_is_the_masked_one():
    net = seeded(Convolutions)
    groups, x = net.groups(), torch.randn(20, 3, 8, 8, dtype=torch.float64)
    masked = copy.deepcopy(net)
    with torch.no_grad():
        masked.down.weight[:, [0, 4]] = 0.0
    apply_plan(net, groups, PruningPlan({"channels": 6}, {"channels": (1, 2, 3, 5)}))
    assert torch.allclose(net(x), masked(x))


def test_a_transposed_linear_layer_is_compensated_as_the_linear_one():
    x, found = torch.randn(2000, 4, dtype=torch.float64), []
    for net in pairs():
        groups = net.groups()
        decision = chosen(net, groups, x, {"ffn": 4})
        apply_plan(net, groups, decision.plan, compensated=decision.compensated)
        found.append((decision, net(x[:10]).detach()))
    (plain, output), (transposed, other) = found
    assert plain.plan.kept == transposed.plan.kept
    for name, value in plain.compensated.items():
        same = value.mT if value.ndim > 1 else value
        torch.testing.assert_close(transposed.compensated[name], same, rtol=1e-12, atol=1e-14)
    assert torch.allclose(output, other)


def test_one_fit_of_a_joint_input_uses_the_entries_of_all_its_groups():
    """Least squares of all dropped entries on all kept ones, of both groups and the data."""
    net = seeded(Joined)
    groups, x = net.groups(), torch.randn(16_000, 4, dtype=torch.float64)
    decision = chosen(net, groups, x, {"first": 3, "second": 4})
    kept = decision.plan.kept
    columns = [*kept["first"], 5, 6, 7, 8, *(9 + unit for unit in kept["second"])]
    units = net.units(x).detach()
    design = functional.pad(units[:, columns], (1, 0), value=1.0)
    solved = torch.linalg.lstsq(design, net(x).detach()).solution
    weight, bias = (decision.compensated[f"down.{name}"] for name in ("weight", "bias"))
    assert weight.shape == (3, 11)
    assert torch.allclose(weight, solved[1:].mT, atol=5e-4)
    assert torch.allclose(bias, solved[0], atol=5e-4)
    apply_plan(net, groups, decision.plan, compensated=decision.compensated)
    assert torch.allclose(net(x), design @ solved, atol=1e-2)
    assert set(decision.information) == {"first", "second"}


def test_units_that_others_in_the_input_determine_are_removed_without_loss():
    net = seeded(Joined)
    with torch.no_grad():  # unit 1 of the first group is always active: a map of the data
        net.first.weight[1] *= 0.1
        net.first.bias[1] = 5.0
    groups, x = net.groups(), torch.randn(5000, 4, dtype=torch.float64)
    before = net(x).detach()
    decision = chosen(net, groups, x, {"first": 4, "second": 6})
    assert decision.plan.kept["first"] == (0, 2, 3, 4)
    apply_plan(net, groups, decision.plan, compensated=decision.compensated)
    assert torch.allclose(net(x), before, atol=1e-4)


def test_groups_of_a_product_are_compensated_by_one_fit():
    net = seeded(Grouped)
    groups, x = net.groups(), torch.randn(16_000, 5, dtype=torch.float64)
    decision = chosen(net, groups, x, {"kv": 2, "queries": 1, "size": 3})
    kept = decision.plan.kept
    grid = torch.arange(24).view(3, 2, 4)
    columns = grid[list(kept["kv"])][:, list(kept["queries"])][:, :, list(kept["size"])].flatten()
    heads = torch.tanh(net.value(x)).unflatten(-1, (3, 1, 4)).expand(-1, 3, 2, 4)
    units = (heads * torch.tensor([[1.0], [0.5]], dtype=x.dtype)).flatten(1).detach()
    design = functional.pad(units[:, columns], (1, 0), value=1.0)
    solved = torch.linalg.lstsq(design, net(x).detach()).solution
    assert torch.allclose(decision.compensated["out.weight"], solved[1:].mT, atol=1e-3)
    shares = {name: share.kept for name, share in decision.information.items()}
    assert len(set(shares.values())) == 1  # they share the input


class Projected(nn.Module):
    """A layer of some class between two others."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(torch.tanh(x))


@pytest.mark.parametrize("kind", ["linear", "transposed", "pointwise"])
def test_a_layer_is_solved_again_from_its_outputs(kind):
    torch.manual_seed(0)
    layer = {
        "linear": nn.Linear(5, 3),
        "transposed": Conv1D(3, 5),
        "pointwise": nn.Conv2d(5, 3, 1),
    }[kind]
    dense = Projected(layer).double()
    shape = (40, 5, 6, 6) if kind == "pointwise" else (40, 9, 5)
    call = RecordedCall((torch.randn(shape, dtype=torch.float64),), {})
    wrong = copy.deepcopy(dense)
    with torch.no_grad():
        wrong.layer.weight.normal_()
        wrong.layer.bias.zero_()
    layers = [ReconstructedLayer("layer", None, None)]
    targets = Targets(dense, layers, "", call)
    solved = reconstruct_network(wrong, layers, "", targets)
    assert solved["layer.weight"].shape == layer.weight.shape
    assert torch.allclose(solved["layer.weight"], dense.layer.weight, atol=1e-6)
    assert torch.allclose(solved["layer.bias"], dense.layer.bias, atol=1e-6)


def test_a_layer_that_cannot_be_solved_stays_as_it_is():
    """A kernel of several positions, and entries before the positions."""
    call = RecordedCall((torch.randn(9, 5, 6, 6, dtype=torch.float64),), {})
    for layer in (nn.Conv2d(5, 3, 3), ConvNextLayerNorm(5, data_format="channels_first")):
        dense = Projected(layer).double()
        layers = [ReconstructedLayer("layer", None, torch.arange(2))]
        options = {"positions": 100}
        assert not is_solvable(layer)
        assert reconstruct_networks(dense, dense, layers, [{"": [call]}], **options) == {}
    assert is_solvable(nn.Conv2d(5, 3, 1))
    assert is_solvable(Conv1D(5, 3))


def test_the_outputs_that_a_transposed_layer_keeps_are_in_its_second_dimension():
    _, net = pairs()
    groups = net.groups()
    hidden = group_of(net, "hidden", 3, [("down.weight", 1, (("hidden",),))])
    plan = PruningPlan({"ffn": 7, "hidden": 3}, {"ffn": (0, 1), "hidden": (0, 2)})
    (group,) = groups
    group = replace(group, residual="up")
    (layer,) = layers_to_reconstruct([group, hidden], full_plan([group, hidden]), plan)
    assert layer.layer == "down"
    assert layer.rows.tolist() == [0, 2]


NORMS = {
    "layer": lambda: nn.LayerNorm(8),
    "rms": lambda: nn.RMSNorm(8),
    "llama": lambda: LlamaRMSNorm(8),
    "gemma": lambda: GemmaRMSNorm(8),
}


@pytest.mark.parametrize("kind", NORMS)
def test_gains_are_solved_again_entry_by_entry(kind):
    torch.manual_seed(0)
    dense = Projected(NORMS[kind]()).double()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_()
    wrong = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in wrong.parameters():
            parameter.normal_()
    call = RecordedCall((torch.randn(30, 7, 8, dtype=torch.float64),), {})
    layers = [ReconstructedLayer("layer", None, None)]
    solved = reconstruct_network(wrong, layers, "", Targets(dense, layers, "", call))
    for name, parameter in dense.layer.named_parameters():
        assert torch.allclose(solved[f"layer.{name}"].double(), parameter, atol=1e-5)
    assert is_gain(dense.layer)
    assert not is_gain(nn.BatchNorm1d(8))
    assert not is_gain(nn.PReLU(8))


class Normalized(nn.Module):
    """A convolution, BatchNorm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(self.down(torch.relu(self.norm(self.up(x)))))


def test_running_statistics_of_a_cut_convolution_are_those_of_its_outputs():
    torch.manual_seed(0)
    net, layout = Normalized(), (("channels",),)
    names = ("up.weight", "up.bias", "norm.weight", "norm.bias")
    net.train()
    batches = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    for x in batches:
        net(x)
    net.eval()
    dims = [(name, 0, layout) for name in (*names, "norm.running_mean", "norm.running_var")]
    group = group_of(net, "channels", 6, [*dims, ("down.weight", 1, layout)], "down")
    decision = chosen(net, [group], batches[0], {"channels": 3})
    apply_plan(net, [group], decision.plan, compensated=decision.compensated)
    assert net.norm.running_mean.shape == (3,)
    reestimate_batch_norm(net, batches, lambda net, x: net(x))
    outputs = torch.stack([net.up(x).mean((0, 2, 3)) for x in batches]).mean(0)
    assert torch.allclose(net.norm.running_mean, outputs, atol=1e-5)
    assert net(batches[0]).shape == (16, 4, 6, 6)
    assert net.training is False
