"""The graph of what was cut travels with the plan; loading needs no discovery."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lightning_mi_prune.checkpoint.loading import load_pruned
from lightning_mi_prune.checkpoint.pretrained import from_pretrained
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.checkpoint.validation import PLAN_KEY, is_plan
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim
from lightning_mi_prune.surgery.tensors import tensors_of
from lightning_mi_prune.surgery.transaction import cut_model
from tests.support.discovered import MODELS, build, graph_of, half, kinds_of, output_of


def cut(name, kinds=None):
    """A model that lost half of its units, with a tracker."""
    (model, call), graph = build(name), graph_of(name)
    tracker = PlanTracker(model)
    tracker.adopt(graph)
    plan = half(graph, kinds or set(kinds_of(name)))
    cut_model(model, tracker.graph, plan, current=graph.full)
    tracker.plan = plan
    return model, call


def body_of(state):
    return json.loads(bytes(state[PLAN_KEY].tolist()))


def with_body(state, body):
    text = json.dumps(body).encode()
    return {**state, PLAN_KEY: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_opens_without_discovery_and_equal(name, tmp_path):
    model, call = cut(name)
    torch.save(model.state_dict(), tmp_path / "cut.pt")
    fresh, _ = build(name, seed=1)
    load_pruned(fresh, tmp_path / "cut.pt")
    assert torch.equal(output_of(fresh, call), output_of(model, call))
    again, _ = build(name, seed=2)
    torch.save(fresh.state_dict(), tmp_path / "again.pt")
    load_pruned(again, tmp_path / "again.pt")
    assert torch.equal(output_of(again, call), output_of(model, call))
    torch.save(build(name, seed=3)[0].state_dict(), tmp_path / "whole.pt")
    load_pruned(again, tmp_path / "whole.pt")  # which grows it again
    assert torch.equal(output_of(again, call), output_of(build(name, seed=3)[0], call))
    assert PlanTracker.of(again).plan.is_full


def test_other_cuts_of_one_model_follow_each_other():
    states = {kind: cut("fused queries", {kind})[0].state_dict() for kind in ("ffn", "heads")}
    model, call = build("fused queries", seed=1)
    tracker = PlanTracker(model)
    for kind in ("ffn", "heads", "ffn"):
        model.load_state_dict(dict(states[kind]))
        assert torch.equal(output_of(model, call), output_of(cut("fused queries", {kind})[0], call))
        assert set(tracker.plan.sizes) == set(graph_of("fused queries").full.sizes)


def test_a_part_keeps_its_graph_when_it_is_taken_out(tmp_path):
    model, call = cut("convolutions")
    whole = nn.ModuleDict({"net": model})
    tracker = PlanTracker.of(whole)
    assert not tracker.plan.is_full
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    fresh = nn.ModuleDict({"net": build("convolutions", seed=1)[0]})
    load_pruned(fresh, tmp_path / "whole.pt")
    assert torch.equal(output_of(fresh["net"], call), output_of(model, call))


@pytest.mark.parametrize("name", ["grouped queries", "fused queries"])
def test_a_folder_of_transformers_opens_with_its_plan(name, tmp_path):
    from transformers import AutoModelForCausalLM

    model, call = cut(name, set(kinds_of(name)) - {"head_dim"})
    model.save_pretrained(tmp_path)
    again = from_pretrained(AutoModelForCausalLM, tmp_path)
    assert torch.equal(output_of(again, call), output_of(model, call))
    tokens = {"do_sample": False, "max_new_tokens": 3, "pad_token_id": 0}
    assert torch.equal(
        again.generate(**call.kwargs, **tokens), model.generate(**call.kwargs, **tokens)
    )
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    graph = json.loads(fields["pruning_graph"])
    tensor = first(graph)["tensors"][0]
    tensor["shape"][tensor["dim"]] += 1
    file.write_text(json.dumps(fields | {"pruning_graph": json.dumps(graph)}))
    with pytest.raises(PruningError, match=r"made for another model|its shape is"):
        from_pretrained(AutoModelForCausalLM, tmp_path)


def test_a_folder_cannot_hold_cut_frequencies_that_transformers_computes(tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = cut("grouped queries", {"head_dim"})
    model.save_pretrained(tmp_path)
    with pytest.raises(PruningError, match=r"rotary frequencies.*load_pruned"):
        from_pretrained(AutoModelForCausalLM, tmp_path)


def test_models_that_lost_nothing_hold_no_entry():
    model, _ = build("convolutions")
    tracker = PlanTracker(model)
    tracker.adopt(graph_of("convolutions"))
    assert tracker.plan.is_full
    assert not any(map(is_plan, model.state_dict()))


def edit(body, change):
    graph = json.loads(body["graph"])
    change(graph)
    return {**body, "graph": json.dumps(graph)}


def first(graph):
    return graph["groups"][0]


def number(graph):
    return first(graph)["attributes"][0]


def renamed(graph):
    first(graph)["tensors"][0]["tensor"] = "stem.absent"


def enlarged(graph):
    first(graph)["tensors"][0]["shape"][1] += 1


def contradicting(graph):
    first(graph)["tensors"].append(
        {**first(graph)["tensors"][0], "layout": [[first(graph)["size"]]]}
    )


HOSTILE = {
    "a tensor that is missing": (renamed, "'stem.absent' is missing here"),
    "another shape": (enlarged, "has shape .* here and .* in it"),
    "two layouts": (contradicting, "has two layouts along dimension 0"),
    "a huge number": (
        lambda graph: number(graph).update(layout=[[first(graph)["name"], 10**9]]),
        "is 8 here and 8000000000 in it",
    ),
    "a private attribute": (
        lambda graph: number(graph).update(attribute="__class__"),
        "names the attribute '__class__'|is no attribute|no whole number",
    ),
    "an inner private attribute": (
        lambda graph: number(graph).update(attribute="_version"),
        "names the attribute '_version'",
    ),
    "an attribute that is none": (
        lambda graph: number(graph).update(attribute="absent"),
        "'stem.absent' is no attribute",
    ),
    "a module that is missing": (
        lambda graph: first(graph).update(consumers=["nowhere"]),
        "names the consumer 'nowhere'",
    ),
    "a consumer that is no matrix": (
        lambda graph: first(graph).update(consumers=["norm.weight"]),
        "names the consumer 'norm.weight'",
    ),
    "a consumer that is a buffer": (
        lambda graph: first(graph).update(above=["norm.running_mean"]),
        "names the consumer 'norm.running_mean'",
    ),
    "a size that no layout has": (
        lambda graph: first(graph).update(size=2**23),
        "entries, its shape is",
    ),
    "a field that is unknown": (lambda graph: first(graph).update(run="code"), "an entry 'run'"),
    "no graph at all": (lambda graph: graph.clear(), "version"),
    "fewer groups than the plan": (
        lambda graph: graph.update(groups=graph["groups"][:1]),
        "of size 12 is missing here",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_graph_that_does_not_fit_is_refused_before_anything_changes(name, tmp_path):
    change, message = HOSTILE[name]
    model, _ = cut("convolutions")
    state = dict(model.state_dict())
    torch.save(with_body(state, edit(body_of(state), change)), tmp_path / "edited.pt")
    fresh, call = build("convolutions", seed=1)
    before, objects = output_of(fresh, call), {n: id(t) for n, t in tensors_of(fresh).items()}
    with pytest.raises(PruningError, match=message):
        load_pruned(fresh, tmp_path / "edited.pt")
    assert {n: id(t) for n, t in tensors_of(fresh).items()} == objects
    assert torch.equal(output_of(fresh, call), before)
    assert fresh.stem.out_channels == 8


def test_a_plan_without_its_graph_is_refused():
    model, _ = cut("convolutions")
    state = dict(model.state_dict())
    body = body_of(state)
    del body["graph"]
    fresh, _ = build("convolutions", seed=1)
    PlanTracker(fresh)
    with pytest.raises(PruningError, match=r"made for another model: group .* is missing here"):
        fresh.load_state_dict(with_body(state, body))


def test_a_graph_of_far_more_units_than_the_module_is_refused_before_a_plan_is_made(monkeypatch):
    made = []
    full = PruningPlan.full
    monkeypatch.setattr(PruningPlan, "full", lambda sizes: made.append(sizes) or full(sizes))
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    dims = (PrunableDim("0.weight", 0, (2**24, 3), (("a",),)),)
    group = DependencyGroup("a", "ffn", 2**24, dims, ("1",))
    with pytest.raises(PruningError, match="16777216 units in all"):
        PlanTracker(module).adopt(PruningGraph((group,)))
    assert not made
