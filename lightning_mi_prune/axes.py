"""WHAT     WidthAxis: what a model can lose, as names and sizes (plain data, no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from lightning_mi_prune.parts import Count, Selects, Silence, Slice, Turn
from lightning_mi_prune.plan import Plan

__all__ = [
    "Count",
    "Selects",
    "Silence",
    "Slice",
    "Turn",
    "WidthAxis",
    "as_built",
    "below",
    "count_parameters",
    "full_plan",
]


@dataclass(frozen=True)
class WidthAxis:
    """Units of one kind at one place, and every tensor that must shrink with them.

    Args:
        name: Path of the axis, ``"encoder.layer.0.ffn"``.
        kind: ``"ffn"``, ``"heads"``, ``"dims"`` (dimensions of all heads of a layer),
            ``"pooler"`` or ``"residual"``; free for other families.
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
        crossed: Axis that cuts the same dimensions of tensors: every unit of the one has an entry
            for each unit of the other, as heads and their dimensions do.
        spread: Whether the entries of a unit lie apart, one in each unit of ``crossed``.
        turn: What must be turned before units can go: they are the directions of a head.
        here: Its name where layers below are gone; the name itself unless layers went.
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
    crossed: str = ""
    spread: bool = False
    turn: Turn | None = None
    here: str = ""

    @property
    def places(self) -> dict[str, tuple[str, ...]]:
        """Where the axis is listened to: the readers of each site, by the key of its sums."""
        if not self.sites:
            return {self.name: self.readers}
        return {f"{self.name}@{readers[0]}": readers for readers in self.sites}

    @property
    def reads(self) -> dict[str, tuple[str, ...]]:
        """Those of the places where linear layers read the units."""
        if self.turn is None:
            return self.places
        return {f"{self.name}@{self.turn.reader}": (self.turn.reader,)}

    def prefixed(self, prefix: str) -> WidthAxis:
        """The same axis, named from a module that holds this network at ``prefix``."""
        path = partial(below, prefix)
        crossed = path(self.crossed) if self.crossed else ""
        return replace(self.moved(path), name=path(self.name), crossed=crossed)

    def entries_at(self, widths: Mapping[str, int]) -> int:
        """Entries per unit at the given widths: what is gone of ``crossed`` has none.

        Example:
            >>> heads = WidthAxis("heads", "heads", 12, 32, (), ("o",), crossed="dims")
            >>> heads.entries_at({"heads": 6, "dims": 8}), heads.entries_at({"heads": 6})
            (8, 32)
        """
        return widths.get(self.crossed, self.entries)

    def moved(self, path: Callable[[str], str | None]) -> WidthAxis:
        """The same axis where its modules stand at other paths; those without one are left out.

        Args:
            path: The present path of a module or tensor by the one it was built at, or None.
        """

        def paths(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(p for name in names if (p := path(name)) is not None)

        def certain(name: str) -> str:
            return path(name) or ""

        return replace(
            self,
            here=path(self.here or self.name) or "",
            slices=tuple(replace(s, tensor=p) for s in self.slices if (p := path(s.tensor))),
            readers=paths(self.readers),
            sites=tuple(site for group in self.sites if (site := paths(group))),
            skip=None if self.skip is None else path(self.skip),
            above=paths(self.above),
            norms=paths(self.norms),
            silence=tuple(s.prefixed(certain) for s in self.silence if path(s.module) is not None),
            selects=tuple(
                replace(s, module=p) for s in self.selects if (p := path(s.module)) is not None
            ),
            counts=tuple(
                replace(c, module=p) for c in self.counts if (p := path(c.module)) is not None
            ),
            network=certain(self.network),
            scope=certain(self.scope),
            turn=self.turn.prefixed(certain) if self.turn else None,
        )


def below(prefix: str, path: str) -> str:
    """A path named from a module that holds, at ``prefix``, the one it is named from now."""
    return ".".join(filter(None, (prefix, path)))


def full_plan(axes: Sequence[WidthAxis]) -> Plan:
    """The plan that keeps every unit of every axis."""
    return Plan.full({axis.name: axis.size for axis in axes})


def as_built(axes: Sequence[WidthAxis], sizes: Mapping[str, int]) -> list[WidthAxis]:
    """Axes found on an already cut model, restated with the sizes they were built with."""
    built = {axis.name: sizes.get(axis.name, axis.size) for axis in axes}
    grown = {
        (s.tensor, s.dim): built[axis.name] * axis.entries_at(built)
        for axis in axes
        for s in axis.slices
    }

    def shape(s: Slice) -> tuple[int, ...]:
        return tuple(grown.get((s.tensor, d), n) for d, n in enumerate(s.shape))

    return [
        replace(
            axis,
            size=built[axis.name],
            entries=axis.entries_at(built),
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
    at = {axis.name: axis.size if widths is None else widths[axis.name] for axis in axes}
    for axis in axes:
        for s in axis.slices:
            shape = shapes.setdefault(s.tensor, list(s.shape))
            shape[s.dim] = at[axis.name] * axis.entries_at(at)
    return sum(math.prod(shape) for shape in shapes.values())
