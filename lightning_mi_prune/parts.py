"""TOUCH    what of a model an axis touches: tensors, numbers, modules (plain data, no torch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Count", "Selects", "Silence", "Slice", "Turn"]


@dataclass(frozen=True)
class Slice:
    """One dimension of one tensor that shrinks with an axis.

    Args:
        tensor: Qualified parameter name, ``"encoder.layer.0.output.dense.weight"``.
        dim: Dimension that is cut.
        shape: Shape of the tensor as built.
    """

    tensor: str
    dim: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Count:
    """A number on a module that must follow the axis: ``module.attribute = units * per_unit``.

    Args:
        module: Path of the module.
        attribute: Attribute that holds the number.
        per_unit: Amount for each unit.
        entries: Whether it counts entries: each unit then brings as many as it has.
        sequence: Whether the attribute is a tuple of this one number (``normalized_shape``).
    """

    module: str
    attribute: str
    per_unit: int = 1
    sequence: bool = False
    entries: bool = False


@dataclass(frozen=True)
class Silence:
    """A module whose ``forward`` cannot run without units, and what it then says: nothing.

    While the axis is empty, ``forward`` returns the sum of what ``projections`` make of its input
    (a tensor without entries, through which gradients still pass), read by ``reader`` if the module
    holds that too; the residual stream carries on.

    Args:
        module: Path of the module.
        projections: Paths of the linear modules that make the units.
        reader: Path of the linear module that reads them, where the module calls it itself.
        dropout: Path of what the module then drops out with, if it does.
        norm: Path of the normalisation of output plus input, where the module holds that too.
        pair: Whether ``forward`` returns a pair of output and attention weights (None then).
    """

    module: str
    projections: tuple[str, ...]
    reader: str | None = None
    dropout: str | None = None
    norm: str | None = None
    pair: bool = True

    def prefixed(self, path: Callable[[str], str]) -> Silence:
        """The same, with every module path mapped by ``path``."""
        return replace(
            self,
            module=path(self.module),
            projections=tuple(path(p) for p in self.projections),
            reader=None if self.reader is None else path(self.reader),
            dropout=None if self.dropout is None else path(self.dropout),
            norm=None if self.norm is None else path(self.norm),
        )


@dataclass(frozen=True)
class Selects:
    """An argument of a module's ``forward`` that brings something for every unit as built.

    It is made once for all layers, so it cannot shrink with one of them: the module takes the
    entries of its own units out of it.

    Args:
        module: Path of the module.
        argument: Name of the argument.
        dim: Dimension of the argument that counts the units.
    """

    module: str
    argument: str
    dim: int = 1


@dataclass(frozen=True)
class Turn:
    """Projections of attention heads whose dimensions can be turned without a change of the output.

    Only products of queries with keys are seen, and only what ``reader`` makes of the values: every
    head may be given other coordinates, in which its dimensions come in the order of their use.

    Args:
        query: Path of the projection of the queries.
        key: Path of the projection of the keys.
        value: Path of the projection of the values.
        reader: Path of the linear module that reads the heads.
        rescaled: Whether attention divides by the root of the size that a head has now, not of the
            one it was built with: the queries then make up for it.
    """

    query: str
    key: str
    value: str
    reader: str
    rescaled: bool = False

    def prefixed(self, path: Callable[[str], str]) -> Turn:
        """The same, with every path mapped by ``path``."""
        return replace(
            self,
            query=path(self.query),
            key=path(self.key),
            value=path(self.value),
            reader=path(self.reader),
        )
