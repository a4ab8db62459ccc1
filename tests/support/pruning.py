"""Callbacks from options by their own names: each goes into the record that has it."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from lightning_mi_prune import CKALayerPruning, MutualInformationPruning

__all__ = ["made", "pruning_layers", "pruning_units", "records"]


def records(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a callback, or of a function that takes the same records.

    A name that two records have belongs to the first one; that of another record precedes it.

    Args:
        kind: The class or the function.
        given: Options by name, such as ``{"sparsity": 0.5, "cuts": 2}``.

    Example:
        >>> found = records(MutualInformationPruning, {"cuts": 2, "reconstruction_positions": 64})
        >>> found["schedule"].cuts, found["reconstruction"].positions
        (2, 64)
    """
    parameters = inspect.signature(kind).parameters
    places = {}
    for record, parameter in parameters.items():
        if is_dataclass(parameter.default):
            for field in fields(parameter.default):
                places.setdefault(field.name, (record, field.name))
                places[f"{record}_{field.name}"] = (record, field.name)
    found = {name: value for name, value in given.items() if name not in places}
    parts: dict[str, dict[str, Any]] = {}
    for name in sorted(given.keys() - found.keys()):
        record, field = places[name]
        parts.setdefault(record, {})[field] = given[name]
    return found | {r: type(parameters[r].default)(**values) for r, values in parts.items()}


def made(kind: Any, *positional: Any, **given: Any) -> Any:
    """A callback of a class, from options by their own names."""
    return kind(*positional, **records(kind, given))


pruning_units = partial(made, MutualInformationPruning)
pruning_layers = partial(made, CKALayerPruning)
