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

__all__ = [
    "Kernel",
    "LayerAngles",
    "LayerCKA",
    "u_centered",
    "unbiased_cka",
]

Kernel = Literal["linear", "rbf"]


class LayerCKA(ExactSums):
    """Centered kernel alignment (CKA) of every pair of layers, streamed over minibatches.

    The sums are those of the unbiased HSIC (Song et al. 2012, eq. 5) of each batch, of fixed size
    ``layers x layers``, so memory does not depend on how much is heard, and ranks are reduced by
    addition. Batches count by their ``n (n - 3)``, so a short last one does not count as much as
    a full one (with equal batches: the minibatch CKA of Nguyen et al. 2021). About 0 for
    independent layers at any batch size, 1 for rotated and scaled copies.

    Args:
        layers: Number of layers ``L``.
        kernel: ``"linear"``, or ``"rbf"``: Gaussian, of the width ``bandwidth`` times the median
            distance of the batch (Kornblith et al. 2019, section 4).
        bandwidth: Share of the median distance; only ``"rbf"`` looks at it.

    Raises:
        PruningError: If the options are not these.

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
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 1:
            raise PruningError(f"layers={layers!r}; expected a whole number from 1.")
        if kernel not in ("linear", "rbf"):
            raise PruningError(f"kernel={kernel!r}; expected 'linear' or 'rbf'.")
        if not 0 < bandwidth < float("inf"):
            raise PruningError(f"bandwidth={bandwidth!r}; expected a number above 0.")
        self.layers, self.kernel, self.bandwidth = layers, kernel, bandwidth
        zeros = torch.zeros(layers, layers, dtype=torch.float64)
        self.add_state("products", zeros, dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[Tensor]) -> None:
        """Add what all layers say on one batch of samples.

        Fewer than four samples say nothing of a likeness and are left out.

        Args:
            outputs: One ``(n, d)`` a layer; widths may differ, samples are the same ones.

        Raises:
            PruningError: If there is another number of layers, or they heard other samples.
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
            home = self.products.device
            grams = [self._gram(x.detach().to(home, torch.float64)).flatten() for x in outputs]
            centered = torch.stack(grams)
            self.products = self.products + centered @ centered.mT
            self.pairs = self.pairs + sizes[0] * (sizes[0] - 3)

    def hsic(self) -> Tensor:
        """Unbiased HSIC of every pair ``(L, L)``; that of independent layers is 0 on average."""
        if not self.pairs:
            raise PruningError(
                "No batch of four samples or more was heard, so layers cannot be compared. Use "
                "larger validation batches."
            )
        return self.products / self.pairs

    def compute(self) -> Tensor:
        """CKA of every pair ``(L, L)``; 0 where a layer is constant, alike to nothing.

        Raises:
            PruningError: If too little was heard, or values that are not finite.
        """
        hsic = self.hsic()
        odd = (~hsic.diagonal().isfinite()).nonzero().flatten().tolist()
        if odd:
            raise PruningError(
                f"Layers {odd} say NaN or infinite values. Expected finite activations; look for "
                "a diverged loss or an overflow in half precision first."
            )
        scale = hsic.diagonal().clamp_min(0).sqrt()
        alike = hsic / torch.outer(scale, scale)
        return torch.where(torch.outer(scale, scale) > 0, alike, 0.0)

    def _gram(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)  # no kernel here changes with it, and large means cost digits
        if self.kernel == "linear":
            return u_centered(x @ x.mT)
        distances = torch.cdist(x, x).square()
        apart = distances[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
        width = self.bandwidth**2 * apart.median()
        if width == 0:  # no layer to speak of: rounding would make two of them copies
            return torch.zeros_like(distances)
        return u_centered((-distances / (2 * width)).exp())


class LayerAngles(ExactSums):
    """Mean angle between every pair of states of a stack, as a share of a half turn.

    ``arccos(cos(x, y)) / pi``, averaged over samples: 0 for the same direction, 1/2 for
    orthogonal states (Gromov et al. 2024, arXiv 2403.17887, eq. 7).

    Args:
        states: Number of states ``S``: the input of the first layer and every output.

    Raises:
        PruningError: If ``states`` is no whole number from 1.

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
        if isinstance(states, bool) or not isinstance(states, int) or states < 1:
            raise PruningError(f"states={states!r}; expected a whole number from 1.")
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
            home = self.total.device
            x = torch.stack([x.detach().to(home, torch.float64) for x in outputs])
            x = functional.normalize(x, dim=2)
            cosines = torch.einsum("and,bnd->abn", x, x).clamp(-1, 1)
            self.total = self.total + cosines.acos().sum(2) / math.pi
            self.count = self.count + x.shape[1]

    def compute(self) -> Tensor:
        """Mean angle of every pair ``(S, S)``; exactly 0 of a state with itself.

        Raises:
            PruningError: If nothing was heard, or values that are not finite.
        """
        if not self.count:
            raise PruningError("No state was heard; run validation first.")
        found = self.total / self.count
        odd = (~found.diagonal().isfinite()).nonzero().flatten().tolist()
        if odd:
            raise PruningError(
                f"States {odd} hold NaN or infinite values. Expected finite activations; look for "
                "a diverged loss or an overflow in half precision first."
            )
        return found.fill_diagonal_(0)


def unbiased_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centered kernel alignment from the unbiased HSIC (Song et al. 2012, eq. 5).

    About 0 for independent data at any ``N``, 1 for rotated and scaled copies.

    Args:
        x: Samples ``(N, d)`` with ``N`` above 3.
        y: Samples ``(N, m)``.

    Example:
        >>> x = torch.randn(16, 4, dtype=torch.float64)
        >>> round(unbiased_cka(x, 3 * x.flip(1)).item(), 6)
        1.0
    """
    kx, ky = u_centered(x @ x.mT), u_centered(y @ y.mT)
    return (kx * ky).sum() / ((kx * kx).sum() * (ky * ky).sum()).sqrt()


def u_centered(gram: Tensor) -> Tensor:
    """A Gram matrix ``(N, N)`` centred so that products of two are unbiased (U-centring).

    ``sum(u_centered(K) * u_centered(L)) / (N (N - 3))`` is the unbiased HSIC of Song et al. 2012.
    """
    n = gram.shape[0]
    gram = gram - torch.diag(gram.diagonal())
    means = gram.sum(0) / (n - 2)
    gram = gram - means[:, None] - means[None, :] + means.sum() / (n - 1)
    return gram - torch.diag(gram.diagonal())
