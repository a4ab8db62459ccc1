"""One-shot pruning of the fine-tuned classifiers: every method on the same evidence, no training.

    python -m examples.benchmark.oneshot
    python -m examples.benchmark.oneshot --tasks trec-6 --seeds 0 --methods relevance-mi taylor
    python -m examples.benchmark.oneshot --table

What each model says on its validation split is gathered once; all methods then rank on it, and the
test split tells what they kept. Records are written one by one, so a run that is stopped goes on
where it was, and processes may share the work by tasks or seeds. Records that are there are not
measured again: delete `runs/benchmark/oneshot-*.json` to start anew.
"""

import copy
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.measuring import cpu_name
from examples.benchmark.finetuned import RECIPES, finetuned
from examples.benchmark.hearing import CALLS, POSITIONS, Batch, listen
from examples.benchmark.options import arguments, asked_variants, quiet
from examples.benchmark.records import Record, gather, key_of, load, part, write
from examples.benchmark.tables import print_tables
from examples.benchmark.variants import EVERY, Named, Variant, Way
from lightning_mi_prune import Plan, WidthAxis, apply, find_axes
from lightning_mi_prune.axes import count_parameters, full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.method import pull_back
from lightning_mi_prune.sample import Heard

NAME = "oneshot"
FOLDER = Path("runs", "benchmark")
RESULTS = Path(__file__).parent / "results" / "oneshot.json"


@dataclass(frozen=True)
class Subject:
    """A dense model with all that is known of it, the same for every method.

    Args:
        task: Name of the task.
        seed: Seed of the split and the model.
        model: The network, in evaluation mode; only run and copied.
        axes: All its axes.
        chosen: Those that are cut by all methods: neurons and heads.
        heard: What it said on the validation split, the dimensions of heads included.
        seconds: Time to hear it.
        validation: Batches of the validation split.
        test: Batches of the test split.
        accuracy: Accuracy on them.
        cross_entropy: Mean cross-entropy on them, in nats.
    """

    task: str
    seed: int
    model: nn.Module
    axes: Sequence[WidthAxis]
    chosen: Sequence[WidthAxis]
    heard: Heard
    seconds: float
    validation: Sequence[Batch]
    test: Sequence[Batch]
    accuracy: float
    cross_entropy: float

    def of(self, units: Sequence[str]) -> list[WidthAxis]:
        """The axes of some kinds of unit."""
        return choose_axes(self.axes, units=units)

    def cutting(self, units: Sequence[str]) -> "Subject":
        """The same, of which these kinds of unit are cut."""
        return replace(self, chosen=self.of(units))


def examine(
    task: str,
    seed: int,
    model: nn.Module,
    validation: Sequence[Batch],
    test: Sequence[Batch],
    *,
    positions: int = POSITIONS,
    calls: int = CALLS,
) -> Subject:
    """Gather the evidence from the validation split, and test the dense model.

    Args:
        task: Name of the task.
        seed: Seed of the split and the model.
        model: The dense model, in evaluation mode.
        validation: Batches with labels, for the evidence.
        test: Batches with labels, for the accuracy only.
        positions: Samples to listen to on each axis.
        calls: Positions of inputs to store for the refit.
    """
    axes = find_axes(model)
    chosen = choose_axes(axes)
    started = time.perf_counter()
    every = choose_axes(axes, units=EVERY)
    heard = listen(model, every, validation, positions, calls, seed)
    seconds = time.perf_counter() - started
    accuracy, cross_entropy = score(model, test)
    known = (model, axes, chosen, heard, seconds, validation, test)
    return Subject(task, seed, *known, accuracy, cross_entropy)


@torch.no_grad()
def score(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Accuracy, and mean cross-entropy in nats."""
    right, nats, rows = 0, 0.0, 0
    for batch in batches:
        logits, labels = model(**batch).logits.float(), batch["labels"]
        right += int((logits.argmax(-1) == labels).sum())
        nats += float(functional.cross_entropy(logits, labels, reduction="sum"))
        rows += len(labels)
    return right / rows, nats / rows


def cut(
    subject: Subject, variant: Way, sparsity: float, positions: int = CALLS
) -> tuple[nn.Module, Plan]:
    """Prune a copy of the model one way.

    Args:
        subject: The dense model and its evidence.
        variant: The way.
        sparsity: Share of the prunable parameters that must go.
        positions: Stored positions that the refit may use.

    Returns:
        The smaller model, and what it kept.
    """
    method = variant.at(sparsity, subject.seed, positions)
    model, plan = copy.deepcopy(subject.model), full_plan(subject.axes)
    axes, heard, chosen = subject.axes, subject.heard, subject.chosen
    for turn in range(1, variant.cuts + 1):
        if turn > 1:
            calls = [POSITIONS, positions, subject.seed]
            heard = listen(model, chosen, subject.validation, *calls)
        progress = turn / variant.cuts
        selection = method.decide(model, axes, chosen, plan, heard, progress=progress)
        if selection is None:  # an earlier cut went as far already
            continue
        selection = pull_back(model, axes, plan, selection, method, heard)
        apply(model, axes, selection.plan, current=plan, folded=selection.folded)
        plan = plan.then(selection.plan)
    return model, plan


def measure(subject: Subject, variant: Variant, sparsity: float, positions: int = CALLS) -> Record:
    """Prune a copy of the model one way and test it.

    Args:
        subject: The dense model and its evidence.
        variant: The way.
        sparsity: Share of the prunable parameters that must go.
        positions: Stored positions that the refit may use.
    """
    subject, started = subject.cutting(variant.units), time.perf_counter()
    model, plan = cut(subject, variant, sparsity, positions)
    seconds = time.perf_counter() - started
    return {
        **identity(subject.task, subject.seed, variant, sparsity),
        **tested(subject, model, plan),
        "seconds": seconds,
        "machine": machine(),
    }


def tested(subject: Subject, model: nn.Module, plan: Plan) -> Record:
    """What a pruned model keeps, in size and on the test split."""
    accuracy, cross_entropy = score(model, subject.test)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (subject.model, model))
    prunable = count_parameters(subject.chosen)
    return {
        "model": RECIPES[subject.task].model,
        "sparsity": (before - after) / prunable,
        "n_test": sum(len(batch["labels"]) for batch in subject.test),
        "accuracy": accuracy,
        "dense_accuracy": subject.accuracy,
        "cross_entropy": cross_entropy,
        "dense_cross_entropy": subject.cross_entropy,
        "parameters": after,
        "dense_parameters": before,
        "prunable_parameters": prunable - (before - after),
        "dense_prunable_parameters": prunable,
        "kept": kept(subject.chosen, plan),
    }


def identity(task: str, seed: int, variant: Named, sparsity: float) -> Record:
    """The fields that tell a record from all others."""
    return {
        "task": task,
        "seed": seed,
        "method": variant.method,
        "widths": variant.widths,
        "fold_in": variant.fold_in,
        "cuts": variant.cuts,
        "target_sparsity": sparsity,
    }


def kept(axes: Sequence[WidthAxis], plan: Plan) -> dict[str, list[int]]:
    """Widths that stay from the bottom to the top, by kind of axis."""
    found: dict[str, list[int]] = {}
    for axis in sorted(axes, key=lambda axis: axis.level):
        found.setdefault(axis.kind, []).append(plan.width(axis.name))
    return found


def machine() -> dict[str, Any]:
    """What seconds depend on."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def run(task: str, seed: int, variants: Sequence[Variant], sparsities: Sequence[float]) -> None:
    """Measure what the part of one model lacks; nothing is loaded where it lacks nothing."""
    path = part(FOLDER, NAME, task, seed)
    records = load(path)
    there = {key_of(record) for record in records}
    missing = [
        (variant, sparsity)
        for sparsity in dict.fromkeys(sparsities)
        for variant in variants
        if key_of(identity(task, seed, variant, sparsity)) not in there
    ]
    if not missing:
        return
    model, data = finetuned(task, seed)
    subject = examine(task, seed, model, [*data.val_dataloader()], [*data.test_dataloader()])
    print(f"{task}, seed {seed}: dense {subject.accuracy:.2%}, evidence {subject.seconds:.0f} s")
    for variant, sparsity in missing:
        record = measure(subject, variant, sparsity)
        records.append(record)
        write(path, records)
        print(
            f"  {sparsity:.0%} {variant.method}, {variant.widths}, {variant.fold_in}: "
            f"{record['accuracy']:.2%}, {record['seconds']:.1f} s",
            flush=True,
        )


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing, then merge all there is into the one list."""
    asked = arguments(given, __doc__)
    quiet()
    if not (asked.gather or asked.table):
        for seed in asked.seeds:
            for task in asked.tasks:
                run(task, seed, asked_variants(asked), asked.sparsities)
    records = gather(FOLDER, NAME, RESULTS)
    if asked.table:
        print_tables(records)


if __name__ == "__main__":
    main()
