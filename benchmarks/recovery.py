"""Every method side by side: one shot, and after the same short training, beside a dense control.

From the same fine-tuned model, each method prunes and is then trained for the same steps: same rows
in the same order, same optimizer, learning rate and seed. Movement pruning prunes during them. The
dense control is trained for them, too. Distillation begins with the same cuts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.baselines import BASELINES, SCORES_RATE, Baseline, layers_left
from benchmarks.methods import DESCRIBED, OURS, VARIANTS, Variant
from benchmarks.records import Figures, Job, single
from benchmarks.subjects import (
    EVERY_UNIT,
    calibrated_for,
    cut,
    graph_of,
    opened,
    quality_of,
    score,
    settle,
    size_of,
)
from benchmarks.tasks import (
    RECIPES,
    SEEDS,
    TASKS,
    Batch,
    Loss,
    Training,
    dense_record,
    finetuned,
    labels_loss,
    train,
    training_of,
)
from lightning_mi_prune.graph.groups import count_parameters

__all__ = ["ENTRIES", "described", "distillation", "one_shot", "recovery"]

Entry = Variant | Baseline
CONTROL = Baseline("dense", "uniform")
ENTRIES: tuple[Entry, ...] = (*VARIANTS, *DESCRIBED, *BASELINES)
COMPARED = tuple(entry for entry in ENTRIES if isinstance(entry, Baseline) or entry.compared)


def recovery(
    tasks: Sequence[str] = TASKS,
    seeds: Sequence[int] = SEEDS,
    sparsities: Sequence[float] = (0.5, 0.75, 0.9),
    methods: Sequence[str] = (),
    steps: Sequence[int] = (0, 100),
    entries: Sequence[Entry] = COMPARED,
) -> Iterator[Job]:
    """Accuracy of every method, one shot (0 steps) and after training, beside a dense control."""
    asked: list[tuple[Entry, float]] = [(CONTROL, 0.0)]
    asked += [(e, s) for s in sparsities for e in entries if not methods or e.method in methods]
    for seed, task in ((seed, task) for seed in seeds for task in tasks):
        for entry, sparsity in asked:
            method, widths, weights = entry.name
            about = {"task": task, "method": method, "widths": widths, "weights": weights}
            for count in steps:
                if count or isinstance(entry, Variant) or entry.gradual is None:
                    setting = about | {"sparsity": sparsity, "steps": count, "seed": seed}
                    yield single(setting, measured, task, seed, entry, sparsity, count)


def one_shot(
    tasks: Sequence[str] = TASKS,
    seeds: Sequence[int] = SEEDS,
    sparsities: Sequence[float] = (0.75, 0.9),
    methods: Sequence[str] = (),
) -> Iterator[Job]:
    """Accuracy of all variants of this package without a training step."""
    return recovery(tasks, seeds, sparsities, methods, (0,), (*VARIANTS, *DESCRIBED))


def described(
    tasks: Sequence[str] = ("trec-6", "movie-snippets"),
    seeds: Sequence[int] = (0, 1, 2),
    sparsities: Sequence[float] = (0.75,),
    steps: Sequence[int] = (0, 100),
) -> Iterator[Job]:
    """Accuracy with widths that a config can describe, beside free widths of as many parameters."""
    entries = (OURS, *DESCRIBED)
    for seed, task in ((seed, task) for seed in seeds for task in tasks):
        # The dense control of the same steps is in each record.
        jobs = recovery((task,), (seed,), sparsities, (), steps, entries)
        yield from (job for job in jobs if job.settings[0]["method"] != CONTROL.method)


@cache
def training_after(task: str, seed: int, steps: int) -> Training:
    """The training of so many steps that continues that of the dense model."""
    recipe, (_, data) = RECIPES[task], opened(task, seed)
    return training_of(data.train_dataloader(), steps, recipe.epochs, recipe.learning_rate, seed)


@cache
def control_of(task: str, seed: int, steps: int) -> tuple[float, float]:
    """Accuracy and cross-entropy of the dense model after as many steps."""
    subject, _ = opened(task, seed)
    model = copy.deepcopy(subject.model)
    train(model, training_after(task, seed, steps))
    return score(model, subject.test)


def measured(task: str, seed: int, entry: Entry, sparsity: float, steps: int) -> Figures:
    """Prune a copy of the dense model, train and test it."""
    subject, _ = opened(task, seed)
    before, pruning = pruned(task, seed, entry, sparsity)
    narrower = isinstance(entry, Variant) and "head_dim" in entry.units
    dims = subject.of(("head_dim",)) if narrower else ()
    training, started = training_after(task, seed, steps), time.process_time()
    model = trained(copy.deepcopy(before), entry, sparsity, training)
    seconds = pruning + time.process_time() - started
    dense_accuracy, dense_cross_entropy = control_of(task, seed, steps)
    return {
        "model": RECIPES[task].model,
        **quality_of(subject, model),
        "dense_accuracy": dense_accuracy,
        "dense_cross_entropy": dense_cross_entropy,
        **size_of(model, subject.chosen, dims),
        "cpu_seconds": seconds,
    }


@lru_cache(maxsize=1)  # one cut serves every number of steps
def pruned(task: str, seed: int, entry: Entry, sparsity: float) -> tuple[nn.Module, float]:
    """The model before its steps, and the seconds of the processor that it took.

    A smaller model with a fine-tuning of its own, which begins with the first layers of the
    pretrained encoder, is charged for that fine-tuning.
    """
    subject, _ = opened(task, seed)
    if isinstance(entry, Baseline) and entry.fine_tuned:
        (stack,) = graph_of(subject.model).stacks
        layers = layers_left(stack.size, sparsity)
        small, _ = finetuned(task, seed, layers)
        return small, dense_record(task, seed, layers)["cpu_seconds"]
    started = time.process_time()
    if isinstance(entry, Variant):
        known = {*entry.units} <= {*EVERY_UNIT}
        chosen = subject.cutting(entry.units) if known else calibrated_for(subject, entry.units)
        # As many parameters, whatever kinds of unit they are of.
        share = count_parameters(subject.chosen) / count_parameters(chosen.chosen)
        model = cut(chosen, entry.options(sparsity * share, seed))[0]
    else:
        model = copy.deepcopy(subject.model)
        if entry.prune is not None:
            model = entry.prune(model, subject.validation, sparsity, subject.seed)
    return model, time.process_time() - started


def trained(model: nn.Module, entry: Entry, sparsity: float, training: Training) -> nn.Module:
    """The model after its steps, with zeros for masks."""
    if isinstance(entry, Variant) or entry.gradual is None:
        train(model, training)
        return settle(model)
    movement = entry.gradual(model, sparsity)
    scores, step = movement.parameters(), movement.before_step
    train(model, training, before_step=step, scores=scores, scores_rate=SCORES_RATE)
    return movement.finish()


# ------------------------------------------------------------------------------------ distillation

TEMPERATURE = 2.0


def teacher_loss(teacher: nn.Module, hidden: float, student: nn.Module, batch: Batch) -> Tensor:
    """Half the loss of the labels, half that of a teacher's predictions, and that of its states.

    Args:
        teacher: The uncut model, in evaluation mode; only run.
        hidden: Weight of the distance of hidden states; 0 leaves them out.
        student: The pruned model.
        batch: With labels.
    """
    mine = student(**batch, output_hidden_states=hidden > 0)
    with torch.no_grad():
        wanted = teacher(**batch, output_hidden_states=hidden > 0)
    loss: Tensor = (mine.loss + divergence(mine.logits, wanted.logits)) / 2
    if hidden:
        mask = batch["attention_mask"].bool()
        pairs = [*zip(mine.hidden_states, wanted.hidden_states, strict=True)][1:]
        loss = loss + hidden * torch.stack([distance(x[mask], y[mask]) for x, y in pairs]).mean()
    return loss


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Divergence from the teacher's predictions, in nats times the square of the temperature.

    Example:
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> float(divergence(same, same))
        0.0
    """
    mine, theirs = ((x / TEMPERATURE).log_softmax(-1) for x in (logits, wanted))
    apart = functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    return TEMPERATURE**2 * apart


def distance(states: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of states as a share of the teacher's squared length.

    Example:
        >>> float(distance(torch.zeros(2, 3), torch.ones(2, 3)))
        1.0
    """
    return functional.mse_loss(states, wanted) / wanted.square().mean()


def losses(teacher: nn.Module) -> dict[str, Loss]:
    """Labels alone, predictions of a teacher (Hinton et al. 2015), its states (Romero et al.)."""
    return {
        "labels": labels_loss,
        "predictions": partial(teacher_loss, teacher, 0.0),
        "predictions and states": partial(teacher_loss, teacher, 1.0),
    }


def distillation(
    tasks: Sequence[str] = ("trec-6",),
    seeds: Sequence[int] = (0, 1, 2),
    sparsities: Sequence[float] = (0.75, 0.9, 0.95),
    steps: Sequence[int] = (100,),
) -> Iterator[Job]:
    """Whether the uncut model is a better teacher of pruned ones than the labels."""
    for task, seed in ((task, seed) for task in tasks for seed in seeds):
        for sparsity, count in ((sparsity, count) for sparsity in sparsities for count in steps):
            for name in losses(nn.Identity()):
                setting = {"task": task, "sparsity": sparsity, "steps": count, "loss": name}
                yield single(setting | {"seed": seed}, taught, task, seed, sparsity, count, name)


def taught(task: str, seed: int, sparsity: float, steps: int, name: str) -> Figures:
    """Train the pruned model with one of the losses and test it."""
    subject, _ = opened(task, seed)
    model = copy.deepcopy(pruned(task, seed, OURS, sparsity)[0])
    train(model, training_after(task, seed, steps), loss=losses(subject.model)[name])
    return quality_of(subject, model)
