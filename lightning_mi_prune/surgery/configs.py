"""The numbers that the config of a Hugging Face network holds at some widths, read and set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import layout_names, layout_size

__all__ = [
    "config_fields",
    "config_numbers",
    "config_value",
    "set_config_value",
]


def config_value(config: Any, field: str) -> Any:
    """The value of a field; None if there is no such field.

    Args:
        config: The config.
        field: A field, or one of a config inside it: ``"text_config.hidden_size"``.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(text=SimpleNamespace(width=8))
        >>> config_value(config, "text.width"), config_value(config, "text.depth")
        (8, None)
    """
    for step in field.split("."):
        # Configs with fields by layer refuse to show the one that is for all.
        held = getattr(config, "__dict__", {})
        config = held[step] if step in held else getattr(config, step, None)
    return config


def set_config_value(config: Any, field: str, value: Any) -> None:
    """Set a field of a config, or of one inside it.

    Example:
        >>> from types import SimpleNamespace
        >>> config = SimpleNamespace(text=SimpleNamespace(width=8))
        >>> set_config_value(config, "text.width", 4)
        >>> config.text.width
        4
    """
    *steps, last = field.split(".")
    for step in steps:
        config = getattr(config, step)
    setattr(config, last, value)


def config_fields(group: DependencyGroup) -> tuple[str, ...]:
    """All config fields that change with the width of a group, but for the one it is tied to.

    Example:
        >>> heads = DependencyGroup("h", "heads", 4, (), ("o",), config="n_heads")
        >>> config_fields(heads)
        ('n_heads',)
    """
    own = () if group.config is None else (group.config, *group.config_aliases)
    return (*own, *(name for name, _ in group.config_sizes))


def config_numbers(groups: Sequence[DependencyGroup], widths: Mapping[str, int]) -> dict[str, int]:
    """Values of the config fields of one network at some widths.

    A field stays as built where one number is not enough: if groups differ in width or one is
    empty. Fields of one group, and those that are tied, change together or not at all. A field
    that only repeats a size as built, for which the class would compute another once others have
    changed, is left out until they have.

    Args:
        groups: All groups of the network.
        widths: The width of each.

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> dims = (PrunableDim("w", 0, (24, 24), (("h", 6),)),)
        >>> heads = DependencyGroup("h", "heads", 4, dims, ("o",), config="n_heads", tie="dim")
        >>> stream = DependencyGroup("r", "hidden", 24, (), ("o",), config="dim")
        >>> config_numbers([heads, stream], {"h": 2, "r": 12})
        {'n_heads': 2, 'dim': 12}
        >>> config_numbers([heads, stream], {"h": 1, "r": 12})
        {'n_heads': 4, 'dim': 24}
    """
    holders: dict[str, list[DependencyGroup]] = {}
    for group in groups:
        for name in config_fields(group):
            holders.setdefault(name, []).append(group)
    wrong = {name for name, mine in holders.items() if _value(name, mine, widths) is None}
    wrong |= {name for group in groups if _narrowed(group, widths) for name in config_fields(group)}
    wrong |= {field for field in _ties(groups) if not _holds(field, groups, widths)}
    while more := {name for part in _together(groups) if part & wrong for name in part} - wrong:
        wrong |= more
    numbers: dict[str, int] = {}
    for name, mine in holders.items():
        value = _value(name, mine, {} if name in wrong else widths)
        changed = name not in wrong and any(widths[group.name] != group.size for group in mine)
        if value is not None and (changed or not _repeats(name, mine)):
            numbers[name] = value
    return numbers


def _repeats(name: str, holders: Sequence[DependencyGroup]) -> bool:
    """Whether a field only repeats a size that no width changes."""
    return all(
        name not in (group.config, *group.config_aliases)
        and not any(layout_names(layout) for field, layout in group.config_sizes if field == name)
        for group in holders
    )


def _value(name: str, holders: Sequence[DependencyGroup], widths: Mapping[str, int]) -> int | None:
    """The number that a field holds at some widths; None if there is no such number."""
    values = set()
    for group in holders:
        at = group.all_widths(widths)
        if name in (group.config, *group.config_aliases):
            values.add(at[group.name])
        values |= {layout_size(layout, at) for field, layout in group.config_sizes if field == name}
    return values.pop() if len(values) == 1 and 0 not in values else None


def _narrowed(group: DependencyGroup, widths: Mapping[str, int]) -> bool:
    """Whether others that its layouts name were cut, such as dimensions of heads.

    A network that is built from a config of narrower heads scales attention by their present size.
    """
    if group.tie is None and not group.config_sizes:
        return False
    held = {name for _, layout in group.config_sizes for name in layout_names(layout)}
    return any(widths.get(n, size) != size for n, size in group.partners if n not in held)


def _ties(groups: Sequence[DependencyGroup]) -> list[str]:
    return list(dict.fromkeys(group.tie for group in groups if group.tie is not None))


def _holds(field: str, groups: Sequence[DependencyGroup], widths: Mapping[str, int]) -> bool:
    """Whether a field to which groups are tied equals the entries of all of them."""
    tied = [group for group in groups if group.tie == field]
    ends = [group for group in groups if group.config == field]
    entries = {_entries(group, ends[0].size, widths) for group in tied} if ends else {0}
    return entries == {widths[group.name] for group in ends} and len(entries) == 1


def _entries(group: DependencyGroup, built: int, widths: Mapping[str, int]) -> int:
    """Entries of all units in the tensors that had as many as built, without others beside them."""
    at = group.all_widths(widths)
    layouts = [s.layout for s in group.tensors]
    found = {layout_size(x, at) for x in layouts if layout_size(x, group.all_widths({})) == built}
    return found.pop() if len(found) == 1 else 0


def _together(groups: Sequence[DependencyGroup]) -> Iterator[set[str]]:
    """Fields that change together or not at all."""
    for group in groups:
        fixed = {name for name, layout in group.config_sizes if not layout_names(layout)}
        tie = set() if group.tie is None else {group.tie}
        yield ({*config_fields(group)} - fixed) | tie
