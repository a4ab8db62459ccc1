"""Layers that return their input, for as long as a block lasts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mi_prune.calibration.bypass import bypassed, loss_in, losses_without
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.discover import discover
from lightning_mi_prune.graph.containers import layer_paths
from lightning_mi_prune.surgery.layers import remove_layers
from tests.support.discovered import grouped_queries
from tests.support.models import batch, build, outputs


def llama():
    model, _, given = grouped_queries()
    return model.eval(), given


MODELS = {
    "bert": lambda: (build(), batch()),
    "mpnet": lambda: (build("mpnet"), batch()),
    "vit": lambda: (build("vit", "image"), {"pixel_values": torch.rand(2, 2, 8, 8)}),
    "llama": llama,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_bypassed_layer_is_one_that_is_not_there(name):
    model, given = MODELS[name]()
    (stack,) = discover(model, **given).stacks
    whole = outputs(model, given)
    with bypassed([model.get_submodule(layer_paths(model, stack.name)[1])]):
        found = outputs(model, given)
    assert torch.equal(outputs(model, given), whole)
    assert not any(part._forward_hooks for part in model.modules())
    remove_layers(model, [stack], PruningPlan({stack.name: 2}, {stack.name: (0,)}))
    assert torch.equal(found, outputs(model, given))
    assert not torch.equal(found, whole)


class Pair(nn.Module):
    def forward(self, hidden, scale=1.0):
        return 2 * hidden, scale


def test_all_but_the_first_output_is_kept():
    layer, x = Pair(), torch.ones(2)
    with bypassed([layer]):
        assert layer(x, 3.0) == (x, 3.0)
        assert layer(hidden=x)[0] is x
    assert not layer._forward_hooks


def test_hooks_come_off_after_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def fail():
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        losses_without([[], net], [fail])
    with pytest.raises(AttributeError), bypassed([net[0], None]):
        pass
    assert not any(part._forward_hooks for part in net.modules())


def test_sums_are_those_of_the_steps():
    net, xs = (
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double(),
        torch.randn(3, 4, 2).double(),
    )
    with torch.no_grad():
        sums = losses_without([[], [net[0]]], [lambda x=x: net(x).sum().item() for x in xs])
        assert sums.tolist() == pytest.approx([net(xs).sum().item(), net[1](xs).sum().item()])


@pytest.mark.parametrize("result", [None, torch.ones(2), {"logits": torch.ones(1)}, 0.5])
def test_what_holds_no_loss_is_shown(result):
    with pytest.raises(PruningError, match=r"training step returned .* expected a tensor of one"):
        loss_in(result)
