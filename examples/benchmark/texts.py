"""The texts that multiply-accumulates and milliseconds are counted on."""

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor


def typical(batches: Sequence[dict[str, Tensor]]) -> int:
    """Length of the median batch, padding included."""
    return int(median(batch["input_ids"].shape[1] for batch in batches))


def inputs_of(rows: int, length: int) -> dict[str, Tensor]:
    """Token ids without padding, of words that any vocabulary has."""
    ids = torch.full((rows, length), 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
