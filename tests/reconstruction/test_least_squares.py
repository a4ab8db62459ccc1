"""Reconstruction brings the cut model back to the dense one: exactly where that is possible."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lightning_mi_prune
from lightning_mi_prune.allocation.macs import measure_macs
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.calls import (
    RecordedCall,
    in_weight_precision,
    merge_calls,
    trim_padding,
)
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Reconstruction
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import evaluating
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.graph.groups import DependencyGroup, full_plan
from lightning_mi_prune.pipeline import reconstruct
from lightning_mi_prune.reconstruction.compensation import Decision, select_units
from lightning_mi_prune.reconstruction.least_squares import (
    _norm_sums,
    _solve_norm,
    reconstruct_network,
)
from lightning_mi_prune.reconstruction.targets import (
    ReconstructedLayer,
    Targets,
    layers_to_reconstruct,
)
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import (
    CONFIGS,
    PICTURES,
    batch,
    build,
    duplicate,
    inputs_of,
    outputs,
    pictures,
    random_plan,
)
from tests.support.ranks import added, check_ranks, place

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
FAMILIES = [(family, "sequence") for family in CONFIGS] + [(f, "image") for f in PICTURES]
METHOD = Reconstruction()


def many(head):
    return pictures(96) if head == "image" else batch(160)


def target_of(model, layers, call, layer):
    """The target of a layer at all positions of a sample."""
    pieces = Targets(model, layers, "", call).take(layer)
    return torch.cat([pieces[number] for number in sorted(pieces)])


def call_of(inputs):
    return RecordedCall((), dict(inputs), inputs.get("attention_mask"))


def calibration_data(inputs):
    return CalibrationData({}, ranks=[{"": [call_of(inputs)]}])


def cut_by(model, groups, plan, compensated=None):
    cut = copy.deepcopy(model)
    apply_plan(cut, groups, plan, compensated=compensated or {})
    return cut


@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_nothing_cut_is_nothing_changed(family, head):
    model = build(family, head)
    groups = groups_of(model)
    keep = Decision(full_plan(groups), {}, {})
    assert layers_to_reconstruct(groups, full_plan(groups), keep.plan) == []
    assert (
        reconstruct(
            model,
            groups,
            full_plan(groups),
            keep,
            METHOD,
            calibration_data(many(head)),
        )
        is keep
    )


@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_solving_an_uncut_model_again_leaves_its_outputs(family, head):
    model, inputs = build(family, head), many(head)
    groups = groups_of(model)
    found = layers_to_reconstruct(
        groups, full_plan(groups), random_plan(groups)
    )  # as if all of it had been cut
    found = [type(r)(r.layer, r.residual, None, r.optional) for r in found]
    call = call_of(inputs)
    new = reconstruct_network(copy.deepcopy(model), found, "", Targets(model, found, "", call))
    before = outputs(model, inputs_of(head))
    with torch.no_grad():
        for name, value in new.items():
            model.get_parameter(name).copy_(value)
    assert torch.allclose(outputs(model, inputs_of(head)), before, atol=1e-4)


@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_duplicates_are_made_up_for_through_several_layers(family, head):
    """Without compensation every layer lacks half of its units; reconstruction restores them."""
    model = build(family, head)
    groups = [a for a in groups_of(model) if a.kind in ("ffn", "heads")]
    every = groups_of(model)
    for group in groups:
        for unit in range(0, group.size, 2):
            duplicate(model, group, unit, unit + 1)
    kept = {
        a.name: tuple(range(0, a.size, 2)) if a in groups else tuple(range(a.size)) for a in every
    }
    selection = Decision(PruningPlan({a.name: a.size for a in every}, kept), {}, {})
    wanted = outputs(model, inputs_of(head))
    plain = outputs(cut_by(model, every, selection.plan), inputs_of(head))
    found = reconstruct(
        model, every, full_plan(every), selection, METHOD, calibration_data(many(head))
    )
    back = outputs(cut_by(model, every, found.plan, found.compensated), inputs_of(head))
    assert (plain - wanted).abs().max() > 1e-2
    if family == "albert":  # a shared layer stays as it is
        assert set(found.compensated) == {"albert.pooler.weight", "albert.pooler.bias"}
    else:
        assert torch.allclose(back, wanted, atol=5e-4)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("family", "head"), [f for f in FAMILIES if f[0] != "albert"])
def test_a_reconstructed_model_is_nearer_to_the_dense_one(family, head, residual):
    model = build(family, head, seed=3)
    groups = groups_of(model)
    plan = random_plan(groups, 0.75, residual=residual)
    plan = PruningPlan(
        plan.sizes,
        {**plan.kept, **{a.name: tuple(range(a.size)) for a in groups if a.kind == "pooler"}},
    )
    selection = Decision(plan, {}, {})
    inputs = many(head)
    call = call_of(inputs)
    found = layers_to_reconstruct(groups, full_plan(groups), plan)
    assert (
        bool([r for r in found if r.residual is None and not r.optional]) == residual
    )  # the norms
    kept = reconstruct(
        model, groups, full_plan(groups), selection, METHOD, calibration_data(inputs)
    )
    assert set(kept.compensated) >= {f"{r.layer}.weight" for r in found if r.residual is not None}
    plain, fitted = (
        cut_by(model, groups, plan, compensated) for compensated in ({}, kept.compensated)
    )
    last = [r for r in found if r.residual is not None][-1]
    wanted = target_of(model, found, call, last.layer)
    errors = []
    for cut in (plain, fitted):
        own = [type(last)(last.layer, last.residual, None)]
        found_output = target_of(cut, own, call, last.layer)
        errors.append(float((found_output - wanted).square().mean()))
    assert errors[1] < errors[0]
    assert model.config.to_dict() == build(family, head, seed=3).config.to_dict()


def test_layers_above_the_lowest_cut_are_solved():
    """An output projection also makes up for losses of the residual stream below it."""
    model, _inputs = build(), many("sequence")
    groups = groups_of(model)
    low = next(a for a in groups if a.kind == "ffn")
    kept = {a.name: tuple(range(a.size)) for a in groups} | {low.name: (0, 1, 2, 3)}
    plan = PruningPlan({a.name: a.size for a in groups}, kept)
    found = layers_to_reconstruct(groups, full_plan(groups), plan)
    layers = [r.layer for r in found if r.residual]
    assert low.consumers[0] in layers
    assert len(layers) == 3
    assert not any("layer.0.attention" in layer for layer in layers)  # below the cut


def test_too_small_samples_are_refused_and_optional_layers_left_out():
    model = build()
    groups = groups_of(model)
    selection = Decision(random_plan(groups, 0.5), {}, {})
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(PruningError, match=r"Only .* positions? to reconstruct .* raise the pos"):
        reconstruct(
            model,
            groups,
            full_plan(groups),
            selection,
            METHOD,
            calibration_data(batch(1, 8)),
        )
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    few = calibration_data(batch(16))  # more than 24 positions, but only 16 pooled ones
    found = reconstruct(model, groups, full_plan(groups), selection, METHOD, few)
    assert "bert.pooler.dense.weight" not in found.compensated


def test_mode_hooks_gradients_and_random_state_stay():
    model = build().train()
    groups = groups_of(model)
    state = torch.get_rng_state()
    selection = Decision(random_plan(groups, 0.5), {}, {})
    found = reconstruct(
        model,
        groups,
        full_plan(groups),
        selection,
        METHOD,
        calibration_data(batch(128)),
    )
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(t.requires_grad for t in found.compensated.values())


def solve_on_a_rank(rows):
    """One rank of two, or the only one: reconstruct on its share of the calls."""
    rank, world = place()
    model = build()
    groups = groups_of(model)
    inputs = batch(64)
    parts = [{k: v[r] for k, v in inputs.items()} for r in rows]
    ranks = [{"": [call_of(p)]} if len(p["input_ids"]) else {} for p in parts]
    selection = Decision(random_plan(groups, 0.5), {}, {})
    data = CalibrationData({}, ranks=ranks)
    found = reconstruct(
        model, groups, full_plan(groups), selection, METHOD, data, add=added, rank=rank, world=world
    )
    return {name: value.tolist() for name, value in found.compensated.items()}


def test_two_ranks_solve_what_one_does():
    """Also where one rank has no calls and only takes part in the sums."""
    check_ranks(solve_on_a_rank, rows=64, atol=1e-4)


def test_calls_of_different_length_become_one():
    calls = [call_of(batch(4, length, seed=length)) for length in (6, 9)]
    call = merge_calls(calls, 10_000)
    assert call.rows == 8
    assert call.kwargs["input_ids"].shape == (8, 9)
    assert int(call.mask.sum()) == sum(int(c.mask.sum()) for c in calls)
    assert merge_calls(calls, 18).rows == 2
    some = merge_calls([call_of(batch(6, 8))], 3 * 8).kwargs["input_ids"]
    assert torch.equal(some, batch(6, 8)["input_ids"][[2, 5, 0, 3]])  # spread, short ones first
    short = merge_calls([call_of({k: v[:3] for k, v in batch(6, 8).items()})], 3 * 8)
    assert short.mask.shape == (3, int(short.mask.sum(1).max()))  # without padding of all
    assert merge_calls([], 10) is None
    bare = [RecordedCall((torch.ones(3, n),), {}) for n in (4, 5, 4)]
    assert merge_calls(bare, 100).rows == 6  # padding is not known, so only one length


def test_padding_at_the_end_of_all_goes_and_nothing_else():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    ids = torch.tensor([[7, 8, 0, 0], [9, 0, 0, 0]])
    states, deep = torch.ones(2, 3, 4), {"inside": [ids, torch.ones(2)]}
    call = trim_padding(
        RecordedCall((ids, deep), {"mask": mask, "labels": torch.tensor([1, 0])}, mask)
    )
    assert call.mask.tolist() == [[1, 1], [1, 0]]
    assert call.args[0].tolist() == call.args[1]["inside"][0].tolist() == [[7, 8], [9, 0]]
    assert call.kwargs["labels"].tolist() == [1, 0]
    for values in ((ids.flip(1),), (ids, states), (ids, torch.arange(4)[None]), (ids.float(),)):
        whole = RecordedCall(values, {"mask": mask}, mask)
        assert trim_padding(whole) is whole  # something else has that length, or values there
    for odd in (mask.flip(1), torch.zeros(2, 4), mask[:, None], None):
        whole = RecordedCall((ids,), {}, odd)
        assert trim_padding(whole) is whole


def test_targets_of_padded_texts_are_those_of_each_text_alone():
    model, inputs = build(), batch(12, 24)
    inputs["attention_mask"][:, 5:] = 0
    inputs["input_ids"][:, 5:] = 0
    lengths = []
    model.bert.embeddings.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    layer = ReconstructedLayer("bert.encoder.layer.1.output.dense", None, None)
    found_output = target_of(model, [layer], call_of(inputs), layer.layer)
    assert max(lengths) <= 5
    alone = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(12)]
    parts = [target_of(model, [layer], call_of(one), layer.layer) for one in alone]
    assert torch.allclose(torch.cat(parts), found_output, atol=1e-5)


def test_stored_calls_keep_to_the_bound():
    model = build()
    groups = [a for a in groups_of(model) if a.kind in ("ffn", "heads")]
    with ActivationRecorder(model, groups, batches=4, calls=100) as recorder, torch.no_grad():
        for seed in range(4):
            recorder.start_batch(32, padded=2)
            model(**batch(seed=seed))
    stored = recorder.stored[""]
    assert len(stored) == 4
    assert 60 <= sum(int(call.mask.sum()) for call in stored) <= 112  # some 8 a row, whole rows


@pytest.mark.parametrize("batches", [40, None])
def test_pictures_are_stored_within_the_bound_however_many_batches_there_are(batches):
    model = build("vit", "image")
    groups = [a for a in groups_of(model) if a.kind in ("ffn", "heads")]
    with ActivationRecorder(model, groups, batches=batches, calls=200) as recorder, torch.no_grad():
        for _ in range(40):
            recorder.start_batch()
            model(**pictures(4))
    (calls,) = recorder.stored.values()
    each = (model.config.image_size // model.config.patch_size) ** 2 + 1
    assert 200 - 4 * each < sum(call.rows for call in calls) * each <= 200
    with ActivationRecorder(model, groups, batches=40, calls=2) as few, torch.no_grad():
        for _ in range(40):
            few.start_batch()
            model(**pictures(4))
    assert [call.rows for calls in few.stored.values() for call in calls] == [1]


@pytest.fixture(params=[100, 96])
def pieces(request, monkeypatch):
    """Everything that is done in pieces, in many."""
    for module in (
        lightning_mi_prune.calibration.calls,
        lightning_mi_prune.reconstruction.least_squares,
    ):
        monkeypatch.setattr(module, "_PIECE", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_pieces_give_what_the_whole_gives(family, head, monkeypatch):
    """Also of what has no examples in its first dimension: DeBERTa's table of distances."""
    model, inputs = build(family, head), many(head)
    groups = groups_of(model)
    plan = random_plan(groups, 0.75, residual=True)
    args = (
        model,
        groups,
        full_plan(groups),
        Decision(plan, {}, {}),
        METHOD,
        calibration_data(inputs),
    )
    parts = reconstruct(*args).compensated
    monkeypatch.setattr(lightning_mi_prune.calibration.calls, "_PIECE", 10**6)
    monkeypatch.setattr(lightning_mi_prune.reconstruction.least_squares, "_PIECE", 10**6)
    whole = reconstruct(*args).compensated
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, atol=5e-4), name


def test_calls_recorded_under_autocast_run_in_full_precision():
    class Fed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.net = (
                nn.Linear(5, 6),
                nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
            )

        def forward(self, x):
            return self.net(self.stem(x))

    model = Fed()
    group = linear_group(model.net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
    group = replace(group.prefixed("net"), residual=None)
    coarse, recorder = (
        torch.autocast("cpu", torch.bfloat16),
        ActivationRecorder(model, [group], calls=64),
    )
    with torch.no_grad(), coarse, recorder:
        model(torch.randn(64, 5))
    ((path, (call,)),) = recorder.stored.items()
    assert call.args[0].dtype == torch.bfloat16
    network = model.get_submodule(path)
    call = in_weight_precision(call, network)
    with evaluating(network):
        network(*call.args, **call.kwargs)
    assert measure_macs(model, [group], recorder.calls([group])).total({}) == 6 * 16 + 16 * 3


def test_reconstruction_beats_compensation_on_new_data():
    model = build(seed=5)
    groups = [a for a in groups_of(model) if a.kind in ("ffn", "heads")]
    with ActivationRecorder(model, groups, calls=4000) as recorder, torch.no_grad():
        model(**batch(300))
    widths = {a.name: a.size // 2 for a in groups}
    plan, weights = full_plan(groups), dict(model.named_parameters())
    compensated = select_units(groups, recorder.moments, weights, widths, plan)
    fitted = reconstruct(
        model, groups, plan, compensated, METHOD, CalibrationData({}, ranks=[recorder.stored])
    )
    fresh = batch(200, seed=9)
    wanted = outputs(model, fresh)
    errors = [
        float(
            (outputs(cut_by(model, groups, s.plan, s.compensated), fresh) - wanted).square().mean()
        )
        for s in (compensated, fitted)
    ]
    assert errors[1] < errors[0]


def test_a_norm_whose_entry_never_changes_keeps_its_gain():
    norm = nn.LayerNorm(3)
    plain = torch.randn(50, 3)
    plain[:, 1] = 0.5
    found = _solve_norm(norm, _norm_sums(plain, plain * 2 + 1))
    assert torch.allclose(found["weight"], torch.tensor([2.0, 1.0, 2.0]), atol=1e-4)
    assert torch.allclose(found["bias"], torch.tensor([1.0, 1.5, 1.0]), atol=1e-4)


def test_a_layer_that_two_groups_share_is_solved_once():
    heads = DependencyGroup("heads", "heads", 4, (), ("out",), residual="norm", level=1)
    dims = DependencyGroup("dims", "head_dim", 2, (), ("out",), residual="norm", level=2)
    full = full_plan([heads, dims])
    plan = PruningPlan(full.sizes, {**full.kept, "heads": (0, 1)})
    found = layers_to_reconstruct([heads, dims], full, plan)
    assert [(layer.layer, layer.residual) for layer in found] == [("out", "norm")]
