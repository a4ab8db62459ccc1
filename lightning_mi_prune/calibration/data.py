"""CalibrationData: everything collected before a cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.gradients import GradientSums
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.calibration.samples import MomentsOnDemand

__all__ = [
    "CalibrationData",
    "LayerComparison",
    "LayerLosses",
    "Matrix",
]


@dataclass
class CalibrationData:
    """Everything collected before a cut.

    Args:
        moments: Sums of activations at each place, by key.
        gradients: Sums of gradients of training steps, by key; None where none were collected.
        ranks: Inputs to run the cut model on, of each rank, by path of the network called.
        examples: One call of each network, to count its operations and to time it.
        stacks: How similar the layers of each stack are, by its name.
        half: Sums of activations of every second batch alone, by key; empty unless
            ``Calibration.stability`` asks for them.
    """

    moments: Mapping[str, Moments] = field(default_factory=dict)
    gradients: Mapping[str, GradientSums] | None = None
    ranks: Sequence[Mapping[str, Sequence[RecordedCall]]] = ()
    examples: Mapping[str, RecordedCall] = field(default_factory=dict)
    stacks: Mapping[str, LayerComparison] = field(default_factory=dict)
    half: Mapping[str, Moments] = field(default_factory=dict)

    @property
    def is_in_files(self) -> bool:
        """Whether moments are made from temporary files, which no checkpoint holds."""
        return isinstance(self.moments, MomentsOnDemand)


Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class LayerLosses:
    """What the loss of a model is without some layers of a stack, as numbered when built.

    Args:
        whole: With all of them.
        single: Without each of them alone, bottom to top; None for those that must stay, and where
            it is not finite.
        removed: The layers whose removal together was found to cost least.
        after: Without all of these.
        measured: Removals whose loss was measured.
    """

    whole: float
    single: tuple[float | None, ...]
    removed: tuple[int, ...]
    after: float
    measured: int


@dataclass(frozen=True)
class LayerComparison:
    """How similar the layers of a stack were in one validation run.

    Args:
        layers: The layers, as numbered when built, bottom to top.
        similarity: CKA of every pair ``(L, L)``.
        angles: Mean angle between every pair of states ``(L + 1, L + 1)``, the input first.
        fixed: Layers at the bottom that must stay: others depend on them, or their output has
            another shape than their input.
        losses: What the loss is without some of them, where it was measured.
    """

    layers: tuple[int, ...]
    similarity: Matrix
    angles: Matrix
    fixed: int = 0
    losses: LayerLosses | None = None

    @property
    def largest_neighbor_cka(self) -> float:
        """CKA of the most similar pair of neighboring layers; 0 without a pair."""
        rows = enumerate(self.similarity[:-1])
        return max((row[place + 1] for place, row in rows), default=0.0)
