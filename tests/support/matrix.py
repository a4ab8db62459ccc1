"""Strategy x precision x optimizer x resume point, and what is refused.

``python -m tests.support.matrix`` writes docs/matrix.md; with ``--refused`` it only updates the
errors, which takes seconds. Every cell is a run that was stopped at a point, resumed from its
checkpoint with ``weights_only=True``, and compared with an uninterrupted run after every epoch, bit
for bit.
"""

from __future__ import annotations

import logging
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_mi_prune.callbacks.distributed import refuse_compiled, refuse_unsupported
from lightning_mi_prune.surgery.optimizer_state import check_optimizers
from tests.support.boring import Classifier
from tests.support.ranks import launch
from tests.support.runs import OPTIMIZERS, POINTS, PRECISIONS, resumed_equals_straight

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"
Row = tuple[str, str]  # precision and optimizer
EVERY: list[Row] = [(precision, optimizer) for precision in PRECISIONS for optimizer in OPTIMIZERS]
EACH: list[Row] = [("32-true", optimizer) for optimizer in OPTIMIZERS] + [
    (precision, "adamw") for precision in PRECISIONS if precision != "32-true"
]
STRATEGIES: dict[str, tuple[int, list[Row]]] = {
    "one process": (1, EVERY),
    "ddp, 2 ranks": (2, EVERY),
    "ddp, 4 ranks": (4, [("32-true", "adamw")]),
}
# DDP sums its first step after a start in other buckets than later ones. The order of two summands
# does not matter, of four it does; with this option it keeps its buckets.
_DDP = {2: "ddp", 4: "ddp_find_unused_parameters_true"}
Found = dict[Row, dict[str, str]]


def pairs(rows: list[Row], count: int = 2) -> dict[Row, list[str]]:
    """Points for each row, so that all pairs are covered.

    Over the rows of :data:`EVERY`, each precision and each optimizer meets each point: every pair
    of values of the three is in some run, in a third of the time that all cells take.
    """
    names = list(POINTS)
    precisions, optimizers = list(PRECISIONS), list(OPTIMIZERS)
    found = {}
    for precision, optimizer in rows:
        first = count * precisions.index(precision) + optimizers.index(optimizer)
        found[precision, optimizer] = [names[(first + k) % len(names)] for k in range(count)]
    return found


def compare(
    folder: Path, world: int, rows: Iterable[Row], points: dict[Row, list[str]] | None = None
) -> Found:
    """For every precision and optimizer, what differs at each point ("" if nothing)."""
    found = {}
    for precision, optimizer in rows:
        wanted = POINTS if points is None else {n: POINTS[n] for n in points[precision, optimizer]}
        place = folder / f"{world} {precision} {optimizer}"
        place.mkdir(parents=True, exist_ok=True)
        strategy = {"strategy": _DDP[world], "devices": world} if world > 1 else {}
        found[precision, optimizer] = resumed_equals_straight(
            place, wanted, precision=precision, optimizer=optimizer, **strategy
        )
    return found


def run(
    folder: Path, world: int, rows: list[Row], points: dict[Row, list[str]] | None = None
) -> Found:
    """The same over ranks; what one of them sees to differ, differs."""
    if world == 1:
        return compare(folder, 1, rows, points)
    ranks = launch(world, compare, folder, world, rows, points)
    return {
        row: {p: "; ".join({r[row][p] for r in ranks.values()} - {""}) for p in ranks[0][row]}
        for row in rows
    }


class EightBit(torch.optim.AdamW):
    """Shaped like the 8-bit optimizers of bitsandbytes, which keep their width in ``args``."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.args = SimpleNamespace(optim_bits=8)


def _strategy(kind: type, **options: Any) -> Callable[[], None]:
    found = kind.__new__(kind)
    vars(found).update({"_start_method": "popen", **options})
    stub = SimpleNamespace(strategy=found, callbacks=[])
    return lambda: refuse_unsupported(stub)


def _callback(make: Callable[[], Any]) -> Callable[[], None]:
    from tests.support.boring import trainer

    return lambda: refuse_unsupported(trainer(make()))


def _optimizer(make: Callable[[Any], Any]) -> Callable[[], None]:
    def check() -> None:
        parameters = list(Classifier().parameters())
        check_optimizers([make(parameters)], parameters)

    return check


def _compiled() -> None:
    module = Classifier()
    module.model = torch.compile(module.model)
    refuse_compiled(module, ["model._orig_mod.bert.encoder.layer.0.intermediate.dense"])


class Wrapping(torch.optim.Optimizer):
    """Shaped like ZeRO, SAM and Lookahead, which hold another optimizer."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.optim = torch.optim.AdamW(parameters)


REFUSED: dict[str, Callable[[], None]] = {
    "FSDP": _strategy(FSDPStrategy),
    "FSDP2, tensor parallel": _strategy(ModelParallelStrategy),
    "DeepSpeed": _strategy(DeepSpeedStrategy),
    "XLA": _strategy(XLAStrategy),
    "ddp_spawn": _strategy(DDPStrategy, _start_method="spawn"),
    "ddp_fork, ddp_notebook": _strategy(DDPStrategy, _start_method="fork"),
    "stochastic weight averaging": _callback(lambda: StochasticWeightAveraging(1e-2)),
    "EMA": _callback(EMAWeightAveraging),
    "Lightning's ModelPruning": _callback(lambda: ModelPruning("l1_unstructured", amount=0.5)),
    "torch.compile before pruning": _compiled,
    "LBFGS": _optimizer(torch.optim.LBFGS),
    "8-bit optimizers": _optimizer(EightBit),
    "ZeRO, SAM, Lookahead": _optimizer(Wrapping),
}


def sentence(refused: Callable[[], None]) -> str:
    """What is said when it is refused."""
    try:
        refused()
    except Exception as error:
        return str(error)
    return "not refused"


def page(results: dict[str, Found], seconds: float) -> str:
    """The tables of docs/matrix.md."""
    points = list(POINTS)
    cells = sum(len(row) for found in results.values() for row in found.values())
    good = sum(not c for f in results.values() for row in f.values() for c in row.values())
    lines = [
        "# What can be stopped and resumed",
        "",
        "Written by `make matrix`. Every cell is a run of four epochs, with cuts at the start of",
        "the second and third, that was stopped at a point, resumed from its checkpoint",
        "(`weights_only=True`) and compared with a run that was not stopped, after every later",
        "epoch and on every rank: weights, optimizer state, learning rates, plan, metrics and",
        "cuts, bit for bit. `=` means equal. Batches come from a loader that can resume inside an",
        "epoch.",
        "",
        f"{good} of {cells} cells are equal. {_machine()}, {seconds / 60:.1f} minutes, one",
        "thread per process. fp16 (`16-mixed`) runs with a GradScaler on the CPU; no GPU was used.",
        "",
    ]
    for strategy, found in results.items():
        lines += [f"## {strategy}", "", "| precision | optimizer | " + " | ".join(points) + " |"]
        lines += ["|---" * (2 + len(points)) + "|"]
        for (precision, optimizer), row in found.items():
            marks = " | ".join(row[point] or "=" for point in points)
            lines.append(f"| {precision} | {optimizer} | {marks} |")
        lines.append("")
    return "\n".join(lines) + "\n" + refusals()


def refusals() -> str:
    """The last part of the page."""
    lines = ["## Refused", "", "With an error in `setup` or before the first cut:", ""]
    lines += ["| what | error |", "|---|---|"]
    lines += [f"| {name} | {sentence(refused)} |" for name, refused in REFUSED.items()]
    return "\n".join(lines) + "\n"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    cpu = names[0].partition(":")[2].strip() if names else platform.processor()
    return f"{cpu}, torch {torch.__version__}"


def main() -> None:
    """Run every cell and write the page."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if "--refused" in sys.argv:
        cells, _, _ = PAGE.read_text(encoding="utf-8").partition("## Refused")
        PAGE.write_text(cells + refusals(), encoding="utf-8")
        return
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            strategy: run(Path(folder), world, rows)
            for strategy, (world, rows) in STRATEGIES.items()
        }
    PAGE.write_text(page(results, time.perf_counter() - started), encoding="utf-8")


if __name__ == "__main__":
    main()
