"""Inputs of consumers: where in them the units of a group are, and which of their entries stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim
from lightning_mi_prune.graph.layouts import (
    Layout,
    kept_positions,
    layout_names,
    layout_terms,
    unit_positions,
)

__all__ = [
    "ConsumerInput",
    "kept_now",
    "multiplied_with",
    "read_dims",
    "widths_now",
]

# Entries beyond which the positions of a flattened map are taken as samples of its channels: a
# covariance of all entries would grow with the square of the positions.
_MOST_ENTRIES = 4096


@dataclass(frozen=True)
class ConsumerInput:
    """The input of one or more consumers, by the dimension of their weights that counts entries.

    Args:
        consumer: The first of the consumers.
        dim: Dimension of its weight that counts the entries.
        layout: What an entry of a sample belongs to.
        fold: Positions of a flattened map that are samples, not entries; 1 where there are none.
    """

    consumer: str
    dim: int
    layout: Layout
    fold: int = 1

    @property
    def names(self) -> frozenset[str]:
        """Groups whose units are in the input."""
        return frozenset(layout_names(self.layout))

    def units(
        self,
        name: str,
        widths: Mapping[str, int],
        within: Mapping[str, Sequence[int]] | None = None,
    ) -> list[list[int]]:
        """Positions of the entries of each unit of a group.

        Args:
            name: Name of the group.
            widths: Present units of every group in the input.
            within: Units of other groups to which to confine it, as positions below their widths.

        Example:
            >>> ConsumerInput("out", 1, (("heads", "size"),)).units(
            ...     "size", {"heads": 2, "size": 3}, {"heads": (1,)}
            ... )
            [[3], [4], [5]]
        """
        found = unit_positions(self.layout, name, widths)
        if not within:
            return found
        inside = set(kept_positions(self.layout, within, widths))
        return [[i for i in unit if i in inside] for unit in found]

    def kept(self, kept: Mapping[str, Sequence[int]], widths: Mapping[str, int]) -> list[int]:
        """Positions of the entries that stay, over all groups in the input."""
        return kept_positions(self.layout, kept, widths)

    @classmethod
    def of(cls, group: DependencyGroup, consumers: Sequence[str]) -> ConsumerInput:
        """The input that some consumers of a group read.

        Args:
            group: The group.
            consumers: Consumers that read the same tensor; the group names a weight of theirs.

        Raises:
            PruningError: If it names none.

        Example:
            >>> flat = PrunableDim("fc.weight", 1, (10, 98), (("channels", 49),))
            >>> group = DependencyGroup("channels", "channels", 2, (flat,), ("fc",))
            >>> ConsumerInput.of(group, ("fc",)).units("channels", {"channels": 2})[1][:3]
            [49, 50, 51]
        """
        for consumer in consumers:
            dims = {s.dim: s for s in group.tensors if s.tensor == f"{consumer}.weight"}
            if dims:
                # A weight with the group in both dimensions is that of a linear layer.
                s = dims.get(1) or next(iter(dims.values()))
                fold = _fold(s)
                layout = s.layout if fold == 1 else tuple(block[:-1] or (1,) for block in s.layout)
                return cls(consumers[0], s.dim, layout, fold)
        raise PruningError(
            f"{group.name!r} names no weight of {', '.join(map(repr, consumers))}; expected the "
            "dimension that reads the units among its tensors. Describe the group anew."
        )


def _fold(s: PrunableDim) -> int:
    """Positions that a large flattened map has for each channel, the same in all its parts."""
    if len(s.shape) != 2 or s.shape[s.dim] <= _MOST_ENTRIES:
        return 1
    last = {block[-1] if block else 1 for block in s.layout}
    (fold,) = last if len(last) == 1 else (1,)
    return fold if isinstance(fold, int) else 1


def read_dims(groups: Sequence[DependencyGroup]) -> dict[str, int]:
    """The dimension that counts the entries read, of the weight of every consumer of the groups.

    Example:
        >>> up = PrunableDim("up.weight", 1, (4, 8), (("ffn",),))
        >>> down = PrunableDim("down.weight", 0, (8, 4), (("ffn",),))
        >>> read_dims([DependencyGroup("ffn", "ffn", 8, (up, down), ("down",))])
        {'down.weight': 0}
    """
    found: dict[str, int] = {}
    for group in groups:
        dims: dict[str, set[int]] = {}
        for s in group.tensors:
            dims.setdefault(s.tensor, set()).add(s.dim)
        for consumers in group.unit_inputs.values():
            for tensor in (f"{consumer}.weight" for consumer in consumers):
                if tensor in dims:
                    found[tensor] = 1 if 1 in dims[tensor] else 0
    return found


def multiplied_with(group: DependencyGroup) -> frozenset[str]:
    """Groups in products with a group: the entries of its units are fewer when they shrink.

    Example:
        >>> read = PrunableDim("out.weight", 1, (4, 8), (("heads", "size"), ("other",)))
        >>> group = DependencyGroup("heads", "heads", 2, (read,), ("out",))
        >>> sorted(multiplied_with(group))
        ['size']
    """
    products = (names for s in group.tensors for names in layout_terms(s.layout))
    return frozenset(n for names in products if group.name in names for n in names) - {group.name}


def widths_now(group: DependencyGroup, current: PruningPlan) -> dict[str, int]:
    """Present widths of a group and of all others that its layouts may name."""
    return {**group.all_widths(current.widths), **current.widths}


def kept_now(
    names: Sequence[str], kept: Mapping[str, Sequence[int]], current: PruningPlan
) -> dict[str, list[int]]:
    """Units that are kept of some groups, as positions in the present model.

    Args:
        names: Names of groups; those without a plan keep all and are left out.
        kept: Units that are kept, in positions of the model as built.
        current: The plan the model carries now.

    Example:
        >>> current = PruningPlan({"ffn": 4}, {"ffn": (0, 2, 3)})
        >>> kept_now(["ffn", "other"], {"ffn": (2, 3)}, current)
        {'ffn': [1, 2]}
    """
    found = {}
    for name in names:
        if name in current.kept:
            index = {unit: i for i, unit in enumerate(current.kept[name])}
            found[name] = [index[unit] for unit in kept[name]]
    return found
