"""What transformers builds of a cut network from its config, and what has to be set then."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_graph
from lightning_mi_prune.core.empty_linear import empty_linears, parameters_of, place_linears
from lightning_mi_prune.core.plan import CONFIG_FIELD, GRAPH_FIELD, PARTS_FIELD
from lightning_mi_prune.core.untrusted import LARGEST_TEXT
from lightning_mi_prune.discovery.config_fields import built_from_config, difference_from_config
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import EmptyForward
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.surgery.configs import config_numbers, config_value
from lightning_mi_prune.surgery.empty_modules import is_cut_forward, set_forward_without_units
from lightning_mi_prune.surgery.parameters import number_steps, set_number, shapes_at
from lightning_mi_prune.surgery.tensors import is_saved

__all__ = [
    "parts_of",
    "set_parts",
    "set_shapes",
    "why_not_plain",
    "with_layer_fields",
]


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


def parts_of(network: Any, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What differs between a network and what its class builds from its config, as plain data.

    Args:
        network: A cut Hugging Face network.
        changes: Fields that its config will have in its file.

    Returns:
        Shapes of all tensors, numbers on modules, and modules that run otherwise. Where nothing
        depends on the units themselves, also what :func:`set_parts` believes them by: the class,
        the sizes in the config, and a digest of plan and graph.
    """
    graph = recorded_graph(network) or PruningGraph()
    plan = present_plan(network, graph.groups)
    widths = plan.widths
    numbers = [
        [n.module, number_steps(n), layout_size(n.layout, group.all_widths(widths))]
        for group in graph.groups
        for n in group.attributes
    ]
    arguments = [
        asdict(argument) | {"kept": list(plan.kept[group.name])}
        for group in graph.groups
        for argument in group.unit_arguments
        if widths[group.name] < group.size
    ]
    forwards = [
        asdict(forward)
        for group in graph.groups
        for forward in group.empty_forward
        if not widths[group.name]
    ]
    parts: dict[str, Any] = {
        "shapes": {name: list(tensor.shape) for name, tensor in _tensors(network).items()},
        "numbers": numbers,
        "empty": sorted(empty_linears(network)),
        "forwards": forwards,
        "arguments": arguments,
    }
    return parts | _believed_by(network, graph, widths, parts, changes or {})


def _believed_by(
    network: Any,
    graph: PruningGraph,
    widths: Mapping[str, int],
    parts: Mapping[str, Any],
    changes: Mapping[str, Any],
) -> dict[str, Any]:
    """What :func:`set_parts` compares; nothing where shapes and numbers are not all."""
    attention = any(isinstance(module, nn.MultiheadAttention) for module in network.modules())
    saved = all(is_saved(network, s.tensor) for group in graph.groups for s in group.tensors)
    if attention or not saved or parts["arguments"]:
        return {}
    made = built_from_config(network, changes)
    if made is None:
        return {}
    built = {name: list(tensor.shape) for name, tensor in _tensors(made).items()}
    return {
        "built": {n: shape for n, shape in built.items() if shape != parts["shapes"].get(n)},
        "class": type(network).__name__,
        "config": config_numbers(graph.groups, widths),
        "digest": _digest(network.config),
    }


def set_parts(network: Any, config: Any) -> bool:
    """Give a network, as its class builds it from a config, the shapes and numbers recorded there.

    They are believed only beside the plan and the graph that they were resolved from. The config
    may come from anywhere: tensors and numbers only become smaller, and nothing else is set.

    Args:
        network: The network, without its weights.
        config: Its config.

    Returns:
        Whether that was all; where not, the network must not be used.
    """
    parts = _read(getattr(config, PARTS_FIELD, None))
    if parts is None or parts.get("digest") != _digest(config):
        return False
    if parts.get("class") != type(network).__name__:
        return False
    sizes, shapes, built = (parts.get(name) for name in ("config", "shapes", "built"))
    if not isinstance(sizes, Mapping) or not isinstance(shapes, Mapping):
        return False
    if not isinstance(built, Mapping):
        return False
    if any(config_value(config, str(name)) != size for name, size in sizes.items()):
        return False
    found = {name: list(tensor.shape) for name, tensor in _tensors(network).items()}
    # Another number of labels, say, builds another network than the one that was saved.
    if shapes.keys() != found.keys() or {**shapes, **built} != found:
        return False
    if not all(_is_within(shapes[name], shape) for name, shape in found.items()):
        return False
    modules = dict(network.named_modules(remove_duplicate=False))
    lists = (parts.get(name) for name in ("numbers", "empty", "forwards"))
    numbers, empty, forwards = (_listed(found) for found in lists)
    if not all(isinstance(path, str) and path in modules for path in empty):
        return False
    for entry in numbers:
        if not isinstance(entry, list) or len(entry) != 3 or entry[0] not in modules:
            return False
        path, steps, value = entry
        now = _number(modules[path], steps)
        if not _is_within([value], [now]):
            return False
        if value != now:
            set_number(modules[path], steps, value)
    replaced = [_forward_of(fields, modules) for fields in forwards]
    set_shapes(network, shapes)
    place_linears(network, empty)
    for each in replaced:
        if each is None:
            return False
        set_forward_without_units(network, each)
    return True


def set_shapes(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Replace the tensors of a network that have another shape; their values are not set.

    Args:
        network: The network.
        shapes: Shapes by name; tensors without one stay.
    """
    for path, module in list(network.named_modules()):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in list(tensors.items()):
                size = shapes.get(f"{path}.{name}" if path else name)
                if tensor is not None and size is not None and list(tensor.shape) != size:
                    new = torch.empty(size, dtype=tensor.dtype, device=tensor.device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(new) if is_parameter else new


def _read(text: Any) -> Mapping[str, Any] | None:
    if not isinstance(text, str) or len(text) > LARGEST_TEXT:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, Mapping) else None


def _digest(config: Any) -> str:
    """SHA-256 of the plan and the graph in a config."""
    texts = [str(getattr(config, name, None)) for name in (CONFIG_FIELD, GRAPH_FIELD)]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**parameters_of(network), **dict(network.named_buffers(remove_duplicate=False))}


def _is_within(given: Any, most: Sequence[Any]) -> bool:
    """Whether these are as many whole numbers, from 0 to others."""
    return (
        isinstance(given, list)
        and len(given) == len(most)
        and all(
            type(m) is int and type(n) is int and 0 <= n <= m
            for n, m in zip(given, most, strict=True)
        )
    )


def _number(owner: Any, steps: Any) -> Any:
    """The number at the end of some steps; None where there is none, or a step is private."""
    for step in steps if isinstance(steps, list) and steps else [None]:
        if type(step) is int and isinstance(owner, (list, tuple)) and 0 <= step < len(owner):
            owner = owner[step]
        elif isinstance(step, str) and step.isidentifier() and not step.startswith("_"):
            owner = getattr(owner, step, None)
        else:
            return None
    return owner


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [None]  # which no check below lets pass


def _forward_of(fields: Any, modules: Mapping[str, nn.Module]) -> EmptyForward | None:
    """A replacement of modules that are there, from a file; None for anything else."""
    names = {field.name for field in dataclass_fields(EmptyForward)}
    if not isinstance(fields, Mapping) or fields.keys() != names:
        return None
    inside = fields["projections"]
    if not isinstance(inside, list) or type(fields["pair"]) is not bool:
        return None
    others = [fields[name] for name in ("consumer", "dropout", "norm")]
    paths = [fields["module"], *inside, *(path for path in others if path is not None)]
    if not all(isinstance(path, str) and path in modules for path in paths):
        return None
    if not all(path.startswith(f"{paths[0]}.") for path in paths[1:]):
        return None
    return EmptyForward(**{**fields, "projections": tuple(inside)})
