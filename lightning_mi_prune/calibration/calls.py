"""Recorded calls of networks: how a bounded sample is stored, merged and split."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mi_prune.core.running import TensorRecord, map_tensors

__all__ = [
    "RecordedCall",
    "StoredCalls",
    "batch_dim",
    "batch_size_of",
    "first_call",
    "in_weight_precision",
    "is_plain",
    "merge_calls",
    "positions_of",
    "select_examples",
    "split_call",
    "trim_padding",
    "update_calls",
]


@dataclass(frozen=True)
class RecordedCall(TensorRecord):
    """One real call of a network, or some examples of it, to run the network again.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments.
        mask: The mask ``(rows, positions)`` of positions that are not padding, where that is known.
        autocast: Type of matrix products under autocast, such as ``"bfloat16"``; empty without it.
        folds: Which fold each example belongs to ``(rows,)``, where it is left out in turn.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None
    autocast: str = ""
    folds: Tensor | None = None

    @property
    def rows(self) -> int:
        """Examples in the call."""
        if self.positions is not None and self.mask is not None:
            return len(self.mask)
        return batch_size_of((*self.args, *self.kwargs.values())) or 0

    @property
    def positions(self) -> int | None:
        """Positions, where the mask shows that inputs are ``(positions, rows, ...)``; else None."""
        first = _first((*self.args, *self.kwargs.values()))
        if self.mask is None or self.mask.ndim != 2 or first is None or first.is_nested:
            return None
        rows, positions = self.mask.shape
        return positions if first.shape[:2] == (positions, rows) and positions != rows else None

    def select(self, index: Tensor) -> RecordedCall:
        """Some examples of the call, copied."""
        values = (self.args, self.kwargs, self.mask)
        args, kwargs, mask = select_examples(values, self.rows, index, self.positions)
        folds = None if self.folds is None else self.folds[index.to(self.folds.device)]
        return replace(self, args=args, kwargs=kwargs, mask=mask, folds=folds)


def batch_size_of(values: Iterable[Any]) -> int | None:
    """Batch size of a call: rows of its first tensor with two dimensions or more."""
    first = _first(values)
    return None if first is None else first.size(0)


def _first(values: Iterable[Any]) -> Tensor | None:
    return next((v for v in values if isinstance(v, Tensor) and v.ndim > 1), None)


def batch_dim(x: Tensor, rows: int | None, positions: int | None = None) -> int | None:
    """The dimension of a tensor that counts the examples of a call; None if no dimension does.

    Args:
        x: One of the tensors of the call.
        rows: Examples of the call.
        positions: Positions of the call, where they come first (:attr:`RecordedCall.positions`).

    Example:
        >>> batch_dim(torch.zeros(3, 5), 3), batch_dim(torch.zeros(5, 3), 3)
        (0, None)
        >>> batch_dim(torch.zeros(5, 3), 3, 5)
        1
    """
    if x.ndim and x.size(0) == rows:
        return 0
    swapped = positions is not None and not x.is_nested and x.shape[:2] == (positions, rows)
    return 1 if swapped else None


def select_examples(
    value: Any, rows: int | None, index: Tensor, positions: int | None = None
) -> Any:
    """Select examples of all tensors in nested containers; others are copied whole."""
    if isinstance(value, Tensor):
        dim = batch_dim(value, rows, positions)
        if value.is_nested:
            parts = value.detach().unbind()
            chosen = [parts[i].clone() for i in (index.tolist() if dim == 0 else range(len(parts)))]
            return torch.nested.as_nested_tensor(chosen, layout=value.layout)
        part = value if dim is None else value.index_select(dim, index.to(value.device))
        return part.detach().clone().as_subclass(Tensor)
    if isinstance(value, tuple):
        return tuple(select_examples(v, rows, index, positions) for v in value)
    if isinstance(value, list):
        return [select_examples(v, rows, index, positions) for v in value]
    if isinstance(value, dict):
        return {k: select_examples(v, rows, index, positions) for k, v in value.items()}
    return value


def is_plain(value: Any, *, subclasses: bool = False) -> bool:
    """Whether a value consists of what ``torch.load(weights_only=True)`` opens.

    Args:
        value: Any value.
        subclasses: Whether subclasses of tensors count as tensors.
    """
    if type(value) in (dict, list, tuple):
        parts = (*value, *value.values()) if type(value) is dict else value
        return all(is_plain(part, subclasses=subclasses) for part in parts)
    if type(value) is Tensor or (subclasses and isinstance(value, Tensor)):
        return not value.is_nested
    return value is None or type(value) in (bool, int, float, str)


def update_calls(
    old: Mapping[str, RecordedCall], new: Mapping[str, RecordedCall]
) -> Mapping[str, RecordedCall]:
    """The old calls, so that costs stay comparable, with the autocast types of the new ones."""
    if not old:
        return new
    return {p: replace(c, autocast=new.get(p, c).autocast) for p, c in old.items()}


def in_weight_precision(call: RecordedCall, network: nn.Module) -> RecordedCall:
    """The call with half-precision inputs, made by autocast, as float32 where the weights are."""
    dtype = next((p.dtype for p in network.parameters()), torch.float32)

    def cast(x: Tensor) -> Tensor:
        half = x.dtype in (torch.bfloat16, torch.float16)
        return x.to(dtype) if half and dtype == torch.float32 else x

    return replace(call, args=map_tensors(call.args, cast), kwargs=map_tensors(call.kwargs, cast))


def first_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None
) -> RecordedCall:
    """The first example of a call that a module just received, copied."""
    first = RecordedCall(args, dict(kwargs), mask).select(torch.zeros(1, dtype=torch.long))
    device = next((p.device.type for p in module.parameters()), "cpu")
    if not torch.is_autocast_enabled(device):
        return first
    dtype = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    return replace(first, autocast=dtype)


class StoredCalls:
    """Examples of real calls, so that a smaller model can be run on them.

    Args:
        positions: Positions to store for each network; 0 stores none.
        batches: Batches to spread them over; None stores the first ones.
        seed: Seed of the draw; the global random state is not touched.

    Example:
        >>> kept = StoredCalls(6, batches=2, seed=0)
        >>> call = RecordedCall((torch.zeros(4, 3),), {})
        >>> for _ in range(2):
        ...     kept.keep("net", call, real=4, each=1.0)
        >>> [example.rows for example in kept.stored["net"]]
        [3, 3]
    """

    def __init__(self, positions: int, batches: int | None, seed: int) -> None:
        self.stored: dict[str, list[RecordedCall]] = {}
        self._quota = -(-positions // (1 if batches is None else max(1, batches)))
        self._positions = float(positions)
        self._generator = torch.Generator().manual_seed(seed)
        self._owed: dict[str, float] = {}
        self._room: dict[str, float] = {}

    def keep(self, path: str, call: RecordedCall, *, real: int, each: float) -> None:
        """Store some examples of a call that runs now.

        A call with other than plain values is left out: a cache would go on filling up, and other
        objects cannot be split by example, nor written to a checkpoint.

        Args:
            path: The network that received it.
            call: The call.
            real: Its first examples, those that do not only repeat others.
            each: Positions of one example.
        """
        rows = call.rows
        if not self._quota or not is_plain([call.args, call.kwargs], subclasses=True):
            return
        if call.mask is not None and call.mask.ndim > 1:
            each = float(call.mask.sum()) / max(1, rows)
        room = self._room.get(path, self._positions)
        owed = min(self._owed.get(path, 0.0) + self._quota, room)
        wanted = min(real, int(owed / max(1.0, each)))
        if path not in self.stored:
            wanted = max(1, wanted)  # less than one example of each batch would always be none
        if wanted:
            index = torch.randperm(real, generator=self._generator)[:wanted].sort().values
            self.stored.setdefault(path, []).append(call.select(index))
        self._owed[path], self._room[path] = owed - wanted * each, room - wanted * each


_PIECE = 4096  # positions, with padding, that a piece of a split call has at most


def merge_calls(calls: Sequence[RecordedCall], most: int) -> RecordedCall | None:
    """One call with the examples of many, so that one forward pass runs them all.

    Texts of different length are padded, with zeros except in masks that mark padding otherwise.
    This needs an argument that is such a mask: without one, and where other shapes differ, only the
    calls of the most frequent shape are merged. Short examples come first, so that the pieces of
    :func:`split_call` need little padding.

    Args:
        calls: Calls of one network, in the order in which they were made.
        most: Positions that the merged call may have, with the padding that cannot be cut off;
            beyond it examples are left out evenly, as neighbors may be of one length.

    Example:
        >>> def call(length):
        ...     ids = mask = torch.ones(2, length)
        ...     return RecordedCall((), {"ids": ids, "attention_mask": mask}, mask)
        >>> merge_calls([call(3), call(5)], 1000).kwargs["attention_mask"].sum(1)
        tensor([3., 3., 5., 5.])
    """
    if not calls:
        return None
    shapes = [_shape(call) for call in calls]
    common = Counter(shapes).most_common(1)[0][0]
    same = [call for call, shape in zip(calls, shapes, strict=True) if shape == common]
    folds = [c.folds for c in same if c.folds is not None]
    call = RecordedCall(*_join([(c.args, c.kwargs, c.mask) for c in same], same))
    call = replace(call, folds=torch.cat(folds) if folds else None)
    rows, each = call.rows, sum(_lengths(call)) / call.rows
    if rows * each > most:
        spread = torch.linspace(0, rows - 1, max(1, int(most / each))).round().long()
        call = call.select(spread)
    if call.mask is None or call.mask.ndim != 2:
        return call
    order = call.mask.sum(1).argsort(stable=True)
    return trim_padding(call.select(order))


def split_call(call: RecordedCall) -> list[RecordedCall]:
    """The examples of a call in several calls, so that a layer's outputs need less memory.

    Sizes are never all equal, so that tensors without a dimension of examples are noticed.
    """
    sizes = _sizes(_lengths(call))
    if len(sizes) == 1:
        return [trim_padding(call)]
    parts = torch.split(torch.arange(call.rows), sizes)
    return [trim_padding(call.select(rows)) for rows in parts]


def _lengths(call: RecordedCall) -> list[int]:
    """Positions of each example, with the padding that cannot be cut off."""
    if call.mask is not None and call.mask.ndim == 2:
        shortest = trim_padding(call.select(call.mask.sum(1).argmin()[None]))
        if shortest.mask is not None and shortest.mask.shape[1] < call.mask.shape[1]:
            ends = call.mask.bool() * torch.arange(1, call.mask.shape[1] + 1).to(call.mask.device)
            return [max(1, int(end)) for end in ends.amax(1)]
    return [positions_of(call)] * call.rows


def _sizes(lengths: Sequence[int]) -> list[int]:
    """Examples of each piece; sizes are never all equal, unless all are 1."""
    sizes, longest = [0], 0
    for length in lengths:
        longest = max(longest, length)
        if sizes[-1] and (sizes[-1] + 1) * longest > _PIECE:
            sizes.append(0)
            longest = length
        sizes[-1] += 1
    if len(sizes) > 1 and len(set(sizes)) == 1 and sizes[-1] > 1:
        sizes[-1:] = [sizes[-1] - 1, 1]
    return sizes


def trim_padding(call: RecordedCall) -> RecordedCall:
    """The call without the columns at its end that are padding in every example.

    Only where all tensors of that length are whole numbers by example and position, and constant
    there. Any other call is returned unchanged.

    Example:
        >>> mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
        >>> ids = torch.tensor([[7, 8, 0, 0], [9, 0, 0, 0]])
        >>> trim_padding(RecordedCall((ids,), {"attention_mask": mask}, mask)).args
        (tensor([[7, 8],
                [9, 0]]),)
    """
    if call.mask is None or call.mask.ndim != 2:
        return call
    length, used = call.mask.shape[1], call.mask.bool().any(0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else length

    long: list[Tensor] = []

    def first_columns(x: Tensor) -> Tensor:
        swapped = batch_dim(x, call.rows, call.positions) == 1
        if length not in x.shape[1:] and not swapped:
            return x
        long.append(x.mT if swapped and x.ndim == 2 else x)
        return x[:longest] if swapped else x[:, :longest]

    def is_padded(x: Tensor) -> bool:
        if x.ndim != 2 or x.shape[0] != call.rows or x.is_floating_point():
            return False
        return bool((x[:, longest:] == x[0, -1]).all())

    shorter: RecordedCall = map_tensors(call, first_columns)
    others = len(long) > 1  # tensors that long besides the mask
    return shorter if others and longest < length and all(map(is_padded, long)) else call


def _length(call: RecordedCall) -> int:
    if call.mask is not None and call.mask.ndim > 1:
        return int(call.mask.shape[1])
    values = (*call.args, *call.kwargs.values())
    ids = (v for v in values if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point())
    return next((v.shape[1] for v in ids), 1)


def positions_of(call: RecordedCall) -> int:
    """Positions of one example of a call; for images an estimate from their size."""
    values = (*call.args, *call.kwargs.values())
    sizes = [v[0].numel() // 1024 for v in values if isinstance(v, Tensor) and v.ndim and len(v)]
    return max(1, _length(call), *sizes)


def _shape(call: RecordedCall) -> Any:
    """What must agree between calls: everything but the rows and, with a mask, the length."""
    length = _length(call) if _has_mask(call) else None

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            first = batch_dim(value, call.rows, call.positions)
            dims = tuple(
                "rows" if i == first else "length" if n == length else n
                for i, n in enumerate(value.shape)
            )
            return (value.dtype, dims)
        if isinstance(value, (tuple, list)):
            return (type(value), tuple(map(of, value)))
        if isinstance(value, dict):
            return tuple((k, of(v)) for k, v in value.items())
        return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)

    return of((call.args, call.kwargs))


def _has_mask(call: RecordedCall) -> bool:
    """Whether an argument of a call marks which of its positions are padding."""
    found: list[float | None] = []

    def check(x: Tensor) -> Tensor:
        found.append(_padding_value(x, call))
        return x

    map_tensors((call.args, call.kwargs), check)
    return any(value is not None for value in found)


def _padding_value(x: Tensor, call: RecordedCall) -> float | None:
    """The value of padding in a tensor of a call, if that is a mask; else None."""
    if call.mask is None or x.shape != call.mask.shape:
        return None
    real = call.mask.to(x.device).bool()
    if bool((x.bool() == real).all()):
        return 0.0
    if x.dtype == torch.bool and bool((x != real).all()):
        return 1.0
    added = x.is_floating_point() and bool((x[real] == 0).all() and x[~real].isneginf().all())
    return -math.inf if added else None


def _join(values: Sequence[Any], calls: Sequence[RecordedCall]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        dims = [batch_dim(v, c.rows, c.positions) for v, c in zip(values, calls, strict=True)]
        dim = dims[0]
        if dim is None or dims != [dim] * len(dims):
            return max(values, key=lambda v: v.numel())  # the same for every example
        padding = {_padding_value(v, c) for v, c in zip(values, calls, strict=True)} - {None, 0.0}
        shape = [max(sizes) for sizes in zip(*(v.shape for v in values), strict=True)]
        fill = (padding.pop() if len(padding) == 1 else None) or 0.0
        return torch.cat([_padded(v, shape, dim, fill) for v in values], dim=dim)
    if isinstance(first, tuple):
        return tuple(_join(parts, calls) for parts in zip(*values, strict=True))
    if isinstance(first, list):
        return [_join(parts, calls) for parts in zip(*values, strict=True)]
    if isinstance(first, dict):
        return {k: _join([v[k] for v in values], calls) for k in first}
    return first


def _padded(value: Tensor, shape: Sequence[int], skip: int, fill: float) -> Tensor:
    """A tensor padded at its ends to a shape, in all dimensions but one."""
    missing = [n - m for n, m in zip(shape, value.shape, strict=True)]
    missing[skip] = 0
    if not any(missing):
        return value
    sides = [side for n in reversed(missing) for side in (0, n)]
    return functional.pad(value, sides, value=fill)
