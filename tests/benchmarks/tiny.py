"""A tiny random model in the place of every fine-tuned one.

Test modules import the fixtures: a second conftest.py in a folder without a package clashes.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import ablations, layers, recovery
from benchmarks.subjects import Subject, examine
from tests.support.models import batch, build

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


@pytest.fixture(scope="session")
def subject() -> Subject:
    return examine(0, build(), labelled(range(12)), labelled(range(12, 14)))


@pytest.fixture
def opened(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The tasks and seeds that were opened; all of them are the tiny model."""
    asked: list[tuple[str, int]] = []

    def tiny(task: str, seed: int, *, calibrated: bool = True):
        asked.append((task, seed))
        return subject, Data()

    caches = [recovery.training_after, recovery.control_of, recovery.pruned, layers.compared]
    caches += [ablations._activations, ablations._gradients]
    for module in (recovery, ablations, layers):
        monkeypatch.setattr(module, "opened", tiny)
    for cache in caches:
        cache.cache_clear()
    yield asked
    for cache in caches:
        cache.cache_clear()
