"""What tests of the benchmarks run on: batches of a tiny random model."""

from pathlib import Path

import torch

from tests.models import batch

ROOT = Path(__file__).parents[2]


def labelled(seeds: range, rows: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        batch(rows, seed=seed) | {"labels": torch.randint(3, (rows,), generator=generator)}
        for seed in seeds
    ]


class Epochs:
    """A loader whose order depends on the epoch alone, as that of the example does."""

    def __init__(self) -> None:
        self.sampler = self
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(labelled(range(100 * self.epoch, 100 * self.epoch + 4), rows=8))


class Data:
    def train_dataloader(self):
        return Epochs()
