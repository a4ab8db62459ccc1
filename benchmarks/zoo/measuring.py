"""Measure one model of the zoo in child processes that cannot hang, and the jobs of the case."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from benchmarks.records import Figures, Job, single
from benchmarks.zoo.checking import check_groups, halved
from benchmarks.zoo.libraries import timm_models, torchvision_models
from benchmarks.zoo.media import media_models
from benchmarks.zoo.models import Inputs, ZooModel, randomized
from benchmarks.zoo.plain import plain_models
from benchmarks.zoo.rival import pruned_by_rival
from benchmarks.zoo.text import text_models
from lightning_mi_prune.discovery.verification import Verifier
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup

__all__ = [
    "KINDS",
    "LIMIT",
    "TimeLimitError",
    "all_models",
    "covered",
    "in_child",
    "prunable",
    "time_limit",
    "used_parameters",
    "zoo",
]

KINDS = ("ffn", "heads", "channels", "hidden")
LIMIT = 30.0  # seconds of processor time for discovery with verification, and for torch-pruning
VERIFYING = 0.7  # of the limit for discovery; recording comes before, stacks of layers after
WALL = 5  # times as long on the clock, as another process may be busy
MEMORY = 8 << 30  # bytes above what the process has when it starts
WARM: tuple[str, ...] = (
    "transformers.generation.utils",
    "transformers.models.bert.modeling_bert",
    "timm",
)
WARM += ("torch_pruning", "lightning_mi_prune.discovery.discover")
PAGES = Path("/proc/self/statm")
SMALL = 3_000_000  # parameters; larger models are not cut kind by kind
SHOWN = 3  # refusals that a record keeps word for word
Send = Callable[[Mapping[str, Any]], None]


class TimeLimitError(BaseException):
    """The processor time of a stage is used up; nothing that catches errors catches it."""


def all_models() -> list[ZooModel]:
    """All models that the installed libraries have, by library."""
    found = [*plain_models(), *text_models(), *media_models()]
    return [*found, *torchvision_models(), *timm_models()]


def zoo(
    models: Sequence[str] | None = None,
    libraries: Sequence[str] | None = None,
    seconds: float = LIMIT,
) -> Iterator[Job]:
    """Groups found and verified in every architecture at hand, beside torch-pruning."""
    _warm()
    for model in all_models():
        if (models is None or model.name in models) and (
            libraries is None or model.library in libraries
        ):
            setting = {"model": model.name, "library": model.library}
            yield single(setting, measured, model, seconds)


def _warm() -> None:
    """Import once what every child would import."""
    for name in WARM:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)


def prunable(model: nn.Module, used: Collection[str] | None = None) -> dict[str, int]:
    """Entries of every prunable parameter, by its first name.

    Prunable are matrices and filters: parameters with two dimensions of more than one entry. The
    tables of embeddings are not, as their rows are tokens or positions, nor what is tied to one.

    Args:
        model: The model.
        used: Names of the parameters that a call uses (:func:`used_parameters`); default: all.

    Example:
        >>> net = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 3))
        >>> prunable(net)
        {'2.weight': 12}
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in tables
        and sum(n > 1 for n in parameter.shape) > 1
        and (used is None or name in used)
    }


def used_parameters(model: nn.Module, inputs: Inputs) -> set[str]:
    """Names of the parameters through which a gradient of any output flows."""
    copied = copy.deepcopy(model)
    found = copied(*inputs.args, **inputs.kwargs)
    plain = found.to_tuple() if hasattr(found, "to_tuple") else found
    outputs = [t for t in tree_flatten(plain)[0] if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.backward([output.sum() for output in outputs])
    return {name for name, p in copied.named_parameters() if p.grad is not None}


def covered(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    kinds: Sequence[str] = KINDS,
    used: Collection[str] | None = None,
) -> float:
    """Share of the prunable parameters that have a dimension in a group of these kinds."""
    every = dict(model.named_parameters(remove_duplicate=False))
    inside = {
        id(every[entry.tensor])
        for group in groups
        for entry in group.tensors
        if group.kind in kinds and entry.tensor in every
    }
    sizes = prunable(model, used)
    total = sum(sizes.values())
    found = sum(size for name, size in sizes.items() if id(every[name]) in inside)
    return found / total if total else 0.0


def measured(model: ZooModel, seconds: float = LIMIT) -> Figures:
    """Everything about one model: built in one process, our side and torch-pruning in two more."""
    found = in_child(partial(_both_sides, model, seconds), 20 * seconds)
    return {"note": model.note, "rival": {"step": "model"}, **found}


def _both_sides(model: ZooModel, limit: float, send: Send) -> None:
    send({"stage": "build"})
    torch.manual_seed(0)
    network = randomized(model.build())
    torch.manual_seed(1)
    inputs = model.inputs()
    send(in_child(partial(_our_side, network, inputs, limit), 7 * limit))
    send({"rival": in_child(partial(_other_side, network, inputs, limit), 2 * limit)})


def _our_side(network: nn.Module, inputs: Inputs, limit: float, send: Send) -> None:
    send({"stage": "discovery"})
    used = used_parameters(network, inputs)
    send({"parameters": _size(network), "prunable": sum(prunable(network, used).values())})
    started = time.process_time()
    with time_limit(limit):
        graph = _discovered(network, inputs, limit)
    send({"seconds": round(time.process_time() - started, 2), **_described(network, graph, used)})
    if not graph.groups:
        send({"stage": "done"})
        return
    send({"stage": "check"})
    with time_limit(4 * limit):
        outcomes = check_groups(network, inputs, graph.groups, every=_size(network) < SMALL)
    send(
        {
            "verdicts": {name: outcome.verdict for name, outcome in outcomes.items()},
            "wrong": {name: o.reason for name, o in outcomes.items() if o.verdict == "wrong"},
            "uncut": {name: o.reason for name, o in outcomes.items() if o.verdict == "refused"},
            "effect": float(f"{min(o.effect for o in outcomes.values()):.2g}"),
            "gradients": sum(outcome.gradients for outcome in outcomes.values()),
            "stage": "half",
        }
    )
    with time_limit(limit):
        cut = halved(network, graph.groups)
        with torch.no_grad():
            cut(*inputs.args, **inputs.kwargs)
    send({"removed": round(1 - _size(cut) / _size(network), 4), "stage": "done"})


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _discovered(network: nn.Module, inputs: Inputs, limit: float) -> PruningGraph:
    """Its own limit is on the clock, which other processes take from; here it is one of work."""
    discovery = importlib.import_module("lightning_mi_prune.discovery.discover")
    run = partial(_call, inputs)
    with patch.object(Verifier, "clock", staticmethod(time.process_time)):
        found: PruningGraph = discovery.discover_run(network, run, seconds=VERIFYING * limit)
    return found


def _call(inputs: Inputs, network: nn.Module) -> Any:
    return network(*inputs.args, **inputs.kwargs)


def _described(network: nn.Module, graph: PruningGraph, used: Collection[str]) -> Figures:
    refused = [f"{r.name} ({r.kind or '?'}, {r.size}): {r.reason}"[:180] for r in graph.refused]
    return {
        "groups": dict(sorted(Counter(group.kind for group in graph.groups).items())),
        "refused": dict(sorted(Counter(r.kind or "?" for r in graph.refused).items())),
        "refusals": refused[:SHOWN],
        "unknown": [*graph.unknown][:SHOWN],
        "stacks": len(graph.stacks),
        "covered": round(covered(network, graph.groups, KINDS, used), 4),
        "covered_without_hidden": round(covered(network, graph.groups, KINDS[:3], used), 4),
    }


def _other_side(network: nn.Module, inputs: Inputs, limit: float, send: Send) -> None:
    report = _Reported(send)
    started = time.process_time()
    with time_limit(limit):
        pruned_by_rival(network, inputs, report)
    send({"seconds": round(time.process_time() - started, 2)})


class _Reported(dict[str, Any]):
    """A report whose entries are sent as they are set."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        self._send({name: value})


# ---------------------------------------------------------------------------------- child processes


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise when this much processor time is used up."""

    def stop(*_: Any) -> None:
        raise TimeLimitError(f"over {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def in_child(work: Callable[[Send], None], seconds: float) -> dict[str, Any]:
    """Run some work in a forked process with limits of time and memory; what it sent.

    Whatever ends it, what was sent before stays, with the reason as ``error``.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, there))
    with warnings.catch_warnings():  # Python 3.12 warns of forks beside threads; none runs here
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    there.close()
    found: dict[str, Any] = {}
    deadline = time.monotonic() + WALL * seconds
    try:
        while here.poll(max(0.0, deadline - time.monotonic())):
            found |= here.recv()
        found["error"] = f"killed after {WALL * seconds:g} s"
    except EOFError:
        process.join()
        if process.exitcode and "error" not in found:
            found["error"] = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return found


def _child(work: Callable[[Send], None], there: Connection) -> None:
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    warnings.simplefilter("ignore")
    if PAGES.exists():
        pages = int(PAGES.read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]  # children set limits of their own
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        work(there.send)
    except BaseException as error:
        there.send({"error": f"{type(error).__name__}: {error}"[:240], "at": _place(error)})


def _place(error: BaseException) -> list[str]:
    """The last files and lines that an error passed through."""
    trace, found = error.__traceback__, []
    while trace is not None:
        code = trace.tb_frame.f_code
        found.append(f"{Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return found[-2:]
