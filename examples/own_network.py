"""Describe the groups of a network by hand, instead of having them found in its first batch.

python examples/own_network.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi_prune import MutualInformationPruning, PruningGraph, linear_group


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


def describe(module: nn.Module) -> PruningGraph:
    """One group a block: the rows of ``up`` go together with the columns of ``down``."""
    groups = []
    for i in range(3):
        up, down = f"network.up.{i}", f"network.down.{i}"
        # The level is the height in the network: groups are ranked from the top down.
        groups.append(
            linear_group(module, f"block{i}", kind="ffn", producers=[up], consumers=[down], level=i)
        )
    return PruningGraph.of(groups)


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


def loader(rows: int = 4096) -> DataLoader[tuple[Tensor, ...]]:
    """Points in 32 dimensions; the class is the largest of their first four numbers."""
    x = torch.randn(rows, 32)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(-1)), batch_size=128)


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    module = Classifier()
    pruning = MutualInformationPruning(sparsity=0.75, graph=describe(module))
    trainer = pl.Trainer(
        max_epochs=4, callbacks=[pruning], logger=False, enable_checkpointing=False
    )
    trainer.fit(module, loader(), loader())
    print(f"Neurons left in each block: {[layer.out_features for layer in module.network.up]}")
    print(f"Accuracy: {float(trainer.callback_metrics['val_accuracy']):.1%}")
