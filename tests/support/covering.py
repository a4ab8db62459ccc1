"""Fewer cases than a full product that still bring all values together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

__all__ = ["half"]


def half(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Half of the product: whatever values all options but one have, some case has them.

    Of three options, that is every pair of values.

    >>> half("ab", "cd", "ef")
    [('a', 'c', 'e'), ('a', 'd', 'f'), ('b', 'c', 'f'), ('b', 'd', 'e')]
    """
    places = itertools.product(*(range(len(values)) for values in options))
    return [
        tuple(values[place] for values, place in zip(options, chosen, strict=True))
        for chosen in places
        if sum(chosen) % 2 == 0
    ]
