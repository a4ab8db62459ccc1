"""Inputs of consumers: where in them the units of a group are, and which of their entries stay."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
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
    "ReadWeight",
    "kept_now",
    "multiplied_with",
    "read_above",
    "read_dims",
    "weight_name",
    "widths_now",
]

# Entries beyond which the positions of a flattened map are taken as samples of its channels: a
# covariance of all entries would grow with the square of the positions.
_MOST_ENTRIES = 4096


def weight_name(consumer: str, names: Container[str]) -> str:
    """Name of the weight of a consumer: that of a layer, or the parameter that it is.

    Args:
        consumer: Path of the consumer.
        names: Names of parameters.

    Example:
        >>> weight_name("fc", ["fc.weight"]), weight_name("experts.down", ["experts.down"])
        ('fc.weight', 'experts.down')
    """
    return consumer if consumer in names else f"{consumer}.weight"


@dataclass(frozen=True)
class ReadWeight:
    """The weight of a consumer, and which of its dimensions counts what.

    Args:
        tensor: Its name.
        read: Dimension that counts the entries it reads.
        several: Whether it holds several matrices, as those of experts.

    Example:
        >>> ReadWeight("fc.weight", 1).output, ReadWeight("experts.down", 2, several=True).output
        (0, 1)
    """

    tensor: str
    read: int
    several: bool = False

    @property
    def output(self) -> int:
        """The dimension that counts the outputs."""
        return 1 - self.read if not self.several else 1 if self.read == 2 else 2


@dataclass(frozen=True)
class ConsumerInput:
    """The input of one or more consumers, by the dimension of their weights that counts entries.

    Args:
        consumer: The first of the consumers.
        dim: Dimension of its weight that counts the entries.
        layout: What an entry of a sample belongs to.
        fold: Positions of a flattened map that are samples, not entries; 1 where there are none.
        weights: The weights of all consumers that the group names, by path.
    """

    consumer: str
    dim: int
    layout: Layout
    fold: int = 1
    weights: tuple[tuple[str, ReadWeight], ...] = ()

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

    def weight(self, consumer: str) -> ReadWeight:
        """The weight of one of the consumers."""
        return dict(self.weights).get(consumer) or ReadWeight(f"{consumer}.weight", self.dim)

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
        found = [(consumer, s) for consumer in consumers if (s := _read_dim(group, consumer))]
        if found:
            s = found[0][1]
            fold = _fold(s)
            layout = s.layout if fold == 1 else tuple(block[:-1] or (1,) for block in s.layout)
            weights = tuple((consumer, _weight(consumer, s)) for consumer, s in found)
            return cls(consumers[0], s.dim, layout, fold, weights)
        raise PruningError(
            f"{group.name!r} names no weight of {', '.join(map(repr, consumers))}; expected the "
            "dimension that reads the units among its tensors. Describe the group anew."
        )


def _read_dim(group: DependencyGroup, consumer: str) -> PrunableDim | None:
    """The dimension of a consumer's weight that reads units of a group, if it names one."""
    name = weight_name(consumer, {s.tensor for s in group.tensors})
    dims = {s.dim: s for s in group.tensors if s.tensor == name}
    if not dims:
        return None
    # A weight with the group in both dimensions is that of a linear layer.
    return dims.get(1) or dims[max(dims)]


def _weight(consumer: str, s: PrunableDim) -> ReadWeight:
    return ReadWeight(s.tensor, s.dim, several=s.tensor == consumer and len(s.shape) == 3)


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
    return {
        s.tensor: s.dim
        for group in groups
        for consumers in group.unit_inputs.values()
        for consumer in consumers
        if (s := _read_dim(group, consumer)) is not None
    }


def read_above(shape: Sequence[int], width: int, *, several: bool = False) -> int:
    """The dimension of a weight above that reads an output, by its size.

    Args:
        shape: Shape of the weight.
        width: Size of the output; a flattened map has several entries for each of it.
        several: Whether it holds several matrices, as those of experts.

    Example:
        >>> read_above((32, 16), 16), read_above((16, 24), 16), read_above((4, 16, 24), 16)
        (1, 0, 1)
    """
    if several:
        return next((dim for dim in (2, 1, 0) if shape[dim] == width), 1)
    # Only a weight that is stored as (in, out) has its inputs in the first dimension.
    return 0 if len(shape) == 2 and shape[1] % width and shape[0] == width else 1


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
