"""Count, mean and covariance of units, summed in double precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self

from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "ExactSums",
    "Moments",
    "add_outer",
    "check_finite",
    "check_moments",
    "check_packed",
    "mirror",
    "pack_symmetric",
    "rounding_variance",
    "stabilize",
    "unpack_symmetric",
]


class ExactSums(Metric):
    """A metric of float64 sums, whose states follow a module's device but never its precision.

    ``module.to(torch.bfloat16)`` leaves the type as it is, and where a device has no float64 (MPS)
    the states stay where they are.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    @property
    def packed_size(self) -> int:
        """Length of :meth:`packed`."""
        return sum(getattr(self, name).numel() for name in self._defaults)

    def packed(self) -> Tensor:
        """All sums as one vector."""
        return torch.cat([getattr(self, name).reshape(-1) for name in self._defaults])

    def unpack(self, packed: Tensor) -> Self:
        """Replace the sums by those that :meth:`packed` wrote."""
        sizes = [getattr(self, name).numel() for name in self._defaults]
        for name, part in zip(self._defaults, torch.split(packed, sizes), strict=True):
            setattr(self, name, part.reshape(getattr(self, name).shape).clone())
        self._update_count = max(1, self._update_count)  # else torchmetrics warns in compute()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        def move(x: Tensor) -> Tensor:
            device = fn(torch.zeros(0, device=x.device)).device
            return x if device.type == "mps" else x.to(device)

        super()._apply(move, *args, **kwargs)
        return self


# Columns of one product of matrices: the matrix of sums is symmetric, so what lies below its
# diagonal blocks of this size is not computed. Smaller blocks save more but are slower products.
_BLOCK = 192


# Variance, as a share of the squared mean, below which single precision cannot tell it from
# rounding: some ten of its steps.
_SINGLE = 1e-12


class Moments(ExactSums):
    """Count, sum and sum of outer products of the activations of one group, in float64.

    Sums of fixed shape: memory does not depend on the number of samples, and ranks are reduced by
    addition. Only the upper triangle of the symmetric ``outer`` is kept up to date; below its
    diagonal blocks, :func:`mirror` fills it in where it is read.

    Args:
        dimension: Entries ``d`` of the group.

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        >>> moments.compute()
        (tensor([2., 4.], dtype=torch.float64), tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64))
    """

    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        zeros = torch.zeros(dimension, dtype=torch.float64)
        self.dimension = dimension
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", zeros, dist_reduce_fx="sum")
        # Metric keeps a copy of every default, so this one starts as a scalar and is given its
        # d^2 entries by the first update: half the memory.
        self.add_state("outer", zeros.sum(), dist_reduce_fx="sum")
        # Metric wraps these in references to itself, and d^2 entries would wait for the garbage
        # collector.
        del self.update, self.compute

    def update(self, x: Tensor) -> None:
        """Add samples ``x (n, d)`` on their device, on the CPU where that has no float64 (MPS)."""
        device = torch.device("cpu") if x.device.type == "mps" else x.device
        # Validation runs in inference mode and maybe autocast; sums stay ordinary float64 tensors.
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            self.to(device)
            x = x.to(device).to(torch.float64)
            if self.outer.ndim == 0:
                self.outer = torch.zeros(self.dimension, self.dimension).to(x)
            self.count += x.shape[0]
            self.total += x.sum(0)
            add_outer(self.outer, x)

    def without(self, part: Moments) -> Moments:
        """The sums of the samples that are not in ``part``, which holds some of these.

        Example:
            >>> both, first = Moments(1), Moments(1)
            >>> both.update(torch.tensor([[1.0], [3.0]]))
            >>> first.update(torch.tensor([[1.0]]))
            >>> both.without(first).total
            tensor([3.], dtype=torch.float64)
        """
        rest = Moments(self.dimension)
        rest.count = self.count - part.count.to(self.count.device)
        rest.total = self.total - part.total.to(self.total.device)
        rest.outer = self.outer - part.outer.to(self.outer.device)
        return rest

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean ``(d,)`` and covariance ``(d, d)`` (divided by ``N``)."""
        return self.statistics()

    @property
    def packed_size(self) -> int:
        """Length of :meth:`packed`: ``1 + d + d (d + 1) / 2``."""
        return 1 + self.dimension + self.dimension * (self.dimension + 1) // 2

    def packed(self) -> Tensor:
        """The sums as one float64 vector with each outer product once: half of their memory."""
        size = self.packed_size - 1 - self.dimension
        outer = pack_symmetric(self.outer) if self.outer.ndim else self.outer.expand(size)
        return torch.cat([self.count.to(self.total).reshape(1), self.total, outer])

    def unpack(self, packed: Tensor) -> Self:
        """Replace the sums by those that :meth:`packed` wrote.

        Raises:
            PruningError: If the vector is not of this dimension.

        Example:
            >>> moments = Moments(2)
            >>> moments.update(torch.tensor([[1.0, 2.0]]))
            >>> Moments(2).unpack(moments.packed()).outer
            tensor([[1., 2.],
                    [2., 4.]], dtype=torch.float64)
        """
        d, size = self.dimension, self.packed_size
        check_packed(packed, size, f"activations of dimension {d}")
        count, total, triangle = torch.split(packed, [1, d, size - 1 - d])
        self.count, self.total = count.round().long()[0], total.clone()
        self.outer = unpack_symmetric(triangle, d)
        return self

    def statistics(self) -> tuple[Tensor, Tensor]:
        """As :meth:`compute`, but not cached, and not squeezed where there is one entry."""
        mean = self.total / self.count
        return mean, mirror((self.outer / self.count).addr_(mean, mean, alpha=-1))

    def stabilized(self) -> tuple[Tensor, Tensor]:
        """As :meth:`statistics`, with a covariance that can be inverted (:func:`stabilize`)."""
        mean, covariance = self.statistics()
        return mean, stabilize(covariance, mean, self.count)


def check_packed(packed: Tensor, size: int, what: str) -> None:
    """Refuse a vector that is not float64 and of the given length.

    Raises:
        PruningError: Naming its shape and type, and what it should hold the sums of.
    """
    if packed.shape != (size,) or packed.dtype != torch.float64:
        raise PruningError(
            f"The sums of {what} are {tuple(packed.shape)} of {packed.dtype}; expected ({size},) "
            "of float64. They belong to another model: calibrate this one again."
        )


def pack_symmetric(matrix: Tensor) -> Tensor:
    """The upper triangle of a matrix ``(d, d)`` as a vector ``(d (d + 1) / 2,)``."""
    rows, columns = torch.triu_indices(*matrix.shape, device=matrix.device)
    return matrix[rows, columns]


def unpack_symmetric(triangle: Tensor, size: int) -> Tensor:
    """The symmetric matrix ``(size, size)`` that :func:`pack_symmetric` packed.

    Example:
        >>> unpack_symmetric(torch.tensor([1.0, 2.0, 3.0]), 2)
        tensor([[1., 2.],
                [2., 3.]])
    """
    rows, columns = torch.triu_indices(size, size, device=triangle.device)
    matrix = triangle.new_zeros(size, size)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def add_outer(sums: Tensor, x: Tensor) -> None:
    """Add ``x' x`` of samples ``x (n, d)`` to the upper triangle of ``sums (d, d)``, in place.

    Below the diagonal blocks ``sums`` stays as it is: :func:`mirror` fills it in.
    """
    for start in range(0, len(sums), _BLOCK):
        rows = slice(start, start + _BLOCK)
        sums[rows, start:].addmm_(x[:, rows].mT, x[:, start:])


def mirror(sums: Tensor) -> Tensor:
    """Copy the upper triangle of a matrix to its lower one, in place.

    Example:
        >>> mirror(torch.tensor([[1.0, 2.0], [9.0, 3.0]]))
        tensor([[1., 2.],
                [2., 3.]])
    """
    for start in range(0, len(sums), _BLOCK):
        end = start + _BLOCK
        block = sums[start:end, start:end]
        block.copy_(block.triu() + block.triu(1).mT)  # rounding need not be symmetric
        sums[end:, start:end] = sums[start:end, end:].mT
    return sums


def stabilize(covariance: Tensor, mean: Tensor, count: Tensor) -> Tensor:
    """Make a covariance that was computed as the difference of two sums invertible, in place.

    Entries that are constant up to rounding get variance 0. All others get noise of the size of
    that rounding, which summed over many entries could otherwise turn a small variance negative.

    Args:
        covariance: Covariance ``(d, d)``.
        mean: Mean of the entries ``(d,)``.
        count: Samples in the sums.

    Example:
        >>> nearly = torch.tensor([[-1e-14, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> stabilize(nearly, torch.ones(2, dtype=torch.float64), torch.tensor(100))
        tensor([[0.0000, 0.0000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    noise = rounding_variance(mean, count) * len(mean) ** 0.5
    constant = covariance.diagonal() <= noise
    covariance.diagonal().add_(noise)
    covariance[constant] = 0.0
    covariance[:, constant] = 0.0
    return covariance


def rounding_variance(mean: Tensor, count: Tensor) -> Tensor:
    """Variance of each entry that is only rounding, of single precision or of sums in double.

    Sums of ``count`` squares of one size round in the same way each time, so that their error
    grows with the count.

    Example:
        >>> rounding_variance(torch.tensor([1.0, 10.0]), torch.tensor(1_000))
        tensor([1.0000e-12, 1.0000e-10])
    """
    return (count * 2.0**-53).clamp_min(_SINGLE) * mean.square()


def check_moments(found: Mapping[str, Moments]) -> None:
    """Refuse sums that cannot be scored.

    Args:
        found: Sums at each place, by key.

    Raises:
        PruningError: If a layer never ran, or had NaN or infinite inputs.
    """
    for name, moments in found.items():
        finite = torch.isfinite(moments.total).all() and torch.isfinite(moments.outer).all()
        check_finite(name, int(moments.count), finite=bool(finite))


def check_finite(name: str, count: int, *, finite: bool) -> None:
    """Refuse an input without samples, or with values that are not finite.

    Args:
        name: Its key.
        count: Samples that were taken.
        finite: Whether all their values are finite.

    Raises:
        PruningError: Naming it, and the remedy.
    """
    if count == 0:
        raise PruningError(
            f"No activations were collected at {name!r}: its layer never ran in validation. "
            "Expected validation_step to call the network; exclude the group or name the "
            "module."
        )
    if not finite:
        raise PruningError(
            f"NaN or infinite activations at {name!r} during validation. Expected finite "
            "values; look for a diverged loss or an overflow in half precision first."
        )
