"""Layers taken out of a stack: the others close up, and every number follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lightning_mi_prune.depth import DepthAxis, full_depth
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.plan import CONFIG_FIELD, Plan
from lightning_mi_prune.surgery.configs import own_config

__all__ = ["shorten"]


def shorten(
    model: nn.Module, axes: Sequence[DepthAxis], plan: Plan, *, current: Plan | None = None
) -> list[nn.Module]:
    """Remove layers of a model, so that an ordinary, shorter one is left.

    Layers that stay keep their parameters, the very objects. Counts in configs, entries of
    configs that are made for each layer, and the places that layers know of themselves (those of
    KV caches) follow; ``save_pretrained`` then writes a folder that plain ``from_pretrained``
    opens. Everything is checked first; a refused plan leaves the model as it was.

    Args:
        model: Module from which the stacks are named.
        axes: Stacks of the plan.
        plan: Layers that stay, in the numbering of the model as built.
        current: Plan the model carries now; default: as built.

    Returns:
        The layers that are gone, bottom to top.

    Raises:
        PruningError: If the plan and the model do not belong together, no layer of a stack would
            stay, or one that others need would go.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune.families.stacks import find_stacks
        >>> model = BertModel(BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50))
        >>> plan = Plan({"encoder.layer": 3}, {"encoder.layer": (0, 2)})
        >>> gone = shorten(model, find_stacks(model), plan)
        >>> len(gone), model.config.num_hidden_layers, len(model.encoder.layer)
        (1, 2, 2)
    """
    now = full_depth(axes) if current is None else current
    places = plan.positions_in(now)
    cuts = [(axis, places[axis.name]) for axis in axes if axis.name in places]
    for axis, kept in cuts:
        _check(model, axis, kept, now)
    for path in sorted({axis.network for axis, _ in cuts}):
        own_config(model, path)
    gone: list[nn.Module] = []
    changed: list[tuple[Any, str, Any]] = []
    try:
        for axis, kept in cuts:
            container = model.get_submodule(axis.name)
            layers = list(container.children())
            for holder, name, value in _numbers(model, axis, layers, kept):
                changed.append((holder, name, getattr(holder, name)))
                setattr(holder, name, value)
            changed.append((container, "_modules", container._modules))
            container._modules = {str(new): layers[old] for new, old in enumerate(kept)}
            gone += [layer for old, layer in enumerate(layers) if old not in kept]
    except BaseException:
        for holder, name, value in reversed(changed):
            setattr(holder, name, value)
        raise
    return gone


def _numbers(
    model: nn.Module, axis: DepthAxis, layers: Sequence[nn.Module], kept: Sequence[int]
) -> Iterator[tuple[Any, str, Any]]:
    """What must say something else, as (holder, attribute, value)."""
    configs = {id(c): c for path, _ in axis.fields if (c := _config(model, path)) is not None}
    for config in configs.values():
        for name in axis.lists:
            entries = getattr(config, name, None)
            if isinstance(entries, (list, tuple)) and len(entries) == len(layers):
                yield config, name, type(entries)(entries[i] for i in kept)
    for path, name in axis.fields:
        if (config := _config(model, path)) is not None:
            yield config, name, len(kept)
    for new, old in enumerate(kept):
        for module in layers[old].modules():
            for name in axis.places:
                if isinstance(module.__dict__.get(name), int):
                    yield module, name, new


def _config(model: nn.Module, path: str) -> Any:
    return getattr(model.get_submodule(path), "config", None)


def _check(model: nn.Module, axis: DepthAxis, kept: Sequence[int], now: Plan) -> None:
    container = model.get_submodule(axis.name)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise PruningError(
            f"{axis.name!r} is a {type(container).__name__}; expected an nn.ModuleList or an "
            "nn.Sequential whose layers run one after another."
        )
    if len(container) != now.width(axis.name):
        raise PruningError(
            f"{axis.name!r} has {len(container)} layers; the plan expects "
            f"{now.width(axis.name)}. The model was changed behind the plan."
        )
    if not kept:
        raise PruningError(f"No layer of {axis.name!r} would stay; keep one or more.")
    if tuple(kept[: axis.fixed]) != tuple(range(axis.fixed)):
        raise PruningError(
            f"{axis.name!r} cannot lose its first {axis.fixed} layers: others use what they hold."
        )
    if len(set(map(id, container))) < len(container):
        raise PruningError(f"Layers of {axis.name!r} are one and the same; none can go by itself.")
    if getattr(_config(model, axis.network), CONFIG_FIELD, None) is not None:
        raise PruningError(
            f"Units of {axis.name!r} were cut already, and their record names layers by number. "
            "Remove layers first, then units."
        )
