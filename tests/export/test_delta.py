"""A pruned model as changes to a dense one: rebuilt bit for bit, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel
from transformers import AutoModelForSequenceClassification as AutoClassifier

from lightning_mi_prune import PruningError, apply_plan, from_pretrained, prune, save_pretrained
from tests.support.graphs import groups_of
from tests.support.models import batch, build, outputs, random_plan

WEIGHTS = "delta.safetensors"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "dense"
    build("bert").save_pretrained(folder)
    return folder


def cut(folder: Path, *, trained: bool = False) -> nn.Module:
    model = AutoClassifier.from_pretrained(folder).eval()
    groups = groups_of(model)
    apply_plan(model, groups, random_plan(groups))
    if trained:
        with torch.no_grad():
            model.bert.encoder.layer[1].output.dense.bias += 1
    return model


@pytest.mark.parametrize("trained", [False, True])
def test_a_delta_is_rebuilt_bit_for_bit(dense: Path, tmp_path: Path, trained: bool) -> None:
    model = cut(dense, trained=trained)
    folder = save_pretrained(model, tmp_path / "small", delta_of=dense)
    assert not (folder / "model.safetensors").exists()
    changed = {"bert.encoder.layer.1.output.dense.bias"} if trained else set()
    assert load_file(folder / WEIGHTS).keys() == changed
    for opened in (from_pretrained(AutoClassifier, folder), AutoClassifier.from_pretrained(folder)):
        state = opened.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        assert torch.equal(outputs(opened.eval(), batch(4)), outputs(model, batch(4)))
    again = save_pretrained(opened, tmp_path / "again")  # an ordinary pruned model
    assert torch.equal(
        outputs(AutoClassifier.from_pretrained(again), batch(4)), outputs(model, batch(4))
    )


def test_solved_weights_are_stored_and_selected_ones_are_not(dense: Path, tmp_path: Path) -> None:
    model = AutoClassifier.from_pretrained(dense).eval()
    batches = [batch(32, seed=seed) | {"labels": torch.arange(32) % 3} for seed in range(4)]
    prune(model, batches, 0.5, loss=lambda network, given: network(**given).loss, kinds=["ffn"])
    folder = save_pretrained(
        model, tmp_path / "small", delta_of=AutoClassifier.from_pretrained(dense)
    )
    names = load_file(folder / WEIGHTS).keys()
    assert "bert.encoder.layer.0.output.dense.weight" in names
    assert "bert.embeddings.word_embeddings.weight" not in names
    assert "bert.encoder.layer.0.intermediate.dense.weight" not in names  # the kept rows
    opened = from_pretrained(AutoClassifier, folder).eval()
    assert torch.equal(outputs(opened, batch(4)), outputs(model.eval(), batch(4)))


def test_another_dense_model_is_refused(dense: Path, tmp_path: Path) -> None:
    folder = save_pretrained(cut(dense), tmp_path / "small", delta_of=dense)
    other = tmp_path / "other"
    build("bert", seed=5).save_pretrained(other)
    with pytest.raises(PruningError, match=r"expected the same dense model.*base=folder"):
        from_pretrained(AutoClassifier, folder, base=other)
    moved = dense.rename(tmp_path / "moved")
    assert from_pretrained(AutoClassifier, folder, base=moved).config.num_labels == 3
    with pytest.raises(PruningError, match="not BertModel"):
        from_pretrained(AutoModel, folder, base=moved)
    with pytest.raises(PruningError, match="holds all weights"):
        from_pretrained(AutoClassifier, moved, base=moved)


def test_what_is_no_cut_of_the_dense_model_is_refused(dense: Path, tmp_path: Path) -> None:
    small = cut(dense)
    with pytest.raises(PruningError, match="no units removed"):
        save_pretrained(AutoClassifier.from_pretrained(dense), tmp_path / "a", delta_of=dense)
    with pytest.raises(PruningError, match="a model without a name"):
        save_pretrained(small, tmp_path / "a", delta_of=build("bert"))
    with pytest.raises(PruningError, match="one of the two"):
        save_pretrained(small, tmp_path / "a", delta_of=dense, code=True)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: {"no.such": torch.ones(2)}, "no.such"),
        (lambda tensors: {"classifier.bias": torch.ones(7)}, "classifier.bias"),
        (lambda tensors: {"classifier.bias": torch.ones(3).half()}, "classifier.bias"),
    ],
    ids=["name", "shape", "type"],
)
def test_tampered_changes_are_refused(dense: Path, tmp_path: Path, edit, message) -> None:
    folder = save_pretrained(cut(dense, trained=True), tmp_path / "small", delta_of=dense)
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(PruningError, match=message):
        from_pretrained(AutoClassifier, folder)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', '{"version": 1, "base": 3}'])
def test_a_damaged_record_is_refused(dense: Path, tmp_path: Path, text: str) -> None:
    folder = save_pretrained(cut(dense), tmp_path / "small", delta_of=dense)
    (folder / "delta.json").write_text(text)
    with pytest.raises(PruningError, match=r"delta\.json"):
        from_pretrained(AutoClassifier, folder)
    (folder / "delta.json").write_text(
        json.dumps({"version": 1, "base": str(dense), "sha256": "a"})
    )
    with pytest.raises(PruningError, match="same dense model"):
        from_pretrained(AutoClassifier, folder)
    (folder / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(PruningError, match=r"delta\.safetensors cannot be read"):
        from_pretrained(AutoClassifier, folder)
