"""Measure the latency table of a network on this device."""

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
from torch.utils.benchmark import Timer

from lightning_mi_prune.allocation.constraints import may_be_empty, step_of
from lightning_mi_prune.allocation.latency import Device, LatencyCurve, LatencyTable
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.progress import progress_step
from lightning_mi_prune.core.running import copy_networks
from lightning_mi_prune.graph.groups import DependencyGroup, full_plan, modules_with
from lightning_mi_prune.graph.layouts import Layout, map_layout
from lightning_mi_prune.surgery.units import reshape_tensors

__all__ = [
    "cached_table",
    "device_of",
    "measure_latency",
    "measure_table",
]


def measure_latency(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, rounds: int = 5
) -> dict[str, float]:
    """Median latency of several calls in ms, measured in turn: a drift of the machine hits all.

    Args:
        calls: What to time, by name.
        seconds: Time for each call in all.
        rounds: How often the calls take turns.

    Example:
        >>> sorted(measure_latency({"a": lambda: None, "b": lambda: None}, seconds=0.01))
        ['a', 'b']
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=threads)
            measured = timer.blocked_autorange(min_run_time=seconds / rounds)
            times[name] += [t * 1e3 for t in measured.times]
    return {name: float(torch.tensor(values).median()) for name, values in times.items()}


Clock = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, float]]
_GRID = (3 / 4, 1 / 2, 1 / 4, 1 / 8)


def device_of(module: nn.Module, calls: Mapping[str, RecordedCall] | None = None) -> Device:
    """The device of a module.

    Args:
        module: A module with parameters.
        calls: Calls of its networks, which tell the type under autocast.

    Example:
        >>> device_of(nn.Linear(2, 2)).type
        'cpu'
    """
    parameter = next(p for p in module.parameters() if p.is_floating_point())
    device = parameter.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    cast = next((call.autocast for call in (calls or {}).values()), "")
    kind = cast or str(parameter.dtype).removeprefix("torch.")
    return Device(device.type, name, torch.get_num_threads(), str(torch.__version__), kind)


def cached_table(
    path: str | Path | None,
    measure: Callable[[], LatencyTable],
    device: Device | None = None,
    known: MutableMapping[Device, LatencyTable] | None = None,
) -> LatencyTable:
    """The table in a file; measured and written first if there is none.

    A table that cannot be written stays among the known ones, with a warning.

    Args:
        path: The file, if there is one.
        measure: Measures the table, :func:`measure_table` of a model.
        device: Device on which the table must have been measured.
        known: Tables of this run without a file; a new one is added.

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
    groups: Sequence[DependencyGroup],
    calls: Mapping[str, RecordedCall],
    *,
    kinds: Collection[str] | None = None,
    multiple: int = 8,
    seconds: float = 1.0,
    clock: Clock | None = None,
) -> LatencyTable:
    """Time copies of the networks with their groups cut to a few widths, in turn with dense ones.

    All groups of one kind and shape shrink together and share the difference. The model is only
    read. It may be cut already; the table describes the model as built.

    Args:
        root: Module from which the groups are named.
        groups: All groups of its networks.
        calls: One call of each network by module path, with the batch, the length and the autocast
            that are timed.
        kinds: Kinds of groups to measure; default all.
        multiple: Smallest width of a group of neurons that cannot be empty.
        seconds: Time for each width, and as much for the dense model beside it.
        clock: Measures the milliseconds of each call by name; default :func:`measure_latency`.

    Raises:
        PruningError: If there is no group to measure.
    """
    timed = partial(measure_latency, seconds=seconds, rounds=3) if clock is None else clock
    dense, cut = (copy_networks(root, modules_with(groups)) for _ in range(2))
    reshape_tensors(dense, groups, full_plan(groups))
    subsets: dict[Any, list[DependencyGroup]] = {}
    for group in groups:
        if kinds is None or group.kind in kinds:
            subsets.setdefault(_shape(group), []).append(group)
    to_measure = [(subset, _widths(subset[0], multiple)) for subset in subsets.values()]
    times: list[float] = []
    shares: list[tuple[list[DependencyGroup], list[int], list[float]]] = []
    total = sum(len(widths) - 1 for _, widths in to_measure)
    with progress_step("latency", "width", total) as progress:
        for subset, widths in to_measure:
            names, saved = {group.name for group in subset}, [0.0]
            for width in widths[1:]:
                kept = {a.name: tuple(range(width if a.name in names else a.size)) for a in groups}
                reshape_tensors(
                    cut, groups, PruningPlan({group.name: group.size for group in groups}, kept)
                )
                found = timed({"dense": _forward(dense, calls), "cut": _forward(cut, calls)})
                times.append(found["dense"])
                saved.append((1 - found["cut"] / found["dense"]) / len(subset))
                progress.advance()
            shares.append((subset, widths, saved))
    if not times:
        raise PruningError(f"kinds={kinds!r} leaves no group to measure; name kinds of this model.")
    dense_ms = median(times)
    curves = [
        LatencyCurve(
            tuple(group.name for group in subset),
            tuple(widths),
            tuple(dense_ms * share for share in accumulate(saved, max)),
        )
        for subset, widths, saved in shares
    ]
    inputs = [v for call in calls.values() for v in (*call.args, *call.kwargs.values())]
    shape = next((v.shape for v in inputs if isinstance(v, Tensor) and v.ndim > 1), (0, 0))
    return LatencyTable(device_of(root, calls), shape[0], shape[1], dense_ms, tuple(curves))


def _forward(shell: nn.Module, calls: Mapping[str, RecordedCall]) -> Callable[[], None]:
    device = next(shell.parameters()).device.type
    work = [
        (shell.get_submodule(path), call, getattr(torch, call.autocast) if call.autocast else None)
        for path, call in calls.items()
    ]

    def forward() -> None:
        with torch.no_grad():
            for module, call, dtype in work:
                with torch.autocast(device, dtype, enabled=dtype is not None):
                    module(*call.args, **call.kwargs)

    return forward


def _shape(group: DependencyGroup) -> tuple[Any, ...]:
    """What is equal in groups that shrink together."""
    at = group.all_widths({}) | {group.name: -1}  # other groups by their size

    def unnamed(layout: Layout) -> str:
        return str(map_layout(layout, at.__getitem__))

    shapes = sorted((s.dim, s.shape, unnamed(s.layout)) for s in group.tensors)
    return group.network, group.kind, group.size, tuple(shapes)


def _widths(group: DependencyGroup, multiple: int) -> list[int]:
    """Widths to measure: the full width, some shares of it in whole steps, and the smallest."""
    step = step_of(group, multiple)
    least = 0 if may_be_empty(group) else min(step, group.size)
    inner = {step * round(share * group.size / step) for share in _GRID}
    return sorted({group.size, least} | {w for w in inner if least < w < group.size}, reverse=True)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
