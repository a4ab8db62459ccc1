"""A small modelling file for folders of pruned models, for ``trust_remote_code=True``.

It needs transformers and torch only: the config beside it lists the shapes and numbers that differ
from those that the class builds.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from typing import Any

from torch import Tensor, nn

from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_graph
from lightning_mi_prune.core.empty_linear import empty_linears, parameters_of
from lightning_mi_prune.core.errors import PruningError, require
from lightning_mi_prune.core.plan import MODEL_TYPE
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.surgery.empty_modules import forward_without_units
from lightning_mi_prune.surgery.parameters import number_steps, set_number

__all__ = ["CODE_FILE", "code_fields", "code_of"]

CODE_FILE = "modeling_pruned.py"
_FIELD = "pruned_parts"


def code_of(network: Any) -> str:
    """The modelling file of a network.

    Args:
        network: A cut Hugging Face network of a class of transformers.

    Raises:
        PruningError: If its class or config is not of transformers.
    """
    jinja2 = require("jinja2", "transformers")
    text = resources.files(__package__).joinpath("modeling.py.jinja").read_text(encoding="utf-8")
    template = jinja2.Template(text, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return str(
        template.render(
            config=_name(type(network.config)),
            classes=[_name(found) for found in _classes(network)],
            model_type=MODEL_TYPE,
            field=_FIELD,
            functions=[
                inspect.getsource(function) for function in (forward_without_units, set_number)
            ],
        )
    )


def code_fields(network: Any) -> dict[str, Any]:
    """Fields of the config beside the modelling file.

    Args:
        network: A cut Hugging Face network.
    """
    graph = recorded_graph(network) or PruningGraph()
    plan = present_plan(network, graph.groups)
    widths = plan.widths
    numbers = [
        [n.module, number_steps(n), layout_size(n.layout, group.all_widths(widths))]
        for group in graph.groups
        for n in group.attributes
    ]
    shapes = {name: list(tensor.shape) for name, tensor in _tensors(network).items()}
    arguments = [
        asdict(argument) | {"kept": list(plan.kept[group.name])}
        for group in graph.groups
        for argument in group.unit_arguments
        if widths[group.name] < group.size
    ]
    return {
        "auto_map": _auto_map(network),
        _FIELD: {
            "shapes": shapes,
            "numbers": numbers,
            "empty": sorted(empty_linears(network)),
            "forwards": [
                asdict(forward)
                for group in graph.groups
                for forward in group.empty_forward
                if not widths[group.name]
            ],
            "arguments": arguments,
        },
    }


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**parameters_of(network), **dict(network.named_buffers(remove_duplicate=False))}


def _name(found: type) -> str:
    if not found.__module__.startswith("transformers."):
        raise PruningError(
            f"code=True needs a class of transformers, but {found.__qualname__} is of "
            f"{found.__module__}; expected one that the modelling file can import. Leave code out, "
            "and open the folder with lightning_mi_prune.from_pretrained."
        )
    return found.__name__


def _classes(network: Any) -> list[type]:
    """The class of a network, and that of its base model."""
    base = getattr(network, network.base_model_prefix, None)
    return [type(network), *([] if base in (None, network) else [type(base)])]


def _autos(config: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Auto classes by name, with the classes that each of them opens for a config."""
    modeling_auto = require("transformers.models.auto.modeling_auto", "transformers")
    for name in modeling_auto.__all__:
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is not None and type(config) in mapping:
            found = mapping[type(config)]
            yield name, found if isinstance(found, tuple) else (found,)


def _auto_map(network: Any) -> dict[str, str]:
    module = CODE_FILE.removesuffix(".py")
    found = {"AutoConfig": f"{module}.PrunedConfig"}
    for name, classes in _autos(network.config):
        for each in _classes(network):
            if each in classes:
                found[name] = f"{module}.Pruned{each.__name__}"
    return found
