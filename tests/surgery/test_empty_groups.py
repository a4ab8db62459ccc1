"""A sublayer may lose all its units: what is left of it is the bias of its consumer."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertModel

from lightning_mi_prune.checkpoint.loading import load_pruned
from lightning_mi_prune.checkpoint.pretrained import from_pretrained
from lightning_mi_prune.checkpoint.recorded import present_plan
from lightning_mi_prune.core.empty_linear import KEPT_UNITS
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.graph.groups import EmptyForward, full_plan
from lightning_mi_prune.surgery.optimizers import update_optimizers
from lightning_mi_prune.surgery.units import (
    apply_plan,
    reshape_tensors,
    restore_plan,
    revert_rewrites,
)
from tests.support import models
from tests.support.graphs import groups_of, tracker_of
from tests.support.models import CONFIGS, batch, build, inputs_of, masked_copy, outputs, random_plan
from tests.support.ranks import grouped, launch

FAMILIES = pytest.mark.parametrize(
    ("family", "head"), [(f, "sequence") for f in CONFIGS] + [(f, "image") for f in models.PICTURES]
)
WHAT = pytest.mark.parametrize("what", ["heads", "ffn", "both", "all"])


def vanished(groups, what):
    """A random plan in which sublayers of the first layer, or of all layers, are empty."""
    plan = random_plan(groups)
    first = {"heads": 2, "ffn": 2, "both": 2, "all": 99}[what]
    kinds = {"heads": ["heads"], "ffn": ["ffn"]}.get(what, ["heads", "ffn"])
    gone = [a.name for a in groups[:first] if a.kind in kinds]
    return PruningPlan(plan.sizes, {**plan.kept, **dict.fromkeys(gone, ())})


@WHAT
@FAMILIES
def test_what_is_left_is_the_bias(family, head, what):
    model = build(family, head)
    groups, inputs = groups_of(model), inputs_of(head)
    plan = vanished(groups, what)
    masked = masked_copy(model, groups, plan)
    apply_plan(model, groups, plan)
    assert torch.allclose(outputs(model, inputs), outputs(masked, inputs), atol=1e-5)
    assert groups_of(model) == groups
    assert present_plan(model, groups) == plan
    for group in groups:
        if plan.width(group.name) == 0:
            assert model.get_submodule(group.consumers[0]).weight.numel() == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attention_kernels_do_without_heads(attention):
    model = build("bert", attn_implementation=attention)
    groups = groups_of(model)
    plan = vanished(groups, "both")
    masked = masked_copy(model, groups, plan)
    apply_plan(model, groups, plan)
    assert torch.allclose(outputs(model, batch()), outputs(masked, batch()), atol=1e-5)


@FAMILIES
def test_gradients_reach_everything_and_training_goes_on(family, head):
    model = build(family, head).train()
    groups, inputs = groups_of(model), inputs_of(head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    labels = torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long)
    left_out = {n for n, _ in model.named_parameters()}

    def step():
        optimizer.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()

    step()
    left_out = {n for n, p in model.named_parameters() if p.grad is None}
    now = full_plan(groups)
    for what in ("heads", "all"):
        plan = vanished(groups, what)
        update_optimizers([optimizer], apply_plan(model, groups, plan, current=now))
        now = plan
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        step()
        assert {n for n, p in model.named_parameters() if p.grad is None} == left_out
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        mine = [group for group in groups if group.kind not in ("hidden", "head_dim")]
        assert {f"{group.consumers[0]}.bias" for group in mine} <= moved
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def three_steps(kind):
    """DDP complains, in the second step, of parameters the loss does not know."""
    family, head = kind
    model = build(family, head).train()
    groups, inputs = groups_of(model), inputs_of(head)
    apply_plan(model, groups, vanished(groups, "all"))
    labels = torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long)
    parallel = DistributedDataParallel(model)
    for _ in range(3):
        parallel(**inputs, labels=labels).loss.backward()
    return family


def test_no_parameter_is_unused():
    kinds = [(f, "sequence") for f in CONFIGS] + [("vit", "image")]
    found = launch(2, grouped, three_steps, kinds)
    assert found == {rank: [*CONFIGS, "vit"] for rank in (0, 1)}


@WHAT
@FAMILIES
def test_growing_back(family, head, what):
    model = build(family, head)
    groups, inputs = groups_of(model), inputs_of(head)
    plan, before = vanished(groups, what), outputs(model, inputs)
    values = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    full = copy.deepcopy(model.state_dict())
    rewrites = apply_plan(model, groups, plan)
    after, small = outputs(model, inputs), copy.deepcopy(model.state_dict())
    names = {name for name, _ in model.named_buffers()}
    revert_rewrites(model, groups, full_plan(groups), rewrites)
    assert torch.equal(outputs(model, inputs), before)
    assert not any("forward" in vars(m) for m in model.modules())
    assert {name for name, _ in model.named_buffers()} == names - {
        n for n in names if n.endswith(KEPT_UNITS)
    }
    reshape_tensors(model, groups, plan)
    model.load_state_dict(small)
    assert torch.equal(outputs(model, inputs), after)
    restore_plan(model, groups, full_plan(groups), values)
    assert torch.equal(outputs(model, inputs), before)
    reshape_tensors(model, groups, plan)
    reshape_tensors(model, groups, full_plan(groups))
    model.load_state_dict(full)
    assert torch.equal(outputs(model, inputs), before)


@FAMILIES
def test_copies_and_pickles(family, head):
    model = build(family, head)
    groups, inputs = groups_of(model), inputs_of(head)
    apply_plan(model, groups, vanished(groups, "both"))
    expected = outputs(model, inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(outputs(other, inputs), expected)
        for (name, mine), theirs in zip(model.named_modules(), other.modules(), strict=True):
            assert ("forward" in vars(mine)) == ("forward" in vars(theirs)), name
            if "forward" in vars(mine):
                assert theirs.forward.args[0] is theirs
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(outputs(model, inputs), expected)
        again = outputs(other, inputs)
        assert not torch.equal(again, expected)
        reshape_tensors(other, groups, full_plan(groups))
        assert not any("forward" in vars(module) for module in other.modules())


@FAMILIES
def test_folders_and_state_dicts(family, head, tmp_path):
    model = build(family, head)
    inputs = inputs_of(head)
    tracker = tracker_of(model)
    plan = vanished(tracker.groups, "both")
    apply_plan(model, tracker.groups, plan)
    tracker.plan = plan
    expected = outputs(model, inputs)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert torch.equal(
        outputs(load_pruned(build(family, head), tmp_path / "a.pt"), inputs), expected
    )
    tracker.close()
    model.save_pretrained(tmp_path / "folder")
    again = from_pretrained(type(model), tmp_path / "folder")
    assert torch.equal(outputs(again, inputs), expected)
    assert present_plan(again, groups_of(again)) == plan


def test_no_config_field_says_nothing_is_left(tmp_path):
    model = build()
    groups = groups_of(model)
    sizes = {group.name: group.size for group in groups}
    gone = {group.name: () for group in groups if group.kind in ("ffn", "heads")}
    apply_plan(model, groups, PruningPlan(sizes, {**full_plan(groups).kept, **gone}))
    config = model.config
    assert (config.intermediate_size, config.num_attention_heads) == (40, 4)
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path)
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))


@FAMILIES
def test_in_mixed_precision(family, head):
    model = build(family, head)
    groups, inputs = groups_of(model), inputs_of(head)
    apply_plan(model, groups, vanished(groups, "both"))
    expected = outputs(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(outputs(model, inputs).float(), expected, atol=0.5)


def empty_pooler(model):
    return {"pooler": ()}


def own_forward(model):
    module = model.bert.encoder.layer[0].attention.self
    module.forward = partial(type(module).forward, module)
    return {"bert.encoder.layer.0.heads": ()}


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (empty_pooler, r"none of 24 units of group 'pooler', which cannot be empty"),
        (own_forward, r"'bert.encoder.layer.0.attention.self' has a forward of its own"),
    ],
)
def test_what_cannot_be_empty_is_refused_whole(sabotage, message):
    model = build()
    groups = groups_of(model)
    kept = {**random_plan(groups).kept, **sabotage(model)}
    before = copy.deepcopy(model.state_dict())
    values = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    plan = PruningPlan({group.name: group.size for group in groups}, kept)
    for change in (apply_plan, reshape_tensors, partial(restore_plan, values=values)):
        with pytest.raises(PruningError, match=message) as refusal:
            change(model, groups, plan)
        assert "expected" in str(refusal.value)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not hasattr(model.config, "pruning_plan")


def test_decoders_keep_a_head():
    """Their caches count the positions by the heads; neurons may all go."""
    groups = groups_of(BertModel(CONFIGS["bert"](is_decoder=True)))
    assert {g.kind for g in groups if g.may_be_empty} == {"ffn"}
    assert not any(group.empty_forward for group in groups)


def test_any_linear_group_may_be_allowed_to_be_empty():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
    with pytest.raises(PruningError, match="cannot be empty"):
        apply_plan(net, [group], PruningPlan({"hidden": 4}, {"hidden": ()}))
    assert EmptyForward("a", ("a.b",)).prefixed(str.upper) == EmptyForward("A", ("A.B",))


def test_mpnet_takes_the_biases_of_its_own_heads():
    model = build("mpnet")
    groups = groups_of(model)
    name = "mpnet.encoder.layer.0.heads"
    plan = full_plan(groups).then(PruningPlan({name: 4}, {name: (1, 3)}))
    masked = masked_copy(model, groups, plan)
    apply_plan(model, groups, plan)
    assert model.mpnet.encoder.layer[0].attention.attn.kept_units.tolist() == [1, 3]
    assert not hasattr(model.mpnet.encoder.layer[1].attention.attn, "kept_units")
    assert not any("kept_units" in key for key in model.state_dict())
    assert torch.allclose(outputs(model, batch()), outputs(masked, batch()), atol=1e-5)
    seen = model(**batch(), output_attentions=True)
    theirs = masked(**batch(), output_attentions=True)
    assert torch.allclose(seen.attentions[0], theirs.attentions[0][:, [1, 3]], atol=1e-5)
    later = PruningPlan({name: 4}, {name: (3,)})
    apply_plan(model, groups, later, current=plan)
    assert model.mpnet.encoder.layer[0].attention.attn.kept_units.tolist() == [3]
    assert model.double().mpnet.encoder.layer[0].attention.attn.kept_units.dtype == torch.long
    # The table stays as it was built, for the other layers.
    assert model.mpnet.encoder.relative_attention_bias.weight.shape[1] == 4
    assert model.config.num_attention_heads == 4


def test_attentions_and_checkpointed_layers():
    model = build("bert", attn_implementation="eager")
    groups = groups_of(model)
    apply_plan(model, groups, vanished(groups, "both"))
    seen = model(**batch(), output_attentions=True, output_hidden_states=True)
    assert len(seen.hidden_states) == 3
    assert seen.attentions[-1].shape[1] == 2
    model.train().activation_checkpointing_enable()
    model(**batch(), labels=torch.zeros(32, dtype=torch.long)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@FAMILIES
def test_networks_at_any_depth(family, head):
    model, inputs = build(family, head), inputs_of(head)
    root = nn.ModuleDict({"nets": nn.ModuleList([model, build(family, head, seed=1)])})
    groups = groups_of(root)
    plan = vanished(groups, "both")
    masked = masked_copy(root, groups, plan)
    apply_plan(root, groups, plan)
    for mine, theirs in zip(root["nets"], masked["nets"], strict=True):
        assert torch.allclose(outputs(mine, inputs), outputs(theirs, inputs), atol=1e-5)
    root["nets"][1].load_state_dict(root["nets"][1].state_dict())
    reshape_tensors(root, groups, full_plan(groups))
    assert not any("forward" in vars(module) for module in root.modules())
