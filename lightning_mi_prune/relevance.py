"""WEIGH    which part of the layer above the loss listens to: one matrix for every place.

``G = E[g g']``, with ``g`` the gradient of an example's loss at the output of a reader, summed over
its positions. The layer above is then seen as ``G^(1/2) z + noise``: a channel that is noisy where
the loss does not listen, and ``1/2 tr(G Cov(z | kept))`` is the expected rise of the loss in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.wording import counted

__all__ = [
    "GradientSums",
    "Relevance",
    "check_gradients",
    "relevance_of",
    "relevance_of_readers",
]


@dataclass(frozen=True)
class Relevance:
    """What matters at one place, and how much.

    Args:
        matrix: ``G (m, m)`` over the outputs of the reader or, where several layers read the same
            units, ``G (d, d)`` over the units themselves, which all of them hand down.
        inside: Whether the matrix is over the units.
        taylor: First-order change of the loss without each unit ``(units,)``, if it was gathered.
    """

    matrix: Tensor
    inside: bool = False
    taylor: Tensor | None = None


class GradientSums:
    """Sums over a bounded sample of training steps at one place, in float64.

    Sums of fixed shape: ranks are reduced by addition.

    Args:
        dimension: Outputs of the reader, or entries of the units where several layers read them.
        units: Units of the axis.
        inside: Whether the gradients are those of the units.
    """

    def __init__(self, dimension: int, units: int, *, inside: bool = False) -> None:
        self.dimension, self.units, self.inside = dimension, units, inside
        self.matrix = torch.zeros(dimension, dimension, dtype=torch.float64)
        self.taylor = torch.zeros(units, dtype=torch.float64)
        # Examples heard, steps heard, steps left out because a gradient was not finite.
        self.counts = torch.zeros(3, dtype=torch.float64)

    @property
    def packed_size(self) -> int:
        """Length of :meth:`packed`."""
        return 3 + self.units + self.dimension * (self.dimension + 1) // 2

    def packed(self) -> Tensor:
        """All sums as one vector; of the symmetric matrix one triangle."""
        rows, columns = torch.triu_indices(self.dimension, self.dimension)
        return torch.cat([self.counts, self.taylor, self.matrix[rows, columns]])

    def unpack(self, packed: Tensor) -> GradientSums:
        """Take over sums that :meth:`packed` wrote.

        Raises:
            PruningError: If the vector is not of this shape.

        Example:
            >>> sums = GradientSums(2, 1)
            >>> sums.matrix += 3.0
            >>> GradientSums(2, 1).unpack(sums.packed()).matrix
            tensor([[3., 3.],
                    [3., 3.]], dtype=torch.float64)
        """
        if packed.shape != (self.packed_size,) or packed.dtype != torch.float64:
            raise PruningError(
                f"Sums of gradients of shape {tuple(packed.shape)} and type {packed.dtype}; "
                f"expected ({self.packed_size},) of float64. They belong to another model."
            )
        counts, taylor, triangle = torch.split(
            packed.cpu(), [3, self.units, self.packed_size - 3 - self.units]
        )
        rows, columns = torch.triu_indices(self.dimension, self.dimension)
        self.matrix = torch.zeros(self.dimension, self.dimension, dtype=torch.float64)
        self.matrix[rows, columns] = triangle
        self.matrix[columns, rows] = triangle
        self.counts, self.taylor = counts.clone(), taylor.clone()
        return self


def check_gradients(sums: Mapping[str, GradientSums], *, scaled: bool = False) -> None:
    """Refuse sums that say nothing, or nothing that can be trusted.

    Args:
        sums: What was gathered, by key.
        scaled: Whether a gradient scaler ran: it looks for the largest scale without overflow, so
            some steps are expected to be left out.

    Raises:
        PruningError: If no training step was heard, gradients were not finite, or none arrived.
    """
    for key, found in sums.items():
        _, steps, skipped = (int(n) for n in found.counts)
        if skipped and not (scaled and steps):
            raise PruningError(
                f"NaN or infinite gradients at {key!r} in {skipped} of "
                f"{counted(steps + skipped, 'training step')}. Expected finite ones; lower the "
                "learning rate, clip gradients, or use relevance='readers', which needs none."
            )
        if not steps:
            raise PruningError(
                f"relevance='gradient' asks for training steps, but none were heard at {key!r}. "
                "Expected at least one backward pass through the network before a cut; train "
                "first, or use relevance='readers', which needs none."
            )
        if found.dimension and not found.matrix.any():
            raise PruningError(
                f"No gradient reached {key!r} in {counted(steps, 'training step')}, so nothing "
                "above it matters to the loss. Exclude the axis, or use relevance='readers'."
            )


def relevance_of(sums: Mapping[str, GradientSums]) -> dict[str, Relevance]:
    """``G`` for one example, by key.

    Example:
        >>> sums = GradientSums(1, 1)
        >>> sums.matrix += 6.0
        >>> sums.counts += 2.0
        >>> relevance_of({"ffn": sums})["ffn"].matrix
        tensor([[3.]], dtype=torch.float64)
    """
    found = {}
    for key, each in sums.items():
        examples = each.counts[0].clamp_min(1)
        taylor = (each.taylor / examples).sqrt()
        found[key] = Relevance(each.matrix / examples, each.inside, taylor)
    return found


def relevance_of_readers(
    axis: WidthAxis, weights: Mapping[str, Tensor], rows: Mapping[str, Tensor | None]
) -> dict[str, Relevance]:
    """``G = sum W'W`` over the kept rows of every projection above: no gradients needed.

    Args:
        axis: The axis to weigh the readers of.
        weights: Parameters of the model as it stands, by qualified name.
        rows: Rows that are kept of each tensor above; None or missing keeps all.
    """
    found = {}
    if axis.above and not axis.sites:
        total: Tensor | None = None
        for reader in axis.above:
            weight = weights[f"{reader}.weight"].detach().double()
            kept = rows.get(f"{reader}.weight")
            weight = weight if kept is None else weight[kept.to(weight.device)]
            total = weight.mT @ weight if total is None else total + weight.mT @ weight
        if total is not None:
            found[axis.name] = Relevance(total)
    return found
