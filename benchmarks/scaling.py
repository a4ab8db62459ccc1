"""How the cost of a cut grows with width, depth, positions, length of validation, and ranks.

    python -m benchmarks.scaling

Random weights and data. Exponents are slopes of least-squares lines through the logarithms of size
and median seconds; 0 is constant, 1 linear. Results go to ``benchmarks/results/scaling.json``;
``--busy`` notes that other work ran. What ranks send is counted, not timed.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.communication import ranks
from benchmarks.cost import SHAPES, build, halved
from benchmarks.cost_tables import ranks_table, scaling_table
from benchmarks.measuring import (
    Cost,
    Part,
    cost_of_hooks,
    in_fresh_process,
    in_this_process,
    machine,
    options,
    take_turns,
    write,
)
from benchmarks.rival_costs import noisy
from benchmarks.rival_scores import log_det_information
from lightning_mi_prune import (
    Listener,
    MutualInformation,
    apply,
    find_axes,
    rank_axes,
)
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.evidence import Evidence
from lightning_mi_prune.moments import Moments

__all__ = ["RESULTS", "Settings", "exponent", "main"]

RESULTS = Path(__file__).parent / "results" / "scaling.json"


@dataclass(frozen=True)
class Settings:
    """What grows, and what stays meanwhile.

    Args:
        widths: Neurons of a layer, four times its outputs.
        depths: Layers.
        positions: Positions that are heard, the whole of validation.
        validation: Batches of validation, of which only ``heard`` positions are heard.
        heard: Positions that are heard where they do not grow.
        hidden: Width of the stream of the model that is validated.
        layers: Its depth where that does not grow.
        batch: Sequences in a batch.
        length: Positions in a sequence.
        neurons: Neurons of a layer on which a determinant is taken.
        repeats: Rounds.
        seed: Seed of the data; weights have seed 0.
    """

    widths: tuple[int, ...] = (512, 1024, 2048, 4096)
    depths: tuple[int, ...] = (2, 4, 8, 16)
    positions: tuple[int, ...] = (2048, 4096, 8192, 16_384)
    validation: tuple[int, ...] = (8, 16, 32, 64)
    heard: int = 4096
    hidden: int = 192
    layers: int = 2
    batch: int = 16
    length: int = 32
    neurons: int = 8
    repeats: int = 3
    seed: int = 0


QUICK = Settings(
    widths=(16, 32, 64),
    depths=(1, 2),
    positions=(128, 256),
    validation=(2, 4),
    heard=128,
    hidden=24,
    layers=1,
    batch=4,
    length=16,
    neurons=2,
    repeats=2,
)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    logs = [[math.log(max(value, 1e-9)) for value in values] for values in (sizes, seconds)]
    return statistics.linear_regression(*logs).slope


def sweep(
    sizes: Sequence[int], parts: Callable[[int], dict[str, Part]], repeats: int
) -> dict[str, Any]:
    """Costs of every part at every size, and how they grow; sizes take turns as well."""
    work = {(name, size): part for size in sizes for name, part in parts(size).items()}
    costs = take_turns(
        {f"{name}@{size}": p for (name, size), p in work.items()}, repeats, warm=True
    )
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for name, _ in work):
        series = [costs[f"{name}@{size}"] for size in sizes]
        slopes = {
            clock: round(exponent(sizes, [cost[clock]["median"] for cost in series]), 3)
            for clock in ("cpu_s", "wall_s")
        }
        found[name] = {"exponent": slopes, "costs": series}
    return {"sizes": list(sizes), "parts": found}


def wide(settings: Settings, width: int) -> dict[str, Part]:
    """One layer: sums of ``heard`` positions, scores, the whole order, and determinants."""
    x = torch.randn(settings.heard, width)
    moments = Moments(width)
    moments.update(x)
    samples = 10 * max(settings.heard, width)  # enough at every width: nothing is shrunk
    mean, covariance = moments.statistics()
    covariance += torch.eye(width).to(covariance)
    readout = torch.randn(width // 4, width, dtype=torch.float64)
    site = Evidence("ffn", 1, samples, mean, covariance, readout)
    few = min(settings.neurons, width)
    joint = noisy(site, 1.0)
    return {
        "sums": Part(lambda: moments.update(x)),
        "scores": Part(lambda: MutualInformation("topk").scores(site)),
        "whole_order": Part(lambda: MutualInformation().rank([site], 0)),
        "log_determinants": Part(lambda: log_det_information(*joint, few), few, width, "neurons"),
    }


@dataclass
class _Run:
    """A model of some depth, a validation of some length, and a cap on what is heard of it."""

    settings: Settings
    layers: int
    batches: int
    positions: int

    def __post_init__(self) -> None:
        self.model = stack(self.settings.hidden, self.layers)
        self.axes = choose_axes(find_axes(self.model))
        self.ids = torch.randint(5, 1000, (self.settings.batch, self.settings.length))
        self.heard: dict[str, Moments] = {}
        self.plan = full_plan(self.axes)

    def validate(self) -> None:
        """All batches."""
        with torch.inference_mode():
            for _ in range(self.batches):
                self.model(self.ids)

    def listen(self) -> Cost:
        """All batches with hooks on; what the hooks take."""
        listener = Listener(self.model, self.axes, positions=self.positions, batches=self.batches)
        readers = [self.model.get_submodule(axis.readers[0]) for axis in self.axes]
        cost = cost_of_hooks(readers, listener, self.validate)
        self.heard = listener.moments
        return cost

    def order(self) -> None:
        """Every axis to its last unit."""
        weights = dict(self.model.named_parameters())
        rank_axes(self.axes, self.heard, weights, self.plan, relevance="readers")

    def cut(self) -> None:
        """Half of every axis."""
        apply(copy.deepcopy(self.model), self.axes, halved(self.axes))


def stack(hidden: int, layers: int) -> nn.Module:
    """A random BERT with layers of the usual proportions."""
    shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
    return build(shape)


def deep(settings: Settings, layers: int) -> dict[str, Part]:
    """A whole model: listening, the whole order, the cut."""
    run = _Run(
        settings, layers, settings.heard // (settings.batch * settings.length), settings.heard
    )
    return {
        "listening": Part(run.listen),
        "whole_order": Part(run.order),
        "cut": Part(run.cut),
    }


def many(settings: Settings, positions: int) -> dict[str, Part]:
    """All of a validation of so many positions is heard."""
    batches = positions // (settings.batch * settings.length)
    run = _Run(settings, settings.layers, batches, positions)
    return {"listening": Part(run.listen), "whole_order": Part(run.order)}


def long(settings: Settings, batches: int) -> dict[str, Part]:
    """A validation of so many batches, of which as much is heard as of any other."""
    run = _Run(settings, settings.layers, batches, settings.heard)
    return {
        "validation_itself": Part(run.validate),
        "listening": Part(run.listen),
        "whole_order": Part(run.order),
    }


_SWEEPS = {"width": wide, "depth": deep, "positions": many, "validation": long}


def grow(name: str, settings: Settings) -> dict[str, Any]:
    """One sweep."""
    torch.manual_seed(settings.seed)
    sizes: dict[str, tuple[int, ...]] = {
        "width": settings.widths,
        "depth": settings.depths,
        "positions": settings.positions,
        "validation": settings.validation,
    }
    return sweep(sizes[name], partial(_SWEEPS[name], settings), settings.repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every sweep in a process of its own, write the records, print the tables."""
    asked = options(__doc__ or "", RESULTS).parse_args(arguments)
    settings = QUICK if asked.quick else Settings()
    settings = replace(settings, repeats=asked.repeats or settings.repeats)
    call = in_this_process if asked.quick else in_fresh_process
    sweeps = {name: call(grow, name, settings) for name in _SWEEPS}
    body = {
        "machine": machine(busy=asked.busy),
        "settings": asdict(settings),
        "sweeps": sweeps,
        "ranks": [found for shape in SHAPES for found in ranks(shape)],
    }
    write(asked.results, body)
    print("\n".join([*scaling_table(body), "", *ranks_table(body)]))


if __name__ == "__main__":
    main()
