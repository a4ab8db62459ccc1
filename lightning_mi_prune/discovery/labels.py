"""Kinds and names of inferred groups, from the structure alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_mi_prune.discovery.stacks import item_of, shared_path

__all__ = [
    "Candidate",
    "kinds_of",
    "names_of",
    "short_names",
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
        inside: Indices of the candidates that are in every product they are in.
        crossed: Indices of all candidates in a product with them.
        attended: Whether a product they are in has heads, which may be fixed.
        convolution: Whether a convolution makes or reads them.
        positions: Whether a consumer reads them at more than one position of an example.
    """

    size: int
    marks: frozenset[str]
    tensors: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    inside: frozenset[int]
    crossed: frozenset[int]
    attended: bool
    convolution: bool
    positions: bool


def kinds_of(candidates: Sequence[Candidate], stacks: Collection[str]) -> list[str]:
    """The kind of each candidate, such as ``"heads"``, ``"ffn"`` or ``"hidden"``.

    Args:
        candidates: All candidates of a model.
        stacks: Paths of the containers of layers.
    """
    batched = {i for i, one in enumerate(candidates) if "batched" in one.marks}
    heads = {i for i in batched if not _repeats(i, candidates, batched)}
    attends = any(one.attended for one in candidates)
    return [_kind(i, one, heads, batched, stacks, attends) for i, one in enumerate(candidates)]


def _repeats(index: int, candidates: Sequence[Candidate], batched: set[int]) -> bool:
    """Whether this is the number of queries that read each head of keys and values."""
    return any(index not in candidates[o].inside for o in candidates[index].inside & batched)


def _kind(
    index: int,
    one: Candidate,
    heads: set[int],
    batched: set[int],
    stacks: Collection[str],
    attends: bool,
) -> str:
    if index in heads:
        return "heads"
    if index in batched:
        return "query_heads"
    if one.attended:
        return "head_dim"
    items = {item_of(name, stacks) for name in one.tensors}
    wide = len(items) > 1 or items == {""}
    if ("added" in one.marks and wide) or ("normed" in one.marks and not one.convolution):
        return "hidden"
    if one.convolution:
        return "channels"
    if not one.producers:
        return "hidden"  # the width of a table, such as that of relative positions
    return "pooler" if attends and items == {""} and not one.positions else "ffn"


def names_of(
    candidates: Sequence[Candidate],
    kinds: Sequence[str],
    stacks: Collection[str],
    networks: Sequence[str],
    homes: Sequence[str],
) -> list[str]:
    """A unique name for each candidate: where it is, and its kind.

    The layer of a stack names what is the only one of its kind in it, the nearest common module
    names the others.

    Args:
        candidates: All candidates.
        kinds: Their kinds.
        stacks: Paths of the containers of layers.
        networks: For each candidate, the path of its network.
        homes: For each candidate, the path of the base model in its network, if it has one.
    """
    places = [
        _place(one, kind, stacks, home if kind == "hidden" else network)
        for one, kind, network, home in zip(candidates, kinds, networks, homes, strict=True)
    ]
    for choose in (_common_module, _first_producer):
        taken = Counter(zip(places, kinds, strict=True))
        largest: dict[tuple[str, str], int] = {}
        for i, key in enumerate(zip(places, kinds, strict=True)):
            if len(candidates[i].tensors) > len(candidates[largest.get(key, i)].tensors):
                largest[key] = i
            largest.setdefault(key, i)
        places = [
            choose(one, place, kind)
            if taken[place, kind] > 1 and (kind != "hidden" or largest[place, kind] != i)
            else place
            for i, (one, place, kind) in enumerate(zip(candidates, places, kinds, strict=True))
        ]
    names: list[str] = []
    for place, kind in zip(places, kinds, strict=True):
        name, number = f"{place}.{kind}" if place else kind, 1
        while name in names:
            number += 1
            name = f"{place}.{kind}_{number}" if place else f"{kind}_{number}"
        names.append(name)
    return names


def short_names(names: Sequence[str], kind: str, stacks: Collection[str]) -> dict[str, str]:
    """Shorter names for groups of one kind that turned out to be the only ones of their layers.

    Args:
        names: Their names.
        kind: The kind.
        stacks: Paths of the containers of layers.

    Example:
        >>> short_names(["layers.0.v.head_dim", "layers.1.v.head_dim"], "head_dim", ["layers"])
        {'layers.0.v.head_dim': 'layers.0.head_dim', 'layers.1.v.head_dim': 'layers.1.head_dim'}
    """
    items = {name: item_of(name, stacks) for name in names}
    taken = Counter(items.values())
    return {name: f"{item}.{kind}" for name, item in items.items() if item and taken[item] == 1}


def _place(one: Candidate, kind: str, stacks: Collection[str], home: str) -> str:
    items = {item_of(name, stacks) for name in one.tensors}
    if len(items) == 1 and "" not in items:
        return items.pop()
    if kind in ("pooler", "hidden"):
        common = _common_module(one, home, kind)
        # A head around the base model reads its hidden states too.
        above = not common or home.startswith(f"{common}.")
        return home if kind == "pooler" or above else common
    return _common_module(one, "", kind) or _first_producer(one, home, kind)


def _common_module(one: Candidate, place: str, kind: str) -> str:
    owners = [name.rpartition(".")[0] for name in one.tensors]
    return shared_path([*owners, *one.consumers]) or place


def _first_producer(one: Candidate, place: str, kind: str) -> str:
    path = (*one.producers, *one.tensors)[0].rpartition(".")[0]
    # Projections of one attention have its name in common.
    return (path.rpartition(".")[0] if kind in ("heads", "query_heads") else path) or path or place
