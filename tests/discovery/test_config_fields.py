"""Config fields are found by value and believed after a network was built from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.config_fields import with_config_fields, with_depth_fields
from lightning_mi_prune.discovery.discover import discover
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of, stacks_of
from tests.support.models import EVERY, build, inputs_of


def fields(groups) -> dict[str, tuple]:
    return {g.name: (g.config, g.tie) for g in groups if g.kind != "head_dim"}


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "albert", "vit"])
def test_the_fields_of_the_descriptions_are_found_again(family: str) -> None:
    model = build(family, dict(EVERY)[family])
    groups = groups_of(model)
    bare = [replace(g, config=None, tie=None, config_aliases=()) for g in groups]
    found = with_config_fields(model, bare)
    expected = fields(groups)
    for name, (config, tie) in fields(found).items():
        known = expected[name]
        # Of a width that a head keeps fixed the description has no field.
        assert (config, tie) == known or known[0] is None, name


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
def test_depth_is_found_again(family: str) -> None:
    model = build(family, dict(EVERY)[family])
    (stack,) = stacks_of(model)
    (found,) = with_depth_fields(model, [replace(stack, config_fields=(), config_lists=())])
    assert set(found.config_fields) >= set(stack.config_fields)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_network_built_from_the_config_of_a_cut_one_has_its_shapes(family: str) -> None:
    head = dict(EVERY)[family]
    model = build(family, head)
    graph = discover(model, **inputs_of(head))
    wide = [g for g in graph.groups if g.kind == "ffn"]
    assert {g.config for g in wide} == {"intermediate_size"}
    kept = {g.name: tuple(range(7)) for g in wide}
    apply_plan(model, wide, PruningPlan({g.name: g.size for g in wide}, kept))
    with torch.device("meta"):
        again = type(model)(model.config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in again.named_parameters()} == shapes


def test_a_field_that_changes_something_else_is_not_believed() -> None:
    model = build("bert")
    ffn = [g for g in groups_of(model) if g.kind == "ffn"]
    one = [replace(g, config=None, tie=None) for g in ffn[:1]]
    assert [g.config for g in with_config_fields(model, one)] == [None]


def test_other_modules_have_no_fields() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    group = DependencyGroup("ffn", "ffn", 8, (), ("2",))
    assert with_config_fields(net, [group]) == (group,)


def test_layers_know_their_index() -> None:
    class Layer(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.number, self.width, self.inside = index, 3, nn.Linear(3, 3)

    net = nn.Module()
    net.layers = nn.ModuleList(Layer(i) for i in range(4))
    (stack,) = with_depth_fields(net, [replace(stacks_of(build("bert"))[0], name="layers", size=4)])
    assert stack.index_attributes == ("layer_idx", "number")
