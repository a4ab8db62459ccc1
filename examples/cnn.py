"""Prune the channels of a residual CNN.

python examples/cnn.py                                    # generated pictures, seconds
python examples/cnn.py /usr/share/datasets/fashion-mnist  # apt-get install dataset-fashion-mnist
"""

import gzip
import sys
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi_prune import MutualInformationPruning

Loader = DataLoader[tuple[Tensor, ...]]


class Block(nn.Module):
    """Two convolutions that add to their input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(inner)
        self.second = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.second(self.norm(self.first(x)).relu())
        return x + added


class Classifier(pl.LightningModule):
    """Nothing in it is about pruning."""

    def __init__(self, width: int = 16, inner: int = 48) -> None:
        super().__init__()
        blocks = [Block(width, inner), nn.MaxPool2d(2), Block(width, inner)]
        head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10)]
        self.network = nn.Sequential(nn.Conv2d(1, width, 3, 2, 1), *blocks, *head)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_accuracy", (self.network(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def pictures(folder: str | None, name: str) -> Loader:
    """Fashion-MNIST, or noise over a pattern that gives the class."""
    if folder is not None:
        raw = gzip.decompress(Path(folder, f"{name}-images-idx3-ubyte.gz").read_bytes())
        x = torch.from_numpy(np.frombuffer(raw, np.uint8, offset=16).copy()).reshape(-1, 1, 28, 28)
        marks = gzip.decompress(Path(folder, f"{name}-labels-idx1-ubyte.gz").read_bytes())
        y = torch.from_numpy(np.frombuffer(marks, np.uint8, offset=8).copy()).long()
        return DataLoader(TensorDataset(x / 255 - 0.5, y), batch_size=128)
    tiles = torch.randn(10, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(640) % 10
    x = torch.randn(640, 1, 16, 16) + tiles[y].repeat(1, 1, 4, 4)
    return DataLoader(TensorDataset(x, y), batch_size=32)


def fit(module: Classifier, train: Loader, test: Loader, *callbacks: pl.Callback) -> str:
    """Train; returns how large and how good the module is then."""
    trainer = pl.Trainer(
        max_epochs=4, callbacks=list(callbacks), logger=False, enable_checkpointing=False
    )
    trainer.fit(module, train, test)
    size = sum(p.numel() for p in module.parameters())
    return f"{size:,} parameters, accuracy {float(trainer.callback_metrics['val_accuracy']):.1%}"


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    source = sys.argv[1] if len(sys.argv) > 1 else None
    module, pruning = Classifier(), MutualInformationPruning(sparsity=0.5)
    train, held_out = pictures(source, "train"), pictures(source, "t10k")
    before = fit(module, train, held_out)
    after = fit(module, train, held_out, pruning)
    print(pruning.graph)
    print(f"before: {before}")
    print(f"after:  {after}")
