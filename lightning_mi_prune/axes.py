"""WHAT     WidthAxis: what a model can lose, as names and sizes (plain data, no torch)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.plan import Plan

__all__ = [
    "Count",
    "Selects",
    "Silence",
    "Slice",
    "WidthAxis",
    "as_built",
    "below",
    "choose_axes",
    "count_parameters",
    "full_plan",
]


@dataclass(frozen=True)
class Slice:
    """One dimension of one tensor that shrinks with an axis.

    Args:
        tensor: Qualified parameter name, ``"encoder.layer.0.output.dense.weight"``.
        dim: Dimension that is cut.
        shape: Shape of the tensor as built.
    """

    tensor: str
    dim: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """A number on a module that must follow the axis: ``module.attribute = units * per_unit``.

    Args:
        module: Path of the module.
        attribute: Attribute that holds the number.
        per_unit: Amount for each unit.
        sequence: Whether the attribute is a tuple of this one number (``normalized_shape``).
    """

    module: str
    attribute: str
    per_unit: int = 1
    sequence: bool = False


@dataclass(frozen=True)
class Silence:
    """A module whose ``forward`` cannot run without units, and what it then says: nothing.

    While the axis is empty, ``forward`` returns the sum of what ``projections`` make of its input
    (a tensor without entries, through which gradients still pass), read by ``reader`` if the module
    holds that too; the residual stream carries on.

    Args:
        module: Path of the module.
        projections: Paths of the linear modules that make the units.
        reader: Path of the linear module that reads them, where the module calls it itself.
        dropout: Path of what the module then drops out with, if it does.
        norm: Path of the normalisation of output plus input, where the module holds that too.
        pair: Whether ``forward`` returns a pair of output and attention weights (None then).
    """

    module: str
    projections: tuple[str, ...]
    reader: str | None = None
    dropout: str | None = None
    norm: str | None = None
    pair: bool = True

    def prefixed(self, path: Callable[[str], str]) -> Silence:
        """The same, with every module path mapped by ``path``."""
        return replace(
            self,
            module=path(self.module),
            projections=tuple(path(p) for p in self.projections),
            reader=None if self.reader is None else path(self.reader),
            dropout=None if self.dropout is None else path(self.dropout),
            norm=None if self.norm is None else path(self.norm),
        )


@dataclass(frozen=True)
class Selects:
    """An argument of a module's ``forward`` that brings something for every unit as built.

    It is made once for all layers, so it cannot shrink with one of them: the module takes the
    entries of its own units out of it.

    Args:
        module: Path of the module.
        argument: Name of the argument.
        dim: Dimension of the argument that counts the units.
    """

    module: str
    argument: str
    dim: int = 1


@dataclass(frozen=True)
class WidthAxis:
    """Units of one kind at one place, and every tensor that must shrink with them.

    Args:
        name: Path of the axis, ``"encoder.layer.0.ffn"``.
        kind: ``"ffn"``, ``"heads"``, ``"pooler"`` or ``"residual"``; free for other families.
        size: Number of units as built (neurons or heads).
        entries: Scalars per unit (1 for a neuron, the head size for a head).
        slices: The tensors cut together.
        readers: Linear modules that read the units: their input is listened to, their output is
            the layer above, their weight takes the fold-in.
        sites: The readers in groups that read the same input; empty means one group of all. The
            residual stream has a site wherever it is read.
        skip: Module whose input is the residual stream that is added to the reader's output.
        above: Linear modules above that read the reader's output, through norms and skips.
        norms: Normalisations over the units of the axis.
        silence: What stands in where a module cannot run without units; such an axis and one with
            ``may_vanish`` may lose all of them.
        may_vanish: Whether the axis may lose all its units.
        selects: Arguments out of which a module takes what belongs to its units.
        counts: Numbers on modules that follow the axis.
        network: Path of the network the axis belongs to.
        scope: Path of the module whose ``forward`` receives ``attention_mask``.
        config: Field of the network's config that holds the width when it is the same everywhere.
        tie: Config field that must equal ``units * entries`` for an ordinary config: transformers
            derive the head size from the hidden size and the number of heads.
        twins: Further config fields that hold the same number as ``config``.
        level: Height in the network; the sweep runs from the highest level down.
    """

    name: str
    kind: str
    size: int
    entries: int
    slices: tuple[Slice, ...]
    readers: tuple[str, ...]
    counts: tuple[Count, ...] = ()
    network: str = ""
    scope: str = ""
    config: str | None = None
    level: int = 0
    sites: tuple[tuple[str, ...], ...] = ()
    skip: str | None = None
    above: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    silence: tuple[Silence, ...] = ()
    may_vanish: bool = False
    selects: tuple[Selects, ...] = ()
    tie: str | None = None
    twins: tuple[str, ...] = ()

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """Where the axis is listened to: the readers of each site, by the key of its sums."""
        if not self.sites:
            return {self.name: self.readers}
        return {f"{self.name}@{readers[0]}": readers for readers in self.sites}

    def prefixed(self, prefix: str) -> WidthAxis:
        """The same axis, named from a module that holds this network at ``prefix``."""
        path = partial(below, prefix)
        return replace(
            self,
            name=path(self.name),
            slices=tuple(replace(s, tensor=path(s.tensor)) for s in self.slices),
            readers=tuple(path(r) for r in self.readers),
            sites=tuple(tuple(path(r) for r in site) for site in self.sites),
            skip=None if self.skip is None else path(self.skip),
            above=tuple(path(r) for r in self.above),
            norms=tuple(path(n) for n in self.norms),
            silence=tuple(s.prefixed(path) for s in self.silence),
            selects=tuple(replace(s, module=path(s.module)) for s in self.selects),
            counts=tuple(replace(c, module=path(c.module)) for c in self.counts),
            network=path(self.network),
            scope=path(self.scope),
        )


def below(prefix: str, path: str) -> str:
    """A path named from a module that holds, at ``prefix``, the one it is named from now."""
    return ".".join(filter(None, (prefix, path)))


def full_plan(axes: Sequence[WidthAxis]) -> Plan:
    """The plan that keeps every unit of every axis."""
    return Plan.full({axis.name: axis.size for axis in axes})


def as_built(axes: Sequence[WidthAxis], sizes: Mapping[str, int]) -> list[WidthAxis]:
    """Axes found on an already cut model, restated with the sizes they were built with."""
    grown = {
        (s.tensor, s.dim): sizes.get(axis.name, axis.size) * axis.entries
        for axis in axes
        for s in axis.slices
    }

    def shape(s: Slice) -> tuple[int, ...]:
        return tuple(grown.get((s.tensor, d), n) for d, n in enumerate(s.shape))

    return [
        replace(
            axis,
            size=sizes.get(axis.name, axis.size),
            slices=tuple(replace(s, shape=shape(s)) for s in axis.slices),
        )
        for axis in axes
    ]


def count_parameters(axes: Sequence[WidthAxis], widths: Mapping[str, int] | None = None) -> int:
    """Parameters of all tensors that the axes cut, at the given widths (default: as built).

    A tensor cut along two axes counts once, with both dimensions shrunk.

    Example:
        >>> ffn = WidthAxis(
        ...     "ffn", "ffn", size=8, entries=1, readers=("down",),
        ...     slices=(Slice("up.weight", 0, (8, 4)), Slice("down.weight", 1, (4, 8))),
        ... )
        >>> count_parameters([ffn]), count_parameters([ffn], {"ffn": 2})
        (64, 16)
    """
    shapes: dict[str, list[int]] = {}
    for axis in axes:
        width = axis.size if widths is None else widths[axis.name]
        for s in axis.slices:
            shapes.setdefault(s.tensor, list(s.shape))[s.dim] = width * axis.entries
    return sum(math.prod(shape) for shape in shapes.values())


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
