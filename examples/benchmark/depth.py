"""Whole layers removed while MiniLM-L6 is fine-tuned, beside a dense control of equal budget.

    python -m examples.benchmark.depth [--tasks trec-6 movie-snippets] [--seeds 0 1 2]
    python -m examples.benchmark.depth --quiet-machine

The first line trains what is missing; every run starts from the same pretrained weights and sees
the same rows in the same order for the same number of epochs. The second measures latency and the
cost of listening, on a machine that does nothing else. Records go to
``examples/benchmark/results/depth.json``; the table is printed from them.
"""

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import transformers
from rich.console import Console

from benchmarks.measuring import cpu_name
from examples.benchmark.layer_tables import depth_table
from examples.benchmark.records import load, write
from examples.text_classification.data import TextDataModule
from examples.text_classification.model import TextClassifier
from lightning_mi_prune import CKALayerPruning
from lightning_mi_prune.families.stacks import find_stacks
from lightning_mi_prune.measure import measure_latency
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.stacks import StackListeners
from lightning_mi_prune.surgery import shorten

RESULTS = Path(__file__).parent / "results" / "depth.json"
SEEDS = (0, 1, 2)
LAYERS = 6
POSITIONS = 16_384  # of the inputs that the callback stores, by default


@dataclass(frozen=True)
class Recipe:
    """How a task is split and trained, with and without pruning."""

    learning_rate: float
    epochs: int
    validation_fraction: float
    test_fraction: float


RECIPES = {
    "trec-6": Recipe(1e-4, 6, validation_fraction=0.2, test_fraction=0.2),
    "movie-snippets": Recipe(5e-5, 4, validation_fraction=0.2, test_fraction=0.27),
}


class Variant(NamedTuple):
    """One way to remove layers.

    Args:
        layers: Layers left.
        criterion: What decides.
        cuts: Cuts on the way.
        refit: Whether layers that stay take over what the removed ones said.
        early: Whether the cut comes after the first epoch already, not half-way.
    """

    layers: int
    criterion: str
    cuts: int = 1
    refit: bool = True
    early: bool = False


# The dense control first, what decides most next.
VARIANTS = (
    Variant(6, "none", 0, refit=False),
    Variant(4, "cka"),
    Variant(3, "cka"),
    Variant(4, "cka", refit=False),
    Variant(4, "last"),
    Variant(3, "cka", refit=False),
    Variant(4, "random"),
    Variant(4, "angular_run"),
    Variant(4, "angle"),
    Variant(3, "last"),
    Variant(4, "cka", refit=False, early=True),
    Variant(4, "last", refit=False, early=True),
    Variant(4, "random", refit=False, early=True),
    Variant(4, "angular_run", refit=False, early=True),
    Variant(4, "angle", refit=False, early=True),
    Variant(3, "cka", refit=False, early=True),
    Variant(3, "angle", refit=False, early=True),
    Variant(4, "cka", early=True),
)


def run(task: str, seed: int, variant: Variant) -> dict[str, Any]:
    """Train and test one variant."""
    recipe = RECIPES[task]
    data = TextDataModule(
        dataset=task,
        max_length=64,
        batch_size=32,
        validation_fraction=recipe.validation_fraction,
        test_fraction=recipe.test_fraction,
        group_by_length=True,
        seed=seed,
    )
    data.setup()
    pl.seed_everything(seed, workers=True, verbose=False)
    module = TextClassifier(num_classes=data.num_classes, learning_rate=recipe.learning_rate)
    module.network.float()
    callbacks: list[pl.Callback] = []
    layers, criterion, cuts, refit, early = variant
    if criterion != "none":
        options: dict[str, Any] = {"criterion": criterion, "target_layers": layers, "seed": seed}
        options |= {"cuts": cuts, "refit": refit, "first_epoch": 1 if early else None}
        callbacks = [CKALayerPruning(None, verbose=False, **options)]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=recipe.epochs,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - started
    accuracy = float(trainer.test(module, data, verbose=False)[0]["test_accuracy"])
    record: dict[str, Any] = {
        "task": task,
        "model": "minilm-l6",
        "layers_before": LAYERS,
        "layers": len(module.network.base_model.encoder.layer),
        "criterion": criterion,
        "cuts": cuts,
        "refit": refit,
        "early": early,
        "seed": seed,
        "epochs": recipe.epochs,
        "n_test": len(data.splits["test"]),
        "accuracy": accuracy,
        "parameters": sum(p.numel() for p in module.network.parameters()),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": cpu_name(),
    }
    made = [cut for callback in callbacks for cut in callback.report.cuts]  # type: ignore[attr-defined]
    record["removed"] = [
        {
            "epoch": cut.epoch,
            "layers": cut.stacks[0].removed,
            "threshold": cut.stacks[0].threshold,
            "similarity": cut.stacks[0].similarity,
            "seconds": dict(cut.seconds),
        }
        for cut in made
    ]
    return record


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a record is about."""
    names = ("task", "seed", "layers", "criterion", "cuts", "refit", "early")
    return tuple(record[name] for name in names)


def latency() -> dict[str, Any]:
    """Median milliseconds of the encoder with 6, 4 and 3 layers, in turn; and their ratios."""
    encoder = TextClassifier().network.base_model.float().eval()
    kept = {6: None, 4: (0, 1, 2, 3), 3: (0, 1, 2)}
    encoders = {}
    for layers, places in kept.items():
        encoders[layers] = copy.deepcopy(encoder)
        if places is not None:
            stacks = find_stacks(encoders[layers])
            plan = Plan({s.name: s.size for s in stacks}, {s.name: places for s in stacks})
            shorten(encoders[layers], stacks, plan)
    found: dict[str, Any] = {}
    for batch in (1, 32):
        ids = torch.randint(5, 30_000, (batch, 64))

        def forward(network: Any, ids: torch.Tensor = ids) -> None:
            with torch.inference_mode():
                network(ids)

        calls = {
            str(n): (lambda network=network: forward(network)) for n, network in encoders.items()
        }
        ms = measure_latency(calls, seconds=10.0, rounds=20)
        found[f"batch {batch}"] = {
            "ms": ms,
            "speed_up_of_layer_ratio": {n: ms["6"] / ms[n] / (6 / int(n)) for n in ("4", "3")},
        }
    return found


def overhead(rounds: int = 7) -> dict[str, Any]:
    """What listening adds to a validation pass: CPU seconds with and without, in turn."""
    data = TextDataModule(dataset="trec-6", max_length=64, batch_size=32, seed=0)
    data.setup()
    batches = list(data.val_dataloader())
    module = TextClassifier(num_classes=data.num_classes).float().eval()
    stacks = find_stacks(module)
    times: dict[str, list[float]] = {"plain": [], "listening": []}

    def validate() -> float:
        started = time.process_time()
        with torch.inference_mode():
            for batch in batches:
                module.network(**batch)
        return time.process_time() - started

    validate()
    for _ in range(rounds):
        times["plain"].append(validate())
        with StackListeners(module, stacks, calls=POSITIONS, batches=len(batches)):
            times["listening"].append(validate())
    pairs = zip(times["listening"], times["plain"], strict=True)
    ratios = [heard / plain - 1 for heard, plain in pairs]
    return {
        "rows": sum(len(batch["labels"]) for batch in batches),
        "cpu_seconds": {name: statistics.median(values) for name, values in times.items()},
        "added": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
    }


def main() -> None:
    """Run what is missing, write the records, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="only the first ones")
    parser.add_argument("--quiet-machine", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print the table, as markdown")
    options = parser.parse_args()
    if options.table:
        print(depth_table(load(RESULTS)))
        return
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    if options.quiet_machine:
        machine = {
            "cpu": cpu_name(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        machine["python"] = platform.python_version()
        found = {"machine": machine, "latency": latency(), "overhead": overhead()}
        RESULTS.with_name("depth-speed.json").write_text(json.dumps(found, indent=2) + "\n")
        Console().print_json(data=found)
        return
    for variant in VARIANTS[: options.variants]:
        for task in options.tasks:
            for seed in options.seeds:
                records = load(RESULTS)
                if (task, seed, *variant) in {key_of(r) for r in records}:
                    continue
                record = run(task, seed, variant)
                write(RESULTS, sorted([*load(RESULTS), record], key=lambda r: str(key_of(r))))
                print(task, seed, *variant, f"{record['accuracy']:.4f}", flush=True)
    print(depth_table(load(RESULTS)))


if __name__ == "__main__":
    main()
