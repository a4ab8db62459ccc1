"""Costs read off layouts against what is counted on models that were cut."""

from __future__ import annotations

import pytest

from lightning_mi_prune.allocation.costs import ParameterCosts
from lightning_mi_prune.allocation.macs import count_macs, measure_macs
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, count_parameters
from lightning_mi_prune.surgery.transaction import cut_model
from tests.support.discovered import MODELS, build, graph_of, half, kinds_of


def costs_of(model, graph, call):
    total = sum(p.numel() for p in model.parameters())
    parameters = ParameterCosts(graph.groups, total - count_parameters(graph.groups))
    return parameters, measure_macs(model, graph.groups, {"": call})


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_macs_are_those_of_the_cut_model(name):
    (model, call), graph = build(name), graph_of(name)
    parameters, macs = costs_of(model, graph, call)
    assert macs.total(graph.full.widths) == count_macs(model, call) > 0
    for kinds in [*({kind} for kind in kinds_of(name)), set(kinds_of(name))]:
        cut, plan = build(name)[0], half(graph, kinds)
        cut_model(cut, graph, plan, current=graph.full)
        assert parameters.total(plan.widths) == sum(p.numel() for p in cut.parameters())
        assert macs.total(plan.widths) == count_macs(cut, call)


@pytest.mark.parametrize("name", MODELS)
def test_costs_measured_on_a_cut_model_know_the_whole_one(name):
    (model, call), graph = build(name), graph_of(name)
    dense, plan = count_macs(model, call), half(graph, set(kinds_of(name)))
    cut_model(model, graph, plan, current=graph.full)
    macs = measure_macs(model, graph.groups, {"": call}, plan.widths)
    assert macs.total({}) == count_macs(model, call)
    assert macs.total(graph.full.widths) == pytest.approx(dense)


@pytest.mark.parametrize("name", MODELS)
def test_savings_are_differences_of_totals(name):
    (model, call), graph = build(name), graph_of(name)
    at = half(graph, {kinds_of(name)[0]}).widths
    for costs in costs_of(model, graph, call):
        for group in graph.groups:
            options = [*range(at[group.name], 0, -1)]
            expected = [costs.total(at) - costs.total({**at, group.name: w}) for w in options]
            assert costs.savings(group.name, at, options) == pytest.approx(expected)
            others = set(graph.full.widths) - {group.name} - costs.neighbours(group.name)
            narrow = {**at, **dict.fromkeys(others, 1)}
            assert costs.savings(group.name, narrow, options) == pytest.approx(expected)


def test_a_group_may_cut_both_dimensions_of_a_tensor_and_be_added_to_others():
    dims = (
        PrunableDim("square", 0, (6, 6), (("units",),)),
        PrunableDim("square", 1, (6, 6), (("units",),)),
        PrunableDim("joined", 1, (2, 13), (("units",), ("others", 2), (1,))),
        PrunableDim("mean", 0, (6,), (("units",),), buffer=True),
    )
    others = PrunableDim("joined", 1, (2, 13), (("units",), ("others", 2), (1,)))
    units = DependencyGroup("units", "hidden", 6, dims, ("o",), partners=(("others", 3),))
    other = DependencyGroup("others", "ffn", 3, (others,), ("o",), partners=(("units", 6),))
    costs = ParameterCosts([units, other])
    assert costs.total({}) == 36 + 26 == count_parameters([units, other])
    assert costs.total({"units": 2, "others": 1}) == 4 + 2 * (2 + 2 + 1)
    assert costs.savings("units", {"units": 6}, [5, 2]) == [11 + 2, 32 + 8]
    assert ParameterCosts([units]).total({"units": 1}) == 1 + 2 * (1 + 6 + 1)
    assert costs.neighbours("others") == frozenset()
