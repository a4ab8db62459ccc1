"""Dimensions of heads: rotated with no change of the output, cut without loss, saved and loaded."""

from __future__ import annotations

import pytest
import torch

from lightning_mi_prune import from_pretrained, load_pruned, prune
from lightning_mi_prune.allocation.costs import ParameterCosts
from lightning_mi_prune.allocation.macs import count_macs, measure_macs
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.options import Constraints, Reconstruction
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import count_parameters, full_plan
from lightning_mi_prune.importance.ranking import rank_groups
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.covering import half
from tests.support.graphs import groups_of
from tests.support.head_dims import FAMILIES, UNITS, known, lesson, loss, narrow, rotations, tiny
from tests.support.models import (
    batch,
    build,
    entries_of,
    masked_copy,
    outputs,
    partner_of,
    random_plan,
)

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
every = pytest.mark.parametrize("family", FAMILIES)


@every
def test_a_rotation_changes_no_output(family):
    model, inputs = tiny(family)
    before = outputs(model, inputs)
    for _, rotation, _ in rotations(model, family):
        weights = dict(model.named_parameters())
        new = rotation.weights(weights)
        assert any(not torch.equal(new[name], weights[name]) for name in new)
        for name, value in new.items():
            weights[name].data.copy_(value)
    assert torch.allclose(outputs(model, inputs), before, atol=1e-4)


def test_the_directions_are_those_of_a_balanced_system():
    """Both Gramians are diagonal and fall; those of the values are orthogonal."""
    ((group, rotation, values), *_) = rotations(build())
    rotated = rotation.select(values, range(entries_of(group)), group.size)
    eye = torch.eye(group.size, dtype=torch.float64).expand_as(rotation.value)
    assert torch.allclose(rotation.value @ rotation.value.mT, eye, atol=1e-9)
    assert torch.allclose(rotation.query @ rotation.key.mT, eye, atol=1e-6)
    # By what remains unexplained: the first d of the best basis beat those of any other.
    for size in (1, 3):
        block = slice(0, group.size)
        covariance = rotated.covariance[block, block]
        read = rotated.readout[:, block]

        def left(basis, covariance=covariance, read=read):
            both = torch.linalg.inv(basis @ covariance @ basis.mT)
            rest = covariance - covariance @ basis.mT @ both @ basis @ covariance
            return float((read @ rest @ read.mT).trace())

        best = left(torch.eye(group.size, dtype=torch.float64)[:size])
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            other = torch.randn(size, group.size, generator=generator, dtype=torch.float64)
            assert best <= left(other) + 1e-12


@every
@pytest.mark.parametrize("dims", [2, 3])
def test_dimensions_that_heads_never_use_are_removed_without_loss(family, dims):
    model, inputs = tiny(family)
    groups = groups_of(model)
    narrow(model, groups, 2)
    before = outputs(model, inputs)
    method = {
        "constraints": Constraints(pins={"\\.head_dim$": dims}),
        "reconstruction": Reconstruction("compensation"),
    }
    mine = [group for group in groups if group.kind == "head_dim"]
    widths = {group.name: dims for group in mine}
    share = 1 - count_parameters(mine, widths) / count_parameters(mine)
    done = prune(model, lesson(family), 0.999 * share, loss=loss, **method, kinds=["head_dim"])
    assert {done.plan.width(a.name) for a in groups if a.kind == "head_dim"} == {dims}
    assert torch.allclose(outputs(model, inputs), before, atol=2e-3)


@every
def test_a_cut_model_computes_what_the_masked_model_computes(family):
    model, inputs = tiny(family)
    groups = groups_of(model)
    plan = random_plan(groups, dims=True)
    masked = masked_copy(model, groups, plan)
    apply_plan(model, groups, plan)
    assert torch.allclose(outputs(model, inputs), outputs(masked, inputs), atol=1e-5)
    for group in groups:
        if group.rotation is not None:
            width = plan.width(group.name) * plan.width(partner_of(group))
            assert model.get_submodule(group.rotation.query).out_features == width
            assert model.get_submodule(group.rotation.consumer).in_features == width


@every
def test_dimensions_then_heads_are_both_at_once(family):
    twice, once = tiny(family)[0], tiny(family)[0]
    groups = groups_of(twice)
    plan = random_plan(groups, dims=True)
    first = PruningPlan(
        plan.sizes,
        {a.name: plan.kept[a.name] if a.kind == "head_dim" else (*range(a.size),) for a in groups},
    )
    apply_plan(twice, groups, first)
    apply_plan(twice, groups, plan, current=first)
    apply_plan(once, groups, plan)
    for a, b in zip(twice.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)
    assert groups_of(once) == groups  # as the config records them


@every
def test_one_call_meets_its_budget_and_what_is_saved_opens_again(family, tmp_path):
    model, inputs = tiny(family)
    whole = count_parameters([a for a in groups_of(model) if a.kind in UNITS])
    done = prune(model, lesson(family), 0.6, loss=loss, kinds=UNITS)
    assert done.prunable_parameters[0] == whole
    assert 0.6 <= done.sparsity < 0.75
    assert any(
        done.plan.width(n) < s for n, s in done.plan.sizes.items() if n.endswith(".head_dim")
    )
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
    first = prune(model, lesson(family), 0.4, loss=loss, kinds=UNITS)
    done = prune(model, lesson(family), 0.7, loss=loss, kinds=UNITS)
    assert 0.7 <= done.sparsity < 0.85
    for name, kept in done.plan.kept.items():
        assert set(kept) <= set(first.plan.kept[name])
    assert torch.isfinite(outputs(model, inputs)).all()


@pytest.mark.parametrize("dims", [0, 5])
def test_heads_that_vanish_take_their_dimensions_along(dims):
    """Nothing is lost with dimensions that no head has, in this cut and in the next."""
    model = build()
    pins = {r"layer\.0\.heads": 0} | ({r"layer\.0\.head_dim": dims} if dims else {})
    method = {"constraints": Constraints(pins=pins)}
    done = prune(model, lesson("bert"), 0.6, loss=loss, kinds=UNITS, **method)
    assert done.plan.width("bert.encoder.layer.0.heads") == 0
    assert set(done.plan.rankings["bert.encoder.layer.0.head_dim"].loss) == {0.0}
    done = prune(model, lesson("bert"), 0.8, loss=loss, kinds=UNITS)
    assert done.sparsity >= 0.8
    assert torch.isfinite(outputs(model, batch())).all()


@pytest.mark.parametrize(
    ("first", "second", "widths"),
    half(
        [UNITS, ["head_dim"], ["heads"]],
        [None, ["head_dim"], [*UNITS, "hidden", "pooler"]],
        ["global", "uniform"],
    ),
)
def test_kinds_may_change_from_cut_to_cut(first, second, widths, tmp_path):
    model = build()
    prune(model, lesson("bert"), 0.2, loss=loss, kinds=first)
    method = {"widths": widths}
    done = prune(model, lesson("bert"), 0.4, loss=loss, kinds=second, **method)
    assert done.sparsity >= 0.4
    model.save_pretrained(tmp_path)
    back = from_pretrained(type(model), tmp_path)
    assert torch.equal(outputs(back, batch()), outputs(model, batch()))


def test_costs_are_those_of_the_cut_model():
    model = build()
    groups = groups_of(model)
    plan = random_plan(groups, dims=True)
    calls = {"": RecordedCall((), batch(1))}
    macs = measure_macs(model, groups, calls)
    parameters = ParameterCosts(
        groups, sum(p.numel() for p in model.parameters()) - count_parameters(groups)
    )
    apply_plan(model, groups, plan)
    assert parameters.total(plan.widths) == sum(p.numel() for p in model.parameters())
    assert macs.total(plan.widths) == count_macs(model, calls[""])
    cut = measure_macs(model, groups, calls, plan.widths)
    assert cut.total(plan.widths) == macs.total(plan.widths)
    assert cut.total(full_plan(groups).widths) == macs.total(full_plan(groups).widths)


def test_rankings_end_with_all_the_loss_and_all_the_information():
    """Without the last dimension as much is lost as without the last head."""
    model = build()
    groups = groups_of(model)
    weights = dict(model.named_parameters())
    moments, relevance = known(model, groups)
    chosen = [group for group in groups if group.kind in ("heads", "head_dim")]
    found = rank_groups(chosen, moments, weights, full_plan(groups), relevance=relevance)
    for group, rotation, _ in rotations(model):
        dims, heads = found[group.name], found[partner_of(group)]
        assert dims.order == tuple(reversed(range(group.size)))
        assert list(dims.loss) == sorted(dims.loss)
        assert list(dims.nats) == sorted(dims.nats)
        of_scores = float(rotation.scores.sum())
        assert dims.loss[-1] - of_scores == pytest.approx(heads.loss[-1], rel=1e-3)
        assert dims.nats[-1] > heads.nats[-1]


def test_heads_are_scored_by_the_dimensions_that_stay():
    """A head that only uses removed dimensions has nothing to lose."""
    model = build()
    groups = groups_of(model)
    group = next(group for group in groups if group.kind == "head_dim")
    weights = dict(model.named_parameters())
    moments, relevance = known(model, groups)
    given = (moments, weights, full_plan(groups))
    pair = [a for a in groups if a.name in (group.name, partner_of(group))]
    alone = rank_groups(pair, *given, relevance=relevance)
    crossed = rank_groups(
        pair,
        *given,
        relevance=relevance,
        crossed_kept={group.name: (0,), partner_of(group): (0, 2)},
    )
    assert crossed[partner_of(group)].loss[-1] < alone[partner_of(group)].loss[-1]
    assert crossed[group.name].loss[-1] < alone[group.name].loss[-1]
    same = rank_groups(
        pair,
        *given,
        relevance=relevance,
        crossed_kept={
            group.name: (*range(group.size),),
            partner_of(group): (*range(entries_of(group)),),
        },
    )
    assert same == alone
