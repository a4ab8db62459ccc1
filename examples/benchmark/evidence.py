"""Seconds of the processor that the evidence of a task takes, for the methods that need it.

    python -m examples.benchmark.evidence
    python -m examples.benchmark.evidence --tasks trec-6 --rounds 1

All ways of this package share one evidence, so no record can say what a way alone would have paid.
Time depends on shapes, not on weights: the model is built with random ones. Tasks that are there
are not measured again.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from examples.benchmark.finetuned import RECIPES, TASKS, task_data
from examples.benchmark.hearing import CALLS, POSITIONS, Batch, feel, hear
from examples.benchmark.latency import shaped
from examples.benchmark.oneshot import machine
from examples.benchmark.options import quiet, whole
from examples.benchmark.records import Record, load, write
from examples.benchmark.tables import Name
from examples.text_classification.packaged import model_path
from lightning_mi_prune import find_axes
from lightning_mi_prune.choosing import choose_axes

RESULTS = Path(__file__).parent / "results" / "evidence.json"
ROUNDS = 3

# What looks at activations, and at gradients, even with equal widths and without new weights.
INSIDE = "relevance-mi-dims"  # it hears and feels at more places, which were not timed
HEARING = {"relevance-mi", INSIDE, "relevance-mi-readers", "mi", "mi-topk", "activation-norm"}
FEELING = {"relevance-mi", INSIDE, "taylor"}
OURS = HEARING | FEELING | {"magnitude", "random"}


def needed(name: Name) -> tuple[bool, bool]:
    """Whether a way of this package needs activations, and gradients; neither for all others.

    Example:
        >>> needed(("taylor", "uniform", "none", 1)), needed(("taylor", "global", "refit", 1))
        ((False, True), (True, True))
    """
    method, widths, fold_in, _ = name
    if method not in OURS:
        return False, False
    competes = widths == "global"
    hears = method in HEARING or competes or fold_in != "none"
    return hears, method in FEELING or (competes and method not in {"mi", "relevance-mi-readers"})


def charged(name: Name, found: Record | None) -> float | None:
    """CPU seconds of the evidence that a way needs; None where the task was not measured."""
    hears, feels = needed(name)
    if not (hears or feels):
        return 0.0
    if found is None or name[0] == INSIDE:
        return None
    return float(hears * found["hearing_cpu_seconds"] + feels * found["feeling_cpu_seconds"])


def gauge(model: nn.Module, batches: Sequence[Batch], rounds: int) -> Record:
    """Medians over the rounds of what hearing and feeling take.

    Args:
        model: The dense model.
        batches: Those of the validation split.
        rounds: How often to measure.
    """
    axes = choose_axes(find_axes(model))
    taken: dict[str, list[float]] = {"hearing": [], "feeling": []}
    for _ in range(rounds):
        started = time.process_time()
        hear(model, axes, batches, POSITIONS, CALLS, seed=0)
        taken["hearing"].append(time.process_time() - started)
        started = time.process_time()
        feel(model, axes, batches)
        taken["feeling"].append(time.process_time() - started)
    return {f"{name}_cpu_seconds": statistics.median(values) for name, values in taken.items()}


def main(given: Sequence[str] | None = None) -> None:
    """Measure the tasks that are missing, one after another."""
    parser = argparse.ArgumentParser("examples.benchmark.evidence", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--tasks", nargs="+", choices=[*RECIPES], default=TASKS)
    parser.add_argument("--rounds", type=whole, default=ROUNDS, help="the median counts")
    asked = parser.parse_args(given)
    if not asked.rounds:
        parser.error("--rounds 0: expected at least one")
    quiet()
    transformers.logging.set_verbosity_error()
    found = {record["task"]: record for record in load(RESULTS)}
    for task in asked.tasks:
        if task in found:
            continue
        data = task_data(task, 0)
        batches = [*data.val_dataloader()]
        torch.manual_seed(0)
        path = model_path(RECIPES[task].model)
        config = AutoConfig.from_pretrained(path, num_labels=data.num_classes)
        record = {"task": task, **gauge(shaped(config), batches, asked.rounds)}
        positions = sum(int(batch["attention_mask"].sum()) for batch in batches)
        found[task] = record | {"positions": positions, "machine": machine()}
        write(RESULTS, [found[name] for name in sorted(found)])
        print(
            f"{task}: {record['hearing_cpu_seconds']:.1f} s to hear {positions} positions, "
            f"{record['feeling_cpu_seconds']:.1f} s to feel",
            flush=True,
        )


if __name__ == "__main__":
    main()
