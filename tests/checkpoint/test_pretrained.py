"""Folders of pruned models open as transformers opens its own, or are refused in a sentence."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    ElectraConfig,
    ElectraForTokenClassification,
    RobertaModel,
)

from lightning_mi_prune import PruningError, from_pretrained
from lightning_mi_prune.checkpoint.recorded import present_plan
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.surgery.units import apply_plan
from tests.support import models
from tests.support.graphs import graph_of, groups_of
from tests.support.models import CONFIGS, batch, build, inputs_of, outputs, pictures, random_plan
from tests.support.packages import hide

ENCODERS = [*CONFIGS, *models.PICTURES]
WITHOUT = [family for family in ENCODERS if family not in ("distilbert", "electra", "deberta-v2")]
NAME = "model.safetensors"
PLAN = '{{"version": 1, "sizes": {{"a": 2}}, "kept": {{"a": [{}]}}}}'


def pruned(model=None, **options):
    model = build() if model is None else model
    groups = groups_of(model)
    apply_plan(model, groups, random_plan(groups, **options))
    return model


def emptied(model):
    """The first layer has no heads, the last no neurons, the others half of each."""
    groups = groups_of(model)
    plan = random_plan(groups)
    first = next(group for group in groups if group.kind == "heads")
    last = [group for group in groups if group.kind == "ffn"][-1]
    apply_plan(model, groups, PruningPlan(plan.sizes, {**plan.kept, first.name: (), last.name: ()}))
    return model


def encoder(family, **options):
    torch.manual_seed(1)
    config = build(family, "image" if family in models.PICTURES else "sequence").config
    model = AutoModel.from_config(config)
    if options:
        model = type(model)(config, **options)
    models.randomize(model)
    return model.eval()


@torch.no_grad()
def states(model):
    inputs = pictures() if hasattr(model.config, "image_size") else batch()
    return model.eval()(**inputs).last_hidden_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    pruned().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    pruned().save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("model-*.safetensors"))) > 1
    return path


@pytest.fixture
def damaged(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "damaged")


def edit(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change(folder, change_weights):
    weights = load_file(folder / NAME)
    change_weights(weights)
    save_file(weights, folder / NAME, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "head", "cut"),
    [(f, h, "all kinds") for f, h in models.EVERY if f == "bert" or h not in ("token", "question")]
    + [(f, h, "emptied") for f, h in models.EVERY if h in ("sequence", "image")],
)
def test_every_family_opens_in_every_way(family, head, cut, tmp_path):
    model = build(family, head)
    model = emptied(model) if cut == "emptied" else pruned(model, residual=True, dims=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    auto = models.HEADS.get(head, models.AutoModelForSequenceClassification)
    cls = type(model) if head == "image" else auto
    before = outputs(model, inputs_of(head))
    for options in ({"dtype": "auto", "device_map": "cpu"}, {"attn_implementation": "eager"}):
        again, found = from_pretrained(cls, tmp_path, output_loading_info=True, **options)
        assert not any(found.values())
        assert type(again) is type(model)
        assert not again.training
        assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
        after = outputs(again, inputs_of(head))
        assert torch.allclose(after, before, atol=1e-6)
        assert present_plan(again, groups_of(again)) == present_plan(model, groups_of(model))
        assert again.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(outputs(copy.deepcopy(again), inputs_of(head)), after)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", ENCODERS)
def test_empty_groups_move_and_get_all_units_back(family, tmp_path):
    head = "image" if family in models.PICTURES else "sequence"
    model, whole, inputs = (
        emptied(build(family, head)),
        build(family, head, seed=3),
        inputs_of(head),
    )
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path)
    assert torch.allclose(outputs(again.double().float(), inputs), outputs(model, inputs))
    other = copy.deepcopy(again)
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(outputs(other.double().float(), inputs), outputs(model, inputs))
    assert not PlanTracker.of(again).plan.is_full
    again.load_state_dict(whole.state_dict())
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert torch.equal(outputs(again, inputs), outputs(whole, inputs))


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_opens_without_a_head_and_with_a_new_one(family, tmp_path):
    model = pruned(encoder(family), residual=True, dims=True)
    model.save_pretrained(tmp_path)
    again, found = from_pretrained(AutoModel, tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert torch.allclose(states(again), states(model), atol=1e-6)
    heads = AutoModelForSequenceClassification
    if family in models.PICTURES:
        heads = type(build(family, "image"))
    tuned, found = from_pretrained(heads, tmp_path, num_labels=7, output_loading_info=True)
    base = tuned.base_model_prefix
    assert found["missing_keys"]
    assert not any(name.startswith(f"{base}.") for name in found["missing_keys"])
    inside = getattr(tuned, base)
    assert torch.allclose(states(inside), states(model), atol=1e-6)
    with torch.no_grad():
        inputs = pictures() if family in models.PICTURES else batch()
        assert tuned(**inputs).logits.shape[-1] == 7
    tuned.save_pretrained(tmp_path / "tuned")
    once_more = from_pretrained(heads, tmp_path / "tuned")
    assert torch.equal(outputs(once_more, inputs), outputs(tuned, inputs))


@pytest.mark.parametrize("family", WITHOUT)
@pytest.mark.parametrize("residual", [False, True])
def test_an_encoder_without_pooler_opens_with_and_without(family, residual, tmp_path):
    if residual:  # cut where something reads the hidden states, as in a module of the user
        whole = pruned(
            build(family, "image" if family in models.PICTURES else "token"), residual=True
        )
        model = getattr(whole, whole.base_model_prefix)
    else:
        model = pruned(encoder(family, add_pooling_layer=False))
    model.save_pretrained(tmp_path)
    for options in ({}, {"add_pooling_layer": False}):
        again, found = from_pretrained(type(model), tmp_path, output_loading_info=True, **options)
        assert all("pooler" in name for name in found["missing_keys"])
        assert bool(found["missing_keys"]) is not bool(options)
        assert torch.allclose(states(again), states(model), atol=1e-6)
        assert all(p.isfinite().all() for p in again.parameters())
        again.save_pretrained(tmp_path / "again")  # its config is one of a cut model again
        once_more = from_pretrained(type(model), tmp_path / "again", **options)
        assert torch.allclose(states(once_more), states(model), atol=1e-6)


def test_the_encoder_of_a_folder_with_a_head(folder):
    whole = from_pretrained(BertForSequenceClassification, folder)
    with pytest.raises(PruningError, match=r"ignore_mismatched_sizes=True"):
        from_pretrained(AutoModelForTokenClassification, folder)
    for cls in (AutoModelForTokenClassification, AutoModelForMaskedLM):
        again = from_pretrained(cls, folder, ignore_mismatched_sizes=True)
        assert torch.equal(states(again.bert), states(whole.bert))
    with pytest.raises(PruningError, match=r"'pooler.dense.bias' has shape \(12,\)"):
        from_pretrained(BertModel, folder)  # its units were cut with the classifier
    for cls, options in (
        (BertModel, {"add_pooling_layer": False}),
        (AutoModel, {"ignore_mismatched_sizes": True}),
    ):
        assert torch.equal(states(from_pretrained(cls, folder, **options)), states(whole.bert))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_a_folder_with_a_cut_hidden_size_opens_without_its_head_and_with_another(family, tmp_path):
    whole = pruned(build(family), residual=True)
    whole.save_pretrained(tmp_path)
    inside = getattr(whole, whole.base_model_prefix)
    # Outputs of an encoder as wide as its states: a call of it alone would not cut them.
    again = from_pretrained(AutoModel, tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(states(again), states(inside))
    tuned = from_pretrained(AutoModelForMaskedLM, tmp_path)
    assert torch.equal(states(getattr(tuned, tuned.base_model_prefix)), states(inside))
    for model in (again, tuned):
        model.save_pretrained(tmp_path / "again")
        once_more = from_pretrained(type(model), tmp_path / "again")
        assert torch.equal(once_more(**batch())[0], model.eval()(**batch())[0])


def test_other_labels_are_a_new_head_if_the_user_asks_for_it(folder):
    with pytest.raises(PruningError, match=r"'classifier.bias' has shape \(3,\).*expected \(7,\)"):
        from_pretrained(BertForSequenceClassification, folder, num_labels=7)
    again, found = from_pretrained(
        BertForSequenceClassification,
        folder,
        num_labels=7,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    assert {name for name, *_ in found["mismatched_keys"]} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert tuple(again.classifier.weight.shape) == (7, 12)
    assert again.classifier.weight.std() < 0.1  # as transformers makes new ones
    assert torch.equal(
        states(again.bert), states(from_pretrained(BertForSequenceClassification, folder).bert)
    )


def test_precision_is_that_of_the_folder_or_the_requested_one(tmp_path):
    pruned().to(torch.bfloat16).save_pretrained(tmp_path)
    for options, dtype in (
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": torch.float64}, torch.float64),
    ):
        again = from_pretrained(AutoModelForSequenceClassification, tmp_path, **options)
        assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize("devices", ["auto", {"": "cpu"}, torch.device("cpu"), {"": "cpu", "b": 0}])
def test_devices(devices, folder):
    if isinstance(devices, dict) and len(devices) > 1:
        devices = {"bert": "cpu", "dropout": "cpu", "classifier": "cpu"}
    again = from_pretrained(BertForSequenceClassification, folder, device_map=devices)
    assert torch.equal(outputs(again, batch()), outputs(pruned(), batch()))


def test_a_layer_on_disk(tmp_path):
    model = pruned(build("mpnet"))
    model.save_pretrained(tmp_path / "saved")
    devices = {name: "cpu" for name, _ in model.named_children()}
    devices |= {"classifier": "disk"}
    again = from_pretrained(
        type(model), tmp_path / "saved", device_map=devices, offload_folder=tmp_path / "disk"
    )
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))


def test_a_cache_of_the_hub_a_revision_and_a_subfolder(folder, shards, tmp_path):
    repository = tmp_path / "models--some--name"
    for revision, source in (("main", folder), ("v2", shards)):
        commit = f"{len(revision)}" * 40
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(source, repository / "snapshots" / commit / "inner")
    for options in ({}, {"revision": "v2"}, {"token": "none"}):
        again = from_pretrained(
            AutoModelForSequenceClassification,
            "some/name",
            cache_dir=tmp_path,
            subfolder="inner",
            local_files_only=True,
            **options,
        )
        assert torch.equal(outputs(again, batch()), outputs(pruned(), batch()))
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        from_pretrained(
            AutoModelForSequenceClassification, "some/name", cache_dir=tmp_path, revision="v3"
        )


def test_a_config_that_is_given_stays_as_it_is(folder):
    config = AutoConfig.from_pretrained(folder, output_hidden_states=True)
    before = copy.deepcopy(config.to_dict())
    for cls in (BertForSequenceClassification, AutoModelForSequenceClassification):
        again = from_pretrained(cls, folder, config=config)
        assert config.to_dict() == before
        assert again.config is not config
        assert again.config.output_hidden_states
        assert torch.equal(outputs(again, batch()), outputs(pruned(), batch()))
    again = from_pretrained(BertForSequenceClassification, folder, config=str(folder))
    assert torch.equal(outputs(again, batch()), outputs(pruned(), batch()))


@pytest.mark.parametrize("cut", [False, True])
def test_a_config_with_another_plan_is_refused(cut, folder, tmp_path):
    if cut:
        config = pruned(seed=5).config
    else:
        config = build().config
        config.save_pretrained(tmp_path)
        with pytest.raises(PruningError, match="given config has no plan"):
            from_pretrained(BertForSequenceClassification, folder, config=tmp_path)
    with pytest.raises(PruningError, match=r"given config has (no|another) plan"):
        from_pretrained(BertForSequenceClassification, folder, config=config)


def test_weights_that_are_given(folder):
    config, state = AutoConfig.from_pretrained(folder), load_file(folder / NAME)
    again = from_pretrained(BertForSequenceClassification, None, config=config, state_dict=state)
    assert torch.equal(outputs(again, batch()), outputs(pruned(), batch()))


def test_options_of_the_config_and_of_the_model(folder):
    again = from_pretrained(
        AutoModelForSequenceClassification,
        folder,
        hidden_dropout_prob=0.3,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    assert again.dropout.p == 0.3
    assert again.config.id2label[2] == "c"
    with pytest.raises(TypeError, match="no_such_option"):
        from_pretrained(BertForSequenceClassification, folder, no_such_option=1)


def test_classes_of_the_user(tmp_path):
    seen, folder = [], tmp_path
    model = build()
    groups = groups_of(model)
    plan = random_plan(groups)
    apply_plan(model, groups, plan.joined(PruningPlan.full({"pooler": 24})))
    model.save_pretrained(folder)

    class Registered(BertForSequenceClassification):
        def __init_subclass__(cls, **options):
            seen.append(cls)

        def __init__(self, config, extra=0):
            super().__init__(config)
            assert type(self) is Registered
            self.extra = extra

    again = from_pretrained(Registered, folder, extra=3)
    assert type(again) is Registered
    assert again.extra == 3
    assert not seen
    again = from_pretrained(Registered, folder, 4)
    assert again.extra == 4
    gc.collect()
    assert not Registered.__subclasses__()


def test_an_opened_model_is_an_ordinary_model(folder):
    again = from_pretrained(BertForSequenceClassification, folder)
    file = io.BytesIO()
    torch.save(again, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert type(other) is BertForSequenceClassification
    assert torch.equal(outputs(other, batch()), outputs(again, batch()))
    assert again.config.architectures == ["BertForSequenceClassification"]
    assert again.name_or_path == str(folder)
    again.train()
    again(**batch(), labels=torch.zeros(32, dtype=torch.long)).loss.backward()
    assert all(p.grad is not None for p in again.parameters() if p.numel())


def test_many_threads_at_once(tmp_path):
    for name, model in (("cut", pruned(build(head="masked-lm"))), ("whole", build(seed=1))):
        model.save_pretrained(tmp_path / name)

    def opened(number):
        name = "whole" if number % 2 else "cut"
        return [from_pretrained(AutoModelForMaskedLM, tmp_path / name) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(opened, range(4)))
    before = outputs(pruned(build(head="masked-lm")), batch())
    for many in found[::2]:
        assert all(torch.equal(outputs(again, batch()), before) for again in many)
    for again in (build(head="masked-lm"), *(again for many in found for again in many)):
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_model_with_its_tracker_was_saved(tmp_path):
    model = build()
    tracker = PlanTracker(model, graph_of(model))
    plan = tracker.plan.joined(random_plan(tracker.groups))
    apply_plan(model, tracker.groups, plan)
    tracker.plan = plan
    model.save_pretrained(tmp_path)
    assert any("lightning_mi_prune.plan" in name for name in load_file(tmp_path / NAME))
    again, found = from_pretrained(type(model), tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))
    assert PlanTracker.held_by(again) is None


@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "electra"])
def test_an_untied_language_model_resized(family, tmp_path):
    model = build(family, "masked-lm", tie_word_embeddings=False)
    pruned(model)
    model.resize_token_embeddings(70, mean_resizing=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "bias" in name:
                p.add_(torch.randn_like(p))
    model.save_pretrained(tmp_path)
    # transformers leaves a bias of RoBERTa's behind, which nothing reads.
    ignores = {"ignore_mismatched_sizes": "roberta" in family}
    again, found = from_pretrained(
        AutoModelForMaskedLM, tmp_path, output_loading_info=True, **ignores
    )
    assert not found["missing_keys"]
    assert torch.allclose(outputs(again, batch()), outputs(model, batch()), atol=1e-6)
    assert again.get_output_embeddings().weight is not again.get_input_embeddings().weight


def test_a_tied_language_model_resized(tmp_path):
    model = pruned(build("bert", "masked-lm"), residual=True)
    model.resize_token_embeddings(70, mean_resizing=False)
    model.save_pretrained(tmp_path)
    again = from_pretrained(BertForMaskedLM, tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_attention_heads": 8},
            r"heads': 8.*expected.*heads': 4",
        ),
        (
            {"num_attention_heads": 2},
            r"heads': 2.*expected.*heads': 4",
        ),
        ({"num_attention_heads": 0}, r"heads': 0.*expected.*heads': 4"),
        ({"num_attention_heads": "4"}, "expected int, got str"),
        ({"hidden_size": 48}, r"hidden_size': 48}; expected .*hidden_size': 24}"),
        ({"hidden_size": 12}, r"hidden_size': 12}; expected .*hidden_size': 24}"),
        ({"hidden_size": 12, "num_attention_heads": 2}, r"hidden_size': 12, .*heads': 2}"),
        ({"intermediate_size": 80}, r"size': 80}; expected .*size': 20}"),
        ({"num_hidden_layers": 1}, r"encoder.layer.1.ffn', which .* does not have"),
        ({"model_type": "roberta"}, "type 'roberta'.*is for the type 'bert'"),
        ({"pruning_plan": 3}, "pruning_plan is 3"),
        ({"pruning_plan": "{"}, "not valid JSON"),
        ({"pruning_plan": '{"version": 1, "sizes": {"a": 2}, "kept": {"a": [5]}}'}, "unit 5"),
        (
            {"pruning_plan": '{"version": 1, "sizes": {"a": 2}, "kept": {"a": [0]}}'},
            "cuts 'a', which",
        ),
    ],
)
@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertModel])
def test_a_config_that_was_edited_is_refused(fields, message, cls, damaged):
    edit(damaged, **fields)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(PruningError, match=message):
            from_pretrained(cls, damaged, **options)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", ENCODERS)
def test_a_number_that_disagrees_never_changes_the_outputs(family, residual, tmp_path):
    """Every field that a cut writes: refused, or the same model."""
    head = "image" if family in models.PICTURES else "sequence"
    model = pruned(build(family, head), residual=residual, dims=residual)
    model.save_pretrained(tmp_path)
    before = outputs(model, inputs_of(head))
    fields = {group.config for group in groups_of(model)} - {None}
    fields |= {alias for group in groups_of(model) for alias in group.config_aliases if residual}
    original = (tmp_path / "config.json").read_text()
    for name, number in itertools.product(fields, (48, 12, 2)):
        (tmp_path / "config.json").write_text(original)
        edit(tmp_path, **{name: number})
        try:
            again = from_pretrained(type(model), tmp_path, ignore_mismatched_sizes=True)
        except (PruningError, ValueError):
            continue
        assert torch.allclose(outputs(again, inputs_of(head)), before, atol=1e-6)


def test_a_number_given_as_an_option_is_refused_as_well(folder):
    with pytest.raises(PruningError, match=r"intermediate_size': 80"):
        from_pretrained(BertForSequenceClassification, folder, intermediate_size=80)


@pytest.mark.parametrize("name", ["layer.0.output.dense.weight", "layer.1.intermediate.dense.bias"])
@pytest.mark.parametrize("kind", ["missing", "narrower", "wider", "as built", "flat"])
@pytest.mark.parametrize("ignores", [False, True])
def test_cut_tensors_must_be_there_in_their_shape(name, kind, ignores, damaged):
    full = build().state_dict()

    def spoil(weights):
        old = weights.pop(f"bert.encoder.{name}")
        narrower = {dim: size - 1 for dim, size in enumerate(old.shape)}
        if kind == "narrower":
            weights[f"bert.encoder.{name}"] = old[
                tuple(slice(n) for n in narrower.values())
            ].clone()
        if kind == "wider":
            weights[f"bert.encoder.{name}"] = torch.cat([old, old[-1:]]).clone()
        if kind == "as built":
            weights[f"bert.encoder.{name}"] = full[f"bert.encoder.{name}"].clone()
        if kind == "flat":
            weights[f"bert.encoder.{name}"] = old.flatten()[None].clone()

    change(damaged, spoil)
    message = "lacks .*which its plan cuts" if kind == "missing" else "has shape .* from its plan"
    with pytest.raises(PruningError, match=message):
        from_pretrained(BertForSequenceClassification, damaged, ignore_mismatched_sizes=ignores)


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.0.output.LayerNorm.weight",
        "bert.pooler.dense.weight",
        "classifier.weight",
    ],
)
def test_a_part_of_the_hidden_size_must_be_there_when_it_was_cut(name, tmp_path):
    pruned(residual=True).save_pretrained(tmp_path)
    change(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(PruningError, match=f"lacks .*{name}"):
        from_pretrained(BertForSequenceClassification, tmp_path)


def test_tensors_that_were_not_cut_are_left_to_transformers(damaged):
    def spoil(weights):
        weights.pop("bert.encoder.layer.0.output.LayerNorm.bias")
        weights["something.else"] = torch.zeros(2)

    change(damaged, spoil)
    _, found = from_pretrained(BertForSequenceClassification, damaged, output_loading_info=True)
    assert found["missing_keys"] == {"bert.encoder.layer.0.output.LayerNorm.bias"}
    assert found["unexpected_keys"] == {"something.else"}


@pytest.mark.parametrize("other", [RobertaModel, "roberta encoder"])
def test_the_wrong_class_is_refused(other, folder, tmp_path):
    if other is RobertaModel:
        with pytest.raises(PruningError, match=r"type 'bert'.*is for the type 'roberta'"):
            from_pretrained(RobertaModel, folder)
        return
    pruned(encoder("roberta")).save_pretrained(tmp_path)  # its tensors have the names of BERT's
    with pytest.raises(PruningError, match=r"type 'roberta'.*is for the type 'bert'"):
        from_pretrained(BertModel, tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        from_pretrained(AutoModelForImageClassification, tmp_path)


INDEX = "model.safetensors.index.json"
DAMAGE = {
    "empty": (NAME, b""),
    "garbage": (NAME, b"no weights"),
    "endless header": (NAME, b"\xff" * 64),
    "empty index": (INDEX, b""),
    "a list": (INDEX, b"[]"),
    "no map": (INDEX, b"{}"),
    "a number": (INDEX, b'{"weight_map": 3, "metadata": {}}'),
    "bytes": (INDEX, b"\xff\xfe\xfa"),
    "elsewhere": (INDEX, b'{"weight_map": {"a": "nowhere.safetensors"}, "metadata": {}}'),
    "a list of fields": ("config.json", b"[]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused(kind, folder, shards, tmp_path):
    name, content = DAMAGE[kind]
    path = shutil.copytree(shards if name == INDEX else folder, tmp_path / "damaged")
    (path / name).write_bytes(content)
    for cls in (BertForSequenceClassification, AutoModelForSequenceClassification):
        with pytest.raises(PruningError, match="Copy or save the folder again"):
            from_pretrained(cls, path)


def test_files_that_are_truncated_or_missing(folder, shards, tmp_path):
    for number, size in enumerate((0, 1, 7, 100, -100, -1)):
        path = shutil.copytree(folder, tmp_path / str(number))
        (path / NAME).write_bytes((folder / NAME).read_bytes()[:size])
        with pytest.raises(PruningError, match="Copy or save the folder again"):
            from_pretrained(BertForSequenceClassification, path)
    for change_file in ("unlink", "truncate"):
        path = shutil.copytree(shards, tmp_path / change_file)
        shard = sorted(path.glob("model-*"))[-1]
        shard.unlink()
        if change_file == "truncate":
            shard.write_bytes(b"")
        with pytest.raises(PruningError, match="Copy or save the folder again"):
            from_pretrained(BertForSequenceClassification, path)
    path = shutil.copytree(folder, tmp_path / "none")
    (path / NAME).unlink()
    with pytest.raises(
        OSError, match=r"no file named model.safetensors"
    ):  # the error of transformers
        from_pretrained(BertForSequenceClassification, path)
    for content in (b"", b"hello", "half", "list"):
        if isinstance(content, bytes):
            (path / "pytorch_model.bin").write_bytes(content)
        else:
            torch.save(
                [1] if content == "list" else load_file(folder / NAME), path / "pytorch_model.bin"
            )
            if content == "half":
                (path / "pytorch_model.bin").write_bytes(
                    (path / "pytorch_model.bin").read_bytes()[:999]
                )
        with pytest.raises(PruningError, match="Copy or save the folder again"):
            from_pretrained(BertForSequenceClassification, path)
    torch.save(load_file(folder / NAME), path / "pytorch_model.bin")
    again = from_pretrained(BertForSequenceClassification, path)
    assert torch.equal(outputs(again, batch()), outputs(pruned(), batch()))
    with pytest.raises(OSError, match="nowhere"):
        from_pretrained(BertForSequenceClassification, tmp_path / "nowhere")


@pytest.mark.parametrize("width", [12, 16])
def test_a_hidden_size_that_equals_that_of_the_embeddings_by_chance(width, tmp_path):
    """The config alone would build an encoder without the projection between the two."""
    config = CONFIGS["electra"]().to_dict() | {"embedding_size": width}
    model = ElectraForTokenClassification(ElectraConfig(**config))
    model = pruned(model, share=width / 24, residual=True)
    assert model.electra.embeddings_project.out_features == width
    model.save_pretrained(tmp_path)
    again = from_pretrained(ElectraForTokenClassification, tmp_path)
    assert torch.allclose(outputs(again, batch()), outputs(model, batch()), atol=1e-6)


def test_errors_of_a_model_pass_through(folder):
    class Broken(BertForSequenceClassification):
        def __init__(self, config):
            raise ValueError("own error")

    with pytest.raises(ValueError, match=r"^own error$"):
        from_pretrained(Broken, folder)


def test_an_uncut_folder_opens_without_a_plan(tmp_path):
    build().save_pretrained(tmp_path)
    assert BertConfig.from_pretrained(tmp_path)
    again = from_pretrained(AutoModelForSequenceClassification, tmp_path, dtype="auto")
    assert torch.equal(outputs(again, batch()), outputs(build(), batch()))
    assert isinstance(again, nn.Module)


def test_without_transformers_the_error_names_the_extra(folder, monkeypatch):
    hide(monkeypatch, "transformers")
    with pytest.raises(PruningError, match=r"pip install 'lightning-mi-prune\[transformers\]'"):
        from_pretrained(BertModel, folder)
