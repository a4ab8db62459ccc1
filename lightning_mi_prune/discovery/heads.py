"""Attention heads: coordinates of their dimensions that can be rotated, attention without heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_mi_prune.discovery.copies import put_tensors, tensor_at
from lightning_mi_prune.discovery.hints import hint_for
from lightning_mi_prune.discovery.stacks import item_of, shared_path
from lightning_mi_prune.discovery.verification import OutOfTime, Verifier
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    EmptyForward,
    RotatableProjections,
    is_within,
    join_path,
)
from lightning_mi_prune.surgery.parameters import rotate_along

__all__ = [
    "rotatable_projections",
    "with_empty_attention",
    "with_rotations",
]

Roles = Mapping[str, str]  # "query", "key" or "value" by the path of a projection


def rotatable_projections(group: DependencyGroup, roles: Roles) -> RotatableProjections | None:
    """The projections of the heads whose dimensions a group holds, if there are exactly four.

    Args:
        group: A group of the kind ``"head_dim"``.
        roles: What projections make.

    Returns:
        The projections, not yet verified; None if anything else holds the dimensions, or heads do
        not consist of them alone.

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> layout = (("heads", "size"),)
        >>> made = [PrunableDim(f"{name}.weight", 0, (8, 8), layout) for name in "qkv"]
        >>> read = PrunableDim("o.weight", 1, (8, 8), layout)
        >>> group = DependencyGroup("size", "head_dim", 4, (*made, read), ("o",))
        >>> rotatable_projections(group, {"q": "query", "k": "key", "v": "value"}).value
        'v'
    """
    owners = {s.tensor.rpartition(".")[0] for s in group.tensors}
    found: dict[str, str] = {}
    for path in owners & set(roles):
        if roles[path] in found:
            return None
        found[roles[path]] = path
    plain = all(
        len(s.layout) == 1 and len(s.layout[0]) == 2 and s.layout[0][1] == group.name
        for s in group.tensors
    )
    consumers = [path for path in group.consumers if path not in roles]
    if len(found) < 3 or len(consumers) != 1 or not plain:
        return None
    if owners != {*found.values(), *consumers}:
        return None
    return RotatableProjections(found["query"], found["key"], found["value"], consumers[0])


def with_rotations(
    verifier: Verifier,
    groups: Sequence[DependencyGroup],
    roles: Roles,
    stacks: Collection[str],
) -> tuple[DependencyGroup, ...]:
    """Note which dimensions of heads can be given other coordinates without a change of outputs.

    Queries and keys are multiplied with random matrices and their inverses, values and what reads
    them with random rotations, on a copy.

    Args:
        verifier: Holds the copy.
        groups: Groups that can be cut.
        roles: What projections make.
        stacks: Paths of the containers of layers.
    """
    found = {
        group.name: group.rotation or rotation
        for group in groups
        if group.kind == "head_dim"
        and group.partners  # the heads, which may have been refused
        and (rotation := rotatable_projections(group, roles)) is not None
        and all(type(verifier.base.get_submodule(p)) is nn.Linear for p in _paths(rotation))
    }
    rotates = {g.name: found[g.name] for g in groups if g.name in found}
    heads = {g.name: g.partners[0][1] for g in groups if g.name in found}
    try:
        every = _unchanged(verifier, rotates, heads)
        verified = {
            name
            for name, rotation in rotates.items()
            if every or _unchanged(verifier, {name: rotation}, heads)
        }
    except OutOfTime:
        verified = set()
    owner = {name: g for g in groups if g.kind == "heads" for name, _ in g.partners}
    return tuple(
        _rotated(group, rotates[group.name], owner.get(group.name, group), stacks)
        if group.name in verified
        else replace(group, rotation=None)
        for group in groups
    )


def _paths(rotation: RotatableProjections) -> tuple[str, str, str, str]:
    return rotation.query, rotation.key, rotation.value, rotation.consumer


def _rotated(
    group: DependencyGroup,
    rotation: RotatableProjections,
    heads: DependencyGroup,
    stacks: Collection[str],
) -> DependencyGroup:
    """The group with its rotation, which is computed at queries, keys and heads."""
    inputs = (rotation.query, rotation.key, rotation.consumer)
    return replace(
        group,
        consumers=inputs,
        consumers_by_input=tuple((path,) for path in inputs),
        level=heads.level,
        residual=None,
        # Layers above rotate their own heads.
        above=tuple(path for path in heads.above if not item_of(path, stacks)),
        rotation=rotation,
    )


def _unchanged(
    verifier: Verifier, rotations: Mapping[str, RotatableProjections], heads: Mapping[str, int]
) -> bool:
    """Whether new coordinates of some heads leave the outputs as they are."""
    generator = torch.Generator().manual_seed(0)
    replaced: dict[int, Tensor] = {}
    for name, rotation in rotations.items():
        query = tensor_at(verifier.base, f"{rotation.query}.weight")
        if query is None:
            return False
        size = query.shape[0] // heads[name]
        shape = (heads[name], size, size)
        turn, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        scale = 0.5 + torch.rand((heads[name], size, 1), generator=generator, dtype=torch.float64)
        value, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        rows = {rotation.query: turn * scale, rotation.key: turn / scale, rotation.value: value}
        dims = [(f"{p}.{n}", 0, m) for p, m in rows.items() for n in ("weight", "bias")]
        for tensor, dim, maps in (*dims, (f"{rotation.consumer}.weight", 1, value)):
            old = tensor_at(verifier.base, tensor)
            if old is not None:
                now = replaced.get(id(old), old.detach()).double()
                replaced[id(old)] = rotate_along(now, dim, maps.to(now)).to(old.dtype)
    return not replaced or verifier.unchanged_by(lambda copied: put_tensors(copied, replaced))


def with_empty_attention(
    verifier: Verifier, module: nn.Module, groups: Sequence[DependencyGroup]
) -> tuple[DependencyGroup, ...]:
    """Note which heads of a layer can all go, with what stands in for their attention.

    Args:
        verifier: Holds the copy.
        module: Module from which the groups are named.
        groups: Groups that can be cut.
    """
    some: dict[str, DependencyGroup] = {}
    for group in groups:
        empty = _empty_forward(module, group) if group.kind == "heads" else None
        if empty is not None:
            some[group.name] = replace(group, may_be_empty=True, empty_forward=(empty,))
    try:
        kept = dict.fromkeys(some, ())
        equal = bool(some) and verifier.check_kept([*some.values()], kept).equal
    except OutOfTime:
        equal = False
    return tuple(some.get(group.name, group) if equal else group for group in groups)


def _empty_forward(module: nn.Module, group: DependencyGroup) -> EmptyForward | None:
    """What stands in for the attention of some heads, by the hint for their network."""
    hint = hint_for(module.get_submodule(group.network))
    owners = dict.fromkeys(s.tensor.rpartition(".")[0] for s in group.tensors)
    projections = [path for path in owners if path not in group.consumers]
    if hint is None or len(group.consumers) != 1 or len(projections) < 2:
        return None
    (consumer,), attention = group.consumers, shared_path(projections)

    def inside(name: str | None) -> str | None:
        return None if name is None else join_path(attention, name)

    return EmptyForward(
        module=attention,
        projections=tuple(projections),
        consumer=consumer if is_within(consumer, attention) else None,
        dropout=inside(hint.dropout),
        norm=inside(hint.norm),
    )
