"""DependencyGroup and LayerStack: what can be pruned, as names and sizes without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.layouts import Layout, layout_size, map_layout

__all__ = [
    "DependencyGroup",
    "EmptyForward",
    "LayerStack",
    "PrunableDim",
    "Refusal",
    "RotatableProjections",
    "SizeAttribute",
    "UnitArgument",
    "count_parameters",
    "full_depth",
    "full_plan",
    "is_within",
    "join_path",
    "modules_with",
]


@dataclass(frozen=True)
class PrunableDim:
    """One dimension of one tensor that shrinks with a group.

    Args:
        tensor: Qualified parameter name, ``"encoder.layer.0.output.dense.weight"``; or of a buffer.
        dim: Dimension that is cut.
        shape: Shape of the tensor as built.
        layout: What the dimension consists of; it may name other groups too.
        buffer: Whether the tensor is a buffer; its entries do not count as parameters.
    """

    tensor: str
    dim: int
    shape: tuple[int, ...]
    layout: Layout
    buffer: bool = False


@dataclass(frozen=True)
class SizeAttribute:
    """A number on a module that depends on widths: ``module.attribute`` is the size of a layout.

    Args:
        module: Path of the module.
        attribute: Attribute that holds the number.
        layout: What the number counts.
        sequence: Whether the attribute is a tuple of this one number (``normalized_shape``).
    """

    module: str
    attribute: str
    layout: Layout
    sequence: bool = False


@dataclass(frozen=True)
class EmptyForward:
    """Replacement of the ``forward`` of a module that cannot run without units.

    While the group is empty, it returns the sum of the outputs of ``projections`` (a tensor
    without entries, through which gradients pass), after ``consumer``, ``dropout`` and ``norm``.

    Args:
        module: Path of the module.
        projections: Paths of the linear modules that produce the units.
        consumer: Path of the linear module that reads them, if the module calls it itself.
        dropout: Path of the dropout that follows, if the module calls it itself.
        norm: Path of the normalisation of output plus input, if the module calls it itself.
        pair: Whether ``forward`` returns a pair of output and attention weights (then None).
    """

    module: str
    projections: tuple[str, ...]
    consumer: str | None = None
    dropout: str | None = None
    norm: str | None = None
    pair: bool = True

    def prefixed(self, path: Callable[[str], str]) -> EmptyForward:
        """The same, with every module path mapped by ``path``."""
        return replace(
            self,
            module=path(self.module),
            projections=tuple(path(p) for p in self.projections),
            consumer=None if self.consumer is None else path(self.consumer),
            dropout=None if self.dropout is None else path(self.dropout),
            norm=None if self.norm is None else path(self.norm),
        )


@dataclass(frozen=True)
class UnitArgument:
    """An argument of a module's ``forward`` that always has an entry for every unit as built.

    It is computed once for all layers, so the module selects the entries of its kept units.

    Args:
        module: Path of the module.
        argument: Name of the argument.
        dim: Dimension of the argument that counts the units.
    """

    module: str
    argument: str
    dim: int = 1


@dataclass(frozen=True)
class RotatableProjections:
    """Projections of heads whose dimensions can be rotated without changing the output.

    Queries and keys only enter as their product, and values only through ``consumer``. So each
    head can be given coordinates that are ordered by importance.

    Args:
        query: Path of the projection of the queries.
        key: Path of the projection of the keys.
        value: Path of the projection of the values.
        consumer: Path of the linear module that reads the heads.
        rescaled: Whether attention divides by the root of the present head size instead of the
            one as built, which the queries then compensate.
    """

    query: str
    key: str
    value: str
    consumer: str
    rescaled: bool = False

    def prefixed(self, path: Callable[[str], str]) -> RotatableProjections:
        """The same, with every path mapped by ``path``."""
        return replace(
            self,
            query=path(self.query),
            key=path(self.key),
            value=path(self.value),
            consumer=path(self.consumer),
        )


@dataclass(frozen=True)
class DependencyGroup:
    """Units of one kind, with every tensor that must shrink with them.

    Args:
        name: Path of the group, ``"encoder.layer.0.ffn"``.
        kind: ``"ffn"``, ``"heads"``, ``"head_dim"`` (dimensions of all heads of a layer),
            ``"pooler"`` or ``"hidden"``; any other word for groups described by hand.
        size: Number of units as built (neurons or heads).
        tensors: The tensors cut together.
        consumers: Layers that read the units: their inputs are calibrated, their weights
            compensated; or parameters that a module multiplies with (``"experts.down_proj"``).
        attributes: Numbers on modules that depend on the width.
        network: Path of the network the group belongs to.
        scope: Path of the module whose ``forward`` receives ``attention_mask``.
        config: Field of the network's config that holds the width when it is the same everywhere;
            ``"text_config.intermediate_size"`` is one of a config inside it.
        level: Height in the network; groups are scored from the highest level down.
        consumers_by_input: Consumers with the same input together, if there are several inputs
            (the residual stream has many); empty if all have the same.
        residual: Module whose input is the residual stream that is added to the consumer's output.
        above: Layers, or such parameters, that read the consumer's output, directly or through
            norms.
        norms: Normalisations over the units of the group.
        empty_forward: Replacements for modules that cannot run without units.
        may_be_empty: Whether the group may lose all its units; with ``empty_forward`` it may too.
        unit_arguments: Arguments with an entry for every unit as built.
        tie: Config field that must equal ``units * entries``: transformers derive the head size
            from the hidden size and the number of heads.
        config_aliases: Further config fields that hold the same number as ``config``.
        config_sizes: Further config fields that must be set when the width changes, with the layout
            each of them counts: queries of all heads beside heads of keys and values.
        partners: Other groups that its layouts name, such as the dimensions of heads, with their
            sizes as built.
        rotation: Projections to rotate before units, the dimensions of heads, are removed.
        current_name: Its name in the present model, if layers were removed.
        multiple: What its width must be a multiple of, for operators that need aligned rows.
    """

    name: str
    kind: str
    size: int
    tensors: tuple[PrunableDim, ...]
    consumers: tuple[str, ...]
    attributes: tuple[SizeAttribute, ...] = ()
    network: str = ""
    scope: str = ""
    config: str | None = None
    level: int = 0
    consumers_by_input: tuple[tuple[str, ...], ...] = ()
    residual: str | None = None
    above: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    empty_forward: tuple[EmptyForward, ...] = ()
    may_be_empty: bool = False
    unit_arguments: tuple[UnitArgument, ...] = ()
    tie: str | None = None
    config_aliases: tuple[str, ...] = ()
    config_sizes: tuple[tuple[str, Layout], ...] = ()
    partners: tuple[tuple[str, int], ...] = ()
    rotation: RotatableProjections | None = None
    current_name: str = ""
    multiple: int = 1

    @property
    def inputs(self) -> dict[str, tuple[str, ...]]:
        """The inputs that are calibrated: the consumers that read each of them, by its key."""
        if not self.consumers_by_input:
            return {self.name: self.consumers}
        return {f"{self.name}@{consumers[0]}": consumers for consumers in self.consumers_by_input}

    @property
    def unit_inputs(self) -> dict[str, tuple[str, ...]]:
        """Those of the inputs that consist of the units."""
        if self.rotation is None:
            return self.inputs
        return {f"{self.name}@{self.rotation.consumer}": (self.rotation.consumer,)}

    def prefixed(self, prefix: str) -> DependencyGroup:
        """The same group, named from a module that holds this network at ``prefix``."""
        path = partial(join_path, prefix)
        now = path(self.current_name) if self.current_name else ""
        return replace(self.at_paths(path).renamed(path), current_name=now)

    def renamed(self, name: Callable[[str], str]) -> DependencyGroup:
        """The same group with every name of a group mapped by ``name``; paths stay."""
        return replace(
            self,
            name=name(self.name),
            tensors=tuple(replace(s, layout=map_layout(s.layout, name)) for s in self.tensors),
            attributes=tuple(
                replace(a, layout=map_layout(a.layout, name)) for a in self.attributes
            ),
            config_sizes=tuple(
                (field, map_layout(layout, name)) for field, layout in self.config_sizes
            ),
            partners=tuple((name(other), size) for other, size in self.partners),
        )

    def all_widths(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Widths of the group and its partners; as built where they are not given.

        Example:
            >>> heads = DependencyGroup("h", "heads", 9, (), ("o",), partners=(("head_dim", 32),))
            >>> heads.all_widths({"h": 6})
            {'head_dim': 32, 'h': 6}
        """
        built = {**dict(self.partners), self.name: self.size}
        return {name: widths.get(name, size) for name, size in built.items()}

    def at_paths(self, path: Callable[[str], str | None]) -> DependencyGroup:
        """The same group with every path mapped by ``path``; paths mapped to None are left out."""

        def paths(names: Sequence[str]) -> tuple[str, ...]:
            return tuple(p for name in names if (p := path(name)) is not None)

        def or_empty(name: str) -> str:
            return path(name) or ""

        return replace(
            self,
            current_name=path(self.current_name or self.name) or "",
            tensors=tuple(replace(s, tensor=p) for s in self.tensors if (p := path(s.tensor))),
            consumers=paths(self.consumers),
            consumers_by_input=tuple(
                site for group in self.consumers_by_input if (site := paths(group))
            ),
            residual=None if self.residual is None else path(self.residual),
            above=paths(self.above),
            norms=paths(self.norms),
            empty_forward=tuple(
                s.prefixed(or_empty) for s in self.empty_forward if path(s.module) is not None
            ),
            unit_arguments=tuple(
                replace(s, module=p)
                for s in self.unit_arguments
                if (p := path(s.module)) is not None
            ),
            attributes=tuple(
                replace(c, module=p) for c in self.attributes if (p := path(c.module)) is not None
            ),
            network=or_empty(self.network),
            scope=or_empty(self.scope),
            rotation=self.rotation.prefixed(or_empty) if self.rotation else None,
        )


def join_path(prefix: str, path: str) -> str:
    """A path, named from a module that holds the present one at ``prefix``."""
    return ".".join(filter(None, (prefix, path)))


def is_within(path: str, top: str) -> bool:
    """Whether a module path is ``top`` or below it.

    Example:
        >>> is_within("encoder.layer.1", "encoder"), is_within("encoder2", "encoder")
        (True, False)
    """
    return top == "" or path == top or path.startswith(f"{top}.")


def full_plan(groups: Sequence[DependencyGroup]) -> PruningPlan:
    """The plan that keeps every unit of every group."""
    return PruningPlan.full({group.name: group.size for group in groups})


def modules_with(groups: Sequence[DependencyGroup]) -> set[str]:
    """Paths of modules that hold all that groups name: networks, and layers outside of them.

    Steps of a LightningModule may call its layers one by one, so that no network holds all of them.

    Example:
        >>> dims = (PrunableDim("up.weight", 0, (8, 4), (("ffn",),)),)
        >>> group = DependencyGroup("ffn", "ffn", 8, dims, ("down",), network="down")
        >>> sorted(modules_with([group]))
        ['down', 'up']
    """
    found = {group.network for group in groups}
    found |= {s.tensor.rpartition(".")[0] for group in groups for s in group.tensors}
    found |= {number.module for group in groups for number in group.attributes}
    return {
        path
        for path in found
        if not any(f"{path}.".startswith(f"{other}." if other else "") for other in found - {path})
    }


def count_parameters(
    groups: Sequence[DependencyGroup], widths: Mapping[str, int] | None = None
) -> int:
    """Parameters of all tensors that the groups cut, at the given widths (default: as built).

    A tensor cut along two groups counts once, with both dimensions shrunk.

    Example:
        >>> ffn = DependencyGroup(
        ...     "ffn", "ffn", size=8, consumers=("down",), tensors=(
        ...         PrunableDim("up", 0, (8, 4), (("ffn",),)),
        ...         PrunableDim("down", 1, (4, 8), (("ffn",),)),
        ...     ),
        ... )
        >>> count_parameters([ffn]), count_parameters([ffn], {"ffn": 2})
        (64, 16)
    """
    shapes: dict[str, list[int]] = {}
    at = {group.name: group.size if widths is None else widths[group.name] for group in groups}
    for group in groups:
        for s in (s for s in group.tensors if not s.buffer):
            shape = shapes.setdefault(s.tensor, list(s.shape))
            shape[s.dim] = layout_size(s.layout, group.all_widths(at))
    return sum(math.prod(shape) for shape in shapes.values())


@dataclass(frozen=True)
class Refusal:
    """Units that are in parameters of a model but cannot be cut.

    Args:
        name: Name of the group, or of the parameter that holds the units.
        kind: Kind of the group; "" if it is not known.
        size: Number of units.
        parameters: Number of entries of the parameters that hold them.
        reason: Why they cannot be cut, with the operator and the module.
    """

    name: str
    kind: str
    size: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class LayerStack:
    """A stack of layers, and every number that depends on its depth.

    Args:
        name: Path of the container, ``"bert.encoder.layer"``; layers are its items.
        size: Number of layers as built.
        fixed: Number of layers at the bottom that must stay, since others use parameters of theirs.
        config_fields: Path of a module and field of its config that counts the layers.
        config_lists: Config fields with an entry for each layer, and those entries as built.
        index_attributes: Attributes of modules with the index of their layer (for KV caches).
        residual_branches: For each addition to the residual stream the output projection, and the
            module whose input is the stream, as paths from the layer; empty if not known.
        final_norm: Normalisation of the stream at the end of a layer, from the layer; "" for none.
        network: Path of the network the stack belongs to.
        scope: Path of the module whose ``forward`` receives ``attention_mask``.
    """

    name: str
    size: int
    fixed: int = 0
    config_fields: tuple[tuple[str, str], ...] = ()
    config_lists: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    index_attributes: tuple[str, ...] = ("layer_idx",)
    residual_branches: tuple[tuple[str, str], ...] = ()
    final_norm: str = ""
    network: str = ""
    scope: str = ""

    @property
    def kind(self) -> str:
        """``"depth"``."""
        return "depth"

    def prefixed(self, prefix: str) -> LayerStack:
        """The same stack, named from a module that holds this network at ``prefix``."""
        path = partial(join_path, prefix)
        return replace(
            self,
            name=path(self.name),
            config_fields=tuple((path(module), name) for module, name in self.config_fields),
            network=path(self.network),
            scope=path(self.scope),
        )


def full_depth(groups: Sequence[LayerStack]) -> PruningPlan:
    """The plan that keeps every layer of every stack.

    Example:
        >>> full_depth([LayerStack("encoder.layer", 3)]).kept["encoder.layer"]
        (0, 1, 2)
    """
    return PruningPlan.full({group.name: group.size for group in groups})
