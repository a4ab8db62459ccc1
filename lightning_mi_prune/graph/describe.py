"""Describe a group by hand: from the paths of linear layers, with checked shapes.

For modules that no call shows, such as code that discovery refuses; a graph of such groups,
``PruningGraph.of([linear_group(...)])``, is given wherever a graph is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_mi_prune.core.empty_linear import linear_at
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, SizeAttribute
from lightning_mi_prune.graph.layouts import Factor, Layout

__all__ = [
    "linear_group",
]


def linear_group(
    network: nn.Module,
    name: str,
    *,
    kind: str,
    producers: Sequence[str],
    consumers: Sequence[str],
    entries: int = 1,
    partner: str = "",
    attributes: Sequence[SizeAttribute] = (),
    scope: str = "",
    config: str | None = None,
    level: int = 0,
) -> DependencyGroup:
    """Group of the units between linear layers that produce and consume them.

    Args:
        network: Module that holds the layers.
        name: Name of the group, from ``network``.
        kind: Kind of unit, ``"ffn"`` for neurons.
        producers: Paths of ``nn.Linear`` whose output rows are the units.
        consumers: Paths of ``nn.Linear`` whose input columns are the same units.
        entries: Entries per unit (the head size for heads).
        partner: Name of the group of these entries, if they can be cut too.
        attributes: Further numbers that depend on the width, besides in and out features.
        scope: Path of the module whose ``forward`` receives ``attention_mask``.
        config: Config field that holds the number of units when it is the same in every layer.
        level: Height in the network; groups are scored from the highest level down.

    Raises:
        PruningError: If a layer is missing, is not a plain ``nn.Linear``, or the widths disagree.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> group.size, [s.tensor for s in group.tensors]
        (8, ['0.weight', '0.bias', '2.weight'])
    """
    tensors: list[PrunableDim] = []
    each: Factor = partner or entries
    layout: Layout = ((name, each) if partner or entries > 1 else (name,),)
    numbers = list(attributes)
    widths: dict[str, int] = {}
    for path in producers:
        layer = _linear(network, path, name)
        widths[path] = layer.out_features
        tensors.append(PrunableDim(f"{path}.weight", 0, tuple(layer.weight.shape), layout))
        if layer.bias is not None:
            tensors.append(PrunableDim(f"{path}.bias", 0, tuple(layer.bias.shape), layout))
        numbers.append(SizeAttribute(path, "out_features", layout))
    for path in consumers:
        layer = _linear(network, path, name)
        widths[path] = layer.in_features
        tensors.append(PrunableDim(f"{path}.weight", 1, tuple(layer.weight.shape), layout))
        numbers.append(SizeAttribute(path, "in_features", layout))
    width = next(iter(widths.values()))
    if len(set(widths.values())) != 1 or width % entries:
        raise PruningError(
            f"The layers of group {name!r} have {widths} entries; expected one common width, a "
            f"multiple of {entries}."
        )
    return DependencyGroup(
        name=name,
        kind=kind,
        size=width // entries,
        tensors=tuple(tensors),
        consumers=tuple(consumers),
        attributes=tuple(numbers),
        scope=scope,
        config=config,
        level=level,
        partners=((partner, entries),) if partner else (),
    )


def _linear(network: nn.Module, path: str, group: str) -> nn.Linear:
    try:
        layer = linear_at(network.get_submodule(path))
    except AttributeError as error:
        raise PruningError(
            f"Group {group!r} needs the layer {path!r}, which {type(network).__name__} does not "
            "have; expected a path as named_modules() has it."
        ) from error
    if type(layer) is not nn.Linear:
        raise PruningError(
            f"{path!r} is a {type(layer).__module__}.{type(layer).__qualname__}; expected a plain "
            "torch.nn.Linear. Merge adapters first (model.merge_and_unload().requires_grad_(True) "
            "of PEFT), remove parametrizations, and prune before quantization."
        )
    return layer
