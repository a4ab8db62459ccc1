"""What a run must remember to go on after a crash as if there had been none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from lightning_mi_prune.callbacks.heard import (
    read_example,
    read_gradients,
    read_heard,
    write_gradients,
    write_heard,
)
from lightning_mi_prune.callbacks.records import (
    Pending,
    Trial,
    read_pending,
    read_trial,
    write_pending,
    write_trial,
)
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.tensors import check_tensors
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.latency import Device, LatencyTable
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.report import PruningReport, read_report
from lightning_mi_prune.sample import Example, Heard, is_plain
from lightning_mi_prune.untrusted import (
    check_nesting,
    described,
    flag,
    listed,
    mapping,
    number,
    reading,
    text,
    whole,
)

__all__ = ["RunState"]

T = TypeVar("T")

_VERSION = 4


@dataclass
class RunState:
    """Everything of a run that is not in the model, the optimizers or the loops.

    Args:
        fitted: The schedule as it was fitted to the run.
        schedule: The schedule now; another one after a cut was taken back.
        reached: Sparsity that was asked for last, and given.
        kept: Share of the information that the cuts so far have left.
        begin: Epochs that were over when the schedule was fitted.
        felt: Sums of gradients of the training steps of this epoch, of this rank.
        heard: What the last validation said, until a cut is decided from it.
        heard_at: Epoch of that validation.
        pending: The cut that comes next.
        trial: The last cut, until it is accepted.
        best: Best value of the monitored metric of an accepted model.
        aim: What the schedule leads to, where that is not a sparsity.
        watched: Which metric that is, and whether more of it is better.
        examples: One call of each network, to count its work.
        seconds: Time spent on the cut that comes next.
        every: Of each cluster of layers every so manieth goes; one more after a failure.
        compared: What was heard of the layers when the last cut of them was decided.
        stale: Whether no validation ran since the size changed: the logged metrics are older.
        tables: Latencies that were measured in this process and are in no file; not saved.
    """

    fitted: Schedule = field(default_factory=Schedule)
    schedule: Schedule = field(default_factory=Schedule)
    reached: float = 0.0
    kept: float = 1.0
    begin: int = 0
    felt: Mapping[str, GradientSums] | None = None
    heard: Heard | None = None
    heard_at: int = 0
    pending: Pending | None = None
    trial: Trial | None = None
    best: float | None = None
    aim: str = ""
    watched: str = ""
    examples: Mapping[str, Example] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    every: int = 1
    compared: Heard = field(default_factory=Heard)
    stale: bool = False
    tables: dict[Device, LatencyTable] = field(default_factory=dict)

    def to_dict(self, report: PruningReport) -> dict[str, Any]:
        """Plain containers and tensors, which ``torch.load(weights_only=True)`` opens."""
        return {
            "version": _VERSION,
            "fitted": _write_schedule(self.fitted),
            "schedule": _write_schedule(self.schedule),
            "reached": self.reached,
            "kept": self.kept,
            "begin": self.begin,
            "heard_at": self.heard_at,
            "aim": self.aim,
            "watched": self.watched,
            "felt": self.felt and write_gradients(self.felt),
            "heard": self.heard and write_heard(self.heard),
            "pending": self.pending and write_pending(self.pending),
            "trial": self.trial and write_trial(self.trial),
            "best": self.best,
            "examples": {p: vars(e) for p, e in self.examples.items() if is_plain(vars(e))},
            "seconds": dict(self.seconds),
            "every": self.every,
            "compared": write_heard(self.compared),
            "stale": self.stale,
            "report": report.state_dict(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> tuple[RunState, PruningReport]:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PruningError: If it is something else.
        """
        version = state.get("version") if isinstance(state, Mapping) else state
        if type(version) is not int or version != _VERSION:
            raise PruningError(
                f"The checkpoint holds a pruning run of version {described(version)}; this package "
                f"reads version {_VERSION}."
            )
        with reading("The pruning state of the checkpoint", "take another checkpoint"):
            check_nesting(state)
            check_tensors(state)
            return cls(
                fitted=_read_schedule(state["fitted"]),
                schedule=_read_schedule(state["schedule"]),
                reached=number(state["reached"], 0, 1),
                kept=number(state["kept"], 0, 1),
                begin=whole(state["begin"]),
                felt=_unless_none(read_gradients, state["felt"]),
                heard=_unless_none(read_heard, state["heard"]),
                heard_at=whole(state["heard_at"]),
                pending=_unless_none(read_pending, state["pending"]),
                trial=_unless_none(read_trial, state["trial"]),
                best=_unless_none(number, state["best"]),
                aim=text(state["aim"]),
                watched=text(state["watched"]),
                examples={p: read_example(call) for p, call in mapping(state["examples"]).items()},
                seconds={name: number(s, 0) for name, s in mapping(state["seconds"]).items()},
                every=whole(state["every"], low=1),
                compared=read_heard(state["compared"]),
                stale=flag(state["stale"]),
            ), read_report(state["report"])


def _write_schedule(schedule: Schedule) -> dict[str, list[float]]:
    return {name: list(values) for name, values in asdict(schedule).items()}


def _unless_none(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _read_schedule(state: Mapping[str, Any]) -> Schedule:
    epochs = tuple(whole(epoch) for epoch in listed(mapping(state)["epochs"]))
    sparsities = tuple(number(s, 0, 1) for s in listed(state["sparsities"], len(epochs)))
    return Schedule(epochs, sparsities)
