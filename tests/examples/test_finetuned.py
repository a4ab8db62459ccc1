"""Dense models, whole and small, fine-tuned on a tiny task; the small one as a rival."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from examples.benchmark import finetuned, recovery
from examples.benchmark.finetuned import Recipe, dense_record, folder_of, settings
from examples.benchmark.records import load
from examples.benchmark.rivals import RIVALS
from examples.benchmark.rivals.small import small_dense
from examples.text_classification import model as classifier
from examples.text_classification import packaged
from tests.models import randomize

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")

LAYERS = 3


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, model: str) -> str:
    """A tiny encoder with three layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    shape = {"num_hidden_layers": LAYERS, "hidden_size": 24, "intermediate_size": 40}
    torch.manual_seed(0)
    network = BertForSequenceClassification(
        BertConfig(**shape, num_attention_heads=4, vocab_size=305)
    )
    randomize(network)
    network.bert.save_pretrained(folder)  # its head is nobody's
    BertTokenizer.from_pretrained(model).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(tmp_path: Path, pretrained: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task with that encoder, in a folder of its own."""
    texts = [f"w{i % 7} w{i} w{i % 5}" for i in range(200)]
    labels = ["ab"[i % 2] for i in range(200)]
    monkeypatch.setitem(packaged.PACKAGED, "tiny", lambda: {"train": (texts, labels)})
    recipe = Recipe(1e-3, epochs=2, validation_fraction=0.3, test_fraction=0.2, batch_size=16)
    monkeypatch.setitem(finetuned.RECIPES, "tiny", recipe)
    for module in (classifier, packaged):
        monkeypatch.setattr(module, "model_path", lambda name: pretrained)
    monkeypatch.setattr(finetuned, "FOLDER", tmp_path / "dense")
    monkeypatch.setattr(recovery, "FOLDER", tmp_path)
    monkeypatch.setattr(recovery, "RESULTS", tmp_path / "recovery.json")
    return "tiny"


def test_settings_of_whole_models_stay_as_they_are_on_disk() -> None:
    """Folders of earlier runs hold these; whatever differs is trained again, for hours."""
    same = {"batch_size": 32, "max_length": 64, "group_by_length": True, "model": "minilm-l6"}
    rows = {"validation_fraction": 0.2, "test_fraction": 0.2}
    trec = {"task": "trec-6", "seed": 3, "learning_rate": 1e-4, "epochs": 4}
    assert settings("trec-6", 3) == trec | rows | same
    tweets = {"task": "tweets-3", "seed": 0, "learning_rate": 5e-5, "epochs": 2, "limit": 15_000}
    assert settings("tweets-3", 0) == tweets | rows | {"validation_fraction": 0.15} | same
    assert settings("trec-6", 3, 2) == trec | rows | same | {"layers": 2}
    assert folder_of("trec-6", 3).name == "trec-6-3"
    assert folder_of("trec-6", 3, 2).name == "trec-6-3-2-layers"


def test_a_small_model_begins_as_the_bottom_of_the_whole_one(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate of zero both end as they began: pretrained layers, and one head."""
    recipe = Recipe(0.0, epochs=1, validation_fraction=0.3, test_fraction=0.2, batch_size=16)
    monkeypatch.setitem(finetuned.RECIPES, "tiny", recipe)
    whole, data = finetuned.finetuned(tiny, 1)
    small, other = finetuned.finetuned(tiny, 1, 2)
    assert small.config.num_hidden_layers == len(small.bert.encoder.layer) == 2
    known = whole.state_dict()
    assert [name for name in known if name not in small.state_dict()] == [
        name for name in known if f"layer.{LAYERS - 1}." in name
    ]
    for name, value in small.state_dict().items():
        assert torch.equal(value, known[name]), name
    one, two = next(iter(data.train_dataloader())), next(iter(other.train_dataloader()))
    assert torch.equal(one["input_ids"], two["input_ids"])


def test_every_size_is_trained_once(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finetuned.finetuned(tiny, 0)
    record = dense_record(tiny, 0)
    assert min(record["seconds"], record["cpu_seconds"]) > 0
    path = folder_of(tiny, 0) / finetuned.RECORD
    old = {name: value for name, value in record.items() if name != "cpu_seconds"}
    path.write_text(json.dumps(old))  # as records were before seconds of the processor
    small, _ = finetuned.finetuned(tiny, 0, 1)
    monkeypatch.setattr(finetuned, "train", None)
    finetuned.finetuned(tiny, 0)
    again, _ = finetuned.finetuned(tiny, 0, 1)
    assert dense_record(tiny, 0, 1)["settings"] == settings(tiny, 0) | {"layers": 1}
    for name, value in small.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_the_rival_pays_for_its_own_training(tiny: str) -> None:
    ask = ["--tasks", tiny, "--seeds", "0", "--sparsities", "0.5", "0.9", "--steps", "0", "3"]
    recovery.main([*ask, "--methods", "small-dense", "first-layers"])
    records = {(r["method"], r["target_sparsity"], r["steps"]): r for r in load(recovery.RESULTS)}
    assert len(records) == 2 + 2 * 2 * 2
    for sparsity, layers in ((0.5, 2), (0.9, 1)):
        record, trained = (records["small-dense", sparsity, steps] for steps in (0, 3))
        known = dense_record(tiny, 0, layers)
        assert record["kept"] == {"heads": [4] * layers, "ffn": [40] * layers}
        assert record["parameters"] == records["first-layers", sparsity, 0]["parameters"]
        assert not record["masked"]
        # One shot is the model as it was fine-tuned, and so much of the time is that of others.
        assert record["accuracy"] == pytest.approx(known["test_accuracy"])
        assert record["cross_entropy"] != trained["cross_entropy"]
        for found in (record, trained):
            assert found["seconds"] == known["seconds"] + found["train_seconds"]
            assert found["cpu_seconds"] >= known["cpu_seconds"]


def test_the_rival_has_as_many_layers_as_stay_in_others(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    module = "examples.benchmark.rivals.small"
    monkeypatch.setattr(f"{module}.finetuned", lambda *about: asked.append(about) or (None, None))
    known = {"seconds": 7.0, "cpu_seconds": 5.0}
    monkeypatch.setattr(f"{module}.dense_record", lambda *about: known)
    (rival,) = (rival for rival in RIVALS if rival.own is not None)
    assert rival.own is small_dense
    whole, _ = finetuned.finetuned(tiny, 0)
    for sparsity in (0.1, 0.5, 0.75):
        assert rival.own(whole, tiny, 4, sparsity)[1:] == (7.0, 5.0)
    assert asked == [(tiny, 4, layers) for layers in (3, 2, 1)]
