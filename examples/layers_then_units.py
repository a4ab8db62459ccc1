"""Remove whole layers, then attention heads and neurons, in one training run.

python examples/layers_then_units.py
"""

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_mi_prune import CKALayerPruning, MutualInformationPruning


class Classifier(pl.LightningModule):
    """A tiny BERT with random weights; nothing in it is about pruning."""

    def __init__(self) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=3,
        )
        self.network = BertForSequenceClassification(config).train()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss: Tensor = self.network(input_ids=batch[0], labels=batch[1]).loss
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loader(rows: int = 512) -> DataLoader[tuple[Tensor, ...]]:
    """Random tokens; the class follows from the second one."""
    tokens = torch.randint(100, (rows, 12))
    return DataLoader(TensorDataset(tokens, tokens[:, 1] % 3), batch_size=64)


def main() -> None:
    """Layers are removed in the first half of the run, units in the second."""
    pl.seed_everything(0, verbose=False)
    layers = CKALayerPruning(threshold=None, target_layers=3)
    units = MutualInformationPruning(sparsity=0.5)
    module = Classifier()
    trainer = pl.Trainer(
        max_epochs=6,
        callbacks=[layers, units],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, loader(), loader())

    for cut in units.report.cuts:  # one report for both callbacks
        for stack in cut.stacks:
            print(f"epoch {cut.epoch}: layers {stack.removed} of {stack.name} removed")
        print(f"epoch {cut.epoch}: {cut.parameters:,} parameters, {cut.macs:,} MACs")
    print(f"{module.network.config.num_hidden_layers} layers are left")


if __name__ == "__main__":
    main()
