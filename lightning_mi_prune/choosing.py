"""NARROW   the axes of a model to those that may shrink: by kind and by name (no torch)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.wording import counted, shortened

__all__ = ["choose_axes", "summary"]


def choose_axes(
    axes: Sequence[WidthAxis],
    *,
    units: Sequence[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    modules: Sequence[str] = (),
) -> list[WidthAxis]:
    """Narrow the axes by kind and by regular expressions searched in their names.

    An expression that is also the name of one of ``modules`` was perhaps meant for that module:
    a PruningWarning then names what it finds instead.

    Args:
        axes: All axes of a model.
        units: Kinds to keep; None keeps neurons and heads, or every kind where there are neither.
        include: Only axes whose name this finds.
        exclude: No axes whose name this finds.
        modules: Paths of modules without any axis (:func:`families.untouched`).

    Raises:
        PruningError: If a kind or an expression matches no axis, is not valid, or nothing is left.
    """
    kinds = sorted({axis.kind for axis in axes})
    if units is None:
        units = [kind for kind in ("ffn", "heads") if kind in kinds] or kinds
    for kind in units:
        if kind not in kinds:
            raise PruningError(
                f"units names {kind!r}, but this model has only units={kinds}; expected some."
            )
    chosen = [axis for axis in axes if axis.kind in units]
    for option, expression in (("include", include), ("exclude", exclude)):
        if expression is not None:
            found = _found(chosen, option, expression, modules)
            chosen = [axis for axis in chosen if (axis in found) == (option == "include")]
    if not chosen:
        raise PruningError(
            f"Nothing is left to prune: units={list(units)}, include={include!r} and "
            f"exclude={exclude!r} leave no axis of {len(axes)}; loosen one of them."
        )
    return chosen


def summary(axes: Sequence[WidthAxis]) -> str:
    """How many groups of which kind, and where.

    Example:
        >>> axes = [WidthAxis(f"net.{i}.ffn", "ffn", 8, 1, (), ("down",)) for i in (0, 1)]
        >>> summary([*axes, WidthAxis("net.0.heads", "heads", 4, 8, (), ("out",))])
        "3 groups: 2 of kind 'ffn' (net.{0,1}.ffn), 1 of kind 'heads' (net.0.heads)"
    """
    parts = []
    for kind in dict.fromkeys(axis.kind for axis in axes):
        names = [axis.name for axis in axes if axis.kind == kind]
        parts.append(f"{len(names)} of kind {kind!r} ({shortened(names)})")
    return f"{counted(len(axes), 'group')}: {', '.join(parts)}"


def _found(
    axes: Sequence[WidthAxis], option: str, expression: str, modules: Sequence[str]
) -> list[WidthAxis]:
    """The axes that an expression finds; it says which module of the same name it does not."""
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise PruningError(
            f"{option}={expression!r} is not a regular expression ({error}); expected one "
            "such as 'ffn$'."
        ) from error
    found = [axis for axis in axes if pattern.search(axis.name)]
    namesakes = _namesakes(pattern, modules)
    paths = shortened(map(repr, namesakes), most=3)
    if not found:
        sample = [axis.name for axis in axes[:4]]
        mention = f" No group belongs to the module {paths}; describe its units (register_family)."
        raise PruningError(
            f"{option}={expression!r} matches no axis; the names look like {sample}."
            f"{mention if namesakes else ''}"
        )
    if namesakes:
        describe = "describe its units with register_family, or "
        warnings.warn(
            f"{option}={expression!r} finds {summary(found)}. No group belongs to the module "
            f"{paths}, which stays as it is: {describe if option == 'include' else ''}write an "
            f"expression that finds groups only, such as '{found[0].kind}$'.",
            PruningWarning,
            stacklevel=4,
        )
    return found


def _namesakes(pattern: re.Pattern[str], modules: Sequence[str]) -> list[str]:
    """The topmost modules whose path, or its last part, is all that an expression asks for."""
    top: list[str] = []
    for path in modules:
        below = any(path.startswith(f"{other}.") for other in top)
        names = {path, path.rpartition(".")[2]}  # numbers are places, which name nothing
        if not below and any(pattern.fullmatch(n) for n in names if not n.isdigit()):
            top.append(path)
    return top
