"""Stacks of layers: containers whose children run one after another in a recorded call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile

from torch import nn

from lightning_mi_prune.discovery.tracing.expressions import Expression, atoms_of
from lightning_mi_prune.discovery.tracing.recording import ModuleCall, Recording
from lightning_mi_prune.discovery.tracing.trace import DATA, Trace

__all__ = [
    "find_chains",
    "item_of",
    "shared_path",
]


def find_chains(model: nn.Module, recording: Recording, trace: Trace) -> dict[str, tuple[int, int]]:
    """Containers of layers of one class, each called on the output of the one before.

    The first output of a layer is the first input of the next one, and both have the same
    dimensions, so that any layer can go; first layers of which that is not true have to stay.
    Where the layers run several times, as in generating a text, that is true of every pass.

    Args:
        model: The module that was called.
        recording: Its recording.
        trace: The trace of all its operators.

    Returns:
        The number of layers, and of those at the bottom that must stay, by path of the container.
    """
    calls: dict[str, list[ModuleCall]] = defaultdict(list)
    for call in recording.calls:
        calls[call.path].append(call)
    found = {}
    for path, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or len(container) < 2:
            continue
        if [*container._modules] != [str(index) for index in range(len(container))]:
            continue  # they could not be numbered anew
        names = [f"{path}.{name}" if path else name for name in container._modules]
        each = [calls.get(name, []) for name in names]
        if len({*map(len, each)}) > 1 or not each[0]:
            continue
        if any(not call.inputs or not call.outputs for every in each for call in every):
            continue
        kinds = {type(layer) for layer in container}
        if len(kinds) > 1 or len(set(map(id, container))) < len(container):
            continue
        same = [all(_keeps_dimensions(call, trace) for call in every) for every in each]
        fixed = same.index(True) if True in same else len(same)
        passes = zip(*each, strict=True)
        if all(same[fixed:]) and len(same) - fixed > 0 and all(_follows(p, trace) for p in passes):
            found[path] = (len(container), fixed)
    return found


def _follows(calls: Sequence[ModuleCall], trace: Trace) -> bool:
    """Whether each call receives what the one before returned."""
    return all(trace.root(a.outputs[0]) == trace.root(b.inputs[0]) for a, b in pairwise(calls))


def _keeps_dimensions(call: ModuleCall, trace: Trace) -> bool:
    """Whether the first output of a module has the dimensions of its first input."""
    first, last = call.inputs[0], call.outputs[0]
    return first.shape == last.shape and all(
        _is_data(a) or _is_data(b) or _atoms(a) == _atoms(b)
        for a, b in zip(trace.dims(first), trace.dims(last), strict=True)
    )


def _atoms(dim: Expression) -> list[int]:
    return [id(atom) for atom in atoms_of(dim) if atom.size > 1]


def _is_data(dim: Expression) -> bool:
    return any(DATA in atom.reasons for atom in atoms_of(dim))


def item_of(path: str, stacks: Iterable[str]) -> str:
    """Path of the innermost layer of a stack that a path is in; "" if it is in none.

    Example:
        >>> item_of("encoder.layer.3.output.dense", ["encoder.layer"])
        'encoder.layer.3'
    """
    best = ""
    for stack in stacks:
        stem = f"{stack}." if stack else ""
        if path.startswith(stem):
            item = stem + path[len(stem) :].partition(".")[0]
            best = item if len(item) > len(best) else best
    return best


def shared_path(paths: Sequence[str]) -> str:
    """The innermost module around all paths; "" for the root.

    Example:
        >>> shared_path(["encoder.layer.1.query", "encoder.layer.10.query"])
        'encoder.layer'
    """
    parts = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(each[0] for each in takewhile(lambda each: len(set(each)) == 1, parts))
