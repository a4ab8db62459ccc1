"""Objects of the user stay as they are, and weights that were not cut load as in any module."""

from __future__ import annotations

import copy
import io

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lightning_mi_prune import MutualInformationPruning, load_pruned, prune
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.checkpoint.validation import is_plan
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.surgery.layers import remove_layers
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.boring import Classifier, Data, trainer
from tests.support.graphs import groups_of, stacks_of, tracker_of
from tests.support.models import CONFIGS, PICTURES, batch, build, inputs_of, outputs, random_plan
from tests.support.pruning import pruning_units

FAMILIES = [(f, "sequence") for f in CONFIGS] + [(f, "image") for f in PICTURES]


def cut(model, share=0.5, kinds=("ffn", "heads", "pooler")):
    """Prune a module by a random plan, as a run would leave it."""
    tracker = tracker_of(model)
    plan = random_plan(tracker.groups, share)
    plan = plan.only(group.name for group in tracker.groups if group.kind in kinds)
    apply_plan(model, tracker.groups, tracker.plan.then(plan))
    tracker.plan = tracker.plan.then(plan)
    return tracker


# Configs


@pytest.mark.parametrize(("family", "head"), FAMILIES)
@pytest.mark.parametrize("residual", [False, True])
def test_a_config_of_the_user_stays_and_builds_dense_models(family, head, residual):
    made = build(family, head)
    mine = made.config
    before = copy.deepcopy(mine.to_dict())
    model = type(made)(mine)
    groups = groups_of(model)
    apply_plan(model, groups, random_plan(groups, residual=residual))
    assert mine.to_dict() == before
    assert model.config is not mine
    assert type(made)(mine).num_parameters() == made.num_parameters() > model.num_parameters()
    inner = getattr(model, model.base_model_prefix)
    assert inner.config is model.config  # what was shared inside stays shared


def test_a_config_of_the_user_stays_when_layers_go():
    mine = CONFIGS["bert"]()
    model = BertModel(mine)
    remove_layers(
        model, stacks_of(model), PruningPlan({"encoder.layer": 2}, {"encoder.layer": (1,)})
    )
    assert (mine.num_hidden_layers, model.config.num_hidden_layers) == (2, 1)


def test_two_towers_of_one_config_are_cut_each_by_itself():
    config = CONFIGS["bert"]()
    towers = nn.ModuleDict({"query": BertModel(config), "document": BertModel(config)})
    groups = [group for group in groups_of(towers) if group.network == "query"]
    apply_plan(towers, groups, random_plan(groups))
    assert towers["document"].config is config
    assert not hasattr(config, "pruning_plan")
    assert towers["query"].config.intermediate_size == 20


def test_a_refused_cut_leaves_no_record():
    model = build()
    groups = groups_of(model)
    names = {group.name: group.size for group in groups}
    with pytest.raises(PruningError):
        apply_plan(model, groups, PruningPlan(names, {**full_plan(groups).kept, "pooler": ()}))
    assert not hasattr(model.config, "pruning_plan")


def test_options_and_batches_of_the_user_stay():
    units, pins = ["ffn"], {"layer.0.ffn": 0.5}
    callback = pruning_units(0.3, kinds=units, pins=pins, verbose=False)
    rows = [batch(64, seed=seed) for seed in range(4)]
    kept = copy.deepcopy(rows)
    trainer(callback, max_epochs=2).fit(Classifier(), Data())
    prune(build(), rows, 0.3, loss=taking_labels, kinds=units)
    assert (units, pins) == (["ffn"], {"layer.0.ffn": 0.5})
    for mine, before in zip(rows, kept, strict=True):
        assert mine.keys() == before.keys()
        assert all(torch.equal(mine[key], before[key]) for key in before)


def taking_labels(model, inputs):
    """Steps take entries out of their batch."""
    mask = inputs.pop("attention_mask")
    return model(inputs.pop("input_ids"), mask).logits.square().mean()


# Weights


def widened(model):
    model.classifier, model.num_labels = nn.Linear(24, 5), 5


def resized(model):
    model.resize_token_embeddings(70, mean_resizing=False)


def normalised(model):
    nn.utils.parametrizations.weight_norm(model.classifier)


def normalised_where_cut(model):
    nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].intermediate.dense)


def replaced(model):
    model.classifier = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 2))


def without_pooler(model):
    model.bert.pooler = None


def quantized(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
@pytest.mark.parametrize(
    "change",
    [
        widened,
        resized,
        normalised,
        normalised_where_cut,
        replaced,
        without_pooler,
        quantized,
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_pruned_module_loads_its_own_weights_whatever_else_was_changed(change, wrapped):
    model = build()
    root = nn.ModuleDict({"net": model}) if wrapped else model
    tracker = cut(root)
    plan = tracker.plan
    change(model)
    state = copy.deepcopy(root.state_dict())
    assert str(root.load_state_dict(state)) == "<All keys matched successfully>"
    assert tracker.plan == plan
    again = copy.deepcopy(root)
    again.load_state_dict(state)


@pytest.mark.parametrize("change", [widened, resized, replaced])
def test_a_changed_module_still_grows_and_shrinks(change):
    dense, small = build(), build()
    change(dense)
    change(small)
    full, before = copy.deepcopy(dense.state_dict()), outputs(dense, batch())
    cut(small)
    half, after = copy.deepcopy(small.state_dict()), outputs(small, batch())
    small.load_state_dict(full)
    assert torch.equal(outputs(small, batch()), before)
    small.load_state_dict(half)
    assert torch.equal(outputs(small, batch()), after)


def test_a_resized_model_is_rolled_back_and_pruned_again():
    model = build()
    cut(model, 0.75)
    resized(model)
    small = [batch(64, seed=seed) for seed in range(4)]
    done = prune(model, small, 0.6, loss=lambda net, x: net(**x).logits.square().mean())
    assert model.get_input_embeddings().weight.shape == (70, 24)
    assert done.sparsity >= 0.6


def extra(state):
    state["net.strange"] = torch.zeros(1)


def lacking(state):
    del state["net.bert.embeddings.LayerNorm.weight"]


def other(state):
    state["net.bert.embeddings.LayerNorm.weight"] = torch.zeros(9)


def deeper(state):
    state |= {k.replace("layer.1.", "layer.2."): v for k, v in state.items() if "layer.1." in k}


@pytest.mark.parametrize("change", [extra, lacking, other, deeper])
@pytest.mark.parametrize("present", [1.0, 0.75])
def test_a_refused_load_changes_nothing(change, present):
    source = nn.ModuleDict({"net": build(seed=1)})
    cut(source, 0.5)
    state = source.state_dict()
    change(state)
    target = nn.ModuleDict({"net": build()})
    tracker = cut(target, present)
    before, plan = copy.deepcopy(target.state_dict()), tracker.plan
    parameters = list(target.parameters())
    with pytest.raises(RuntimeError, match=r"do not fit|made for another|holds weights of layers"):
        target.load_state_dict(state)
    assert [id(p) for p in target.parameters()] == [id(p) for p in parameters]
    after = target.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert tracker.plan == plan
    if change in (extra, lacking):  # torch would let it pass, so do we
        target.load_state_dict(state, strict=False)
        assert tracker.plan.kept == tracker_of(source).plan.kept


def test_contradicting_plans_are_refused_and_equal_ones_pass():
    root = nn.ModuleDict({"net": build()})
    tracker = cut(root)
    state = root.state_dict()
    groups = tracker.groups
    text = tracker.plan.under("net").to_json()
    state["net.lightning_mi_prune.plan (again)"] = entry(text)
    fresh = nn.ModuleDict({"net": build()})
    mine = tracker_of(fresh)
    fresh.load_state_dict(state)
    assert mine.plan == tracker.plan
    contrary = random_plan(groups, 0.75).under("net").to_json()
    state["net.lightning_mi_prune.plan (again)"] = entry(contrary)
    with pytest.raises(PruningError, match="two plans that differ in group"):
        fresh.load_state_dict(state)
    assert mine.plan == tracker.plan


def entry(text):
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


# Networks that leave their module, or come into it


def stripped(state, prefix):
    return {k.removeprefix(prefix): v for k, v in state.items()}


def filtered(state, prefix):
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


@pytest.mark.parametrize("way", ["own", stripped, filtered])
@pytest.mark.parametrize(("family", "head"), [("bert", "sequence"), ("mpnet", "token")])
def test_a_network_taken_out_of_its_module_opens(tmp_path, way, family, head):
    module = nn.ModuleDict({"net": build(family, head), "head": nn.Linear(3, 3)})
    cut(module)
    state = module["net"].state_dict() if way == "own" else way(module.state_dict(), "net.")
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "net.pt")
    again = load_pruned(build(family, head, seed=1), tmp_path / "net.pt")
    assert torch.equal(outputs(again, inputs_of(head)), outputs(module["net"], inputs_of(head)))


@pytest.mark.parametrize("way", ["own", stripped, filtered])
def test_an_encoder_taken_out_of_its_network_opens(tmp_path, way):
    module = nn.ModuleDict({"net": build()})
    cut(module, kinds=("ffn", "heads"))
    encoder, prefix = module["net"].bert, "net.bert."
    state = encoder.state_dict() if way == "own" else way(module.state_dict(), prefix)
    mine = {k for k in encoder.state_dict() if not is_plan(k)}
    torch.save({k: v for k, v in state.items() if k in mine or is_plan(k)}, tmp_path / "a.pt")
    plain = BertModel(CONFIGS["bert"]())
    again = load_pruned(plain, tmp_path / "a.pt").eval()
    ids = batch()
    with torch.no_grad():
        got, want = (net(**ids).last_hidden_state for net in (again, encoder))
    assert torch.equal(got, want)


def test_a_copy_of_a_network_knows_its_plan_and_drags_nothing_along():
    module = Classifier()
    run = trainer(MutualInformationPruning(0.5, verbose=False), max_epochs=2)
    run.fit(module)
    alone = copy.deepcopy(module.model)
    file = io.BytesIO()
    torch.save(alone, file)
    assert len(file.getvalue()) < 400_000  # not the module, nor its trainer
    fresh = build()
    tracker_of(fresh)
    fresh.load_state_dict(alone.state_dict())
    assert torch.equal(outputs(fresh, batch()), outputs(alone, batch()))


def test_weights_loaded_into_a_network_are_known_to_its_module():
    module, source = nn.ModuleDict({"net": build()}), build(seed=1)
    tracker = tracker_of(module)
    _ = tracker.plan
    inner = cut(source)
    module["net"].load_state_dict(source.state_dict())
    assert tracker.plan == inner.plan.prefixed("net")
    fresh = nn.ModuleDict({"net": build()})
    tracker_of(fresh)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(outputs(fresh["net"], batch()), outputs(source, batch()))


def test_an_encoder_does_not_change_its_shape_behind_its_network():
    module = build()
    dense = copy.deepcopy(module.bert.state_dict())
    cut(module)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(PruningError, match="part of a BertForSequenceClassification"):
        module.bert.load_state_dict(dense)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


class Two(pl.LightningModule):
    """A module whose network can be replaced, beside one that stays."""

    def __init__(self):
        super().__init__()
        self.query, self.document = build(), build(seed=1)

    def training_step(self, batch, index):
        logits = self.query(**batch).loss + self.document(**batch).loss
        self.log("loss", logits)
        return logits

    def validation_step(self, batch, index):
        self.log("val_loss", self.query(**batch).loss + self.document(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def test_a_network_in_the_place_of_another_is_found_anew():
    module = Two()
    trainer(MutualInformationPruning(0.5, verbose=False), max_epochs=2).fit(module, Data())
    kept = tracker_of(module).plan.under("document")
    small = build().config.to_dict() | {"intermediate_size": 56}
    small.pop("num_labels", None)
    wider = BertForSequenceClassification(BertConfig(**small, num_labels=3))
    module.query = wider
    report = MutualInformationPruning(0.6, verbose=False)
    trainer(report, max_epochs=2).fit(module, Data())
    sizes = report.plan.sizes
    assert sizes["query.bert.encoder.layer.0.ffn"] == 56
    assert sizes["document.bert.encoder.layer.0.ffn"] == 40
    later = report.plan.under("document")
    assert all(set(later.kept[name]) <= set(kept.kept[name]) for name in kept.kept)


def test_latest_weights_of_a_closed_tracker_have_no_plan():
    module = nn.ModuleDict({"net": build()})
    tracker = cut(module)
    tracker.close()
    for part in module.modules():
        assert PlanTracker.held_by(part) is None
        assert not part._state_dict_hooks
        assert not part._load_state_dict_pre_hooks
