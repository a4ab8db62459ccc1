"""CKA and angles between the layers of a stack, summed over batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lightning_mi_prune.calibration.moments import ExactSums
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.options import check_choice, check_count, check_number

__all__ = [
    "Kernel",
    "LayerAngles",
    "LayerCKA",
    "u_centered",
]

Kernel = Literal["linear", "rbf"]


class LayerCKA(ExactSums):
    """Centered kernel alignment (CKA) of every pair of layers, summed over minibatches.

    The sums are those of the unbiased HSIC (Song et al. 2012, eq. 5) of each batch, of fixed size
    ``layers x layers``: memory does not depend on the number of samples, and ranks are reduced by
    addition. Batches count by their ``n (n - 3)``, so that a short last one counts less than a full
    one (with equal batches: the minibatch CKA of Nguyen et al. 2021). About 0 for independent
    layers at any batch size, 1 for rotated and scaled copies.

    Args:
        layers: Number of layers ``L``.
        kernel: ``"linear"``, or ``"rbf"``: Gaussian, of the width ``bandwidth`` times the median
            distance of the batch (Kornblith et al. 2019, section 4).
        bandwidth: Share of the median distance; only for ``"rbf"``.

    Raises:
        PruningError: If an option is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> alignment = LayerCKA(layers=3)
        >>> for _ in range(50):
        ...     x, other = torch.randn(2, 32, 8)
        ...     alignment.update([x, -2 * x.flip(1), other])
        >>> [[abs(round(float(cka), 1)) for cka in row] for row in alignment.compute()]
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    products: Tensor
    pairs: Tensor

    def __init__(self, layers: int, kernel: Kernel = "linear", bandwidth: float = 1.0) -> None:
        super().__init__()
        check_count("layers", layers, least=1)
        check_choice("kernel", kernel, ("linear", "rbf"))
        check_number("bandwidth", bandwidth, above=0)
        self.layers, self.kernel, self.bandwidth = layers, kernel, bandwidth
        zeros = torch.zeros(layers, layers, dtype=torch.float64)
        self.add_state("products", zeros, dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[Tensor]) -> None:
        """Add the outputs of all layers on one batch of samples.

        The estimate needs four samples: smaller batches are left out.

        Args:
            outputs: One ``(n, d)`` a layer; widths may differ, samples are the same ones.

        Raises:
            PruningError: If there is another number of layers, or of samples in one of them.
        """
        sizes = [len(x) for x in outputs]
        if len(sizes) != self.layers or len(set(sizes)) != 1:
            raise PruningError(
                f"{counted(len(sizes), 'output')} of {sizes} samples; expected {self.layers}, one "
                "a layer, with the same samples in each."
            )
        if sizes[0] < 4:
            return
        with torch.inference_mode(False), torch.autocast(outputs[0].device.type, enabled=False):
            device = self.products.device
            grams = [self._gram(x.detach().to(device, torch.float64)).flatten() for x in outputs]
            centered = torch.stack(grams)
            # Not in place: sums that were reset in inference mode could not be added to outside.
            self.products = self.products + centered @ centered.mT
            self.pairs = self.pairs + sizes[0] * (sizes[0] - 3)

    def compute(self) -> Tensor:
        """CKA of every pair ``(L, L)``; 0 where a layer is constant.

        Raises:
            PruningError: If there are not enough samples, or values that are not finite.
        """
        if not self.pairs:
            raise PruningError(
                "No batch had four samples or more, so layers cannot be compared. Use larger "
                "validation batches."
            )
        hsic = self.products / self.pairs
        _check_finite(hsic, "The outputs of layers")
        scale = hsic.diagonal().clamp_min(0).sqrt()
        scales = torch.outer(scale, scale)
        return torch.where(scales > 0, hsic / scales, 0.0)

    def _gram(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)  # changes no kernel here, and large means cost digits
        if self.kernel == "linear":
            return u_centered(x @ x.mT)
        distances = torch.cdist(x, x).square()
        pairs = distances[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
        width = self.bandwidth**2 * pairs.median()
        if width == 0:  # a constant layer: by rounding two of them could look like copies
            return torch.zeros_like(distances)
        return u_centered((-distances / (2 * width)).exp())


class LayerAngles(ExactSums):
    """Mean angle between every pair of states of a stack, as a share of a half turn.

    ``arccos(cos(x, y)) / pi``, averaged over samples: 0 for the same direction, 1/2 for
    orthogonal states (Gromov et al. 2024, arXiv 2403.17887, eq. 7).

    Args:
        states: Number of states ``S``: the input of the first layer and every output.

    Raises:
        PruningError: If ``states`` is no whole number of at least 1.

    Example:
        >>> angles = LayerAngles(states=2)
        >>> angles.update([torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0]])])
        >>> round(float(angles.compute()[0, 1]), 4)
        0.25
    """

    total: Tensor
    count: Tensor

    def __init__(self, states: int) -> None:
        super().__init__()
        check_count("states", states, least=1)
        self.states = states
        zeros = torch.zeros(states, states, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[Tensor]) -> None:
        """Add samples of all states, each ``(n, d)`` of one width.

        Raises:
            PruningError: If their number, samples or widths differ.
        """
        shapes = [tuple(x.shape) for x in outputs]
        if len(shapes) != self.states or len(set(shapes)) != 1:
            raise PruningError(
                f"{len(shapes)} states of shapes {shapes}; expected {self.states} of one shape."
            )
        with torch.inference_mode(False), torch.autocast(outputs[0].device.type, enabled=False):
            device = self.total.device
            x = torch.stack([x.detach().to(device, torch.float64) for x in outputs])
            x = functional.normalize(x, dim=2)
            cosines = torch.einsum("and,bnd->abn", x, x).clamp(-1, 1)
            self.total = self.total + cosines.acos().sum(2) / math.pi
            self.count = self.count + x.shape[1]

    def compute(self) -> Tensor:
        """Mean angle of every pair ``(S, S)``; exactly 0 of a state with itself.

        Raises:
            PruningError: If there are no samples, or values that are not finite.
        """
        if not self.count:
            raise PruningError("No states were collected; run validation first.")
        angles = self.total / self.count
        _check_finite(angles, "States")
        return angles.fill_diagonal_(0)


def _check_finite(matrix: Tensor, what: str) -> None:
    odd = (~matrix.diagonal().isfinite()).nonzero().flatten().tolist()
    if odd:
        raise PruningError(
            f"{what} {odd} hold NaN or infinite values. Expected finite activations; look for a "
            "diverged loss or an overflow in half precision first."
        )


def u_centered(gram: Tensor) -> Tensor:
    """A Gram matrix ``(N, N)`` centered so that products of two are unbiased (U-centering).

    ``sum(u_centered(K) * u_centered(L)) / (N (N - 3))`` is the unbiased HSIC of Song et al. 2012.
    """
    n = gram.shape[0]
    gram = gram - torch.diag(gram.diagonal())
    means = gram.sum(0) / (n - 2)
    gram = gram - means[:, None] - means[None, :] + means.sum() / (n - 1)
    return gram - torch.diag(gram.diagonal())
