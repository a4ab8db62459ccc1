"""Seconds and memory of every step of a cut, for MiniLM-L6 and BERT-base shapes.

    python -m benchmarks.cost

Weights and data are random: the time depends on shapes only. Every shape runs in a process of its
own, so that peak memory is its own. Results go to ``benchmarks/results/cost.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.measuring import (
    in_fresh_process,
    machine,
    peak_memory,
    spread,
    timed,
    write,
)
from lightning_mi_prune import (
    Budget,
    GradientListener,
    Listener,
    Method,
    MutualInformation,
    Plan,
    Ranking,
    WidthAxis,
    apply,
    find_axes,
    rank_axes,
    select,
)
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.competition import allot
from lightning_mi_prune.costs import ParameterCosts
from lightning_mi_prune.method import pull_back
from lightning_mi_prune.sample import Heard

SHAPES = {
    "MiniLM-L6": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "BERT-base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
}
SPARSITY, POSITIONS, BATCH, LENGTH, REPEATS = 0.5, 16_384, 32, 64, 3
RESULTS = Path(__file__).parent / "results" / "cost.json"


def build(shape: Mapping[str, int]) -> nn.Module:
    """A random BERT of the given shape, with twelve heads."""
    torch.manual_seed(0)
    config = BertConfig(**shape, num_attention_heads=12, vocab_size=1000)
    model: nn.Module = BertForSequenceClassification(config)
    return model.eval()


def halved(axes: Sequence[WidthAxis]) -> Plan:
    """The plan that keeps the first half of every axis."""
    sizes = {axis.name: axis.size for axis in axes}
    return Plan(sizes, {name: tuple(range(size // 2)) for name, size in sizes.items()})


def measure(shape: str) -> dict[str, float]:
    """One pass of the whole method; seconds by step, bytes of the sums, peak memory."""
    model = build(SHAPES[shape])
    axes = find_axes(model)
    chosen = choose_axes(axes)
    ids = torch.randint(5, 1000, (BATCH, LENGTH))
    batches = -(-POSITIONS // (BATCH * LENGTH))
    method = Method(Budget(sparsity=SPARSITY))

    def validate() -> None:
        with torch.inference_mode():
            for _ in range(batches):
                model(ids)

    validate()  # the first pass is slower, which listening would seem to save
    result = {"validation_s": timed(validate)}
    result |= steps_of(model, chosen, ids)
    before = peak_memory()
    with Listener(
        model, chosen, positions=POSITIONS, batches=batches, calls=method.refit_positions
    ) as heard:
        result["listening_s"] = timed(validate) - result["validation_s"]
    states = [t for m in heard.moments.values() for t in vars(m).values() if isinstance(t, Tensor)]
    result["moments_mb"] = sum(t.nbytes for t in states) / 1e6
    weights, plan = dict(model.named_parameters()), full_plan(axes)
    found = Heard(heard.moments, ranks=[heard.stored])
    rankings: dict[str, Ranking] = {}

    def rank(criterion: MutualInformation) -> None:
        rankings.update(
            rank_axes(chosen, found.moments, weights, plan, criterion, relevance="readers")
        )

    for criterion in (MutualInformation("topk"), MutualInformation("conditional", ridge=1.0)):
        result[f"order_{criterion.selection}_s"] = timed(partial(rank, criterion))
    costs = ParameterCosts(chosen)
    started = time.perf_counter()
    widths = allot(chosen, method.budget, costs=costs, rankings=rankings)
    selection = select(chosen, found.moments, weights, widths, plan, rankings=rankings)
    result["choosing_s"] = time.perf_counter() - started
    found.moments = {}
    heard.moments.clear()
    started = time.perf_counter()
    selection = pull_back(model, axes, plan, selection, method, found)
    result["refit_s"] = time.perf_counter() - started
    result["cutting_s"] = timed(partial(apply, model, axes, selection.plan))
    return result | {"peak_above_model_mb": (peak_memory() - before) / 1e6}


def steps_of(model: nn.Module, axes: list[WidthAxis], ids: Tensor) -> dict[str, float]:
    """A training step (forward and backward) without and with gradients being felt, in turn."""
    plain, felt = [], []
    labels = torch.zeros(len(ids), dtype=torch.long)

    def step() -> None:
        model(ids, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    listener = GradientListener(model, axes)
    for index in range(3):
        plain.append(timed(step))
        with listener, listener.step(index):
            felt.append(timed(step))
    return {"step_s": statistics.median(plain), "felt_step_s": statistics.median(felt)}


def main(given: Sequence[str] | None = None) -> None:
    """Measure every shape, print a table, write the records."""
    parser = argparse.ArgumentParser("benchmarks.cost", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--repeats", type=int, choices=range(1, 10), default=REPEATS)
    repeats = parser.parse_args(given).repeats
    records: list[dict[str, Any]] = []
    for shape in SHAPES:
        runs = [in_fresh_process(measure, shape) for _ in range(repeats)]
        record: dict[str, Any] = {"shape": shape, "repeats": repeats}
        record |= {key: spread([run[key] for run in runs]) for key in runs[0]}
        records.append(record)
    settings = {"sparsity": SPARSITY, "positions": POSITIONS, "batch": BATCH, "length": LENGTH}
    write(RESULTS, {"machine": machine(), "settings": settings, "records": records})
    print_records(records)


def print_records(records: list[dict[str, Any]]) -> None:
    """Medians, with the range of the repeats."""
    keys = [key for key in records[0] if isinstance(records[0][key], dict)]
    table = Table(title=f"Median of {records[0]['repeats']} runs (min - max)")
    for name in ("shape", *keys):
        table.add_column(name)
    for record in records:
        cells = ["{median:.1f} ({min:.1f} - {max:.1f})".format(**record[key]) for key in keys]
        table.add_row(record["shape"], *cells)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
