"""Memory, temporary files and time of one call of `prune`, by width and depth of a decoder.

Random weights of Llama's shape: neurons are 3.5 times the hidden size, heads have 64 dimensions and
four of them share keys and values, as in its 8-billion-parameter model. Every size runs in a
process of its own, both ways: with all sums in memory, and with those of one group at a time.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.comparison import row, with_head
from benchmarks.measuring import in_fresh_process
from benchmarks.records import Figures, Job, Record
from benchmarks.scaling import exponent
from lightning_mi_prune import options, prune

__all__ = [
    "EIGHT_BILLION",
    "SHAPES",
    "Shape",
    "by_size",
    "exponents",
    "files_on_paper",
    "memory",
    "memory_on_paper",
    "on_paper",
]

POSITIONS, LENGTH, STEPS = 8192, 128, 8
VOCABULARY, SPARSITY = 512, 0.25
_PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Args:
        hidden: Hidden size.
        layers: Layers.
    """

    hidden: int
    layers: int

    @property
    def neurons(self) -> int:
        """Neurons of a layer."""
        return self.hidden * 7 // 2

    @property
    def cut_parameters(self) -> int:
        """Parameters of heads and neurons."""
        h = self.hidden
        return self.layers * (2 * h * h + h * h // 2 + 3 * h * self.neurons)

    def model(self) -> nn.Module:
        """A random one."""
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=self.hidden // 256,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model.eval()


TINY = Shape(256, 1)
WIDER = (Shape(512, 2), Shape(1024, 2), Shape(1536, 2))
DEEPER = (Shape(256, 2), Shape(256, 4), Shape(256, 8))
SHAPES = (*dict.fromkeys((*WIDER, *DEEPER)),)
EIGHT_BILLION = Shape(4096, 32)


def memory(tiny: bool = False) -> Iterator[Job]:
    """Memory, files and time of one cut, with all sums in memory and with one at a time."""
    for shape in (TINY,) if tiny else SHAPES:
        for way in ("ordinary", "low"):
            setting = {"hidden": shape.hidden, "layers": shape.layers, "memory": way}
            run = partial(_in_process, shape, way, 1024 if tiny else POSITIONS)
            yield Job([setting], 0, run)


def _in_process(shape: Shape, way: str, positions: int) -> list[Figures]:
    return [in_fresh_process(measured, shape, way, positions)]


def measured(shape: Shape, way: Literal["ordinary", "low"], positions: int) -> dict[str, Any]:
    """What one call of `prune` took."""
    _prune(TINY.model(), way, 1024)  # what libraries need once is not counted
    torch.manual_seed(0)
    model = shape.model()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    started = time.process_time()
    with watching() as peak:
        result = _prune(model, way, positions)
    return {
        "model_mb": sum(p.nbytes for p in shape.model().parameters()) / 1e6,
        "peak_mb": peak["memory"] / 1e6,
        "files_mb": peak["files"] / 1e6,
        "cpu_s": time.process_time() - started,
        "positions": positions,
        **{f"{part}_s": seconds for part, seconds in result.seconds.items()},
    }


def _prune(model: nn.Module, way: Literal["ordinary", "low"], positions: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    rows = positions // LENGTH
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    batches = [{"input_ids": part, "labels": part} for part in torch.split(ids, 4)]
    return prune(
        model,
        batches,
        SPARSITY,
        loss=lambda network, batch: network(**batch, use_cache=False).loss,
        forward=lambda network, batch: network(batch["input_ids"], use_cache=False),
        calibration=options.Calibration(positions, STEPS, memory=way),
        reconstruction=options.Reconstruction(positions=positions),
    )


@contextmanager
def watching(every: float = 0.005) -> Iterator[dict[str, int]]:
    """Peaks of a block: memory of its own above what there was, and temporary files, in bytes.

    Files that are mapped do not count as memory: the system takes their room back as it needs.
    """
    before, over = _own_memory(), threading.Event()
    peak = {"memory": 0, "files": 0}

    def look() -> None:
        turn = 0
        while not over.wait(every):
            peak["memory"] = max(peak["memory"], _own_memory() - before)
            if turn % 40 == 0:
                peak["files"] = max(peak["files"], _mapped_files())
            turn += 1

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


def _own_memory() -> int:
    """Resident memory of this process that is in no file, in bytes."""
    lines = (_PROCESS / "status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def _mapped_files() -> int:
    """Size of the temporary files of the package that are open, in bytes."""
    size = 0
    for line in (_PROCESS / "maps").read_text(encoding="utf-8").splitlines():
        if "/lightning_mi_prune-" in line:
            first, last = line.split()[0].split("-")
            size += int(last, 16) - int(first, 16)
    return size


# -------------------------------------------------------------------------------------- on paper


def files_on_paper(shape: Shape, positions: int, itemsize: int) -> int:
    """Bytes of temporary files: samples, gradients, and what is cut twice.

    Args:
        shape: The model.
        positions: Samples.
        itemsize: Bytes of a parameter and of an activation.
    """
    samples = positions * (shape.hidden + shape.neurons) * itemsize
    gradients = (8 + 4 + 8) * 2 * shape.hidden**2  # sums, those of a step, and their mean
    return shape.layers * (samples + gradients) + 2 * shape.cut_parameters * itemsize


def memory_on_paper(shape: Shape) -> int:
    """Bytes of the sums of all groups in double precision, with their gradients."""
    squares = shape.hidden**2 + shape.neurons**2 + 2 * shape.hidden**2
    return 8 * shape.layers * squares


FIGURES = {"peak_mb": "memory, MB", "files_mb": "temporary files, MB", "cpu_s": "CPU s"}
WAYS = ("ordinary", "low")


def growing(
    records: Sequence[Record], way: str, shapes: Sequence[Shape], figure: str
) -> tuple[list[float], list[float]]:
    """Sizes, hidden size or layers, whichever grows, and a figure at each of them."""
    wider = len({shape.hidden for shape in shapes}) > 1
    sizes, values = [], []
    for shape in shapes:
        for r in records:
            if (r["hidden"], r["layers"], r["memory"]) == (shape.hidden, shape.layers, way):
                sizes.append(float(shape.hidden if wider else shape.layers))
                values.append(float(r[figure]))
    return sizes, values


def by_size(records: Sequence[Record]) -> list[str]:
    """Memory beside the model, files and time of one cut, both ways."""
    rows = []
    for shape in SHAPES:
        found = {r["memory"]: r for r in records if (r["hidden"], r["layers"]) == astuple(shape)}
        cells = [f"{shape.hidden:,} / {shape.neurons:,}", str(shape.layers)]
        cells.append(f"{found['low']['model_mb']:,.0f}")
        cells += [f"{found[way]['peak_mb']:,.0f}" for way in WAYS]
        cells.append(f"{found['low']['files_mb']:,.0f}")
        cells += [f"{found[way]['cpu_s']:,.0f}" for way in WAYS]
        rows.append(row(cells))
    head = ["hidden size / neurons", "layers", "model, MB", *(f"{way}, MB" for way in WAYS)]
    return with_head([*head, "files, MB", *(f"{way}, CPU s" for way in WAYS)], rows, 8)


def exponents(records: Sequence[Record]) -> list[str]:
    """Slopes through logarithms of size, and of each figure."""
    rows = []
    for name, label in FIGURES.items():
        cells = [label]
        for shapes in (WIDER, DEEPER):
            for way in WAYS:
                sizes, values = growing(records, way, shapes, name)
                cells.append(f"{exponent(sizes, values):.2f}" if all(values) else "")
        rows.append(row(cells))
    return with_head(["", *(f"{what}, {way}" for what in ("width", "depth") for way in WAYS)], rows)


def further(
    found: tuple[Sequence[float], Sequence[float]], size: float, paper: float
) -> tuple[float, float, float]:
    """The slope between the two largest sizes, and what it and another one give at a larger size.

    Example:
        >>> further(([1.0, 2.0, 4.0], [3.0, 5.0, 20.0]), 8.0, 3)
        (2.0, 80.0, 160.0)
    """
    (*_, first, last), (*_, low, high) = found
    slope = math.log(high / low) / math.log(last / first)
    return slope, high * (size / last) ** slope, high * (size / last) ** paper


def on_paper(records: Sequence[Record]) -> list[str]:
    """What the 8-billion-parameter shape needs, by formulas and by the measured exponents."""
    shape, size = EIGHT_BILLION, 2  # bytes of bfloat16
    by_memory, by_time = (
        further(growing(records, "low", WIDER, figure), shape.hidden, paper)
        for figure, paper in (("peak_mb", 2), ("cpu_s", 3))
    )
    deeper = shape.layers / WIDER[-1].layers
    block = shape.cut_parameters / shape.layers * size
    cells = [
        ("weights that can be cut, bfloat16", f"{shape.cut_parameters * size / 1e9:.1f} GB"),
        ("of one layer", f"{block / 1e9:.2f} GB"),
        ("all sums in memory", f"{memory_on_paper(shape) / 1e9:.1f} GB"),
        ("sums of the widest input", f"{8 * shape.neurons**2 / 1e9:.2f} GB"),
        (
            f"memory beside the model, `low`, by the slope {by_memory[0]:.2f} between the two "
            "widest, or the square of the width",
            f"{by_memory[1] / 1e3:.1f} or {by_memory[2] / 1e3:.1f} GB",
        ),
        (
            "temporary files, 16,384 positions",
            f"{files_on_paper(shape, 16_384, size) / 1e9:.0f} GB",
        ),
        (
            f"time on one core, 8,192 positions, by the slope {by_time[0]:.2f} between the two "
            "widest, or the cube of the width",
            f"{by_time[1] * deeper / 3600:.0f} or {by_time[2] * deeper / 3600:.0f} hours",
        ),
    ]
    return with_head(["32 layers of 4,096 / 14,336", ""], [row([*cell]) for cell in cells])
