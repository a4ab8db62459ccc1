"""JUDGE    in which order an axis gives up its units: MutualInformation, and the rivals."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_mi_prune.elimination import Elimination, eliminate
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.information import inverse, plugin_bias, shrink, unit_information

__all__ = [
    "ActivationNorm",
    "Criterion",
    "Evidence",
    "Magnitude",
    "MutualInformation",
    "Random",
    "copies_kept",
]


@dataclass(frozen=True)
class Evidence:
    """All that is known of one axis when it is judged; plain tensors in float64.

    Args:
        name: Name of the axis.
        entries: Entries per unit ``g``.
        samples: Samples ``N`` behind the moments.
        mean: Mean of the entries ``(d,)``.
        covariance: Covariance of the entries ``(d, d)``.
        readout: Linear map ``(m, d)`` to the kept units of the layer above. Weighting its rows
            (by relevance to the loss, say) changes what counts as information, nothing else.
        rows: The weight rows ``(units, w)`` that make each unit, for criteria that look at them.
    """

    name: str
    entries: int
    samples: int
    mean: Tensor
    covariance: Tensor
    readout: Tensor
    rows: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @property
    def units(self) -> int:
        """Number of units on the axis now."""
        return self.covariance.shape[0] // self.entries

    def above(self) -> Tensor:
        """Covariance ``(m, m)`` of the layer above, a linear read-out of the entries."""
        return self.readout @ self.covariance @ self.readout.mT

    def noise(self, ridge: float) -> float:
        """Noise variance on the layer above: ``ridge`` times its mean variance."""
        return ridge * float(self.above().diagonal().mean())

    def check(self) -> None:
        """Refuse evidence too thin to score.

        Raises:
            PruningError: If ``N <= m + g``: too few for the layer above and one unit.
        """
        dimension = self.readout.shape[0]
        if self.samples <= dimension + self.entries:
            raise PruningError(
                f"{self.samples} samples were heard at {self.name!r}, but scoring against the "
                f"{dimension} units above needs more than {dimension + self.entries}, better "
                f"{20 * dimension}. Use a larger validation set, raise limit_val_batches or "
                "positions, or exclude the axis."
            )


class Criterion(Protocol):
    """Anything that puts the units of an axis in the order in which they may go."""

    def rank(self, evidence: Evidence, keep: int) -> Elimination:
        """Order of at least all but ``keep`` units, the first to go first."""
        ...


@dataclass(frozen=True)
class MutualInformation:
    """Gaussian mutual information with the kept units of the layer above (our reading).

    ``topk`` ranks every unit alone by ``I(x_i; Y)``, the literal reading of Fan et al. (2021);
    ``conditional`` removes, again and again, the unit whose absence costs the least of the joint
    ``I(X_kept; Y)``, so that copies of the same information are not kept twice.

    Args:
        selection: ``"conditional"`` or ``"topk"``.
        ridge: Noise on the layer above as a share of its mean variance. Towards 0 the score is
            log-determinant MI, large values approach least-squares reconstruction of the layer
            above. ``conditional`` needs it above 0.

    Raises:
        PruningError: If an option is outside its range.
    """

    selection: Literal["conditional", "topk"] = "conditional"
    ridge: float = 0.1

    def __post_init__(self) -> None:
        if self.selection not in ("conditional", "topk"):
            raise PruningError(f"selection={self.selection!r}; expected 'conditional' or 'topk'.")
        least = 0.0 if self.selection == "topk" else 1e-12
        if not least <= self.ridge <= 1e6:
            raise PruningError(
                f"ridge={self.ridge!r}; expected a number up to a million, "
                + ("from 0." if self.selection == "topk" else "above 0 ('topk' allows 0).")
            )

    def rank(self, evidence: Evidence, keep: int) -> Elimination:
        """Order the units; costs are nats."""
        evidence.check()
        if self.selection == "topk":
            scores = self.scores(evidence)
            order = torch.argsort(scores, stable=True)
            return Elimination(tuple(order.tolist()), tuple(scores[order].tolist()))
        # y = T x + noise, so Cov(x | y)^-1 = Cov(x)^-1 + T'T / noise: no second inverse.
        noise = max(evidence.noise(self.ridge), torch.finfo(torch.float64).tiny)
        covariance = evidence.covariance
        if evidence.samples < 2 * len(covariance):  # exact copies stay exact where there is enough
            covariance = shrink(covariance, evidence.samples)
        precision = inverse(covariance)
        posterior = precision + evidence.readout.mT @ evidence.readout / noise
        return eliminate(precision, posterior, keep=keep, entries=evidence.entries)

    def scores(self, evidence: Evidence) -> Tensor:
        """Information of each unit alone with the layer above, less its plug-in bias ``(units,)``.

        Raises:
            PruningError: If there is no ranking: without a ridge, at least as many independent
                read-outs as entries determine every unit exactly.
        """
        readouts, entries = evidence.readout.shape
        if self.ridge == 0 and readouts >= entries:
            raise PruningError(
                f"ridge=0 gives no ranking at {evidence.name!r}: its {entries} entries are "
                f"determined by the {readouts} units above, so every score is infinite. Expected "
                "fewer units above than entries; set a ridge above 0, such as 0.01."
            )
        above = evidence.above()
        variance = above.diagonal().mean()
        noisy = above + torch.diag(torch.full_like(above.diagonal(), self.ridge) * variance)
        noisy = noisy + torch.diag(torch.full_like(above.diagonal(), 1e-12) * variance + 1e-300)
        effective = float(torch.linalg.solve(noisy, above).diagonal().sum())
        cross = evidence.covariance @ evidence.readout.mT
        scores = unit_information(evidence.covariance, cross, noisy, evidence.entries)
        spread = float(scores.max() - scores.min())
        if len(scores) > 1 and spread <= 1e-3 * float(scores.max().clamp_min(1e-300)):
            warnings.warn(
                f"The units of {evidence.name!r} all score {float(scores.max()):.3g} nats: no "
                "ranking. Raise the ridge, or use selection='conditional'.",
                PruningWarning,
                stacklevel=2,
            )
        return scores - plugin_bias(evidence.samples, effective, evidence.entries)


@dataclass(frozen=True)
class Magnitude:
    """Euclidean norm of the weights that make and read a unit (group L2)."""

    def rank(self, evidence: Evidence, keep: int) -> Elimination:
        """Order the units by norm, smallest first."""
        read = evidence.readout.square().sum(0).view(-1, evidence.entries).sum(1)
        return _ascending(read + evidence.rows.to(read).square().sum(1))


@dataclass(frozen=True)
class ActivationNorm:
    """Root mean square of a unit times the norm of the weights that read it (Wanda-like)."""

    def rank(self, evidence: Evidence, keep: int) -> Elimination:
        """Order the units by what they send upwards, smallest first."""
        power = evidence.covariance.diagonal() + evidence.mean.square()
        sent = power * evidence.readout.square().sum(0)
        return _ascending(sent.view(-1, evidence.entries).sum(1))


@dataclass(frozen=True)
class Random:
    """A seeded random order, the floor of every comparison."""

    seed: int = 0

    def rank(self, evidence: Evidence, keep: int) -> Elimination:
        """Order the units at random, the same way for the same seed and axis."""
        salt = sum(ord(c) * (i + 1) for i, c in enumerate(evidence.name))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + salt)
        return _ascending(torch.rand(evidence.units, generator=generator, dtype=torch.float64))


def _ascending(scores: Tensor) -> Elimination:
    order = torch.argsort(scores, stable=True)
    return Elimination(tuple(order.tolist()), tuple(scores[order].tolist()))


def copies_kept(evidence: Evidence, kept: tuple[int, ...]) -> int:
    """How many kept units are copies (correlation above 0.999) of another kept unit."""
    if evidence.entries != 1:
        return 0
    index = torch.tensor(kept, device=evidence.covariance.device)
    block = evidence.covariance[index][:, index]
    scale = block.diagonal().clamp_min(1e-300).sqrt()
    correlation = (block / scale[:, None] / scale[None, :]).abs().fill_diagonal_(0)
    return int((correlation.tril() > 0.999).any(1).sum())
