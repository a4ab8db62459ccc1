"""What a report keeps of each cut, its groups and each epoch, as immutable data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.importance.layer_criteria import StackCut
from lightning_mi_prune.importance.stability import Agreement
from lightning_mi_prune.reconstruction.compensation import StandIns

__all__ = [
    "Cut",
    "EpochMetrics",
    "GroupCut",
]

_POINTS = 33  # of a curve in a file


@dataclass(frozen=True)
class GroupCut:
    """One group in one cut; its information is that of this cut, not of all cuts so far.

    Args:
        name: Path of the group.
        kind: Kind of unit.
        before: Units before the cut.
        after: Units after it.
        information_nats: Information with the kept units above that is left after it, in nats.
        information_fraction: The same as a share of the information just before it.
        ranking: Order in which the units were to go, with the expected loss of each step.
        stand_ins: What makes up for each removed unit.
        agreement: How far two halves of the calibration data agree, where that was asked.
    """

    name: str
    kind: str
    before: int
    after: int
    information_nats: float
    information_fraction: float
    ranking: Ranking | None = None
    stand_ins: StandIns | None = None
    agreement: Agreement | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a file: single units are left out, and of a curve only some points are there."""
        plain = ("name", "kind", "before", "after", "information_nats", "information_fraction")
        body: dict[str, Any] = {name: getattr(self, name) for name in plain}
        if self.ranking is not None:
            body["curve"] = _curve(self.ranking, self.after)
        if self.stand_ins is not None and self.stand_ins.shares:
            shares = self.stand_ins.shares
            body["made_up"] = float(f"{sum(shares) / len(shares):.4g}")
        if self.agreement is not None:
            found = self.agreement
            values = {name: float(f"{getattr(found, name):.4g}") for name in ("share", "chance")}
            body["agreement"] = {**asdict(found), **values, "is_chance": found.is_chance}
        return body


@dataclass(frozen=True)
class EpochMetrics:
    """What validation logged in an epoch.

    Args:
        epoch: The epoch (``trainer.current_epoch``, from 0).
        values: Metrics by name.
    """

    epoch: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Cut:
    """One cut: sizes of the whole model after it, its groups, and the time it took.

    Args:
        epoch: Epoch that started with the smaller model (``trainer.current_epoch``, from 0); 0 for
            a cut without training, by :func:`prune`.
        sparsity: Share of the prunable parameters gone, against the model as built.
        parameters: Parameters of the whole module.
        prunable_parameters: Parameters of the tensors that a cut of the groups makes smaller.
        macs: Multiply-accumulates of the network for one example of validation.
        groups: What happened to each group.
        seconds: Time spent on ``discovery`` (in the first batches, and trials of cuts),
            ``gradients``, ``calibration``, ``ranking``, ``reconstruction`` and ``surgery``.
        stacks: What happened to stacks of layers; ``sparsity`` and ``prunable_parameters`` are then
            those of their layers.
        information_kept: Share of the information with the layers above, in nats and summed over
            all groups, that this cut and all before it left of the model as built (of a run that
            begins with a cut model: of that one). What ``keep_information`` counts; it never
            rises. None where layers went.
    """

    epoch: int
    sparsity: float
    parameters: int
    prunable_parameters: int
    macs: int
    groups: tuple[GroupCut, ...]
    seconds: Mapping[str, float]
    stacks: tuple[StackCut, ...] = ()
    information_kept: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For a file: as :meth:`GroupCut.to_dict`."""
        body = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **body,
            "groups": [group.to_dict() for group in self.groups],
            "seconds": dict(self.seconds),
            "stacks": [asdict(stack) for stack in self.stacks],
        }


def _curve(ranking: Ranking, after: int) -> dict[str, list[Any]]:
    """Expected loss and information lost at some widths, those at the ends and the chosen one."""
    size = len(ranking.order)
    step = max(1, -(-size // (_POINTS - 2)))
    widths = sorted({0, min(after, size), *range(size, 0, -step)}, reverse=True)
    lost = [ranking.lost(width) for width in widths]
    return {
        "widths": widths,
        "loss": [loss for loss, _ in lost],
        "nats": [nats for _, nats in lost],
    }
