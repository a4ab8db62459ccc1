from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_mi_prune.axes import Slice, WidthAxis, count_parameters
from lightning_mi_prune.costs import MacCosts, ParameterCosts, measure_macs
from lightning_mi_prune.families import find_axes, linear_axis
from lightning_mi_prune.listener import Example, Listener
from lightning_mi_prune.measure import count_macs
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.surgery import apply
from tests.models import batch, build, random_plan

FAMILIES = ["bert", "distilbert", "albert", "deberta-v2"]
ONE = Example((), batch(1))


def sizes(axes):
    return {axis.name: axis.size for axis in axes}


def plans(axes):
    """Cuts to the same share, to random shares, and with whole sublayers gone."""
    whole = sizes(axes)
    random = {a.name: 1 + 7 * i % a.size for i, a in enumerate(axes)}
    empty = {a.name: 0 if a.name.endswith("0.ffn") else max(1, a.size // 2) for a in axes}
    silent = {a.name: 0 if a.may_vanish and a.kind == "heads" else a.size for a in axes}
    yield random_plan(axes)
    for widths in (random, empty, silent):
        yield Plan(whole, {name: tuple(range(width)) for name, width in widths.items()})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["sequence", "masked-lm"])
def test_costs_are_those_of_models_that_are_really_cut(family, head):
    model = build(family, head)
    axes = find_axes(model)
    macs = measure_macs(model, axes, {"": ONE})
    outside = sum(p.numel() for p in model.parameters()) - count_parameters(axes)
    parameters = ParameterCosts(axes, outside)
    assert macs.total(sizes(axes)) == count_macs(model, ONE)
    for plan in plans(axes):
        cut = copy.deepcopy(model)
        apply(cut, axes, plan)
        widths = {name: len(kept) for name, kept in plan.kept.items()}
        assert macs.total(widths) == count_macs(cut, ONE)
        assert parameters.total(widths) == sum(p.numel() for p in cut.parameters())


def test_a_cut_model_tells_what_it_cost_as_built():
    model = build("bert")
    axes = find_axes(model)
    built = count_macs(model, ONE)
    (*_, silent) = plans(axes)
    for plan in (random_plan(axes), silent):
        cut = copy.deepcopy(model)
        apply(cut, axes, plan)
        widths = {name: len(kept) for name, kept in plan.kept.items()}
        macs = measure_macs(cut, axes, {"": ONE}, widths)
        assert macs.total(sizes(axes)) == built
        assert macs.total(widths) == macs.total({}) == count_macs(cut, ONE)


def test_heads_cost_their_products_over_all_pairs_of_positions():
    model = build("bert")
    axes = find_axes(model)
    macs = measure_macs(model, axes, {"": ONE})
    (heads,) = (a for a in axes if a.name.endswith("0.heads"))
    length, hidden = 12, 24
    weights = 4 * heads.entries * hidden * length
    expected = weights + 2 * length**2 * heads.entries
    assert macs.savings(heads.name, sizes(axes), [heads.size - 1]) == [expected]


def test_a_network_inside_a_module_is_heard_by_its_call():
    model = build("bert")
    root = nn.ModuleDict({"net": nn.ModuleDict({"inner": model})})
    axes = find_axes(root)
    with Listener(root, axes) as heard:
        model(**batch(4))
    macs = measure_macs(root, axes, heard.calls(axes))
    assert macs.total({}) == count_macs(model, ONE)


def test_convolutions_count_and_embeddings_do_not():
    net = nn.ModuleDict({"words": nn.Embedding(9, 4), "conv": nn.Conv1d(4, 6, 3)})
    net.forward = lambda ids: net.conv(net.words(ids).transpose(1, 2))
    stream = WidthAxis(
        "stream",
        "residual",
        4,
        1,
        (Slice("words.weight", 1, (9, 4)), Slice("conv.weight", 1, (6, 4, 3))),
        ("conv",),
    )
    macs = measure_macs(net, [stream], {"": Example((torch.ones(1, 7, dtype=torch.long),), {})})
    assert macs.savings("stream", {"stream": 4}, [3]) == [5 * 6 * 3]
    assert macs.fixed == 0


def test_measuring_leaves_modes_and_hooks_as_they_were():
    model = build("bert").train()
    axes = find_axes(model)
    with pytest.raises(ValueError, match="exactly one"):
        measure_macs(model, axes, {"": Example((), {"nonsense": 1})})
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_units_cost_less_where_a_neighbour_has_shrunk():
    axes = find_axes(build("bert", "masked-lm"))
    costs, now = ParameterCosts(axes), sizes(axes)
    (stream,) = (a.name for a in axes if a.kind == "residual")
    ffn = next(a.name for a in axes if a.kind == "ffn")
    assert costs.savings(ffn, now, [now[ffn] - 1]) == [2 * 24 + 1]
    assert costs.savings(ffn, {**now, stream: 10}, [now[ffn] - 1]) == [2 * 10 + 1]
    assert costs.neighbours(ffn) == {stream}
    assert costs.neighbours(stream) == {a.name for a in axes} - {stream}


@pytest.mark.parametrize("name", ["residual", "ffn", "heads"])
def test_savings_are_differences_of_totals(name):
    axes = find_axes(build("bert", "masked-lm"))  # its transform is square in the stream
    costs = ParameterCosts(axes, fixed=7)
    now = {a.name: max(1, a.size - i) for i, a in enumerate(axes)}
    axis = next(a for a in axes if a.kind == name)
    options = list(range(now[axis.name], -1, -1))
    expected = [costs.total(now) - costs.total({**now, axis.name: w}) for w in options]
    assert costs.savings(axis.name, now, options) == expected


def test_axes_that_nobody_names_stay_at_their_present_width():
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    low = linear_axis(net, "low", kind="ffn", producers=["0"], readers=["2"])
    high = linear_axis(net, "high", kind="ffn", producers=["2"], readers=["4"])
    costs = ParameterCosts([low, high], fixed=2, held={"high": 3})
    assert costs.total({"low": 5}) == ParameterCosts([low, high], 2).total({"low": 5, "high": 3})
    assert costs.savings("low", {"low": 5}, [4]) == [3 + 1 + 3]
    assert MacCosts([low], fixed=5).total({}) == 5
