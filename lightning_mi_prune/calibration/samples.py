"""Samples of inputs in temporary files, whose sums are made when they are asked for.

The sums of all inputs at once can outgrow the model: ``8 d^2`` bytes each. Samples grow with ``d``
only, and wait on the disk until one input after another is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mi_prune.calibration.moments import Moments, check_finite
from lightning_mi_prune.core.spilling import in_file

__all__ = [
    "MomentsOnDemand",
    "StoredSamples",
    "StoredSums",
]


class StoredSamples:
    """Samples of one input, in files.

    Args:
        dimension: Entries ``d`` of a sample.

    Example:
        >>> samples = StoredSamples(2)
        >>> samples.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        >>> samples.count, samples.moments().total
        (2, tensor([4., 8.], dtype=torch.float64))
    """

    def __init__(self, dimension: int) -> None:
        self.dimension, self.count, self.is_finite = dimension, 0, True
        self._parts: list[tuple[Tensor, torch.device]] = []

    def update(self, x: Tensor) -> None:
        """Store samples ``(n, d)``."""
        self.count += len(x)
        self.is_finite &= bool(torch.isfinite(x).all())
        self._parts.append((in_file(x.detach().cpu()), x.device))

    def share_last(self, other: StoredSamples) -> None:
        """Add the samples that ``other`` stored last; both then read the same file."""
        part, device = other._parts[-1]
        self.count += len(part)
        self.is_finite &= other.is_finite
        self._parts.append((part, device))

    def moments(self) -> Moments:
        """Their sums: bit for bit what adding each part at once would have given."""
        found = Moments(self.dimension)
        with torch.no_grad():
            for part, device in self._parts:
                found.update(part.to(device))
        return found


@dataclass(frozen=True)
class StoredSums:
    """Sums of one input, in a file.

    Args:
        dimension: Entries ``d`` of a sample.
        count: Samples in the sums.
        is_finite: Whether all values are finite.
        packed: What :meth:`Moments.packed` wrote.
    """

    dimension: int
    count: int
    is_finite: bool
    packed: Tensor

    @classmethod
    def of(cls, sums: Moments) -> StoredSums:
        """The sums, in a file."""
        packed = sums.packed().cpu()
        finite = bool(torch.isfinite(packed).all())
        return cls(sums.dimension, int(sums.count), finite, in_file(packed))

    def moments(self) -> Moments:
        """The sums, in memory."""
        return Moments(self.dimension).unpack(self.packed)


class MomentsOnDemand(Mapping[str, Moments]):
    """Sums by key, each made whenever it is read; none is kept.

    Args:
        stored: What they are made from.

    Example:
        >>> samples = StoredSamples(1)
        >>> samples.update(torch.ones(3, 1))
        >>> int(MomentsOnDemand({"ffn": samples})["ffn"].count)
        3
    """

    def __init__(self, stored: Mapping[str, StoredSamples | StoredSums]) -> None:
        self._stored = dict(stored)

    def __getitem__(self, key: str) -> Moments:
        return self._stored[key].moments()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def check(self) -> None:
        """Refuse sums that cannot be scored.

        Raises:
            PruningError: If there are no samples at an input, or values that are not finite.
        """
        for key, stored in self._stored.items():
            check_finite(key, stored.count, finite=stored.is_finite)

    def reduced(self, add: Callable[[Mapping[str, Moments]], None]) -> MomentsOnDemand:
        """The same, added up with those of other processes, one after another, and stored again.

        Args:
            add: Adds sums up over ranks, in place; called with the same keys in the same order
                everywhere.
        """
        found: dict[str, StoredSums] = {}
        known: dict[int, StoredSums] = {}  # several keys may have the same samples
        for key in sorted(self._stored):
            stored = self._stored[key]
            if id(stored) not in known:
                sums = stored.moments()
                add({key: sums})
                known[id(stored)] = StoredSums.of(sums)
            found[key] = known[id(stored)]
        return MomentsOnDemand({key: found[key] for key in self})
