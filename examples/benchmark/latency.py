"""Milliseconds of every shape that the records name, side by side with the dense model.

    python -m examples.benchmark.latency
    python -m examples.benchmark.latency --tasks trec-6 --methods relevance-mi --seconds 2
    python -m examples.benchmark.latency --methods magnitude-masks

Run it on a machine that does nothing else. Latency depends on shapes, not on weights: models are
built with random ones, so no record is repeated and no classifier is needed. A text has the length
of the median test batch of its task. Shapes that are there are not measured again.

Masks leave the shape as it is. What they do to speed is measured apart, once for each task, with
Lightning's own `ModelPruning`, and goes to `results/masked.json`.
"""

import argparse
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from examples.benchmark import oneshot, recovery
from examples.benchmark.finetuned import RECIPES, SEEDS, TASKS, task_data
from examples.benchmark.options import count, positive
from examples.benchmark.records import Record, load, write
from examples.benchmark.rivals.size import Kept, weights_of, zeros_of
from examples.benchmark.texts import inputs_of, typical
from examples.text_classification.packaged import model_path
from lightning_mi_prune import Plan, apply, find_axes
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.measure import count_macs, measure_latency
from lightning_mi_prune.sample import Example

RESULTS = Path(__file__).parent / "results" / "latency.json"
MASKED = RESULTS.with_name("masked.json")
BATCHES = (1, 32)
MASKS = "magnitude-masks"  # the method that masks are measured for
SHARES = (0.75, 0.9)


def shape_of(record: Record) -> str:
    """What a latency belongs to."""
    return json.dumps([record["task"], record["kept"]])


def shaped(config: Any, kept: Kept | None = None) -> nn.Module:
    """A classifier with random weights and these widths.

    Args:
        config: Of the dense model; it is changed.
        kept: Heads, neurons and dimensions of heads of every layer that is there, those that were
            cut; None keeps all.
    """
    if kept is not None:
        config.num_hidden_layers = len(kept["ffn"])
    model: nn.Module = AutoModelForSequenceClassification.from_config(config).eval()
    if kept is not None:
        chosen = choose_axes(find_axes(model), units=[*kept])
        axes = sorted(chosen, key=lambda axis: axis.level)
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
    found: Record = {"length": length, **timed(networks, length, seconds=seconds, rounds=rounds)}
    example = Example((), inputs_of(1, length))
    for name, network in networks.items():
        found[f"{name}macs"] = count_macs(network, example)
    return found


def timed(
    networks: Mapping[str, nn.Module], length: int, *, seconds: float, rounds: int
) -> dict[str, float]:
    """Latency in ms of several models, in turn, for every batch size.

    Args:
        networks: The models, by what comes before the name of their latency.
        length: Tokens of a text.
        seconds: Time for each model and batch size.
        rounds: How often they take turns.
    """
    found = {}
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
    return found


def masked(network: nn.Module, share: float, *, permanent: bool) -> nn.Module:
    """A copy whose smallest weights are masked by Lightning's callback, all ranked together.

    Args:
        network: The dense model.
        share: Share of the weights of neurons and heads.
        permanent: Whether the masks are made zeros, as the callback does when training ends;
            otherwise every call multiplies weights by masks, as while training.
    """
    model = copy.deepcopy(network)
    paths = [name.removesuffix(".weight") for name in weights_of(choose_axes(find_axes(model)))]
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(model.get_submodule(path), "weight") for path in paths],
        amount=share,
        use_global_unstructured=True,
    )
    pruning.apply_pruning(share)
    if permanent:
        pruning.make_pruning_permanent(model)
    return model


def gauge_masks(
    config: Callable[[], Any], share: float, length: int, *, seconds: float, rounds: int
) -> Record:
    """Latency of the dense model, of one with masks in place and of one with zeros, in turn.

    Args:
        config: Makes the config of the dense model.
        share: Share of the weights of neurons and heads that is masked.
        length: Tokens of a text.
        seconds: Time for each model and batch size.
        rounds: How often the three take turns.
    """
    dense = shaped(config())
    networks = {"dense_": dense}
    for name, permanent in (("masks_", False), ("zeros_", True)):
        networks[name] = masked(dense, share, permanent=permanent)
    names = weights_of(choose_axes(find_axes(dense)))
    total = sum(dense.get_parameter(name).numel() for name in names)
    gone = sum(zeros_of(networks["zeros_"], name) for name in names) / total
    taken = timed(networks, length, seconds=seconds, rounds=rounds)
    return {"length": length, "gone": gone, **taken}


def main(given: Sequence[str] | None = None) -> None:
    """Measure the shapes and masks that are missing, one after another."""
    parser = argparse.ArgumentParser("examples.benchmark.latency", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tasks", nargs="+", choices=[*RECIPES], default=TASKS, help=f"default: {' '.join(TASKS)}")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="default: all")
    add("--methods", nargs="+", default=None, help="default: all")
    add("--seconds", type=positive, default=1.0, help="for each model and batch size")
    add("--rounds", type=count, default=10, help="how often dense and pruned take turns")
    asked = parser.parse_args(given)
    transformers.logging.set_verbosity_error()
    found, masks = load(RESULTS), load(MASKED)
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
        known = {mask["share"] for mask in masks if mask["task"] == task}
        wanted = SHARES if asked.methods is None or MASKS in asked.methods else ()
        shares = [share for share in wanted if share not in known]
        if not (missing or shares):
            continue
        data = task_data(task, 0)
        length = typical([*data.test_dataloader()])

        def config(model: str = RECIPES[task].model, classes: int = data.num_classes) -> Any:
            return AutoConfig.from_pretrained(model_path(model), num_labels=classes)

        times = {"seconds": asked.seconds, "rounds": asked.rounds}
        for kept in missing.values():
            shape = {"task": task, "kept": kept, **gauge(config, kept, length, **times)}
            found.append(shape | {"machine": oneshot.machine()})
            write(RESULTS, sorted(found, key=shape_of))
            ratio = shape["dense_latency_ms_b32"] / shape["latency_ms_b32"]
            print(f"{task} {kept}: {ratio:.2f}x at batch 32", flush=True)
        for share in shares:
            mask = {"task": task, "share": share, **gauge_masks(config, share, length, **times)}
            masks.append(mask | {"machine": oneshot.machine()})
            write(MASKED, sorted(masks, key=lambda record: (record["task"], record["share"])))
            ratio = mask["dense_latency_ms_b32"] / mask["zeros_latency_ms_b32"]
            print(f"{task} {share:.0%} masked: {ratio:.2f}x at batch 32", flush=True)


if __name__ == "__main__":
    main()
