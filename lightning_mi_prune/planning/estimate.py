"""What a cut will cost, in seconds and bytes, before anything was collected."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from lightning_mi_prune.calibration.activations import input_sizes
from lightning_mi_prune.calibration.gradients import gradient_sizes
from lightning_mi_prune.calibration.memory import MemoryNeeds, memory_needs
from lightning_mi_prune.core.errors import number
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup

__all__ = [
    "CutEstimate",
    "estimate_cut",
    "products_per_second",
]

_SIDE = 512  # of the matrices that are timed
_OVERHEAD = 0.01  # seconds for each input and part, of what is no product of matrices

# Operations in double precision for an input of d entries, as measured on three encoders
# (docs/plan.md): of each position and d^2, and of d^3.
_SUMMING, _SOLVING_SUMS = 1.0, 0.7
_RANKING, _COMPENSATING, _SOLVING = 7.0, 2.0, 9.0


@dataclass(frozen=True)
class CutEstimate:
    """What a cut costs beside validation and training, which run anyway.

    Args:
        seconds: By part: ``calibration``, ``ranking`` and ``reconstruction``.
        needs: Memory beside the model, where all sums are in it, or in temporary files.
        device: Where the product of matrices was timed.
    """

    seconds: Mapping[str, float]
    needs: MemoryNeeds
    device: str

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_seconds(value)}" for name, value in self.seconds.items())
        memory = -(-self.needs.ordinary // 2**20)
        return (
            f"Estimate for a cut: {_seconds(self.total)} beside validation ({parts}), from a "
            f"product of matrices timed on this {self.device}, and {number(memory)} MB of memory "
            "beside the model."
        )


def estimate_cut(
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    *,
    positions: int,
    stored_positions: int,
    gradients: bool,
    per_second: float | None = None,
) -> CutEstimate:
    """Estimate what a cut of some groups costs, from their sizes and the speed of this machine.

    Sums grow with the positions and the square of the entries of an input, orders and solved layers
    with their cube. A validation that has fewer positions costs less.

    Args:
        module: The model.
        groups: Groups that may be cut.
        plan: The plan it carries.
        positions: Positions that are calibrated with.
        stored_positions: Positions on which layers are solved again; 0 for none.
        gradients: Whether gradients are collected.
        per_second: Operations in a second; default: timed here.

    Example:
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> from lightning_mi_prune.graph.groups import full_plan
        >>> net = nn.Sequential(nn.Linear(3, 400), nn.ReLU(), nn.Linear(400, 2))
        >>> group = linear_group(net, "ffn", kind="ffn", producers=["0"], consumers=["2"])
        >>> sizes = {"positions": 1000, "stored_positions": 1000, "gradients": False}
        >>> found = estimate_cut(net, [group], full_plan([group]), per_second=1e9, **sizes)
        >>> {name: round(value, 2) for name, value in found.seconds.items()}
        {'calibration': 0.17, 'ranking': 0.59, 'reconstruction': 0.7}
    """
    device = next(module.parameters()).device
    rate = products_per_second(device) if per_second is None else per_second
    places: dict[tuple[str, str, str], int] = {}
    sizes = input_sizes(module, groups)
    for group in groups:
        for key, consumers in group.inputs.items():
            places[consumers[0], group.scope, group.network] = sizes[key]
    squares, cubes = (sum(size**power for size in places.values()) for power in (2, 3))
    outputs = 0
    if gradients:
        outputs = sum(size.dimension**2 for size in gradient_sizes(module, groups, plan).values())
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    weights = sum(p.numel() for p in module.parameters() if p.ndim > 1 and id(p) not in tables)
    overhead = _OVERHEAD * len(places)
    seconds = {
        "calibration": _SUMMING * positions * (squares + outputs) / rate + overhead,
        "ranking": (_RANKING + _COMPENSATING) * cubes / rate + overhead,
    }
    if stored_positions:
        work = stored_positions * (_SOLVING_SUMS * squares + 2 * weights) + _SOLVING * cubes
        seconds["reconstruction"] = work / rate + overhead
    needs = memory_needs(module, groups, plan, positions=positions, gradients=gradients)
    return CutEstimate(seconds, needs, device.type)


def products_per_second(device: torch.device, repetitions: int = 5) -> float:
    """Multiplications and additions in double precision in a second, of a product of matrices.

    Takes some hundredths of a second; random states stay.

    Args:
        device: Where to measure; one that has no double precision counts as the CPU.
        repetitions: Products; the median counts.
    """
    place = torch.device("cpu") if device.type == "mps" else device
    matrix = torch.ones(_SIDE, _SIDE, dtype=torch.float64, device=place)
    times = []
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - started)
    return 2 * _SIDE**3 / max(median(times[1:]), 1e-9)


def _seconds(value: float) -> str:
    """A rough time.

    Example:
        >>> [_seconds(value) for value in (0.02, 0.36, 41.7, 4000)]
        ['under 0.1 s', '0.4 s', '42 s', '67 min']
    """
    if value < 0.1:
        return "under 0.1 s"
    if value < 600:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    return f"{value / 60:.0f} min"
