"""Hints for model types of transformers: what a recorded call cannot show of their attention.

A hint is a claim like any other: it is used only where the cut copy passes verification with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_mi_prune.graph.groups import UnitArgument, join_path

__all__ = [
    "HINTS",
    "Hint",
    "hint_for",
    "unit_arguments",
    "why_layers_stay",
]


@dataclass(frozen=True)
class Hint:
    """What is known of the attention of a model type, whose ``forward`` returns (output, weights).

    Args:
        dropout: Name of the dropout of its output, if the attention module itself calls it.
        norm: Name of the normalisation of output plus input, if the attention module calls it.
        argument: Argument of the attention module with an entry for every head as built. It is
            computed once for all layers, so a layer that lost heads selects its entries.
    """

    dropout: str | None = None
    norm: str | None = None
    argument: str | None = None


# Without a hint, attention keeps a head: what else a module does beside it is not known.
HINTS: Mapping[str, Hint] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "distilbert"), Hint()),
    **dict.fromkeys(("deberta-v2", "vit", "deit"), Hint()),
    "albert": Hint(dropout="output_dropout", norm="LayerNorm"),
    "mpnet": Hint(argument="position_bias"),
}


def hint_for(network: nn.Module) -> Hint | None:
    """The hint for a network; None for decoders, whose caches count the positions by their heads.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1}
        >>> hint_for(BertModel(BertConfig(vocab_size=50, **sizes)))
        Hint(dropout=None, norm=None, argument=None)
        >>> hint_for(nn.Linear(4, 2)) is None
        True
    """
    config: Any = getattr(network, "config", None)
    if getattr(config, "is_decoder", False):
        return None
    return HINTS.get(str(getattr(config, "model_type", None)))


def why_layers_stay(network: nn.Module) -> str:
    """Why no layer of a network can be removed; "" where nothing is known against it.

    Example:
        >>> why_layers_stay(nn.Linear(4, 2))
        ''
    """
    if getattr(getattr(network, "config", None), "scale_attn_by_inverse_layer_idx", False):
        return (
            "attention is scaled by the index of a layer, so a shorter model that is built from "
            "its config differs; set scale_attn_by_inverse_layer_idx=False"
        )
    return ""


def unit_arguments(module: nn.Module) -> dict[str, UnitArgument]:
    """Arguments with an entry for every head, by the path of the innermost module that has them.

    Example:
        >>> from transformers import MPNetConfig, MPNetModel
        >>> sizes = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 1}
        >>> net = MPNetModel(MPNetConfig(vocab_size=50, **sizes))
        >>> [(path, found.argument) for path, found in unit_arguments(net).items()]
        [('encoder.layer.0.attention.attn', 'position_bias')]
    """
    found: dict[str, UnitArgument] = {}
    for top, network in module.named_modules():
        hint = hint_for(network)
        if hint is None or hint.argument is None or not hasattr(network, "base_model_prefix"):
            continue
        for path, part in network.named_modules():
            inside = (p for name, p in part.named_modules() if name)
            if _takes(part, hint.argument) and not any(_takes(p, hint.argument) for p in inside):
                where = join_path(top, path)
                found[where] = UnitArgument(where, hint.argument)
    return found


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters
