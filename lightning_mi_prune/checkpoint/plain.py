"""Whether transformers alone builds a cut network from its config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_graph
from lightning_mi_prune.core.empty_linear import empty_linears
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import CONFIG_FIELD, GRAPH_FIELD
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.surgery.empty_modules import is_cut_forward
from lightning_mi_prune.surgery.parameters import attribute_value

__all__ = ["difference_from_config", "with_layer_fields"]


def difference_from_config(network: Any, changes: Mapping[str, Any] | None = None) -> str | None:
    """What keeps transformers from building a network from its config; None where nothing does.

    The class is built from the config on the meta device. The network must have the same
    parameters and buffers, the same numbers on modules, and no replaced ``forward``.

    Args:
        network: A Hugging Face network; it does not change.
        changes: Fields of the config to set before.

    Returns:
        The first difference, as the end of a sentence.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> net = BertModel(BertConfig(vocab_size=9, intermediate_size=6, **sizes))
        >>> difference_from_config(net) is None
        True
        >>> net.config.intermediate_size = 4
        >>> difference_from_config(net)
        "'encoder.layer.0.intermediate.dense.weight' has shape (6, 8), and (4, 8) by the config"
    """
    for path in empty_linears(network):
        return f"{path!r} has no units left"
    for path, module in network.named_modules():
        if is_cut_forward(vars(module).get("forward")):
            return f"{path!r} runs without some of its units, which no config describes"
    config = copy.deepcopy(network.config)
    for name in (CONFIG_FIELD, GRAPH_FIELD):
        vars(config).pop(name, None)
    try:
        for name, value in (changes or {}).items():
            setattr(config, name, value)
        with torch.device("meta"):
            built = type(network)(config)
    except Exception as error:  # a class may refuse a config with any error
        return f"the class refuses the config ({type(error).__name__}: {str(error)[:200]})"
    return _first_difference(_tensors(network), _tensors(built)) or _odd_number(network, built)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def _first_difference(mine: Mapping[str, Tensor], built: Mapping[str, Tensor]) -> str | None:
    for name, tensor in mine.items():
        if name not in built:
            return f"{name!r} is no tensor of what the config builds"
        if tensor.shape != built[name].shape:
            by_config = tuple(built[name].shape)
            return f"{name!r} has shape {tuple(tensor.shape)}, and {by_config} by the config"
    gone = next((name for name in built if name not in mine), None)
    return None if gone is None else f"{gone!r} is gone, but the config builds it"


def _odd_number(network: nn.Module, built: nn.Module) -> str | None:
    """A number on a module, such as its heads, that differs from that of another network."""
    graph = recorded_graph(network)
    if graph is None:
        return None
    widths = present_plan(network, graph.groups).widths
    for group in graph.groups:
        for number in group.attributes:
            size = layout_size(number.layout, group.all_widths(widths))
            try:
                other = attribute_value(built, number)
            except PruningError:
                other = None
            if other != size:
                where = f"{number.module}.{number.attribute}".lstrip(".")
                return f"{where!r} is {size}, and {other} by the config"
    return None


def with_layer_fields(network: Any) -> dict[int, dict[str, int]] | None:
    """Widths of every layer for ``per_layer_config``, if the class of the network reads them.

    transformers knows configs whose fields differ from layer to layer; most classes do not read
    them. So they are believed only where the class then builds this network.

    Args:
        network: A cut Hugging Face network; it does not change.

    Returns:
        Fields by layer; None where the class does not read them, or they are not enough.
    """
    graph = recorded_graph(network)
    if graph is None or not hasattr(network.config, "per_layer_config"):
        return None
    widths = present_plan(network, graph.groups).widths
    fields: dict[int, dict[str, int]] = {}
    for group in graph.groups:
        places = [int(part) for part in group.name.split(".") if part.isdecimal()]
        for name in () if group.config is None else (group.config, *group.config_aliases):
            if places:
                fields.setdefault(places[0], {})[name] = widths[group.name]
    if not fields or difference_from_config(network, {"per_layer_config": fields}) is not None:
        return None
    return fields
