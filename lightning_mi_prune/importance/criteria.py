"""Criteria that put the units of a group in order: MutualInformation, and others to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted, number
from lightning_mi_prune.core.options import Importance
from lightning_mi_prune.importance.elimination import Elimination, eliminate_together
from lightning_mi_prune.importance.information import (
    inverse,
    plugin_bias,
    shrinkage,
    unit_information,
)
from lightning_mi_prune.importance.statistics import UnitStatistics

__all__ = [
    "ActivationNorm",
    "Criterion",
    "Magnitude",
    "MutualInformation",
    "Random",
    "Taylor",
    "copies_kept",
    "criterion_of",
]


class Criterion(Protocol):
    """Anything that puts the units of a group in the order in which they may go."""

    def rank(self, consumer_sets: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order of at least all but ``keep`` units, the first to go first.

        Args:
            consumer_sets: What is known at each place where the units are read, at least one.
            keep: Units that stay; 0 asks for the whole order.
        """
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
            above. ``conditional`` needs it above 0. With relevance, the layer above is weighted
            first, so that this is noise where the loss does not listen.

    Raises:
        PruningError: If an option is outside its range.
    """

    selection: Literal["conditional", "topk"] = "conditional"
    ridge: float = 1.0

    def __post_init__(self) -> None:
        if self.selection not in ("conditional", "topk"):
            raise PruningError(f"selection={self.selection!r}; expected 'conditional' or 'topk'.")
        least = 0.0 if self.selection == "topk" else 1e-12
        if not least <= self.ridge <= 1e6:
            raise PruningError(
                f"ridge={self.ridge!r}; expected a number up to a million, "
                + ("from 0." if self.selection == "topk" else "above 0 ('topk' allows 0).")
            )

    def rank(self, consumer_sets: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units; costs are nats, summed over the consumer_sets."""
        for evidence in consumer_sets:
            evidence.check()
        if self.selection == "topk":
            scores = torch.stack([self.scores(evidence) for evidence in consumer_sets]).sum(0)
            order = torch.argsort(scores, stable=True)
            return Elimination(tuple(order.tolist()), tuple(scores[order].tolist()))
        # One noise for all consumer_sets: where less of the loss hangs on the units, they say less.
        noise = sum(evidence.noise(self.ridge) for evidence in consumer_sets) / len(consumer_sets)
        # Where nothing changes above, nothing can be told of it, through any noise.
        pairs = [_precisions(e, noise or 1.0) for e in consumer_sets]
        return eliminate_together(pairs, keep=keep, entries=consumer_sets[0].entries)

    def scores(self, evidence: UnitStatistics) -> Tensor:
        """Information of each unit alone with the layer above, less its plug-in bias ``(units,)``.

        Raises:
            PruningError: If there is no ranking: without a ridge, at least as many independent
                read-outs as entries determine every unit exactly.
        """
        readouts, entries = evidence.readout.shape
        if not readouts:  # nothing was kept above, so there is nothing to know
            return evidence.mean.new_zeros(evidence.units)
        covariance, cross, above = evidence.joint()
        if self.ridge == 0 and readouts >= entries:
            raise PruningError(
                f"ridge=0 gives no ranking at {evidence.name!r}: "
                f"{counted(readouts, 'unit')} above determine all of its "
                f"{counted(entries, 'entry', 'entries')}, so every score is infinite. Expected "
                "fewer units above than entries; set a ridge above 0, such as 0.01."
            )
        variance = above.diagonal().mean()
        noisy = above + torch.diag(torch.full_like(above.diagonal(), self.ridge) * variance)
        noisy = noisy + torch.diag(torch.full_like(above.diagonal(), 1e-12) * variance + 1e-300)
        effective = float(torch.linalg.solve(noisy, above).diagonal().sum())
        scores = unit_information(covariance, cross, noisy, evidence.entries)
        spread = float(scores.max() - scores.min())
        if len(scores) > 1 and 0 < float(scores.max()) >= 1e3 * spread:
            warnings.warn(
                f"The units of {evidence.name!r} all score {number(float(scores.max()))} nats: "
                "no ranking. Use selection='conditional', or MutualInformation with a larger "
                "ridge.",
                PruningWarning,
                stacklevel=2,
            )
        return scores - plugin_bias(evidence.samples, effective, evidence.entries)


@dataclass(frozen=True)
class Magnitude:
    """Euclidean norm of the weights that make and read a unit (group L2)."""

    def rank(self, consumer_sets: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units by norm, smallest first."""
        read = sum(e.weight.square().sum(0).view(-1, e.entries).sum(1) for e in consumer_sets)
        return _ascending(read + consumer_sets[0].rows.to(consumer_sets[0].weight).square().sum(1))


@dataclass(frozen=True)
class ActivationNorm:
    """Root mean square of a unit times the norm of the weights that read it (Wanda-like)."""

    def rank(self, consumer_sets: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units by what they send upwards, smallest first."""
        sent = torch.zeros_like(consumer_sets[0].mean)
        for evidence in consumer_sets:
            power = evidence.covariance.diagonal() + evidence.mean.square()
            sent = sent + power * evidence.weight.square().sum(0)
        return _ascending(sent.view(-1, consumer_sets[0].entries).sum(1))


@dataclass(frozen=True)
class Taylor:
    """Expected first-order change of the loss when a unit is set to zero.

    The root mean square over examples of ``sum_positions x_i dL/dx_i`` (Molchanov et al. 2017,
    squared so that signs do not cancel). It needs what training steps say
    (:class:`gradients.Relevance`).
    """

    def rank(self, consumer_sets: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units by the change they make, smallest first.

        Raises:
            PruningError: If no gradients were gathered.
        """
        if any(evidence.taylor is None for evidence in consumer_sets):
            raise PruningError(
                f"Taylor needs gradients at {consumer_sets[0].name!r}, but none were gathered; expected a "
                "sample of training steps. Gather relevance from gradients."
            )
        return _ascending(
            torch.stack([e.taylor for e in consumer_sets if e.taylor is not None]).sum(0)
        )


@dataclass(frozen=True)
class Random:
    """A seeded random order, the floor of every comparison."""

    seed: int = 0

    def rank(self, consumer_sets: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units at random, the same way for the same seed and group."""
        evidence = consumer_sets[0]
        salt = sum(ord(c) * (i + 1) for i, c in enumerate(evidence.name))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + salt)
        return _ascending(torch.rand(evidence.units, generator=generator, dtype=torch.float64))


def criterion_of(importance: Importance, seed: int = 0) -> Criterion:
    """The criterion that the options name.

    Args:
        importance: The options.
        seed: Seed of ``"random"``.

    Example:
        >>> criterion_of(Importance(criterion="taylor", relevance="gradient"))
        Taylor()
    """
    made: dict[str, Criterion] = {
        "mutual_information": MutualInformation(selection=importance.selection),
        "taylor": Taylor(),
        "activation_norm": ActivationNorm(),
        "magnitude": Magnitude(),
        "random": Random(seed),
    }
    return made[importance.criterion]


def _precisions(evidence: UnitStatistics, noise: float) -> tuple[Tensor, Tensor]:
    """``Cov(x)^-1`` and ``Cov(x | y)^-1`` with noise of this variance on ``y``."""
    covariance = evidence.covariance
    if evidence.samples < 2 * len(covariance):  # exact copies stay exact where there is enough
        # Correlations become those of `shrink`; what entries share stays as large as it was heard.
        share = shrinkage(covariance, evidence.samples).clamp_max(0.999)
        covariance = covariance + share / (1 - share) * torch.diag(covariance.diagonal())
    precision = inverse(covariance)
    # y = T x + noise, so Cov(x | y)^-1 = Cov(x)^-1 + T'T / noise: no second inverse.
    return precision, precision + evidence.readout.mT @ evidence.readout / noise


def _ascending(scores: Tensor) -> Elimination:
    order = torch.argsort(scores, stable=True)
    return Elimination(tuple(order.tolist()), tuple(scores[order].tolist()))


def copies_kept(evidence: UnitStatistics, kept: Sequence[int]) -> int:
    """How many kept units are copies (correlation above 0.999) of another kept unit."""
    if evidence.entries != 1 or not kept:
        return 0
    index = torch.tensor(kept, device=evidence.covariance.device)
    block = evidence.covariance[index][:, index]
    scale = block.diagonal().clamp_min(1e-300).sqrt()
    correlation = (block / scale[:, None] / scale[None, :]).abs().fill_diagonal_(0)
    return int((correlation.tril() > 0.999).any(1).sum())
