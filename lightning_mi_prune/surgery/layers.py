"""Remove layers from a stack, or put them back, with every number that follows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.empty_linear import modules_of
from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted
from lightning_mi_prune.core.plan import CONFIG_FIELD, PruningPlan
from lightning_mi_prune.core.running import fixed_random_state, move_tensors, run_batch
from lightning_mi_prune.discovery.containers import layer_container
from lightning_mi_prune.discovery.groups import LayerStack, full_depth, join_path
from lightning_mi_prune.surgery.batch_norm import has_running_statistics, reestimate_batch_norm
from lightning_mi_prune.surgery.units import own_config

__all__ = [
    "RemovedLayers",
    "arrange_layers",
    "remove_layers",
    "without_storage",
]

RemovedLayers = Mapping[str, Mapping[int, nn.Module]]
"""Layers that are not in their stack now, by its name and their number as built."""


_NOTHING = object()  # what an iterator without batches gives


def remove_layers(
    model: nn.Module,
    groups: Sequence[LayerStack],
    plan: PruningPlan,
    *,
    current: PruningPlan | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] = run_batch,
) -> list[nn.Module]:
    """Remove layers of a model, so that an ordinary, shorter one is left.

    Layers that stay keep their parameters, the very objects. Counts in configs, entries of
    configs that are made for each layer, and the places that layers know of themselves (those of
    KV caches) follow; ``save_pretrained`` then writes a folder that plain ``from_pretrained``
    opens. Everything is checked first; a refused plan leaves the model as it was.

    Args:
        model: Module from which the stacks are named.
        groups: Stacks of the plan.
        plan: Layers that stay, in the numbering of the model as built.
        current: Plan the model carries now; default: as built.
        batches: Batches on which running statistics of BatchNorm are estimated anew; without any,
            a model that has such statistics is warned about.
        forward: Runs the model on a batch; default: by the type of the batch.

    Returns:
        The layers that are gone, bottom to top.

    Raises:
        PruningError: If the plan and the model do not belong together, no layer of a stack would
            stay, one that others need would go, units were cut and their record names layers, or
            there are no batches in ``batches``.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune.discovery.families.stacks import find_stacks
        >>> model = BertModel(BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50))
        >>> plan = PruningPlan({"encoder.layer": 3}, {"encoder.layer": (0, 2)})
        >>> gone = remove_layers(model, find_stacks(model), plan)
        >>> len(gone), model.config.num_hidden_layers, len(model.encoder.layer)
        (1, 2, 2)
    """
    now = full_depth(groups) if current is None else current
    plan.positions_in(now)
    for group in groups:
        if getattr(_config(model, group.network), CONFIG_FIELD, None) is not None:
            raise PruningError(
                f"Units of {group.name!r} were cut already, and their record names layers by "
                "number. Remove layers first, then units; or let one Trainer do both."
            )
    with fixed_random_state(model):  # a loader draws a seed
        data = None if batches is None else iter(batches)
        first = None if data is None else next(data, _NOTHING)
    if first is _NOTHING:
        raise PruningError(
            "batches has none to estimate BatchNorm statistics on; expected one or more. Give a "
            "list or a loader, not an iterator that is used up."
        )
    gone = arrange_layers(model, groups, plan, current=now)
    if data is not None:
        try:
            reestimate_batch_norm(model, chain([first], data), partial(_run_there, forward))
        except BaseException:  # what is gone would be lost
            arrange_layers(model, groups, now, current=plan, available=gone)
            raise
    elif gone and has_running_statistics(model):
        warnings.warn(
            f"The BatchNorm statistics of this {type(model).__name__} are those of the longer "
            "model; train it, or give batches to estimate them anew.",
            PruningWarning,
            stacklevel=2,
        )
    return [layers[place] for layers in gone.values() for place in sorted(layers)]


def _run_there(forward: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> None:
    parameter = next(model.parameters(), None)
    forward(model, batch if parameter is None else move_tensors(batch, parameter.device))


def arrange_layers(
    model: nn.Module,
    groups: Sequence[LayerStack],
    plan: PruningPlan,
    *,
    current: PruningPlan,
    available: RemovedLayers | None = None,
) -> dict[str, dict[int, nn.Module]]:
    """Give every stack the layers of a plan, out of those it has and the spare ones.

    All stacks change, with every number that follows, or none does.

    Args:
        model: Module from which the stacks are named.
        groups: Stacks; those the plan does not name stay.
        plan: Layers to have, in the numbering of the model as built.
        current: Plan the model carries now.
        available: Layers to put back, in the shape they shall have.

    Returns:
        The layers that left, by stack and number.

    Raises:
        PruningError: If the plan and the model do not belong together, or a layer is missing.
    """
    mine = [group for group in groups if group.name in plan.sizes]
    stock = {group.name: _stock(model, group, plan, current, available or {}) for group in mine}
    for path in sorted({group.network for group in mine}):
        own_config(model, path)
    gone: dict[str, dict[int, nn.Module]] = {}
    changed: list[tuple[Any, str, Any]] = []
    try:
        for group in mine:
            kept, layers = plan.kept[group.name], stock[group.name]
            container = model.get_submodule(group.name)
            for holder, name, value in _numbers(model, group, [layers[place] for place in kept]):
                changed.append((holder, name, getattr(holder, name)))
                setattr(holder, name, value)
            for holder, name, entries in _entries(model, group, kept):
                changed.append((holder, name, getattr(holder, name)))
                setattr(holder, name, entries)
            changed.append((container, "_modules", container._modules))
            container._modules = {str(new): layers[old] for new, old in enumerate(kept)}
            left = [place for place in current.kept[group.name] if place not in kept]
            gone[group.name] = {place: layers[place] for place in left}
    except BaseException:
        for holder, name, value in reversed(changed):
            setattr(holder, name, value)
        raise
    return {name: layers for name, layers in gone.items() if layers}


def without_storage(layer: nn.Module) -> nn.Module:
    """The same layer without the memory of its parameters, kept to be filled one day."""
    _exchange(layer, lambda _, old: torch.empty_like(old, device="meta"))
    return layer


def _filled(layer: nn.Module, others: Sequence[nn.Module]) -> nn.Module:
    """The hollow layer with memory where the others have theirs, and in their precision.

    What it says there, loading decides.
    """
    if not any(parameter.is_meta for parameter in layer.parameters()):
        return layer
    like = {name: tensor for other in others for name, tensor in _tensors(other)}
    home = next((tensor.device for tensor in like.values()), torch.device("cpu"))
    precise = {name: t.dtype for name, t in like.items() if t.is_floating_point()}
    usual = next(iter(precise.values()), None)

    def dtype(path: str, old: Tensor) -> torch.dtype:  # parts of a layer may differ in it
        return precise.get(path, usual or old.dtype) if old.is_floating_point() else old.dtype

    _exchange(layer, lambda path, old: torch.zeros_like(old, device=home, dtype=dtype(path, old)))
    for path, module in layer.named_modules():
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = old.to(home, dtype(join_path(path, name), old))
    return layer


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()


def _exchange(layer: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Other parameters in place of all those of a layer; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for path, module in modules_of(layer):
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    new = make(join_path(path, name), old.detach())
                    made[id(old)] = nn.Parameter(new, old.requires_grad)
                module._parameters[name] = made[id(old)]


def _stock(
    model: nn.Module,
    group: LayerStack,
    plan: PruningPlan,
    current: PruningPlan,
    available: RemovedLayers,
) -> dict[int, nn.Module]:
    """Every layer that can be had, by its number as built; checked against both plans."""
    kept = plan.kept[group.name]
    _check(model, group, kept, current)
    container = model.get_submodule(group.name)
    layers = dict(zip(current.kept[group.name], container.children(), strict=True))
    others = list(container.children())
    for place in kept:
        if place not in layers:
            layer = available.get(group.name, {}).get(place)
            if layer is None:
                raise PruningError(
                    f"Layer {place} of {group.name!r} is gone, and nothing is kept to bring it "
                    "back. Build the model anew with the configuration it was trained with."
                )
            layers[place] = _filled(layer, others).train(container.training)
    return layers


def _numbers(
    model: nn.Module, group: LayerStack, layers: Sequence[nn.Module]
) -> Iterator[tuple[Any, str, Any]]:
    """Numbers that must say something else, as (holder, attribute, value)."""
    for path, name in group.config_fields:
        if (config := _config(model, path)) is not None:
            yield config, name, len(layers)
    for new, layer in enumerate(layers):
        for module in layer.modules():
            for name in group.index_attributes:
                if isinstance(module.__dict__.get(name), int):
                    yield module, name, new


def _entries(
    model: nn.Module, group: LayerStack, kept: Sequence[int]
) -> Iterator[tuple[Any, str, Any]]:
    """Config fields with an entry for each layer, as (config, field, entries)."""
    configs = {
        id(c): c for path, _ in group.config_fields if (c := _config(model, path)) is not None
    }
    for config in configs.values():
        for name, built in group.config_lists:
            entries = getattr(config, name, None)
            if isinstance(entries, (list, tuple)):
                yield config, name, type(entries)(built[place] for place in kept)


def _config(model: nn.Module, path: str) -> Any:
    return getattr(model.get_submodule(path), "config", None)


def _check(model: nn.Module, group: LayerStack, kept: Sequence[int], now: PruningPlan) -> None:
    container = layer_container(model, group.name)
    if len(container) != now.width(group.name):
        raise PruningError(
            f"{group.name!r} has {counted(len(container), 'layer')}; the plan expects "
            f"{now.width(group.name)}. The model was changed behind the plan: put a whole new "
            "network there, with a config of its own, or load the weights the plan is of."
        )
    if not kept:
        raise PruningError(f"No layer of {group.name!r} would stay; keep one or more.")
    if tuple(kept[: group.fixed]) != tuple(range(group.fixed)):
        raise PruningError(
            f"{group.name!r} cannot lose its first {counted(group.fixed, 'layer')}, because others "
            "use what is held there; keep what comes first."
        )
