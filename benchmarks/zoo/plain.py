"""Networks without a library: torch's own encoder, and some written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.zoo.models import Inputs, ZooModel, image

__all__ = ["plain_models"]


class Flattened(nn.Module):
    """Convolutions, then a flattened map of features and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 20, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(20 * 64, 40), nn.ReLU(), nn.Linear(40, 10)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.classifier(self.features(pixels))
        return out


class Concatenated(nn.Module):
    """Two maps of features in one, with a normalisation over both."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(20)
        self.third = nn.Conv2d(20, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        first = self.first(pixels).relu()
        second = self.second(first).relu()
        out: Tensor = self.head(self.third(self.norm(torch.cat([first, second], 1))).mean((2, 3)))
        return out


class Recurrent(nn.Module):
    """An LSTM with a linear layer before and two after it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(8, 12)
        self.cells = nn.LSTM(12, 16, batch_first=True)
        self.after = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, series: Tensor) -> Tensor:
        out: Tensor = self.after(self.cells(self.before(series))[0][:, -1])
        return out


class Pooled(nn.Module):
    """torch's own encoder with a head on the mean over positions."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(96, 6, 176, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(96, 10)

    def forward(self, sequence: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(sequence).mean(1))
        return out


class Translator(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Transformer(96, 6, 1, 1, 176, batch_first=True)
        self.head = nn.Linear(96, 30)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        out: Tensor = self.head(self.network(source, target))
        return out


def _random(*shape: int) -> Inputs:
    return Inputs((torch.randn(shape),))


def _images() -> Inputs:
    return Inputs((image(),))


def _sequences() -> Inputs:
    return Inputs((torch.randn(2, 7, 96), torch.randn(2, 5, 96)))


def _bare() -> nn.Module:
    layer = nn.TransformerEncoderLayer(96, 6, 176, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def plain_models() -> Iterator[ZooModel]:
    """All networks without a library."""
    sequence = partial(_random, 2, 7, 96)
    yield ZooModel("nn.TransformerEncoder", "torch", _bare, sequence)
    for norm_first in (False, True):
        name = f"nn.TransformerEncoder-head{'-pre-norm' if norm_first else ''}"
        yield ZooModel(name, "torch", partial(Pooled, norm_first=norm_first), sequence)
    yield ZooModel("nn.Transformer", "torch", Translator, _sequences)
    yield ZooModel("cnn-flatten", "torch", Flattened, _images)
    yield ZooModel("cnn-concat", "torch", Concatenated, _images)
    yield ZooModel("lstm", "torch", Recurrent, partial(_random, 2, 5, 8))
