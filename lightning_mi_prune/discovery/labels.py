"""Kinds and names of inferred groups, from the structure alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from lightning_mi_prune.discovery.stacks import item_of

__all__ = [
    "Candidate",
    "kinds_of",
    "names_of",
]


@dataclass(frozen=True)
class Candidate:
    """What is known of units before they have a kind and a name.

    Args:
        size: Number of units.
        marks: What operators do with them (:attr:`expressions.Atom.marks`).
        tensors: Names of parameters and buffers that hold them.
        producers: Names of the parameters that make them.
        consumers: Paths of modules that read them.
        crossed: Indices of other candidates in a product with them.
        convolution: Whether a convolution makes or reads them.
        positions: Whether a consumer reads them at more than one position of an example.
    """

    size: int
    marks: frozenset[str]
    tensors: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    crossed: frozenset[int]
    convolution: bool
    positions: bool


def kinds_of(candidates: Sequence[Candidate], stacks: Mapping[str, int]) -> list[str]:
    """``"heads"``, ``"query_heads"``, ``"head_dim"``, ``"hidden"``, ``"channels"``, ``"pooler"``,
    ``"ffn"``.

    Args:
        candidates: All candidates of a model.
        stacks: Number of layers by path of the container.
    """
    batched = {i for i, one in enumerate(candidates) if "batched" in one.marks}
    heads = {i for i in batched if not _within_another(i, candidates, batched)}
    attends = bool(batched)
    return [_kind(i, one, heads, batched, stacks, attends) for i, one in enumerate(candidates)]


def _within_another(index: int, candidates: Sequence[Candidate], batched: set[int]) -> bool:
    """Whether queries have more heads than keys, and this is the number for each of those."""
    mine = set(candidates[index].tensors)
    return any(
        mine < set(candidates[other].tensors) for other in candidates[index].crossed & batched
    )


def _kind(
    index: int,
    one: Candidate,
    heads: set[int],
    batched: set[int],
    stacks: Mapping[str, int],
    attends: bool,
) -> str:
    if index in heads:
        return "heads"
    if index in batched:
        return "query_heads"
    if one.crossed & batched:
        return "head_dim"
    items = {item_of(name, dict(stacks)) for name in one.tensors}
    wide = len(items) > 1 or items == {""}
    if ("added" in one.marks and wide) or ("normed" in one.marks and not one.convolution):
        return "hidden"
    if one.convolution:
        return "channels"
    return "pooler" if attends and items == {""} and not one.positions else "ffn"


def names_of(
    candidates: Sequence[Candidate],
    kinds: Sequence[str],
    stacks: Mapping[str, int],
    networks: Sequence[str],
) -> list[str]:
    """A unique name for each candidate: where it is, and its kind.

    The layer of a stack names what is the only one of its kind in it, the nearest common module
    names the others.

    Args:
        candidates: All candidates.
        kinds: Their kinds.
        stacks: Number of layers by path of the container.
        networks: For each candidate, the path of its network.
    """
    places = [
        _place(one, kind, stacks, network)
        for one, kind, network in zip(candidates, kinds, networks, strict=True)
    ]
    for choose in (_common_module, _first_producer):
        taken = Counter(zip(places, kinds, strict=True))
        places = [
            choose(one, place) if taken[place, kind] > 1 else place
            for one, place, kind in zip(candidates, places, kinds, strict=True)
        ]
    names: list[str] = []
    for place, kind in zip(places, kinds, strict=True):
        name, number = f"{place}.{kind}" if place else kind, 1
        while name in names:
            number += 1
            name = f"{place}.{kind}_{number}" if place else f"{kind}_{number}"
        names.append(name)
    return names


def _place(one: Candidate, kind: str, stacks: Mapping[str, int], network: str) -> str:
    items = {item_of(name, dict(stacks)) for name in one.tensors}
    if len(items) == 1 and "" not in items:
        return items.pop()
    if kind == "pooler":
        return network
    return _common_module(one, network)


def _common_module(one: Candidate, place: str) -> str:
    paths = [name.split(".")[:-1] for name in (*one.tensors, *(f"{c}.w" for c in one.consumers))]
    common = commonprefix(paths)
    if common == paths[0] and len(set(map(tuple, paths))) == 1:
        return ".".join(common)
    return ".".join(common) or place


def _first_producer(one: Candidate, place: str) -> str:
    first = (*one.producers, *one.tensors)[0]
    return first.rpartition(".")[0] or place
