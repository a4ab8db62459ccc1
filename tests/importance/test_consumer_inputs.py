"""Units anywhere in the input of any consumer are ranked by what brute force finds to be lost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_mi_prune.calibration.gradients import GradientRecorder, GradientSums, relevance_of
from lightning_mi_prune.core.consumers import stacked_weight
from lightning_mi_prune.graph import inputs
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.importance.criteria import (
    ActivationNorm,
    Magnitude,
    MutualInformation,
    Random,
    Taylor,
)
from lightning_mi_prune.importance.ranking import rank_groups
from lightning_mi_prune.importance.statistics import unit_statistics
from tests.support.layouts import Convolutions, Flattened, Grouped, Joined, pairs, recorded
from tests.support.relevance import weighted_rows

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
CRITERIA = [MutualInformation(), MutualInformation("topk", 0.01), Magnitude(), ActivationNorm()]


def residual(covariance, weight, kept):
    """Half the variance of ``weight @ x`` that the kept entries leave unexplained."""
    inner = covariance[kept][:, kept] + 1e-12 * torch.eye(len(kept)).to(covariance)
    cross = weight @ covariance
    explained = cross[:, kept] @ torch.linalg.pinv(inner) @ cross[:, kept].mT
    return float((cross @ weight.mT - explained).trace()) / 2


def weights_of(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def seeded(make):
    torch.manual_seed(0)
    return make().double()


def test_channels_in_a_flattened_map_lose_what_brute_force_finds():
    net = seeded(Flattened)
    groups, x = net.groups(), torch.randn(4000, 3, 6, 6, dtype=torch.float64)
    moments = recorded(net, groups, x)
    ranking = rank_groups(groups, moments, weights_of(net), full_plan(groups))["channels"]
    _, covariance = moments["channels"].stabilized()
    for step in range(1, 6):
        kept = [c * 4 + p for c in sorted(ranking.order[step:]) for p in range(4)]
        wanted = residual(covariance, net.down.weight.detach(), kept)
        assert ranking.loss[step - 1] == pytest.approx(wanted, rel=1e-4, abs=1e-8)
    least = min(
        residual(covariance, net.down.weight.detach(), [c * 4 + p for c in left for p in range(4)])
        for left in itertools.combinations(range(6), 5)
    )
    assert ranking.loss[0] == pytest.approx(least, abs=1e-6)
    assert ranking.order[0] in (2, 5)  # the copies


def test_a_large_flattened_map_is_scored_by_the_moments_of_its_channels(monkeypatch):
    monkeypatch.setattr(inputs, "_MOST_ENTRIES", 8)
    net = seeded(Flattened)
    groups, x = net.groups(), torch.randn(500, 3, 6, 6, dtype=torch.float64)
    moments = recorded(net, groups, x)["channels"]
    maps = net.pool(torch.relu(net.up(x))).permute(0, 2, 3, 1).reshape(-1, 6).detach()
    mean, covariance = moments.statistics()
    assert int(moments.count) == 2000
    assert torch.allclose(mean, maps.mean(0))
    assert torch.allclose(covariance, maps.mT.cov(correction=0))
    kept = full_plan(groups).kept
    (found,) = unit_statistics(
        groups[0], {"channels": moments}, weights_of(net), kept, full_plan(groups), groups
    )
    rows = net.down.weight.detach().view(3, 6, 4).permute(2, 0, 1).reshape(12, 6)
    assert torch.allclose(found.readout.mT @ found.readout, rows.mT @ rows)
    assert found.outputs == 12
    assert found.readout.shape == (6, 6)


def test_a_convolution_is_scored_over_the_positions_of_its_kernel():
    net = seeded(Convolutions)
    groups, x = net.groups(), torch.randn(20, 3, 8, 8, dtype=torch.float64)
    moments = recorded(net, groups, x)
    mean, covariance = moments["channels"].statistics()
    maps = torch.relu(net.up(x)).permute(0, 2, 3, 1).reshape(-1, 6).detach()
    assert torch.allclose(mean, maps.mean(0))
    assert torch.allclose(covariance, maps.mT.cov(correction=0))
    plan = full_plan(groups)
    ranking = rank_groups(groups, moments, weights_of(net), plan)["channels"]
    stacked = stacked_weight(net.down.weight.detach(), 1).permute(2, 0, 1).reshape(36, 6)
    for step in range(1, 6):
        wanted = residual(covariance, stacked, sorted(ranking.order[step:]))
        assert ranking.loss[step - 1] == pytest.approx(wanted, rel=1e-4, abs=1e-8)
    assert ranking.order[0] in (2, 5)
    (found,) = unit_statistics(groups[0], moments, weights_of(net), plan.kept, plan, groups)
    noise = 0.3 * float((stacked @ found.covariance @ stacked.mT).diagonal().mean())
    assert found.noise(0.3) == pytest.approx(noise)


@pytest.mark.parametrize("criterion", CRITERIA, ids=lambda c: type(c).__name__)
def test_a_transposed_linear_layer_is_ranked_as_the_linear_one(criterion):
    plain, transposed = pairs()
    x = torch.randn(2000, 4, dtype=torch.float64)
    found = []
    for net in (plain, transposed):
        groups = net.groups()
        moments = recorded(net, groups, x)
        found.append(rank_groups(groups, moments, weights_of(net), full_plan(groups), criterion))
    assert found[0]["ffn"] == found[1]["ffn"]


def test_only_the_own_entries_of_a_joint_input_are_scored():
    net = seeded(Joined)
    groups, x = net.groups(), torch.randn(3000, 4, dtype=torch.float64)
    moments, plan = recorded(net, groups, x), full_plan(groups)
    units, columns = net.units(x).detach(), {"first": range(5), "second": range(9, 15)}
    for group in groups:
        (found,) = unit_statistics(group, moments, weights_of(net), plan.kept, plan, groups)
        own = [*columns[group.name]]
        assert torch.allclose(found.mean, units[:, own].mean(0))
        assert torch.allclose(found.covariance, units[:, own].mT.cov(correction=0), atol=1e-10)
        assert torch.equal(found.readout, net.down.weight.detach()[:, own])
    found = rank_groups(groups, moments, weights_of(net), plan)
    assert {name: len(ranking.order) for name, ranking in found.items()} == {
        "first": 5,
        "second": 6,
    }


def test_units_of_a_product_are_put_next_to_each_other():
    net = seeded(Grouped)
    groups, x = net.groups(), torch.randn(3000, 5, dtype=torch.float64)
    moments, plan = recorded(net, groups, x), full_plan(groups)
    grid = torch.arange(24).view(3, 2, 4)
    orders = {"kv": grid, "queries": grid.transpose(0, 1), "size": grid.permute(2, 0, 1)}
    for group in groups:
        (found,) = unit_statistics(group, moments, weights_of(net), plan.kept, plan, groups)
        index = orders[group.name].flatten()
        assert torch.equal(found.readout, net.out.weight.detach()[:, index])
        assert found.units == group.size
    size = groups[2]
    (found,) = unit_statistics(
        size, moments, weights_of(net), plan.kept, plan, groups, within={"kv": (0, 2)}
    )
    assert torch.equal(
        found.readout, net.out.weight.detach()[:, grid[[0, 2]].permute(2, 0, 1).flatten()]
    )


def per_position(net, x):
    """Weighted gradients at the outputs of a convolution, changes of the loss at its inputs, and
    weighted gradients there."""
    hidden = torch.relu(net.up(x)).detach().requires_grad_()
    output = net.down(hidden)
    output.retain_grad()
    output.square().mean().backward()
    change = (hidden * hidden.grad * len(x)).flatten(2).sum(2)
    bias = 0 if net.down.bias is None else net.down.bias.view(-1, 1, 1)
    places = (output.grad, output - bias), (hidden.grad, hidden)
    grad, inputs_grad = (
        weighted_rows(grad.movedim(1, -1), at.movedim(1, -1).detach()) * len(x)
        for grad, at in places
    )
    return grad, change, inputs_grad


@pytest.mark.parametrize("shared", [False, True])
def test_gradients_of_a_convolution_are_summed_over_its_positions(shared):
    net = seeded(Convolutions)
    (group,) = net.groups()
    if shared:  # relevance is then over the units
        group = replace(group, consumers_by_input=(("down",),))
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    grad, change, inputs_grad = per_position(net, x)
    with GradientRecorder(net, [group], taylor=True) as recorder, recorder.step(0):
        net(x).square().mean().backward()
    ((_, sums),) = recorder.sums.items()
    found = relevance_of({"channels": sums})["channels"]
    wanted = inputs_grad if shared else grad
    assert torch.allclose(found.matrix, wanted.mT @ wanted / 5, rtol=1e-4)
    assert torch.allclose(found.taylor, change.square().mean(0).sqrt(), rtol=1e-4)


def test_first_order_changes_find_the_own_entries_of_a_joint_input():
    net = seeded(Joined)
    groups, x = net.groups(), torch.randn(50, 4, dtype=torch.float64)
    units = net.units(x).detach().requires_grad_()
    functional.linear(units, net.down.weight, net.down.bias).square().mean().backward()
    change = (units * units.grad * 50).square().mean(0).sqrt()
    with GradientRecorder(net, groups, taylor=True) as recorder, recorder.step(0):
        net(x).square().mean().backward()
    found = relevance_of(recorder.sums)
    assert torch.allclose(found["first"].taylor, change[:5], rtol=1e-4)
    assert torch.allclose(found["second"].taylor, change[9:], rtol=1e-4)
    order = rank_groups(
        groups,
        recorded(net, groups, torch.randn(3000, 4, dtype=torch.float64)),
        weights_of(net),
        full_plan(groups),
        Taylor(),
        relevance=found,
    )["second"].order
    assert list(order) == change[9:].argsort().tolist()


def test_groups_in_one_input_share_its_sums_also_when_they_were_read_from_a_file():
    net = seeded(Joined)
    groups, x = net.groups(), torch.randn(50, 4, dtype=torch.float64)
    moments = recorded(net, groups, x)
    assert moments["first"] is moments["second"]
    assert int(moments["first"].count) == 50
    found = []
    for restored in (False, True):
        recorder = GradientRecorder(net, groups)
        assert recorder.sums["first"].matrix is recorder.sums["second"].matrix
        if restored:
            recorder.sums = {
                key: GradientSums(s.dimension, s.units).unpack(s.packed())
                for key, s in recorder.sums.items()
            }
        with recorder, recorder.step(0):
            net(x).square().mean().backward()
        found.append(recorder.sums)
    for key in ("first", "second"):
        assert torch.equal(found[0][key].matrix, found[1][key].matrix)
        assert torch.equal(found[0][key].matrix, found[0]["first"].matrix)
        assert found[0][key].matrix.any()


def test_every_criterion_ranks_inputs_with_different_entries_a_unit():
    """One group read twice: as it is, and flattened with four positions a unit."""
    net = seeded(Flattened)
    head = nn.Linear(6, 3).double()
    net.add_module("head", head)

    def forward(x):
        maps = net.pool(torch.relu(net.up(x)))
        return net.down(maps.flatten(1)) + head(maps.mean((2, 3)))

    net.forward = forward
    (group,) = net.groups()
    read = replace(group.tensors[0], tensor="head.weight", dim=1, shape=(3, 6))
    other = replace(
        group,
        consumers=("down", "head"),
        consumers_by_input=(("down",), ("head",)),
        tensors=(*group.tensors, read),
    )
    moments = recorded(net, [other], torch.randn(2000, 3, 6, 6, dtype=torch.float64))
    for criterion in [*CRITERIA, Random()]:
        ranking = rank_groups([other], moments, weights_of(net), full_plan([other]), criterion)
        assert sorted(ranking["channels"].order) == [*range(6)]
    best = rank_groups([other], moments, weights_of(net), full_plan([other]))["channels"]
    assert best.order[0] in (2, 5)
