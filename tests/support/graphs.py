"""Graphs of the Hugging Face models inside a module; equal models are discovered once."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator

from torch import nn

from lightning_mi_prune.checkpoint.recorded import recorded_graph
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningWarning
from lightning_mi_prune.discovery.discover import discover
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, LayerStack

_FOUND: dict[str, PruningGraph] = {}


def graph_of(module: nn.Module) -> PruningGraph:
    """What all Hugging Face models inside a module can lose, as built."""
    found = PruningGraph()
    for path, network in _networks(module):
        found = found.joined((recorded_graph(network) or _discovered(network)).prefixed(path))
    return found


def groups_of(module: nn.Module) -> list[DependencyGroup]:
    """The groups of :func:`graph_of`; the hidden sizes last."""
    return sorted(graph_of(module).groups, key=lambda group: group.kind == "hidden")


def stacks_of(module: nn.Module) -> list[LayerStack]:
    """The stacks of :func:`graph_of`."""
    return list(graph_of(module).stacks)


def _networks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: list[str] = []
    for path, network in module.named_modules():
        inside = any(top == "" or path.startswith(f"{top}.") for top in seen)
        if not inside and hasattr(network, "base_model_prefix"):
            seen.append(path)
            yield path, network


def _discovered(network: nn.Module) -> PruningGraph:
    names: dict[int, str] = {}
    for name, tensor in network.named_parameters(remove_duplicate=False):
        names[id(tensor)] = f"{names.get(id(tensor), '')} {name} {tuple(tensor.shape)}"
    classes = sorted({type(part).__qualname__ for part in network.modules()})
    config = network.config.to_diff_dict()
    key = json.dumps([classes, sorted(names.values()), config], default=str, sort_keys=True)
    if key not in _FOUND:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PruningWarning)
            _FOUND[key] = discover(network)
    return _FOUND[key]


def tracker_of(module: nn.Module) -> PlanTracker:
    """The tracker of a module that knows what each Hugging Face model inside it can lose."""
    tracker = PlanTracker.of(module)
    if not tracker.is_whole:
        tracker.extend(graph_of(module))
    return tracker
