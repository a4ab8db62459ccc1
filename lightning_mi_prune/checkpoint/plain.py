"""Whether transformers alone builds a cut network from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_graph
from lightning_mi_prune.core.empty_linear import empty_linears
from lightning_mi_prune.discovery.config_fields import difference_from_config
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.surgery.empty_modules import is_cut_forward
from lightning_mi_prune.surgery.parameters import shapes_at

__all__ = ["why_not_plain", "with_layer_fields"]


def why_not_plain(network: Any, changes: Mapping[str, Any] | None = None) -> str | None:
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
        >>> why_not_plain(net) is None
        True
        >>> net.config.intermediate_size = 4
        >>> why_not_plain(net)
        "'encoder.layer.0.intermediate.dense.weight' has shape (6, 8), and (4, 8) by the config"
    """
    for path in empty_linears(network):
        return f"{path!r} has no units left"
    for path, module in network.named_modules():
        if is_cut_forward(vars(module).get("forward")):
            return f"{path!r} runs without some of its units, which no config describes"
    groups = (recorded_graph(network) or PruningGraph()).groups
    plan = present_plan(network, groups)
    shapes = {name: tuple(shape) for name, shape in shapes_at(network, groups, plan).items()}
    return difference_from_config(network, groups, plan.widths, shapes, changes or {}) or None


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
    if not fields or why_not_plain(network, {"per_layer_config": fields}) is not None:
        return None
    return fields
