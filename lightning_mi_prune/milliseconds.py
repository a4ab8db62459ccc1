"""PACE     LatencyCosts: what widths cost in milliseconds, from a table that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.latency import LatencyCurve, LatencyTable

__all__ = ["LatencyCosts"]


@dataclass(frozen=True)
class LatencyCosts:
    """Milliseconds of one forward pass, from a table.

    Axes save side by side. One that shares tensors with all others (the residual stream) makes
    everything narrower, so its share multiplies with what the others leave. Heads and their
    dimensions share the time of one attention: either saves of it in proportion to what the other
    leaves.

    Args:
        table: What was measured.
        axes: Axes that may shrink, and any other of the table that has shrunk.
        held: Present widths of axes that a caller does not name (default: as built).

    Raises:
        PruningError: If the table does not know one of the axes.

    Example:
        >>> from lightning_mi_prune.latency import Device
        >>> axis = WidthAxis("ffn", "ffn", 64, 1, (), ("down",))
        >>> curve = LatencyCurve(("ffn",), widths=(64, 32, 0), saved=(0.0, 1.0, 3.0))
        >>> table = LatencyTable(Device("cpu", "any", 1, "2.9", "float32"), 1, 32, 10.0, (curve,))
        >>> LatencyCosts(table, [axis]).total({"ffn": 16})
        8.0
    """

    table: LatencyTable
    axes: Sequence[WidthAxis]
    held: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for axis in self.axes:
            self.table.curve(axis)

    @property
    def measure(self) -> str:
        """Milliseconds."""
        return "ms"

    @cached_property
    def _pairs(self) -> dict[str, str]:
        """Heads by their dimensions, and dimensions by their heads."""
        names = {axis.name for axis in self.axes}
        return {axis.name: axis.crossed for axis in self.axes if axis.crossed in names}

    @cached_property
    def _hubs(self) -> frozenset[str]:
        tensors = {axis.name: {s.tensor for s in axis.slices} for axis in self.axes}
        many = len(tensors) > 1
        return frozenset(
            name
            for name, mine in tensors.items()
            if many and name not in self._pairs and all(map(mine.__and__, tensors.values()))
        )

    @cached_property
    def _curves(self) -> dict[str, tuple[LatencyCurve, int]]:
        now = {axis.name: axis.size for axis in self.axes} | dict(self.held)
        return {axis.name: (self.table.curve(axis), now[axis.name]) for axis in self.axes}

    def _saved(self, name: str, widths: Mapping[str, float]) -> float:
        """Milliseconds that one axis saves where all others are as built."""
        curve, held = self._curves[name]
        return curve.at(widths.get(name, held))

    def _left(self, name: str, widths: Mapping[str, float]) -> float:
        """Share of what an axis could save that the axis it crosses has not saved already."""
        if name not in self._pairs:
            return 1.0
        other = self._pairs[name]
        most = max(_all(self._curves[axis][0]) for axis in (name, other))
        return 1 - self._saved(other, widths) / most if most else 1.0

    def _factors(self, widths: Mapping[str, float]) -> tuple[float, float]:
        """What hubs leave of the dense time, and what the others leave."""
        dense = self.table.dense_ms
        hubs = math.prod(1 - self._saved(name, widths) / dense for name in self._hubs)
        others = 0.0
        for name in self._curves:
            if name in self._hubs:
                continue
            # Of two that cross, the first counts whole and the second by what the first leaves.
            second = self._pairs.get(name, name) < name
            others += self._saved(name, widths) * (self._left(name, widths) if second else 1.0)
        return hubs, 1 - others / dense

    def total(self, widths: Mapping[str, float]) -> float:
        """Milliseconds of one forward pass."""
        return self.table.dense_ms * math.prod(self._factors(widths))

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        """Milliseconds that go when one axis shrinks to each of ``options``."""
        (hubs, others), curve = self._factors({**widths, name: math.inf}), self._curves[name][0]
        scale = others if name in self._hubs else self._left(name, widths)
        scale *= hubs  # at full width the axis itself takes nothing away
        now = self._saved(name, widths)
        return [scale * (curve.at(width) - now) for width in options]

    def neighbours(self, name: str) -> frozenset[str]:
        """The axes that multiply with this one."""
        found = frozenset(self._curves) if name in self._hubs else self._hubs
        return (found | {self._pairs.get(name, name)}) - {name}


def _all(curve: LatencyCurve) -> float:
    """Milliseconds that would go without the last units, too, where they must stay."""
    most, least = curve.widths[0], curve.widths[-1]
    return curve.saved[-1] * most / (most - least) if least < most else 0.0
