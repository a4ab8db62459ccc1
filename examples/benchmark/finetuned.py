"""The dense, fine-tuned classifiers that every method of the benchmark starts from.

    python -m examples.benchmark.finetuned

Trains what is missing of all seeds and `TASKS`. A model, its tokenizer and `dense.json` go to
`runs/benchmark/dense/<task>-<seed>/`; whoever asks for it again gets what is there. Small ones,
which begin with the first layers of the pretrained encoder, are trained where a rival asks.
"""

import json
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from examples.text_classification.data import TextDataModule
from examples.text_classification.model import TextClassifier
from lightning_mi_prune import Plan, find_stacks, shorten

SEEDS = (0, 1, 2, 3, 4)
FOLDER = Path("runs", "benchmark", "dense")
RECORD = "dense.json"


@dataclass(frozen=True)
class Recipe:
    """How a task is split and trained.

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


RECIPES = {
    "trec-6": Recipe(1e-4, epochs=4, validation_fraction=0.2, test_fraction=0.2),
    "movie-snippets": Recipe(5e-5, epochs=2, validation_fraction=0.2, test_fraction=0.27),
    # The two larger ones are cut down to what one thread trains on in some minutes an epoch: 9,750
    # of 37,243 tweets, and 2,869 newsgroup posts up to their 128th token (half of the posts have
    # more than 162 words; a batch of 16 of them costs as much as one of 64 short sentences).
    "tweets-3": Recipe(5e-5, epochs=2, validation_fraction=0.15, test_fraction=0.2, limit=15_000),
    "20-newsgroups": Recipe(
        1e-4,
        epochs=3,
        validation_fraction=0.15,
        test_fraction=0.25,
        batch_size=16,
        max_length=128,
        limit=4_500,
    ),
    # About five times the parameters: hours where the others take minutes.
    "trec-6-mpnet": Recipe(
        5e-5,
        epochs=2,
        validation_fraction=0.2,
        test_fraction=0.2,
        model="mpnet-base",
        dataset="trec-6",
    ),
}
# What is measured where nothing else is asked for: the one model that means go over.
TASKS = tuple(task for task, recipe in RECIPES.items() if recipe.model == "minilm-l6")


class EpochTimes(Callback):
    """Prints seconds and validation accuracy of each epoch."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = time.perf_counter() - self.started
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        print(f"  epoch {trainer.current_epoch}: {accuracy:.2%}, {seconds:.0f} s", flush=True)


def finetuned(
    task: str, seed: int, layers: int | None = None
) -> tuple[PreTrainedModel, TextDataModule]:
    """Gives a fine-tuned classifier and its data, training it only where that was never done.

    Split, head and order of training change with the seed. Random states are left as they were.

    Args:
        task: A key of `RECIPES`.
        seed: Seed of everything.
        layers: Layers of the pretrained encoder to begin with, from the bottom; None is all.

    Returns:
        The network, in evaluation mode, and its data, set up.
    """
    data = task_data(task, seed)
    folder = folder_of(task, seed, layers)
    if not is_done(folder, settings(task, seed, layers)):
        with isolate_rng():
            train(task, seed, data, folder, layers)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32
    )
    return model.eval(), data


def folder_of(task: str, seed: int, layers: int | None = None) -> Path:
    """Where a fine-tuned classifier is."""
    return FOLDER / (f"{task}-{seed}" if layers is None else f"{task}-{seed}-{layers}-layers")


def dense_record(task: str, seed: int, layers: int | None = None) -> dict[str, Any]:
    """Reads what is known of a fine-tuned classifier: accuracies, rows, seconds, settings."""
    text = (folder_of(task, seed, layers) / RECORD).read_text(encoding="utf-8")
    record: dict[str, Any] = json.loads(text)
    return record


def task_data(task: str, seed: int) -> TextDataModule:
    """Loads, splits and tokenizes the data of a task."""
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


def settings(task: str, seed: int, layers: int | None = None) -> dict[str, Any]:
    """Everything a fine-tuned classifier depends on but the machine, less what is None."""
    known = {"task": task, "seed": seed, **asdict(RECIPES[task]), "layers": layers}
    return {name: value for name, value in known.items() if value is not None}


def is_done(folder: Path, expected: dict[str, Any]) -> bool:
    """Whether a folder has a classifier that was trained with these settings."""
    record = folder / RECORD
    if not record.exists():
        return False
    found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["settings"]
    return found == expected


def keep_first(network: PreTrainedModel, layers: int) -> None:
    """Remove all layers but the first ones."""
    stacks = find_stacks(network)
    kept = {stack.name: tuple(range(layers)) for stack in stacks}
    shorten(network, stacks, Plan({stack.name: stack.size for stack in stacks}, kept))


def train(
    task: str, seed: int, data: TextDataModule, folder: Path, layers: int | None = None
) -> None:
    """Fine-tunes and tests on the CPU; the record is written last, when all else is there."""
    print(f"{task}, seed {seed}" + (f", {layers} layers" if layers else ""), flush=True)
    pl.seed_everything(seed, verbose=False)
    recipe = RECIPES[task]
    module = TextClassifier(recipe.model, data.num_classes, recipe.learning_rate)
    module.network.float()
    if layers is not None:
        keep_first(module.network, layers)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=recipe.epochs,
        num_sanity_val_steps=0,
        callbacks=[EpochTimes()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started, processor = time.perf_counter(), time.process_time()
    trainer.fit(module, data)
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    validation = float(trainer.callback_metrics["val_accuracy"])
    test = float(trainer.test(module, data, verbose=False)[0]["test_accuracy"])
    print(f"  test: {test:.2%}, {seconds:.0f} s in all", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    module.network.config.id2label = dict(enumerate(data.class_names))
    module.network.config.label2id = {name: i for i, name in enumerate(data.class_names)}
    module.network.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    record = {
        "test_accuracy": test,
        "validation_accuracy": validation,
        "rows": {split: len(rows) for split, rows in data.splits.items()},
        "seconds": seconds,
        "cpu_seconds": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "settings": settings(task, seed, layers),
    }
    partial = folder / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(folder / RECORD)


def main() -> None:
    """Train what is missing, one after another."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    for seed in SEEDS:
        for task in TASKS:
            finetuned(task, seed)
            record = dense_record(task, seed)
            print(f"{task}, seed {seed}: dense {record['test_accuracy']:.2%}", flush=True)


if __name__ == "__main__":
    main()
