"""What a model of the zoo is: a name, how it is built offline, and an example of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Inputs", "ZooModel", "image", "randomized", "tokens"]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call.

    Args:
        args: Positional ones.
        kwargs: Named ones.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    Args:
        name: Unique name.
        library: ``"transformers"``, ``"torchvision"``, ``"timm"`` or ``"torch"``.
        build: Builds it with random weights.
        inputs: Two examples for one call.
        note: What differs from the model of that name, such as fewer layers.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    note: str = ""


def tokens(length: int = 7, vocabulary: int = 99) -> Tensor:
    """Two rows of token numbers from 5, as special ones lie below."""
    return torch.randint(5, vocabulary, (2, length))


def image(size: int = 32, channels: int = 3) -> Tensor:
    """Two random images."""
    return torch.randn(2, channels, size, size)


@torch.no_grad()
def randomized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give a model weights that let every unit matter, in evaluation mode.

    Libraries start biases at 0, scales at 1 (or 1e-6) and matrices so small that a wrong cut
    could hide below a tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.empty(parameter.shape).normal_(generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / (parameter.numel() / parameter.shape[0]) ** 0.5)
        elif parameter.abs().max() < 0.01:  # a bias, or a scale that starts at almost nothing
            parameter.copy_(0.1 * noise)
        else:
            parameter.add_(0.1 * noise)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.empty(buffer.shape).normal_(generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(0.5 + torch.empty(buffer.shape).uniform_(generator=generator))
    return model.eval()
