"""What widths cost: parameters of the module, or multiply-accumulates of one example."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Protocol

from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import Layout, layout_terms, map_layout, multiplied

__all__ = [
    "Costs",
    "MacCosts",
    "ParameterCosts",
]


class Costs(Protocol):
    """What a model of given widths costs, and what narrower groups save."""

    @property
    def measure(self) -> str:
        """What is counted: ``"parameters"``, ``"MACs"`` or ``"ms"``."""

    def total(self, widths: Mapping[str, float]) -> float:
        """Cost of everything that is counted; groups that are not named keep their width."""

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        """Cost saved when one group shrinks from its width in ``widths`` to each of ``options``."""

    def neighbours(self, name: str) -> frozenset[str]:
        """Other groups whose units cost less when this one shrinks: they share tensors."""


@dataclass(frozen=True)
class _TensorCosts:
    """A sum over tensors, linear in the number of entries of each: a polynomial in widths."""

    groups: Sequence[DependencyGroup]
    fixed: float = 0
    current: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    def _cost_per_entry(self, tensor: str) -> float:
        return 1

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Widths of groups that layouts name but that may not shrink."""
        named = {name: size for group in self.groups for name, size in group.partners}
        return named | dict(self.current)

    def _polynomial(self, layout: Layout) -> dict[tuple[str, ...], int]:
        """The size of a layout by products of widths of the groups that may shrink."""
        free = {group.name for group in self.groups}
        return layout_terms(
            map_layout(layout, lambda name: name if name in free else self._sizes[name])
        )

    @cached_property
    def _terms(self) -> dict[tuple[str, ...], float]:
        """Coefficient of each product of widths, by the groups whose widths are multiplied."""
        shapes: dict[str, tuple[int, ...]] = {}
        layouts: dict[str, dict[int, Layout]] = defaultdict(dict)
        for group in self.groups:
            for s in (s for s in group.tensors if not s.buffer):
                shapes[s.tensor] = s.shape
                layouts[s.tensor].setdefault(s.dim, s.layout)
        terms: dict[tuple[str, ...], float] = defaultdict(float)
        for tensor, shape in shapes.items():
            if not (cost := self._cost_per_entry(tensor)):
                continue
            whole = ((n,) for dim, n in enumerate(shape) if dim not in layouts[tensor])
            parts = [*layouts[tensor].values(), *((block,) for block in whole)]
            for names, number in multiplied(map(self._polynomial, parts)).items():
                terms[names] += number * cost
        return dict(terms)

    @cached_property
    def _along(self) -> dict[str, list[tuple[float, int, list[str]]]]:
        """The products by group: coefficient, power of its own width, the other groups."""
        found: dict[str, list[tuple[float, int, list[str]]]] = defaultdict(list)
        for names, coefficient in self._terms.items():
            for name in set(names):
                others = [other for other in names if other != name]
                found[name].append((coefficient, names.count(name), others))
        return dict(found)

    def _filled(self, widths: Mapping[str, float]) -> dict[str, float]:
        return {**{a.name: self.current.get(a.name, a.size) for a in self.groups}, **widths}

    def total(self, widths: Mapping[str, float]) -> float:
        """Cost of everything that is counted, the fixed part included."""
        at = self._filled(widths)
        return self.fixed + sum(c * math.prod(at[n] for n in ns) for ns, c in self._terms.items())

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        """Cost saved when one group shrinks to each of ``options``."""
        at, powers = self._filled(widths), defaultdict[int, float](float)
        for coefficient, power, others in self._along.get(name, ()):
            powers[power] += coefficient * math.prod(at[other] for other in others)
        now = sum(c * at[name] ** p for p, c in powers.items())
        return [now - sum(c * width**p for p, c in powers.items()) for width in options]

    def neighbours(self, name: str) -> frozenset[str]:
        """Other groups that cut the same tensors."""
        return frozenset(n for _, _, others in self._along.get(name, ()) for n in others)


@dataclass(frozen=True)
class ParameterCosts(_TensorCosts):
    """Parameters of the whole module.

    Args:
        groups: Groups that may shrink, and any other that cuts the same tensors.
        fixed: Parameters of the tensors that no group cuts.
        current: Widths of groups that a caller does not name (default: as built).

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> dims = [PrunableDim("w", i, (6, 4), ((name,),)) for i, name in enumerate("rc")]
        >>> rows = DependencyGroup("r", "ffn", 6, (dims[0],), ("down",))
        >>> columns = DependencyGroup("c", "ffn", 4, (dims[1],), ("down",))
        >>> costs = ParameterCosts([rows, columns], fixed=10)
        >>> costs.total({"r": 6, "c": 4})
        34.0
        >>> costs.savings("r", {"r": 6, "c": 2}, [5, 3])
        [2.0, 6.0]
    """

    measure: ClassVar[str] = "parameters"


@dataclass(frozen=True)
class MacCosts(_TensorCosts):
    """Multiply-accumulates of one example; :func:`macs.measure_macs` fills it from a call.

    Args:
        groups: Groups that may shrink, and any other that cuts the same tensors.
        fixed: Multiply-accumulates that no group changes.
        positions: Positions that pass through each weight in one example, over all calls of its
            layer, by tensor name. Tensors without an entry (biases, norms, embeddings) are free.
        products: Multiply-accumulates that are not of weights (the two products of attention): a
            layout that they are proportional to, and how many there are for each of its entries.
        current: Widths of groups that a caller does not name (default: as built).
    """

    positions: Mapping[str, float] = field(default_factory=dict)
    products: Sequence[tuple[Layout, float]] = ()

    measure: ClassVar[str] = "MACs"

    def _cost_per_entry(self, tensor: str) -> float:
        return self.positions.get(tensor, 0)

    @cached_property
    def _terms(self) -> dict[tuple[str, ...], float]:
        terms = defaultdict[tuple[str, ...], float](float, super()._terms)
        for layout, cost in self.products:
            for names, number in self._polynomial(layout).items():
                terms[names] += number * cost
        return dict(terms)
