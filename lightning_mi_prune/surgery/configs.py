"""Configs that a cut may write to."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["own_config"]


def own_config(model: nn.Module, path: str) -> Any:
    """The config of a network; a copy of its own if other networks hold the same object."""
    network = model.get_submodule(path)
    config = getattr(network, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return None
    inside = set(network.modules())
    holders = [part for part in model.modules() if getattr(part, "config", None) is config]
    if any(part not in inside for part in holders):
        config = copy.deepcopy(config)
        for part in holders:
            if part in inside:
                part.config = config
    return config
