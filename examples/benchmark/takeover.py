"""Layers removed from fine-tuned models without a training step: with and without taking over.

    python -m examples.benchmark.takeover [--tasks trec-6] [--seeds 0 1 2]
    python -m examples.benchmark.takeover --table

The fine-tuned models are those of all one-shot comparisons; layers are compared, and inputs stored,
on the validation split. Records go to ``examples/benchmark/results/takeover.json``.
"""

import argparse
import copy
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from examples.benchmark.finetuned import RECIPES, finetuned
from examples.benchmark.layer_tables import takeover_table
from examples.benchmark.oneshot import machine, score
from examples.benchmark.records import load, write
from lightning_mi_prune import Thinning, find_stacks
from lightning_mi_prune.anatomy import Anatomy
from lightning_mi_prune.sample import Heard
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.stacks import StackListeners
from lightning_mi_prune.surgery import operate
from lightning_mi_prune.takeover import take_over

RESULTS = Path(__file__).parent / "results" / "takeover.json"
LAYERS = (5, 4, 3)
POSITIONS = 16_384


def measure(task: str, seed: int) -> list[dict[str, Any]]:
    """Test a fine-tuned model without some of its layers, each number with and without."""
    model, data = finetuned(task, seed)
    validation, test = list(data.val_dataloader()), list(data.test_dataloader())
    (stack,) = find_stacks(model)
    anatomy = Anatomy(stacks=(stack,))
    listener = StackListeners(
        model, [stack], seed=seed, calls=POSITIONS, batches=len(validation), positions=256
    )
    with torch.no_grad(), listener:
        for batch in validation:
            listener.start_batch()
            model(**batch)
    compared = listener.compared(anatomy.full)[stack.name]
    dense, _ = score(model, test)
    found = []
    for layers in LAYERS:
        cut = Thinning(None, target=layers).choose(stack.name, compared)
        plan = anatomy.without(anatomy.full, {stack.name: cut.after})
        for refit in (False, True):
            started, selection = time.perf_counter(), Selection(plan, {}, {})
            if refit:
                heard = Heard(ranks=[listener.stored])
                selection = take_over(
                    model, anatomy, anatomy.full, selection, heard, positions=POSITIONS
                )
            seconds = time.perf_counter() - started
            shorter = copy.deepcopy(model)
            operate(shorter, anatomy, plan, current=anatomy.full, folded=selection.folded)
            accuracy, cross_entropy = score(shorter.eval(), test)
            found.append(
                {
                    "task": task,
                    "model": RECIPES[task].model,
                    "seed": seed,
                    "layers": layers,
                    "removed": cut.removed,
                    "refit": refit,
                    "n_test": sum(len(batch["labels"]) for batch in test),
                    "accuracy": accuracy,
                    "dense_accuracy": dense,
                    "cross_entropy": cross_entropy,
                    "seconds": seconds,
                    "machine": machine(),
                }
            )
            print(task, seed, layers, refit, f"{accuracy:.4f} of {dense:.4f}", flush=True)
    return found


def main() -> None:
    """Measure the models that have no records, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["trec-6"], choices=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print the table, as markdown")
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    for task in asked.tasks if not asked.table else ():
        for seed in asked.seeds:
            records = load(RESULTS)
            if (task, seed) not in {(r["task"], r["seed"]) for r in records}:
                write(RESULTS, [*records, *measure(task, seed)])
    print(takeover_table(load(RESULTS)))


if __name__ == "__main__":
    main()
