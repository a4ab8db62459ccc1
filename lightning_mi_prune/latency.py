"""TIME     LatencyTable: milliseconds that each axis saves as it shrinks, on one device."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.files import write_whole
from lightning_mi_prune.untrusted import (
    described,
    listed,
    mapping,
    number,
    read_json,
    reading,
    text,
    whole,
)
from lightning_mi_prune.wording import counted
from lightning_mi_prune.wording import number as worded

__all__ = ["Device", "LatencyCurve", "LatencyTable"]

_VERSION = 1
_LARGEST_TEXT = 2**24
_WIDEST = 2**31
_CURVE = ("axes", "widths", "saved")


@dataclass(frozen=True)
class Device:
    """What a latency depends on beside the model.

    Args:
        type: ``"cpu"``, ``"cuda"``, ...
        name: Name of the processor or of the GPU.
        threads: Threads that torch uses on the processor.
        torch: Version of torch.
        dtype: Type of the numbers, ``"float32"``; under autocast that of the products.
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
    """What one axis saves as it shrinks; the same for all axes of one kind and shape.

    Args:
        axes: Names of the axes.
        widths: Widths that were measured, from the width as built down.
        saved: Milliseconds that one of the axes saves at each of them; never falling.

    Raises:
        PruningError: If that is not what they are.

    Example:
        >>> curve = LatencyCurve(("ffn",), widths=(64, 32, 0), saved=(0.0, 1.0, 3.0))
        >>> curve.at(48), curve.at(16), curve.at(0)
        (0.5, 2.0, 3.0)
    """

    axes: tuple[str, ...]
    widths: tuple[int, ...]
    saved: tuple[float, ...]

    def __post_init__(self) -> None:
        integral = all(isinstance(w, int) and not isinstance(w, bool) for w in self.widths)
        falling = integral and all(a > b for a, b in pairwise(self.widths))
        if not self.axes or not all(isinstance(name, str) for name in self.axes):
            raise PruningError("A latency curve belongs to no axis; measure the table again.")
        if not falling or not self.widths or len(self.saved) != len(self.widths):
            raise PruningError(
                f"The latency curve of {described(self.axes[0])} has {len(self.widths)} widths and "
                f"{len(self.saved)} times; expected one time for each, from the widest down."
            )
        if not 0 <= self.widths[-1] <= self.widths[0] <= _WIDEST:
            raise PruningError(
                f"The latency curve of {described(self.axes[0])} has widths from "
                f"{described(self.widths[0])} to {described(self.widths[-1])}; expected widths "
                f"from 0 to {_WIDEST}."
            )
        times = [_milliseconds(f"A saving of {described(self.axes[0])}", s) for s in self.saved]
        if times[0] != 0 or any(a > b for a, b in pairwise(times)):
            raise PruningError(
                f"The savings of {described(self.axes[0])} are {str(times[:6])[:60]}; expected 0 "
                "at full width and no less at any smaller one. Measure the table again."
            )

    def at(self, width: float) -> float:
        """Milliseconds saved at a width; linear in between, level outside."""
        place = bisect_left(self.widths, -width, key=lambda w: -w)
        if place == 0 or place == len(self.widths):
            return self.saved[min(place, len(self.widths) - 1)]
        wide, narrow = self.widths[place - 1], self.widths[place]
        share = (wide - width) / (wide - narrow)
        return self.saved[place - 1] + share * (self.saved[place] - self.saved[place - 1])


@dataclass(frozen=True)
class LatencyTable:
    """How long a network takes on one device, and what each of its axes can save.

    Args:
        device: Where it was measured.
        batch: Examples in the call that was measured.
        length: Positions of each of them (size of the second dimension of the first input).
        dense_ms: Milliseconds of one forward pass of the model as built.
        curves: Savings of every axis that was measured.

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
                    f"{described(curve.axes[0])} saves {worded(curve.saved[-1])} of "
                    f"{worded(self.dense_ms)} ms; expected less than all. Measure again."
                )

    def curve(self, axis: WidthAxis) -> LatencyCurve:
        """The savings of an axis; a PruningError if the table is not of this model."""
        for curve in self.curves:
            if axis.name in curve.axes and curve.widths[0] == axis.size:
                return curve
        raise PruningError(
            f"The latency table does not know {axis.name!r} of {counted(axis.size, 'unit')}; it "
            "was measured on another model or on other axes. Measure it again."
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
        try:
            if Path(path).exists() and not Path(path).is_file():  # a pipe would never end
                raise OSError(None, "it is no regular file")
            with Path(path).open(encoding="utf-8") as file:
                text = file.read(_LARGEST_TEXT + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PruningError(
                f"No latency table could be read from {path} ({reason}); give another file."
            ) from error
        try:
            return cls.from_json(text)
        except PruningError as error:
            raise PruningError(f"{path}: {error} Delete the file to measure again.") from error

    def write(self, path: str | Path) -> None:
        """Write the table, or nothing: a crash leaves what was there.

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
