"""Remove layers from a stack or put them back, and keep counts and configs consistent."""

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
from lightning_mi_prune.graph.containers import layer_container
from lightning_mi_prune.graph.groups import LayerStack, full_depth, join_path
from lightning_mi_prune.surgery.batch_norm import has_running_statistics, reestimate_batch_norm
from lightning_mi_prune.surgery.units import own_config

__all__ = [
    "RemovedLayers",
    "arrange_layers",
    "remove_layers",
    "without_storage",
]

RemovedLayers = Mapping[str, Mapping[int, nn.Module]]
"""Removed layers, by name of their stack and number as built."""


_NOTHING = object()  # returned by an iterator without batches


def remove_layers(
    model: nn.Module,
    stacks: Sequence[LayerStack],
    plan: PruningPlan,
    *,
    current: PruningPlan | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] = run_batch,
) -> list[nn.Module]:
    """Remove layers of a model, so that an ordinary, shorter one is left.

    Layers that stay keep their parameter objects. Layer counts and per-layer entries of configs,
    and layer indices (used for KV caches), are updated, so that ``save_pretrained`` writes a folder
    that plain ``from_pretrained`` opens. A plan that is refused leaves the model unchanged.

    Args:
        model: Module from which the stacks are named.
        stacks: Stacks of the plan.
        plan: Layers that stay, as numbered when built.
        current: Plan of the model now; default: as built.
        batches: Batches to estimate running statistics of BatchNorm again; a model with such
            statistics causes a warning if there are none.
        forward: Runs the model on a batch; default: by the type of the batch.

    Returns:
        The removed layers, bottom to top.

    Raises:
        PruningError: If the plan does not fit the model, a stack would lose all layers or one that
            others need, units were cut before, or ``batches`` is empty.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune import discover
        >>> model = BertModel(BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50))
        >>> plan = PruningPlan({"encoder.layer": 3}, {"encoder.layer": (0, 2)})
        >>> removed = remove_layers(model, discover(model).stacks, plan)
        >>> len(removed), model.config.num_hidden_layers, len(model.encoder.layer)
        (1, 2, 2)
    """
    now = full_depth(stacks) if current is None else current
    plan.positions_in(now)
    for stack in stacks:
        if getattr(_config(model, stack.network), CONFIG_FIELD, None) is not None:
            raise PruningError(
                f"Units of {stack.name!r} were cut already, and their record refers to layers by "
                "number. Remove layers first, then units; or let one Trainer do both."
            )
    with fixed_random_state(model):  # iterating a DataLoader draws a seed
        data = None if batches is None else iter(batches)
        first = None if data is None else next(data, _NOTHING)
    if first is _NOTHING:
        raise PruningError(
            "batches is empty; expected at least one to estimate BatchNorm statistics. Give a list "
            "or a DataLoader, not an exhausted iterator."
        )
    removed = arrange_layers(model, stacks, plan, current=now)
    if data is not None:
        try:
            reestimate_batch_norm(model, chain([first], data), partial(_run_there, forward))
        except BaseException:  # the removed layers would be lost
            arrange_layers(model, stacks, now, current=plan, available=removed)
            raise
    elif removed and has_running_statistics(model):
        warnings.warn(
            f"The BatchNorm statistics of this {type(model).__name__} are those of the longer "
            "model; train it, or give batches to estimate them again.",
            PruningWarning,
            stacklevel=2,
        )
    return [layers[index] for layers in removed.values() for index in sorted(layers)]


def _run_there(forward: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any) -> None:
    parameter = next(model.parameters(), None)
    forward(model, batch if parameter is None else move_tensors(batch, parameter.device))


def arrange_layers(
    model: nn.Module,
    stacks: Sequence[LayerStack],
    plan: PruningPlan,
    *,
    current: PruningPlan,
    available: RemovedLayers | None = None,
) -> dict[str, dict[int, nn.Module]]:
    """Give every stack the layers of a plan, from its present and the available layers.

    Counts and configs change with the stacks; after an error nothing has changed.

    Args:
        model: Module from which the stacks are named.
        stacks: Stacks; those that the plan does not name stay.
        plan: Wanted layers, as numbered when built.
        current: Plan of the model now.
        available: Layers to put back, in their final shape.

    Returns:
        The removed layers, by stack and number.

    Raises:
        PruningError: If the plan does not fit the model, or a layer is missing.
    """
    mine = [stack for stack in stacks if stack.name in plan.sizes]
    layers_of = {
        stack.name: _layers_of(model, stack, plan, current, available or {}) for stack in mine
    }
    for path in sorted({stack.network for stack in mine}):
        own_config(model, path)
    removed: dict[str, dict[int, nn.Module]] = {}
    changed: list[tuple[Any, str, Any]] = []
    try:
        for stack in mine:
            kept, layers = plan.kept[stack.name], layers_of[stack.name]
            container = model.get_submodule(stack.name)
            for holder, name, value in _numbers(model, stack, [layers[index] for index in kept]):
                changed.append((holder, name, getattr(holder, name)))
                setattr(holder, name, value)
            for holder, name, entries in _entries(model, stack, kept):
                changed.append((holder, name, getattr(holder, name)))
                setattr(holder, name, entries)
            changed.append((container, "_modules", container._modules))
            container._modules = {str(new): layers[old] for new, old in enumerate(kept)}
            left = [index for index in current.kept[stack.name] if index not in kept]
            removed[stack.name] = {index: layers[index] for index in left}
    except BaseException:
        for holder, name, value in reversed(changed):
            setattr(holder, name, value)
        raise
    return {name: layers for name, layers in removed.items() if layers}


def without_storage(layer: nn.Module) -> nn.Module:
    """The same layer with parameters on the meta device, which use no memory."""
    _replace_parameters(layer, lambda _, old: torch.empty_like(old, device="meta"))
    return layer


def _with_storage(layer: nn.Module, others: Sequence[nn.Module]) -> nn.Module:
    """A layer without storage, given some on the device and in the precision of others."""
    if not any(parameter.is_meta for parameter in layer.parameters()):
        return layer
    like = {name: tensor for other in others for name, tensor in _tensors(other)}
    home = next((tensor.device for tensor in like.values()), torch.device("cpu"))
    precise = {name: t.dtype for name, t in like.items() if t.is_floating_point()}
    usual = next(iter(precise.values()), None)

    def dtype(path: str, old: Tensor) -> torch.dtype:  # parts of a layer may differ in it
        return precise.get(path, usual or old.dtype) if old.is_floating_point() else old.dtype

    _replace_parameters(
        layer, lambda path, old: torch.zeros_like(old, device=home, dtype=dtype(path, old))
    )
    for path, module in layer.named_modules():
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = old.to(home, dtype(join_path(path, name), old))
    return layer


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from layer.named_parameters()
    yield from layer.named_buffers()


def _replace_parameters(layer: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace all parameters of a layer; shared ones stay shared."""
    made: dict[int, nn.Parameter] = {}
    for path, module in modules_of(layer):
        for name, old in module._parameters.items():
            if old is not None:
                if id(old) not in made:
                    new = make(join_path(path, name), old.detach())
                    made[id(old)] = nn.Parameter(new, old.requires_grad)
                module._parameters[name] = made[id(old)]


def _layers_of(
    model: nn.Module,
    stack: LayerStack,
    plan: PruningPlan,
    current: PruningPlan,
    available: RemovedLayers,
) -> dict[int, nn.Module]:
    """Present and wanted layers of a stack, by number as built; checked against both plans."""
    kept = plan.kept[stack.name]
    _check(model, stack, kept, current)
    container = model.get_submodule(stack.name)
    layers = dict(zip(current.kept[stack.name], container.children(), strict=True))
    others = list(container.children())
    for index in kept:
        if index not in layers:
            layer = available.get(stack.name, {}).get(index)
            if layer is None:
                raise PruningError(
                    f"Layer {index} of {stack.name!r} was removed and no copy of it was kept. "
                    "Build a new model with the configuration it was trained with."
                )
            layers[index] = _with_storage(layer, others).train(container.training)
    return layers


def _numbers(
    model: nn.Module, stack: LayerStack, layers: Sequence[nn.Module]
) -> Iterator[tuple[Any, str, Any]]:
    """Layer counts and indices to change, as (holder, attribute, value)."""
    for path, name in stack.config_fields:
        if (config := _config(model, path)) is not None:
            yield config, name, len(layers)
    for new, layer in enumerate(layers):
        for module in layer.modules():
            for name in stack.index_attributes:
                if isinstance(module.__dict__.get(name), int):
                    yield module, name, new


def _entries(
    model: nn.Module, stack: LayerStack, kept: Sequence[int]
) -> Iterator[tuple[Any, str, Any]]:
    """Config fields with an entry for each layer, as (config, field, entries)."""
    configs = {
        id(c): c for path, _ in stack.config_fields if (c := _config(model, path)) is not None
    }
    for config in configs.values():
        for name, built in stack.config_lists:
            entries = getattr(config, name, None)
            if isinstance(entries, (list, tuple)):
                yield config, name, type(entries)(built[index] for index in kept)


def _config(model: nn.Module, path: str) -> Any:
    return getattr(model.get_submodule(path), "config", None)


def _check(model: nn.Module, stack: LayerStack, kept: Sequence[int], now: PruningPlan) -> None:
    container = layer_container(model, stack.name)
    if len(container) != now.width(stack.name):
        raise PruningError(
            f"{stack.name!r} has {counted(len(container), 'layer')}; the plan expects "
            f"{now.width(stack.name)}. The model was changed without the plan: put a whole new "
            "network there, with a config of its own, or load the weights the plan belongs to."
        )
    if not kept:
        raise PruningError(f"No layer of {stack.name!r} would stay; keep one or more.")
    if tuple(kept[: stack.fixed]) != tuple(range(stack.fixed)):
        raise PruningError(
            f"{stack.name!r} cannot lose its first {counted(stack.fixed, 'layer')}, because others "
            "use parameters of theirs; keep them."
        )
