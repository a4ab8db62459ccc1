"""Fashion-MNIST, a residual network and a vision transformer for it, and their training."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

__all__ = [
    "BATCH",
    "EPOCHS",
    "HELD_OUT",
    "RECIPES",
    "STEPS",
    "Batch",
    "Classifier",
    "Pictures",
    "Recipe",
    "ResNet",
    "fashion_mnist",
    "held_out",
    "in_batches",
    "training_batches",
]

Batch = dict[str, Tensor]

BATCH = 64
EPOCHS, STEPS = 8, 100  # an epoch is so many steps: validation and cuts come between epochs
HELD_OUT = 2048  # of the training pictures, for validation and calibration
ROWS = 500  # in a batch without gradients

# ------------------------------------------------------------------------------------------- data

VARIABLE, FOLDER = "FASHION_MNIST", "/usr/share/datasets/fashion-mnist"
NAMES = MappingProxyType({"train": "train", "test": "t10k"})
MEAN, DEVIATION = 0.286, 0.353  # of the training pixels


class Pictures(NamedTuple):
    """Pictures and their classes.

    Args:
        pixels: ``(pictures, 1, height, width)``, about standardized.
        labels: ``(pictures,)``.
    """

    pixels: Tensor
    labels: Tensor

    def at(self, places: Any) -> Pictures:
        """Some of the pictures."""
        return Pictures(self.pixels[places], self.labels[places])

    def batch(self, places: Any) -> Batch:
        """Some of the pictures, as arguments of a network."""
        return {"pixel_values": self.pixels[places], "labels": self.labels[places]}


@cache
def fashion_mnist(split: str) -> Pictures:
    """The 60,000 pictures of ``"train"`` or the 10,000 of ``"test"``, 28 x 28 (Xiao et al. 2017).

    The folder is the environment variable FASHION_MNIST, or where Debian's package puts them.

    Raises:
        FileNotFoundError: If a file is not there; the message says how to get it.
    """
    pixels = _idx(f"{NAMES[split]}-images", 3).reshape(-1, 1, 28, 28)
    return Pictures((pixels / 255 - MEAN) / DEVIATION, _idx(f"{NAMES[split]}-labels", 1).long())


def _idx(name: str, dims: int) -> Tensor:
    """The bytes of an IDX file, with or without gzip, under any of its usual names."""
    folder = Path(os.environ.get(VARIABLE, FOLDER))
    names = [f"{name}{dot}idx{dims}-ubyte" for dot in "-."]
    found = [path for n in names for path in (folder / f"{n}.gz", folder / n) if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder} has no {names[0]}.gz; run `apt-get install dataset-fashion-mnist`, or set "
            f"{VARIABLE} to a folder with the four IDX files of "
            "https://github.com/zalandoresearch/fashion-mnist."
        )
    raw = found[0].read_bytes()
    raw = gzip.decompress(raw) if found[0].suffix == ".gz" else raw
    return torch.frombuffer(bytearray(raw[4 + 4 * dims :]), dtype=torch.uint8)


class _Steps(Sampler[Tensor]):
    """Which pictures every step of an epoch trains on: orders of all of them, one after another.

    A pass over the pictures need not be an epoch, and the same seed gives the same batches whatever
    else draws random numbers.
    """

    def __init__(self, pictures: int, steps: int, seed: int) -> None:
        self.pictures, self.steps, self.seed, self.epoch = pictures, steps, seed, 0

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int) -> None:  # called by Lightning
        self.epoch = epoch

    def _order(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000 * self.seed + number)
        return torch.randperm(self.pictures, generator=generator)

    def __iter__(self) -> Iterator[Tensor]:
        start = self.epoch * self.steps * BATCH
        end = start + self.steps * BATCH
        first, last = start // self.pictures, (end - 1) // self.pictures
        orders = torch.cat([self._order(number) for number in range(first, last + 1)])
        yield from orders[start - first * self.pictures :][: end - start].view(-1, BATCH)


class _Batches(Dataset[Batch]):
    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures

    def __getitem__(self, places: Any) -> Batch:
        return self.pictures.batch(places)


def held_out(seed: int) -> tuple[Pictures, Pictures]:
    """The training pictures, split by seed: for training, and for validation and calibration."""
    every = fashion_mnist("train")
    order = torch.randperm(len(every.labels), generator=torch.Generator().manual_seed(seed))
    size = min(HELD_OUT, len(order) // 2)
    return every.at(order[size:]), every.at(order[:size])


def training_batches(pictures: Pictures, seed: int) -> DataLoader[Batch]:
    """An endless shuffling of pictures, in epochs of so many steps."""
    sampler = _Steps(len(pictures.labels), STEPS, seed)
    return DataLoader(_Batches(pictures), batch_size=None, sampler=sampler)


def in_batches(pictures: Pictures, rows: int = ROWS) -> list[Batch]:
    """All pictures, in order."""
    return [pictures.batch(slice(at, at + rows)) for at in range(0, len(pictures.labels), rows)]


# --------------------------------------------------------------------------------------- networks


class Block(nn.Module):
    """Two convolutions that add to their input (He et al. 2016, "basic")."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if inputs == width else _projection(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(pictures, inputs, height, width)``."""
        added = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        total: Tensor = self.shortcut(x) + added
        return total.relu()


def _projection(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))


class ResNet(nn.Module):
    """A ResNet-20 with a stem of stride 2, so that a core trains it in minutes.

    Args:
        widths: Channels of every stage.
        depth: Blocks of every stage.
    """

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64), depth: int = 3) -> None:
        super().__init__()
        stem = nn.Conv2d(1, widths[0], 3, 2, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())
        before = (widths[0], *widths)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    Block(width if n else before[stage], width, 1 if n or not stage else 2)
                    for n in range(depth)
                )
            )
            for stage, width in enumerate(widths)
        )
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the loss where there are labels."""
        x = self.stem(pixel_values)
        for stage in self.stages:
            x = stage(x)
        logits = self.classifier(x.mean((2, 3)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def vit(width: int = 64, layers: int = 6, patch: int = 7) -> nn.Module:
    """A vision transformer of patches of 7 x 7 pixels, 4 heads and neurons of 4 widths."""
    config = ViTConfig(
        image_size=28,
        patch_size=patch,
        num_channels=1,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=4 * width,
        num_labels=10,
        initializer_range=0.1,  # about the root of 1 / width; a fifth of it learns much slower
    )
    network: nn.Module = ViTForImageClassification(config)
    return network


# --------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Recipe:
    """How a network is built and trained.

    Args:
        build: Builds it with random weights.
        optimizer: Of its parameters and a learning rate.
        learning_rate: Highest learning rate; it warms up over a seventh of the steps and falls
            along a cosine.
    """

    build: Callable[[], nn.Module]
    optimizer: Callable[..., torch.optim.Optimizer]
    learning_rate: float


RECIPES: Mapping[str, Recipe] = {
    "resnet": Recipe(
        ResNet, partial(torch.optim.SGD, momentum=0.9, nesterov=True, weight_decay=5e-4), 0.2
    ),
    "vit": Recipe(vit, partial(torch.optim.AdamW, weight_decay=0.05), 2e-3),
}


class Classifier(pl.LightningModule):
    """A network in training; nothing in it is about pruning.

    Args:
        recipe: How to build and train it.
        steps: Steps of the whole training.
    """

    def __init__(self, recipe: Recipe, steps: int) -> None:
        super().__init__()
        self.recipe, self.steps, self.network = recipe, steps, recipe.build()

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The cross-entropy."""
        loss: Tensor = self.network(**batch).loss
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        """Only run: the callbacks calibrate meanwhile."""
        self.network(**batch)

    def configure_optimizers(self) -> Any:
        """The optimizer, and a learning rate that changes with every step."""
        optimizer = self.recipe.optimizer(self.network.parameters(), self.recipe.learning_rate)
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.recipe.learning_rate, total_steps=self.steps, pct_start=1 / 7
        )
        return [optimizer], [{"scheduler": cycle, "interval": "step"}]
