"""Batches for calibration from data sets of the ``datasets`` package (Hugging Face)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_mi_prune.core.errors import PruningError, require
from lightning_mi_prune.core.options import check_count

__all__ = [
    "DatasetBatches",
    "batches_of",
]

_SPLITS = ("validation", "train")

_IGNORED = -100  # a label that losses of torch and transformers leave out


class DatasetBatches:
    """Batches of a data set as dicts of tensors, one entry for each column.

    Rows come in a random order that is the same at every reading. Sequences of different lengths
    are padded where there is an ``attention_mask``: with 0, labels with -100. A column ``label`` is
    called ``labels``, as the collators of transformers call it.

    Args:
        data: A ``datasets.Dataset`` whose columns are numbers.
        batch_size: Rows of a batch.
        seed: Seed of the order.

    Raises:
        PruningError: If there are no rows, a column is text or cannot be stacked, or the size is no
            whole number from 1.
    """

    def __init__(self, data: Any, *, batch_size: int, seed: int) -> None:
        check_count("batch_size", batch_size, least=1)
        if not len(data):
            raise PruningError("The data set has no rows; expected a few thousand. Check filters.")
        if "label" in data.column_names and "labels" not in data.column_names:
            data = data.rename_column("label", "labels")
        self._data = data.shuffle(seed=seed, keep_in_memory=True).with_format("torch")
        self._batch_size = batch_size
        next(iter(self))  # refuses what can be refused now

    @property
    def rows(self) -> int:
        """Rows of the data set."""
        return len(self._data)

    def __len__(self) -> int:
        return -(-len(self._data) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._data.iter(self._batch_size):
            mask = batch.get("attention_mask")
            lengths = [tuple(row.shape) for row in mask] if isinstance(mask, list) else None
            yield {name: _stacked(name, value, lengths) for name, value in batch.items()}


def batches_of(
    data: Any, *, batch_size: int = 32, seed: int = 0, splits: Sequence[str] = _SPLITS
) -> Iterable[Any]:
    """Batches that can be read more than once.

    Args:
        data: A ``datasets.Dataset``; a ``DatasetDict``, of which the first of ``splits`` is read,
            else its only one; the folder that ``save_to_disk`` wrote; or what
            ``datasets.load_dataset`` takes, a name or a folder. Anything else is returned as it is.
        batch_size: Rows of a batch.
        seed: Seed of the order of the rows.
        splits: Splits in the order in which they are looked for.

    Raises:
        PruningError: If the data set cannot be opened or made into tensors, or if the ``datasets``
            package is missing.

    Example:
        >>> from datasets import Dataset
        >>> rows = Dataset.from_dict({"x": [[1, 2], [3, 4], [5, 6]], "label": [0, 1, 0]})
        >>> batches = batches_of(rows, batch_size=2)
        >>> [(batch["x"].shape[0], batch["labels"].ndim) for batch in batches]
        [(2, 1), (1, 1)]
    """
    if isinstance(data, (str, Path)):
        data = _opened(str(data))
    package = sys.modules.get("datasets")  # without it, nothing is a data set of it
    if package is None:
        return data  # type: ignore[no-any-return]
    if isinstance(data, (package.IterableDataset, package.IterableDatasetDict)):
        raise PruningError(
            "A data set that is streamed cannot be shuffled whole; expected a datasets.Dataset. "
            "Load it without streaming=True, or pass a DataLoader."
        )
    if isinstance(data, package.DatasetDict):
        names = [name for name in splits if name in data] or list(data)
        if len(names) > 1 and names[0] not in splits:
            raise PruningError(
                f"The data set has the splits {names}; pass one: data[{names[0]!r}]."
            )
        data = data[names[0]]
    if isinstance(data, package.Dataset):
        return DatasetBatches(data, batch_size=batch_size, seed=seed)
    return data  # type: ignore[no-any-return]


def _opened(name: str) -> Any:
    package = require("datasets", "datasets")
    saved = any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        return package.load_from_disk(name) if saved else package.load_dataset(name)
    except Exception as error:  # of many libraries: files, network, formats
        raise PruningError(
            f"The data set {name!r} cannot be opened ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); expected a folder that save_to_disk wrote, or a "
            "folder or name for datasets.load_dataset."
        ) from error


def _stacked(name: str, value: Any, lengths: list[tuple[int, ...]] | None) -> Tensor:
    """A column of a batch as one tensor; ``lengths`` are those of the attention mask's rows."""
    if isinstance(value, Tensor):
        return value
    if any(not isinstance(row, Tensor) for row in value):
        found = type(next(row for row in value if not isinstance(row, Tensor))).__name__
        raise PruningError(
            f"Column {name!r} of the data set holds values of type {found}; expected numbers. "
            f"Tokenize texts, data.map(tokenize, batched=True), and leave the column out: "
            f"data.remove_columns([{name!r}])."
        )
    if lengths is None or [tuple(row.shape) for row in value] != lengths or len(lengths[0]) != 1:
        raise PruningError(
            f"Column {name!r} of the data set has rows of different shapes, and no attention_mask "
            "of the same lengths; expected equal ones. Pad them (padding='max_length' in the "
            "tokenizer), or pass a DataLoader with a collate_fn."
        )
    padding = _IGNORED if name == "labels" else 0
    return pad_sequence(value, batch_first=True, padding_value=padding)
