"""Criteria that rank the units of a group: mutual information, and others to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted, number
from lightning_mi_prune.core.options import Importance, check_choice
from lightning_mi_prune.core.spilling import spilled
from lightning_mi_prune.importance.elimination import Elimination, eliminate
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
    """Ranks the units of a group by importance."""

    def rank(self, statistics: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order of at least all but ``keep`` units, the least important first.

        Args:
            statistics: Statistics at each input that consists of the units, at least one.
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
            above. ``conditional`` needs it above 0.

    Raises:
        PruningError: If an option is outside its range.
    """

    selection: Literal["conditional", "topk"] = "conditional"
    ridge: float = 1.0

    def __post_init__(self) -> None:
        check_choice("selection", self.selection, ("conditional", "topk"))
        least = 0.0 if self.selection == "topk" else 1e-12
        if not least <= self.ridge <= 1e6:
            raise PruningError(
                f"ridge={self.ridge!r}; expected a number up to a million, "
                + ("from 0." if self.selection == "topk" else "above 0 ('topk' allows 0).")
            )

    def rank(self, statistics: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units; costs are nats, summed over the inputs."""
        for each in statistics:
            each.check()
        if self.selection == "topk":
            return _ascending(torch.stack([self.scores(each) for each in statistics]).sum(0))
        # One noise for all inputs, so that one on which the loss depends less has less information.
        grams = [spilled(each.gram()) for each in statistics]
        noises = [s.noise(self.ridge, gram) for s, gram in zip(statistics, grams, strict=True)]
        noise = sum(noises) / len(statistics)
        # A constant layer above has no information, whatever the noise.
        pairs = [
            _precisions(each, gram, noise or 1.0)
            for each, gram in zip(statistics, grams, strict=True)
        ]
        del grams
        return eliminate(pairs, keep=keep, entries=[each.entries for each in statistics])

    def scores(self, statistics: UnitStatistics) -> Tensor:
        """Information of each unit alone with the layer above, less its plug-in bias ``(units,)``.

        Raises:
            PruningError: If there is no ranking: without a ridge, at least as many independent
                outputs as entries determine every unit exactly.
        """
        outputs, entries = statistics.outputs, statistics.readout.shape[1]
        if not outputs:  # no unit is kept above
            return statistics.mean.new_zeros(statistics.units)
        covariance, cross, above = statistics.joint()
        if self.ridge == 0 and outputs >= entries:
            raise PruningError(
                f"ridge=0 gives no ranking at {statistics.name!r}: "
                f"{counted(outputs, 'unit')} above determine all of its "
                f"{counted(entries, 'entry', 'entries')}, so every score is infinite. Expected "
                "fewer units above than entries; set a ridge above 0, such as 0.01."
            )
        variance = statistics.variance(above)
        noisy = above + torch.diag(torch.full_like(above.diagonal(), self.ridge) * variance)
        noisy = noisy + torch.diag(torch.full_like(above.diagonal(), 1e-12) * variance + 1e-300)
        effective = float(torch.linalg.solve(noisy, above).diagonal().sum())
        scores = unit_information(covariance, cross, noisy, statistics.entries)
        spread = float(scores.max() - scores.min())
        if len(scores) > 1 and 0 < float(scores.max()) >= 1e3 * spread:
            warnings.warn(
                f"The units of {statistics.name!r} all score {number(float(scores.max()))} nats: "
                "no ranking. Use selection='conditional', or MutualInformation with a larger "
                "ridge.",
                PruningWarning,
                stacklevel=2,
            )
        return scores - plugin_bias(statistics.samples, effective, statistics.entries)


@dataclass(frozen=True)
class Magnitude:
    """Euclidean norm of the weights that produce and read a unit (group L2)."""

    def rank(self, statistics: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units by norm, smallest first."""
        read = sum(e.weight.square().sum(0).view(-1, e.entries).sum(1) for e in statistics)
        return _ascending(read + statistics[0].rows.to(statistics[0].weight).square().sum(1))


@dataclass(frozen=True)
class ActivationNorm:
    """Root mean square of a unit times the norm of the weights that read it (Wanda-like)."""

    def rank(self, statistics: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units by that product, smallest first."""
        squares = statistics[0].mean.new_zeros(statistics[0].units)
        for each in statistics:
            entries = each.mean_squares() * each.weight.square().sum(0)
            squares = squares + entries.view(-1, each.entries).sum(1)
        return _ascending(squares)


@dataclass(frozen=True)
class Taylor:
    """Expected first-order change of the loss when a unit is set to zero.

    The root mean square over examples of ``sum_positions x_i dL/dx_i`` (Molchanov et al. 2017,
    squared so that signs do not cancel), from gradients of training steps.
    """

    def rank(self, statistics: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units by that change, smallest first.

        Raises:
            PruningError: If no gradients were collected.
        """
        changes = [each.taylor for each in statistics if each.taylor is not None]
        if len(changes) < len(statistics):
            raise PruningError(
                f"Taylor needs gradients at {statistics[0].name!r}, but none were collected. Use "
                "relevance='gradient', which takes them from training steps."
            )
        return _ascending(torch.stack(changes).sum(0))


@dataclass(frozen=True)
class Random:
    """A seeded random order, the baseline of every comparison."""

    seed: int = 0

    def rank(self, statistics: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units at random, the same way for the same seed and group."""
        name, units = statistics[0].name, statistics[0].units
        salt = sum(ord(c) * (i + 1) for i, c in enumerate(name))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + salt)
        return _ascending(torch.rand(units, generator=generator, dtype=torch.float64))


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


def _precisions(statistics: UnitStatistics, gram: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """``Cov(x)^-1`` and ``Cov(x | y)^-1`` with noise of this variance on ``y``.

    Args:
        statistics: Statistics at an input.
        gram: Its ``T'T (d, d)``, which becomes the second of the two.
        noise: That variance.
    """
    covariance, extra = statistics.covariance, None
    if statistics.samples < 2 * len(covariance):  # with enough samples exact copies stay exact
        # Correlations become those of `shrink`, but covariances of different entries stay.
        share = shrinkage(covariance, statistics.samples).clamp_max(0.999)
        extra = share / (1 - share) * covariance.diagonal()
    precision = spilled(inverse(covariance, extra=extra))
    # y = T x + noise, so Cov(x | y)^-1 = Cov(x)^-1 + T'T / noise: no second inverse.
    return precision, gram.div_(noise).add_(precision)


def _ascending(scores: Tensor) -> Elimination:
    order = torch.argsort(scores, stable=True)
    return Elimination(tuple(order.tolist()), tuple(scores[order].tolist()))


def copies_kept(statistics: UnitStatistics, kept: Sequence[int]) -> int:
    """How many kept units are copies (correlation above 0.999) of another kept unit."""
    if statistics.entries != 1 or not kept:
        return 0
    index = torch.tensor(kept, device=statistics.covariance.device)
    block = statistics.covariance[index][:, index]
    scale = block.diagonal().clamp_min(1e-300).sqrt()
    correlation = (block / scale[:, None] / scale[None, :]).abs().fill_diagonal_(0)
    return int((correlation.tril() > 0.999).any(1).sum())
