"""Folders that name files outside or ask for huge models are refused before a model is made."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoModelForQuestionAnswering
from transformers import AutoModelForSequenceClassification as Auto

from lightning_mi_prune import PruningError, from_pretrained
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import build, random_plan

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    model = build()
    apply_plan(model, groups_of(model), random_plan(groups_of(model)))
    model.save_pretrained(path, max_shard_size="20KB")
    return path


@pytest.fixture
def damaged(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "damaged")


def edit(path, change):
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/outside.safetensors", "..\\x", "C:x"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(name, damaged):
    first = min(path.name for path in damaged.glob("model-*.safetensors"))
    shutil.copyfile(damaged / first, damaged.parent / "outside.safetensors")

    def change(body):
        moved = {key: name if file == first else file for key, file in body["weight_map"].items()}
        body["weight_map"] = moved

    edit(damaged / INDEX, change)
    with pytest.raises(PruningError, match="outside the folder"):
        from_pretrained(Auto, damaged)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("weight_map"),
        lambda body: body.update(weight_map=["a"]),
        lambda body: body.update(metadata=3),
        lambda body: body["weight_map"].update(a=7),
    ],
    ids=["none", "a list", "metadata", "a number"],
)
def test_an_index_of_another_form_is_refused(change, damaged):
    edit(damaged / INDEX, change)
    with pytest.raises(PruningError, match=r"index.json is damaged"):
        from_pretrained(Auto, damaged)


@pytest.mark.parametrize("plan", [True, False])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 10**9),
        ("max_position_embeddings", 10**10),
        ("num_hidden_layers", 10**9),
        ("type_vocab_size", 10**9),
    ],
)
def test_a_config_that_asks_for_a_huge_model_is_refused(field, value, plan, damaged):
    """Not built, and not filled with new weights either."""

    def change(body):
        body[field] = value
        if not plan:
            del body["pruning_plan"], body["pruning_graph"]

    edit(damaged / "config.json", change)
    with pytest.raises(PruningError, match=r"asks for .* but the files of the folder have"):
        from_pretrained(Auto, damaged, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("text", ["[" * 10**5 + "]" * 10**5, '{"a": ' + "9" * 5000 + "}", "[]"])
def test_a_config_that_is_no_object_or_nested_deeply_is_refused(text, damaged):
    (damaged / "config.json").write_text(text)
    with pytest.raises(PruningError, match=r"config.json"):
        from_pretrained(Auto, damaged)


@pytest.mark.parametrize("field", ["initializer_range", "max_position_embeddings", "vocab_size"])
def test_numbers_below_zero_are_refused_by_the_name_of_the_folder(field, damaged):
    """Errors of torch name neither a file nor a field."""

    def change(body):
        body[field] = -abs(body[field])

    edit(damaged / "config.json", change)
    with pytest.raises(PruningError, match="Copy or save the folder again"):
        from_pretrained(AutoModelForQuestionAnswering, damaged)  # with a new head
