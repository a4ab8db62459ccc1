"""NARROW   the axes of a model to those that may shrink: by kind and by name (no torch)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError

__all__ = ["choose_axes"]


def choose_axes(
    axes: Sequence[WidthAxis],
    *,
    units: Sequence[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> list[WidthAxis]:
    """Narrow the axes by kind and by regular expressions searched in their names.

    Args:
        axes: All axes of a model.
        units: Kinds to keep; None keeps neurons and heads, or every kind where there are neither.
        include: Only axes whose name this finds.
        exclude: No axes whose name this finds.

    Raises:
        PruningError: If a kind or an expression matches no axis, is not valid, or nothing is left.
    """
    kinds = sorted({axis.kind for axis in axes})
    if units is None:
        units = [kind for kind in ("ffn", "heads") if kind in kinds] or kinds
    for kind in units:
        if kind not in kinds:
            raise PruningError(f"units names {kind!r}, but this model has only units={kinds}.")
    chosen = [axis for axis in axes if axis.kind in units]
    chosen = _filter(chosen, "include", include, keep=True)
    chosen = _filter(chosen, "exclude", exclude, keep=False)
    if not chosen:
        raise PruningError(
            f"Nothing is left to prune: units={list(units)}, include={include!r} and "
            f"exclude={exclude!r} leave no axis of {len(axes)}; loosen one of them."
        )
    return chosen


def _filter(
    axes: list[WidthAxis], option: str, expression: str | None, *, keep: bool
) -> list[WidthAxis]:
    if expression is None:
        return axes
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise PruningError(
            f"{option}={expression!r} is not a regular expression: {error}."
        ) from error
    hits = {axis.name for axis in axes if pattern.search(axis.name)}
    if not hits:
        sample = [axis.name for axis in axes[:4]]
        raise PruningError(
            f"{option}={expression!r} matches no axis; the names look like {sample}."
        )
    return [axis for axis in axes if (axis.name in hits) == keep]
