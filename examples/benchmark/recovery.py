"""Every method side by side: one shot, and after the same short training, against a dense control.

    python -m examples.benchmark.recovery
    python -m examples.benchmark.recovery --tasks trec-6 --seeds 0 --sparsities 0.75 --steps 100
    python -m examples.benchmark.recovery --list

From the same fine-tuned model, each method prunes and is then trained for the same steps: same rows
in the same order, same optimizer, learning rate and seed. Movement pruning prunes during them. The
dense control is trained for them too. Records are written one by one, so a run that is stopped goes
on where it was, and processes may share the work by tasks or seeds.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import transformers

from examples.benchmark.finetuned import RECIPES, SEEDS, finetuned
from examples.benchmark.oneshot import (
    FOLDER,
    MODEL,
    Subject,
    cut,
    examine,
    identity,
    machine,
    score,
)
from examples.benchmark.options import share
from examples.benchmark.records import Record, gather, key_of, load, part, write
from examples.benchmark.rivals import RIVALS, Rival
from examples.benchmark.rivals.movement import LEARNING_RATE
from examples.benchmark.rivals.size import settle, size_of
from examples.benchmark.texts import inputs_of, typical
from examples.benchmark.training import Training, train, training_of
from examples.benchmark.variants import METHODS, Variant
from lightning_mi_prune import PruningWarning
from lightning_mi_prune.measure import count_macs
from lightning_mi_prune.sample import Example

NAME = "recovery"
RESULTS = Path(__file__).parent / "results" / "recovery.json"
SPARSITIES = (0.5, 0.75, 0.9)
STEPS = (0, 100)

DENSE = Rival("dense", "uniform")
# Ours, and in our pipeline what others rank by: as they are, and with our widths and our refit.
OURS = tuple(
    variant
    for variant in [v for group in METHODS.values() for v in group]
    if (variant.widths, variant.fold_in, variant.cuts)
    in {("global", "refit", 1), ("uniform", "none", 1)}
    and variant.method != "relevance-mi-readers"
)
ENTRIES: tuple[Variant | Rival, ...] = (*OURS, *RIVALS)


def measure(
    subject: Subject, entry: Variant | Rival, sparsity: float, training: Training
) -> Record:
    """Prune a copy of the model one way, train it and test it.

    Args:
        subject: The dense model and its evidence.
        entry: The way.
        sparsity: Share of the prunable parameters that must go.
        training: The steps that follow; none for one shot.
    """
    started, processor = time.perf_counter(), time.process_time()
    if isinstance(entry, Variant):
        model = cut(subject, entry, sparsity)[0]
    elif entry.prune is not None:
        model = entry.prune(
            copy.deepcopy(subject.model), subject.validation, sparsity, subject.seed
        )
    else:
        model = copy.deepcopy(subject.model)
    pruned = time.perf_counter()
    if isinstance(entry, Rival) and entry.gradual is not None:
        movement = entry.gradual(model, sparsity)
        train(
            model,
            training,
            before_step=movement.before_step,
            scores=movement.parameters(),
            scores_rate=LEARNING_RATE,
        )
        model = movement.finish()
    else:
        train(model, training)
    model = settle(model)
    trained, processor = time.perf_counter(), time.process_time() - processor
    accuracy, cross_entropy = score(model, subject.test)
    size = size_of(model, subject.chosen)
    length = typical(subject.test)
    return {
        **identity(subject.task, subject.seed, entry, sparsity),
        "steps": training.steps,
        "finetune_epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "model": MODEL,
        "sparsity": size.sparsity,
        "masked": size.masked,
        "n_test": sum(len(batch["labels"]) for batch in subject.test),
        "accuracy": accuracy,
        "cross_entropy": cross_entropy,
        "parameters": size.parameters,
        "prunable_parameters": size.prunable,
        "kept": size.kept,
        "macs": count_macs(model, Example((), inputs_of(1, length))),
        "length": length,
        "seconds": trained - started,
        "train_seconds": trained - pruned,
        "cpu_seconds": processor,
        "evidence_seconds": subject.seconds if isinstance(entry, Variant) else 0.0,
        "machine": machine(),
    }


def wanted(
    task: str,
    seed: int,
    entries: Sequence[Variant | Rival],
    sparsities: Sequence[float],
    steps: Sequence[int],
) -> list[tuple[Variant | Rival, float, int]]:
    """What is asked of one model: for each number of steps the dense control, then the rest.

    Methods that prune during training have no one-shot form.
    """
    asked: list[tuple[Variant | Rival, float, int]] = []
    for count in dict.fromkeys(steps):
        asked.append((DENSE, 0.0, count))
        asked += [
            (entry, sparsity, count)
            for sparsity in dict.fromkeys(sparsities)
            for entry in entries
            if count or not (isinstance(entry, Rival) and entry.gradual)
        ]
    return asked


def with_control(record: Record, records: Sequence[Record]) -> Record:
    """The record with what the dense control of its model and budget reached."""
    if record["method"] == DENSE.method:
        control = record
    else:
        control = next(
            r for r in records if r["method"] == DENSE.method and r["steps"] == record["steps"]
        )
    return record | {
        "dense_accuracy": control["accuracy"],
        "dense_cross_entropy": control["cross_entropy"],
        "dense_parameters": control["parameters"],
        "dense_prunable_parameters": control["prunable_parameters"],
        "dense_macs": control["macs"],
    }


def run(
    task: str,
    seed: int,
    entries: Sequence[Variant | Rival],
    sparsities: Sequence[float],
    steps: Sequence[int],
) -> None:
    """Measure what the part of one model lacks; nothing is loaded where it lacks nothing."""
    path = part(FOLDER, NAME, task, seed)
    records = load(path)
    there = {key_of(record) for record in records}
    missing = [
        (entry, sparsity, count)
        for entry, sparsity, count in wanted(task, seed, entries, sparsities, steps)
        if key_of(identity(task, seed, entry, sparsity) | {"steps": count}) not in there
    ]
    if not missing:
        return
    model, data = finetuned(task, seed)
    subject = examine(task, seed, model, [*data.val_dataloader()], [*data.test_dataloader()])
    print(f"{task}, seed {seed}: dense {subject.accuracy:.2%}, evidence {subject.seconds:.0f} s")
    recipe = RECIPES[task]
    trainings = {
        count: training_of(
            data.train_dataloader(),
            count,
            first_epoch=recipe.epochs,
            learning_rate=recipe.learning_rate,
            seed=seed,
        )
        for count in dict.fromkeys(count for *_, count in missing)
    }
    for entry, sparsity, count in missing:
        record = with_control(measure(subject, entry, sparsity, trainings[count]), records)
        records.append(record)
        write(path, records)
        print(
            f"  {count} steps, {sparsity:.0%} {entry.method}, {entry.widths}, {entry.fold_in}: "
            f"{record['accuracy']:.2%} with {record['sparsity']:.1%} gone, "
            f"{record['seconds']:.0f} s",
            flush=True,
        )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("examples.benchmark.recovery", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    methods = [*dict.fromkeys(entry.method for entry in ENTRIES)]
    add = parser.add_argument
    add("--tasks", nargs="+", choices=[*RECIPES], default=[*RECIPES], help="default: all")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="default: all")
    add("--sparsities", nargs="+", type=share, default=SPARSITIES, help="default: 0.5 0.75 0.9")
    add("--steps", nargs="+", type=int, default=STEPS, help="default: 0 (one shot) and 100")
    add("--methods", nargs="+", choices=methods, default=methods, help="default: all")
    add("--widths", nargs="+", choices=("global", "uniform"), default=("global", "uniform"))
    add("--gather", action="store_true", help="only merge the records that are there")
    add("--list", action="store_true", help="only print what is missing")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing, then merge all there is into the one list."""
    asked = arguments(given)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Thin evidence and copies that top-k keeps are part of the comparison.
    warnings.filterwarnings("ignore", category=PruningWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    entries = [e for e in ENTRIES if e.method in asked.methods and e.widths in asked.widths]
    for seed in asked.seeds:
        for task in asked.tasks:
            if asked.list:
                there = {key_of(record) for record in load(part(FOLDER, NAME, task, seed))}
                everything = wanted(task, seed, entries, asked.sparsities, asked.steps)
                keys = {
                    key_of(identity(task, seed, entry, sparsity) | {"steps": count})
                    for entry, sparsity, count in everything
                }
                print(f"{task}, seed {seed}: {len(keys - there)} of {len(keys)} records missing")
            elif not asked.gather:
                run(task, seed, entries, asked.sparsities, asked.steps)
    if not asked.list:
        gather(FOLDER, NAME, RESULTS)


if __name__ == "__main__":
    main()
