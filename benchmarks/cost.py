"""Seconds and memory of listening, scoring and cutting, for MiniLM-L6 and BERT-base shapes.

    python -m benchmarks.cost

Weights and data are random: the time depends on shapes only. Every shape runs in a process of its
own, so that peak memory is its own. Results go to ``benchmarks/results/cost.json``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_mi_prune import Listener, MutualInformation, apply, find_axes, select
from lightning_mi_prune.axes import choose_axes, full_plan
from lightning_mi_prune.budget import uniform_widths

SHAPES = {
    "MiniLM-L6": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "BERT-base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
}
SPARSITY, POSITIONS, BATCH, LENGTH, REPEATS = 0.5, 16_384, 32, 64, 3
RESULTS = Path(__file__).parent / "results" / "cost.json"


def build(shape: str) -> nn.Module:
    """A random BERT of a known shape, with twelve heads."""
    torch.manual_seed(0)
    config = BertConfig(**SHAPES[shape], num_attention_heads=12, vocab_size=1000)
    model: nn.Module = BertForSequenceClassification(config)
    return model.eval()


def measure(shape: str) -> dict[str, float]:
    """One pass of the whole method; seconds by step, bytes of the sums, peak memory."""
    model = build(shape)
    axes = choose_axes(find_axes(model))
    ids = torch.randint(5, 1000, (BATCH, LENGTH))
    batches = -(-POSITIONS // (BATCH * LENGTH))

    def validate() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            for _ in range(batches):
                model(ids)
        return time.perf_counter() - started

    plain = validate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with Listener(model, axes, positions=POSITIONS, batches=batches) as heard:
        listened = validate()
    states = [t for m in heard.moments.values() for t in vars(m).values() if isinstance(t, Tensor)]
    result = {
        "validation_s": plain,
        "listening_s": listened - plain,
        "moments_mb": sum(t.nbytes for t in states) / 1e6,
    }
    widths = uniform_widths(axes, SPARSITY)
    weights = dict(model.named_parameters())
    for criterion in (MutualInformation("topk"), MutualInformation("conditional")):
        started = time.perf_counter()
        chosen = select(axes, heard.moments, weights, widths, full_plan(axes), criterion)
        result[f"{criterion.selection}_s"] = time.perf_counter() - started
    started = time.perf_counter()
    apply(model, axes, chosen.plan, folded=chosen.folded)
    result["cutting_s"] = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result | {"peak_above_model_mb": (peak - before) / 1e6}


def job(arguments: tuple[str, int]) -> dict[str, float]:
    """`measure` in a fresh process."""
    shape, threads = arguments
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    return measure(shape)


def main() -> None:
    """Measure every shape, print a table, write the records."""
    threads = torch.get_num_threads()
    records: list[dict[str, Any]] = []
    for shape in SHAPES:
        runs = []
        for _ in range(REPEATS):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                runs.append(pool.apply(job, ((shape, threads),)))
        record: dict[str, Any] = {"shape": shape, "repeats": REPEATS}
        for key in runs[0]:
            values = [run[key] for run in runs]
            record[key] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
            }
        records.append(record)
    machine = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    settings = {"sparsity": SPARSITY, "positions": POSITIONS, "batch": BATCH, "length": LENGTH}
    RESULTS.parent.mkdir(exist_ok=True)
    body = {"machine": machine, "settings": settings, "records": records}
    RESULTS.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
    print_records(records)


def cpu_name() -> str:
    """Model of the processor."""
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0].partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_records(records: list[dict[str, Any]]) -> None:
    """Medians, with the range of the repeats."""
    keys = [key for key in records[0] if isinstance(records[0][key], dict)]
    table = Table(title=f"Median of {REPEATS} runs (min - max)")
    for name in ("shape", *keys):
        table.add_column(name)
    for record in records:
        cells = ["{median:.1f} ({min:.1f} - {max:.1f})".format(**record[key]) for key in keys]
        table.add_row(record["shape"], *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
