"""Layers that stay reproduce removed ones: closer to the dense model, exactly where possible."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.running import evaluating
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.reconstruction.block_runs import valid_positions
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reconstruction.removed_layers import (
    compensate_removed_layers,
    replacements_for,
)
from lightning_mi_prune.surgery.transaction import cut_model
from tests.support.graphs import groups_of, stacks_of
from tests.support.models import batch, build, pictures
from tests.support.ranks import added, check_ranks, place
from tests.support.stacks import deep_bert
from tests.surgery.test_removed_layers_surgery import BOTH, DECODERS, ENCODERS, made

STACK = "bert.encoder.layer"


def call_of(inputs):
    return RecordedCall((), dict(inputs), inputs.get("attention_mask"))


def body(model):
    units = groups_of(model) if type(model).__name__.startswith(("Bert", "ViT")) else ()
    return PruningGraph(tuple(units), tuple(stacks_of(model)))


def without_layers(graph, *gone, current=None):
    """A plan in which no stack has these layers."""
    now = graph.full if current is None else current
    layers = {s.name: tuple(i for i in now.kept[s.name] if i not in gone) for s in graph.stacks}
    return graph.keep_layers(now, layers)


def shorter(model, graph, plan, call, *, take=True, current=None, **options):
    """A copy without the layers, and the selection it was made from."""
    now = graph.full if current is None else current
    selection = Decision(plan, {}, {})
    if take:
        data = CalibrationData(ranks=[{"": [call]}])
        selection = compensate_removed_layers(
            model, graph, now, selection, data, positions=10**5, **options
        )
    cut = copy.deepcopy(model)
    cut_model(cut, graph, plan, current=now, compensated=selection.compensated)
    return cut, selection


def states(model, stack, call):
    """Outputs of the last layer of a stack."""
    found = []
    layer = model.get_submodule(stack)[-1]
    hook = layer.register_forward_hook(
        lambda _, __, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with evaluating(model):
        model(*call.args, **call.kwargs)
    hook.remove()
    return valid_positions(found[0], call.mask)


def random_numbers(model):
    """Norms and biases that differ from layer to layer, and projections that matter."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise.to(parameter))
            elif "embed" not in name:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def known(kind):
    if kind in DECODERS or kind in BOTH:
        inputs = {k: v for k, v in batch(48).items() if k != "token_type_ids"}
        labels = inputs["input_ids"].clone() if kind in DECODERS else batch(48, 9)["input_ids"]
        return random_numbers(made(kind)), call_of({**inputs, "labels": labels})
    model = build(kind, "image" if kind in ("vit", "deit") else "sequence")
    inputs = pictures(64) if kind in ("vit", "deit") else batch(48)
    inputs = {k: v for k, v in inputs.items() if k != "token_type_ids" or kind == "bert"}
    return random_numbers(model), call_of(inputs)


@pytest.mark.parametrize(
    "kind", [f for f, _ in ENCODERS] + [k for k in (*DECODERS, *BOTH) if k != "gpt2"]
)
def test_outputs_of_every_family_come_closer_to_the_dense_model(kind):
    model, call = known(kind)
    graph = body(model)
    stacks = [s for s in graph.stacks if s.size > 1]
    plan = without_layers(graph, 1)
    plain, _ = shorter(model, graph, plan, call, take=False)
    cut, selection = shorter(model, graph, plan, call)
    assert selection.compensated
    for stack in stacks:
        dense = states(model, stack.name, call)
        far, near = (float((states(m, stack.name, call) - dense).norm()) for m in (plain, cut))
        assert near < 0.9 * far, (stack.name, near, far)


def test_a_constant_that_layers_added_is_reproduced_exactly():
    model = random_numbers(build("vit", "image"))
    graph = body(model)
    (stack,) = graph.stacks
    with torch.no_grad():
        for projection, _ in stack.residual_branches:
            model.get_submodule(f"{stack.name}.1.{projection}").weight.zero_()
    call = call_of(pictures(64))
    plan = without_layers(graph, 1)
    plain, _ = shorter(model, graph, plan, call, take=False)
    cut, _ = shorter(model, graph, plan, call)
    dense = states(model, stack.name, call)
    assert float((states(plain, stack.name, call) - dense).abs().max()) > 0.1
    assert torch.allclose(states(cut, stack.name, call), dense, atol=1e-4)


def test_removing_identity_layers_changes_nothing():
    model = deep_bert().eval()
    graph = body(model)
    call = call_of(batch(64))
    cut, selection = shorter(model, graph, without_layers(graph, 2, 3), call)
    dense = states(model, STACK, call)
    assert torch.allclose(states(cut, STACK, call), dense, atol=1e-3)
    assert {name.split(".")[3] for name in selection.compensated} == {"1", "2", "3"}


def test_the_model_is_only_run():
    model = deep_bert()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    ids, state = [id(p) for p in model.parameters()], torch.get_rng_state()
    graph = body(model)
    _, selection = shorter(model, graph, without_layers(graph, 1, 4), call_of(batch(64)))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == ids
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(t.requires_grad for t in selection.compensated.values())


def test_which_layer_replaces_which():
    graph = body(deep_bert())
    found = replacements_for(graph, graph.full, without_layers(graph, 1, 2, 5))
    ends = [(r.layer, r.target.layer) for r in found.layers if ".attention" not in r.layer]
    path = "{}.{}.output.dense"
    assert ends == [
        (path.format(STACK, new), path.format(STACK, old)) for new, old in enumerate((2, 3, 5))
    ]
    inner = [(r.layer, r.target.layer) for r in found.layers if ".attention" in r.layer]
    path = "{}.{}.attention.output.dense"
    assert inner == [
        (path.format(STACK, new), path.format(STACK, old)) for new, old in ((1, 3), (2, 4))
    ]
    norm = "{}.{}.output.LayerNorm"
    assert found.norms == {
        norm.format(STACK, new): norm.format(STACK, old) for new, old in ((0, 2), (2, 5))
    }
    # Layers removed at the bottom are not replaced; those above reproduce their own outputs.
    found = replacements_for(graph, graph.full, without_layers(graph, 0, 1))
    assert not found.norms
    assert [r.target.layer.split(".")[3] for r in found.layers] == list("22334455")


def test_a_second_cut_uses_the_present_paths():
    model, call = deep_bert(copies=()).eval(), call_of(batch(64))
    graph = body(model)
    first = without_layers(graph, 1)
    short, _ = shorter(model, graph, first, call)
    dense = states(short, STACK, call)
    plan = without_layers(graph, 3, current=first)
    plain, _ = shorter(short, graph, plan, call, take=False, current=first)
    cut, selection = shorter(short, graph, plan, call, current=first)
    assert len(cut.bert.encoder.layer) == 4
    assert f"{STACK}.1.output.dense.weight" in selection.compensated
    far, near = (float((states(m, STACK, call) - dense).norm()) for m in (plain, cut))
    assert near < 0.9 * far


def test_unknown_projections_stay():
    model = made("gpt2")
    stacks = (replace(stack, residual_branches=()) for stack in stacks_of(model))
    graph = PruningGraph(stacks=tuple(stacks))
    call = call_of({"input_ids": batch(8)["input_ids"]})
    _, selection = shorter(model, graph, without_layers(graph, 1), call)
    assert not selection.compensated


def test_a_projection_that_is_not_linear_is_refused():
    model = deep_bert()
    graph = PruningGraph(stacks=tuple(stacks_of(model)))
    model.bert.encoder.layer[0].output.dense = nn.Sequential(nn.Linear(40, 24))
    with pytest.raises(
        PruningError,
        match=r"layer\.0\.output\.dense' cannot be solved again: Sequential is neither",
    ):
        shorter(model, graph, without_layers(graph, 1), call_of(batch(8)))


def test_calls_that_never_reach_the_layers_are_refused():
    model = deep_bert()
    graph = body(model)
    data = CalibrationData(ranks=[{"classifier": [RecordedCall((torch.ones(50, 24),), {})]}])
    selection = Decision(without_layers(graph, 1), {}, {})
    with pytest.raises(PruningError, match=r"No stored input reaches .*layer\.0\.output\.dense"):
        compensate_removed_layers(model, graph, graph.full, selection, data, positions=100)


def solve_on_a_rank(rows):
    """One rank of two, or the only one: solve on its share of the calls."""
    rank, world = place()
    model = deep_bert(copies=()).eval()
    graph = body(model)
    inputs = batch(64)
    parts = [{k: v[r] for k, v in inputs.items()} for r in rows]
    data = CalibrationData(ranks=[{"": [call_of(p)]} if len(p["input_ids"]) else {} for p in parts])
    selection = Decision(without_layers(graph, 1, 4), {}, {})
    options = {"positions": 10**5, "add": added, "rank": rank, "world": world}
    found = compensate_removed_layers(model, graph, graph.full, selection, data, **options)
    return {name: value.tolist() for name, value in found.compensated.items()}


def test_two_ranks_solve_what_one_does():
    """Also where one rank has no calls and only takes part in the sums."""
    check_ranks(solve_on_a_rank, rows=64, atol=1e-3)
