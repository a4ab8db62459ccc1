"""Latency and size of a classifier as it is served: by PyTorch and by ONNX Runtime, and in int8.

To be run on an idle machine. Latency and size depend on shapes, not on weights, so models have
random ones and no classifier is needed. All ways of serving both models take turns.
"""

from __future__ import annotations

import copy
import importlib
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from benchmarks.latency import BATCHES, config_of, shaped
from benchmarks.measuring import spread
from benchmarks.records import Figures, Job, Store, cpu_name, single
from benchmarks.subjects import Kept
from benchmarks.tasks import Batch, token_ids
from lightning_mi_prune import from_pretrained, save_pretrained
from lightning_mi_prune.export.onnx import export_onnx

__all__ = ["BACKEND", "WAYS", "deploy", "opening", "served"]

WAYS = {
    "eager": "PyTorch",
    "compiled": "`torch.compile`",
    "int8": "PyTorch, dynamic int8",
    "onnx": "ONNX Runtime",
    "onnx-int8": "ONNX Runtime, dynamic int8",
}
"""The ways to serve a model, as records and pages name them."""
BACKEND = "inductor"  # of `torch.compile`
MINE = {"method": "relevance-mi", "widths": "global", "weights": "reconstruction"}
CLASSES, LENGTH = 6, 32
TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TINY_KEPT: Kept = {"heads": [2, 0], "ffn": [0, 16]}

Run = Callable[[Batch], Tensor]


def deploy(
    folder: Path,
    sparsities: Sequence[float] = (0.75,),
    tiny: bool = False,
    seconds: float = 10.0,
    rounds: int = 20,
) -> Iterator[Job]:
    """Latency and size of MiniLM, dense and pruned: PyTorch, compiled, ONNX Runtime, and int8.

    Raises:
        LookupError: If no record of `recovery` has the widths.
    """
    for sparsity in sparsities:
        setting: dict[str, Any] = {"task": "tiny" if tiny else "trec-6"}
        setting |= {"sparsity": sparsity, "length": LENGTH}
        kept = TINY_KEPT
        if not tiny:
            about: dict[str, Any] = {"task": "trec-6", "seed": 0, "steps": 0} | MINE
            about |= {"sparsity": sparsity}
            same = Store("recovery", folder).find(**about)
            if not same:
                raise LookupError(f"no record of {about}: run `python -m benchmarks run recovery`")
            kept = same[0]["kept"]
        setting |= {"cpu": cpu_name(), "threads": torch.get_num_threads(), "kept": kept}
        yield single(setting, measured, kept, tiny, seconds, rounds)


def opening(
    folder: Path, sparsities: Sequence[float] = (0.75,), tiny: bool = False, rounds: int = 60
) -> Iterator[Job]:
    """Milliseconds to open the folder of a pruned MiniLM, and of an uncut model as large."""
    for job in deploy(folder, sparsities, tiny):
        (setting,) = job.settings
        known = {name: value for name, value in setting.items() if name != "length"}
        yield single(known, opened, setting["kept"], tiny, rounds)


def opened(kept: Kept, tiny: bool, rounds: int) -> Figures:
    """Both folders, opened in turn with the class of the model; the uncut one by transformers."""
    torch.manual_seed(0)
    pruned = shaped(_config(tiny), kept)
    wanted = sum(p.numel() for p in pruned.parameters())
    plain = _config(tiny)
    # A head less, so that there is room for neurons.
    plain.hidden_size -= plain.hidden_size // plain.num_attention_heads
    plain.num_attention_heads -= 1
    none, one = (_parameters_at(plain, width) for width in (0, 1))
    plain.intermediate_size = max(1, round((wanted - none) / (one - none)))
    uncut = BertForSequenceClassification(plain)
    with tempfile.TemporaryDirectory() as place:
        save_pretrained(pruned, Path(place, "pruned"))
        uncut.save_pretrained(Path(place, "uncut"))
        ways: dict[str, Callable[[], Any]] = {
            "uncut": partial(BertForSequenceClassification.from_pretrained, f"{place}/uncut"),
            "pruned": partial(from_pretrained, BertForSequenceClassification, f"{place}/pruned"),
            "uncut_auto": partial(
                AutoModelForSequenceClassification.from_pretrained, f"{place}/uncut"
            ),
            "auto": partial(AutoModelForSequenceClassification.from_pretrained, f"{place}/pruned"),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                times[name].append(1000 * (time.perf_counter() - started))
    ratios = [new / old for new, old in zip(times["pruned"], times["uncut"], strict=True)]
    sizes = {"pruned": wanted, "uncut": sum(p.numel() for p in uncut.parameters())}
    return {
        "rounds": rounds,
        "parameters": sizes,
        "ratio": statistics.median(ratios),
        **{f"{name}_ms": spread(values) for name, values in times.items()},
    }


def _config(tiny: bool) -> Any:
    return BertConfig(**TINY, num_labels=CLASSES) if tiny else config_of("trec-6", CLASSES)


def _parameters_at(config: Any, width: int) -> int:
    """Parameters of an uncut classifier with so many neurons in each layer."""
    sized = copy.deepcopy(config)
    sized.intermediate_size = width
    with torch.device("meta"):
        return sum(p.numel() for p in BertForSequenceClassification(sized).parameters())


def measured(kept: Kept, tiny: bool, seconds: float, rounds: int) -> Figures:
    """Both models in every way, in turn."""
    torch.manual_seed(0)
    networks = {"dense": shaped(_config(tiny)), "pruned": shaped(_config(tiny), kept)}
    torch.compiler.reset()
    with tempfile.TemporaryDirectory() as folder:
        calls: dict[tuple[str, str], Run] = {}
        found: dict[str, dict[str, Any]] = {}
        for name, network in networks.items():
            place = Path(folder, name)
            place.mkdir()
            runs, sizes = served(network, place)
            calls |= {(name, way): run for way, run in runs.items()}
            found[name] = {
                way: {"mb": size / 1e6, "difference": difference(runs, way)}
                for way, size in sizes.items()
            }
        for rows in BATCHES:
            timed = take_turns(calls, token_ids(rows, LENGTH), seconds, rounds)
            for (name, way), ms in timed.items():
                found[name][way][f"ms_b{rows}"] = ms
    onnx, runtime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    about = {"rounds": rounds, "onnx": onnx.__version__, "onnxruntime": runtime.__version__}
    return about | {
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in networks.items()},
        **found,
    }


def served(network: nn.Module, folder: Path) -> tuple[dict[str, Run], dict[str, int]]:
    """Every way to run a network, and the bytes of the file that each needs."""
    torch.save(network.state_dict(), folder / "eager.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that its int8 will move to torchao
        quantize: Any = torch.ao.quantization.quantize_dynamic
        rounded = quantize(copy.deepcopy(network), {nn.Linear}, dtype=torch.qint8)
    torch.save(rounded.state_dict(), folder / "int8.pt")
    export_onnx(network, folder / "onnx.onnx", token_ids(3, LENGTH))
    logging.getLogger().setLevel(logging.ERROR)  # its quantizer recommends another of its tools
    quantization: Any = importlib.import_module("onnxruntime.quantization")
    # In 7 bits, as PyTorch does: sums of products of 8 bits saturate on processors without VNNI.
    quantization.quantize_dynamic(
        folder / "onnx.onnx", folder / "onnx-int8.onnx", reduce_range=True
    )
    files = {way: folder / f"{way}.onnx" for way in ("onnx", "onnx-int8")}
    compiled = torch.compile(network, dynamic=False, backend=BACKEND)
    networks = {"eager": network, "compiled": compiled, "int8": rounded}
    runs = {way: in_torch(each) for way, each in networks.items()}
    runs |= {way: in_runtime(path) for way, path in files.items()}
    files |= {"eager": folder / "eager.pt", "compiled": folder / "eager.pt"}
    files |= {"int8": folder / "int8.pt"}
    return runs, {way: files[way].stat().st_size for way in WAYS}


def in_torch(network: Any) -> Run:
    """A call of a module."""

    def run(inputs: Batch) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(**inputs).logits
            return logits

    return run


def in_runtime(path: Path) -> Run:
    """A call of a file in ONNX Runtime, with as many threads as PyTorch has."""
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(inputs: Batch) -> Tensor:
        (logits,) = session.run(["logits"], {name: x.numpy() for name, x in inputs.items()})
        return torch.from_numpy(logits)

    return run


def difference(runs: Mapping[str, Run], way: str) -> float:
    """How far the logits of some texts are from PyTorch's, relative to their size."""
    inputs = token_ids(2, LENGTH)
    inputs["input_ids"] = torch.arange(2 * LENGTH).view(2, LENGTH) + 5
    plain = runs["eager"](inputs)
    return float((runs[way](inputs) - plain).norm() / plain.norm())


def take_turns(
    calls: Mapping[tuple[str, str], Run], inputs: Batch, seconds: float, rounds: int
) -> dict[tuple[str, str], dict[str, float]]:
    """Milliseconds of each call: the median of every round, and their median, min and max."""
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    for call in calls.values():
        call(inputs)  # compiles
    for _ in range(rounds):
        for name, call in calls.items():
            known = {"call": call, "inputs": inputs}
            timer = Timer("call(inputs)", globals=known, num_threads=threads)
            times[name].append(1e3 * timer.blocked_autorange(min_run_time=seconds / rounds).median)
    return {name: spread(values) for name, values in times.items()}
