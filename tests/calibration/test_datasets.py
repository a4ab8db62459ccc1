"""Batches from data sets of the ``datasets`` package."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, DatasetDict, disable_progress_bars

from lightning_mi_prune import PruningError, prune
from lightning_mi_prune.calibration.datasets import batches_of
from tests.support.models import build
from tests.support.packages import hide

disable_progress_bars()


def tokens(rows=40, length=None):
    """Texts of token ids with their labels; each of another length, unless one is given."""
    drawn = torch.Generator().manual_seed(0)
    lengths = [length or 3 + i % 5 for i in range(rows)]
    ids = [torch.randint(1, 50, (n,), generator=drawn).tolist() for n in lengths]
    mask = [[1] * n for n in lengths]
    return {"input_ids": ids, "attention_mask": mask, "label": [i % 3 for i in range(rows)]}


def rows_of(batches):
    """All rows without padding, in the order in which they come."""
    return [
        (tuple(row[mask.bool()].tolist()), int(label))
        for b in batches
        for row, mask, label in zip(b["input_ids"], b["attention_mask"], b["labels"], strict=True)
    ]


@pytest.mark.parametrize("form", ["memory", "disk", "disk, splits", "splits", "parquet"])
def test_every_row_comes_once_in_the_same_order(form, tmp_path):
    data = Dataset.from_dict(tokens())
    other = Dataset.from_dict(tokens(3))
    if "splits" in form:
        data = DatasetDict(train=other, validation=data)
    if form.startswith("disk"):
        data.save_to_disk(tmp_path / "data")
        data = tmp_path / "data"
    if form == "parquet":
        (tmp_path / "data").mkdir()
        data.to_parquet(tmp_path / "data" / "rows.parquet")
        data = str(tmp_path / "data")
    batches = batches_of(data, batch_size=16, seed=3)
    expected = tokens()
    rows = list(zip(map(tuple, expected["input_ids"]), expected["label"], strict=True))
    found = rows_of(batches)
    assert sorted(found) == sorted(rows)
    assert found != rows
    assert rows_of(batches) == found
    assert len(batches) == len(list(batches)) == 3
    assert rows_of(batches_of(data, batch_size=40, seed=3)) == found
    assert rows_of(batches_of(data, batch_size=16, seed=4)) != found


def test_padding_is_what_a_masked_position_and_an_ignored_label_are():
    ids = [[5, 6, 7], [8]]
    columns = {"input_ids": ids, "attention_mask": [[1, 1, 1], [1]], "labels": [[5, 6, 7], [8]]}
    (batch,) = batches_of(Dataset.from_dict(columns), batch_size=2)
    short = int(batch["attention_mask"].sum(1).argmin())
    assert batch["input_ids"][short].tolist() == [8, 0, 0]
    assert batch["attention_mask"][short].tolist() == [1, 0, 0]
    assert batch["labels"][short].tolist() == [8, -100, -100]


def test_a_data_set_is_read_without_a_trace_on_the_random_state(tmp_path):
    before = torch.get_rng_state()
    list(batches_of(Dataset.from_dict(tokens())))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_is_pruned_on_a_data_set():
    batches = batches_of(Dataset.from_dict(tokens(256, length=8)), batch_size=32)
    model = build()
    done = prune(model, batches, 0.5, loss=lambda m, b: m(**b).loss)
    assert 0.45 <= done.sparsity < 1
    assert done.parameters[1] == sum(p.numel() for p in model.parameters()) < done.parameters[0]


def test_what_is_no_data_set_is_returned(monkeypatch):
    batches = [torch.ones(2)]
    assert batches_of(batches) is batches
    hide(monkeypatch, "datasets")
    assert batches_of(batches) is batches
    with pytest.raises(PruningError, match=r"pip install 'lightning-mi-prune\[datasets\]'"):
        batches_of("a/name")


REFUSED = {
    "text": ({"x": [1], "text": ["a"]}, r"'text' .*type str.*Tokenize.*remove_columns\(\['text'\]"),
    "words": ({"x": [1], "words": [["a"]]}, r"'words' .*expected numbers"),
    "empty": ({"x": []}, r"has no rows"),
    "ragged": ({"x": [[1], [1, 2]]}, r"'x' .*different shapes.*padding='max_length'"),
    "other lengths": (
        {"attention_mask": [[1], [1, 1]], "x": [[1, 2], [1]]},
        r"'x' .*no attention_mask of the same lengths",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_columns_that_make_no_tensor_are_refused(case):
    columns, message = REFUSED[case]
    with pytest.raises(PruningError, match=message):
        batches_of(Dataset.from_dict(columns))


def test_other_data_is_refused(tmp_path):
    data = Dataset.from_dict(tokens())
    with pytest.raises(PruningError, match="streamed"):
        batches_of(data.to_iterable_dataset())
    with pytest.raises(PruningError, match=r"splits \['a', 'b'\]; pass one: data\['a'\]"):
        batches_of(DatasetDict(a=data, b=data))
    with pytest.raises(PruningError, match="batch_size=0"):
        batches_of(data, batch_size=0)
    with pytest.raises(PruningError, match="'nowhere' cannot be opened"):
        batches_of("nowhere")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(PruningError, match=r"cannot be opened \(.*save_to_disk"):
        batches_of(tmp_path)
