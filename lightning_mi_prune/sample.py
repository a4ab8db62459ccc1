"""STORE    a bounded sample of what validation feeds a network, and of what its units then say."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.sparing import Compared

__all__ = [
    "Example",
    "Heard",
    "call_step",
    "copied",
    "evaluated",
    "full",
    "is_plain",
    "mapped",
    "placed",
    "refreshed",
    "rows_dim",
    "rows_of",
    "run_batch",
    "taken",
]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True)
class Example:
    """One real call of a network, or of its first example, to run it again.

    Args:
        args: Positional arguments.
        kwargs: Arguments by name.
        mask: The mask ``(rows, positions)`` of positions that are not padding, where that is known.
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
        if self.positions is not None and self.mask is not None:
            return len(self.mask)
        return rows_of((*self.args, *self.kwargs.values())) or 0

    @property
    def positions(self) -> int | None:
        """Positions, where inputs are ``(positions, rows, ...)``; the mask says so by its shape."""
        first = _first((*self.args, *self.kwargs.values()))
        if self.mask is None or self.mask.ndim != 2 or first is None or first.is_nested:
            return None
        rows, positions = self.mask.shape
        return positions if first.shape[:2] == (positions, rows) and positions != rows else None

    def some(self, index: Tensor) -> Example:
        """Some examples of the call, copied."""
        values = (self.args, self.kwargs, self.mask)
        args, kwargs, mask = taken(values, self.rows, index, self.positions)
        return replace(self, args=args, kwargs=kwargs, mask=mask)


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
    first = _first(values)
    return None if first is None else first.size(0)


def _first(values: Iterable[Any]) -> Tensor | None:
    return next((v for v in values if isinstance(v, Tensor) and v.ndim > 1), None)


def rows_dim(x: Tensor, rows: int | None, positions: int | None = None) -> int | None:
    """The dimension of a tensor that counts the examples of a call; None: it is not by example.

    Args:
        x: One of the tensors of the call.
        rows: Examples of the call.
        positions: Positions of the call, where they come before the examples (:class:`Example`).

    Example:
        >>> rows_dim(torch.zeros(3, 5), 3), rows_dim(torch.zeros(5, 3), 3)
        (0, None)
        >>> rows_dim(torch.zeros(5, 3), 3, 5)
        1
    """
    if x.ndim and x.size(0) == rows:
        return 0
    swapped = positions is not None and not x.is_nested and x.shape[:2] == (positions, rows)
    return 1 if swapped else None


def taken(value: Any, rows: int | None, index: Tensor, positions: int | None = None) -> Any:
    """The given examples of every tensor with that many, in nested containers."""
    if isinstance(value, Tensor):
        dim = rows_dim(value, rows, positions)
        if value.is_nested:
            parts = value.detach().unbind()
            chosen = [parts[i].clone() for i in (index.tolist() if dim == 0 else range(len(parts)))]
            return torch.nested.as_nested_tensor(chosen, layout=value.layout)
        part = value if dim is None else value.index_select(dim, index.to(value.device))
        return part.detach().clone().as_subclass(Tensor)
    if isinstance(value, tuple):
        return tuple(taken(v, rows, index, positions) for v in value)
    if isinstance(value, list):
        return [taken(v, rows, index, positions) for v in value]
    if isinstance(value, dict):
        return {k: taken(v, rows, index, positions) for k, v in value.items()}
    return value


def is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` opens it."""
    if type(value) is dict:
        return all(is_plain(v) for v in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    if type(value) is Tensor:
        return not value.is_nested
    return value is None or type(value) in (bool, int, float, str)


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
    first = Example(args, dict(kwargs), mask).some(torch.zeros(1, dtype=torch.long))
    return replace(first, autocast=_autocast(module))


def _autocast(module: nn.Module) -> str:
    """Type that products have where the module runs now, if that is not their own."""
    place = next((p.device.type for p in module.parameters()), "cpu")
    if not torch.is_autocast_enabled(place):
        return ""
    return str(torch.get_autocast_dtype(place)).removeprefix("torch.")


def call_step(step: Callable[..., Any], batch: Any, loader: int = 0) -> Any:
    """Call a step as Lightning does: with the index of the batch, and of the loader, if it asks."""
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
        PruningError: If values by position would end up in another argument than they are for.

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
    """Refuse values by position that would end up in another argument than they are meant for.

    Raises:
        PruningError: Naming the argument.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in places]
    many = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    name = type(module).__name__
    remedy = "Give a dict that names the values, or forward=lambda model, batch: model(batch[0])."
    if len(batch) > len(places) and not many:
        raise PruningError(
            f"A batch of {len(batch)} values does not fit {name}.forward({', '.join(names)}), "
            f"which takes {len(places)}. {remedy}"
        )
    for argument, value in list(zip(names, batch, strict=False))[1:]:
        # Every argument of a Hugging Face model is optional, in an order that data sets ignore.
        if hasattr(module, "base_model_prefix") or ("mask" in argument and not _is_mask(value)):
            raise PruningError(
                f"A batch of {len(batch)} values would go to {name} by position, and one of them "
                f"in as {argument!r}; expected values by name. {remedy}"
            )


def _is_mask(value: Any) -> bool:
    """Whether a value can be a mask: booleans, zeros and ones, or numbers to be added to scores."""
    if not isinstance(value, Tensor):
        return value is None
    additive = value.is_floating_point() and bool((value <= 0).all())
    return value.dtype == torch.bool or additive or bool(((value == 0) | (value == 1)).all())
