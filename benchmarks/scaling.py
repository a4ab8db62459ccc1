"""How the cost of a cut grows with width, depth, positions and validation; what ranks send.

Random weights and data. Exponents are slopes of least-squares lines through the logarithms of size
and median seconds; 0 is constant, 1 linear. What ranks send is worked out, not timed: bytes follow
from shapes, and times assume a ring all-reduce, which sends ``2 (R - 1) / R`` of a buffer from
every rank in ``2 (R - 1)`` steps.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.costs import bert, halved, log_det_information, noisy
from benchmarks.measuring import Cost, Part, cost_of_hooks, in_fresh_process, take_turns
from benchmarks.records import Figures, Job
from lightning_mi_prune import Listener, MutualInformation, WidthAxis, apply, find_axes, rank_axes
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.evidence import Evidence
from lightning_mi_prune.moments import Moments

__all__ = [
    "ENCODERS",
    "encoder",
    "reconstruction_bytes",
    "reduced_bytes",
    "ring_seconds",
    "scaling",
]


@dataclass(frozen=True)
class Settings:
    """What grows, and what stays meanwhile.

    Args:
        width: Neurons of a layer, four times its outputs.
        depth: Layers.
        positions: Positions that are samples, the whole of validation.
        validation: Batches of validation, of which only ``samples`` positions are samples.
        samples: Positions that are samples where they do not grow.
        hidden: Hidden size of the model that is validated.
        layers: Its depth where that does not grow.
        batch: Sequences in a batch.
        length: Positions in a sequence.
        neurons: Neurons of a layer on which a determinant is taken.
    """

    width: tuple[int, ...] = (512, 1024, 2048, 4096)
    depth: tuple[int, ...] = (2, 4, 8, 16)
    positions: tuple[int, ...] = (2048, 4096, 8192, 16_384)
    validation: tuple[int, ...] = (8, 16, 32, 64)
    samples: int = 4096
    hidden: int = 192
    layers: int = 2
    batch: int = 16
    length: int = 32
    neurons: int = 8


QUICK = Settings((16, 32, 64), (1, 2), (128, 256), (2, 4), 128, 24, 1, 4, 16, 2)


GROWS = {
    "width": ("sums", "scores", "whole_order", "log_determinants"),
    "depth": ("calibration", "whole_order", "cut"),
    "positions": ("calibration", "whole_order"),
    "validation": ("validation_itself", "calibration", "whole_order"),
}


def scaling(repeats: int = 3, tiny: bool = False) -> Iterator[Job]:
    """How the cost of a cut grows; every sweep in a process of its own, sizes in turn."""
    for grows, parts in GROWS.items():
        settings = [{"grows": grows, "part": part} for part in parts]
        yield Job(settings, 0, partial(_sweep, grows, QUICK if tiny else Settings(), repeats))


def _sweep(grows: str, settings: Settings, repeats: int) -> list[Figures]:
    costs = in_fresh_process(swept, grows, settings, repeats)
    sizes, found = getattr(settings, grows), list[Figures]()
    for part in GROWS[grows]:
        figures: dict[str, Any] = {"sizes": [*sizes], "repeats": repeats}
        for clock in ("cpu_s", "wall_s"):
            seconds = [costs[f"{part}@{size}"][clock]["median"] for size in sizes]
            slope = round(exponent(sizes, seconds), 3)
            figures |= {clock: seconds, f"{clock}_exponent": slope}
        found.append(figures)
    return found


def swept(grows: str, settings: Settings, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Costs of every part at every size, by ``part@size``."""
    torch.manual_seed(0)
    s = settings
    parts: dict[str, Part] = {}
    for size in getattr(settings, grows):
        if grows == "width":
            found = _wide(settings, size)
        else:
            layers = size if grows == "depth" else s.layers
            positions = size if grows == "positions" else s.samples
            steps = size if grows == "validation" else positions // (s.batch * s.length)
            run = _Run(s, layers, steps, positions)
            found = {name: Part(getattr(run, name)) for name in GROWS[grows]}
        parts |= {f"{name}@{size}": part for name, part in found.items()}
    return take_turns(parts, repeats, warm=True)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3.0, 12.0, 48.0]), 6)
        2.0
    """
    logs = [[math.log(max(value, 1e-9)) for value in values] for values in (sizes, seconds)]
    return statistics.linear_regression(*logs).slope


def _wide(settings: Settings, width: int) -> dict[str, Part]:
    """One layer: sums of the samples, scores, the whole order, and determinants."""
    x = torch.randn(settings.samples, width)
    moments = Moments(width)
    moments.update(x)
    samples = 10 * max(settings.samples, width)  # enough at every width: nothing is shrunk
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


class _Run:
    """A model of some depth, a validation of some length, and a cap on its samples."""

    def __init__(self, settings: Settings, layers: int, batches: int, positions: int) -> None:
        hidden = settings.hidden
        shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
        self.model = bert(shape | {"num_hidden_layers": layers})
        self.batches, self.positions = batches, positions
        self.axes = choose_axes(find_axes(self.model))
        self.ids = torch.randint(5, 1000, (settings.batch, settings.length))
        self.moments: dict[str, Moments] = {}

    def validation_itself(self) -> None:
        with torch.inference_mode():
            for _ in range(self.batches):
                self.model(self.ids)

    def calibration(self) -> Cost:
        listener = Listener(self.model, self.axes, positions=self.positions, batches=self.batches)
        modules = [self.model.get_submodule(axis.readers[0]) for axis in self.axes]
        cost = cost_of_hooks(modules, listener, self.validation_itself)
        self.moments = listener.moments
        return cost

    def whole_order(self) -> None:
        weights, plan = dict(self.model.named_parameters()), full_plan(self.axes)
        rank_axes(self.axes, self.moments, weights, plan, relevance="readers")

    def cut(self) -> None:
        apply(copy.deepcopy(self.model), self.axes, halved(self.axes))


# ----------------------------------------------------------------------------------- communication

ENCODERS = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
    "BERT-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
_BANDWIDTH = 25e9 / 8  # bytes a second of a 25 Gbit/s link
_LATENCY = 20e-6  # seconds of one step of the ring


def encoder(**shape: int) -> nn.Module:
    """A random BERT encoder without pooler, with twelve heads where nothing else is asked for."""
    model: nn.Module = BertModel(BertConfig(**shape), add_pooling_layer=False)
    return model.eval()


def _outputs(network: nn.Module, consumer: str) -> int:
    return network.get_parameter(f"{consumer}.weight").shape[0]


def reduced_bytes(axes: Sequence[WidthAxis], network: nn.Module, *, whole: bool = False) -> int:
    """Bytes of the two all-reduces before a choice: sums of activations, sums of gradients.

    With `whole`, those of the sums on one rank: whole matrices, not the triangles that are sent.
    """
    size = 0
    for axis in axes:
        d, rows = axis.size * axis.entries, _outputs(network, axis.readers[0])
        squares = (n * n if whole else n * (n + 1) // 2 for n in (d, rows))
        size += 8 * (1 + d + 3 + axis.size + sum(squares))
    return size


def reconstruction_bytes(axes: Sequence[WidthAxis], network: nn.Module) -> int:
    """Bytes of the normal equations of all layers that are solved again, half of each axis kept."""
    size = 0
    for axis in axes:
        kept = axis.size * axis.entries // 2 + 1
        size += 8 * kept * (kept + _outputs(network, axis.readers[0]))
    for consumer in {name for axis in axes for name in axis.above}:
        rows, columns = network.get_parameter(f"{consumer}.weight").shape
        size += 8 * (columns + 1) * (columns + 1 + rows // 2)
    return size


def ring_seconds(size: int, ranks: int) -> float:
    """Time of one all-reduce over a ring."""
    return 2 * (ranks - 1) * (size / ranks / _BANDWIDTH + _LATENCY)
