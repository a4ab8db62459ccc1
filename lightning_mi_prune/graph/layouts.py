"""Layouts: what a dimension of a tensor consists of, as plain data without torch.

A layout is a sum of blocks, one after another; a block is a product of factors, the outermost
first; a factor is the name of a group, a constant, or a layout of its own. Queries, keys and
values in one matrix are ``(("heads", 64), ("heads", 64), ("heads", 64))``; the flattened output
of a convolution, 49 positions for each channel, is ``(("channels", 49),)``.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "Block",
    "Factor",
    "Layout",
    "innermost",
    "kept_positions",
    "layout_from_json",
    "layout_names",
    "layout_size",
    "layout_terms",
    "map_layout",
    "multiplied",
    "unit_positions",
]

Factor: TypeAlias = "str | int | Layout"
Block: TypeAlias = tuple[Factor, ...]
Layout: TypeAlias = tuple[Block, ...]

_DEEPEST = 8  # a layout in a file that is nested deeper is not one of ours


def layout_size(layout: Layout, widths: Mapping[str, int]) -> int:
    """Number of entries of a dimension.

    Args:
        layout: The layout.
        widths: Units of every group that it names.

    Example:
        >>> layout_size((("kv", 3, 16), ("kv", 16)), {"kv": 2})
        128
    """
    return sum(math.prod(_size(factor, widths) for factor in block) for block in layout)


def _size(factor: Factor, widths: Mapping[str, int]) -> int:
    if isinstance(factor, int):
        return factor
    return widths[factor] if isinstance(factor, str) else layout_size(factor, widths)


def layout_names(layout: Layout) -> tuple[str, ...]:
    """Names of the groups in a layout, each once, in order of appearance.

    Example:
        >>> layout_names((("kv", 3, "size"), ("kv", "size")))
        ('kv', 'size')
    """
    return tuple(dict.fromkeys(_names(layout)))


def _names(layout: Layout) -> Iterator[str]:
    for factor in (factor for block in layout for factor in block):
        if isinstance(factor, str):
            yield factor
        elif isinstance(factor, tuple):
            yield from _names(factor)


def kept_positions(
    layout: Layout, kept: Mapping[str, Sequence[int]], widths: Mapping[str, int]
) -> list[int]:
    """Positions of the entries that stay, in order.

    Args:
        layout: The layout.
        kept: Units that stay of the groups that are cut, as positions below their width.
        widths: Present units of every group that the layout names.

    Example:
        >>> kept_positions((("heads", 2), (1,)), {"heads": (0, 2)}, {"heads": 3})
        [0, 1, 4, 5, 6]
    """
    found: list[int] = []
    start = 0
    for block in layout:
        positions, size = [start], 1
        for factor in reversed(block):  # innermost first: its entries are adjacent
            inner = _kept(factor, kept, widths)
            positions = [position + size * index for index in inner for position in positions]
            size *= _size(factor, widths)
        found += positions
        start += size
    return found


def _kept(
    factor: Factor, kept: Mapping[str, Sequence[int]], widths: Mapping[str, int]
) -> Sequence[int]:
    if isinstance(factor, int):
        return range(factor)
    if isinstance(factor, str):
        return kept.get(factor, range(widths[factor]))
    return kept_positions(factor, kept, widths)


def unit_positions(layout: Layout, name: str, widths: Mapping[str, int]) -> list[list[int]]:
    """Positions of the entries of each unit of a group; other entries are left out.

    Args:
        layout: The layout.
        name: Name of the group.
        widths: Present units of every group that the layout names.

    Returns:
        A list of positions for each unit, all of one length.

    Example:
        >>> unit_positions((("heads", 2), ("heads", 1), (2,)), "heads", {"heads": 2})
        [[0, 1, 4], [2, 3, 5]]
    """
    found: list[list[int]] = [[] for _ in range(widths[name])]
    for position, unit in enumerate(_owners(layout, name, widths)):
        if unit is not None:
            found[unit].append(position)
    return found


def _owners(layout: Layout, name: str, widths: Mapping[str, int]) -> list[int | None]:
    """The unit of a group that each position belongs to."""
    found: list[int | None] = []
    for block in layout:
        owners: list[int | None] = [None]
        for factor in reversed(block):
            if factor == name:
                units: Sequence[int | None] = range(widths[name])
            elif isinstance(factor, tuple):
                units = _owners(factor, name, widths)
            else:
                units = [None] * _size(factor, widths)
            owners = [own if unit is None else unit for unit in units for own in owners]
        found += owners
    return found


def layout_terms(layout: Layout) -> dict[tuple[str, ...], int]:
    """The size of a layout as a polynomial: coefficient of each product of widths.

    Returns:
        Coefficients by the sorted names of the groups whose widths are multiplied.

    Example:
        >>> layout_terms((("kv", 3, "size"), ("kv", "size"), (7,)))
        {('kv', 'size'): 4, (): 7}
    """
    total: Counter[tuple[str, ...]] = Counter()
    for block in layout:
        total.update(multiplied(map(_terms, block)))
    return dict(total)


def _terms(factor: Factor) -> Mapping[tuple[str, ...], int]:
    if isinstance(factor, int):
        return {(): factor}
    return {(factor,): 1} if isinstance(factor, str) else layout_terms(factor)


def innermost(layout: Layout, name: str) -> bool:
    """Whether a unit of a group has no two adjacent entries: nothing comes after it in a product.

    Example:
        >>> innermost((("heads", "size"),), "size"), innermost((("heads", "size"),), "heads")
        (True, False)
    """
    for block in layout:
        for place, factor in enumerate(block):
            inside = factor == name
            if isinstance(factor, tuple) and name in layout_names(factor):
                inside = True
                if not innermost(factor, name):
                    return False
            if inside and any(other != 1 for other in block[place + 1 :]):
                return False
    return True


def multiplied(factors: Iterable[Mapping[tuple[str, ...], int]]) -> dict[tuple[str, ...], int]:
    """The product of polynomials, each as :func:`layout_terms` returns them.

    Example:
        >>> multiplied([{("a",): 1, (): 2}, {("a",): 1, (): 3}])
        {('a', 'a'): 1, ('a',): 5, (): 6}
    """
    product: dict[tuple[str, ...], int] = {(): 1}
    for terms in factors:
        found: Counter[tuple[str, ...]] = Counter()
        for (left, n), (right, m) in itertools.product(product.items(), terms.items()):
            found[tuple(sorted(left + right))] += n * m
        product = dict(found)
    return product


def map_layout(layout: Layout, change: Callable[[str], Factor]) -> Layout:
    """The same layout with every name of a group changed, or replaced by a size.

    Example:
        >>> map_layout((("heads", "size"),), {"heads": "encoder.heads", "size": 8}.__getitem__)
        (('encoder.heads', 8),)
    """

    def mapped(factor: Factor) -> Factor:
        if isinstance(factor, int):
            return factor
        return change(factor) if isinstance(factor, str) else map_layout(factor, change)

    return tuple(tuple(mapped(factor) for factor in block) for block in layout)


def layout_from_json(value: Any) -> Layout:
    """A layout as :func:`json.loads` returns it: lists instead of tuples.

    Raises:
        PruningError: If the value is not a layout.

    Example:
        >>> layout_from_json([["heads", 64], [1]])
        (('heads', 64), (1,))
    """
    return _from_json(value, value, _DEEPEST)


def _from_json(value: Any, whole: Any, depth: int) -> Layout:
    def factor(one: Any) -> Factor:
        if type(one) is str or (type(one) is int and one >= 0):
            return one
        return _from_json(one, whole, depth - 1)

    if type(value) is not list or not all(type(block) is list for block in value) or not depth:
        raise PruningError(
            f"{str(whole)[:80]!r} is not a layout; expected a list of products such as "
            '[["heads", 64]], of names of groups, numbers from 0 and such lists.'
        )
    return tuple(tuple(factor(one) for one in block) for block in value)
