"""A small modelling file for folders of pruned models, for ``trust_remote_code=True``.

It needs transformers and torch only: the config beside it lists the shapes and numbers that differ
from those that the class builds.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from lightning_mi_prune.checkpoint.plain import set_shapes
from lightning_mi_prune.core.errors import PruningError, require
from lightning_mi_prune.core.plan import MODEL_TYPE, PARTS_FIELD
from lightning_mi_prune.surgery.empty_modules import forward_without_units
from lightning_mi_prune.surgery.parameters import set_number

__all__ = ["CODE_FILE", "code_fields", "code_of"]

CODE_FILE = "modeling_pruned.py"


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
            field=PARTS_FIELD,
            functions=[
                inspect.getsource(function)
                for function in (forward_without_units, set_number, set_shapes)
            ],
        )
    )


def code_fields(network: Any, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the config beside the modelling file.

    Args:
        network: A cut Hugging Face network.
        parts: Its :func:`~lightning_mi_prune.checkpoint.plain.parts_of`.
    """
    text = json.dumps(parts, separators=(",", ":"))
    return {"auto_map": _auto_map(network), PARTS_FIELD: text}


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
