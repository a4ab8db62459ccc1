"""How much memory a cut needs beside the model, and whether temporary files have to help."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import nn

from lightning_mi_prune.calibration.activations import input_sizes
from lightning_mi_prune.calibration.gradients import gradient_sizes
from lightning_mi_prune.core.errors import PruningError, number
from lightning_mi_prune.core.options import Calibration
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.surgery.verification import parameters_in

__all__ = [
    "Memory",
    "MemoryNeeds",
    "choose_memory",
    "free_memory",
    "is_large",
    "memory_needs",
]

Memory = Literal["ordinary", "low"]

_DOUBLE = 8  # bytes
_MATRICES = 4  # of d x d in float64 while a group of d entries is scored, or its layer solved
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryNeeds:
    """What a cut needs beside the model and the activations of its runs, in bytes.

    Args:
        ordinary: Memory, where the sums of all groups are in it together with a cut copy.
        low: Memory, where only those of the largest group are.
        files: Temporary files for all else, but for what backward passes keep.
        largest: The input with most entries.
        entries: Its entries.
    """

    ordinary: int
    low: int
    files: int
    largest: str
    entries: int

    def __str__(self) -> str:
        return (
            f"sums and copies take {_megabytes(self.low)} at a time instead of "
            f"{_megabytes(self.ordinary)}, beside what the model needs to run, and "
            f"{_megabytes(self.files)} of temporary files in {tempfile.gettempdir()!r}, beside "
            "what backward passes keep"
        )


def memory_needs(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    *,
    positions: int,
    gradients: bool,
) -> MemoryNeeds:
    """What calibration, scores and reconstruction of some groups need, by their widths.

    Args:
        model: Module that holds the groups.
        groups: Groups that may be cut.
        plan: The plan that the model carries.
        positions: Samples of every group.
        gradients: Whether gradients are collected.

    Example:
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> from lightning_mi_prune.graph.groups import full_plan
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> needs = memory_needs(net, [group], full_plan([group]), positions=10, gradients=False)
        >>> needs.low, needs.files - 10 * 4 * 4  # samples, and 24 parameters twice
        (512, 192)
    """
    places: dict[tuple[str, str, str], tuple[int, str]] = {}
    sizes = input_sizes(model, groups)
    for group in groups:
        for key, consumers in group.inputs.items():
            places[consumers[0], group.scope, group.network] = sizes[key], key
    entries, largest = max(places.values(), default=(0, ""))
    itemsize = max((p.element_size() for p in model.parameters()), default=4)
    unique = {id(p): p for p in parameters_in(model, groups).values()}
    cut = sum(p.numel() * p.element_size() for p in unique.values())
    squares = sum(size**2 for size, _ in places.values())
    matrices = 0
    if gradients:
        matrices = sum(size.dimension**2 for size in gradient_sizes(model, groups, plan).values())
    scored = _MATRICES * _DOUBLE * entries**2
    return MemoryNeeds(
        # Sums in double precision, those of a step in single.
        ordinary=_DOUBLE * squares + 12 * matrices + cut + scored,
        low=scored,
        files=positions * sum(size for size, _ in places.values()) * itemsize
        + (12 + _DOUBLE) * matrices
        + 2 * cut,
        largest=largest,
        entries=entries,
    )


def choose_memory(
    calibration: Calibration, needs: MemoryNeeds, device: torch.device, *, free: int | None = None
) -> Memory:
    """Whether sums are held in memory, or made one after another from temporary files.

    Args:
        calibration: The option.
        needs: What a cut needs.
        device: Device of the model.
        free: Bytes that are free there; default: asked for.

    Raises:
        PruningError: If the largest group alone does not fit, or the files do not fit on the disk.

    Example:
        >>> needs = MemoryNeeds(ordinary=80, low=10, files=30, largest="ffn", entries=4)
        >>> cpu = torch.device("cpu")
        >>> [choose_memory(Calibration(), needs, cpu, free=bytes) for bytes in (200, 100)]
        ['ordinary', 'low']
    """
    free = free_memory(device) if free is None else free
    if calibration.memory == "ordinary" or (
        calibration.memory == "auto" and 2 * needs.ordinary <= free
    ):
        return "ordinary"
    if needs.low > free:
        raise PruningError(
            f"Not even one group at a time fits: {needs.largest!r} has {number(needs.entries)} "
            f"entries, which takes {_megabytes(needs.low)} beside the model, and "
            f"{_megabytes(free)} are free. Leave it out (exclude, or other kinds), or cut on a "
            "machine with more memory."
        )
    folder = tempfile.gettempdir()
    room = shutil.disk_usage(folder).free
    if needs.files > room:
        raise PruningError(
            f"memory='low' needs up to {_megabytes(needs.files)} of temporary files, and "
            f"{folder!r} has {_megabytes(room)}; expected more room. Set TMPDIR to a folder on a "
            "larger disk, or calibrate on fewer positions."
        )
    return "low"


def is_large(calibration: Calibration, model: nn.Module) -> bool:
    """Whether copies of a model should be in files, before it is known what can be cut of it."""
    if calibration.memory != "auto":
        return calibration.memory == "low"
    parameter = next(model.parameters())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return 2 * size > free_memory(parameter.device)


def free_memory(device: torch.device) -> int:
    """Bytes of memory that are free on a device; on the CPU within the limit of a container."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no limit, or another system
        most = int((_CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        lines = (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        cached = dict(line.split() for line in lines)
        free = min(free, most - used + int(cached["inactive_file"]) + int(cached["active_file"]))
    return free


def _megabytes(size: int) -> str:
    return f"{number(-(-size // 2**20))} MB"
