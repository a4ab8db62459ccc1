"""The demo with several seeds: split, head and order of training change with the seed.

    python -m benchmarks.seeds

Runs the demo's own command once a seed and gathers the reports in
``benchmarks/results/demo.json``; seeds that are there already are not run again.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measuring import cpu_name

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).parent / "results" / "demo.json"
CONFIG = "examples/text_classification/demo.yaml"


def run(seed: int) -> dict[str, Any]:
    """One demo; its report without the details of each cut."""
    name = f"demo-seed-{seed}"
    options = ["--seed_everything", str(seed), "--data.seed", str(seed), "--name", name]
    command = [sys.executable, "-m", "examples.text_classification", "fit", "--config", CONFIG]
    subprocess.run([*command, *options], check=True)  # noqa: S603
    report = json.loads(Path("runs", name, "report.json").read_text(encoding="utf-8"))
    seconds = [cut["seconds"] for cut in report.pop("cuts")]
    machine = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    return {"seed": seed, "machine": machine, **report, "seconds": seconds}


def summary(records: list[dict[str, Any]]) -> dict[str, list[float]]:
    """What the table shows, a value a seed."""
    values = {
        "dense accuracy, %": [100 * r["before"]["metrics"]["accuracy"] for r in records],
        "pruned accuracy, %": [100 * r["after"]["metrics"]["accuracy"] for r in records],
    }
    pairs = zip(values["pruned accuracy, %"], values["dense accuracy, %"], strict=True)
    values["difference, points"] = [pruned - dense for pruned, dense in pairs]
    for i, size in enumerate((1, 32)):
        values[f"encoder speed-up, batch {size}"] = [
            r["before"]["latency_ms"][i]["median"] / r["after"]["latency_ms"][i]["median"]
            for r in records
        ]
    shares = [sum(sum(cut.values()) for cut in r["seconds"]) for r in records]
    times = [record["after"]["fit_seconds"] for record in records]
    values["pruning, % of the time of training"] = [
        100 * share / whole for share, whole in zip(shares, times, strict=True)
    ]
    values["training, seconds"] = times
    values["dense training, seconds"] = [record["before"]["fit_seconds"] for record in records]
    return values


def main() -> None:
    """Run what is missing, write the records, print the spread over the seeds."""
    records = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    for seed in SEEDS:
        if seed not in {record["seed"] for record in records}:
            records.append(run(seed))
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    table = Table(title=f"{len(records)} seeds, {records[0]['test_rows']} test rows each")
    for name in ("", "median", "min", "max"):
        table.add_column(name)
    for name, values in summary(records).items():
        spread = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{value:.2f}" for value in spread))
    Console().print(table)


if __name__ == "__main__":
    main()
