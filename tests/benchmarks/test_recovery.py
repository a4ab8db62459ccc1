"""Equal budgets for every method, on a tiny random model; distillation."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from benchmarks import recovery, tasks
from benchmarks.methods import OURS
from benchmarks.recovery import CONTROL, ENTRIES, distance, divergence, losses, measured
from benchmarks.subjects import Subject, cut, size_of
from benchmarks.tasks import (
    Recipe,
    dense_record,
    finetuned,
    folder_of,
    settings,
    train,
    training_of,
)
from examples.text_classification import model as classifier
from examples.text_classification import packaged
from lightning_mi_prune.graph.graph import choose_groups
from tests.benchmarks.tiny import Epochs, labelled, opened, subject
from tests.support.graphs import groups_of
from tests.support.models import randomize

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def budget(steps: int = 6):
    return training_of(Epochs(), steps, first_epoch=4, learning_rate=1e-3, seed=0)


def entry_of(method: str):
    return next(entry for entry in ENTRIES if entry.method == method)


def test_a_training_goes_on_where_that_of_the_dense_model_ended() -> None:
    expected = [*labelled(range(400, 404), rows=8), *labelled(range(500, 502), rows=8)]
    for one, other in zip(budget().batches, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_training_is_repeatable_and_leaves_random_states_alone(subject: Subject) -> None:
    state, found = torch.get_rng_state(), []
    for _ in range(2):
        model = copy.deepcopy(subject.model)
        train(model, budget())
        found.append(model.state_dict())
        assert not model.training
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        torch.set_rng_state(state)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.usefixtures("opened")
def test_every_method_and_the_control_get_the_same_training(monkeypatch) -> None:
    seen = []

    def recorded(model, training, **options):
        seen.append(training)
        return train(model, training, **options)

    monkeypatch.setattr(recovery, "train", recorded)
    entries = [CONTROL, *(entry_of(n) for n in ("random", "magnitude-masks", "movement-units"))]
    for entry in entries:
        figures = measured("trec-6", 0, entry, 0.0 if entry is CONTROL else 0.5, 6)
        assert json.loads(json.dumps(figures)) == figures
        if entry is CONTROL:
            assert figures["accuracy"] == figures["dense_accuracy"]
            assert figures["cross_entropy"] == figures["dense_cross_entropy"]
            assert figures["reached"] == 0
    assert len(seen) == 2 + 3  # the control trains for itself and, once, for all others
    assert all(one is seen[0] for one in seen)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("method", ["magnitude-masks", "magnitude"])
def test_one_cut_serves_every_number_of_steps(method: str) -> None:
    none, some = (measured("trec-6", 0, entry_of(method), 0.5, steps) for steps in (0, 4))
    recovery.pruned.cache_clear()
    alone = measured("trec-6", 0, entry_of(method), 0.5, 4)
    assert some["cross_entropy"] == alone["cross_entropy"] != none["cross_entropy"]
    assert none["reached"] == some["reached"]


def test_methods_that_prune_while_training_have_no_one_shot_form() -> None:
    given = ["trec-6"], [0], [0.5], [], [0, 7]
    steps = {(j.settings[0]["method"], j.settings[0]["steps"]) for j in recovery.recovery(*given)}
    assert ("movement-units", 7) in steps
    assert ("movement-units", 0) not in steps
    assert ("relevance-mi", 0) in steps
    assert next(iter(recovery.recovery(*given))).settings[0]["method"] == "dense"


# ------------------------------------------------------------------------------------ distillation


def test_the_uncut_model_has_nothing_to_learn_from_itself(subject: Subject) -> None:
    (batch,) = labelled(range(1))
    own = subject.model(**batch).loss
    for name, loss in losses(subject.model).items():
        expected = own if name == "labels" else own / 2  # no divergence, no distance
        torch.testing.assert_close(loss(subject.model, batch), expected)


def test_terms_are_those_of_the_papers() -> None:
    mine, wanted = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    p, q = (wanted / 2).softmax(-1), (mine / 2).softmax(-1)
    by_hand = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(mine, wanted), by_hand)
    share = ((mine - wanted) ** 2).sum() / (wanted**2).sum()
    torch.testing.assert_close(distance(mine, wanted), share)


def test_padding_and_embeddings_teach_nothing(subject: Subject) -> None:
    (batch,) = labelled(range(1))
    mask = batch["attention_mask"].bool()
    student, teacher = cut(subject, OURS.options(0.75, 0))[0], subject.model
    with torch.no_grad():
        mine, wanted = (m(**batch, output_hidden_states=True) for m in (student, teacher))
        parts = [
            distance(x[mask], y[mask])
            for x, y in zip(mine.hidden_states[1:], wanted.hidden_states[1:], strict=True)
        ]
        plain, both = (
            losses(teacher)[name](student, batch)
            for name in ("predictions", "predictions and states")
        )
    assert not mask.all()
    torch.testing.assert_close(both - plain, sum(parts) / len(parts))


def test_a_teacher_is_only_run_and_a_student_comes_nearer(subject: Subject) -> None:
    student = cut(subject, OURS.options(0.75, 0))[0]
    weights = copy.deepcopy(subject.model.state_dict())
    (batch,) = labelled(range(20, 21))
    loss = losses(subject.model)["predictions and states"]
    with torch.no_grad():
        before = loss(student, batch)
    train(student, budget(12), loss=loss)
    with torch.no_grad():
        assert loss(student, batch) < before
    assert all(torch.equal(weights[name], t) for name, t in subject.model.state_dict().items())
    assert all(p.grad is None for p in subject.model.parameters())


@pytest.mark.usefixtures("opened")
def test_losses_lead_to_different_students() -> None:
    given = "trec-6", 0, 0.75, 3
    found = {recovery.taught(*given, name)["cross_entropy"] for name in losses(torch.nn.Identity())}
    assert len(found) == 3


# ------------------------------------------------------------------------------------- fine-tuning

LAYERS = 3


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny encoder with three layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("pretrained")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(300))]
    vocabulary = {word: i for i, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, model_max_length=64).save_pretrained(folder)
    shape = {"num_hidden_layers": LAYERS, "hidden_size": 24, "intermediate_size": 40}
    torch.manual_seed(0)
    config = BertConfig(**shape, num_attention_heads=4, vocab_size=305)
    network = BertForSequenceClassification(config)
    randomize(network)
    network.bert.save_pretrained(folder)  # its head is nobody's
    return str(folder)


@pytest.fixture
def tiny(tmp_path: Path, pretrained: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task with that encoder, in a folder of its own."""
    texts = [f"w{i % 7} w{i} w{i % 5}" for i in range(200)]
    labels = ["ab"[i % 2] for i in range(200)]
    monkeypatch.setitem(packaged.PACKAGED, "tiny", lambda: {"train": (texts, labels)})
    monkeypatch.setitem(tasks.RECIPES, "tiny", Recipe(0.0, 1, 0.3, 0.2, batch_size=16))
    for module in (classifier, packaged):
        monkeypatch.setattr(module, "model_path", lambda name: pretrained)
    monkeypatch.setattr(tasks, "FOLDER", tmp_path / "dense")
    return "tiny"


def test_settings_of_dense_models_stay_as_they_are_on_disk() -> None:
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


def test_a_small_model_begins_as_the_bottom_of_the_whole_one_and_is_trained_once(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learning rate of zero both end as they began: pretrained layers, and one head."""
    whole, data = finetuned(tiny, 1)
    small, other = finetuned(tiny, 1, 2)
    assert small.config.num_hidden_layers == len(small.bert.encoder.layer) == 2
    known = whole.state_dict()
    assert [name for name in known if name not in small.state_dict()] == [
        name for name in known if f"layer.{LAYERS - 1}." in name
    ]
    for name, value in small.state_dict().items():
        assert torch.equal(value, known[name]), name
    one, two = next(iter(data.train_dataloader())), next(iter(other.train_dataloader()))
    assert torch.equal(one["input_ids"], two["input_ids"])
    monkeypatch.setattr(tasks, "_finetune", None)
    again, _ = finetuned(tiny, 1, 2)
    assert all(torch.equal(value, small.state_dict()[n]) for n, value in again.state_dict().items())


def test_a_small_model_pays_for_its_own_training(tiny: str, subject, monkeypatch) -> None:
    whole, _ = finetuned(tiny, 0)
    monkeypatch.setattr(
        recovery, "opened", lambda task, seed: (type("S", (), {"model": whole}), None)
    )
    recovery.pruned.cache_clear()
    for sparsity, layers in ((0.5, 2), (0.9, 1)):
        model, seconds = recovery.pruned(tiny, 0, entry_of("small-dense"), sparsity)
        assert seconds == dense_record(tiny, 0, layers)["cpu_seconds"] > 0
        size = size_of(model, choose_groups(groups_of(whole)))
        assert size["kept"] == {"heads": [4] * layers, "ffn": [40] * layers}
        assert not size["masked"]
    recovery.pruned.cache_clear()
