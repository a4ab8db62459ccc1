"""The tasks: their data, the dense classifiers fine-tuned on them, and training after a cut.

A fine-tuned model is stored in ``runs/benchmark/dense/<task>-<seed>/`` and is trained only once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from examples.text_classification.data import TextDataModule
from examples.text_classification.model import TextClassifier
from lightning_mi_prune import PruningPlan, discover
from lightning_mi_prune.surgery.layers import remove_layers

__all__ = [
    "QUICK",
    "RECIPES",
    "SEEDS",
    "TASKS",
    "Batch",
    "Loss",
    "Training",
    "dense_record",
    "finetuned",
    "keep_first_layers",
    "labels_loss",
    "task_data",
    "token_ids",
    "train",
    "trainer_for",
    "training_of",
    "typical_length",
]

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]

SEEDS = (0, 1, 2, 3, 4)
FOLDER = Path("runs", "benchmark", "dense")
RECORD = "dense.json"
WARMUP, WEIGHT_DECAY = 0.1, 0.01  # share of the steps; AdamW


@dataclass(frozen=True)
class Recipe:
    """How a task is split and a dense model fine-tuned on it.

    Args:
        learning_rate: Highest learning rate.
        epochs: Passes over the training split.
        validation_fraction: Share of the rows for validation.
        test_fraction: Share of the rows for the test.
        batch_size: Rows in a batch.
        max_length: Tokens after which a text is cut off.
        group_by_length: Whether a training batch holds texts of about the same length.
        limit: Rows that are used in all; None is all there are.
        model: The pretrained encoder, as the example names it.
        dataset: The data, as the example names them; None is what the task is called.
    """

    learning_rate: float
    epochs: int
    validation_fraction: float
    test_fraction: float
    batch_size: int = 32
    max_length: int = 64
    group_by_length: bool = True
    limit: int | None = None
    model: str = "minilm-l6"
    dataset: str | None = None


QUICK = "quick"
RECIPES = {
    "trec-6": Recipe(1e-4, 4, validation_fraction=0.2, test_fraction=0.2),
    "movie-snippets": Recipe(5e-5, 2, validation_fraction=0.2, test_fraction=0.27),
    # The two larger ones are limited to what one thread trains on in some minutes an epoch.
    "tweets-3": Recipe(5e-5, 2, validation_fraction=0.15, test_fraction=0.2, limit=15_000),
    "20-newsgroups": Recipe(1e-4, 3, 0.15, 0.25, batch_size=16, max_length=128, limit=4_500),
    # About five times the parameters: hours where the others take minutes.
    "trec-6-mpnet": Recipe(5e-5, 2, 0.2, 0.2, model="mpnet-base", dataset="trec-6"),
    # To see that a benchmark runs; its numbers mean nothing.
    QUICK: Recipe(1e-4, 1, 0.3, 0.2, max_length=32, limit=800, dataset="trec-6"),
}
# Measured by default: tasks of one model, so that means over them are possible.
TASKS = ("trec-6", "movie-snippets", "tweets-3", "20-newsgroups")


def task_data(task: str, seed: int) -> TextDataModule:
    """Load, split and tokenize the data of a task."""
    recipe = RECIPES[task]
    data = TextDataModule(
        dataset=recipe.dataset or task,
        model=recipe.model,
        max_length=recipe.max_length,
        batch_size=recipe.batch_size,
        validation_fraction=recipe.validation_fraction,
        test_fraction=recipe.test_fraction,
        group_by_length=recipe.group_by_length,
        limit=recipe.limit,
        seed=seed,
    )
    data.setup()
    return data


def typical_length(batches: Sequence[Batch]) -> int:
    """Tokens of the median batch, padding included."""
    return int(median(batch["input_ids"].shape[1] for batch in batches))


def token_ids(rows: int, length: int) -> Batch:
    """Texts without padding, of a word that any vocabulary has; for timing."""
    ids = torch.full((rows, length), 5)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def finetuned(
    task: str, seed: int, layers: int | None = None
) -> tuple[PreTrainedModel, TextDataModule]:
    """A fine-tuned classifier in evaluation mode and its data; trained where no folder has it.

    Split, head and order of training change with the seed. Random states are left as they were.

    Args:
        task: A key of `RECIPES`.
        seed: Seed of everything.
        layers: Layers of the pretrained encoder to begin with, from the bottom; None is all.
    """
    data, folder = task_data(task, seed), folder_of(task, seed, layers)
    done = (folder / RECORD).exists() and dense_record(task, seed, layers)["settings"]
    if done != settings(task, seed, layers):
        with isolate_rng():
            _finetune(task, seed, data, folder, layers)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval(), data


def folder_of(task: str, seed: int, layers: int | None = None) -> Path:
    """Where a fine-tuned classifier is."""
    return FOLDER / (f"{task}-{seed}" if layers is None else f"{task}-{seed}-{layers}-layers")


def dense_record(task: str, seed: int, layers: int | None = None) -> dict[str, Any]:
    """What is known of a fine-tuned classifier: accuracies, rows, seconds, settings."""
    path = folder_of(task, seed, layers) / RECORD
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def settings(task: str, seed: int, layers: int | None = None) -> dict[str, Any]:
    """Everything a fine-tuned classifier depends on but the machine, less what is None."""
    known = {"task": task, "seed": seed, **asdict(RECIPES[task]), "layers": layers}
    return {name: value for name, value in known.items() if value is not None}


def _finetune(task: str, seed: int, data: TextDataModule, folder: Path, layers: int | None) -> None:
    """Fine-tune and test on the CPU; the record is written last, when all else is there."""
    print(f"fine-tuning: {task}, seed {seed}, {layers or 'all'} layers", flush=True)
    pl.seed_everything(seed, verbose=False)
    recipe = RECIPES[task]
    module = TextClassifier(recipe.model, data.num_classes, recipe.learning_rate)
    module.network.float()
    if layers is not None:
        keep_first_layers(module.network, layers)
    trainer = trainer_for(recipe.epochs)
    processor = time.process_time()
    trainer.fit(module, data)
    processor = time.process_time() - processor
    found = {
        "test_accuracy": float(trainer.test(module, data, verbose=False)[0]["test_accuracy"]),
        "cpu_seconds": processor,
        "settings": settings(task, seed, layers),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    module.network.config.id2label = dict(enumerate(data.class_names))
    module.network.config.label2id = {name: i for i, name in enumerate(data.class_names)}
    module.network.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / RECORD)


def keep_first_layers(network: nn.Module, layers: int) -> None:
    """Remove all layers of every stack but this many, from the bottom."""
    stacks = discover(network).stacks
    kept = {stack.name: tuple(range(layers)) for stack in stacks}
    remove_layers(network, stacks, PruningPlan({s.name: s.size for s in stacks}, kept))


def trainer_for(epochs: int, callbacks: Sequence[pl.Callback] = ()) -> pl.Trainer:
    """A trainer on the CPU that writes and shows nothing."""
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        num_sanity_val_steps=0,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Training(NamedTuple):
    """The training after a cut, the same for every method.

    Args:
        batches: Batches, one a step.
        learning_rate: Highest learning rate; it warms up, then falls to 0 in a straight line.
        seed: Seed of dropout.
    """

    batches: Sequence[Batch]
    learning_rate: float
    seed: int


def training_of(
    loader: Any, steps: int, first_epoch: int, learning_rate: float, seed: int
) -> Training:
    """The batches of so many steps, in the order of the training split from some epoch on."""
    return Training([*islice(_endless(loader, first_epoch), steps)], learning_rate, seed)


def _endless(loader: Any, first_epoch: int) -> Iterator[Batch]:
    for epoch in count(first_epoch):
        loader.sampler.set_epoch(epoch)
        yield from loader


def labels_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model computes from the labels of a batch."""
    loss: Tensor = model(**batch).loss
    return loss


def train(
    model: nn.Module,
    training: Training,
    *,
    loss: Loss = labels_loss,
    before_step: Callable[[float], None] | None = None,
    scores: Iterable[nn.Parameter] = (),
    scores_rate: float = 0.0,
) -> None:
    """Train a model in place and leave it in evaluation mode. Random states stay as they were.

    `before_step` gets the share of the steps that is done; `scores` are parameters with a learning
    rate of their own, without decay.
    """
    if not training.batches:
        return
    own = list(scores)
    others = {id(score) for score in own}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in others]}
    ]
    if own:
        groups.append({"params": own, "lr": scores_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, lr=training.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
    )
    steps = len(training.batches)
    warmup = max(1, round(WARMUP * steps))
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    with isolate_rng():
        torch.manual_seed(training.seed)
        model.train()
        for step, batch in enumerate(training.batches):
            if before_step is not None:
                before_step(step / steps)
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    model.eval()
