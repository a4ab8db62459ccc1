"""Dimensions of heads: turned with no change of the output, cut at no loss, and carried."""

from __future__ import annotations

import pytest
import torch

from lightning_mi_prune import from_pretrained, load_pruned, prune
from lightning_mi_prune.axes import as_built, count_parameters, full_plan
from lightning_mi_prune.budget import Budget
from lightning_mi_prune.costs import ParameterCosts, measure_macs
from lightning_mi_prune.families import find_axes
from lightning_mi_prune.limits import Limits
from lightning_mi_prune.measure import count_macs
from lightning_mi_prune.method import Method
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.ranking import rank_axes
from lightning_mi_prune.sample import Example
from lightning_mi_prune.surgery import apply
from tests.covering import half
from tests.models import (
    batch,
    build,
    masked_copy,
    outputs,
    random_plan,
)
from tests.narrowed import FAMILIES, UNITS, known, lesson, loss, narrow, tiny, turns

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")
every = pytest.mark.parametrize("family", FAMILIES)


@every
def test_a_turn_changes_no_output(family):
    model, inputs = tiny(family)
    before = outputs(model, inputs)
    for _, turn, _ in turns(model, family):
        weights = dict(model.named_parameters())
        new = turn.weights(weights)
        assert any(not torch.equal(new[name], weights[name]) for name in new)
        for name, value in new.items():
            weights[name].data.copy_(value)
    assert torch.allclose(outputs(model, inputs), before, atol=1e-4)


def test_the_directions_are_those_of_a_balanced_system():
    """Both Gramians are diagonal and fall; values are turned by a rotation."""
    ((axis, turn, values), *_) = turns(build())
    seen = turn.of(values, range(axis.entries), axis.size)
    eye = torch.eye(axis.size, dtype=torch.float64).expand_as(turn.value)
    assert torch.allclose(turn.value @ turn.value.mT, eye, atol=1e-9)
    assert torch.allclose(turn.query @ turn.key.mT, eye, atol=1e-6)
    # By what remains unexplained: the first d of the best basis beat those of any other.
    for size in (1, 3):
        block = slice(0, axis.size)
        covariance = seen.covariance[block, block]
        read = seen.readout[:, block]

        def left(basis, covariance=covariance, read=read):
            both = torch.linalg.inv(basis @ covariance @ basis.mT)
            rest = covariance - covariance @ basis.mT @ both @ basis @ covariance
            return float((read @ rest @ read.mT).trace())

        best = left(torch.eye(axis.size, dtype=torch.float64)[:size])
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            other = torch.randn(size, axis.size, generator=generator, dtype=torch.float64)
            assert best <= left(other) + 1e-12


@every
@pytest.mark.parametrize("dims", [2, 3])
def test_what_heads_never_used_goes_without_a_trace(family, dims):
    model, inputs = tiny(family)
    axes = find_axes(model)
    narrow(model, axes, 2)
    before = outputs(model, inputs)
    method = Method(Budget(0.5), limits=Limits(pins={r"\.dims$": dims}), refit=False)
    mine = [axis for axis in axes if axis.kind == "dims"]
    widths = {axis.name: dims for axis in mine}
    share = 1 - count_parameters(mine, widths) / count_parameters(mine)
    done = prune(model, lesson(family), 0.999 * share, loss=loss, method=method, units=["dims"])
    assert {done.plan.width(a.name) for a in axes if a.kind == "dims"} == {dims}
    assert torch.allclose(outputs(model, inputs), before, atol=2e-3)


@every
def test_a_cut_model_computes_what_the_masked_model_computes(family):
    model, inputs = tiny(family)
    axes = find_axes(model)
    plan = random_plan(axes, dims=True)
    masked = masked_copy(model, axes, plan)
    apply(model, axes, plan)
    assert torch.allclose(outputs(model, inputs), outputs(masked, inputs), atol=1e-5)
    for axis in axes:
        if axis.turn is not None:
            width = plan.width(axis.name) * plan.width(axis.crossed)
            assert model.get_submodule(axis.turn.query).out_features == width
            assert model.get_submodule(axis.turn.reader).in_features == width


@every
def test_dimensions_then_heads_are_both_at_once(family):
    twice, once = tiny(family)[0], tiny(family)[0]
    axes = find_axes(twice)
    plan = random_plan(axes, dims=True)
    first = Plan(
        plan.sizes,
        {a.name: plan.kept[a.name] if a.kind == "dims" else (*range(a.size),) for a in axes},
    )
    apply(twice, axes, first)
    apply(twice, axes, plan, current=first)
    apply(once, axes, plan)
    for a, b in zip(twice.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)
    again = as_built(find_axes(once), plan.sizes)
    assert [(a.name, a.size, a.entries, a.slices) for a in again] == [
        (a.name, a.size, a.entries, a.slices) for a in axes
    ]


@every
def test_one_call_meets_its_budget_and_what_is_saved_opens_again(family, tmp_path):
    model, inputs = tiny(family)
    whole = count_parameters([a for a in find_axes(model) if a.kind in UNITS])
    done = prune(model, lesson(family), 0.6, loss=loss, units=UNITS)
    assert done.prunable_parameters[0] == whole
    assert 0.6 <= done.sparsity < 0.75
    assert any(done.plan.width(n) < s for n, s in done.plan.sizes.items() if n.endswith(".dims"))
    assert done.prunable_parameters[1] == sum(p.numel() for p in model.parameters()) - (
        done.parameters[0] - whole
    )
    model.save_pretrained(tmp_path)
    back = from_pretrained(type(model), tmp_path)
    assert torch.equal(outputs(back, inputs), outputs(model, inputs))
    state = model.state_dict()
    fresh = tiny(family, seed=1)[0]
    torch.save(state, tmp_path / "state.pt")
    load_pruned(fresh, tmp_path / "state.pt")
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


@every
def test_a_second_call_goes_on_from_the_first(family):
    model, inputs = tiny(family)
    first = prune(model, lesson(family), 0.4, loss=loss, units=UNITS)
    done = prune(model, lesson(family), 0.7, loss=loss, units=UNITS)
    assert 0.7 <= done.sparsity < 0.85
    for name, kept in done.plan.kept.items():
        assert set(kept) <= set(first.plan.kept[name])
    assert torch.isfinite(outputs(model, inputs)).all()


@pytest.mark.parametrize("dims", [0, 5])
def test_heads_that_vanish_take_their_dimensions_along(dims):
    """Nothing is lost with dimensions that no head has, in this cut and in the next."""
    model = build()
    pins = {r"layer\.0\.heads": 0} | ({r"layer\.0\.dims": dims} if dims else {})
    method = Method(Budget(0.5), limits=Limits(pins=pins))
    done = prune(model, lesson("bert"), 0.6, loss=loss, units=UNITS, method=method)
    assert done.plan.width("bert.encoder.layer.0.heads") == 0
    assert set(done.plan.rankings["bert.encoder.layer.0.dims"].loss) == {0.0}
    done = prune(model, lesson("bert"), 0.8, loss=loss, units=UNITS)
    assert done.sparsity >= 0.8
    assert torch.isfinite(outputs(model, batch())).all()


@pytest.mark.parametrize(
    ("first", "second", "widths"),
    half(
        [UNITS, ["dims"], ["heads"]],
        [None, ["dims"], [*UNITS, "residual", "pooler"]],
        ["global", "uniform"],
    ),
)
def test_kinds_may_change_from_cut_to_cut(first, second, widths, tmp_path):
    model = build()
    prune(model, lesson("bert"), 0.2, loss=loss, units=first)
    method = Method(Budget(0.5), widths=widths)
    done = prune(model, lesson("bert"), 0.4, loss=loss, units=second, method=method)
    assert done.sparsity >= 0.4
    model.save_pretrained(tmp_path)
    back = from_pretrained(type(model), tmp_path)
    assert torch.equal(outputs(back, batch()), outputs(model, batch()))


def test_costs_are_those_of_the_cut_model():
    model = build()
    axes = find_axes(model)
    plan = random_plan(axes, dims=True)
    calls = {"": Example((), batch(1))}
    macs = measure_macs(model, axes, calls)
    parameters = ParameterCosts(
        axes, sum(p.numel() for p in model.parameters()) - count_parameters(axes)
    )
    apply(model, axes, plan)
    assert parameters.total(plan.widths) == sum(p.numel() for p in model.parameters())
    assert macs.total(plan.widths) == count_macs(model, calls[""])
    cut = measure_macs(model, axes, calls, plan.widths)
    assert cut.total(plan.widths) == macs.total(plan.widths)
    assert cut.total(full_plan(axes).widths) == macs.total(full_plan(axes).widths)


def test_rankings_end_with_all_the_loss_and_all_the_information():
    """Without the last dimension the values say nothing: as much as without the last head."""
    model = build()
    axes = find_axes(model)
    weights = dict(model.named_parameters())
    moments, relevance = known(model, axes)
    chosen = [axis for axis in axes if axis.kind in ("heads", "dims")]
    found = rank_axes(chosen, moments, weights, full_plan(axes), relevance=relevance)
    for axis, turn, _ in turns(model):
        dims, heads = found[axis.name], found[axis.crossed]
        assert dims.order == tuple(reversed(range(axis.size)))
        assert list(dims.loss) == sorted(dims.loss)
        assert list(dims.nats) == sorted(dims.nats)
        silent = float(turn.scores.sum())
        assert dims.loss[-1] - silent == pytest.approx(heads.loss[-1], rel=1e-3)
        assert dims.nats[-1] > heads.nats[-1]


def test_heads_are_judged_by_the_dimensions_that_stay():
    """A head that only speaks in what goes has nothing to lose."""
    model = build()
    axes = find_axes(model)
    axis = next(axis for axis in axes if axis.kind == "dims")
    weights = dict(model.named_parameters())
    moments, relevance = known(model, axes)
    said = (moments, weights, full_plan(axes))
    pair = [a for a in axes if a.name in (axis.name, axis.crossed)]
    alone = rank_axes(pair, *said, relevance=relevance)
    beside = rank_axes(
        pair, *said, relevance=relevance, beside={axis.name: (0,), axis.crossed: (0, 2)}
    )
    assert beside[axis.crossed].loss[-1] < alone[axis.crossed].loss[-1]
    assert beside[axis.name].loss[-1] < alone[axis.name].loss[-1]
    same = rank_axes(
        pair,
        *said,
        relevance=relevance,
        beside={axis.name: (*range(axis.size),), axis.crossed: (*range(axis.entries),)},
    )
    assert same == alone
