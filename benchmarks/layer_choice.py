"""Which layers a criterion removes from a model, and what is left of it.

A model of `benchmarks.language` is tested by its perplexity, a fine-tuned classifier by its
accuracy. All criteria share one calibration of a model and seed. Cuts are tested in one shot and
after some training, which is the same for all criteria and a dense control.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from benchmarks.language import as_batches, brown, loaded, pieces_of, score_tokens
from benchmarks.records import FOLDER, Figures, Job, Store, single
from benchmarks.subjects import graph_of, score
from benchmarks.tasks import (
    QUICK,
    RECIPES,
    Batch,
    Training,
    finetuned,
    labels_loss,
    task_data,
    train,
    training_of,
)
from lightning_mi_prune.calibration.bypass import losses_without
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.data import CalibrationData, LayerComparison
from lightning_mi_prune.calibration.layers import StackRecorder
from lightning_mi_prune.core.running import evaluating
from lightning_mi_prune.graph.containers import layer_paths
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import LayerStack
from lightning_mi_prune.importance.layer_criteria import LayerCriterion, LayerSelector
from lightning_mi_prune.importance.layer_losses import cheapest_removal
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reconstruction.removed_layers import compensate_removed_layers
from lightning_mi_prune.surgery.transaction import cut_model

__all__ = ["CONTROL", "CRITERIA", "DEPTHS", "layer_choice"]

BROWN = "brown"
# All layers of each model, and those that are left: 10 and 20 % fewer, or about 10 to 25 %.
DEPTHS = {
    "smollm2-135m": (30, 27, 24),
    "mpnet-base": (12, 11, 10, 9),
    "minilm-l6": (6, 5, 4),
    QUICK: (6, 5),
}
# As many as a core does in some minutes, with rows of each, and the highest learning rate for text.
STEPS = {"smollm2-135m": 40, "mpnet-base": 50, "minilm-l6": 100, QUICK: 2}
ROWS = {"smollm2-135m": 2, "mpnet-base": 16, "minilm-l6": 32, QUICK: 32}
RATE = 3e-5
CONTROL = "none"
CRITERIA: tuple[LayerCriterion, ...] = (
    "measured_loss",
    "cka",
    "angle",
    "angular_run",
    "last",
    "random",
)
CALIBRATION, TEST = 64, 48  # pieces of text
LOSS_BATCHES = {"smollm2-135m": 2}  # batches whose loss is measured without layers
OTHERS = 4  # as the callback does
CHOICE = ("losses_measured", "loss_tokens", "seconds", "loss", "loss_after")  # of measured_loss

Compensation = Literal["none", "layerwise"]


@dataclass
class Examined:
    """A model whose layers were compared.

    Args:
        model: The network, in evaluation mode.
        stack: Its layers.
        comparison: How similar they are.
        stored: Inputs for the compensation, by path of the network.
        positions: Positions that were asked for.
        measured: Batches whose loss is measured without layers.
        test: Batches of the test.
        dense: The score, and the cross-entropy, of the whole model on them.
        losses: Loss without layers, and the seconds it took, of all that were measured so far.
    """

    model: nn.Module
    stack: LayerStack
    comparison: LayerComparison
    stored: dict[str, list[RecordedCall]]
    positions: int
    measured: Sequence[Batch]
    test: Sequence[Batch]
    dense: tuple[float, float]
    losses: dict[frozenset[int], tuple[float, float]] = field(default_factory=dict)

    @property
    def graph(self) -> PruningGraph:
        """The stack alone."""
        return PruningGraph(stacks=(self.stack,))

    def losses_of(self, removals: Sequence[frozenset[int]]) -> list[float]:
        """Mean loss without each of some sets of layers; measured once."""
        paths = layer_paths(self.model, self.stack.name)
        for removed in removals:
            if removed not in self.losses:
                started = time.perf_counter()
                layers = [self.model.get_submodule(paths[layer]) for layer in removed]
                with evaluating(self.model):
                    steps = [lambda b=b: labels_loss(self.model, b).item() for b in self.measured]
                    mean = float(losses_without([layers], steps)) / len(steps)
                self.losses[removed] = mean, time.perf_counter() - started
        return [self.losses[removed][0] for removed in removals]


def layer_choice(
    models: Sequence[str] = (*DEPTHS,),
    seeds: Sequence[int] = (0,),
    layers: Sequence[int] = (),
    criteria: Sequence[LayerCriterion] = CRITERIA,
    compensations: Sequence[Compensation] = ("none", "layerwise"),
    steps: Sequence[int] = (),
    folder: Path = FOLDER,
) -> Iterator[Job]:
    """Perplexity or accuracy without the layers that each criterion removes.

    In one shot, and after as many steps as are asked for, always compensated then.
    """
    for model, seed in ((model, seed) for model in models for seed in seeds):
        whole, *fewer = DEPTHS[model]
        counts = steps or (0, STEPS[model])
        for count in filter(None, counts):
            setting = about(model, seed, whole, CONTROL, "none", count)
            yield single(setting, control, model, seed, count)
        for compensation, number, criterion, count in product(
            compensations, layers or fewer, criteria, counts
        ):
            if compensation == "layerwise" or not count:
                given = model, seed, number, criterion, compensation, count
                yield single(about(*given), measured, *given, folder)


def about(
    model: str, seed: int, layers: int, criterion: str, compensation: Compensation, steps: int
) -> dict[str, Any]:
    """The setting of a record."""
    known = {"task": task_of(model), "model": model, "layers": layers, "criterion": criterion}
    return known | {"compensation": compensation, "steps": steps, "seed": seed}


def task_of(model: str) -> str:
    """What a model is tested on."""
    return {"mpnet-base": "trec-6-mpnet", "minilm-l6": "trec-6", QUICK: QUICK}.get(model, BROWN)


@lru_cache(maxsize=1)  # jobs of one model follow one another
def examined(name: str, seed: int) -> Examined:
    """A model with its layers compared, on the validation split or other files."""
    network: Any
    if task_of(name) in RECIPES:
        network, data = finetuned(task_of(name), seed)
        calibration, test = [*data.val_dataloader()], [*data.test_dataloader()]
        training = [*islice(data.train_dataloader(), OTHERS)]
        dense = score(network, test)
    else:
        network, tokenizer = loaded(name)
        rows = pieces_of(brown("calibration"), tokenizer, CALIBRATION, seed=seed)
        calibration = as_batches(rows)
        test = as_batches(pieces_of(brown("test"), tokenizer, TEST))
        training = calibration[: LOSS_BATCHES[name]]
        dense = score_tokens(network, test)
    (stack,) = graph_of(network).stacks
    positions = sum(batch["input_ids"].numel() for batch in calibration)
    sizes = {"calls": positions, "batches": len(calibration), "positions": 256}
    recorder = StackRecorder(network, [stack], seed=seed, **sizes)
    with torch.no_grad(), recorder:
        for batch in calibration:
            recorder.start_batch()
            network(**{key: value for key, value in batch.items() if key != "labels"})
    comparison = recorder.compared(PruningGraph(stacks=(stack,)).full)[stack.name]
    stored = recorder.stored, positions
    return Examined(network, stack, comparison, *stored, training, test, dense)


def chosen(
    name: str, seed: int, layers: int, criterion: LayerCriterion, folder: Path
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The layers that a criterion removes, and what is known of the choice.

    What was chosen for a record with another compensation is not chosen again.
    """
    wanted = {"model": name, "seed": seed, "layers": layers, "criterion": criterion}
    for record in Store("layer-choice", folder).find(**wanted):
        known = {key: record[key] for key in CHOICE if key in record.figures}
        return tuple(record["removed"]), known
    subject = examined(name, seed)
    compared = subject.comparison
    if criterion != "measured_loss":
        selector = LayerSelector(None, target=layers, criterion=criterion, seed=seed)
        return selector.choose(subject.stack.name, compared).removed, {}
    asked: list[frozenset[int]] = []

    def losses(removals: Sequence[frozenset[int]]) -> list[float]:
        asked.extend(removals)
        return subject.losses_of(removals)

    count = len(compared.layers) - layers
    found = cheapest_removal(losses, compared.layers, count, compared.fixed)
    seconds = sum(subject.losses[removed][1] for removed in asked)
    tokens = sum(int(batch["input_ids"].numel()) for batch in subject.measured)
    figures = found.measured, tokens, seconds, found.whole, found.after
    return found.removed, dict(zip(CHOICE, figures, strict=True))


@lru_cache(maxsize=1)  # jobs of one cut follow one another
def shortened(
    name: str, seed: int, removed: tuple[int, ...], compensation: Compensation
) -> tuple[nn.Module, float]:
    """A copy of a model without some layers, and the seconds of its compensation."""
    subject = examined(name, seed)
    graph, full = subject.graph, subject.graph.full
    kept = tuple(n for n in full.kept[subject.stack.name] if n not in removed)
    plan = graph.keep_layers(full, {subject.stack.name: kept})
    decision, started = Decision(plan, {}, {}), time.perf_counter()
    if compensation == "layerwise":
        decision = compensate_removed_layers(
            *(subject.model, graph, full, decision),
            CalibrationData(ranks=[subject.stored]),
            positions=subject.positions,
        )
    seconds = time.perf_counter() - started
    model = copy.deepcopy(subject.model)
    cut_model(model, graph, plan, current=full, compensated=decision.compensated)
    return model.eval(), seconds


@lru_cache(maxsize=64)  # criteria that choose the same layers
def quality(
    name: str, seed: int, removed: tuple[int, ...], compensation: Compensation, steps: int
) -> tuple[float, float, float]:
    """Score and cross-entropy of a model without layers, and the seconds of its compensation."""
    model, seconds = shortened(name, seed, removed, compensation)
    return *after_steps(name, seed, model, steps), seconds


def after_steps(name: str, seed: int, model: nn.Module, steps: int) -> tuple[float, float]:
    """Score and cross-entropy of a copy of a model that was trained."""
    if steps:
        model = copy.deepcopy(model)
        train(model, training(name, seed, steps))
    scored = score if task_of(name) in RECIPES else score_tokens
    return scored(model, examined(name, seed).test)


def training(name: str, seed: int, steps: int) -> Training:
    """What a model and its cuts are trained on: text of other files, or more of the fine-tuning."""
    task, rows = task_of(name), ROWS[name]
    if task in RECIPES:
        recipe, loader = RECIPES[task], task_data(task, seed).train_dataloader()
        more = training_of(loader, steps, recipe.epochs, recipe.learning_rate, seed)
        batches = [{key: value[:rows] for key, value in batch.items()} for batch in more.batches]
        return more._replace(batches=batches)
    pieces = pieces_of(brown("training"), loaded(name)[1], rows * steps, seed=seed)
    return Training(as_batches(pieces, rows), RATE, seed)


def control(name: str, seed: int, steps: int) -> Figures:
    """Test the whole model after as many steps."""
    subject, started = examined(name, seed), time.process_time()
    found = after_steps(name, seed, subject.model, steps)
    figures = {"removed": [], "cpu_seconds": time.process_time() - started}
    return figures | tested(name, subject, found)


def measured(
    name: str,
    seed: int,
    layers: int,
    criterion: LayerCriterion,
    compensation: Compensation,
    steps: int,
    folder: Path,
) -> Figures:
    """Test one model without the layers of one criterion."""
    subject = examined(name, seed)
    removed, known = chosen(name, seed, layers, criterion, folder)
    right, nats, seconds = quality(name, seed, removed, compensation, steps)
    found: dict[str, Any] = {"removed": [*removed], **known, "compensation_seconds": seconds}
    return found | tested(name, subject, (right, nats))


def tested(name: str, subject: Examined, found: tuple[float, float]) -> dict[str, Any]:
    """The figures of a model beside those of the dense one before any step."""
    (right, nats), (dense_right, dense_nats) = found, subject.dense
    if task_of(name) == BROWN:
        return {"perplexity": math.exp(nats), "dense_perplexity": math.exp(dense_nats)}
    figures: dict[str, Any] = {"n_test": sum(len(batch["labels"]) for batch in subject.test)}
    figures |= {"accuracy": right, "dense_accuracy": dense_right}
    return figures | {"cross_entropy": nats, "dense_cross_entropy": dense_nats}
