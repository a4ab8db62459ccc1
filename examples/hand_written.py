"""Prune a network of your own: the callback finds in the first batch what can go.

python examples/hand_written.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi_prune import MutualInformationPruning

Loader = DataLoader[tuple[Tensor, ...]]


class ResidualMLP(nn.Module):
    """Three blocks of 128 neurons that add to 32 numbers, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(32, 128) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(128, 32) for _ in range(3))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        logits: Tensor = self.head(x)
        return logits


class Classifier(pl.LightningModule):
    """An ordinary module; nothing in it is about pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ResidualMLP()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_accuracy", (self.network(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def loader(rows: int = 4096) -> Loader:
    """Points in 32 dimensions; the class is the largest of their first four numbers."""
    x = torch.randn(rows, 32)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(-1)), batch_size=128)


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
    module, pruning = Classifier(), MutualInformationPruning(sparsity=0.75)
    train, held_out = loader(), loader()
    before = fit(module, train, held_out)
    after = fit(module, train, held_out, pruning)
    print(pruning.graph)
    print(f"before: {before}")
    print(f"after:  {after}")
