"""A network before and after its cuts, by kind and by layer: one screen of plain text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from lightning_mi_prune.core.errors import counted

__all__ = [
    "HEIGHT",
    "WIDTH",
    "GroupWidths",
    "StackDepths",
    "summary",
]

WIDTH = 80
"""Columns of a summary."""

HEIGHT = 24
"""Lines of a summary."""

_INDEX = re.compile(r"^(?P<head>(?:.*\.)?)(?P<index>\d+)(?:\..*)?$")
_DIGITS = re.compile(r"^(?P<head>.*?)(?P<index>\d+)$")
_LABEL = 24  # columns of the name of a layer


class GroupWidths(Protocol):
    """Units of a group before and after."""

    @property
    def name(self) -> str:
        """Path of the group."""

    @property
    def kind(self) -> str:
        """Kind of unit."""

    @property
    def before(self) -> int:
        """Units before."""

    @property
    def after(self) -> int:
        """Units after."""


class StackDepths(Protocol):
    """Layers of a stack before and after."""

    @property
    def name(self) -> str:
        """Path of the stack."""

    @property
    def before(self) -> Sequence[int]:
        """Layers before."""

    @property
    def after(self) -> Sequence[int]:
        """Layers after."""


@dataclass(frozen=True)
class _Range:
    """The least and the most of some numbers."""

    least: int
    most: int

    def __or__(self, other: _Range) -> _Range:
        return _Range(min(self.least, other.least), max(self.most, other.most))

    def __str__(self) -> str:
        return f"{self.least:,}" if self.least == self.most else f"{self.least:,}-{self.most:,}"


_Cells = Mapping[str, tuple[_Range, _Range]]  # units of each kind, before and after


@dataclass(frozen=True)
class _Row:
    """One layer, or several neighbours.

    Args:
        stem: Path in front of the number of the layer.
        first: Number of the first layer; None for a place without a number.
        last: Number of the last one.
        layers: Layers in this row.
        cells: Units of one layer.
    """

    stem: str
    first: int | None
    last: int | None
    layers: int
    cells: _Cells

    @property
    def label(self) -> str:
        numbers = "" if self.first is None else str(self.first)
        return self.stem + numbers + (f"-{self.last}" if self.last != self.first else "")

    def merged(self, other: _Row) -> _Row:
        cells = dict(self.cells)
        for kind, (before, after) in other.cells.items():
            mine = cells.get(kind)
            cells[kind] = (before, after) if mine is None else (mine[0] | before, mine[1] | after)
        return _Row(self.stem, self.first, other.last, self.layers + other.layers, cells)


def summary(
    sizes: Mapping[str, tuple[int, int]],
    groups: Sequence[GroupWidths],
    *,
    stacks: Sequence[StackDepths] = (),
    seconds: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """A network before and after, in at most 24 lines of 80 columns.

    Neighbouring layers of equal widths share a row. Where the rest is too long, runs of layers
    share one, with the least and the most units of a layer among them.

    Args:
        sizes: Sizes of the whole network before and after, by name; 0 for those not counted.
        groups: Units of every group, from the bottom of the network up.
        stacks: Stacks that lost layers.
        seconds: Time spent on each step.
        notes: Sentences below.

    Example:
        >>> from lightning_mi_prune.reporting.report import GroupCut
        >>> groups = [GroupCut(f"net.{i}.ffn", "ffn", 64, 16 + i // 2, 1.0, 1.0) for i in range(3)]
        >>> print(summary({"parameters": (2000, 1000)}, groups, seconds={"ranking": 1.5}))
                       dense  pruned   kept
        parameters     2,000   1,000  50.0%
        ffn, 3 groups    192      49  25.5%
        <BLANKLINE>
        net       ffn
        0-1  16 of 64
        2    17 of 64
        <BLANKLINE>
        1.5 s of pruning: ranking 1.5 s
    """
    tail = [*notes]
    if seconds:
        parts = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if value)
        total = sum(seconds.values())
        tail.append(f"{total:.1f} s of pruning" + (f": {parts}" if parts else ""))
    below = [line for note in tail for line in textwrap.wrap(note, WIDTH)]
    above = _totals(sizes, groups, stacks)
    room = HEIGHT - len(above) - 2 - (len(below) + 1 if below else 0)
    layers = _layers(groups, max(1, room)) if groups else []
    blocks = [block for block in (above, layers, below) if block]
    return "\n".join("\n".join(block) + "\n" for block in blocks).removesuffix("\n")


def _totals(
    sizes: Mapping[str, tuple[int, int]],
    groups: Sequence[GroupWidths],
    stacks: Sequence[StackDepths],
) -> list[str]:
    """Sizes of the whole network, and units of every kind."""
    rows = [("", "dense", "pruned", "kept")]
    both = {name: pair for name, pair in sizes.items() if any(pair)}
    for kind in dict.fromkeys(group.kind for group in groups):
        some = [group for group in groups if group.kind == kind]
        before, after = (
            sum(getattr(group, side) for group in some) for side in ("before", "after")
        )
        both[f"{kind}, {counted(len(some), 'group')}"] = before, after
    for stack in stacks:
        both[f"layers of {stack.name}"] = len(stack.before), len(stack.after)
    for name, (before, after) in both.items():
        share = f"{after / before:.1%}" if before else ""
        rows.append((_shortened(name, 40), f"{before:,}", f"{after:,}", share))
    return _aligned(rows)


def _layers(groups: Sequence[GroupWidths], most: int) -> list[str]:
    """Units of every layer, a column for each kind; the widest columns that fit."""
    rows = _fitted(list(_rows(groups)), most)
    common = _common([row.stem for row in rows if row.first is not None])
    labels = [row.label.removeprefix(common) for row in rows]
    first = [_shortened(text, _LABEL) for text in (common[:-1] or "layer", *labels)]
    kinds = [*dict.fromkeys(group.kind for group in groups)]
    columns = {kind: [kind, *(_cell(row.cells.get(kind)) for row in rows)] for kind in kinds}
    room = WIDTH - max(map(len, first))
    for kind in sorted(kinds, key=lambda kind: -sum(kind in row.cells for row in rows)):
        width = 2 + max(map(len, columns[kind]))
        room -= width
        if room < 0:  # it is among the totals
            del columns[kind]
            room += width
    return _aligned(list(zip(first, *columns.values(), strict=True)))


def _cell(units: tuple[_Range, _Range] | None) -> str:
    return "" if units is None else f"{units[1]} of {units[0]}"


def _rows(groups: Sequence[GroupWidths]) -> Iterator[_Row]:
    """A row for every layer that differs from the one below it."""
    places: dict[tuple[str, int | None], dict[str, tuple[int, int]]] = {}
    for group in groups:
        units = places.setdefault(_place(group.name), {})
        before, after = units.get(group.kind, (0, 0))
        units[group.kind] = before + group.before, after + group.after
    row: _Row | None = None
    for (stem, index), units in places.items():
        cells = {k: (_Range(b, b), _Range(a, a)) for k, (b, a) in units.items()}
        next_row = _Row(stem, index, index, 1, cells)
        if row is not None and index is not None and row.stem == stem and row.cells == cells:
            row = row.merged(next_row)
            continue
        if row is not None:
            yield row
        row = next_row
    if row is not None:
        yield row


def _place(name: str) -> tuple[str, int | None]:
    """The path in front of the number of a layer, and the number."""
    found = _INDEX.match(name) or _DIGITS.match(name)
    return (name, None) if found is None else (found["head"], int(found["index"]))


def _fitted(rows: list[_Row], most: int) -> list[_Row]:
    """The rows, merged in runs as short as possible until at most ``most`` are left."""
    run, longest = 1, len(rows)
    found = rows
    while len(found) > most and run < longest:
        run += 1
        found = [*_in_runs(rows, run)]
    if len(found) <= most:
        return found
    rest = found[most - 1]
    for row in found[most:]:
        rest = rest.merged(row)
    name = f"{counted(rest.layers, 'other')}"
    return [*found[: most - 1], _Row(name, None, None, rest.layers, rest.cells)]


def _in_runs(rows: Iterable[_Row], run: int) -> Iterator[_Row]:
    """Rows of one stem, ``run`` of them in one."""
    held: _Row | None = None
    count = 0
    for row in rows:
        if held is not None and row.stem == held.stem and row.first is not None and count < run:
            held, count = held.merged(row), count + 1
            continue
        if held is not None:
            yield held
        held, count = row, 1
    if held is not None:
        yield held


def _common(stems: Sequence[str]) -> str:
    """What all stems begin with, up to a dot."""
    if not stems:
        return ""
    least, most = min(stems), max(stems)
    same = next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), None)
    shared = least if same is None else least[:same]
    return shared[: shared.rfind(".") + 1]


def _shortened(text: str, most: int) -> str:
    """The end of a text, which says more than its beginning."""
    return text if len(text) <= most else "…" + text[-(most - 1) :]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of texts: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
