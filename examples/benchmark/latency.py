"""Milliseconds of every shape that the records name, side by side with the dense model.

    python -m examples.benchmark.latency
    python -m examples.benchmark.latency --tasks trec-6 --methods relevance-mi --seconds 2

Run it on a machine that does nothing else. Latency depends on shapes, not on weights: models are
built with random ones, so no record is repeated and no classifier is needed. A text has the length
of the median test batch of its task. Shapes that are there are not measured again.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from examples.benchmark import oneshot, recovery
from examples.benchmark.finetuned import RECIPES, SEEDS, TASKS, task_data
from examples.benchmark.records import Record, load, write
from examples.benchmark.rivals.size import Kept
from examples.benchmark.texts import inputs_of, typical
from examples.text_classification.packaged import model_path
from lightning_mi_prune import Plan, apply, find_axes
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.measure import count_macs, measure_latency
from lightning_mi_prune.sample import Example

RESULTS = Path(__file__).parent / "results" / "latency.json"
BATCHES = (1, 32)


def shape_of(record: Record) -> str:
    """What a latency belongs to."""
    return json.dumps([record["task"], record["kept"]])


def shaped(config: Any, kept: Kept | None = None) -> nn.Module:
    """A classifier with random weights and these widths.

    Args:
        config: Of the dense model; it is changed.
        kept: Heads and neurons of every layer that is there; None keeps all.
    """
    if kept is not None:
        config.num_hidden_layers = len(kept["ffn"])
    model: nn.Module = AutoModelForSequenceClassification.from_config(config).eval()
    if kept is not None:
        axes = sorted(choose_axes(find_axes(model)), key=lambda axis: axis.level)
        widths = {kind: iter(values) for kind, values in kept.items()}
        places = {axis.name: tuple(range(next(widths[axis.kind]))) for axis in axes}
        apply(model, axes, Plan({axis.name: axis.size for axis in axes}, places))
    return model


def gauge(
    config: Callable[[], Any], kept: Kept, length: int, *, seconds: float, rounds: int
) -> Record:
    """Multiply-accumulates and latency of a shape and of the dense model, in turn.

    Args:
        config: Makes the config of the dense model.
        kept: The shape.
        length: Tokens of a text.
        seconds: Time for each model and batch size.
        rounds: How often the two take turns.
    """
    networks = {"dense_": shaped(config()), "": shaped(config(), kept)}
    found: Record = {"length": length}
    for rows in BATCHES:
        inputs = inputs_of(rows, length)

        def forward(network: nn.Module, inputs: dict[str, Tensor] = inputs) -> None:
            with torch.inference_mode():
                network(**inputs)

        calls = {
            name: (lambda network=network, forward=forward: forward(network))
            for name, network in networks.items()
        }
        for name, ms in measure_latency(calls, seconds=seconds, rounds=rounds).items():
            found[f"{name}latency_ms_b{rows}"] = ms
    example = Example((), inputs_of(1, length))
    for name, network in networks.items():
        found[f"{name}macs"] = count_macs(network, example)
    return found


def main(given: Sequence[str] | None = None) -> None:
    """Measure the shapes that are missing, one after another."""
    parser = argparse.ArgumentParser("examples.benchmark.latency", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tasks", nargs="+", choices=[*RECIPES], default=TASKS, help=f"default: {' '.join(TASKS)}")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="default: all")
    add("--methods", nargs="+", default=None, help="default: all")
    add("--seconds", type=float, default=1.0, help="for each model and batch size")
    add("--rounds", type=int, default=10, help="how often dense and pruned take turns")
    asked = parser.parse_args(given)
    transformers.logging.set_verbosity_error()
    found = load(RESULTS)
    there = {shape_of(record) for record in found}
    for task in asked.tasks:
        records = [
            record
            for record in (*load(recovery.RESULTS), *load(oneshot.RESULTS))
            if record["task"] == task
            and record["seed"] in asked.seeds
            and (asked.methods is None or record["method"] in asked.methods)
        ]
        missing = {s: r["kept"] for r in records if (s := shape_of(r)) not in there}
        if not missing:
            continue
        data = task_data(task, 0)
        length = typical([*data.test_dataloader()])

        def config(model: str = RECIPES[task].model, classes: int = data.num_classes) -> Any:
            return AutoConfig.from_pretrained(model_path(model), num_labels=classes)

        for kept in missing.values():
            times = {"seconds": asked.seconds, "rounds": asked.rounds}
            shape = {"task": task, "kept": kept, **gauge(config, kept, length, **times)}
            found.append(shape | {"machine": oneshot.machine()})
            write(RESULTS, sorted(found, key=shape_of))
            ratio = shape["dense_latency_ms_b32"] / shape["latency_ms_b32"]
            print(f"{task} {kept}: {ratio:.2f}x at batch 32", flush=True)


if __name__ == "__main__":
    main()
