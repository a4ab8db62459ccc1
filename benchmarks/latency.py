"""What pruning does to speed: latency by shape, by length and widths.

To be run on an idle machine. Latency depends on shapes, not on weights, so models are built with
random ones and no classifier is needed. Each takes turns with the dense model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks.records import Figures, Job, Store, cpu_name, single
from benchmarks.subjects import Kept, graph_of
from benchmarks.tasks import RECIPES, SEEDS, TASKS, task_data, token_ids, typical_length
from examples.text_classification.packaged import model_path
from lightning_mi_prune import PruningPlan, apply_plan
from lightning_mi_prune.allocation.macs import count_macs
from lightning_mi_prune.allocation.measuring import measure_latency
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.graph.graph import choose_groups

__all__ = ["BATCHES", "latency", "lengths", "shape_of", "timed"]

BATCHES = (1, 32)
# Records (without training) whose shapes are timed.
WIDTHS = {
    "ours": ("relevance-mi", "global", "reconstruction"),
    "uniform": ("taylor", "uniform", "none"),
}


def shape_of(task: str, kept: Kept) -> str:
    """Task and widths as text: what a latency is measured of."""
    return json.dumps([task, kept], sort_keys=True)


def shaped(config: Any, kept: Kept | None = None) -> nn.Module:
    """A classifier with random weights, and these widths if some are given; changes the config."""
    if kept is not None:
        config.num_hidden_layers = len(kept["ffn"])
    model: nn.Module = AutoModelForSequenceClassification.from_config(config).eval()
    if kept is not None:
        chosen = choose_groups(graph_of(model).groups, kinds=[*kept])
        groups = sorted(chosen, key=lambda group: group.level)
        widths = {kind: iter(values) for kind, values in kept.items()}
        places = {group.name: tuple(range(next(widths[group.kind]))) for group in groups}
        apply_plan(model, groups, PruningPlan({group.name: group.size for group in groups}, places))
    return model


def config_of(task: str, classes: int) -> Any:
    """The config of a task's dense model."""
    return AutoConfig.from_pretrained(model_path(RECIPES[task].model), num_labels=classes)


def timed(
    networks: Mapping[str, nn.Module], length: int, *, seconds: float, rounds: int
) -> dict[str, float]:
    """Latency in ms of several models, in turn, for every batch size."""
    found = {}
    for rows in BATCHES:
        inputs = token_ids(rows, length)

        def forward(network: nn.Module, inputs: dict[str, torch.Tensor] = inputs) -> None:
            with torch.inference_mode():
                network(**inputs)

        calls = {name: partial(forward, network) for name, network in networks.items()}
        for name, ms in measure_latency(calls, seconds=seconds, rounds=rounds).items():
            found[f"{name}ms_b{rows}"] = ms
    return found


def latency(
    folder: Path,
    tasks: Sequence[str] = TASKS,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] = (),
    seconds: float = 1.0,
    rounds: int = 10,
) -> Iterator[Job]:
    """Milliseconds of every shape in the records of `recovery`, for texts of typical length."""
    for found in Store("recovery", folder):
        asked = not methods or found["method"] in methods
        if asked and found["task"] in tasks and found.seed in seeds:
            setting = {"task": found["task"], "kept": found["kept"]}
            yield single(setting, measured, found["task"], found["kept"], seconds, rounds)


@cache
def facts(task: str) -> tuple[int, int]:
    """Classes of a task, and tokens of the median batch of its test split."""
    data = task_data(task, 0)
    return data.num_classes, typical_length([*data.test_dataloader()])


def measured(
    task: str, kept: Kept, seconds: float, rounds: int, length: int = 0, compiled: bool = False
) -> Figures:
    """The dense model and a shape, in turn; 0 is the typical length of the task."""
    classes, typical = facts(task)
    length = length or typical
    networks = {"dense_": shaped(config_of(task, classes))}
    networks[""] = shaped(config_of(task, classes), kept)
    figures: dict[str, float] = {"length": length}
    for name, network in networks.items():
        figures[f"{name}macs"] = count_macs(network, RecordedCall((), token_ids(1, length)))
    torch.compiler.reset()
    for network in networks.values() if compiled else ():
        network.compile(dynamic=False)
    return figures | timed(networks, length, seconds=seconds, rounds=rounds)


# ------------------------------------------------------------------------------ lengths and widths


def lengths(
    folder: Path,
    tasks: Sequence[str] = ("trec-6",),
    lengths: Sequence[int] = (23, 64, 128),
    sparsities: Sequence[float] = (0.5, 0.75, 0.9),
    compiled: bool = False,
    seconds: float = 1.0,
    rounds: int = 10,
) -> Iterator[Job]:
    """Speed of our widths and of uniform ones with as many parameters, by length of the texts.

    Raises:
        LookupError: If no record of `recovery` has one of the shapes.
    """
    for task, length in ((task, length) for task in tasks for length in lengths):
        for name, sparsity in ((name, s) for name in WIDTHS for s in sparsities):
            method, widths, weights = WIDTHS[name]
            about = {"task": task, "seed": 0, "steps": 0, "sparsity": sparsity}
            about |= {"method": method, "widths": widths, "weights": weights}
            same = Store("recovery", folder).find(**about)
            if not same:
                raise LookupError(f"no record of {about}: run `python -m benchmarks run recovery`")
            kept = same[0]["kept"]
            setting = {"task": task, "length": length, "compiled": compiled, "widths": name}
            setting |= {"sparsity": sparsity, "cpu": cpu_name(), "kept": kept}
            yield single(setting, measured, task, kept, seconds, rounds, length, compiled)
