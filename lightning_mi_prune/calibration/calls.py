"""Recorded calls of networks: a bounded sample, joined and taken apart again."""

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
        return batch_size_of((*self.args, *self.kwargs.values())) or 0

    @property
    def positions(self) -> int | None:
        """Positions, where inputs are ``(positions, rows, ...)``; the mask says so by its shape."""
        first = _first((*self.args, *self.kwargs.values()))
        if self.mask is None or self.mask.ndim != 2 or first is None or first.is_nested:
            return None
        rows, positions = self.mask.shape
        return positions if first.shape[:2] == (positions, rows) and positions != rows else None

    def select(self, index: Tensor) -> RecordedCall:
        """Some examples of the call, copied."""
        values = (self.args, self.kwargs, self.mask)
        args, kwargs, mask = select_examples(values, self.rows, index, self.positions)
        return replace(self, args=args, kwargs=kwargs, mask=mask)


def batch_size_of(values: Iterable[Any]) -> int | None:
    """Batch size of a call: rows of its first tensor with two dimensions or more."""
    first = _first(values)
    return None if first is None else first.size(0)


def _first(values: Iterable[Any]) -> Tensor | None:
    return next((v for v in values if isinstance(v, Tensor) and v.ndim > 1), None)


def batch_dim(x: Tensor, rows: int | None, positions: int | None = None) -> int | None:
    """The dimension of a tensor that counts the examples of a call; None: it is not by example.

    Args:
        x: One of the tensors of the call.
        rows: Examples of the call.
        positions: Positions of the call, where they come before the examples (:class:`RecordedCall`).

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
    """The given examples of every tensor with that many, in nested containers."""
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


def is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` opens it."""
    if type(value) is dict:
        return all(is_plain(v) for v in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    if type(value) is Tensor:
        return not value.is_nested
    return value is None or type(value) in (bool, int, float, str)


def update_calls(
    old: Mapping[str, RecordedCall], new: Mapping[str, RecordedCall]
) -> Mapping[str, RecordedCall]:
    """The old calls, so that their work can be compared, in the numbers of the new ones."""
    if not old:
        return new
    return {
        path: replace(call, autocast=new[path].autocast if path in new else call.autocast)
        for path, call in old.items()
    }


def in_weight_precision(call: RecordedCall, network: nn.Module) -> RecordedCall:
    """The call with numbers as fine as the weights, which cannot read what autocast made coarse."""
    dtype = next((p.dtype for p in network.parameters()), torch.float32)

    def cast(x: Tensor) -> Tensor:
        coarse = x.dtype in (torch.bfloat16, torch.float16)
        return x.to(dtype) if coarse and dtype == torch.float32 else x

    return replace(call, args=map_tensors(call.args, cast), kwargs=map_tensors(call.kwargs, cast))


def first_call(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], mask: Tensor | None
) -> RecordedCall:
    """The first example of a call that a module just received, copied."""
    first = RecordedCall(args, dict(kwargs), mask).select(torch.zeros(1, dtype=torch.long))
    return replace(first, autocast=_autocast(module))


def _autocast(module: nn.Module) -> str:
    """Type that products have where the module runs now, if that is not their own."""
    place = next((p.device.type for p in module.parameters()), "cpu")
    if not torch.is_autocast_enabled(place):
        return ""
    return str(torch.get_autocast_dtype(place)).removeprefix("torch.")


class StoredCalls:
    """Examples of real calls, so that a smaller model can be run on them.

    Args:
        positions: Positions to store for each network; 0 stores none.
        batches: Batches that will be heard; None takes positions first come, first served.
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
        """Store some examples of a call that is under way.

        One that brings more than plain values is left out: a cache would go on filling up, and
        what other objects hold cannot be kept apart by example, nor written to a checkpoint.

        Args:
            path: The network that received it.
            call: The call.
            real: Examples of it, from its start, that do not only repeat others.
            each: Positions that an example of it has.
        """
        rows = call.rows
        if not self._quota or not _is_plain(call):
            return
        if call.mask is not None and call.mask.ndim > 1:
            each = float(call.mask.sum()) / max(1, rows)
        room = self._room.get(path, self._positions)
        owed = min(self._owed.get(path, 0.0) + self._quota, room)
        wanted = min(real, int(owed / max(1.0, each)))
        if path not in self.stored:
            wanted = max(1, wanted)  # less than one example of each batch would be none for ever
        if wanted:
            index = torch.randperm(real, generator=self._generator)[:wanted].sort().values
            self.stored.setdefault(path, []).append(call.select(index))
        self._owed[path], self._room[path] = owed - wanted * each, room - wanted * each


def _is_plain(call: RecordedCall) -> bool:
    """Whether it is made of plain values, but for what kinds of tensors there are."""

    def bare(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_nested:
            return None
        if type(value) in (list, tuple):
            return [bare(part) for part in value]
        return {key: bare(part) for key, part in value.items()} if type(value) is dict else value

    return is_plain(bare([list(call.args), call.kwargs]))


_PIECE = 4096


def merge_calls(calls: Sequence[RecordedCall], most: int) -> RecordedCall | None:
    """One call with the examples of many, so that one forward pass sees them all.

    Texts of different length are padded, with zeros but for masks that are true where padding is.
    The network must be told of it, so where no argument is such a mask only calls of the commonest
    shape are taken; the same holds for calls that cannot be laid on each other. Short examples come
    first, so that :func:`split_call` the call need little padding.

    Args:
        calls: Calls of one network, in the order in which they were made.
        most: Positions that the merged call may have, with the padding that cannot be cut off;
            beyond it examples are left out evenly, for neighbours may be of one length.

    Example:
        >>> def call(length):
        ...     mask = torch.ones(2, length)
        ...     return RecordedCall((), {"ids": torch.ones(2, length), "attention_mask": mask}, mask)
        >>> merge_calls([call(3), call(5)], 1000).kwargs["attention_mask"].sum(1)
        tensor([3., 3., 5., 5.])
    """
    if not calls:
        return None
    shapes = [_shape(call) for call in calls]
    common = Counter(shapes).most_common(1)[0][0]
    same = [call for call, shape in zip(calls, shapes, strict=True) if shape == common]
    call = RecordedCall(*_join([(c.args, c.kwargs, c.mask) for c in same], same))
    rows, each = call.rows, sum(_lengths(call)) / call.rows
    if rows * each > most:
        spread = torch.linspace(0, rows - 1, max(1, int(most / each))).round().long()
        call = call.select(spread)
    if call.mask is None or call.mask.ndim != 2:
        return call
    order = call.mask.sum(1).argsort(stable=True)
    return trim_padding(call.select(order))


def split_call(call: RecordedCall) -> list[RecordedCall]:
    """The examples of a call in several: what a layer takes for all at once would be large.

    No two sizes are alike throughout, so that what is not by example shows.
    """
    sizes = _sizes(_lengths(call))
    if len(sizes) == 1:
        return [trim_padding(call)]
    parts = torch.split(torch.arange(call.rows), sizes)
    return [trim_padding(call.select(rows)) for rows in parts]


def _lengths(call: RecordedCall) -> list[int]:
    """Positions that each example takes, padding included where it cannot be cut off."""
    padded = positions_of(call)
    if call.mask is None or call.mask.ndim != 2:
        return [padded] * call.rows
    shortest = trim_padding(call.select(call.mask.sum(1).argmin()[None]))
    if shortest.mask is None or shortest.mask.shape[1] == call.mask.shape[1]:
        return [padded] * call.rows
    ends = call.mask.bool() * torch.arange(1, call.mask.shape[1] + 1).to(call.mask.device)
    return [max(1, int(end)) for end in ends.amax(1)]


def _sizes(lengths: Sequence[int]) -> list[int]:
    """Examples of each piece; no two sizes are alike throughout."""
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

    Only where nothing but such columns goes: all tensors of that length are whole numbers by
    example and position, and say one thing there. Any other call is left as it is.

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
    told = len(long) > 1  # something beside the mask is that long
    return shorter if told and longest < length and all(map(is_padded, long)) else call


def _length(call: RecordedCall) -> int:
    if call.mask is not None and call.mask.ndim > 1:
        return int(call.mask.shape[1])
    values = (*call.args, *call.kwargs.values())
    ids = (v for v in values if isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point())
    return next((v.shape[1] for v in ids), 1)


def positions_of(call: RecordedCall) -> int:
    """Positions of one example of a call; of pictures by their size, a guess."""
    values = (*call.args, *call.kwargs.values())
    sizes = [v[0].numel() // 1024 for v in values if isinstance(v, Tensor) and v.ndim and len(v)]
    return max(1, _length(call), *sizes)


def _shape(call: RecordedCall) -> Any:
    """What must agree between calls: everything but the rows and, with a mask, the length."""
    length = _length(call) if _tells(call) else None

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


def _tells(call: RecordedCall) -> bool:
    """Whether an argument of a call says which of its positions are padding."""
    found: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        if _padding_of(x, call) is not None:
            found.append(x)
        return x

    map_tensors((call.args, call.kwargs), look)
    return bool(found)


def _padding_of(x: Tensor, call: RecordedCall) -> float | None:
    """What a mask says of padding, if a tensor of a call is one."""
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
        places = [batch_dim(v, c.rows, c.positions) for v, c in zip(values, calls, strict=True)]
        place = places[0]
        if place is None or places != [place] * len(places):
            return max(values, key=lambda v: v.numel())  # the same for every example
        said = [_padding_of(v, c) for v, c in zip(values, calls, strict=True)]
        told = {fill for fill in said if fill}
        shape = [max(sizes) for sizes in zip(*(v.shape for v in values), strict=True)]
        fill = next(iter(told)) if len(told) == 1 else 0.0
        return torch.cat([_padded(v, shape, place, fill) for v in values], dim=place)
    if isinstance(first, tuple):
        return tuple(_join(parts, calls) for parts in zip(*values, strict=True))
    if isinstance(first, list):
        return [_join(parts, calls) for parts in zip(*values, strict=True)]
    if isinstance(first, dict):
        return {k: _join([v[k] for v in values], calls) for k in first}
    return first


def _padded(value: Tensor, shape: Sequence[int], place: int, fill: float) -> Tensor:
    """A tensor as large as a shape but for one dimension."""
    missing = [n - m for n, m in zip(shape, value.shape, strict=True)]
    missing[place] = 0
    if not any(missing):
        return value
    sides = [side for n in reversed(missing) for side in (0, n)]
    return functional.pad(value, sides, value=fill)
