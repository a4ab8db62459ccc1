"""A graph as JSON: written whole, read as text of unknown origin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import partial
from typing import Any

from lightning_mi_prune.core.untrusted import (
    LARGEST_TEXT,
    check_nesting,
    described,
    flag,
    listed,
    mapping,
    number,
    read_json,
    reading,
    text,
    whole,
)
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    EmptyForward,
    LayerStack,
    PrunableDim,
    Refusal,
    RotatableProjections,
    SizeAttribute,
    UnitArgument,
)
from lightning_mi_prune.graph.layouts import Layout, layout_from_json, layout_names, layout_size

__all__ = [
    "fields_from_json",
    "fields_to_json",
]

_VERSION = 1
_LARGEST_GROUP = 2**24
_WHAT = "The pruning graph"

Reader = Callable[[Any], Any]


def fields_to_json(values: Mapping[str, Any]) -> str:
    """The fields of a graph as JSON text; fields of records that have their default are left out.

    Example:
        >>> fields_to_json({"groups": (), "unknown": ("einsum in net",)})
        '{"groups": [], "unknown": ["einsum in net"], "version": 1}'
    """
    plain = {name: _plain(value) for name, value in values.items()}
    return json.dumps({**plain, "version": _VERSION}, sort_keys=True, allow_nan=False)


def fields_from_json(given: Any) -> dict[str, Any]:
    """The fields of a graph, checked: every layout fits its tensor and names known groups.

    Args:
        given: Text of :func:`fields_to_json`; it may come from anywhere.

    Raises:
        PruningError: If the text is anything else.

    Example:
        >>> fields_from_json('{"groups": [], "unknown": ["einsum in net"], "version": 1}')
        {'groups': (), 'unknown': ('einsum in net',)}
    """
    body = read_json(given, _WHAT, version=_VERSION, longest=LARGEST_TEXT)
    with reading(_WHAT, "save it again from a model"):
        check_nesting(body)
        found = {name: value for name, value in body.items() if name != "version"}
        graph = _fields(_GRAPH, found)
        for group in graph.get("groups", ()):
            _check_group(group)
        return graph


def _plain(value: Any) -> Any:
    """Records as objects and tuples as lists."""
    if is_dataclass(value):
        named = {field.name: (getattr(value, field.name), field) for field in fields(value)}
        return {
            n: _plain(v) for n, (v, f) in named.items() if f.default is MISSING or v != f.default
        }
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _fields(schema: Mapping[str, Reader], value: Any) -> dict[str, Any]:
    body = mapping(value)
    odd = next((name for name in body if name not in schema), None)
    if odd is not None:
        raise ValueError(f"an entry {described(odd)}; expected {', '.join(schema)}")
    return {name: schema[name](each) for name, each in body.items()}


def _record(kind: type, schema: Mapping[str, Reader]) -> Reader:
    needed = [field.name for field in fields(kind) if field.default is MISSING]

    def read(value: Any) -> Any:
        found = _fields(schema, value)
        lacks = next((name for name in needed if name not in found), None)
        if lacks is not None:
            raise ValueError(f"a {kind.__name__} without {lacks!r}")
        return kind(**found)

    return read


def _many(read: Reader) -> Reader:
    return lambda value: tuple(read(each) for each in listed(value))


def _pair(first: Reader, second: Reader) -> Reader:
    def read(value: Any) -> tuple[Any, Any]:
        left, right = listed(value, 2)
        return first(left), second(right)

    return read


def _or_none(read: Reader) -> Reader:
    return lambda value: None if value is None else read(value)


def _scalar(value: Any) -> Any:
    """An entry of a config's list: text, a number, a flag or nothing."""
    if value is None or isinstance(value, bool):
        return value
    return text(value) if isinstance(value, str) else (number(value), value)[1]


def _positive(layout: Layout) -> bool:
    return all(
        _positive(factor) if isinstance(factor, tuple) else isinstance(factor, str) or factor > 0
        for block in layout
        for factor in block
    )


def _check_group(group: DependencyGroup) -> None:
    """Layouts name the group or its partners, and have the size of their dimension."""
    widths = group.all_widths({})
    layouts = [s.layout for s in group.tensors] + [a.layout for a in group.attributes]
    layouts += [layout for _, layout in group.config_sizes]
    for layout in layouts:
        odd = next((name for name in layout_names(layout) if name not in widths), None)
        if odd is not None:
            raise ValueError(f"{described(group.name)} names {described(odd)}, which is no partner")
        if not _positive(layout):
            raise ValueError(f"{described(group.name)} has a layout with a factor of 0")
    for s in group.tensors:
        size = layout_size(s.layout, widths)
        if s.dim >= len(s.shape) or s.shape[s.dim] != size:
            raise ValueError(
                f"the layout of {described(s.tensor)} along dimension {s.dim} has "
                f"{described(size)} entries, its shape is {described(s.shape)}"
            )


_NAMES = _many(text)
_SIZE = partial(whole, high=_LARGEST_GROUP, low=1)
_DIM = partial(whole, high=16)

_TENSOR = _record(
    PrunableDim,
    {
        "tensor": text,
        "dim": _DIM,
        "shape": _many(whole),
        "layout": layout_from_json,
        "buffer": flag,
    },
)
_ATTRIBUTE = _record(
    SizeAttribute,
    {"module": text, "attribute": text, "layout": layout_from_json, "sequence": flag},
)
_EMPTY = _record(
    EmptyForward,
    {
        "module": text,
        "projections": _NAMES,
        "consumer": _or_none(text),
        "dropout": _or_none(text),
        "norm": _or_none(text),
        "pair": flag,
    },
)
_ROTATION = _record(
    RotatableProjections,
    {"query": text, "key": text, "value": text, "consumer": text, "rescaled": flag},
)
_GROUP = _record(
    DependencyGroup,
    {
        "name": text,
        "kind": text,
        "size": _SIZE,
        "tensors": _many(_TENSOR),
        "consumers": _NAMES,
        "attributes": _many(_ATTRIBUTE),
        "network": text,
        "scope": text,
        "config": _or_none(text),
        "level": partial(whole, low=-(2**31)),
        "consumers_by_input": _many(_NAMES),
        "residual": _or_none(text),
        "above": _NAMES,
        "norms": _NAMES,
        "empty_forward": _many(_EMPTY),
        "may_be_empty": flag,
        "unit_arguments": _many(
            _record(UnitArgument, {"module": text, "argument": text, "dim": _DIM})
        ),
        "tie": _or_none(text),
        "config_aliases": _NAMES,
        "config_sizes": _many(_pair(text, layout_from_json)),
        "partners": _many(_pair(text, _SIZE)),
        "rotation": _or_none(_ROTATION),
        "current_name": text,
        "multiple": partial(whole, high=_LARGEST_GROUP, low=1),
    },
)
_STACK = _record(
    LayerStack,
    {
        "name": text,
        "size": _SIZE,
        "fixed": whole,
        "config_fields": _many(_pair(text, text)),
        "config_lists": _many(_pair(text, _many(_scalar))),
        "index_attributes": _NAMES,
        "residual_branches": _many(_pair(text, text)),
        "final_norm": text,
        "network": text,
        "scope": text,
    },
)
_GRAPH: dict[str, Reader] = {
    "groups": _many(_GROUP),
    "stacks": _many(_STACK),
    "refused": _many(
        _record(
            Refusal,
            {"name": text, "kind": text, "size": whole, "parameters": whole, "reason": text},
        )
    ),
    "unknown": _NAMES,
    "parameters": partial(whole, high=2**60),
    "reachable": partial(whole, high=2**60),
}
