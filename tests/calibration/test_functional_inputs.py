"""What is collected at a functional weight is what an equal linear layer gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_mi_prune import discover
from lightning_mi_prune.calibration.activations import ActivationRecorder, input_sizes
from lightning_mi_prune.calibration.collect import collect_activations
from lightning_mi_prune.calibration.gradients import GradientRecorder, empty_sums
from tests.conftest import count_hooks
from tests.support.functional_weights import ORDERS, Layered, Products, experts

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])


def both(order):
    """The group of neurons of the network with a parameter, and of that with a layer."""
    net = Products(order)
    for one in (net, Layered(net)):
        graph = discover(one, torch.randn(4, 6))
        yield one, next(group for group in graph.groups if group.size == 24)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("order", ORDERS)
def test_moments_are_those_of_the_layer(order, mode):
    x, found = torch.randn(40, 6), []
    for net, group in both(order):
        assert input_sizes(net, [group]) == {group.name: 24}
        with ActivationRecorder(net, [group], positions=30) as recorder, mode():
            net(x)
            net(x + 1)
        assert count_hooks(net) == 0
        found.append(recorder.moments[group.name])
    one, two = found
    assert int(one.count) == int(two.count) == 30
    for a, b in zip(one.compute(), two.compute(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("order", ORDERS)
def test_padding_is_left_out_as_at_a_layer(order):
    x, found = torch.randn(3, 5, 6), []
    for net, group in both(order):
        graph = discover(net, x, attention_mask=MASK)
        group = next(group for group in graph.groups if group.size == 24)
        with ActivationRecorder(net, [group]) as recorder, torch.no_grad():
            net(x, attention_mask=MASK)
        found.append(recorder.moments[group.name])
    assert int(found[0].count) == int(found[1].count) == int(MASK.sum())
    assert torch.equal(found[0].compute()[1], found[1].compute()[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_those_of_the_layer_carried_to_its_input(order, autocast):
    x, found = torch.randn(40, 6), []
    for net, group in both(order):
        with GradientRecorder(net, [group], taylor=True) as recorder:
            for step in range(2):
                net.zero_grad()
                with recorder.step(step), torch.autocast("cpu", torch.bfloat16, autocast):
                    net(x + step).float().square().mean().backward()
        assert count_hooks(net) == 0
        found.append((net, recorder.sums[group.name]))
    (net, one), (layered, two) = found
    assert one.over_units
    assert not two.over_units
    assert torch.equal(one.counts, two.counts)
    weight = layered.down.weight.detach().double()
    tolerance = 2e-2 if autocast else 1e-5
    for mine, other in ((one.matrix, weight.mT @ two.matrix @ weight), (one.taylor, two.taylor)):
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_training_do_not_change(order):
    (net, group), _ = both(order)
    x, found = torch.randn(40, 6), []
    for recorded in (False, True):
        net.zero_grad()
        recorder = GradientRecorder(net, [group])
        if recorded:
            with recorder, recorder.step(0):
                net(x).square().mean().backward()
        else:
            net(x).square().mean().backward()
        found.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


IDS = torch.arange(96).reshape(4, 24) % 37 + 3


def by_hand(model, layer):
    """Inputs of the output projection of all experts, one sample a row."""
    rows = []
    module = model.model.layers[layer].mlp.experts

    def hook(module, args, kwargs):
        x, chosen = (*args, *kwargs.values())[:2]
        x = x.reshape(-1, x.shape[-1])
        for token, of in zip(x, chosen.reshape(len(x), -1), strict=True):
            for expert in of:
                gate, up = functional.linear(token, module.gate_up_proj[expert]).chunk(2)
                rows.append(module.act_fn(gate) * up)

    with torch.no_grad():
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        model(input_ids=IDS, use_cache=False)
        handle.remove()
    return torch.stack(rows).double()


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_samples_of_all_experts_are_pooled(name, implementation):
    model = experts(name, implementation)
    graph = discover(model, input_ids=IDS)
    groups = [g for g in graph.groups if any("experts.down" in path for path in g.consumers)]
    with ActivationRecorder(model, groups) as recorder, torch.inference_mode():
        model(input_ids=IDS, use_cache=False)
    for layer, group in enumerate(groups):
        rows = by_hand(model, layer)
        moments = recorder.moments[group.name]
        assert int(moments.count) == len(rows) == 2 * IDS.numel()
        mean, covariance = moments.compute()
        torch.testing.assert_close(mean, rows.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(covariance, rows.T.cov(correction=0), rtol=0, atol=1e-6)


def test_a_bounded_sample_is_drawn_from_all_experts():
    """Experts run one after another: the first of them must not take the whole share of a batch."""
    model = experts("Mixtral", "eager")
    graph = discover(model, input_ids=IDS)
    group = next(g for g in graph.groups if "experts.down" in g.consumers[0])
    data = collect_activations(
        model, [group], [IDS] * 4, lambda m, ids: m(input_ids=ids), positions=96
    )
    moments = data.moments[group.name]
    assert int(moments.count) == 96
    mean, _ = moments.compute()
    rows = by_hand(model, 0)
    error = (mean - rows.mean(0)) / (rows.std(0) / 96**0.5)
    assert float(error.square().mean()) < 2


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("implementation", ["grouped_mm", "eager", "batched_mm"])
def test_gradients_at_experts_do_not_depend_on_how_these_are_computed(implementation, again):
    want = None
    for how in ("eager", implementation):
        model = experts("Mixtral", how).train()
        if again and want is not None:
            for layer in model.model.layers:
                layer.gradient_checkpointing = True
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        graph = discover(model, input_ids=IDS)
        groups = [g for g in graph.groups if any("experts" in path for path in g.consumers)]
        assert empty_sums(model, groups)[groups[-1].name].over_units
        with GradientRecorder(model, groups, taylor=True) as recorder, recorder.step(0):
            model(input_ids=IDS, labels=IDS).loss.backward()
        sums = {key: value for key, value in recorder.sums.items() if "ffn" in key}
        want = sums if want is None else want
        for key, value in sums.items():
            scale = float(want[key].matrix.abs().max())
            assert scale > 0
            torch.testing.assert_close(value.matrix, want[key].matrix, rtol=0, atol=1e-4 * scale)
            torch.testing.assert_close(value.taylor, want[key].taylor, rtol=1e-3, atol=1e-9)
