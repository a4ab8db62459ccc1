"""Seconds of wall and processor, and peak memory, of pieces of work that take turns."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

__all__ = [
    "Cost",
    "Part",
    "cost_of_hooks",
    "in_fresh_process",
    "peak_memory",
    "spread",
    "take_turns",
    "timed",
]

T = TypeVar("T")
_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Cost(NamedTuple):
    """What some work took.

    Args:
        wall: Seconds of the clock.
        cpu: Seconds of all threads of this process: what a busy machine distorts least.
        peak: Bytes by which memory rose above where it was before.
    """

    wall: float
    cpu: float
    peak: float


@dataclass(frozen=True)
class Part:
    """Some work to measure, or a bounded share of it.

    Args:
        work: The work. If it returns a `Cost`, its seconds count; all that it did, if not.
        timed: How many units of it are measured.
        of: How many there are in all; seconds are extrapolated linearly, memory is not.
        unit: What the units are.
    """

    work: Callable[[], Any]
    timed: int = 1
    of: int = 1
    unit: str = ""


def take_turns(
    parts: Mapping[str, Part], repeats: int, *, warm: bool = False
) -> dict[str, dict[str, Any]]:
    """Measure every part in turn, again and again, so that a slow minute hits all of them.

    Returns:
        By name: ``wall_s``, ``cpu_s`` and ``peak_mb``, each with median, min and max, and of a
        part that was not measured whole ``timed_<unit>`` and ``<unit>``.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in parts}
    for turn in range(repeats + warm):
        gc.collect()  # takes a second of its own: not before every part
        for name, part in parts.items():
            cost = measured(part.work)
            if turn >= warm:
                costs[name].append(cost)
    found = {}
    for name, part in parts.items():
        scale = part.of / part.timed
        found[name] = {
            "wall_s": spread([scale * cost.wall for cost in costs[name]]),
            "cpu_s": spread([scale * cost.cpu for cost in costs[name]]),
            "peak_mb": spread([cost.peak / 1e6 for cost in costs[name]]),
            **({f"timed_{part.unit}": part.timed, part.unit: part.of} if part.unit else {}),
        }
    return found


def measured(work: Callable[[], Any]) -> Cost:
    """Run some work once."""
    with suppress(OSError, AttributeError):  # freed memory would hide what the work needs
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with suppress(OSError):  # on Linux the peak starts anew
        _REFERENCES.write_text("5", encoding="ascii")
    before = peak_memory()
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if isinstance(result, Cost):
        wall, cpu, _ = result
    return Cost(wall, cpu, max(0, peak_memory() - before))


def cost_of_hooks(
    modules: Sequence[nn.Module], hooks: AbstractContextManager[Any], work: Callable[[], Any]
) -> Cost:
    """Seconds that hooks take during some work, apart from the work itself.

    Hooks run in the order in which they were put on: one looks at the clocks before, one after.
    """
    spent = [0.0, 0.0]

    def before(module: nn.Module, args: Any) -> None:
        spent[0] -= time.perf_counter()
        spent[1] -= time.process_time()

    def after(module: nn.Module, args: Any) -> None:
        spent[0] += time.perf_counter()
        spent[1] += time.process_time()

    handles = [module.register_forward_pre_hook(before) for module in modules]
    with hooks:
        handles += [module.register_forward_pre_hook(after) for module in modules]
        work()
    for handle in handles:
        handle.remove()
    return Cost(spent[0], spent[1], 0.0)


def timed(work: Callable[[], Any]) -> float:
    """Seconds that some work takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range, in four digits."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def peak_memory() -> int:
    """Largest resident size of this process since it started or since :func:`measured` began."""
    lines = _STATUS.read_text(encoding="ascii").splitlines() if _STATUS.exists() else []
    peak = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, with as many threads as this one has."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found: T = pool.apply(_quietly, (function, torch.get_num_threads(), arguments))
        return found


def _quietly(function: Callable[..., T], threads: int, arguments: Sequence[Any]) -> T:
    torch.set_num_threads(threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)
