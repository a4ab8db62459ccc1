from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from transformers import BertModel

from lightning_mi_prune.checkpoint.pretrained import from_pretrained
from lightning_mi_prune.checkpoint.recorded import present_plan
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.checkpoint.validation import PLAN_KEY, is_plan
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import is_within
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import graph_of, groups_of
from tests.support.models import CONFIGS, HEADS, batch, build, outputs, random_plan

EVERY = pytest.mark.parametrize(
    ("family", "head"),
    [*((family, "sequence") for family in CONFIGS), *(("bert", head) for head in HEADS)][1:],
)


def kept(family="bert", head="sequence"):
    root = nn.ModuleDict({"net": build(family, head)})
    return root, PlanTracker(root, graph_of(root))


def cut(root, tracker, share=0.5):
    plan = tracker.plan.joined(random_plan(tracker.groups, share))
    apply_plan(root, tracker.groups, plan)
    tracker.plan = plan


@EVERY
def test_a_state_dict_gives_its_shape_to_a_fresh_model(family, head, tmp_path):
    root, tracker = kept(family, head)
    cut(root, tracker)
    torch.save(root.state_dict(), tmp_path / "weights.pt")
    for graph in (graph_of(nn.ModuleDict({"net": build(family, head)})), None):
        fresh = nn.ModuleDict({"net": build(family, head)})
        fresh_tracker = PlanTracker(fresh, graph)  # without one, that of the file is used
        fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert fresh_tracker.plan == tracker.plan
        assert torch.equal(outputs(fresh["net"], batch()), outputs(root["net"], batch()))


def test_a_larger_checkpoint_makes_the_model_grow():
    root, tracker = kept()
    full = copy.deepcopy(root.state_dict())
    assert not any(map(is_plan, full))
    before = outputs(root["net"], batch())
    cut(root, tracker)
    half = copy.deepcopy(root.state_dict())
    root.load_state_dict(full)
    assert tracker.plan.is_full
    assert torch.equal(outputs(root["net"], batch()), before)
    root.load_state_dict(half)
    assert root["net"].bert.encoder.layer[0].intermediate.dense.out_features == 20


def test_without_a_tracker_a_pruned_checkpoint_is_refused():
    root, tracker = kept()
    cut(root, tracker)
    stranger = nn.ModuleDict({"net": build()})
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{re.escape(PLAN_KEY)}") as refusal:
        stranger.load_state_dict(root.state_dict())
    assert "open it with lightning_mi_prune.load_pruned" in str(refusal.value)
    tracker.close()
    assert not any(map(is_plan, root.state_dict()))


def test_a_module_with_a_tracker_can_be_copied_and_pickled():
    root, tracker = kept()
    cut(root, tracker)
    other = copy.deepcopy(root)
    assert any(map(is_plan, other.state_dict()))
    tracker.plan = None
    assert any(map(is_plan, other.state_dict()))
    pickle.loads(pickle.dumps(other))  # noqa: S301


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (torch.zeros(3), "is not a plan"),
        (torch.zeros(2, 2, dtype=torch.uint8), "is not a plan"),
        ("text", "is not a plan"),
        (torch.tensor([255, 254], dtype=torch.uint8), "is damaged"),
        (torch.frombuffer(bytearray(b"{}"), dtype=torch.uint8), "version None"),
        (
            torch.frombuffer(
                bytearray(b'{"version":1,"sizes":{"a":2},"kept":{"a":[0]}}'), dtype=torch.uint8
            ),
            "made for another model",
        ),
    ],
)
def test_a_damaged_entry_is_refused_and_the_model_stays(entry, message):
    root, _ = kept()
    before = {k: v.clone() for k, v in root.state_dict().items()}
    with pytest.raises(PruningError, match=message):
        root.load_state_dict({**before, PLAN_KEY: entry})
    after = root.state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


@EVERY
def test_save_pretrained_and_back(family, head, tmp_path):
    model = build(family, head)
    groups = groups_of(model)
    apply_plan(model, groups, random_plan(groups))
    model.save_pretrained(tmp_path)
    again = from_pretrained(HEADS[head], tmp_path)
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))
    assert present_plan(again, groups_of(again)) == present_plan(model, groups)
    if head == "masked-lm":
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_model_class_works_like_an_auto_class(tmp_path):
    model = build()
    groups = groups_of(model)
    apply_plan(model, groups, random_plan(groups))
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), str(tmp_path))
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))


def test_a_part_of_a_state_dict_leaves_a_pruned_model_alone():
    root, tracker = kept()
    cut(root, tracker)
    before = copy.deepcopy(root.state_dict())
    root.load_state_dict({"net.classifier.bias": torch.ones(3)}, strict=False)
    without_plan = {k: v for k, v in before.items() if not is_plan(k)}
    after = root.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"net.classifier.bias"}
    root.load_state_dict(without_plan)  # the same shape without its plan
    assert torch.equal(root.state_dict()["net.classifier.bias"], before["net.classifier.bias"])
    other = {**without_plan, "net.bert.encoder.layer.0.output.dense.weight": torch.zeros(24, 7)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        root.load_state_dict(other)
    assert root["net"].bert.encoder.layer[0].output.dense.weight.abs().sum() > 0


def unchanged(root, before):
    after = root.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_the_wording_of_the_key_may_change():
    root, tracker = kept()
    cut(root, tracker)
    state = root.state_dict()
    keys = [key for key in state if is_plan(key)]
    assert keys == [f"net.bert.{PLAN_KEY}", f"net.{PLAN_KEY}"]
    for key in keys:
        state[key.replace(PLAN_KEY, "lightning_mi_prune.plan (other words)")] = state.pop(key)
    fresh, fresh_tracker = kept()
    fresh.load_state_dict(state)
    assert fresh_tracker.plan == tracker.plan


def two(*, within="", cut_as_built=False):
    """Two networks, of which a tracker may know one; the other may come cut from its folder."""
    root = nn.ModuleDict({"q": build(), "d": build(seed=1)})
    if cut_as_built:
        groups = within_of(root, "d").groups
        apply_plan(root, groups, random_plan(groups, seed=3))
    return root, PlanTracker(root, within_of(root, within))


def within_of(root, path):
    """What a part of a module can lose."""
    return PruningGraph.of(part for part in graph_of(root).parts if is_within(part.name, path))


@pytest.mark.parametrize("cut_as_built", [False, True])
@pytest.mark.parametrize(("writer", "loader"), [("q", "q"), ("q", ""), ("", "q"), ("q", "d")])
def test_trackers_of_a_part_and_of_the_whole_read_each_other(writer, loader, cut_as_built):
    root, tracker = two(within=writer, cut_as_built=cut_as_built)
    tracker.plan = tracker.plan.then(
        random_plan([a for a in tracker.groups if a.name.startswith("q.")])
    )
    apply_plan(
        root,
        [a for a in tracker.groups if a.name.startswith("q.")],
        tracker.plan.under("q").prefixed("q"),
    )
    fresh, other = two(within=loader, cut_as_built=cut_as_built)
    fresh.load_state_dict(root.state_dict())
    for name in ("q", "d"):
        assert torch.equal(outputs(fresh[name], batch()), outputs(root[name], batch()))
    assert set(other.plan.sizes) >= {n for n in tracker.plan.sizes if n.startswith("q.")}
    assert [group.name for group in other.groups if group.name not in other.plan.sizes] == []
    again, _ = two(cut_as_built=cut_as_built)
    again.load_state_dict(fresh.state_dict())
    assert torch.equal(outputs(again["q"], batch()), outputs(root["q"], batch()))


def test_a_group_without_a_stored_plan_becomes_as_built():
    root, tracker = two(within="q")
    cut(root, tracker)
    fresh, other = two()
    cut(fresh, other)
    fresh.load_state_dict(root.state_dict())
    assert torch.equal(outputs(fresh["d"], batch()), outputs(root["d"], batch()))
    assert other.plan.under("d").is_full


def test_a_group_that_gets_neither_plan_nor_weights_stays_as_it_is():
    def pair(*names):
        root = nn.ModuleDict(
            {n: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for n in names}
        )
        describe = {"kind": "ffn", "producers": ["0"], "consumers": ["2"]}
        groups = [linear_group(root[n], "hidden", **describe).prefixed(n) for n in names]
        tracker = PlanTracker(root, PruningGraph.of(groups))
        cut(root, tracker, 0.5)
        return root, tracker

    root, tracker = pair("q", "d")
    before = copy.deepcopy(root["d"].state_dict())
    other, _ = pair("q")
    root.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(root["q"][0].weight, other["q"][0].weight)
    assert unchanged(root["d"], before)
    assert tracker.plan.width("d.hidden") == 2


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        (
            "net.bert.encoder.layer.1.output.dense.weight",
            torch.zeros(24, 7),
            r"\(24, 7\).*\(24, 10\)",
        ),
        (
            "net.bert.encoder.layer.1.intermediate.dense.bias",
            torch.zeros(10, 1),
            r"expected \(10,\)",
        ),
        ("net.bert.encoder.layer.1.output.dense.weight", None, "but not this tensor"),
    ],
)
def test_weights_that_do_not_fit_their_plan_change_nothing(share, entry, value, message):
    root, tracker = kept()
    cut(root, tracker, 0.25)
    state = {**root.state_dict(), entry: value}
    if value is None:
        del state[entry]
    fresh, fresh_tracker = kept()
    cut(fresh, fresh_tracker, share)
    before, plan = copy.deepcopy(fresh.state_dict()), fresh_tracker.plan
    for strict in (True, False):
        with pytest.raises(PruningError, match=message):
            fresh.load_state_dict(state, strict=strict)
    assert unchanged(fresh, before)
    assert fresh_tracker.plan == plan


def test_a_plan_of_other_sizes_is_refused_and_nothing_changes():
    root, tracker = two(within="q")
    before = copy.deepcopy(root.state_dict())
    name = "q.bert.encoder.layer.0.heads"
    for plan, message in [
        (PruningPlan({name: 7}, {name: (0,)}), f"group '{name}' of size 7 has 4 here"),
        (
            PruningPlan({"d.nothing": 7}, {"d.nothing": (0,)}),
            "group 'd.nothing' of size 7 is missing here",
        ),
    ]:
        entry = torch.frombuffer(bytearray(plan.to_json().encode()), dtype=torch.uint8)
        with pytest.raises(PruningError, match=f"made for another model: {message}"):
            root.load_state_dict({**before, PLAN_KEY: entry})
        assert unchanged(root, before)
    assert {group.name[0] for group in tracker.groups} == {"q"}


def test_a_module_has_one_tracker_and_its_copies_have_their_own():
    root, tracker = kept()
    cut(root, tracker)
    assert PlanTracker.of(root) is tracker
    other = copy.deepcopy(root)
    own = PlanTracker.of(other)
    assert own is not tracker
    assert own.plan == tracker.plan
    other.load_state_dict(root.state_dict())
    assert torch.equal(outputs(other["net"], batch()), outputs(root["net"], batch()))


def test_networks_with_one_config_object_keep_their_own_plans(tmp_path):
    config = CONFIGS["bert"]()
    pair = nn.ModuleDict({"q": BertModel(config), "d": BertModel(config)}).eval()
    groups = within_of(pair, "q").groups
    apply_plan(pair, groups, random_plan(groups))
    assert pair["q"].config.intermediate_size == 20
    assert pair["d"].config.intermediate_size == 40
    assert not hasattr(pair["d"].config, "pruning_plan")
    both = groups_of(pair)
    apply_plan(pair, both, random_plan(both, 0.25), current=present_plan(pair, both))
    for name in ("q", "d"):
        pair[name].save_pretrained(tmp_path / name)
        again = from_pretrained(BertModel, tmp_path / name)
        for a, b in zip(again.parameters(), pair[name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_the_encoder_of_a_pruned_classifier_can_be_saved_alone(tmp_path):
    model = build()
    groups = [g for g in groups_of(model) if is_within(g.name, "bert") and g.kind != "pooler"]
    assert len(groups) == 7
    apply_plan(model, groups_of(model), random_plan(groups))
    model.bert.save_pretrained(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "whole")
    encoder = from_pretrained(BertModel, tmp_path / "encoder")
    for a, b in zip(encoder.parameters(), model.bert.parameters(), strict=True):
        assert torch.equal(a, b)
    whole = from_pretrained(type(model), tmp_path / "whole")
    assert torch.equal(outputs(whole, batch()), outputs(model, batch()))
    assert sorted(g.size for g in groups_of(model.bert)) == [4, 4, 6, 6, 24, 40, 40]


def test_weights_come_from_the_same_place_as_the_config(tmp_path):
    first, second = build(), build(seed=1)
    for model, folder in ((first, tmp_path), (second, tmp_path / "sub")):
        groups = groups_of(model)
        apply_plan(model, groups, random_plan(groups))
        model.save_pretrained(folder)
    again = from_pretrained(type(first), tmp_path, subfolder="sub")
    assert torch.equal(outputs(again, batch()), outputs(second, batch()))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        from_pretrained(type(first), tmp_path)
