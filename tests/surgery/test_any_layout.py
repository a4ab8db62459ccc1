"""Cuts of models that no family describes: any tensor, any layout, any number on a module."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, SizeAttribute
from lightning_mi_prune.graph.layouts import unit_positions
from lightning_mi_prune.surgery.optimizers import update_optimizers
from lightning_mi_prune.surgery.tensors import tensors_of
from lightning_mi_prune.surgery.transaction import (
    cancel_cut,
    cut_model,
    reshape_model,
    restore_model,
)
from lightning_mi_prune.surgery.units import apply_plan, reshape_tensors, restore_plan
from tests.support.discovered import MODELS, build, graph_of, half, kinds_of, output_of

EVERY = [(name, kind) for name in MODELS for kind in ("ffn", "heads", "channels", "query_heads")]


def values_of(model):
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def numbers_of(model, graph):
    places = [(a.module, a.attribute) for group in graph.groups for a in group.attributes]
    return [getattr(model.get_submodule(path), name.split(".")[0], None) for path, name in places]


@torch.no_grad()
def mask(model, graph, plan):
    """Zero the weights with which consumers read removed units."""
    for group in graph.groups:
        removed = [unit for unit in range(group.size) if unit not in plan.kept[group.name]]
        for s in group.tensors:
            if s.tensor in {f"{consumer}.weight" for consumer in group.consumers}:
                units = unit_positions(s.layout, group.name, group.all_widths({}))
                places = torch.tensor([place for unit in removed for place in units[unit]])
                model.get_parameter(s.tensor).index_fill_(s.dim, places.long(), 0)


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_a_cut_model_is_the_masked_one(name, kind):
    if kind not in kinds_of(name):
        return
    (model, call), graph = build(name), graph_of(name)
    groups = tuple(group for group in graph.groups if group.kind == kind and group.consumers)
    plan = half(graph, {kind})
    masked = copy.deepcopy(model)
    mask(masked, PruningGraph(groups), plan)
    cut_model(model, graph, plan, current=graph.full)
    assert torch.allclose(output_of(model, call), output_of(masked, call), atol=1e-5)
    assert not torch.allclose(output_of(model, call), output_of(build(name)[0], call), atol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_a_cancelled_cut_leaves_everything_as_it_was(name):
    (model, call), graph = build(name), graph_of(name)
    before, objects, numbers = output_of(model, call), tensors_of(model), numbers_of(model, graph)
    done = cut_model(model, graph, half(graph, set(kinds_of(name))), current=graph.full)
    assert sum(p.numel() for p in model.parameters()) < sum(t.numel() for t in objects.values())
    cancel_cut(model, graph, done)
    assert {n: id(t) for n, t in tensors_of(model).items()} == {
        n: id(t) for n, t in objects.items()
    }
    assert [str(now) for now in numbers_of(model, graph)] == [str(then) for then in numbers]
    assert torch.equal(output_of(model, call), before)


@pytest.mark.parametrize("name", MODELS)
def test_a_snapshot_brings_shapes_values_and_buffers_back(name):
    (model, call), graph = build(name), graph_of(name)
    before, values = output_of(model, call), values_of(model)
    plan = half(graph, set(kinds_of(name)))
    cut_model(model, graph, plan, current=graph.full)
    small, smaller = output_of(model, call), copy.deepcopy(model.state_dict())
    restore_model(model, graph, graph.full, values, current=plan, available={})
    assert torch.equal(output_of(model, call), before)
    reshape_model(model, graph, plan, current=graph.full, available={})
    model.load_state_dict(smaller)
    assert torch.equal(output_of(model, call), small)


@pytest.mark.parametrize("name", MODELS)
def test_two_cuts_are_one(name):
    (once, call), graph = build(name), graph_of(name)
    twice = copy.deepcopy(once)
    every, first, current = half(graph, set(kinds_of(name))), kinds_of(name)[0], graph.full
    cut_model(once, graph, every, current=current)
    for kinds in ({first}, set(kinds_of(name))):
        current = cut_model(twice, graph, half(graph, kinds), current=current).after
    assert all(
        torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True)
    )
    assert torch.equal(output_of(once, call), output_of(twice, call))


@pytest.mark.parametrize("name", MODELS)
def test_optimizer_state_is_cut_along_every_dimension(name):
    (model, call), graph = build(name), graph_of(name)
    adam = torch.optim.Adam(model.parameters())
    result = model(*call.args, **call.kwargs)
    (result if isinstance(result, torch.Tensor) else result.logits).square().mean().backward()
    adam.step()
    for parameter in model.parameters():  # a moment that shows which entries stay
        if parameter in adam.state:
            adam.state[parameter]["exp_avg"].copy_(parameter.detach())
    done = cut_model(model, graph, half(graph, set(kinds_of(name))), current=graph.full)
    update_optimizers([adam], done.rewrites)
    cut = {id(rewrite.new) for rewrite in done.rewrites}
    followed = [p for p in model.parameters() if id(p) in cut and p in adam.state]
    assert followed
    assert all(torch.equal(adam.state[p]["exp_avg"], p) for p in followed)


class Scaled(nn.Module):
    """A network with buffers: one saved, one not, and that one held twice."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("mean", torch.arange(4.0))
        self.register_buffer("scale", torch.arange(1.0, 5.0), persistent=False)
        self.same = nn.Identity()
        self.same.register_buffer("scale", self.scale, persistent=False)
        self.sizes, self.shape = [9, 4], (4,)

    def forward(self, x):
        return self.down((self.up(x) - self.mean) * self.scale * self.same.scale)


UNITS = (("units",),)


def scaled(*numbers):
    dims = {
        "up.weight": (0, (4, 3)),
        "up.bias": (0, (4,)),
        "down.weight": (1, (2, 4)),
        "mean": (0, (4,)),
        "scale": (0, (4,)),
        "same.scale": (0, (4,)),
    }
    tensors = tuple(
        PrunableDim(n, d, shape, UNITS, buffer=n.endswith(("mean", "scale")))
        for n, (d, shape) in dims.items()
    )
    found = [SizeAttribute("", name, UNITS) for name in numbers]
    sized = [
        SizeAttribute("up", "out_features", UNITS),
        SizeAttribute("down", "in_features", UNITS),
    ]
    return DependencyGroup("units", "ffn", 4, tensors, ("down",), (*sized, *found))


def kept(*units):
    return PruningPlan({"units": 4}, {"units": units})


def test_buffers_outside_the_state_dict_follow_to_any_plan():
    net, group, x = Scaled(), scaled(), torch.randn(5, 3)
    values = {name: t.clone() for name, t in net.state_dict().items()}
    apply_plan(net, [group], kept(1, 3))
    assert net.mean.tolist() == [1, 3]
    assert net.scale.tolist() == [2, 4]
    assert net.same.scale is net.scale
    masked = Scaled()
    masked.load_state_dict(values)
    with torch.no_grad():
        masked.down.weight[:, [0, 2]] = 0
    assert torch.allclose(net(x), masked(x), atol=1e-6)
    fresh = Scaled()
    reshape_tensors(fresh, [group], kept(1, 3))
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x), net(x))
    reshape_tensors(fresh, [group], kept(0, 1, 3))
    assert fresh.scale.tolist() == [1, 2, 4]
    restore_plan(net, [group], kept(0, 1, 2, 3), values)
    assert net.scale.tolist() == [1, 2, 3, 4]
    assert net.same.scale is net.scale
    assert {name: t.tolist() for name, t in net.state_dict().items()} == {
        name: t.tolist() for name, t in values.items()
    }


def test_numbers_in_lists_and_tuples_follow_on_copies():
    net = Scaled()
    sizes, group = net.sizes, scaled("sizes.1")
    group = replace(
        group, attributes=(*group.attributes, SizeAttribute("", "shape", UNITS, sequence=True))
    )
    apply_plan(net, [group], kept(0, 2))
    assert (net.sizes, net.shape, sizes) == ([9, 2], (2,), [9, 4])


class Computed(Scaled):
    """A number that cannot be set, and one that is none."""

    @property
    def width(self):
        return 4

    name, flag = "net", True


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("width", "'width' is computed by the Computed itself; group 'units'"),
        ("name", "'name' is 'net', no whole number"),
        ("flag", "'flag' is True, no whole number"),
        ("absent", "'absent' is no attribute of this Computed"),
        ("sizes.5", r"'sizes.5' is no attribute of this Computed"),
    ],
)
def test_numbers_that_cannot_follow_are_refused_by_name_before_anything_changes(number, message):
    net = Computed()
    before = {name: id(tensor) for name, tensor in tensors_of(net).items()}
    with pytest.raises(PruningError, match=message):
        apply_plan(net, [scaled(number)], kept(0, 2))
    assert {name: id(tensor) for name, tensor in tensors_of(net).items()} == before


def test_a_parametrised_weight_is_refused_by_name():
    net = Scaled()
    torch.nn.utils.parametrizations.weight_norm(net.up)
    with pytest.raises(PruningError, match=r"'up.weight' is computed by a parametrization"):
        apply_plan(net, [scaled()], kept(0, 2))
