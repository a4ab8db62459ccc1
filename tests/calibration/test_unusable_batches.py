"""Batches that a language model cannot use: one sentence that names them, and nothing changed."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from lightning_mi_prune import prune
from lightning_mi_prune.core.errors import PruningError, PruningWarning

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}


def language_model(kind):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**SIZES)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


def texts(batches=5, rows=8, length=16):
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (batches, rows, length))
    mask = torch.ones(rows, length, dtype=torch.long)
    return [{"input_ids": x, "attention_mask": mask.clone(), "labels": x.clone()} for x in ids]


def cut(model, data, **options):
    return prune(model, data, 0.5, loss=lambda net, batch: net(**batch).loss, **options)


def other_vocabulary(data, at):
    data[at]["input_ids"][2, 3] = 70


def other_length(data, at):
    data[at] = texts(1, length=40)[0]


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llama", other_vocabulary, "Batch {} .* ids up to 70, .* 50 rows; expected ids below"),
        ("bert", other_vocabulary, "Batch {} .* ids up to 70, .* 50 rows; .* tokenizer"),
        ("bert", other_length, "Batch {} .* texts of 40 positions, .* has 24; .* Truncate"),
    ],
)
def test_batches_of_another_model_are_named(kind, change, message, at):
    model, data = language_model(kind), texts()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change(data, at)
    with pytest.raises(PruningError, match=message.format(at)):
        cut(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks for part in model.modules())


def test_labels_that_are_ignored_everywhere_give_no_gradient():
    model, data = language_model("llama"), texts()
    for batch in data:
        batch["labels"].fill_(-100)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(PruningError, match=r"loss of all 5 batches is NaN.*-100 are ignored"):
        cut(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_without_labels_counts_as_none():
    """The same as if it had not been there."""
    data, whole = texts(), language_model("llama")
    data[2]["labels"].fill_(-100)
    with pytest.warns(PruningWarning, match="loss of 1 of 5 batches is NaN; they are left out"):
        found = cut(whole, data, training=data)
    other = language_model("llama")
    wanted = cut(other, data, training=[*data[:2], *data[3:]])
    assert found.plan.kept == wanted.plan.kept


def test_left_padding_is_no_sample():
    """Whatever stands at the padding, the plan is the same."""
    plans = []
    for token in (1, 2):
        data = texts()
        for batch in data:
            batch["attention_mask"][:4, :6] = 0
            batch["labels"][:4, :7] = -100  # the first token has none before it
            batch["input_ids"][:4, :6] = token
        plans.append(cut(language_model("llama"), data).plan.kept)
    assert plans[0] == plans[1]


def test_too_few_tokens_are_counted():
    with pytest.raises(PruningError, match=r"Only 16 samples at .* needs more than 17, better 320"):
        cut(language_model("llama"), texts(1, rows=2, length=8))
