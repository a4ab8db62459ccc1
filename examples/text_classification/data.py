"""Single texts or text pairs with one label each, from anywhere, as a LightningDataModule."""

from functools import partial
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import torch
from datasets import ClassLabel, Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from examples.text_classification.packaged import (
    check_columns,
    label_names,
    load_source,
    load_tokenizer,
    local_files,
    require,
)


def encode_labels(
    given: dict[str, Dataset], texts: list[str], label: str
) -> tuple[dict[str, Dataset], list[str]]:
    """Numbers the classes 0 to C-1, in a column `labels`; returns the splits and the class names.

    Rows without a label are dropped: those with -1 in a ClassLabel column, and in other columns,
    where -1 may be a class, those of a split that has nothing else. A test split without any label
    (GLUE hides them) is replaced by the validation split.
    """
    feature = given["train"].features[label]
    hub_names = feature.names if isinstance(feature, ClassLabel) else None
    names = {split: label_names(rows, split, label) for split, rows in given.items()}
    for split, found in names.items():
        if hub_names or set(found) == {"-1"}:
            names[split] = ["" if name == "-1" else name for name in found]
    classes = sorted({name for found in names.values() for name in found} - {""})
    require(len(classes) >= 2, f"expected two or more classes in {label!r}, found {classes}")
    if all(name.removeprefix("-").isdecimal() for name in classes):
        classes.sort(key=int)  # 2 before 10
    class_names = [hub_names[int(name)] for name in classes] if hub_names else classes
    number = {name: index for index, name in enumerate(classes)}

    encoded = {}
    for split, rows in given.items():
        column = np.array([number.get(name, -1) for name in names[split]], dtype=int)
        rows = rows.select_columns(texts).add_column("labels", column)
        if len(labelled := np.flatnonzero(column >= 0)) > 0:
            encoded[split] = rows.select(labelled)
    require("train" in encoded, f"no training row has a label in {label!r}")
    if "test" in given and "test" not in encoded and "validation" in encoded:
        encoded["test"] = encoded.pop("validation")
    return encoded, class_names


def draw(rows: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """Draws random rows, of every class very nearly its share; returns them and the rest.

    `Dataset.train_test_split` refuses to keep the shares where a class has one row only, and reads
    the labels one by one: half a minute for a data set the size of MNLI.
    """
    random = np.random.default_rng(seed)
    labels = np.asarray(rows["labels"][:])
    place = np.empty(len(rows))
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        # Spreading each class evenly over [0, 1) gives every stretch of it the same mixture.
        place[members] = (np.arange(len(members)) + random.random()) / len(members)
    order = place.argsort()
    return rows.select(order[:count]), rows.select(order[count:])


def divide(
    given: dict[str, Dataset], fractions: dict[str, float], limit: int | None, seed: int
) -> dict[str, Dataset]:
    """Cuts a data set down to `limit` rows, then takes the splits it lacks out of train."""
    splits, train = dict(given), given["train"]
    if limit is not None and limit < sum(map(len, given.values())):
        room = limit
        for split in fractions.keys() & given.keys():
            splits[split], _ = draw(given[split], max(1, round(limit * fractions[split])), seed)
            room -= len(splits[split])
        train, _ = draw(train, max(1, room), seed)
    total, classes = len(train), len(set(given["train"]["labels"][:]))
    counts = {s: max(1, round(total * fractions[s])) for s in fractions if s not in given}
    require(
        total - sum(counts.values()) >= classes,
        f"{total} rows leave less than one training row for each of the {classes} classes; "
        "expected more rows, a larger limit or smaller fractions",
    )
    for split, count in counts.items():
        splits[split], train = draw(train, count, seed)
    return splits | {"train": train}


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> Dataset:
    """Turns the texts into token ids, unpadded: padding is cheapest batch by batch."""

    def encode(batch: dict[str, list[Any]]) -> Any:
        cells = ([str(cell) for cell in batch[column]] for column in texts)
        return tokenizer(*cells, truncation=True, max_length=max_length)

    # A name for the result, or half a second goes into hashing the tokenizer for one.
    return rows.map(
        encode, batched=True, remove_columns=texts, keep_in_memory=True, new_fingerprint="tokens"
    )


def collate(pad: DataCollatorWithPadding, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads rows to the longest of them and gives a plain dict."""
    return dict(pad(rows))


class EpochShuffle(LengthGroupedSampler):  # type: ignore[misc]
    """Shuffles by seed and epoch alone: a resumed run sees the order of a straight one."""

    def __init__(self, rows: Dataset, batch_size: int, seed: int, grouped: bool) -> None:
        # Rows of one length are a group of all rows: a plain shuffle.
        lengths = [len(ids) for ids in rows["input_ids"]] if grouped else [1] * len(rows)
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Starts an epoch's order; called by Lightning (under DDP, on its own sampler)."""
        self.generator.manual_seed(self.seed + epoch)


class TextDataModule(pl.LightningDataModule):
    """Splits, tokenizes and batches labelled texts or text pairs.

    Splits that a data set lacks are drawn from its training rows, once for all stages. Where its
    test labels are hidden (-1, as in GLUE), its validation split is the test split here. Batches
    are dicts of `input_ids`, `attention_mask`, `token_type_ids` if the model has them, and
    `labels`. Predicting runs over the test split.

    Args:
        dataset: "movie-snippets", "trec-6", "tweets-3" or "20-newsgroups"; a .csv, .tsv, .json,
            .jsonl or .parquet file, or a folder of such files called train, validation and test;
            or a Hugging Face data set as `name` or `name:config`.
        model: Source of the tokenizer: "minilm-l6", "mpnet-base", a folder or a name on the Hugging
            Face hub.
        text_column: Column of the text, or of the first text of a pair.
        pair_column: Column of the second text of a pair.
        label_column: Column of the class, a string or an integer.
        max_length: Tokens after which an input is truncated.
        batch_size: Rows in a training batch of one process.
        eval_batch_size: Rows in any other batch; by default as many.
        validation_fraction: Share of the training rows for validation, if that split is lacking.
        test_fraction: Share of the training rows for testing, if that split is lacking.
        limit: Rows to draw and use in all, for quick runs; each split gets its fraction.
        group_by_length: Whether training batches hold texts of about the same length, so that
            little is padded: faster, with a little less chance in the order.
        seed: Seed of all draws and of the training order.
        num_workers: Processes that load batches.
    """

    def __init__(
        self,
        dataset: str = "movie-snippets",
        model: str = "minilm-l6",
        text_column: str = "text",
        pair_column: str | None = None,
        label_column: str = "label",
        max_length: int = 64,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        validation_fraction: float = 0.1,
        test_fraction: float = 0.2,
        limit: int | None = None,
        group_by_length: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        least = {"max_length": 4, "batch_size": 1, "eval_batch_size": 1, "limit": 3}
        for name, minimum in (least | {"seed": 0, "num_workers": 0}).items():
            value = self.hparams[name]
            require(value is None or value >= minimum, f"{name}={value}: expected >= {minimum}")
        require(
            min(validation_fraction, test_fraction) > 0 and validation_fraction + test_fraction < 1,
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction}: "
            "expected two numbers above 0 with a sum below 1",
        )
        self.text_columns = [text_column] if pair_column is None else [text_column, pair_column]
        columns = [*self.text_columns, label_column]
        require(len({*columns}) == len(columns), f"expected different columns, found {columns}")
        local_files(dataset)  # a mistyped path fails here, not minutes later
        self.splits: dict[str, Dataset] = {}

    def prepare_data(self) -> None:
        """Downloads, in one process per machine, what all processes then read from the cache."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Splits and tokenizes on the first call; every stage shares the one result."""
        if self.splits:
            return
        args: Any = self.hparams
        texts = self.text_columns
        self.tokenizer = load_tokenizer(args.model, args.max_length)
        source = load_source(args.dataset)
        for split, rows in source.items():
            check_columns(rows, split, texts, args.label_column)
        given, self._class_names = encode_labels(source, texts, args.label_column)
        fractions = {"test": args.test_fraction, "validation": args.validation_fraction}
        datasets.disable_progress_bars()  # `map` would draw one per split
        self.splits = {
            split: tokenize(rows, self.tokenizer, texts, args.max_length)
            for split, rows in divide(given, fractions, args.limit, args.seed).items()
        }

    @property
    def class_names(self) -> list[str]:
        """The classes in the order of their numbers; loads the data where `setup` has not."""
        self.setup()
        return self._class_names

    @property
    def num_classes(self) -> int:
        """How many classes there are, for `link_arguments` and for building a model by hand."""
        return len(self.class_names)

    def _loader(self, split: str) -> DataLoader[dict[str, torch.Tensor]]:
        args: Any = self.hparams
        rows, training = self.splits[split], split == "train"
        batch_size = args.batch_size if training else args.eval_batch_size or args.batch_size
        return DataLoader(
            rows,
            batch_size=batch_size,
            sampler=EpochShuffle(rows, batch_size, args.seed, args.group_by_length)
            if training
            else None,
            collate_fn=partial(collate, DataCollatorWithPadding(self.tokenizer)),
            num_workers=args.num_workers,
            persistent_workers=args.num_workers > 0,
        )

    def train_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Shuffled batches of the training split."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Batches of the validation split."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Batches of the test split."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, torch.Tensor]]:
        """Batches of the test split, too."""
        return self._loader("test")
