"""What a run must remember to go on after a crash as if there had been none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.listener import Example
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.report import PruningReport
from lightning_mi_prune.selection import Information, Selection

__all__ = ["Pending", "RunState", "Trial"]

_VERSION = 1


@dataclass(frozen=True)
class Pending:
    """A cut that is decided and not yet made.

    Args:
        epoch: Epoch it belongs to the start of.
        sparsity: Sparsity it reaches.
        selection: What is cut.
    """

    epoch: int
    sparsity: float
    selection: Selection


@dataclass(frozen=True)
class Trial:
    """A cut on probation, and all that is needed to take it back.

    Args:
        epoch: Epoch that started with it.
        reached: Sparsity before it.
        plan: Plan before it.
        weights: Parameters and buffers before it, by name, on the CPU.
        optimizers: State of every optimizer before it, by parameter name, on the CPU.
        failed: Whether it was judged and is to be taken back.
    """

    epoch: int
    reached: float
    plan: Plan
    weights: Mapping[str, Tensor]
    optimizers: list[dict[str, dict[str, Any]]]
    failed: bool = False


@dataclass
class RunState:
    """Everything of a run that is not in the model, the optimizers or the loops.

    Args:
        fitted: The schedule as it was fitted to the run.
        schedule: The schedule now; another one after a cut was taken back.
        reached: Sparsity that was asked for last, and given.
        heard: Sums of the last validation, until a cut is decided from them.
        pending: The cut that comes next.
        trial: The last cut, until it is accepted.
        best: Best value of the monitored metric of an accepted model.
        examples: One call of each network, to count its work.
        seconds: Time spent on the cut that comes next.
        stale: Whether no validation ran since the size changed: the logged metrics are older.
    """

    fitted: Schedule = field(default_factory=Schedule)
    schedule: Schedule = field(default_factory=Schedule)
    reached: float = 0.0
    heard: Mapping[str, Moments] | None = None
    pending: Pending | None = None
    trial: Trial | None = None
    best: float | None = None
    examples: Mapping[str, Example] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    stale: bool = False

    def to_dict(self, report: PruningReport) -> dict[str, Any]:
        """Plain containers and tensors, which ``torch.load(weights_only=True)`` opens."""
        return {
            "version": _VERSION,
            "fitted": _write_schedule(self.fitted),
            "schedule": _write_schedule(self.schedule),
            "reached": self.reached,
            "heard": self.heard and {n: (m.dimension, m.packed()) for n, m in self.heard.items()},
            "pending": self.pending and _write_pending(self.pending),
            "trial": self.trial and {**vars(self.trial), "plan": self.trial.plan.to_json()},
            "best": self.best,
            "examples": {p: vars(e) for p, e in self.examples.items() if _is_plain(vars(e))},
            "seconds": dict(self.seconds),
            "stale": self.stale,
            "report": report.state_dict(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> tuple[RunState, PruningReport]:
        """Read what :meth:`to_dict` wrote.

        Raises:
            PruningError: If it is something else.
        """
        if state.get("version") != _VERSION:
            raise PruningError(
                f"The checkpoint holds a pruning run of version {state.get('version')!r}; this "
                f"package reads version {_VERSION}."
            )
        try:
            heard, trial = state["heard"], state["trial"]
            return cls(
                fitted=_read_schedule(state["fitted"]),
                schedule=_read_schedule(state["schedule"]),
                reached=float(state["reached"]),
                heard=heard and {n: Moments(d).unpack(sums) for n, (d, sums) in heard.items()},
                pending=state["pending"] and _read_pending(state["pending"]),
                trial=trial and Trial(**{**trial, "plan": Plan.from_json(trial["plan"])}),
                best=state["best"],
                examples={path: Example(**call) for path, call in state["examples"].items()},
                seconds=dict(state["seconds"]),
                stale=bool(state["stale"]),
            ), PruningReport.from_state(state["report"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PruningError(
                f"The pruning state of the checkpoint is damaged ({type(error).__name__}: "
                f"{error}); take another checkpoint."
            ) from error


def _write_schedule(schedule: Schedule) -> dict[str, list[float]]:
    return {name: list(values) for name, values in asdict(schedule).items()}


def _read_schedule(state: Mapping[str, Any]) -> Schedule:
    epochs, sparsities = tuple(map(int, state["epochs"])), tuple(map(float, state["sparsities"]))
    if len(epochs) != len(sparsities):
        raise ValueError(f"{len(epochs)} epochs and {len(sparsities)} sparsities")
    return Schedule(epochs, sparsities)


def _write_pending(pending: Pending) -> dict[str, Any]:
    selection = pending.selection
    return {
        "epoch": pending.epoch,
        "sparsity": pending.sparsity,
        "plan": selection.plan.to_json(),
        "folded": dict(selection.folded),
        "information": {name: vars(i) for name, i in selection.information.items()},
    }


def _read_pending(state: Mapping[str, Any]) -> Pending:
    information = {name: Information(**i) for name, i in state["information"].items()}
    selection = Selection(Plan.from_json(state["plan"]), dict(state["folded"]), information)
    return Pending(int(state["epoch"]), float(state["sparsity"]), selection)


def _is_plain(value: Any) -> bool:
    """Whether ``torch.load(weights_only=True)`` opens it."""
    if isinstance(value, dict):
        return all(_is_plain(v) for v in (*value, *value.values()))
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return value is None or type(value) in (Tensor, bool, int, float, str)
