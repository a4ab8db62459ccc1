"""Stacks of layers: containers whose children run one after another in a recorded call."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from lightning_mi_prune.discovery.expressions import resolve
from lightning_mi_prune.discovery.recording import ModuleCall, Recording
from lightning_mi_prune.discovery.tracing import Trace

__all__ = [
    "find_chains",
    "item_of",
]


def find_chains(model: nn.Module, recording: Recording, trace: Trace) -> dict[str, int]:
    """Containers of layers of one class, each called once, on the output of the one before.

    The first output of a layer is the first input of the next one, and both have the same
    dimensions, so that any layer can go.

    Args:
        model: The module that was called.
        recording: Its recording.
        trace: The trace of all its operators.

    Returns:
        The number of layers by path of the container, outer containers first.
    """
    calls: dict[str, list[ModuleCall]] = defaultdict(list)
    for call in recording.calls:
        calls[call.path].append(call)
    found = {}
    for path, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or len(container) < 2:
            continue
        names = [f"{path}.{name}" if path else name for name in container._modules]
        kinds = {type(layer) for layer in container}
        each = [calls.get(name, []) for name in names]
        if len(kinds) > 1 or any(len(c) != 1 or not c[0].inputs or not c[0].outputs for c in each):
            continue
        if len(set(map(id, container))) == len(container) and _follows(
            [c[0] for c in each], trace
        ):
            found[path] = len(container)
    return found


def _follows(calls: list[ModuleCall], trace: Trace) -> bool:
    """Whether each call receives what the one before returned, and returns the like of it."""
    for before, after in zip(calls, calls[1:], strict=False):
        given, taken = before.outputs[0], after.inputs[0]
        if trace.root(given) != trace.root(taken) or given.shape != taken.shape:
            return False
    for call in calls:
        first, last = call.inputs[0], call.outputs[0]
        if first.shape != last.shape or any(
            resolve(a) is not resolve(b) and a.size > 1
            for a, b in zip(trace.dims(first), trace.dims(last), strict=True)
            if not _is_data(a) and not _is_data(b)
        ):
            return False
    return True


def _is_data(dim: object) -> bool:
    reasons = getattr(dim, "reasons", None)
    return bool(reasons) and "data" in reasons


def item_of(path: str, stacks: dict[str, int]) -> str:
    """Path of the innermost layer of a stack that a path is in; "" if it is in none.

    Example:
        >>> item_of("encoder.layer.3.output.dense", {"encoder.layer": 12})
        'encoder.layer.3'
    """
    best = ""
    for stack in stacks:
        stem = f"{stack}." if stack else ""
        if path.startswith(stem):
            item = stem + path[len(stem) :].partition(".")[0]
            best = item if len(item) > len(best) else best
    return best
