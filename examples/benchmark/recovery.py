"""Every method side by side: one shot, and after the same short training, against a dense control.

    python -m examples.benchmark.recovery
    python -m examples.benchmark.recovery --tasks trec-6 --seeds 0 --sparsities 0.75 --steps 100
    python -m examples.benchmark.recovery --list

From the same fine-tuned model, each method prunes and is then trained for the same steps: same rows
in the same order, same optimizer, learning rate and seed. Movement pruning prunes during them. A
small dense model comes with a fine-tuning of its own. The dense control is trained for them too.
Records are written one by one, so a run that is stopped goes on where it was, and processes may
share the work by tasks or seeds.
"""

import argparse
import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torch import nn

from examples.benchmark.finetuned import RECIPES, SEEDS, TASKS, finetuned
from examples.benchmark.oneshot import (
    FOLDER,
    Subject,
    cut,
    examine,
    identity,
    machine,
    score,
)
from examples.benchmark.options import positive, quiet, share, whole
from examples.benchmark.records import Record, gather, key_of, known, part, write
from examples.benchmark.rivals import RIVALS, Rival
from examples.benchmark.rivals.movement import LEARNING_RATE
from examples.benchmark.rivals.size import settle, size_of
from examples.benchmark.rivals.small import Begun
from examples.benchmark.texts import inputs_of, typical
from examples.benchmark.training import Training, train, training_of
from examples.benchmark.variants import METHODS, Variant
from lightning_mi_prune.measure import count_macs
from lightning_mi_prune.sample import Example

NAME = "recovery"
RESULTS = Path(__file__).parent / "results" / "recovery.json"
SPARSITIES = (0.5, 0.75, 0.9)
STEPS = (0, 100)
RATE = 1.0  # share of the learning rate that the dense model was trained with

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


def pruned(subject: Subject, entry: Variant | Rival, sparsity: float) -> nn.Module:
    """A copy of the model, pruned one way; whole where that happens during the training.

    Args:
        subject: The dense model and its evidence.
        entry: The way.
        sparsity: Share of the prunable parameters that must go.
    """
    if isinstance(entry, Variant):
        return cut(subject.cutting(entry.units), entry, sparsity)[0]
    model = copy.deepcopy(subject.model)
    if entry.prune is None:
        return model
    return entry.prune(model, subject.validation, sparsity, subject.seed)


def begun(subject: Subject, entry: Variant | Rival, sparsity: float) -> Begun:
    """The model before its steps; a rival with a model of its own says what that took.

    Args:
        subject: The dense model and its evidence.
        entry: The way.
        sparsity: Share of the prunable parameters that must go.
    """
    if isinstance(entry, Rival) and entry.own is not None:
        return entry.own(subject.model, subject.task, subject.seed, sparsity)
    started, processor = time.perf_counter(), time.process_time()
    model = pruned(subject, entry, sparsity)
    return Begun(model, time.perf_counter() - started, time.process_time() - processor)


def trained(
    model: nn.Module, entry: Variant | Rival, sparsity: float, training: Training
) -> nn.Module:
    """The model after its steps, with zeros for masks.

    Args:
        model: The pruned model, which is changed.
        entry: How it was pruned, or will be.
        sparsity: Share of the prunable parameters that must go.
        training: The steps; none for one shot.
    """
    if isinstance(entry, Variant) or entry.gradual is None:
        train(model, training)
        return settle(model)
    movement = entry.gradual(model, sparsity)
    scores = movement.parameters()
    told = movement.before_step
    train(model, training, before_step=told, scores=scores, scores_rate=LEARNING_RATE)
    return movement.finish()


def measure(
    subject: Subject, entry: Variant | Rival, sparsity: float, trainings: Iterable[Training]
) -> Iterator[Record]:
    """Prune once; train and test a copy for each number of steps.

    Args:
        subject: The dense model and its evidence.
        entry: The way to prune.
        sparsity: Share of the prunable parameters that must go.
        trainings: The steps that follow; none for one shot.
    """
    before, prune_seconds, prune_processor = begun(subject, entry, sparsity)
    length = typical(subject.test)
    units = entry.units if isinstance(entry, Variant) else ()
    for training in trainings:
        started, processor = time.perf_counter(), time.process_time()
        model = trained(copy.deepcopy(before), entry, sparsity, training)
        train_seconds = time.perf_counter() - started
        processor = time.process_time() - processor
        accuracy, cross_entropy = score(model, subject.test)
        dims = subject.of(("dims",)) if "dims" in units else ()
        size = size_of(model, subject.chosen, dims)
        yield {
            **identity(subject.task, subject.seed, entry, sparsity),
            "steps": training.steps,
            "finetune_epochs": training.epochs,
            "learning_rate": training.learning_rate,
            "model": RECIPES[subject.task].model,
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
            "seconds": prune_seconds + train_seconds,
            "train_seconds": train_seconds,
            "cpu_seconds": prune_processor + processor,
            "machine": machine(),
        }


def wanted(
    entries: Sequence[Variant | Rival], sparsities: Sequence[float], steps: Sequence[int]
) -> list[tuple[Variant | Rival, float, list[int]]]:
    """What is asked of one model: its dense controls, then each method with its numbers of steps.

    Methods that prune during training have no one-shot form.
    """
    counts = [*dict.fromkeys(steps)]
    asked: list[tuple[Variant | Rival, float, list[int]]] = [(DENSE, 0.0, counts)]
    for sparsity in dict.fromkeys(sparsities):
        for entry in entries:
            gradual = isinstance(entry, Rival) and entry.gradual is not None
            asked.append((entry, sparsity, [count for count in counts if count or not gradual]))
    return asked


def lacking(
    task: str,
    seed: int,
    records: Sequence[Record],
    asked: Sequence[tuple[Variant | Rival, float, list[int]]],
    learning_rate: float,
) -> list[tuple[Variant | Rival, float, list[int]]]:
    """What of it has no record yet."""
    there = {key_of(record) for record in records}
    missing = []
    for entry, sparsity, counts in asked:
        about = identity(task, seed, entry, sparsity) | {"learning_rate": learning_rate}
        left = [count for count in counts if key_of(about | {"steps": count}) not in there]
        if left:
            missing.append((entry, sparsity, left))
    return missing


def with_control(record: Record, records: Sequence[Record]) -> Record:
    """The record with what the dense control of its model and budget reached."""
    if record["method"] == DENSE.method:
        control = record
    else:
        control = next(
            r
            for r in records
            if r["method"] == DENSE.method and key_of(r)[-2:] == key_of(record)[-2:]
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
    asked: Sequence[tuple[Variant | Rival, float, list[int]]],
    rate: float = RATE,
    results: Path | None = None,
) -> None:
    """Measure what the part of one model lacks; nothing is loaded where it lacks nothing."""
    path = part(FOLDER, NAME, task, seed)
    records = known(path, results or RESULTS, task, seed)
    recipe = RECIPES[task]
    learning_rate = rate * recipe.learning_rate
    missing = lacking(task, seed, records, asked, learning_rate)
    if not missing:
        return
    model, data = finetuned(task, seed)
    subject = examine(task, seed, model, [*data.val_dataloader()], [*data.test_dataloader()])
    evidence = f"evidence {subject.seconds:.0f} s"
    print(f"{task}, seed {seed}: dense {subject.accuracy:.2%}, {evidence}", flush=True)
    trainings = {
        count: training_of(
            data.train_dataloader(),
            count,
            first_epoch=recipe.epochs,
            learning_rate=learning_rate,
            seed=seed,
        )
        for count in {count for *_, counts in missing for count in counts}
    }
    for entry, sparsity, counts in missing:
        for record in measure(subject, entry, sparsity, [trainings[count] for count in counts]):
            records.append(with_control(record, records))
            write(path, records)
            print(
                f"  {sparsity:.0%} {entry.method}, {entry.widths}, {entry.fold_in}, "
                f"{record['steps']} steps: {record['accuracy']:.2%} with "
                f"{record['sparsity']:.1%} gone, {record['seconds']:.0f} s",
                flush=True,
            )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("examples.benchmark.recovery", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    methods = [*dict.fromkeys(entry.method for entry in ENTRIES)]
    add = parser.add_argument
    add("--tasks", nargs="+", choices=[*RECIPES], default=TASKS, help=f"default: {' '.join(TASKS)}")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="default: all")
    add("--sparsities", nargs="+", type=share, default=SPARSITIES, help="default: 0.5 0.75 0.9")
    add("--steps", nargs="+", type=whole, default=STEPS, help="default: 0 (one shot) and 100")
    add("--rate", type=positive, default=RATE, help="share of the dense model's learning rate")
    add("--methods", nargs="+", choices=methods, default=methods, help="default: all")
    add("--widths", nargs="+", choices=("global", "uniform"), default=("global", "uniform"))
    add("--results", type=Path, default=RESULTS, help="the one list; default: the project's own")
    add("--gather", action="store_true", help="only merge the records that are there")
    add("--list", action="store_true", help="only print what is missing")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing, then merge all there is into the one list."""
    asked = arguments(given)
    quiet()
    entries = [e for e in ENTRIES if e.method in asked.methods and e.widths in asked.widths]
    grid = wanted(entries, asked.sparsities, asked.steps)
    for seed in asked.seeds:
        for task in asked.tasks:
            if asked.list:
                there = known(part(FOLDER, NAME, task, seed), asked.results, task, seed)
                rate = asked.rate * RECIPES[task].learning_rate
                left = lacking(task, seed, there, grid, rate)
                missing = sum(len(counts) for *_, counts in left)
                print(f"{task}, seed {seed}: {missing} records missing")
            elif not asked.gather:
                run(task, seed, grid, asked.rate, asked.results)
    if not asked.list:
        gather(FOLDER, NAME, asked.results)


if __name__ == "__main__":
    main()
