from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_mi_prune.allocation.costs import MacCosts, ParameterCosts
from lightning_mi_prune.allocation.macs import count_macs, measure_macs
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, count_parameters
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import batch, build, entries_of, random_plan

FAMILIES = ["bert", "distilbert", "albert", "deberta-v2"]
ONE = RecordedCall((), batch(1))


def sizes(groups):
    return {group.name: group.size for group in groups}


def plans(groups):
    """Cuts to the same share, to random shares, and with whole sublayers gone."""
    whole = sizes(groups)
    random = {a.name: 1 + 7 * i % a.size for i, a in enumerate(groups)}
    empty = {a.name: 0 if a.name.endswith("0.ffn") else max(1, a.size // 2) for a in groups}
    headless = {a.name: 0 if a.may_be_empty and a.kind == "heads" else a.size for a in groups}
    yield random_plan(groups)
    for widths in (random, empty, headless):
        yield PruningPlan(whole, {name: tuple(range(width)) for name, width in widths.items()})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["sequence", "masked-lm"])
def test_costs_are_those_of_models_that_are_cut(family, head):
    model = build(family, head)
    groups = groups_of(model)
    macs = measure_macs(model, groups, {"": ONE})
    outside = sum(p.numel() for p in model.parameters()) - count_parameters(groups)
    parameters = ParameterCosts(groups, outside)
    assert macs.total(sizes(groups)) == count_macs(model, ONE)
    for plan in plans(groups):
        cut = copy.deepcopy(model)
        apply_plan(cut, groups, plan)
        widths = {name: len(kept) for name, kept in plan.kept.items()}
        assert macs.total(widths) == count_macs(cut, ONE)
        assert parameters.total(widths) == sum(p.numel() for p in cut.parameters())


def test_costs_as_built_are_found_on_a_cut_model():
    model = build("bert")
    groups = groups_of(model)
    built = count_macs(model, ONE)
    (*_, headless) = plans(groups)
    for plan in (random_plan(groups), headless):
        cut = copy.deepcopy(model)
        apply_plan(cut, groups, plan)
        widths = {name: len(kept) for name, kept in plan.kept.items()}
        macs = measure_macs(cut, groups, {"": ONE}, widths)
        assert macs.total(sizes(groups)) == built
        assert macs.total(widths) == macs.total({}) == count_macs(cut, ONE)


def test_heads_cost_their_products_over_all_pairs_of_positions():
    model = build("bert")
    groups = groups_of(model)
    macs = measure_macs(model, groups, {"": ONE})
    (heads,) = (a for a in groups if a.name.endswith("0.heads"))
    length, hidden = 12, 24
    weights = 4 * entries_of(heads) * hidden * length
    expected = weights + 2 * length**2 * entries_of(heads)
    assert macs.savings(heads.name, sizes(groups), [heads.size - 1]) == [expected]


def test_a_network_inside_a_module_is_counted_by_its_call():
    model = build("bert")
    root = nn.ModuleDict({"net": nn.ModuleDict({"inner": model})})
    groups = groups_of(root)
    with ActivationRecorder(root, groups) as recorder:
        model(**batch(4))
    macs = measure_macs(root, groups, recorder.calls(groups))
    assert macs.total({}) == count_macs(model, ONE)


def test_convolutions_count_and_embeddings_do_not():
    net = nn.ModuleDict({"words": nn.Embedding(9, 4), "conv": nn.Conv1d(4, 6, 3)})
    net.forward = lambda ids: net.conv(net.words(ids).transpose(1, 2))
    units = (("stream",),)
    tensors = (
        PrunableDim("words.weight", 1, (9, 4), units),
        PrunableDim("conv.weight", 1, (6, 4, 3), units),
    )
    stream = DependencyGroup("stream", "hidden", 4, tensors, ("conv",))
    macs = measure_macs(
        net, [stream], {"": RecordedCall((torch.ones(1, 7, dtype=torch.long),), {})}
    )
    assert macs.savings("stream", {"stream": 4}, [3]) == [5 * 6 * 3]
    assert macs.fixed == 0


def test_measuring_leaves_modes_and_hooks_as_they_were():
    model = build("bert").train()
    groups = groups_of(model)
    with pytest.raises(ValueError, match="exactly one"):
        measure_macs(model, groups, {"": RecordedCall((), {"nonsense": 1})})
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_units_cost_less_where_a_neighbour_has_shrunk():
    groups = groups_of(build("bert", "masked-lm"))
    costs, now = ParameterCosts(groups), sizes(groups)
    (stream,) = (a.name for a in groups if a.kind == "hidden")
    ffn = next(a.name for a in groups if a.kind == "ffn")
    assert costs.savings(ffn, now, [now[ffn] - 1]) == [2 * 24 + 1]
    assert costs.savings(ffn, {**now, stream: 10}, [now[ffn] - 1]) == [2 * 10 + 1]
    assert costs.neighbours(ffn) == {stream}
    assert costs.neighbours(stream) == {a.name for a in groups} - {stream}


@pytest.mark.parametrize("name", ["hidden", "ffn", "heads"])
def test_savings_are_differences_of_totals(name):
    groups = groups_of(build("bert", "masked-lm"))  # its transform is square in the stream
    costs = ParameterCosts(groups, fixed=7)
    now = {a.name: max(1, a.size - i) for i, a in enumerate(groups)}
    group = next(a for a in groups if a.kind == name)
    options = list(range(now[group.name], -1, -1))
    expected = [costs.total(now) - costs.total({**now, group.name: w}) for w in options]
    assert costs.savings(group.name, now, options) == expected


def test_groups_that_are_not_named_keep_their_present_width():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    low = linear_group(net, "low", kind="ffn", producers=["0"], consumers=["2"])
    high = linear_group(net, "high", kind="ffn", producers=["2"], consumers=["4"])
    costs = ParameterCosts([low, high], fixed=2, current={"high": 3})
    assert costs.total({"low": 5}) == ParameterCosts([low, high], 2).total({"low": 5, "high": 3})
    assert costs.savings("low", {"low": 5}, [4]) == [3 + 1 + 3]
    assert MacCosts([low], fixed=5).total({}) == 5
