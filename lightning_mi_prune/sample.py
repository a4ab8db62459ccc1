"""STORE    a bounded sample of what validation feeds a network, and of what its units then say."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mi_prune.moments import Moments
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.sparing import Compared

__all__ = [
    "Example",
    "Heard",
    "copied",
    "is_plain",
    "merged",
    "placed",
    "positions_of",
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
        samples: Stored positions ``(N, d)`` of each place; empty where nobody asked.
        examples: One call of each network, to count and to time its work.
        stacks: How alike the layers of each stack are, by its name.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    gradients: Mapping[str, GradientSums] | None = None
    ranks: Sequence[Mapping[str, Sequence[Example]]] = ()
    samples: Mapping[str, Tensor] = field(default_factory=dict)
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


def placed(value: Any, device: torch.device) -> Any:
    """The same nested containers, with every tensor on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Example):
        return replace(value, **placed(vars(value), device))
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(placed(v, device) for v in value)
    if isinstance(value, Mapping):
        return {k: placed(v, device) for k, v in value.items()}
    return value


def refreshed(old: Mapping[str, Example], new: Mapping[str, Example]) -> Mapping[str, Example]:
    """The old calls, so that their work can be compared, in the numbers of the new ones."""
    if not old:
        return new
    return {
        path: replace(call, autocast=new[path].autocast if path in new else call.autocast)
        for path, call in old.items()
    }


def merged(calls: Sequence[Example], most: int) -> Example | None:
    """One call with the examples of many, so that one forward pass sees them all.

    Texts of different length are padded with zeros, which the attention mask leaves out. Without a
    mask padding would be heard, so then only calls of the commonest shape are taken; the same holds
    for calls that cannot be laid on each other.

    Args:
        calls: Calls of one network, in the order in which they were made.
        most: Positions, padding included, that the merged call may have; beyond it examples are
            left out evenly, for neighbours may be of one length.

    Example:
        >>> def call(length):
        ...     mask = torch.ones(2, length)
        ...     return Example((), {"ids": torch.ones(2, length), "attention_mask": mask}, mask)
        >>> merged([call(3), call(5)], 1000).kwargs["attention_mask"].sum(1)
        tensor([3., 3., 5., 5.])
    """
    if not calls:
        return None
    shapes = [_shape(call) for call in calls]
    common = Counter(shapes).most_common(1)[0][0]
    same = [call for call, shape in zip(calls, shapes, strict=True) if shape == common]
    longest = max(_length(call) for call in same)
    rows = [call.rows for call in same]
    room = max(1, most // max(1, longest))
    joined = _join([(c.args, c.kwargs, c.mask) for c in same], rows)
    if sum(rows) > room:
        spread = torch.linspace(0, sum(rows) - 1, room).round().long()
        joined = taken(joined, sum(rows), spread)
    return Example(*joined)


def _length(call: Example) -> int:
    if call.mask is not None and call.mask.ndim > 1:
        return int(call.mask.shape[1])
    values = (*call.args, *call.kwargs.values())
    ids = (v for v in values if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point())
    return next((v.shape[1] for v in ids), 1)


def positions_of(call: Example) -> int:
    """Positions of one example of a call; of pictures by their size, a guess."""
    values = (*call.args, *call.kwargs.values())
    sizes = [v[0].numel() // 1024 for v in values if isinstance(v, Tensor) and v.ndim and len(v)]
    return max(1, _length(call), *sizes)


def _shape(call: Example) -> Any:
    """What must agree between calls: everything but the rows and, with a mask, the length."""
    rows, length = call.rows, _length(call) if call.mask is not None else None

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            dims = tuple(
                "rows" if i == 0 and n == rows else "length" if n == length else n
                for i, n in enumerate(value.shape)
            )
            return (value.dtype, dims)
        if isinstance(value, (tuple, list)):
            return (type(value), tuple(map(of, value)))
        if isinstance(value, dict):
            return tuple((k, of(v)) for k, v in value.items())
        return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)

    return of((call.args, call.kwargs))


def _join(values: Sequence[Any], rows: Sequence[int]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        longest = max(values, key=lambda v: v.numel() // max(1, v.shape[0]) if v.ndim else 0)
        if any(v.ndim == 0 or v.shape[0] != n for v, n in zip(values, rows, strict=True)):
            return max(values, key=lambda v: v.numel())  # the same for every example
        return torch.cat([_padded(v, longest.shape) for v in values])
    if isinstance(first, tuple):
        return tuple(_join(parts, rows) for parts in zip(*values, strict=True))
    if isinstance(first, list):
        return [_join(parts, rows) for parts in zip(*values, strict=True)]
    if isinstance(first, dict):
        return {k: _join([v[k] for v in values], rows) for k in first}
    return first


def _padded(value: Tensor, shape: torch.Size) -> Tensor:
    missing = [n - m for n, m in zip(shape[1:], value.shape[1:], strict=True)]
    if not any(missing):
        return value
    return functional.pad(value, [side for n in reversed(missing) for side in (0, n)])


def run(network: nn.Module, call: Example) -> None:
    """Run a network on a call in evaluation mode, without gradients; mode flags are put back."""
    modes = {module: module.training for module in network.modules()}
    call = _full(call, next((p.dtype for p in network.parameters()), torch.float32))
    network.eval()
    try:
        with torch.no_grad():
            network(*call.args, **call.kwargs)
    finally:
        for module, training in modes.items():
            module.training = training


def _full(call: Example, dtype: torch.dtype) -> Example:
    """The call with numbers as fine as the weights, which cannot read what autocast made coarse."""

    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            coarse = value.dtype in (torch.bfloat16, torch.float16)
            return value.to(dtype) if coarse and dtype == torch.float32 else value
        if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
            return type(value)(map(cast, value))
        return {k: cast(v) for k, v in value.items()} if isinstance(value, dict) else value

    return replace(call, args=cast(call.args), kwargs=cast(call.kwargs))


def copied(root: nn.Module, networks: Collection[str]) -> nn.Module:
    """A module that holds copies of the networks at their paths, and nothing else."""
    memo: dict[int, Any] = {}  # one memo: what networks share stays shared
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
