"""A small LightningModule around a tiny BERT, and data that can be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.support.models import build


class Sentences(Dataset):
    """Random tokens; the label is what the second token says."""

    def __init__(self, rows: int, *, length: int = 12, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(2, 64, (rows, length), generator=generator)
        self.labels = self.ids[:, 1] % 3

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": self.labels[index],
        }


class Classifier(pl.LightningModule):
    """An ordinary module: it knows nothing of pruning."""

    def __init__(
        self,
        *,
        optimizer: Callable[..., Any] = torch.optim.AdamW,
        lr: float = 1e-3,
        validation_rows: int = 256,
        family: str = "bert",
    ) -> None:
        super().__init__()
        self.model = build(family)
        self.optimizer, self.lr, self.rows = optimizer, lr, validation_rows

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch).loss

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), lr=self.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(Sentences(64), batch_size=16, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Sentences(self.rows, seed=1), batch_size=64)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Sentences(64, seed=2), batch_size=64)


def trainer(*callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**{**defaults, **options}, callbacks=list(callbacks))


class Data(pl.LightningDataModule):
    """The same data as a DataModule."""

    def __init__(self, rows: int = 256) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Sentences(64), batch_size=16)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Sentences(self.rows, seed=1), batch_size=64)
