"""What tests of the benchmark run on: a tiny random model and batches."""

import torch

from examples.benchmark.oneshot import Subject
from examples.benchmark.training import Training, training_of
from lightning_mi_prune.axes import count_parameters
from tests.models import batch


def labelled(seeds: range, rows: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        batch(rows, seed=seed) | {"labels": torch.randint(3, (rows,), generator=generator)}
        for seed in seeds
    ]


class Epochs:
    """A loader whose order depends on the epoch alone, as that of the example does."""

    def __init__(self, batches: int = 4) -> None:
        self.dataset = range(8 * batches)
        self.sampler = self
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(labelled(range(100 * self.epoch, 100 * self.epoch + 4), rows=8))


def budget(steps: int = 6) -> Training:
    return training_of(Epochs(), steps, first_epoch=4, learning_rate=1e-3, seed=0)


def named(entry) -> str:
    return f"{entry.method}-{entry.widths}"


def counted(subject: Subject) -> int:
    return count_parameters(subject.chosen)
