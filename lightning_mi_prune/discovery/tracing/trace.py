"""Follow dimensions through a recording: the expressions of every tensor, and uses of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_mi_prune.discovery.tracing.expressions import (
    Atom,
    Expression,
    atoms_of,
    fix,
    make_equal,
    resolve,
)
from lightning_mi_prune.discovery.tracing.recording import Operator

__all__ = [
    "DATA",
    "Statistic",
    "Trace",
    "WeightUse",
]

DATA = "data"  # reason of dimensions that inputs have: examples, positions, pixels


@dataclass(frozen=True)
class WeightUse:
    """One multiplication of an activation with a parameter.

    Args:
        index: Running number of the operator.
        operator: Its name.
        tensor: Name of the parameter.
        module: Path of the innermost running module.
        input_dim: Dimension of the parameter that is summed over; None if it was reshaped.
        source: The activation that is multiplied, before changes of its shape.
        output: The result.
    """

    index: int
    operator: str
    tensor: str
    module: str
    input_dim: int | None
    source: int
    output: Tensor


@dataclass(frozen=True)
class Statistic:
    """An operator that computes statistics over dimensions.

    Args:
        index: Running number of the operator.
        operator: Its name.
        dims: Position of a tensor among the tensor arguments, its dimension, and what that is.
    """

    index: int
    operator: str
    dims: tuple[tuple[int, int, Expression], ...]


class Trace:
    """Expressions of all tensors so far; rules read and extend it.

    Args:
        tensors: Parameters and buffers by name; aliases of one tensor share their expressions.

    Attributes:
        uses: Multiplications with parameters, in order.
        embedded: Names of parameters whose rows are looked up.
        statistics: Operators that compute statistics over units.
        unknown: Labels of operators without a rule that touched dimensions that could be cut.
        of_parameters: Identities of tensors that are computed from parameters alone.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.uses: list[WeightUse] = []
        self.embedded: set[str] = set()
        self.statistics: list[Statistic] = []
        self.unknown: dict[str, None] = {}
        self.of_parameters = {id(t) for t in tensors.values() if isinstance(t, nn.Parameter)}
        self._dims: dict[int, list[Expression]] = {}
        self._names: dict[int, tuple[str, tuple[int | None, ...]]] = {}
        self._roots: dict[int, int] = {}
        self._origins: dict[int, int] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in self._dims:
                self._dims[id(tensor)] = [Atom(size) for size in tensor.shape]
                self._names[id(tensor)] = (name, tuple(range(tensor.ndim)))

    def dims(self, tensor: Tensor) -> list[Expression]:
        """The dimensions of a tensor; those of an unknown one are data."""
        if id(tensor) not in self._dims:
            self._dims[id(tensor)] = [Atom(n, DATA if n > 1 else "") for n in tensor.shape]
        return [resolve(dim) for dim in self._dims[id(tensor)]]

    def set(self, tensor: Tensor, dims: Sequence[Expression]) -> None:
        """Note the dimensions of an output."""
        now = [resolve(dim) for dim in dims]
        sizes = [dim.size for dim in now]
        if sizes != list(tensor.shape):
            raise ValueError(f"{sizes} are not the sizes of {tuple(tensor.shape)}")
        self._dims[id(tensor)] = now

    @contextmanager
    def apart(self, tensor: Tensor, dim: int) -> Iterator[None]:
        """Follow an operator as if one dimension of an input were its own, to be selected from."""
        before = self.dims(tensor)
        own: list[Expression] = [*before]
        own[dim] = Atom(before[dim].size)
        self._dims[id(tensor)] = own
        try:
            yield
        finally:
            self._dims[id(tensor)] = [*before]

    def equal(self, a: Expression, b: Expression, operator: Operator) -> None:
        """Make two dimensions one."""
        make_equal(a, b, operator.label)

    # ---------------------------------------------------------------- what a tensor is made of

    def parameter_of(self, tensor: Tensor) -> tuple[str, tuple[int | None, ...]] | None:
        """The parameter that a tensor is a view or cast of.

        Returns:
            Its name and the dimension of the parameter behind each dimension of the tensor, or
            None for those where it was reshaped; None if the tensor is no parameter.
        """
        return self._names.get(id(tensor))

    def alias(self, output: Tensor, source: Tensor, dims: Sequence[int | None]) -> None:
        """Note that a tensor holds the values of another, with its dimensions in another order.

        Args:
            output: The new tensor.
            source: The other one.
            dims: Dimension of ``source`` behind each one of ``output``; None where it was reshaped.
        """
        self._roots[id(output)] = self.root(source)
        known = self._names.get(id(source))
        if known is not None and id(output) not in self._names:
            name, order = known
            moved = (None if dim is None else order[dim] for dim in dims)
            self._names[id(output)] = (name, tuple(moved))
        if (origin := self._origins.get(id(source))) is not None:
            self._origins[id(output)] = origin

    def root(self, tensor: Tensor) -> int:
        """Identity of the activation that a tensor is, apart from changes of its shape."""
        return self._roots.get(id(tensor), id(tensor))

    def origin(self, tensor: Tensor) -> int | None:
        """Running number of the product or sum that made an activation."""
        return self._origins.get(id(tensor))

    def set_origin(self, tensor: Tensor, index: int | None) -> None:
        """Note which product or sum made an activation."""
        if index is not None:
            self._origins[id(tensor)] = index

    def chooses_expert(self, tensor: Tensor, dim: int) -> bool:
        """Whether a dimension counts the matrices in a parameter, one for each expert."""
        return dim == 0 and tensor.ndim == 3 and self.parameter_of(tensor) is not None

    def experts(self, operator: Operator) -> str:
        """Why the number of experts stays."""
        return f"the matrices of a parameter (experts) are chosen by number in {operator.module}"

    # ---------------------------------------------------------------- operators without a rule

    def refuse(self, operator: Operator, reason: str = "") -> None:
        """Fix everything an operator touches; note it if that is something that could be cut."""
        label = reason or operator.label
        touched = [dim for tensor in operator.inputs for dim in self.dims(tensor)]
        if any(atom.size > 1 and not atom.reasons for dim in touched for atom in atoms_of(dim)):
            self.unknown[label] = None
        for dim in touched:
            fix(dim, label)
        for tensor in operator.outputs:
            if id(tensor) not in {id(each) for each in operator.inputs}:
                self._dims[id(tensor)] = [Atom(n, label if n > 1 else "") for n in tensor.shape]
