"""Layers are compared on the same samples, without padding; hooks are removed again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mi_prune.calibration.layers import LayerAngles, LayerCKA, LayerRecorder
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.containers import layer_paths
from tests.support.models import batch, build
from tests.support.ranks import grouped, launch, place


class Residual(nn.Module):
    """A layer that adds ``scale`` times a linear map to its input."""

    def __init__(self, width, scale):
        super().__init__()
        self.linear, self.scale = nn.Linear(width, width), scale

    def forward(self, x):
        return x + self.scale * self.linear(x)


def tower(*scales, width=16):
    torch.manual_seed(0)
    return nn.Sequential(*(Residual(width, scale) for scale in scales)).double()


def test_sums_are_those_of_the_states_themselves():
    net, x = tower(0.5, 0.1, 1.0), torch.randn(64, 16, dtype=torch.float64)
    states = [x]
    for layer in net:
        states.append(layer(states[-1]))
    alignment, angles = LayerCKA(3), LayerAngles(4)
    alignment.update(states[1:])
    angles.update(states)
    with LayerRecorder(net, layer_paths(net, "")) as recorder:
        net(x)
    assert torch.allclose(recorder.alignment.compute(), alignment.compute())
    assert torch.allclose(recorder.angles.compute(), angles.compute())
    assert recorder.seconds > 0


def test_a_layer_that_does_nothing_has_cka_1_and_angle_0():
    net = tower(0.5, 0.0, 1.0)
    with LayerRecorder(net, layer_paths(net, "")) as recorder:
        for _ in range(4):
            net(torch.randn(32, 16, dtype=torch.float64))
    cka, angles = recorder.alignment.compute(), recorder.angles.compute()
    assert cka[0, 1] == pytest.approx(1)
    assert cka[1, 2] < 0.99
    assert angles[1, 2] == pytest.approx(0, abs=1e-7)
    assert angles[0, 1] > 0.01
    assert torch.equal(angles, angles.mT)


def test_padding_is_left_out_and_the_draw_is_the_same_for_all_layers():
    model = build("bert")
    blocks = layer_paths(model, "bert.encoder.layer")
    inputs = batch(8, 12)
    real = int(inputs["attention_mask"].sum())
    with LayerRecorder(model, blocks, scope="bert") as all_of_it, torch.no_grad():
        model(**inputs)
    assert all_of_it.alignment.pairs == real * (real - 3)
    inputs["input_ids"][inputs["attention_mask"] == 0] = 7  # padding must not matter
    with LayerRecorder(model, blocks, scope="bert") as again, torch.no_grad():
        model(**inputs)
    assert torch.allclose(all_of_it.alignment.compute(), again.alignment.compute())
    few = []
    for _ in range(2):
        with LayerRecorder(model, blocks, scope="bert", positions=20) as some, torch.no_grad():
            model(**inputs)
        few.append(some.alignment.compute())
        assert some.angles.count == 20
    assert torch.equal(*few)


def test_images_are_one_sample_each():
    net = nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)))
    with LayerRecorder(net, layer_paths(net, "")) as recorder:
        net(torch.randn(10, 3, 6, 6))
    assert recorder.alignment.pairs == 10 * 7


def test_hooks_are_removed_after_an_error():
    net = tower(0.5, 0.1)
    with pytest.raises(RuntimeError), LayerRecorder(net, layer_paths(net, "")):
        net(torch.randn(4, 5, dtype=torch.float64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def stack_of(seeds):
    net = tower(0.5, 0.1, 1.0)
    with LayerRecorder(net, layer_paths(net, "")) as recorder:
        for seed in seeds:
            draw = torch.Generator().manual_seed(seed)
            net(torch.randn(32, 16, generator=draw, dtype=torch.float64))
    return recorder.alignment.compute().tolist(), recorder.angles.compute().tolist()


def stack_on_a_rank(shares):
    return stack_of(shares[place()[0]])


def test_two_ranks_sum_what_one_does():
    alone = stack_of(range(6))
    for found in launch(2, grouped, stack_on_a_rank, [[[0, 2, 3], [1, 4, 5]]]).values():
        for mine, whole in zip(found[0], alone, strict=True):
            assert mine == [pytest.approx(row, abs=1e-9) for row in whole]


def test_what_is_no_stack_is_refused_before_it_runs():
    model = build("bert")
    with pytest.raises(PruningError, match="is no module"):
        layer_paths(model, "bert.nowhere")
    with pytest.raises(PruningError, match=r"expected an nn\.ModuleList"):
        layer_paths(model, "bert.embeddings")
    with pytest.raises(PruningError, match=r"holds 1 layer "):
        layer_paths(nn.Sequential(nn.Linear(2, 2)), "")
    with pytest.raises(PruningError, match=r"\['Linear', 'ReLU'\]"):
        layer_paths(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "")
    with pytest.raises(PruningError, match="nothing to compare"):
        LayerRecorder(model, ["bert.encoder.layer.0"])
    with pytest.raises(PruningError, match="are no modules"):
        LayerRecorder(model, ["bert.encoder.layer.0", "bert.encoder.layer.9"])
    with pytest.raises(PruningError, match="positions=3; expected a whole number of at least 4"):
        LayerRecorder(model, layer_paths(model, "bert.encoder.layer"), positions=3)
    shared = nn.Linear(4, 4)
    with pytest.raises(PruningError, match="holds a layer twice"):
        layer_paths(nn.Sequential(shared, nn.Linear(4, 4), shared, nn.Linear(4, 4)), "")
    with pytest.raises(PruningError, match="weights are shared"):
        LayerRecorder(nn.Sequential(shared, shared), ["0", "1"])


def test_layers_that_run_in_another_order_are_refused():
    net = tower(0.5, 0.1)
    order = LayerRecorder(net, ["1", "0"])
    with pytest.raises(PruningError, match="runs in another order"), order:
        net(torch.randn(8, 16, dtype=torch.float64))


def test_states_are_checked():
    with pytest.raises(PruningError, match="states=0"):
        LayerAngles(0)
    angles = LayerAngles(2)
    unused = pytest.warns(UserWarning, match="before the ``update``")
    with unused, pytest.raises(PruningError, match="No states were collected"):
        angles.compute()
    with pytest.raises(PruningError, match="expected 2 of one shape"):
        angles.update([torch.ones(3, 2), torch.ones(3, 4)])
    angles.update([torch.ones(3, 2), torch.full((3, 2), float("nan"))])
    with pytest.raises(PruningError, match="hold NaN"):
        angles.compute()


def test_hooks_are_removed_where_the_last_one_cannot_be_put_on():
    class Broken(LayerRecorder):
        def _attach(self):
            yield from super()._attach()
            raise RuntimeError("no room")

    net = tower(0.5, 0.1)
    with pytest.raises(RuntimeError, match="no room"), Broken(net, ["0", "1"]):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
