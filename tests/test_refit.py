"""The cut model is pulled back to the dense one: exactly where it can be, never away from it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import lightning_mi_prune
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.budget import Budget
from lightning_mi_prune.costs import measure_macs
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import find_axes, linear_axis
from lightning_mi_prune.joining import merged, trimmed
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.method import Method, pull_back
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.readings import Reading, Targets, readings
from lightning_mi_prune.refit import _norm_sums, _solve_norm, refit
from lightning_mi_prune.sample import Example, Heard, evaluated, full
from lightning_mi_prune.selection import Selection, select
from lightning_mi_prune.surgery import apply
from tests.models import (
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
from tests.ranks import added, grouped, launch, place

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")
FAMILIES = [(family, "sequence") for family in CONFIGS] + [(f, "image") for f in PICTURES]
METHOD = Method(Budget(sparsity=0.5), refit_ridge=1e-6)


def many(head):
    return pictures(96) if head == "image" else batch(160)


def call_of(inputs):
    return Example((), dict(inputs), inputs.get("attention_mask"))


def heard_of(inputs):
    return Heard({}, ranks=[{"": [call_of(inputs)]}])


def cut_by(model, axes, plan, folded=None):
    cut = copy.deepcopy(model)
    apply(cut, axes, plan, folded=folded or {})
    return cut


@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_nothing_cut_is_nothing_changed(family, head):
    model = build(family, head)
    axes = find_axes(model)
    keep = Selection(full_plan(axes), {}, {})
    assert readings(axes, full_plan(axes), keep.plan) == []
    assert pull_back(model, axes, full_plan(axes), keep, METHOD, heard_of(many(head))) is keep


@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_solving_an_uncut_model_again_leaves_its_outputs(family, head):
    model, inputs = build(family, head), many(head)
    axes = find_axes(model)
    found = readings(axes, full_plan(axes), random_plan(axes))  # as if all of it had been cut
    found = [type(r)(r.layer, r.skip, None, r.spare) for r in found]
    call = call_of(inputs)
    new = refit(copy.deepcopy(model), found, "", Targets(model, found, "", call))
    before = outputs(model, inputs_of(head))
    with torch.no_grad():
        for name, value in new.items():
            model.get_parameter(name).copy_(value)
    assert torch.allclose(outputs(model, inputs_of(head)), before, atol=1e-4)


@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_duplicates_come_back_through_several_layers(family, head):
    """Without fold-in every layer is off by half of its units; refit finds all of it again."""
    model = build(family, head)
    axes = [a for a in find_axes(model) if a.kind in ("ffn", "heads")]
    every = find_axes(model)
    for axis in axes:
        for unit in range(0, axis.size, 2):
            duplicate(model, axis, unit, unit + 1)
    kept = {
        a.name: tuple(range(0, a.size, 2)) if a in axes else tuple(range(a.size)) for a in every
    }
    selection = Selection(Plan({a.name: a.size for a in every}, kept), {}, {})
    wanted = outputs(model, inputs_of(head))
    plain = outputs(cut_by(model, every, selection.plan), inputs_of(head))
    method = Method(Budget(sparsity=0.5), refit_ridge=1e-9)
    found = pull_back(model, every, full_plan(every), selection, method, heard_of(many(head)))
    back = outputs(cut_by(model, every, found.plan, found.folded), inputs_of(head))
    assert (plain - wanted).abs().max() > 1e-2
    if family == "albert":  # a shared layer stays as folding in left it
        assert set(found.folded) == {"albert.pooler.weight", "albert.pooler.bias"}
    else:
        assert torch.allclose(back, wanted, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("family", "head"), [f for f in FAMILIES if f[0] != "albert"])
def test_a_refitted_model_is_nearer_to_the_dense_one(family, head, residual):
    model = build(family, head, seed=3)
    axes = find_axes(model)
    plan = random_plan(axes, 0.75, residual=residual)
    plan = Plan(
        plan.sizes,
        {**plan.kept, **{a.name: tuple(range(a.size)) for a in axes if a.kind == "pooler"}},
    )
    selection = Selection(plan, {}, {})
    inputs = many(head)
    call = call_of(inputs)
    found = readings(axes, full_plan(axes), plan)
    assert bool([r for r in found if r.skip is None and not r.spare]) == residual  # the norms
    kept = pull_back(model, axes, full_plan(axes), selection, METHOD, heard_of(inputs))
    assert set(kept.folded) >= {f"{r.layer}.weight" for r in found if r.skip is not None}
    plain, fitted = (cut_by(model, axes, plan, folded) for folded in ({}, kept.folded))
    last = [r for r in found if r.skip is not None][-1]
    wanted = Targets(model, found, "", call).take(last.layer)
    errors = []
    for cut in (plain, fitted):
        own = [type(last)(last.layer, last.skip, None)]
        said = Targets(cut, own, "", call).take(last.layer)
        errors.append(float((said - wanted).square().mean()))
    assert errors[1] < errors[0]
    assert model.config.to_dict() == build(family, head, seed=3).config.to_dict()


@pytest.mark.parametrize("room", [1, 500_000])
@pytest.mark.parametrize("family", ["bert", "albert"])
def test_a_few_targets_at_a_time_are_the_same_targets(family, room):
    model, inputs = build(family), many("sequence")
    axes, call, runs = find_axes(model), call_of(inputs), []
    found = readings(axes, full_plan(axes), random_plan(axes, residual=True))
    layers = [r.layer for r in found]
    ran = []
    handles = [
        model.get_submodule(n).register_forward_hook(lambda *_, n=n: ran.append(n)) for n in layers
    ]
    outputs(model, inputs)
    for handle in handles:
        handle.remove()
    whole, parts = (Targets(model, found, "", call, room=n) for n in (2**30, room))
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    held = []
    for layer in ran:
        one, other = whole.take(layer), parts.take(layer)
        assert (one is None) == (other is None) == (ran.count(layer) > 1)
        assert one is None or torch.equal(one, other)
        held.append(sum(t.nbytes for t in parts._held.values()))
    assert max(held) <= room
    if family == "bert":  # one run holds all of it, one a layer, or some layers each
        assert len(runs) == 1 + len(ran) if room == 1 else 2 < len(runs) < 1 + len(ran)


def test_the_stream_is_pulled_back_with_its_skip():
    """What the skip already lost is part of what an output projection makes up for."""
    model, _inputs = build(), many("sequence")
    axes = find_axes(model)
    low = next(a for a in axes if a.kind == "ffn")
    kept = {a.name: tuple(range(a.size)) for a in axes} | {low.name: (0, 1, 2, 3)}
    plan = Plan({a.name: a.size for a in axes}, kept)
    found = readings(axes, full_plan(axes), plan)
    layers = [r.layer for r in found if r.skip]
    assert low.readers[0] in layers
    assert len(layers) == 3
    assert not any("layer.0.attention" in layer for layer in layers)  # below the cut


def test_a_sample_smaller_than_its_unknowns_is_refused_and_readers_are_spared():
    model = build()
    axes = find_axes(model)
    selection = Selection(random_plan(axes, 0.5), {}, {})
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(PruningError, match=r"Only .* positions? to refit .* raise refit_pos"):
        pull_back(model, axes, full_plan(axes), selection, METHOD, heard_of(batch(1, 8)))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    few = heard_of(batch(16))  # more than 24 positions, but only 16 pooled ones
    found = pull_back(model, axes, full_plan(axes), selection, METHOD, few)
    assert "bert.pooler.dense.weight" not in found.folded


def test_mode_hooks_gradients_and_random_state_stay():
    model = build().train()
    axes = find_axes(model)
    state = torch.get_rng_state()
    selection = Selection(random_plan(axes, 0.5), {}, {})
    found = pull_back(model, axes, full_plan(axes), selection, METHOD, heard_of(batch(128)))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(t.requires_grad for t in found.folded.values())


def solve_on_a_rank(rows):
    """One rank of two, or the only one: refit on its share of the calls."""
    rank, world = place()
    model = build()
    axes = find_axes(model)
    inputs = batch(64)
    parts = [{k: v[r] for k, v in inputs.items()} for r in rows]
    ranks = [{"": [call_of(p)]} if len(p["input_ids"]) else {} for p in parts]
    selection = Selection(random_plan(axes, 0.5), {}, {})
    heard = Heard({}, ranks=ranks)
    method = Method(Budget(sparsity=0.5))
    found = pull_back(model, axes, full_plan(axes), selection, method, heard, added, rank, world)
    return {name: value.tolist() for name, value in found.folded.items()}


def test_two_ranks_solve_what_one_does():
    """Also where one rank heard nothing and only keeps the other company."""
    alone = solve_on_a_rank([slice(0, 64)])
    shares = [(slice(0, 40), slice(40, 64)), (slice(0, 64), slice(0, 0))]
    found = launch(2, grouped, solve_on_a_rank, shares)
    assert found[0] == found[1]
    for both in found[0]:
        assert set(both) == set(alone)
        for name, value in alone.items():
            assert torch.allclose(torch.tensor(both[name]), torch.tensor(value), atol=1e-4), name


def test_calls_of_different_length_become_one():
    calls = [call_of(batch(4, length, seed=length)) for length in (6, 9)]
    call = merged(calls, 10_000)
    assert call.rows == 8
    assert call.kwargs["input_ids"].shape == (8, 9)
    assert int(call.mask.sum()) == sum(int(c.mask.sum()) for c in calls)
    assert merged(calls, 18).rows == 2
    some = merged([call_of(batch(6, 8))], 3 * 8).kwargs["input_ids"]
    assert torch.equal(some, batch(6, 8)["input_ids"][[2, 5, 0, 3]])  # spread, short ones first
    short = merged([call_of({k: v[:3] for k, v in batch(6, 8).items()})], 3 * 8)
    assert short.mask.shape == (3, int(short.mask.sum(1).max()))  # without padding of all
    assert merged([], 10) is None
    bare = [Example((torch.ones(3, n),), {}) for n in (4, 5, 4)]
    assert merged(bare, 100).rows == 6  # nothing tells padding apart, so one length only


def test_padding_at_the_end_of_all_goes_and_nothing_else():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    ids = torch.tensor([[7, 8, 0, 0], [9, 0, 0, 0]])
    states, deep = torch.ones(2, 3, 4), {"inside": [ids, torch.ones(2)]}
    call = trimmed(Example((ids, deep), {"mask": mask, "labels": torch.tensor([1, 0])}, mask))
    assert call.mask.tolist() == [[1, 1], [1, 0]]
    assert call.args[0].tolist() == call.args[1]["inside"][0].tolist() == [[7, 8], [9, 0]]
    assert call.kwargs["labels"].tolist() == [1, 0]
    for values in ((ids.flip(1),), (ids, states), (ids, torch.arange(4)[None]), (ids.float(),)):
        whole = Example(values, {"mask": mask}, mask)
        assert trimmed(whole) is whole  # something else has that length, or speaks there
    for odd in (mask.flip(1), torch.zeros(2, 4), mask[:, None], None):
        whole = Example((ids,), {}, odd)
        assert trimmed(whole) is whole


def test_targets_of_padded_texts_are_those_of_each_text_alone():
    model, inputs = build(), batch(12, 24)
    inputs["attention_mask"][:, 5:] = 0
    inputs["input_ids"][:, 5:] = 0
    lengths = []
    model.bert.embeddings.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    reading = Reading("bert.encoder.layer.1.output.dense", None, None)
    said = Targets(model, [reading], "", call_of(inputs)).take(reading.layer)
    assert max(lengths) <= 5
    alone = [{k: v[i : i + 1] for k, v in inputs.items()} for i in range(12)]
    parts = [Targets(model, [reading], "", call_of(one)).take(reading.layer) for one in alone]
    assert torch.allclose(torch.cat(parts), said, atol=1e-5)


def test_listening_stores_calls_in_their_bounds():
    model = build()
    axes = [a for a in find_axes(model) if a.kind in ("ffn", "heads")]
    with Listener(model, axes, batches=4, calls=100) as heard, torch.no_grad():
        for seed in range(4):
            heard.start_batch(32, padded=2)
            model(**batch(seed=seed))
    stored = heard.stored[""]
    assert len(stored) == 4
    assert 60 <= sum(int(call.mask.sum()) for call in stored) <= 112  # some 8 a row, whole rows


@pytest.mark.parametrize("batches", [40, None])
def test_pictures_are_stored_within_the_bound_however_many_batches_there_are(batches):
    model = build("vit", "image")
    axes = [a for a in find_axes(model) if a.kind in ("ffn", "heads")]
    with Listener(model, axes, batches=batches, calls=200) as heard, torch.no_grad():
        for _ in range(40):
            heard.start_batch()
            model(**pictures(4))
    (calls,) = heard.stored.values()
    each = (model.config.image_size // model.config.patch_size) ** 2 + 1
    assert 200 - 4 * each < sum(call.rows for call in calls) * each <= 200
    with Listener(model, axes, batches=40, calls=2) as few, torch.no_grad():
        for _ in range(40):
            few.start_batch()
            model(**pictures(4))
    assert [call.rows for calls in few.stored.values() for call in calls] == [1]


@pytest.fixture(params=[100, 96])
def pieces(request, monkeypatch):
    """Everything that is done in pieces, in many."""
    for module in (lightning_mi_prune.joining, lightning_mi_prune.refit):
        monkeypatch.setattr(module, "_PIECE", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_pieces_give_what_the_whole_gives(family, head, monkeypatch):
    """Also of what has no examples in its first dimension: DeBERTa's table of distances."""
    model, inputs = build(family, head), many(head)
    axes = find_axes(model)
    plan = random_plan(axes, 0.75, residual=True)
    method = Method(Budget(sparsity=0.5))
    args = (model, axes, full_plan(axes), Selection(plan, {}, {}), method, heard_of(inputs))
    parts = pull_back(*args).folded
    monkeypatch.setattr(lightning_mi_prune.joining, "_PIECE", 10**6)
    monkeypatch.setattr(lightning_mi_prune.refit, "_PIECE", 10**6)
    whole = pull_back(*args).folded
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.allclose(parts[name], value, atol=1e-4), name


def test_room_holds_however_padding_is_spread():
    model = build()
    axes = find_axes(model)
    inputs = batch(400, 12)
    inputs["attention_mask"][:40, 2:] = 0  # the first piece is nearly empty
    call, room = call_of(inputs), 1_000_000
    found = readings(axes, full_plan(axes), random_plan(axes))
    targets = Targets(model, found, "", call, room=room)
    targets.take("bert.encoder.layer.0.attention.output.dense")
    held = sum(t.nbytes for t in targets._held.values())
    assert 0 < held <= room


def test_what_autocast_made_coarse_runs_again_in_full():
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
    axis = linear_axis(model.net, "hidden", kind="ffn", producers=["0"], readers=["2"])
    axis = replace(axis.prefixed("net"), skip=None)
    coarse, heard = torch.autocast("cpu", torch.bfloat16), Listener(model, [axis], calls=64)
    with torch.no_grad(), coarse, heard:
        model(torch.randn(64, 5))
    ((path, (call,)),) = heard.stored.items()
    assert call.args[0].dtype == torch.bfloat16
    network = model.get_submodule(path)
    call = full(call, network)
    with evaluated(network):
        network(*call.args, **call.kwargs)
    assert measure_macs(model, [axis], heard.calls([axis])).total({}) == 6 * 16 + 16 * 3


def test_fold_in_then_refit_beats_fold_in_on_data_that_was_not_heard():
    model = build(seed=5)
    axes = [a for a in find_axes(model) if a.kind in ("ffn", "heads")]
    with Listener(model, axes, calls=4000) as heard, torch.no_grad():
        model(**batch(300))
    widths = {a.name: a.size // 2 for a in axes}
    plan, weights = full_plan(axes), dict(model.named_parameters())
    folded = select(axes, heard.moments, weights, widths, plan)
    method = Method(Budget(sparsity=0.5))
    fitted = pull_back(model, axes, plan, folded, method, Heard({}, ranks=[heard.stored]))
    fresh = batch(200, seed=9)
    wanted = outputs(model, fresh)
    errors = [
        float((outputs(cut_by(model, axes, s.plan, s.folded), fresh) - wanted).square().mean())
        for s in (folded, fitted)
    ]
    assert errors[1] < errors[0]


def test_a_norm_whose_entry_never_changes_keeps_its_gain():
    norm = nn.LayerNorm(3)
    plain = torch.randn(50, 3)
    plain[:, 1] = 0.5
    found = _solve_norm(norm, _norm_sums(plain, plain * 2 + 1))
    assert torch.allclose(found["weight"], torch.tensor([2.0, 1.0, 2.0]), atol=1e-4)
    assert torch.allclose(found["bias"], torch.tensor([1.0, 1.5, 1.0]), atol=1e-4)
