"""Count, mean and covariance of units, summed in double precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import Self

from lightning_mi_prune.core.errors import PruningError, counted

__all__ = [
    "ExactSums",
    "Moments",
    "add_outer",
    "check_moments",
    "mirror",
    "rounding_variance",
    "stabilize",
]


class ExactSums(Metric):
    """A metric of float64 sums, whose states move with a module and are never rounded with it.

    ``module.to(torch.bfloat16)`` leaves the type as it is, and where a device has no float64 (MPS)
    the states stay where they are. Subclasses add by assignment, never in place: states that were
    reset in inference mode could not be added to outside of it.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    @property
    def packed_size(self) -> int:
        """Numbers of all sums together."""
        return sum(getattr(self, name).numel() for name in self._defaults)

    def packed(self) -> Tensor:
        """All sums as one vector."""
        return torch.cat([getattr(self, name).reshape(-1) for name in self._defaults])

    def unpack(self, packed: Tensor) -> Self:
        """Take over the sums of such a vector."""
        sizes = [getattr(self, name).numel() for name in self._defaults]
        for name, part in zip(self._defaults, torch.split(packed, sizes), strict=True):
            setattr(self, name, part.reshape(getattr(self, name).shape).clone())
        self._update_count = max(1, self._update_count)  # else torchmetrics warns in compute()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        def move(x: Tensor) -> Tensor:
            place = fn(torch.zeros(0, device=x.device)).device
            return x if place.type == "mps" else x.to(place)

        super()._apply(move, *args, **kwargs)
        return self


# Columns of one product of matrices: the matrix of sums is symmetric, so what lies below its
# diagonal blocks of this size is not computed. Smaller ones save more and are slower products.
_BLOCK = 384


# Variance, as a share of the squared mean, that single precision cannot tell from none: some ten
# of its steps.
_SINGLE = 1e-12


class Moments(Metric):
    """Count, sum and sum of outer products of what one group carries, in float64.

    Sums of fixed shape, so memory does not depend on how much is heard and ranks are reduced by
    addition. Of the symmetric ``outer`` only the upper triangle counts: what is below the diagonal
    blocks is left behind by updates, and filled in by those who read it.

    Args:
        dimension: Entries ``d`` of the group.

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        >>> mean, covariance = moments.compute()
        >>> mean, covariance
        (tensor([2., 4.], dtype=torch.float64), tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64))
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

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

    def update(self, x: Tensor) -> None:
        """Add samples ``x (n, d)`` where they are; on the CPU if their device has no float64."""
        home = torch.device("cpu") if x.device.type == "mps" else x.device
        # Validation runs in inference mode and maybe autocast; sums stay ordinary float64 tensors.
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            self.to(home)
            x = x.to(home).to(torch.float64)
            if self.outer.ndim == 0:
                self.outer = torch.zeros(self.dimension, self.dimension).to(x)
            self.count += x.shape[0]
            self.total += x.sum(0)
            add_outer(self.outer, x)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean ``(d,)`` and covariance ``(d, d)`` (divided by ``N``)."""
        return self.statistics()

    @property
    def packed_size(self) -> int:
        """Length of :meth:`packed`: ``1 + d + d (d + 1) / 2``."""
        return 1 + self.dimension + self.dimension * (self.dimension + 1) // 2

    def packed(self) -> Tensor:
        """The sums as one float64 vector ``(1 + d + d (d + 1) / 2,)``: each outer product once.

        What ranks add up and what a checkpoint holds: half of the memory of the sums.
        """
        rows, columns = torch.triu_indices(self.dimension, self.dimension, device=self.outer.device)
        outer = self.outer[rows, columns] if self.outer.ndim else self.outer.expand(len(rows))
        return torch.cat([self.count.to(self.total).reshape(1), self.total, outer])

    def unpack(self, packed: Tensor) -> Moments:
        """Take over sums that :meth:`packed` wrote, whatever was heard before.

        Raises:
            PruningError: If the vector is not of this dimension.

        Example:
            >>> heard = Moments(2)
            >>> heard.update(torch.tensor([[1.0, 2.0]]))
            >>> Moments(2).unpack(heard.packed()).outer
            tensor([[1., 2.],
                    [2., 4.]], dtype=torch.float64)
        """
        d, expected = self.dimension, self.packed_size
        if packed.shape != (expected,) or packed.dtype != torch.float64:
            raise PruningError(
                f"Sums of shape {tuple(packed.shape)} and type {packed.dtype}; expected "
                f"({expected},) of float64 for {counted(d, 'entry', 'entries')}. They belong to "
                "another model."
            )
        count, total, triangle = torch.split(packed, [1, d, expected - 1 - d])
        rows, columns = torch.triu_indices(d, d, device=packed.device)
        outer = packed.new_zeros(d, d)
        outer[rows, columns] = triangle
        outer[columns, rows] = triangle
        self.count, self.total, self.outer = count.round().long()[0], total.clone(), outer
        return self

    def statistics(self) -> tuple[Tensor, Tensor]:
        """What :meth:`compute` says, uncached, and unsqueezed where there is one entry."""
        mean = self.total / self.count
        return mean, mirror((self.outer / self.count).addr_(mean, mean, alpha=-1))

    def stabilized(self) -> tuple[Tensor, Tensor]:
        """The same, with a covariance that can be inverted (:func:`stabilize`)."""
        mean, covariance = self.statistics()
        return mean, stabilize(covariance, mean, self.count)


def add_outer(sums: Tensor, x: Tensor) -> None:
    """Add ``x' x`` of samples ``x (n, d)`` to the upper triangle of ``sums (d, d)``, in place.

    What is below the diagonal blocks is left behind: :func:`mirror` fills it in.
    """
    for start in range(0, len(sums), _BLOCK):
        rows = slice(start, start + _BLOCK)
        sums[rows, start:].addmm_(x[:, rows].mT, x[:, start:])


def mirror(sums: Tensor) -> Tensor:
    """Make a matrix symmetric, in place, by its upper triangle.

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
    """Make a covariance that is the difference of two sums fit to be inverted, in place.

    Entries that never change, up to rounding, get no variance at all. All others are observed
    through noise of the size of that rounding, for its sum over many entries must not turn a small
    variance negative.

    Args:
        covariance: Covariance ``(d, d)``.
        mean: Mean of the entries ``(d,)``.
        count: Samples that were added up.

    Example:
        >>> nearly = torch.tensor([[-1e-14, 0.0], [0.0, 1.0]], dtype=torch.float64)
        >>> stabilize(nearly, torch.ones(2, dtype=torch.float64), torch.tensor(100))
        tensor([[0.0000, 0.0000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    noise = rounding_variance(mean, count) * len(mean) ** 0.5
    constant = covariance.diagonal() <= noise
    covariance.diagonal().add_(noise)
    return covariance.masked_fill_(constant[:, None] | constant, 0.0)


def rounding_variance(mean: Tensor, count: Tensor) -> Tensor:
    """Variance of each entry that says nothing: what single precision and sums in double round.

    Sums of ``count`` squares of one size round in the same way each time, so that their error
    grows with the count.

    Example:
        >>> rounding_variance(torch.tensor([1.0, 10.0]), torch.tensor(1_000))
        tensor([1.0000e-12, 1.0000e-10])
    """
    return (count * 2.0**-53).clamp_min(_SINGLE) * mean.square()


def check_moments(heard: Mapping[str, Moments]) -> None:
    """Refuse sums that cannot be scored.

    Raises:
        PruningError: If a group was never reached, or carries NaN or infinite values.
    """
    for name, moments in heard.items():
        if int(moments.count) == 0:
            raise PruningError(
                f"Nothing was heard at {name!r}: its layer never ran in validation. Expected "
                "validation_step to call the network; exclude the group or name the module."
            )
        if not torch.isfinite(moments.total).all() or not torch.isfinite(moments.outer).all():
            raise PruningError(
                f"NaN or infinite activations at {name!r} during validation. Expected finite "
                "values; look for a diverged loss or an overflow in half precision first."
            )
