"""Whether the uncut model is a better teacher than the labels, in as many steps of training.

    python -m examples.benchmark.distillation
    python -m examples.benchmark.distillation --tasks trec-6 --seeds 0 1 2 --sparsities 0.9 0.95

Each model is pruned once by our method and trained three times from there: with its own loss, with
half of it and half of the divergence from the teacher's predictions (Hinton et al. 2015), and with
the distance to the teacher's hidden states too (Romero et al. 2015; the width of the stream is not
cut, so they can be compared as they are). Steps, rows, order, optimizer and seed are the same; a
step with a teacher takes the teacher's pass besides.
"""

import argparse
import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.benchmark.finetuned import RECIPES, SEEDS, TASKS, finetuned
from examples.benchmark.oneshot import Subject, cut, examine, identity, machine, tested
from examples.benchmark.options import count, quiet, share
from examples.benchmark.paired import NATS, POINTS, spread
from examples.benchmark.records import Record, load, write
from examples.benchmark.training import Batch, Loss, Training, of_labels, train, training_of
from examples.benchmark.variants import OURS

RESULTS = Path(__file__).parent / "results" / "distillation.json"
SPARSITIES = (0.75, 0.9, 0.95)
STEPS = 100
TEMPERATURE = 2.0

Place = tuple[str, float, int]


@dataclass(frozen=True)
class Teacher:
    """The uncut model, as part of a loss.

    Args:
        model: The model, in evaluation mode; only run.
        hidden: Weight of the distance of hidden states; 0 leaves them out.
    """

    model: nn.Module
    hidden: float = 0.0

    def __call__(self, student: nn.Module, batch: Batch) -> Tensor:
        """Half the loss of the labels, half that of the predictions, and that of the states."""
        states = self.hidden > 0
        said = student(**batch, output_hidden_states=states)
        with torch.no_grad():
            wanted = self.model(**batch, output_hidden_states=states)
        loss: Tensor = (said.loss + divergence(said.logits, wanted.logits)) / 2
        if states:
            mask = batch["attention_mask"].bool()
            pairs = [*zip(said.hidden_states, wanted.hidden_states, strict=True)][1:]
            apart = [distance(x[mask], y[mask]) for x, y in pairs]
            loss = loss + self.hidden * torch.stack(apart).mean()
        return loss


def divergence(said: Tensor, wanted: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Divergence of predictions from the teacher's, in nats times the square of the temperature.

    Args:
        said: Logits of the student ``(rows, classes)``.
        wanted: Those of the teacher.
        temperature: What both are divided by first.

    Example:
        >>> same = torch.tensor([[1.0, 2.0]])
        >>> float(divergence(same, same))
        0.0
    """
    mine, theirs = ((logits / temperature).log_softmax(-1) for logits in (said, wanted))
    apart = functional.kl_div(mine, theirs, reduction="batchmean", log_target=True)
    return temperature**2 * apart


def distance(said: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of states as a share of the teacher's squared length.

    Example:
        >>> float(distance(torch.zeros(2, 3), torch.ones(2, 3)))
        1.0
    """
    return functional.mse_loss(said, wanted) / wanted.square().mean()


def losses(teacher: nn.Module) -> dict[str, Loss]:
    """The ways to train, by name."""
    return {
        "labels": of_labels,
        "predictions": Teacher(teacher),
        "predictions and states": Teacher(teacher, hidden=1.0),
    }


def measure(subject: Subject, sparsity: float, training: Training) -> Iterator[Record]:
    """Prune a copy once, train it every way and test it.

    Args:
        subject: The dense model and its evidence.
        sparsity: Share of the prunable parameters that must go.
        training: The steps.
    """
    before, plan = cut(subject, OURS, sparsity)
    for name, loss in losses(subject.model).items():
        model = copy.deepcopy(before)
        train(model, training, loss=loss)
        yield {
            **identity(subject.task, subject.seed, OURS, sparsity),
            "steps": training.steps,
            "taught_by": name,
            **tested(subject, model, plan),
            "machine": machine(),
        }


def place_of(record: Record) -> Place:
    """Where a record stands: task, sparsity, steps."""
    return record["task"], record["target_sparsity"], record["steps"]


def about(record: Record) -> tuple[str, float, int, int, str]:
    """What a record is about: its place, the model and the teacher."""
    return *place_of(record), record["seed"], record["taught_by"]


def distilled_lines(records: Sequence[Record]) -> list[str]:
    """What a teacher changes, paired by seed; nothing without records.

    Args:
        records: Those of this script.
    """
    if not records:
        return []
    names = [*losses(nn.Identity())]
    plain, *taught = names
    lines = [
        "## Distillation",
        "",
        "The same pruned models (`relevance-mi`), trained from labels alone or with the uncut "
        "model as a teacher: half of the loss from its predictions (temperature "
        f"{TEMPERATURE:g}), then from its hidden states too. Accuracy after training from labels; "
        "then what the teacher changes, in points (more is better) and in nats of test "
        "cross-entropy (less is better), paired by seed, with 95% intervals from two seeds on. "
        "Steps are equal, so the teacher's pass comes on top.",
        "",
        f"| task | gone | steps | seeds | {plain} | {' | '.join(taught)} |",
        "|---" * (5 + len(taught)) + "|",
    ]
    for place in sorted({place_of(record) for record in records}):
        by_way: dict[str, dict[int, Record]] = {name: {} for name in names}
        for record in records:
            if place_of(record) == place:
                by_way[record["taught_by"]][record["seed"]] = record
        seeds = sorted(set.intersection(*map(set, by_way.values())))
        if not seeds:
            continue
        task, sparsity, steps = place
        mean = statistics.mean(by_way[plain][seed]["accuracy"] for seed in seeds)
        cells = [task, f"{sparsity:.0%}", str(steps), str(len(seeds)), f"{mean:.2%}"]
        for name in taught:
            pairs = [(by_way[name][seed], by_way[plain][seed]) for seed in seeds]
            points = [100 * (mine["accuracy"] - other["accuracy"]) for mine, other in pairs]
            nats = [mine["cross_entropy"] - other["cross_entropy"] for mine, other in pairs]
            cells.append(f"{spread(points, POINTS.digits)}; {spread(nats, NATS.digits)}")
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser("examples.benchmark.distillation", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tasks", nargs="+", choices=TASKS, default=("trec-6",), help="default: trec-6")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=(0, 1, 2), help="default: 0 1 2")
    add("--sparsities", nargs="+", type=share, default=SPARSITIES, help="default: 0.75 0.9 0.95")
    add("--steps", type=count, default=STEPS, help="of training; default: 100")
    asked = parser.parse_args(given)
    quiet()
    found = {about(record): record for record in load(RESULTS)}
    ways = [*losses(nn.Identity())]
    for task, seed in ((task, seed) for task in asked.tasks for seed in asked.seeds):
        missing = [
            sparsity
            for sparsity in asked.sparsities
            if any((task, sparsity, asked.steps, seed, way) not in found for way in ways)
        ]
        if not missing:
            continue
        model, data = finetuned(task, seed)
        subject = examine(task, seed, model, [*data.val_dataloader()], [*data.test_dataloader()])
        recipe = RECIPES[task]
        training = training_of(
            data.train_dataloader(),
            asked.steps,
            first_epoch=recipe.epochs,
            learning_rate=recipe.learning_rate,
            seed=seed,
        )
        for sparsity in missing:
            for record in measure(subject, sparsity, training):
                found[about(record)] = record
                write(RESULTS, [found[key] for key in sorted(found)])
                print(
                    f"{task}, seed {seed}, {sparsity:.0%}: {record['taught_by']} "
                    f"{record['accuracy']:.2%}, {record['cross_entropy']:.4f} nats",
                    flush=True,
                )


if __name__ == "__main__":
    main()
