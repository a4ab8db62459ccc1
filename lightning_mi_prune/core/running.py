"""Run a user's module on a batch without any lasting change to it."""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "TensorRecord",
    "call_step",
    "clear_caches",
    "clone_batch",
    "copy_networks",
    "evaluating",
    "first_examples",
    "fixed_random_state",
    "map_tensors",
    "move_tensors",
    "run_batch",
    "tensors_in",
    "undisturbed",
]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    if any(modes.values()):
        network.eval()
    try:
        yield
    finally:  # of all modules: what runs inside may set some to training
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; training flags are restored."""
    with _evaluation_mode(network), torch.no_grad():
        yield


def clear_caches(modules: Iterable[nn.Module]) -> None:
    """Let modules with a ``train`` of their own drop what they computed from their parameters.

    Some store it in evaluation mode until they train again, as the attention of LeViT in timm does
    with its position biases. Training flags stay as they are.

    Args:
        modules: Modules whose parameters changed; others in them are not asked.

    Example:
        >>> class Cached(nn.Linear):
        ...     def train(self, mode=True):
        ...         self.cache = None
        ...         return super().train(mode)
        >>> layer = Cached(2, 2).eval()
        >>> layer.cache = layer.weight.sum()
        >>> clear_caches([layer])
        >>> layer.cache, layer.training
        (None, False)
    """
    for module in modules:
        if type(module).train is not nn.Module.train:
            flags = [(part, part.training) for part in module.modules()]
            mode = module.training
            module.train(True)
            module.train(mode)
            for part, training in flags:  # inner ones may have differed
                part.training = training


def copy_networks(
    root: nn.Module, networks: Collection[str], shared: Mapping[int, Any] | None = None
) -> nn.Module:
    """A module in evaluation mode that holds only copies of some networks, at their paths.

    Args:
        root: Module from which the networks are named.
        networks: Their paths.
        shared: Objects that are not copied, by ``id``.
    """
    memo: dict[int, Any] = dict(shared or {})  # one for all: shared parameters stay shared
    for name in ("_trainer", "_fabric"):  # of a LightningModule; they cannot be copied
        held = getattr(root, name, None)
        memo |= {} if held is None else {id(held): held}
    for module in (m for path in networks for m in root.get_submodule(path).modules()):
        for name in _HOOKS:  # their objects cannot always be copied
            memo |= {id(hook): hook for hook in getattr(module, name).values()}
    if "" in networks:
        return copy.deepcopy(root, memo).eval()
    shell = nn.Module()
    for path in sorted(networks):
        node, (*parents, last) = shell, path.split(".")
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, nn.Module())
            node = node.get_submodule(parent)
        node.add_module(last, copy.deepcopy(root.get_submodule(path), memo))
    return shell.eval()


class TensorRecord:
    """Base of dataclasses that hold tensors in their fields, for :func:`map_tensors`."""


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested containers, with every tensor changed.

    Example:
        >>> map_tensors({"a": [torch.ones(1), "b"]}, lambda x: x + 1)
        {'a': [tensor([2.]), 'b']}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, TensorRecord):
        return replace(value, **map_tensors(vars(value), change))  # type: ignore[type-var]
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(map_tensors(v, change) for v in value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def move_tensors(value: Any, device: torch.device) -> Any:
    """The same nested containers, with every tensor on a device."""
    return map_tensors(value, lambda x: x.to(device))


def first_examples(batch: Any, count: int = 2) -> Any:
    """A batch of the same structure with its first examples only; the tensors are views.

    Where the tensors do not all count the same number of examples first, the whole batch.

    Args:
        batch: Nested containers or dataclasses of tensors and lists, one entry for each example.
        count: Examples to keep.

    Example:
        >>> batch = {"x": torch.zeros(5, 3), "y": (torch.zeros(5), ["a", "b", "c", "d", "e"])}
        >>> found = first_examples(batch)
        >>> found["x"].shape, found["y"][0].shape, found["y"][1]
        (torch.Size([2, 3]), torch.Size([2]), ['a', 'b'])
        >>> first_examples((torch.zeros(7, 5, 3), torch.zeros(5)))[0].shape
        torch.Size([7, 5, 3])
    """
    sizes = {x.shape[0] for x in tensors_in(batch) if x.ndim}
    rows = sizes.pop() if len(sizes) == 1 else 0
    return _first_of(batch, rows, count) if rows > count else batch


def _parts_of(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value) if hasattr(value, f.name)}
    return dict(enumerate(value)) if isinstance(value, (list, tuple)) else {}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    for part in _parts_of(value).values():
        yield from tensors_in(part)


def _first_of(value: Any, rows: int, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:count] if value.ndim else value
    plain = isinstance(value, (list, tuple)) and not any(True for _ in tensors_in(value))
    if plain and len(value) == rows and not hasattr(value, "_fields"):
        return value[:count]  # one text or number for each example
    return _rebuilt(value, partial(_first_of, rows=rows, count=count))


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A container or dataclass of the same class, with every part changed."""
    parts = {key: change(part) for key, part in _parts_of(value).items()}
    if not parts:
        return value
    if isinstance(value, (list, tuple)):
        found = parts.values()
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    other = copy.copy(value)  # of its class: of transformers, or of the user
    for key, part in parts.items():
        if isinstance(value, Mapping):
            other[key] = part
        else:
            object.__setattr__(other, key, part)
    return other


def clone_batch(batch: Any) -> Any:
    """A batch with tensors and containers of its own: steps may take entries out, or change them.

    Example:
        >>> batch = {"x": torch.zeros(2)}
        >>> clone_batch(batch)["x"].add_(1), batch["x"]
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    return batch.clone() if isinstance(batch, Tensor) else _rebuilt(batch, clone_batch)


def call_step(step: Callable[..., Any], batch: Any, loader: int = 0) -> Any:
    """Call a step as Lightning does: with batch and loader index if it takes them."""
    parameters = list(inspect.signature(step).parameters.values())
    many = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    named = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return step(*(batch, 0, loader)[: 3 if many else min(3, len(named))])


def run_batch(module: nn.Module, batch: Any) -> Any:
    """Run a module on a batch: ``validation_step`` of a LightningModule, else by its type.

    Args:
        module: The module.
        batch: A mapping of arguments, a sequence of them, or the one argument.

    Raises:
        PruningError: If values by position may be meant for other arguments.

    Example:
        >>> run_batch(nn.Identity(), (3,)), run_batch(nn.Identity(), {"input": 4})
        (3, 4)
    """
    if hasattr(module, "training_step") and hasattr(module, "validation_step"):
        step: Any = module.validation_step
        return call_step(step, batch)
    if isinstance(batch, Mapping):
        return module(**batch)
    if not isinstance(batch, (tuple, list)):
        return module(batch)
    _check_positions(module, batch)
    return module(*batch)


def _check_positions(module: nn.Module, batch: Sequence[Any]) -> None:
    """Refuse values by position that may be meant for other arguments."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in positional]
    many = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    name = type(module).__name__
    remedy = "Give a dict that names the values, or forward=lambda model, batch: model(batch[0])."
    if len(batch) > len(positional) and not many:
        raise PruningError(
            f"A batch of {len(batch)} values does not fit {name}.forward({', '.join(names)}), "
            f"which takes {len(positional)}. {remedy}"
        )
    for argument, value in list(zip(names, batch, strict=False))[1:]:
        # Arguments of a Hugging Face model are in an order that data sets do not follow.
        if hasattr(module, "base_model_prefix") or ("mask" in argument and not _is_mask(value)):
            raise PruningError(
                f"A batch of {len(batch)} values would go to {name} by position, and one of them "
                f"in as {argument!r}; expected values by name. {remedy}"
            )


def _is_mask(value: Any) -> bool:
    """Whether a value can be a mask: boolean, zeros and ones, or added to attention scores."""
    if not isinstance(value, Tensor):
        return value is None
    additive = value.is_floating_point() and bool((value <= 0).all())
    return value.dtype == torch.bool or additive or bool(((value == 0) | (value == 1)).all())


@contextmanager
def fixed_random_state(module: nn.Module) -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch, also on the devices of a module."""
    numpy = sys.modules.get("numpy")  # not imported: nobody can have used its state
    devices = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
    python, array = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without logging; gradients, metrics and training flags are restored."""
    gradients = {p: p.grad for p in module.parameters()}
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    states = [_state_of(metric) for metric in metrics]
    own = dict(module.__dict__)
    quiet = [name for name in ("log", "log_dict") if hasattr(module, name)]
    module.__dict__.update(dict.fromkeys(quiet, _ignore))  # no training loop takes the values
    try:
        # Iterating a DataLoader draws a seed.
        with _evaluation_mode(module), fixed_random_state(module):
            yield
    finally:
        for name in quiet:
            module.__dict__.pop(name)
            module.__dict__ |= {name: own[name]} if name in own else {}
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for metric, state in zip(metrics, states, strict=True):
            vars(metric).update(state)


def _state_of(metric: Metric) -> dict[str, Any]:
    """Copies of everything that an update of a metric changes."""
    states = {
        name: value.clone() if isinstance(value, Tensor) else list(value)
        for name, value in metric.metric_state.items()
    }
    return states | {name: getattr(metric, name) for name in ("_update_count", "_computed")}


def _ignore(*_: object, **__: object) -> None:
    """Replacement of ``self.log``."""
