"""Hugging Face encoders: their axes, read off one table of names a family, no tracing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from lightning_mi_prune.axes import Count, Selects, Silence, Turn, WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families.describe import linear_axis
from lightning_mi_prune.families.names import FamilyNames, LayerNames
from lightning_mi_prune.families.residual import module_at, residual_axis, state_readers
from lightning_mi_prune.families.text import TEXT
from lightning_mi_prune.families.vision import VISION

__all__ = ["MODEL_TYPES", "describe", "matches", "nearest_unknown"]

MODEL_TYPES: dict[str, FamilyNames] = {**TEXT, **VISION}


@dataclass(frozen=True)
class _Layer:
    """A layer, where it stands, and the item of the stack it belongs to."""

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
    """Whether the module is a Hugging Face model of a known family, with or without a head."""
    kind = _model_type(module)
    if kind not in MODEL_TYPES:
        return False
    return module_at(_base(module)[1], MODEL_TYPES[kind].stack[0]) is not None


def nearest_unknown(module: nn.Module) -> nn.Module | None:
    """The first Hugging Face model inside that no table describes."""
    strangers = (m for m in module.modules() if _model_type(m) is not None and not matches(m))
    return next(strangers, None)


def describe(network: nn.Module) -> list[WidthAxis]:
    """Axes of one network: neurons, heads, their dimensions, the head's units, the stream.

    Raises:
        PruningError: If a layer is not a plain ``nn.Linear`` or its widths disagree.
    """
    scope, base = _base(network)
    names = MODEL_TYPES[str(_model_type(network))]
    prefix = f"{scope}." if scope else ""
    if getattr(network.config, "chunk_size_feed_forward", 0):
        raise PruningError(
            f"{type(network).__name__} cuts its sequences into chunks, where padding cannot be "
            "told from text. Set config.chunk_size_feed_forward=0 when the model is built."
        )
    layers = _layers(base, prefix, names.stack)
    residual = residual_axis(network, prefix, names, [(one.path, one.module) for one in layers])
    state = state_readers(network, prefix, names)
    axes: list[WidthAxis] = []
    for index, layer in enumerate(layers):
        again = [one for one in layers if names.repeats and one.item == layer.item]
        later = [one for one in layers[index + 1 :] if one not in again]
        axes += _layer_axes(network, layer, names, scope, level=2 * index, above=[*again, *later])
    axes = [replace(axis, above=(*axis.above, *state)) for axis in axes]
    head = names.heads.get(type(network).__name__.removeprefix(names.classes))
    # With a head of the user's own above the pooler, its units are not known to be units.
    plain = (
        head is not None
        and head.pooler is not None
        and all(type(module_at(network, path)) is nn.Linear for path in head.pooler)
    )
    if head is not None and head.pooler is not None and plain:
        pooler = linear_axis(
            network,
            "pooler",
            kind="pooler",
            producers=head.pooler[:1],
            readers=head.pooler[1:],
            scope=scope,
            level=2 * len(axes),
        )
        # The config has one number for these units and for those of the stream.
        axes.append(replace(pooler, tie=names.hidden))
    return axes if residual is None else [*axes, residual]


def _layers(base: nn.Module, prefix: str, stack: tuple[str, ...]) -> list[_Layer]:
    """The layers in the order they run; one that stands twice is there once."""
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


def _layer_axes(
    network: nn.Module,
    layer: _Layer,
    names: FamilyNames,
    scope: str,
    *,
    level: int,
    above: Sequence[_Layer],
) -> list[WidthAxis]:
    parts, path = names.layer, layer.path
    attention = layer.module.get_submodule(parts.attention)
    entries = int(getattr(attention, parts.head_size))
    counts = [Count(f"{path}.{parts.attention}", parts.heads)]
    if parts.width is not None:
        counts.append(Count(f"{path}.{parts.attention}", parts.width, entries=True))
    producers = [f"{path}.{part}" for part in _projections(layer.module, parts)]
    heads = linear_axis(
        network,
        f"{path}.heads",
        kind="heads",
        producers=producers,
        readers=[f"{path}.{parts.out}"],
        entries=entries,
        counts=counts,
        scope=scope,
        config=names.head_count,
        level=level,
    )
    ffn = linear_axis(
        network,
        f"{path}.ffn",
        kind="ffn",
        producers=[f"{path}.{parts.ffn_in}"],
        readers=[f"{path}.{parts.ffn_out}"],
        scope=scope,
        config=names.ffn_width,
        level=level + 1,
    )
    # Attention that keeps what it has seen would lose count of the positions without its heads.
    may_vanish = not getattr(network.config, "is_decoder", False)
    inside = parts.out.startswith(f"{parts.attention}.")
    silence = Silence(
        module=f"{path}.{parts.attention}",
        projections=tuple(producers),
        reader=f"{path}.{parts.out}" if inside else None,
        dropout=None if parts.dropout is None else f"{path}.{parts.dropout}",
        norm=None if parts.norm is None else f"{path}.{parts.norm}",
    )
    selects = (
        () if parts.selects is None else (Selects(f"{path}.{parts.attention}", parts.selects),)
    )
    free = names.head_size is not None and hasattr(network.config, names.head_size)
    beyond = [
        f"{one.path}.{part}"
        for one in above
        for part in (parts.query, parts.key, parts.value, parts.ffn_in)
    ]
    heads = replace(
        heads,
        skip=f"{path}.{parts.skips[0]}",
        above=tuple(dict.fromkeys([f"{path}.{parts.ffn_in}", *beyond])),
        silence=(silence,) if may_vanish else (),
        may_vanish=may_vanish,
        selects=selects,
        tie=None if free or names.head_count is None else names.hidden,
    )
    ffn = replace(ffn, skip=f"{path}.{parts.skips[1]}", above=tuple(beyond), may_vanish=may_vanish)
    # ALBERT's one layer is turned once for all its calls, which no one set of sums can tell.
    if not parts.turns:
        return [heads, ffn]
    heads = replace(heads, crossed=f"{path}.dims")
    return [heads, _dims(heads, layer, parts), ffn]


def _dims(heads: WidthAxis, layer: _Layer, parts: LayerNames) -> WidthAxis:
    """The dimensions of all heads of a layer: an axis across that of the heads."""
    path = layer.path
    turn = Turn(
        query=f"{path}.{parts.query}",
        key=f"{path}.{parts.key}",
        value=f"{path}.{parts.value}",
        reader=f"{path}.{parts.out}",
        rescaled=parts.rescales,
    )
    return WidthAxis(
        name=heads.crossed,
        kind="dims",
        size=heads.entries,
        entries=heads.size,
        slices=heads.slices,
        readers=(turn.query, turn.key, turn.reader),
        sites=((turn.query,), (turn.key,), (turn.reader,)),
        counts=(Count(f"{path}.{parts.attention}", parts.head_size),),
        scope=heads.scope,
        level=heads.level,
        crossed=heads.name,
        spread=True,
        turn=turn,
    )


def _projections(layer: nn.Module, parts: LayerNames) -> list[str]:
    extra = [part for part in parts.positions if module_at(layer, part) is not None]
    return [parts.query, parts.key, parts.value, *extra]
