"""Groups of Hugging Face encoders, from one table of names per family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.discovery.families.describe import linear_group
from lightning_mi_prune.discovery.families.names import FamilyNames, LayerNames
from lightning_mi_prune.discovery.families.residual import hidden_group, module_at, state_consumers
from lightning_mi_prune.discovery.families.text import TEXT
from lightning_mi_prune.discovery.families.vision import VISION
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    EmptyForward,
    RotatableProjections,
    SizeAttribute,
    UnitArgument,
)
from lightning_mi_prune.graph.layouts import Factor

__all__ = [
    "MODEL_TYPES",
    "describe",
    "first_unknown",
    "matches",
]

MODEL_TYPES: dict[str, FamilyNames] = {**TEXT, **VISION}


@dataclass(frozen=True)
class _Layer:
    """A layer, its path, and the index of its item in the stack."""

    path: str
    module: nn.Module
    item: int


def _model_type(module: nn.Module) -> str | None:
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return kind if isinstance(kind, str) and hasattr(module, "base_model_prefix") else None


def _base(network: nn.Module) -> tuple[str, nn.Module]:
    prefix = str(getattr(network, "base_model_prefix", ""))
    inner = getattr(network, prefix, None)
    return (prefix, inner) if isinstance(inner, nn.Module) else ("", network)


def matches(module: nn.Module) -> bool:
    """Whether a module is a Hugging Face model of a known family, with or without a head."""
    kind = _model_type(module)
    if kind not in MODEL_TYPES:
        return False
    return module_at(_base(module)[1], MODEL_TYPES[kind].stack[0]) is not None


def first_unknown(module: nn.Module) -> nn.Module | None:
    """The first Hugging Face model inside ``module`` that no table describes."""
    unknown = (m for m in module.modules() if _model_type(m) is not None and not matches(m))
    return next(unknown, None)


def describe(network: nn.Module) -> list[DependencyGroup]:
    """Groups of one network: neurons, heads, dimensions of heads, pooler and hidden size.

    Raises:
        PruningError: If a layer is not a plain ``nn.Linear`` or its widths disagree.
    """
    scope, base = _base(network)
    names = MODEL_TYPES[str(_model_type(network))]
    prefix = f"{scope}." if scope else ""
    if getattr(network.config, "chunk_size_feed_forward", 0):
        raise PruningError(
            f"{type(network).__name__} splits its sequences into chunks, where padding cannot be "
            "identified. Set config.chunk_size_feed_forward=0 when the model is built."
        )
    layers = _layers(base, prefix, names.stack)
    residual = hidden_group(network, prefix, names, [(one.path, one.module) for one in layers])
    state = state_consumers(network, prefix, names)
    groups: list[DependencyGroup] = []
    for index, layer in enumerate(layers):
        again = [one for one in layers if names.repeats and one.item == layer.item]
        later = [one for one in layers[index + 1 :] if one not in again]
        groups += _layer_groups(
            network, layer, names, scope, level=2 * index, above=[*again, *later]
        )
    groups = [replace(group, above=(*group.above, *state)) for group in groups]
    head = names.heads.get(type(network).__name__.removeprefix(names.classes))
    # A head of the user above the pooler may use its outputs in any way.
    plain = (
        head is not None
        and head.pooler is not None
        and all(type(module_at(network, path)) is nn.Linear for path in head.pooler)
    )
    if head is not None and head.pooler is not None and plain:
        pooler = linear_group(
            network,
            "pooler",
            kind="pooler",
            producers=head.pooler[:1],
            consumers=head.pooler[1:],
            scope=scope,
            level=2 * len(groups),
        )
        # The config has one number for these units and for the hidden size.
        groups.append(replace(pooler, tie=names.hidden))
    return groups if residual is None else [*groups, residual]


def _layers(base: nn.Module, prefix: str, stack: tuple[str, ...]) -> list[_Layer]:
    """The layers in the order in which they run, without repetition."""
    found: list[_Layer] = []
    seen: set[int] = set()
    for item, part in base.get_submodule(stack[0])._modules.items():
        path = f"{prefix}{stack[0]}.{item}"
        inner = {path: part}
        for name in stack[1:]:
            inside = module_at(part, name) if part is not None else None
            inner = {f"{path}.{name}.{i}": m for i, m in inside._modules.items()} if inside else {}
        for where, layer in inner.items():
            if layer is not None and id(layer) not in seen:
                seen.add(id(layer))
                found.append(_Layer(where, layer, int(item)))
    return found


def _layer_groups(
    network: nn.Module,
    layer: _Layer,
    names: FamilyNames,
    scope: str,
    *,
    level: int,
    above: Sequence[_Layer],
) -> list[DependencyGroup]:
    parts, path = names.layer, layer.path
    attention = layer.module.get_submodule(parts.attention)
    entries = int(getattr(attention, parts.head_size))
    name, partner = f"{path}.heads", f"{path}.head_dim" if parts.rotatable else ""
    attributes = [SizeAttribute(f"{path}.{parts.attention}", parts.heads, ((name,),))]
    if parts.width is not None:
        each: Factor = partner or entries
        attributes.append(SizeAttribute(f"{path}.{parts.attention}", parts.width, ((name, each),)))
    producers = [f"{path}.{part}" for part in _projections(layer.module, parts)]
    heads = linear_group(
        network,
        name,
        kind="heads",
        producers=producers,
        consumers=[f"{path}.{parts.out}"],
        entries=entries,
        partner=partner,
        attributes=attributes,
        scope=scope,
        config=names.head_count,
        level=level,
    )
    ffn = linear_group(
        network,
        f"{path}.ffn",
        kind="ffn",
        producers=[f"{path}.{parts.ffn_in}"],
        consumers=[f"{path}.{parts.ffn_out}"],
        scope=scope,
        config=names.ffn_width,
        level=level + 1,
    )
    # Attention with a KV cache would lose the number of positions without its heads.
    may_be_empty = not getattr(network.config, "is_decoder", False)
    inside = parts.out.startswith(f"{parts.attention}.")
    empty_forward = EmptyForward(
        module=f"{path}.{parts.attention}",
        projections=tuple(producers),
        consumer=f"{path}.{parts.out}" if inside else None,
        dropout=None if parts.dropout is None else f"{path}.{parts.dropout}",
        norm=None if parts.norm is None else f"{path}.{parts.norm}",
    )
    selects = (
        ()
        if parts.unit_argument is None
        else (UnitArgument(f"{path}.{parts.attention}", parts.unit_argument),)
    )
    free = names.head_size is not None and hasattr(network.config, names.head_size)
    beyond = [
        f"{one.path}.{part}"
        for one in above
        for part in (parts.query, parts.key, parts.value, parts.ffn_in)
    ]
    heads = replace(
        heads,
        residual=f"{path}.{parts.residual_inputs[0]}",
        above=tuple(dict.fromkeys([f"{path}.{parts.ffn_in}", *beyond])),
        empty_forward=(empty_forward,) if may_be_empty else (),
        may_be_empty=may_be_empty,
        unit_arguments=selects,
        tie=None if free or names.head_count is None else names.hidden,
    )
    ffn = replace(
        ffn,
        residual=f"{path}.{parts.residual_inputs[1]}",
        above=tuple(beyond),
        may_be_empty=may_be_empty,
    )
    if not parts.rotatable:
        return [heads, ffn]
    return [heads, _dims(heads, layer, parts), ffn]


def _dims(heads: DependencyGroup, layer: _Layer, parts: LayerNames) -> DependencyGroup:
    """The group of the dimensions of all heads of a layer, in a product with the heads."""
    path = layer.path
    rotation = RotatableProjections(
        query=f"{path}.{parts.query}",
        key=f"{path}.{parts.key}",
        value=f"{path}.{parts.value}",
        consumer=f"{path}.{parts.out}",
        rescaled=parts.rescaled,
    )
    ((name, size),) = heads.partners
    return DependencyGroup(
        name=name,
        kind="head_dim",
        size=size,
        tensors=heads.tensors,
        consumers=(rotation.query, rotation.key, rotation.consumer),
        consumers_by_input=((rotation.query,), (rotation.key,), (rotation.consumer,)),
        attributes=(SizeAttribute(f"{path}.{parts.attention}", parts.head_size, ((name,),)),),
        scope=heads.scope,
        level=heads.level,
        partners=((heads.name, heads.size),),
        rotation=rotation,
    )


def _projections(layer: nn.Module, parts: LayerNames) -> list[str]:
    extra = [part for part in parts.positions if module_at(layer, part) is not None]
    return [parts.query, parts.key, parts.value, *extra]
