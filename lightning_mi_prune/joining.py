"""JOIN     many stored calls as one, and one call in pieces without their padding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_mi_prune.sample import Example, mapped, rows_dim

__all__ = ["merged", "pieces_of", "positions_of", "trimmed"]

_PIECE = 4096


def merged(calls: Sequence[Example], most: int) -> Example | None:
    """One call with the examples of many, so that one forward pass sees them all.

    Texts of different length are padded, with zeros but for masks that are true where padding is.
    The network must be told of it, so where no argument is such a mask only calls of the commonest
    shape are taken; the same holds for calls that cannot be laid on each other. Short examples come
    first, so that :func:`pieces_of` the call need little padding.

    Args:
        calls: Calls of one network, in the order in which they were made.
        most: Positions that the merged call may have, with the padding that cannot be cut off;
            beyond it examples are left out evenly, for neighbours may be of one length.

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
    call = Example(*_join([(c.args, c.kwargs, c.mask) for c in same], same))
    rows, each = call.rows, sum(_lengths(call)) / call.rows
    if rows * each > most:
        spread = torch.linspace(0, rows - 1, max(1, int(most / each))).round().long()
        call = call.some(spread)
    if call.mask is None or call.mask.ndim != 2:
        return call
    order = call.mask.sum(1).argsort(stable=True)
    return trimmed(call.some(order))


def pieces_of(call: Example) -> list[Example]:
    """The examples of a call in several: what a layer takes for all at once would be large.

    No two sizes are alike throughout, so that what is not by example shows.
    """
    sizes = _sizes(_lengths(call))
    if len(sizes) == 1:
        return [trimmed(call)]
    parts = torch.split(torch.arange(call.rows), sizes)
    return [trimmed(call.some(rows)) for rows in parts]


def _lengths(call: Example) -> list[int]:
    """Positions that each example takes, padding included where it cannot be cut off."""
    padded = positions_of(call)
    if call.mask is None or call.mask.ndim != 2:
        return [padded] * call.rows
    shortest = trimmed(call.some(call.mask.sum(1).argmin()[None]))
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


def trimmed(call: Example) -> Example:
    """The call without the columns at its end that are padding in every example.

    Only where nothing but such columns goes: all tensors of that length are whole numbers by
    example and position, and say one thing there. Any other call is left as it is.

    Example:
        >>> mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
        >>> ids = torch.tensor([[7, 8, 0, 0], [9, 0, 0, 0]])
        >>> trimmed(Example((ids,), {"attention_mask": mask}, mask)).args
        (tensor([[7, 8],
                [9, 0]]),)
    """
    if call.mask is None or call.mask.ndim != 2:
        return call
    length, used = call.mask.shape[1], call.mask.bool().any(0).nonzero()
    longest = int(used[-1]) + 1 if len(used) else length

    long: list[Tensor] = []

    def first_columns(x: Tensor) -> Tensor:
        swapped = rows_dim(x, call.rows, call.positions) == 1
        if length not in x.shape[1:] and not swapped:
            return x
        long.append(x.mT if swapped and x.ndim == 2 else x)
        return x[:longest] if swapped else x[:, :longest]

    def is_padded(x: Tensor) -> bool:
        if x.ndim != 2 or x.shape[0] != call.rows or x.is_floating_point():
            return False
        return bool((x[:, longest:] == x[0, -1]).all())

    shorter: Example = mapped(call, first_columns)
    told = len(long) > 1  # something beside the mask is that long
    return shorter if told and longest < length and all(map(is_padded, long)) else call


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
    length = _length(call) if _tells(call) else None

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            first = rows_dim(value, call.rows, call.positions)
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


def _tells(call: Example) -> bool:
    """Whether an argument of a call says which of its positions are padding."""
    found: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        if _padding_of(x, call) is not None:
            found.append(x)
        return x

    mapped((call.args, call.kwargs), look)
    return bool(found)


def _padding_of(x: Tensor, call: Example) -> float | None:
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


def _join(values: Sequence[Any], calls: Sequence[Example]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        places = [rows_dim(v, c.rows, c.positions) for v, c in zip(values, calls, strict=True)]
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
