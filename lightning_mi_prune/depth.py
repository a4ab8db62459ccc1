"""STACK    DepthAxis: layers that run one after another, any of which may go (plain data)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_mi_prune.axes import below
from lightning_mi_prune.plan import Plan

__all__ = ["DepthAxis", "full_depth"]


@dataclass(frozen=True)
class DepthAxis:
    """A stack of layers, and every number that must follow when it gets shorter.

    Args:
        name: Path of the container, ``"bert.encoder.layer"``; layers are its items.
        size: Number of layers as built.
        fixed: Layers at the bottom that must stay, since others use what they hold.
        fields: Config fields that count the layers, each with the path of the module whose config
            it is.
        lists: Config fields with an entry for each layer, and those entries as built.
        places: Attributes by which modules in a layer know its place (those of KV caches).
        adds: What a layer adds to the stream, in order: the output projection and the module whose
            input is the stream it is added to, both seen from the layer; empty if not known.
        closing: The normalisation of that sum which ends a layer, seen from it; "" without one.
        network: Path of the network the stack belongs to.
        scope: Path of the module whose ``forward`` receives ``attention_mask``.
    """

    name: str
    size: int
    fixed: int = 0
    fields: tuple[tuple[str, str], ...] = ()
    lists: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    places: tuple[str, ...] = ("layer_idx",)
    adds: tuple[tuple[str, str], ...] = ()
    closing: str = ""
    network: str = ""
    scope: str = ""

    @property
    def kind(self) -> str:
        """``"depth"``."""
        return "depth"

    def prefixed(self, prefix: str) -> DepthAxis:
        """The same stack, named from a module that holds this network at ``prefix``."""
        path = partial(below, prefix)
        return replace(
            self,
            name=path(self.name),
            fields=tuple((path(module), name) for module, name in self.fields),
            network=path(self.network),
            scope=path(self.scope),
        )


def full_depth(axes: Sequence[DepthAxis]) -> Plan:
    """The plan that keeps every layer of every stack.

    Example:
        >>> full_depth([DepthAxis("encoder.layer", 3)]).kept["encoder.layer"]
        (0, 1, 2)
    """
    return Plan.full({axis.name: axis.size for axis in axes})
