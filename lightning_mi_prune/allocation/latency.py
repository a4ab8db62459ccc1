"""LatencyTable and LatencyCosts: what widths cost in milliseconds, from measurements."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.errors import number as worded
from lightning_mi_prune.core.files import write_whole
from lightning_mi_prune.core.untrusted import (
    described,
    listed,
    mapping,
    number,
    read_json,
    read_text,
    reading,
    text,
    whole,
)
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import layout_terms

__all__ = [
    "Device",
    "LatencyCosts",
    "LatencyCurve",
    "LatencyTable",
]

_VERSION = 1
_LARGEST_TEXT = 2**24
_WIDEST = 2**31
_CURVE = ("groups", "widths", "saved")


@dataclass(frozen=True)
class Device:
    """Hardware and software that a latency depends on.

    Args:
        type: ``"cpu"``, ``"cuda"``, ...
        name: Name of the processor or of the GPU.
        threads: Threads that torch uses on the processor.
        torch: Version of torch.
        dtype: Type of the weights, ``"float32"``; under autocast that of the products.
    """

    type: str
    name: str
    threads: int
    torch: str
    dtype: str

    def __str__(self) -> str:
        parts = f"{self.name}, {self.threads} threads, torch {self.torch}, {self.dtype}"
        return f"{self.type} ({parts})"


@dataclass(frozen=True)
class LatencyCurve:
    """What one group saves as it shrinks; the same for all groups of one kind and shape.

    Args:
        groups: Names of the groups.
        widths: Widths that were measured, from the width as built down.
        saved: Milliseconds that one of the groups saves at each of them; never falling.

    Raises:
        PruningError: If widths and savings are not in this order or out of range.

    Example:
        >>> curve = LatencyCurve(("ffn",), widths=(64, 32, 0), saved=(0.0, 1.0, 3.0))
        >>> curve.at(48), curve.at(16), curve.at(0)
        (0.5, 2.0, 3.0)
    """

    groups: tuple[str, ...]
    widths: tuple[int, ...]
    saved: tuple[float, ...]

    def __post_init__(self) -> None:
        integral = all(isinstance(w, int) and not isinstance(w, bool) for w in self.widths)
        falling = integral and all(a > b for a, b in pairwise(self.widths))
        if not self.groups or not all(isinstance(name, str) for name in self.groups):
            raise PruningError("A latency curve belongs to no group; measure the table again.")
        if not falling or not self.widths or len(self.saved) != len(self.widths):
            raise PruningError(
                f"The latency curve of {described(self.groups[0])} has {len(self.widths)} widths "
                f"and {len(self.saved)} times; expected one time for each, from the widest down."
            )
        if not 0 <= self.widths[-1] <= self.widths[0] <= _WIDEST:
            raise PruningError(
                f"The latency curve of {described(self.groups[0])} has widths from "
                f"{described(self.widths[0])} to {described(self.widths[-1])}; expected widths "
                f"from 0 to {_WIDEST}."
            )
        times = [_milliseconds(f"A saving of {described(self.groups[0])}", s) for s in self.saved]
        if times[0] != 0 or any(a > b for a, b in pairwise(times)):
            raise PruningError(
                f"The savings of {described(self.groups[0])} are {str(times[:6])[:60]}; expected 0 "
                "at full width and no less at any smaller one. Measure the table again."
            )

    def at(self, width: float) -> float:
        """Milliseconds saved at a width: linear in between, constant outside."""
        place = bisect_left(self.widths, -width, key=lambda w: -w)
        if place == 0 or place == len(self.widths):
            return self.saved[min(place, len(self.widths) - 1)]
        wide, narrow = self.widths[place - 1], self.widths[place]
        share = (wide - width) / (wide - narrow)
        return self.saved[place - 1] + share * (self.saved[place] - self.saved[place - 1])


@dataclass(frozen=True)
class LatencyTable:
    """How long a network takes on one device, and what each of its groups can save.

    Args:
        device: Where it was measured.
        batch: Examples in the call that was measured.
        length: Positions of each of them (size of the second dimension of the first input).
        dense_ms: Milliseconds of one forward pass of the model as built.
        curves: Savings of every group that was measured.

    Raises:
        PruningError: If a number is missing or out of range.
    """

    device: Device
    batch: int
    length: int
    dense_ms: float
    curves: tuple[LatencyCurve, ...]

    def __post_init__(self) -> None:
        if _milliseconds("dense_ms", self.dense_ms) == 0:
            raise PruningError("dense_ms=0; expected milliseconds above 0. Measure again.")
        for name, count in (("batch", self.batch), ("length", self.length)):
            if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _WIDEST:
                raise PruningError(f"{name}={described(count)}; expected a whole number.")
        for curve in self.curves:
            if curve.saved[-1] >= self.dense_ms:
                raise PruningError(
                    f"{described(curve.groups[0])} saves {worded(curve.saved[-1])} of "
                    f"{worded(self.dense_ms)} ms; expected less than all. Measure again."
                )

    def curve(self, group: DependencyGroup) -> LatencyCurve:
        """The savings of a group; a PruningError if the table is not of this model."""
        for curve in self.curves:
            if group.name in curve.groups and curve.widths[0] == group.size:
                return curve
        raise PruningError(
            f"The latency table does not have {group.name!r} of {counted(group.size, 'unit')}; it "
            "was measured on another model or on other groups. Measure it again."
        )

    def check_device(self, device: Device) -> None:
        """Refuse a table that was measured elsewhere."""
        if device != self.device:
            raise PruningError(
                f"The latency table was measured on {self.device}, but this is {device}: measure "
                "it here, or give the file of this device."
            )

    def to_json(self) -> str:
        """The table as JSON."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Read a table from untrusted text.

        Raises:
            PruningError: If the text is not a table of a known version.
        """
        body = read_json(text, "The latency table", version=_VERSION, longest=_LARGEST_TEXT)
        with reading("The latency table", "measure it again"):
            device = _read_device(body["device"])
            parts = [[tuple(listed(mapping(c)[p])) for p in _CURVE] for c in listed(body["curves"])]
            batch, length, dense_ms = (body[name] for name in ("batch", "length", "dense_ms"))
        curves = tuple(LatencyCurve(*part) for part in parts)
        return cls(device, batch, length, dense_ms, curves)

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read a table from an untrusted file.

        Raises:
            PruningError: If the file cannot be read or holds no table.
        """
        given = read_text(path, "The latency table", "give another file", longest=_LARGEST_TEXT)
        try:
            return cls.from_json(given)
        except PruningError as error:
            raise PruningError(f"{path}: {error} Delete the file to measure again.") from error

    def write(self, path: str | Path) -> None:
        """Write the table; a crash leaves the old file.

        Raises:
            PruningError: If the file cannot be written.
        """
        write_whole(path, self.to_json(), "The latency table")


def _read_device(state: object) -> Device:
    found = mapping(state, [f.name for f in fields(Device)])
    name, torch, dtype = (text(found[part], 200) for part in ("name", "torch", "dtype"))
    return Device(text(found["type"], 200), name, whole(found["threads"]), torch, dtype)


def _milliseconds(name: str, value: object) -> float:
    try:
        return number(value, 0)
    except (TypeError, ValueError) as error:
        raise PruningError(
            f"{name} is {described(value)}; expected milliseconds from 0."
        ) from error


@dataclass(frozen=True)
class LatencyCosts:
    """Milliseconds of one forward pass, from a table.

    The savings of groups add up, with two exceptions. A group that shares tensors with all others
    (the hidden size) multiplies the time that they leave. Groups that multiply in a layout (heads
    and their dimensions) share one time: what each saves shrinks in proportion to what the others
    have saved.

    Args:
        table: Measured latencies.
        groups: Groups that may shrink, and any other of the table that has shrunk.
        current: Widths of groups that a caller does not name (default: as built).

    Raises:
        PruningError: If the table does not have one of the groups.

    Example:
        >>> group = DependencyGroup("ffn", "ffn", 64, (), ("down",))
        >>> curve = LatencyCurve(("ffn",), widths=(64, 32, 0), saved=(0.0, 1.0, 3.0))
        >>> table = LatencyTable(Device("cpu", "any", 1, "2.9", "float32"), 1, 32, 10.0, (curve,))
        >>> LatencyCosts(table, [group]).total({"ffn": 16})
        8.0
    """

    table: LatencyTable
    groups: Sequence[DependencyGroup]
    current: Mapping[str, int] = field(default_factory=dict)
    measure: ClassVar[str] = "ms"

    def __post_init__(self) -> None:
        for group in self.groups:
            self.table.curve(group)

    @cached_property
    def _products(self) -> dict[str, tuple[str, ...]]:
        """All groups that multiply with each other in a layout, in order, by each of them."""
        names = {group.name for group in self.groups}
        found: dict[str, tuple[str, ...]] = {}
        for group in self.groups:
            for terms in (layout_terms(s.layout) for s in group.tensors):
                for factors in terms:
                    joined = {name for name in factors if name in names}
                    joined.update(*(found.get(name, ()) for name in list(joined)))
                    if len(joined) > 1:
                        found |= dict.fromkeys(joined, tuple(sorted(joined)))
        return found

    @cached_property
    def _hubs(self) -> frozenset[str]:
        """Groups that share tensors with all others."""
        tensors = {group.name: {s.tensor for s in group.tensors} for group in self.groups}
        many = len(tensors) > 1
        return frozenset(
            name
            for name, mine in tensors.items()
            if many and name not in self._products and all(map(mine.__and__, tensors.values()))
        )

    @cached_property
    def _curves(self) -> dict[str, tuple[LatencyCurve, int]]:
        now = {group.name: group.size for group in self.groups} | dict(self.current)
        return {group.name: (self.table.curve(group), now[group.name]) for group in self.groups}

    def _saved(self, name: str, widths: Mapping[str, float]) -> float:
        """Milliseconds that one group saves where all others are as built."""
        curve, width = self._curves[name]
        return curve.at(widths.get(name, width))

    def _left(self, name: str, widths: Mapping[str, float], *, before: bool = False) -> float:
        """Share of a group's savings that those it multiplies with have not saved already.

        Args:
            name: The group.
            widths: Widths of all groups.
            before: Whether only the groups before it in their product count.
        """
        product = self._products.get(name, ())
        most = max((_whole(self._curves[each][0]) for each in product), default=0.0)
        others = [each for each in product if each != name and not (before and each > name)]
        return math.prod(1 - self._saved(each, widths) / most for each in others) if most else 1.0

    def _factors(self, widths: Mapping[str, float]) -> tuple[float, float]:
        """Shares of the dense time that hubs leave, and that the others leave."""
        dense = self.table.dense_ms
        hubs = math.prod(1 - self._saved(name, widths) / dense for name in self._hubs)
        others = 0.0
        for name in self._curves:
            if name in self._hubs:
                continue
            # Of a product, the first counts whole and each other by what those before it leave.
            others += self._saved(name, widths) * self._left(name, widths, before=True)
        return hubs, 1 - others / dense

    def total(self, widths: Mapping[str, float]) -> float:
        """Milliseconds of one forward pass."""
        return self.table.dense_ms * math.prod(self._factors(widths))

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        """Milliseconds saved when one group shrinks to each of ``options``."""
        (hubs, others), curve = self._factors({**widths, name: math.inf}), self._curves[name][0]
        scale = others if name in self._hubs else self._left(name, widths)
        scale *= hubs  # computed with the group itself at full width
        now = self._saved(name, widths)
        return [scale * (curve.at(width) - now) for width in options]

    def neighbours(self, name: str) -> frozenset[str]:
        """The groups whose savings depend on this one."""
        found = frozenset(self._curves) if name in self._hubs else self._hubs
        return (found | {*self._products.get(name, ())}) - {name}


def _whole(curve: LatencyCurve) -> float:
    """Milliseconds saved without any units, extrapolated where some must stay."""
    most, least = curve.widths[0], curve.widths[-1]
    return curve.saved[-1] * most / (most - least) if least < most else 0.0
