"""An ordinary LightningModule around a Hugging Face classifier; it knows nothing of pruning."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoModelForSequenceClassification

from examples.text_classification.packaged import model_path
from lightning_mi_prune import from_pretrained

Batch = dict[str, Tensor]


class TextClassifier(pl.LightningModule):
    """Fine-tunes an encoder with a classification head.

    Args:
        model: "minilm-l6", "mpnet-base", a folder (a pruned one too) or a name on the Hugging Face
            hub.
        num_classes: Number of classes; the command line takes it from the data.
        learning_rate: Highest learning rate; it warms up, then falls to 0 in a straight line.
        weight_decay: Decay of AdamW.
        warmup_fraction: Share of the steps that warm up.
    """

    def __init__(
        self,
        model: str = "minilm-l6",
        num_classes: int = 2,
        learning_rate: float = 5e-5,
        weight_decay: float = 0.01,
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = from_pretrained(
            AutoModelForSequenceClassification, model_path(model), num_labels=num_classes
        )
        self.network.train()
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        output = self.network(**batch)
        self.log("train_loss", output.loss, prog_bar=True)
        loss: Tensor = output.loss
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_accuracy(self.network(**batch).logits, batch["labels"])
        self.log("val_accuracy", self.val_accuracy, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_accuracy(self.network(**batch).logits, batch["labels"])
        self.log("test_accuracy", self.test_accuracy)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self.network(**inputs).logits
        return logits.softmax(-1)

    def configure_optimizers(self) -> Any:
        args: Any = self.hparams
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=args.learning_rate, weight_decay=args.weight_decay, fused=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = max(1, int(args.warmup_fraction * steps))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / warmup, max(0.0, (steps - step) / max(1, steps - warmup))
            ),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
