"""Whole layers removed: while a model is fine-tuned, in one shot, and what that does to speed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch

from benchmarks.latency import timed
from benchmarks.records import Figures, Job, single
from benchmarks.subjects import graph_of, opened, quality_of
from benchmarks.tasks import RECIPES, keep_first_layers, task_data, trainer_for
from examples.text_classification.model import TextClassifier
from lightning_mi_prune import CKALayerPruning, options
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.layers import StackRecorder
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import LayerStack
from lightning_mi_prune.importance.layer_criteria import LayerSelector
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reconstruction.removed_layers import compensate_removed_layers
from lightning_mi_prune.surgery.transaction import cut_model

__all__ = ["layers", "layers_one_shot", "layers_speed"]

POSITIONS = 16_384  # of the inputs that the callback stores, by default
# With and without layers removed: more epochs than the dense models of the other benchmarks had.
EPOCHS = {"trec-6": 6, "movie-snippets": 4}
LENGTH = 64


class LayerVariant(NamedTuple):
    """One way to remove layers.

    Args:
        layers: Layers left.
        criterion: What decides which are removed.
        reconstruction: Whether the layers that stay are reconstructed.
        first_epoch: The epoch that starts with the cut; None is half-way.
    """

    layers: int
    criterion: str
    reconstruction: bool = True
    first_epoch: int | None = None


# The dense control first, the most informative variants next.
VARIANTS = (
    LayerVariant(6, "none", reconstruction=False),
    *(LayerVariant(number, "cka") for number in (4, 3)),
    *(LayerVariant(number, "cka", reconstruction=False) for number in (4, 3)),
    *(LayerVariant(4, criterion) for criterion in ("last", "random", "angular_run", "angle")),
    LayerVariant(3, "last"),
    *(
        LayerVariant(number, criterion, reconstruction=False, first_epoch=1)
        for number, criterions in ((4, "cka last random angular_run angle"), (3, "cka angle"))
        for criterion in criterions.split()
    ),
    LayerVariant(4, "cka", first_epoch=1),
)


def layers(
    tasks: Sequence[str] = (*EPOCHS,),
    seeds: Sequence[int] = (0, 1, 2),
    variants: int = len(VARIANTS),
) -> Iterator[Job]:
    """Accuracy with and without layers removed while a model is fine-tuned, from one start."""
    for variant in VARIANTS[:variants]:
        for task, seed in ((task, seed) for task in tasks for seed in seeds):
            setting = {"task": task, "seed": seed, **variant._asdict()}
            yield single(setting, trained, task, seed, variant)


def trained(task: str, seed: int, variant: LayerVariant) -> Figures:
    """Train and test one variant."""
    recipe, data = RECIPES[task], task_data(task, seed)
    pl.seed_everything(seed, workers=True, verbose=False)
    module = TextClassifier(num_classes=data.num_classes, learning_rate=recipe.learning_rate)
    module.network.float()
    callbacks: list[CKALayerPruning] = []
    if variant.criterion != "none":
        given: dict[str, Any] = {"target_layers": variant.layers, "criterion": variant.criterion}
        method: Any = "layerwise" if variant.reconstruction else "none"
        given["reconstruction"] = options.Reconstruction(method)
        given["schedule"] = options.Schedule(cuts=1, first_epoch=variant.first_epoch)
        callbacks = [CKALayerPruning(None, seed=seed, verbose=False, **given)]
    trainer = trainer_for(EPOCHS.get(task, 2), callbacks)
    trainer.fit(module, data)
    cuts = [cut for callback in callbacks for cut in callback.report.cuts]
    return {
        "n_test": len(data.splits["test"]),
        "accuracy": float(trainer.test(module, data, verbose=False)[0]["test_accuracy"]),
        "removed": [[*cut.stacks[0].removed] for cut in cuts],
    }


def layers_one_shot(
    tasks: Sequence[str] = ("trec-6",),
    seeds: Sequence[int] = (0, 1, 2),
    layers: Sequence[int] = (5, 4, 3),
) -> Iterator[Job]:
    """Accuracy with layers removed in one shot, with and without a reconstruction."""
    for task, seed in ((task, seed) for task in tasks for seed in seeds):
        for number, reconstruction in ((n, r) for n in layers for r in (False, True)):
            setting = {"task": task, "layers": number, "reconstruction": reconstruction}
            yield single(setting | {"seed": seed}, shortened, task, seed, number, reconstruction)


@lru_cache(maxsize=1)
def compared(task: str, seed: int) -> tuple[StackRecorder, LayerStack]:
    """The layers of a fine-tuned model, compared on the validation split."""
    subject, _ = opened(task, seed, calibrated=False)
    (stack,) = graph_of(subject.model).stacks
    sizes = {"calls": POSITIONS, "batches": len(subject.validation), "positions": 256}
    recorder = StackRecorder(subject.model, [stack], seed=seed, **sizes)
    with torch.no_grad(), recorder:
        for batch in subject.validation:
            recorder.start_batch()
            subject.model(**batch)
    return recorder, stack


def shortened(task: str, seed: int, layers: int, reconstruction: bool) -> Figures:
    """Test a fine-tuned model with so many layers."""
    subject, _ = opened(task, seed, calibrated=False)
    recorder, stack = compared(task, seed)
    graph = PruningGraph(stacks=(stack,))
    similarity = recorder.compared(graph.full)[stack.name]
    cut = LayerSelector(None, target=layers).choose(stack.name, similarity)
    plan = graph.keep_layers(graph.full, {stack.name: cut.after})
    decision = Decision(plan, {}, {})
    if reconstruction:
        known = subject.model, graph, graph.full, decision
        data = CalibrationData(ranks=[recorder.stored])
        decision = compensate_removed_layers(*known, data, positions=POSITIONS)
    model = copy.deepcopy(subject.model)
    cut_model(model, graph, plan, current=graph.full, compensated=decision.compensated)
    return {"removed": [*cut.removed], **quality_of(subject, model.eval())}


def layers_speed(seconds: float = 10.0, rounds: int = 20) -> Iterator[Job]:
    """Milliseconds of the encoder by number of layers."""
    yield single({"length": LENGTH}, _latency, seconds, rounds)


def _latency(seconds: float, rounds: int) -> Figures:
    encoder = TextClassifier().network.base_model.float().eval()
    networks = {}
    for number in (6, 4, 3):
        network = networks[f"{number}_"] = copy.deepcopy(encoder)
        keep_first_layers(network, number)
    return timed(networks, LENGTH, seconds=seconds, rounds=rounds)
