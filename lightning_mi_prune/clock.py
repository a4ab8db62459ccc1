"""CLOCK    measure_table: how long a network takes on this device as its axes shrink."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis, full_plan
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.latency import Device, LatencyCurve, LatencyTable
from lightning_mi_prune.limits import may_vanish, step_of
from lightning_mi_prune.measure import measure_latency
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.sample import Example, copied
from lightning_mi_prune.surgery import reshape

__all__ = ["cached_table", "device_of", "measure_table"]

Clock = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, float]]

_GRID = (3 / 4, 1 / 2, 1 / 4, 1 / 8)


def device_of(module: nn.Module, calls: Mapping[str, Example] | None = None) -> Device:
    """Where a module is now.

    Args:
        module: A module with parameters.
        calls: Calls of its networks, which know of autocast.

    Example:
        >>> device_of(nn.Linear(2, 2)).type
        'cpu'
    """
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    place = parameter.device
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else _processor()
    cast = next((call.autocast for call in (calls or {}).values()), "")
    kind = cast or str(parameter.dtype).removeprefix("torch.")
    return Device(place.type, name, torch.get_num_threads(), str(torch.__version__), kind)


def cached_table(
    path: str | Path | None,
    measure: Callable[[], LatencyTable],
    device: Device | None = None,
    known: MutableMapping[Device, LatencyTable] | None = None,
) -> LatencyTable:
    """The table in a file; measured and written first if there is none.

    A table that cannot be written is not lost: it is kept among the known ones, with a warning.

    Args:
        path: The file; None has none.
        measure: Measures the table, :func:`measure_table` of a model.
        device: Where the table must have been measured.
        known: Tables of this run that are in no file; a new one is added.

    Raises:
        PruningError: If the file holds no table, or one of another device.
    """
    tables = {} if known is None else known
    if device is not None and device in tables:
        return tables[device]
    if path is not None and os.path.exists(path):  # Path.exists may raise
        table = LatencyTable.load(path)
        if device is not None:
            table.check_device(device)
        return table
    table = measure()
    try:
        if path is not None:
            table.write(path)
            return table
    except PruningError as error:  # minutes of measuring are worth more than the file
        warnings.warn(f"{error} It stays in memory for this run.", PruningWarning, stacklevel=2)
    tables[table.device if device is None else device] = table
    return table


def measure_table(
    root: nn.Module,
    axes: Sequence[WidthAxis],
    calls: Mapping[str, Example],
    *,
    kinds: Collection[str] | None = None,
    multiple: int = 8,
    seconds: float = 1.0,
    clock: Clock | None = None,
) -> LatencyTable:
    """Time copies of the networks with their axes cut to a few widths, in turn with dense ones.

    All axes of one kind and shape shrink together, and the difference is shared among them. The
    model itself is only read; it may be cut already, the table is about the model as built.

    Args:
        root: Module from which the axes are named.
        axes: All axes of its networks.
        calls: One call of each network by module path; its batch, its length and its type of
            numbers (autocast) are what is timed.
        kinds: Kinds of axes to measure; default all.
        multiple: Smallest width of an axis of neurons that cannot vanish.
        seconds: Time for each width, and as much for the dense model beside it.
        clock: Milliseconds of each call by name; default :func:`report.measure_latency`.
    """
    timed = partial(measure_latency, seconds=seconds, rounds=3) if clock is None else clock
    dense, cut = (copied(root, {axis.network for axis in axes}) for _ in range(2))
    reshape(dense, axes, full_plan(axes))
    groups: dict[Any, list[WidthAxis]] = {}
    for axis in axes:
        if kinds is None or axis.kind in kinds:
            groups.setdefault(_shape(axis), []).append(axis)
    times: list[float] = []
    shares: list[tuple[list[WidthAxis], list[int], list[float]]] = []
    for group in groups.values():
        widths, saved = _widths(group[0], multiple), [0.0]
        for width in widths[1:]:
            names = {axis.name for axis in group}
            kept = {a.name: tuple(range(width if a.name in names else a.size)) for a in axes}
            reshape(cut, axes, Plan({axis.name: axis.size for axis in axes}, kept))
            found = timed({"dense": _forward(dense, calls), "cut": _forward(cut, calls)})
            times.append(found["dense"])
            saved.append((1 - found["cut"] / found["dense"]) / len(group))
        shares.append((group, widths, saved))
    if not times:
        raise PruningError(f"kinds={kinds!r} leaves no axis to measure; name kinds of this model.")
    dense_ms = median(times)
    curves = [
        LatencyCurve(
            tuple(axis.name for axis in group),
            tuple(widths),
            tuple(dense_ms * share for share in accumulate(saved, max)),
        )
        for group, widths, saved in shares
    ]
    inputs = [v for call in calls.values() for v in (*call.args, *call.kwargs.values())]
    shape = next((v.shape for v in inputs if isinstance(v, Tensor) and v.ndim > 1), (0, 0))
    return LatencyTable(device_of(root, calls), shape[0], shape[1], dense_ms, tuple(curves))


def _forward(shell: nn.Module, calls: Mapping[str, Example]) -> Callable[[], None]:
    place = next(shell.parameters()).device.type
    work = [
        (
            shell.get_submodule(path),
            call,
            partial(
                torch.autocast,
                place,
                getattr(torch, call.autocast) if call.autocast else None,
                enabled=bool(call.autocast),
            ),
        )
        for path, call in calls.items()
    ]

    def forward() -> None:
        with torch.no_grad():
            for module, call, context in work:
                with context():
                    module(*call.args, **call.kwargs)

    return forward


def _shape(axis: WidthAxis) -> tuple[Any, ...]:
    """What axes that shrink together have in common."""
    shapes = sorted((s.dim, s.shape) for s in axis.slices)
    return axis.network, axis.kind, axis.size, axis.entries, tuple(shapes)


def _widths(axis: WidthAxis, multiple: int) -> list[int]:
    """The grid: full width, some shares of it in whole steps, and the least there can be."""
    step = step_of(axis, multiple)
    least = 0 if may_vanish(axis) else min(step, axis.size)
    inner = {step * round(share * axis.size / step) for share in _GRID}
    return sorted({axis.size, least} | {w for w in inner if least < w < axis.size}, reverse=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
