"""Prune while training on two processes; here on the CPU, with gloo.

    python examples/ddp.py

On GPUs, or with torchrun or SLURM, only the arguments of the Trainer and the launcher change.
"""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import ViTConfig, ViTForImageClassification

from lightning_mi_prune import MutualInformationPruning


class Classifier(pl.LightningModule):
    """A tiny vision transformer; nothing in it is about pruning."""

    def __init__(self) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=3,
        )
        self.network = ViTForImageClassification(config).train()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss: Tensor = self.network(pixel_values=batch[0], labels=batch[1]).loss
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.training_step(batch, index), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(rows: int = 256) -> DataLoader[tuple[Tensor, ...]]:
    """Noise whose brightest channel is the class; Lightning gives each rank its share."""
    images, labels = torch.randn(rows, 3, 16, 16), torch.arange(rows) % 3
    images[torch.arange(rows), labels] += 1
    return DataLoader(TensorDataset(images, labels), batch_size=32)


def main() -> None:
    """Train; then show that every rank has the same smaller model."""
    pl.seed_everything(0, verbose=False)
    module, pruning = Classifier(), MutualInformationPruning(sparsity=0.5)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=4,
        callbacks=[pruning],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader(), loader())
    assert pruning.plan is not None  # noqa: S101
    weights = sum(float(parameter.detach().double().sum()) for parameter in module.parameters())
    print(f"rank {trainer.global_rank}: plan {pruning.plan.digest()[:12]}, weights {weights:.9f}")


if __name__ == "__main__":
    main()
