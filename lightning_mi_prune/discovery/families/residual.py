"""The hidden size of an encoder: one group through all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_mi_prune.core.empty_linear import linear_at
from lightning_mi_prune.discovery.families.names import FamilyNames, LayerNames
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, SizeAttribute
from lightning_mi_prune.graph.layouts import Layout

__all__ = [
    "hidden_group",
    "module_at",
    "state_consumers",
]


def module_at(network: nn.Module, path: str | None) -> nn.Module | None:
    """The module at a path, or None; a linear layer instead of its empty replacement."""
    try:
        return None if path is None else linear_at(network.get_submodule(path))
    except AttributeError:
        return None


def state_consumers(network: nn.Module, prefix: str, names: FamilyNames) -> list[str]:
    """Linear modules above the layers that read the last hidden state."""
    head = names.heads.get(_head_name(network, names))
    paths = [f"{prefix}{names.pooler}"] if names.pooler else []
    if head is not None:
        paths += [head.pooler[0]] if head.pooler else []
        paths += [*head.consumers, *(head.transform[:1] if head.transform else ())]
    found = [p for p in dict.fromkeys(paths) if module_at(network, p) is not None]
    return [p for p in found if type(module_at(network, p)) is nn.Linear]


def hidden_group(
    network: nn.Module,
    prefix: str,
    names: FamilyNames,
    layers: Sequence[tuple[str, nn.Module]],
) -> DependencyGroup | None:
    """The group of the residual stream: embeddings, norms, producers and consumers.

    Embeddings of another width are not part of it. The transform of a masked-LM head is, since its
    decoder is tied to the embeddings, and so are the relative positions of DeBERTa.

    Returns:
        The group, or None if the class has an unknown head, cross-attention or an unknown layer.
    """
    head = names.heads.get(_head_name(network, names))
    config = network.config
    if head is None or getattr(config, "add_cross_attention", False):
        return None
    parts = _Parts(network, ((f"{prefix}hidden",),))
    projected = _begin(parts, prefix, names)
    for path, _ in layers:
        _add_layer(parts, path, names.layer)
    above = state_consumers(network, prefix, names)
    for path in above:
        parts.read(path)
    square = head.square
    pooler = f"{prefix}{names.pooler}"
    if pooler in above and not names.free_pooler:
        square = square or head.pooler is None or head.pooler[0] != pooler
    wanted = [*head.consumers, *(head.pooler or ())[:1], *(head.transform or ())[:1]]
    if head.transform is not None and not projected:
        dense, norm, decoder = head.transform
        parts.write(dense)
        parts.norm(norm)
        parts.decode(decoder)
    if parts.unknown or not set(wanted) <= set(above) or len(set(parts.widths)) != 1:
        return None
    hidden = int(getattr(config, names.hidden))
    config_aliases = tuple(t for t in names.config_aliases if getattr(config, t, None) == hidden)
    plain = names.head_count is not None and not square
    return DependencyGroup(
        name=f"{prefix}hidden",
        kind="hidden",
        size=parts.widths[0],
        tensors=tuple(parts.tensors),
        consumers=tuple(path for site in parts.consumers_by_input for path in site),
        consumers_by_input=tuple(parts.consumers_by_input),
        norms=tuple(parts.norms),
        attributes=tuple(parts.attributes),
        scope=prefix.rstrip("."),
        config=names.hidden if plain else None,
        config_aliases=config_aliases if plain and not projected else (),
        level=-1,
    )


def _head_name(network: nn.Module, names: FamilyNames) -> str:
    return type(network).__name__.removeprefix(names.classes)


@dataclass
class _Parts:
    """Collected tensors and numbers of the group; ``unknown`` if a part is of an unknown class."""

    network: nn.Module
    layout: Layout
    tensors: list[PrunableDim] = field(default_factory=list)
    attributes: list[SizeAttribute] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    consumers_by_input: list[tuple[str, ...]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    unknown: bool = False
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def tensor(self, module: nn.Module, path: str, name: str, dim: int) -> None:
        parameter = getattr(module, name, None)
        if parameter is None:
            return
        if not isinstance(parameter, nn.Parameter) or parameter.ndim <= dim:
            self.unknown = True
            return
        # A tied tensor is listed once, so that it is counted once; surgery finds it by identity.
        key = (id(parameter), dim)
        if key in self._seen:
            return
        self._seen.add(key)
        self.widths.append(parameter.shape[dim])
        self.tensors.append(PrunableDim(f"{path}.{name}", dim, tuple(parameter.shape), self.layout))

    def part(self, path: str, kinds: tuple[type[nn.Module], ...]) -> nn.Module | None:
        module = module_at(self.network, path)
        self.unknown = self.unknown or (module is not None and type(module) not in kinds)
        return module if type(module) in kinds else None

    def add(
        self,
        path: str,
        kinds: tuple[type[nn.Module], ...],
        tensors: dict[str, int],
        number: str,
        *,
        sequence: bool = False,
    ) -> bool:
        module = self.part(path, kinds)
        if module is None:
            return False
        for name, dim in tensors.items():
            self.tensor(module, path, name, dim)
        self.attributes.append(SizeAttribute(path, number, self.layout, sequence))
        return True

    def embed(self, path: str) -> bool:
        return self.add(path, (nn.Embedding,), {"weight": 1}, "embedding_dim")

    def norm(self, path: str) -> None:
        tensors = {"weight": 0, "bias": 0}
        if self.add(path, (nn.LayerNorm,), tensors, "normalized_shape", sequence=True):
            self.norms.append(path)

    def write(self, path: str) -> bool:
        return self.add(path, (nn.Linear,), {"weight": 0, "bias": 0}, "out_features")

    def read(self, *paths: str, calibrated: bool = True) -> None:
        found = [p for p in paths if self.add(p, (nn.Linear,), {"weight": 1}, "in_features")]
        if calibrated and found:
            self.consumers_by_input.append(tuple(found))

    def decode(self, path: str | None) -> None:
        if path is not None:
            # Its weight is that of the embeddings: not to be compensated.
            self.read(path, calibrated=False)


def _begin(parts: _Parts, prefix: str, names: FamilyNames) -> bool:
    """Add all parts outside the layers; return whether embeddings have another width."""
    projected = names.projection is not None and parts.write(f"{prefix}{names.projection}")
    if not projected:
        for name in names.embeddings:
            parts.embed(f"{prefix}{name}")
        if names.embedding_norm is not None:
            parts.norm(f"{prefix}{names.embedding_norm}")
    if names.positions is not None:
        parts.embed(f"{prefix}{names.positions}")
    for name in names.tokens:
        path, _, tensor = f"{prefix}{name}".rpartition(".")
        holder = module_at(parts.network, path)
        if holder is not None:
            parts.tensor(holder, path, tensor, 2)
    if names.patches is not None:
        made = {"weight": 0, "bias": 0}
        parts.add(f"{prefix}{names.patches}", (nn.Conv2d,), made, "out_channels")
    mixer = module_at(parts.network, f"{prefix}{names.mixer}") if names.mixer else None
    if mixer is not None:
        path = f"{prefix}{names.mixer}"
        parts.add(path, (nn.Conv1d,), {"weight": 0, "bias": 0}, "out_channels")
        parts.add(path, (nn.Conv1d,), {"weight": 1}, "in_channels")
        parts.unknown = parts.unknown or getattr(mixer, "groups", 1) != 1
    for name in names.norms:
        parts.norm(f"{prefix}{name}")
    return projected


def _add_layer(parts: _Parts, path: str, names: LayerNames) -> None:
    # The values come first, since their input is always the residual stream itself.
    parts.read(*(f"{path}.{part}" for part in (names.value, names.query, names.key)))
    for part in names.positions:
        parts.read(f"{path}.{part}", calibrated=False)
    parts.write(f"{path}.{names.out}")
    parts.read(f"{path}.{names.ffn_in}")
    parts.write(f"{path}.{names.ffn_out}")
    for part in names.norms:
        parts.norm(f"{path}.{part}")
    if names.hidden is not None:
        parts.attributes.append(
            SizeAttribute(f"{path}.{names.attention}", names.hidden, parts.layout)
        )
