"""ALLOT    from a budget to the width of every axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.errors import PruningError

__all__ = ["sparsity_of", "uniform_widths"]


def sparsity_of(axes: Sequence[WidthAxis], widths: Mapping[str, int]) -> float:
    """Share of the prunable parameters that is gone, against the model as built."""
    return 1 - count_parameters(axes, widths) / count_parameters(axes)


def uniform_widths(
    axes: Sequence[WidthAxis],
    sparsity: float,
    *,
    multiple: int = 8,
    floor: float = 0.05,
) -> dict[str, int]:
    """Widths with the same share kept everywhere, that remove at least ``sparsity``.

    Whole heads are few and neurons many: heads take the nearest whole number, and the neurons,
    in steps of ``multiple``, make up the difference, so the budget is met as closely as it can be.

    Args:
        axes: What may shrink.
        sparsity: Share of the prunable parameters to remove, against the model as built.
        multiple: Widths of axes with one entry a unit are multiples of this (where they were).
        floor: Smallest share of an axis that stays; at least one step always does.

    Raises:
        PruningError: If the floors do not let that much go.

    Example:
        >>> from lightning_mi_prune.axes import Slice
        >>> ffn = WidthAxis("ffn", "ffn", 64, 1, (Slice("w", 0, (64, 8)),), ("down",))
        >>> uniform_widths([ffn], 0.5)
        {'ffn': 32}
    """
    steps = {axis.name: _step(axis, multiple) for axis in axes}
    least = {axis.name: _least(axis, steps[axis.name], floor) for axis in axes}
    reach = sparsity_of(axes, least)
    if sparsity > reach + 1e-12:
        raise PruningError(
            f"sparsity={sparsity:g} is out of reach: with floor={floor:g} and multiple={multiple} "
            f"at most {math.floor(reach * 1e4) / 1e4:.4f} of the prunable parameters can go. "
            "Lower the sparsity, the floor or the multiple, or include more axes."
        )
    choices = {axis.name: -(-axis.size // steps[axis.name]) for axis in axes}
    fine = [axis for axis in axes if choices[axis.name] == max(choices.values())]
    coarse = [axis for axis in axes if axis not in fine]
    kept = 1.0 - sparsity
    while True:
        widths = {a.name: _nearest(a, kept, steps[a.name], least[a.name]) for a in coarse}
        shares = sorted({w / a.size for a in fine for w in _widths(a, steps, least)}, reverse=True)
        for share in shares:
            widths |= {a.name: _below(a, share, steps[a.name], least[a.name]) for a in fine}
            if sparsity_of(axes, widths) >= sparsity - 1e-12:
                return {axis.name: widths[axis.name] for axis in axes}
        kept -= min(1 / axis.size for axis in coarse)


def _step(axis: WidthAxis, multiple: int) -> int:
    return multiple if axis.entries == 1 and axis.size > multiple else 1


def _least(axis: WidthAxis, step: int, floor: float) -> int:
    return min(axis.size, max(step, step * math.ceil(floor * axis.size / step - 1e-9)))


def _nearest(axis: WidthAxis, share: float, step: int, least: int) -> int:
    return min(axis.size, max(least, step * round(share * axis.size / step)))


def _below(axis: WidthAxis, share: float, step: int, least: int) -> int:
    if share >= 1:
        return axis.size
    return max(least, step * math.floor(share * axis.size / step + 1e-9))


def _widths(axis: WidthAxis, steps: Mapping[str, int], least: Mapping[str, int]) -> list[int]:
    step = steps[axis.name]
    return [*range(least[axis.name], axis.size, step), axis.size]
