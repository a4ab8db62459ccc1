"""Configs that a cut may write to: copies of their own, for a config belongs to who made it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["own_config"]


def own_config(model: nn.Module, path: str) -> Any:
    """The config of a network, copied, so that no config the user holds is ever changed.

    The copies take the place of the originals in the network and in the modules that hold it; what
    a config shares with another (that of an encoder inside that of the whole) stays shared.

    Args:
        model: Module from which the network is named.
        path: Path of the network.

    Returns:
        The copy, or None if the network has no config.
    """
    memo: dict[int, Any] = {}
    for part in _holders(model, path):
        config = getattr(part, "config", None)
        if hasattr(config, "to_dict"):
            setattr(part, "config", copy.deepcopy(config, memo))  # noqa: B010  # typed by torch
    config = getattr(model.get_submodule(path), "config", None)
    return config if hasattr(config, "to_dict") else None


def _holders(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules that lead to a network, and all that are inside."""
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        yield model.get_submodule(".".join(parts[:depth]))
    yield from model.get_submodule(path).modules()
