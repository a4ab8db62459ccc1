"""STORE    a bounded sample of what validation feeds a network, and of what its units then say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.moments import Moments
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.sparing import Compared

__all__ = [
    "Example",
    "Heard",
    "copied",
    "evaluated",
    "full",
    "is_plain",
    "mapped",
    "placed",
    "refreshed",
    "rows_of",
    "run",
    "taken",
]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Example:
    """One real call of a network, or of its first example, to run it again.

    Args:
        args: Positional arguments.
        kwargs: Arguments by name.
        mask: The attention mask ``(rows, positions)`` among them, if there is one.
        autocast: Type that autocast gave to products, such as ``"bfloat16"``, of a call that is to
            be timed; empty without it.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None
    autocast: str = ""

    @property
    def rows(self) -> int:
        """Examples in the call."""
        return rows_of((*self.args, *self.kwargs.values())) or 0


@dataclass
class Heard:
    """All that was heard before a cut.

    Args:
        moments: Sums of activations at each place, by key.
        gradients: Sums of gradients of training steps, by key; None where nobody asked.
        ranks: Inputs to run the cut model on, of each rank, by path of the network called.
        examples: One call of each network, to count and to time its work.
        stacks: How alike the layers of each stack are, by its name.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    gradients: Mapping[str, GradientSums] | None = None
    ranks: Sequence[Mapping[str, Sequence[Example]]] = ()
    examples: Mapping[str, Example] = field(default_factory=dict)
    stacks: Mapping[str, Compared] = field(default_factory=dict)


def rows_of(values: Iterable[Any]) -> int | None:
    """Batch size of a call: rows of its first tensor with two dimensions or more."""
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim > 1), None)


def taken(value: Any, rows: int | None, index: Tensor) -> Any:
    """The given examples of every tensor with that many rows, in nested containers."""
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and value.shape[0] == rows
        part = value[index.to(value.device)] if batched else value
        return part.detach().clone().as_subclass(Tensor)
    if isinstance(value, tuple):
        return tuple(taken(v, rows, index) for v in value)
    if isinstance(value, list):
        return [taken(v, rows, index) for v in value]
    if isinstance(value, dict):
        return {k: taken(v, rows, index) for k, v in value.items()}
    return value


def is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` opens it."""
    if type(value) is dict:
        return all(is_plain(v) for v in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    return value is None or type(value) in (Tensor, bool, int, float, str)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested containers, with every tensor changed.

    Example:
        >>> mapped({"a": [torch.ones(1), "b"]}, lambda x: x + 1)
        {'a': [tensor([2.]), 'b']}
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Example):
        return replace(value, **mapped(vars(value), change))
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(mapped(v, change) for v in value)
    if isinstance(value, Mapping):
        return {k: mapped(v, change) for k, v in value.items()}
    return value


def placed(value: Any, device: torch.device) -> Any:
    """The same nested containers, with every tensor on a device."""
    return mapped(value, lambda x: x.to(device))


def refreshed(old: Mapping[str, Example], new: Mapping[str, Example]) -> Mapping[str, Example]:
    """The old calls, so that their work can be compared, in the numbers of the new ones."""
    if not old:
        return new
    return {
        path: replace(call, autocast=new[path].autocast if path in new else call.autocast)
        for path, call in old.items()
    }


def run(network: nn.Module, call: Example) -> None:
    """Run a network on a call in evaluation mode, without gradients; mode flags are put back."""
    call = full(call, network)
    with evaluated(network):
        network(*call.args, **call.kwargs)


@contextmanager
def evaluated(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; mode flags are put back."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def full(call: Example, network: nn.Module) -> Example:
    """The call with numbers as fine as the weights, which cannot read what autocast made coarse."""
    dtype = next((p.dtype for p in network.parameters()), torch.float32)

    def cast(x: Tensor) -> Tensor:
        coarse = x.dtype in (torch.bfloat16, torch.float16)
        return x.to(dtype) if coarse and dtype == torch.float32 else x

    return replace(call, args=mapped(call.args, cast), kwargs=mapped(call.kwargs, cast))


def copied(
    root: nn.Module, networks: Collection[str], shared: Mapping[int, Any] | None = None
) -> nn.Module:
    """A module that holds copies of the networks at their paths, and nothing else.

    Args:
        root: Module from which the networks are named.
        networks: Their paths.
        shared: Objects that are not copied, by ``id``.
    """
    memo: dict[int, Any] = dict(shared or {})  # one memo: what networks share stays shared
    for name in ("_trainer", "_fabric"):  # of a LightningModule; neither can be copied, nor need be
        held = getattr(root, name, None)
        memo |= {} if held is None else {id(held): held}
    for module in (m for path in networks for m in root.get_submodule(path).modules()):
        for name in _HOOKS:  # of others; what they hold need not be copied, nor can it always
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


def first_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None
) -> Example:
    """The first example of a call that a module just received, copied."""
    rows, first = rows_of((*args, *kwargs.values())), torch.zeros(1, dtype=torch.long)
    kept = taken((args, dict(kwargs), mask), rows, first)
    return replace(Example(*kept), autocast=_autocast(module))


def _autocast(module: nn.Module) -> str:
    """Type that products have where the module runs now, if that is not their own."""
    place = next((p.device.type for p in module.parameters()), "cpu")
    if not torch.is_autocast_enabled(place):
        return ""
    return str(torch.get_autocast_dtype(place)).removeprefix("torch.")
