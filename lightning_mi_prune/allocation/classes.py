"""Classes of groups that an ordinary config gives one width, and the widths they may take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from lightning_mi_prune.allocation.constraints import (
    Bounds,
    never_empty,
    step_of,
    widths_between,
)
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import layout_names

__all__ = [
    "Accepts",
    "Choices",
    "WidthClass",
    "choices_of",
    "classes_of",
    "groups_left_whole",
]

_MOST_ASKED = 64  # widths of a class that a config is asked about, in a hundredth of a second each

Accepts: TypeAlias = Callable[[Mapping[str, int]], bool]
"""Whether the config takes the numbers of some widths."""


@dataclass(frozen=True)
class WidthClass:
    """Groups whose widths change in proportion, since the same fields of a config hold them.

    Args:
        fields: The fields.
        members: The groups.
        accepts: Whether the config takes the widths of all groups of its network.
    """

    fields: tuple[str, ...]
    members: tuple[DependencyGroup, ...]
    accepts: Accepts = lambda widths: True

    def __str__(self) -> str:
        return " and ".join(self.fields)


@dataclass(frozen=True)
class Choices:
    """Widths that a config can describe.

    Args:
        options: For each class the widths of its members, the widest first.
        whole: Widths of the other groups, which stay as they are.
    """

    options: tuple[tuple[Mapping[str, int], ...], ...]
    whole: Mapping[str, int]

    @property
    def most(self) -> dict[str, int]:
        """The largest width of every group."""
        found = dict(self.whole)
        for options in self.options:
            found |= options[0]
        return found

    @property
    def fewest(self) -> dict[str, int]:
        """The smallest width of every group."""
        found = dict(self.whole)
        for options in self.options:
            found |= options[-1]
        return found

    def at_least(self, widths: Mapping[str, int]) -> Choices:
        """Those of the choices that leave no group narrower than given.

        Example:
            >>> options = tuple({"a": width, "b": width} for width in (8, 4, 2))
            >>> [one["a"] for one in Choices((options,), {}).at_least({"a": 4, "b": 2}).options[0]]
            [8, 4]
        """
        kept = tuple(
            tuple(one for one in options if all(one[name] >= widths[name] for name in one))
            for options in self.options
        )
        return Choices(kept, self.whole)


def classes_of(
    groups: Sequence[DependencyGroup],
    chosen: Collection[str],
    accepts: Mapping[str, Accepts] | None = None,
) -> tuple[WidthClass, ...]:
    """Classes of groups that may shrink together, by the config fields that hold their widths.

    Groups that share a field are of one class, and so are those that are tied to it: a hidden size
    and the numbers of heads of which it is the product with their size. A class of which one group
    must stay stays whole.

    Args:
        groups: All groups of the module.
        chosen: Names of those that may shrink.
        accepts: By network, whether its config takes some widths; a network that is missing has no
            config.

    Example:
        >>> groups = [
        ...     DependencyGroup(f"{i}.{kind}", kind, 8, (), ("down",), config=field)
        ...     for i in (0, 1)
        ...     for kind, field in (("ffn", "inner_size"), ("heads", "n_heads"), ("pooler", None))
        ... ]
        >>> names = {group.name for group in groups}
        >>> found = classes_of(groups, names, {"": lambda widths: True})
        >>> [(str(one), [group.name for group in one.members]) for one in found]
        [('inner_size', ['0.ffn', '1.ffn']), ('n_heads', ['0.heads', '1.heads'])]
        >>> [str(one) for one in classes_of(groups, names - {"1.ffn"}, {"": lambda widths: True})]
        ['n_heads']
    """
    found: list[tuple[set[tuple[str, str]], list[DependencyGroup]]] = []
    for group in groups:
        fields = {(group.network, name) for name in _fields(group)}
        joined = [part for part in found if part[0] & fields]
        found = [part for part in found if part not in joined]
        if fields:
            members = [*(member for part in joined for member in part[1]), group]
            found.append((fields.union(*(part[0] for part in joined)), members))
    known = accepts or {}
    classes = []
    for fields, members in found:
        names = {name for _, name in fields}
        described = {name for group in members for name in _own(group)}
        if names <= described and all(group.name in chosen for group in members):
            network = members[0].network
            if network in known:
                classes.append(WidthClass(tuple(sorted(names)), tuple(members), known[network]))
    order = {group.name: i for i, group in enumerate(groups)}
    return tuple(sorted(classes, key=lambda one: min(order[group.name] for group in one.members)))


def _own(group: DependencyGroup) -> set[str]:
    """Fields that hold a number which follows the width of a group."""
    sizes = {name for name, layout in group.config_sizes if layout_names(layout)}
    return sizes | ({group.config} - {None} if group.config else set()) | {*group.config_aliases}


def _fields(group: DependencyGroup) -> set[str]:
    return _own(group) | (set() if group.tie is None else {group.tie})


def groups_left_whole(
    chosen: Iterable[DependencyGroup], classes: Iterable[WidthClass]
) -> list[DependencyGroup]:
    """The groups that may shrink, but of which a config can hold no other width."""
    described = {group.name for one in classes for group in one.members}
    return [group for group in chosen if group.name not in described]


def choices_of(
    classes: Sequence[WidthClass],
    groups: Sequence[DependencyGroup],
    bounds: Bounds,
    current: Mapping[str, int],
    multiple: int = 8,
) -> Choices:
    """The widths that every class may take, within the bounds of all of its members.

    No class is emptied. Groups of no class stay as they are.

    Args:
        classes: The classes.
        groups: What may shrink.
        bounds: Fewest and most units of every group.
        current: Present width of each group.
        multiple: Widths of groups with one entry per unit are multiples of this.

    Raises:
        PruningError: If there is no class, a class can take no width at all, or a group of no
            class was cut before or is bound to shrink.

    Example:
        >>> a, b = (
        ...     DependencyGroup(name, "ffn", 32, (), ("x",), config="inner_size") for name in "ab"
        ... )
        >>> [one] = classes_of([a, b], {"a", "b"}, {"": lambda widths: True})
        >>> bounds = {"a": (0, 24), "b": (10, 32)}
        >>> choices_of([one], [a, b], bounds, {"a": 32, "b": 32}).options[0]
        ({'a': 24, 'b': 24}, {'a': 16, 'b': 16}, {'a': 10, 'b': 10})
    """
    if not classes:
        names = [group.name for group in groups[:4]]
        raise PruningError(
            "widths='config' found no field of a Hugging Face config that holds the width of any "
            f"group that may shrink, such as {names}, or not of all groups that share it. Choose "
            "more kinds of group, or widths='global' or 'uniform'."
        )
    whole = {}
    for group in groups_left_whole(groups, classes):
        now = whole[group.name] = current[group.name]
        if min(now, bounds[group.name][1]) < group.size:
            why = "an earlier cut" if now < group.size else "a cap or pin"
            raise PruningError(
                f"widths='config' cannot describe that {group.name!r} has fewer than "
                f"{counted(group.size, 'unit')}, but {why} asks for it; no field of its config "
                "does. Drop it, or use widths='global' or 'uniform'."
            )
    options = tuple(_options(one, bounds, current, multiple) for one in classes)
    return Choices(options, whole)


def _options(
    one: WidthClass, bounds: Bounds, current: Mapping[str, int], multiple: int
) -> tuple[Mapping[str, int], ...]:
    """Widths of the members of a class, from the widest down."""
    bounds = never_empty(one.members, bounds, multiple)
    ends = {Fraction(end, group.size) for group in one.members for end in bounds[group.name]}
    shares: set[Fraction] | None = None
    for group in one.members:
        least, most = bounds[group.name]
        steps = widths_between(least, most, step_of(group, multiple))
        mine = {Fraction(width, group.size) for width in steps}
        mine |= {end for end in ends if _may_be(end * group.size, group, least, most)}
        shares = mine if shares is None else shares & mine
    found = [
        {group.name: int(share * group.size) for group in one.members}
        for share in sorted(shares or (), reverse=True)
    ]
    # A config that refuses numbers does so for heads, of which there are few.
    asks = len(found) <= _MOST_ASKED
    taken = tuple(w for w in found if not asks or one.accepts({**current, **w}))
    if taken:
        return taken
    ranges = [
        f"{group.name!r}: {least} to {most}"
        for group in one.members[:6]
        for least, most in [bounds[group.name]]
    ]
    why = "of which the config takes none" if found else "which have no width in common"
    raise PruningError(
        f"widths='config' gives {counted(len(one.members), 'group')} one width, the {one} of the "
        f"config, but floors, caps, pins, earlier cuts and multiple={multiple} leave them "
        f"{'; '.join(ranges)}, {why}. Change these."
    )


def _may_be(width: Fraction, group: DependencyGroup, least: int, most: int) -> bool:
    """Whether a group may take the width at which another of its class begins or ends."""
    whole = width.denominator == 1 and least <= width <= most
    return whole and (width == group.size or int(width) % group.multiple == 0)
