"""How the cost of a cut grows with width, depth, positions and validation; what ranks send.

Random weights and data. Exponents are slopes of least-squares lines through the logarithms of size
and median seconds; 0 is constant, 1 linear. What ranks send is worked out, not timed: bytes follow
from shapes, and times assume a ring all-reduce, which sends ``2 (R - 1) / R`` of a buffer from
every rank in ``2 (R - 1)`` steps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertModel

from benchmarks.costs import SHAPES, Run, log_det_information, noisy
from benchmarks.measuring import Part, in_fresh_process, take_turns
from benchmarks.records import Figures, Job
from benchmarks.subjects import entries_of
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.discovery.discover import discover_run
from lightning_mi_prune.discovery.example_inputs import example_inputs
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.importance.criteria import MutualInformation
from lightning_mi_prune.importance.statistics import UnitStatistics
from lightning_mi_prune.reconstruction.ridge import FOLDS

__all__ = [
    "ENCODERS",
    "encoder",
    "exponent",
    "layer_groups",
    "reconstruction_bytes",
    "reduced_bytes",
    "ring_seconds",
    "scaling",
]

# Sizes of what grows: neurons of a layer (four times its outputs), layers, positions that are
# samples, batches of validation.
SIZES = {
    "width": (512, 1024, 2048, 4096),
    "depth": (2, 4, 8, 16),
    "positions": (2048, 4096, 8192, 16_384),
    "validation": (8, 16, 32, 64),
}
TINY = {"width": (16, 32, 64), "depth": (1, 2), "positions": (128, 256), "validation": (2, 4)}
# What stays meanwhile.
FIXED = {"samples": 4096, "hidden": 192, "rows": 16, "length": 32, "neurons": 8}
TINY_FIXED = {"samples": 128, "hidden": 24, "rows": 4, "length": 16, "neurons": 2}
LAYERS = 2
GROWS = {
    "width": ("sums", "scores", "order", "log_determinants"),
    "depth": ("calibration", "order", "cut"),
    "positions": ("calibration", "order"),
    "validation": ("validation", "calibration", "order"),
}


def scaling(repeats: int = 3, tiny: bool = False) -> Iterator[Job]:
    """How the cost of a cut grows; every sweep in a process of its own, sizes in turn."""
    for grows, parts in GROWS.items():
        settings = [{"grows": grows, "part": part} for part in parts]
        yield Job(settings, 0, partial(_sweep, grows, tiny, repeats))


def _sweep(grows: str, tiny: bool, repeats: int) -> list[Figures]:
    costs = in_fresh_process(swept, grows, tiny, repeats)
    sizes, found = (TINY if tiny else SIZES)[grows], list[Figures]()
    for part in GROWS[grows]:
        figures: dict[str, Any] = {"sizes": [*sizes], "repeats": repeats}
        for clock in ("cpu_s", "wall_s"):
            seconds = [costs[f"{part}@{size}"][clock]["median"] for size in sizes]
            slope = round(exponent(sizes, seconds), 3)
            figures |= {clock: seconds, f"{clock}_exponent": slope}
        found.append(figures)
    return found


def swept(grows: str, tiny: bool, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Costs of every part at every size, by ``part@size``."""
    torch.manual_seed(0)
    fixed = TINY_FIXED if tiny else FIXED
    samples, hidden, rows, length, neurons = fixed.values()
    parts: dict[str, Part] = {}
    for size in (TINY if tiny else SIZES)[grows]:
        if grows == "width":
            found = _wide(samples, size, neurons)
        else:
            layers = size if grows == "depth" else LAYERS
            positions = size if grows == "positions" else samples
            batches = size if grows == "validation" else positions // (rows * length)
            shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
            run = Run(shape | {"num_hidden_layers": layers}, rows, length, batches, positions)
            found = {name: Part(getattr(run, name)) for name in GROWS[grows]}
        parts |= {f"{name}@{size}": part for name, part in found.items()}
    return take_turns(parts, repeats, warm=True)


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through logarithms."""
    logs = [[math.log(max(value, 1e-9)) for value in values] for values in (sizes, seconds)]
    return statistics.linear_regression(*logs).slope


def _wide(samples: int, width: int, neurons: int) -> dict[str, Part]:
    """One layer: sums of the samples, scores, the whole order, and determinants."""
    x = torch.randn(samples, width)
    moments = Moments(width)
    moments.update(x)
    mean, covariance = moments.statistics()
    enough = 10 * max(samples, width)  # at every width: nothing is shrunk
    covariance += torch.eye(width).to(covariance)
    readout = torch.randn(width // 4, width, dtype=torch.float64)
    found = UnitStatistics("ffn", 1, enough, mean, covariance, readout)
    few = min(neurons, width)
    joint = noisy(found, 1.0)
    return {
        "sums": Part(lambda: moments.update(x)),
        "scores": Part(lambda: MutualInformation("topk").scores(found)),
        "order": Part(lambda: MutualInformation().rank([found], 0)),
        "log_determinants": Part(lambda: log_det_information(*joint, few), few, width, "neurons"),
    }


# ----------------------------------------------------------------------------------- communication

ENCODERS = {name: SHAPES[name] for name in ("MiniLM-L6", "BERT-base")} | {
    "BERT-large": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
}
_BANDWIDTH = 25e9 / 8  # bytes a second of a 25 Gbit/s link
_LATENCY = 20e-6  # seconds of one step of the ring


def encoder(**shape: int) -> nn.Module:
    """A random BERT encoder without pooler, with twelve heads, or sixteen where they do not fit."""
    heads = 16 if shape["hidden_size"] % 12 else 12
    config = BertConfig(**shape, num_attention_heads=heads)
    model: nn.Module = BertModel(config, add_pooling_layer=False)
    return model.eval()


def layer_groups(shape: Mapping[str, int]) -> list[DependencyGroup]:
    """Neurons and heads of a BERT encoder; those of its layers are found in one of two layers."""
    network = encoder(**{**shape, "num_hidden_layers": 2})
    inputs = example_inputs(network)
    groups = discover_run(network, lambda net: net(**inputs), kinds=("ffn", "heads")).groups
    layer = [group for group in groups if ".0." in group.name]
    found = []
    for number in range(shape["num_hidden_layers"]):

        def there(path: str, number: int = number) -> str:
            return path.replace(".0.", f".{number}.")

        # What is above: the layers that follow, and in heads the neurons of the same layer.
        later = range(number + 1, shape["num_hidden_layers"])
        for group in layer:
            own = [path for path in group.above if ".0." in path]
            next_one = [path for path in group.above if ".1." in path]
            above = [there(path) for path in own]
            above += [path.replace(".1.", f".{other}.") for other in later for path in next_one]
            found.append(replace(group.at_paths(there).renamed(there), above=tuple(above)))
    return found


def reduced_bytes(
    groups: Sequence[DependencyGroup], network: nn.Module, *, whole: bool = False
) -> int:
    """Bytes of the two all-reduces before a choice: sums of activations, sums of gradients.

    With `whole`, those of the sums on one rank: whole matrices, not the triangles that are sent.
    """
    size = 0
    for group in groups:
        d = group.size * entries_of(group)
        rows = len(network.get_parameter(f"{group.consumers[0]}.weight"))
        squares = (n * n if whole else n * (n + 1) // 2 for n in (d, rows))
        size += 8 * (1 + d + 3 + group.size + sum(squares))
    return size


def reconstruction_bytes(groups: Sequence[DependencyGroup], network: nn.Module) -> int:
    """Bytes of all sums of the reconstruction, where half of each group stays."""
    size = 0
    for group in groups:
        kept = group.size * entries_of(group) // 2 + 1
        size += 8 * kept * (kept + len(network.get_parameter(f"{group.consumers[0]}.weight")))
    inputs: dict[str, int] = {}
    for consumer in {name for group in groups for name in group.above}:
        rows, columns = network.get_parameter(f"{consumer}.weight").shape
        size += 8 * (columns + 1) * (rows // 2)
        inputs[consumer.rpartition(".")[0]] = columns + 1  # query, key and value have the same
    size += sum(8 * entries**2 for entries in inputs.values())
    return FOLDS * size


def ring_seconds(size: int, ranks: int) -> float:
    """Time of one all-reduce over a ring."""
    return 2 * (ranks - 1) * (size / ranks / _BANDWIDTH + _LATENCY)
