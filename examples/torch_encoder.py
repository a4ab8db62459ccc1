"""Prune torch's own nn.TransformerEncoder: feed-forward neurons and attention heads.

python examples/torch_encoder.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi_prune import MutualInformationPruning

Loader = DataLoader[tuple[Tensor, ...]]


class Classifier(pl.LightningModule):
    """Reads tokens; nothing in it is about pruning."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            32, nhead=4, dim_feedforward=128, batch_first=True, norm_first=True
        )
        self.embedding = nn.Embedding(50, 32)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)).mean(1))
        return logits

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def loader(rows: int = 2048) -> Loader:
    """Random tokens; the class is the one of five tokens that occurs most often."""
    tokens = torch.randint(50, (rows, 12))
    counts = torch.stack([(tokens % 5 == label).sum(1) for label in range(5)], 1)
    return DataLoader(TensorDataset(tokens, counts.argmax(1)), batch_size=64)


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
    module, pruning = Classifier(), MutualInformationPruning(sparsity=0.5)
    train, held_out = loader(), loader()
    before = fit(module, train, held_out)
    after = fit(module, train, held_out, pruning)
    print(pruning.graph)
    print(f"before: {before}")
    print(f"after:  {after}")
