"""A recorded graph, as a network of another class or with other options has it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from lightning_mi_prune.discovery.search import without_groups
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, is_within
from lightning_mi_prune.surgery.tensors import tensors_of

__all__ = [
    "fitted_graph",
    "with_found",
]


def fitted_graph(graph: PruningGraph, network: nn.Module, inside: str = "") -> PruningGraph:
    """The part of a graph that a network has, with the sizes of what no group cuts.

    A network may lack a head or a pooler of the one that was recorded, or have other labels or
    another vocabulary. Units that nothing of it reads are its outputs, which stay.

    Args:
        graph: The graph, named from the network.
        network: The network, as built.
        inside: Path of the part whose tensors have the meaning that they had; "" for all.

    Example:
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> def build(labels):
        ...     return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, labels))
        >>> group = linear_group(build(2), "ffn", kind="ffn", producers=["0"], consumers=["2"])
        >>> fitted_graph(PruningGraph((group,)), build(9)).groups[0].tensors[-1].shape
        (9, 4)
        >>> fitted_graph(PruningGraph((group,)), build(9)[:2]).groups
        ()
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors_of(network).items()}
    known = {*shapes, *(name for name, _ in network.named_modules(remove_duplicate=False))}

    def here(path: str) -> str | None:
        return path if path in known and is_within(path, inside) else None

    kept: list[DependencyGroup] = []
    gone: dict[str, int] = {}
    for group in graph.groups:
        mine = replace(group.at_paths(here), current_name="")
        if (
            is_within(group.name, inside)
            and mine.tensors
            and (mine.consumers or not group.consumers)
        ):
            kept.append(mine)
        else:
            gone[group.name] = group.size
    groups = without_groups(kept, gone)
    return PruningGraph(tuple(_sized(groups, shapes)))


def with_found(graph: PruningGraph, found: PruningGraph) -> PruningGraph:
    """A recorded graph, with what new parts of a network add to its groups, and groups of those.

    Args:
        graph: The part of the record that the network has.
        found: What a call of the network shows.
    """
    owner = {(s.tensor, s.dim): group.name for group in graph.groups for s in group.tensors}
    names: dict[str, str] = {}
    for group in found.groups:
        same = {owner[key] for s in group.tensors if (key := (s.tensor, s.dim)) in owner}
        if len(same) == 1:
            names[group.name] = same.pop()
    anew = [group.renamed(lambda name: names.get(name, name)) for group in found.groups]
    by_name = {group.name: group for group in anew}
    groups = [_larger(group, by_name.get(group.name)) for group in graph.groups]
    cut = {(s.tensor, s.dim) for group in groups for s in group.tensors}
    taken = {group.name for group in groups}
    added = [
        group
        for group in anew
        if group.name not in taken and not any((s.tensor, s.dim) in cut for s in group.tensors)
    ]
    there = taken | {group.name for group in added}
    gone = {group.name: group.size for group in anew if group.name not in there}
    return PruningGraph(tuple(without_groups([*groups, *added], gone)))


def _larger(recorded: DependencyGroup, found: DependencyGroup | None) -> DependencyGroup:
    """The group that was found, if it cuts all that the recorded one cuts, else that one."""
    if found is None or found.size != recorded.size:
        return recorded
    layouts = {(s.tensor, s.dim): s.layout for s in found.tensors}
    covers = all(layouts.get((s.tensor, s.dim)) == s.layout for s in recorded.tensors)
    return replace(found, config=recorded.config) if covers else recorded


def _sized(
    groups: Iterable[DependencyGroup], shapes: Mapping[str, tuple[int, ...]]
) -> list[DependencyGroup]:
    """The groups, with the present sizes of the dimensions that none of them cuts."""
    groups = list(groups)
    cut = {(s.tensor, s.dim) for group in groups for s in group.tensors}

    def shape(name: str, built: tuple[int, ...]) -> tuple[int, ...]:
        present = shapes[name]
        if len(present) != len(built):
            return built
        sizes = enumerate(zip(built, present, strict=True))
        return tuple(old if (name, dim) in cut else new for dim, (old, new) in sizes)

    return [
        replace(
            group, tensors=tuple(replace(s, shape=shape(s.tensor, s.shape)) for s in group.tensors)
        )
        for group in groups
    ]
