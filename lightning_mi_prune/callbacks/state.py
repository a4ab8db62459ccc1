"""What a run must remember to go on after a crash as if there had been none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.heard import (
    read_example,
    read_gradients,
    read_heard,
    write_gradients,
    write_heard,
)
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.untrusted import is_plain, number, tensors, whole
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.gradients import blank
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.report import PruningReport
from lightning_mi_prune.sample import Example, Heard
from lightning_mi_prune.selection import Information, Selection

__all__ = ["Asked", "Pending", "RunState", "Trial", "reconcile"]

T = TypeVar("T")

_VERSION = 2


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
        kept: Share of the information that was left before it.
        plan: Plan before it.
        weights: Parameters and buffers before it, by name, on the CPU.
        optimizers: State of every optimizer before it, by parameter name, on the CPU.
        failed_at: Epoch at whose end it failed and after which it is taken back, or None.
    """

    epoch: int
    reached: float
    kept: float
    plan: Plan
    weights: Mapping[str, Tensor]
    optimizers: list[dict[str, dict[str, Any]]]
    failed_at: int | None = None


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
        stale: Whether no validation ran since the size changed: the logged metrics are older.
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
    stale: bool = False

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
            "pending": self.pending and _write_pending(self.pending),
            "trial": self.trial and {**vars(self.trial), "plan": self.trial.plan.to_json()},
            "best": self.best,
            "examples": {p: vars(e) for p, e in self.examples.items() if is_plain(vars(e))},
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
        if not isinstance(state, Mapping) or state.get("version") != _VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise PruningError(
                f"The checkpoint holds a pruning run of version {found!r}; this package reads "
                f"version {_VERSION}."
            )
        try:
            return cls(
                fitted=_read_schedule(state["fitted"]),
                schedule=_read_schedule(state["schedule"]),
                reached=number(state["reached"], 0, 1),
                kept=number(state["kept"], 0, 1),
                begin=whole(state["begin"]),
                felt=_unless_none(read_gradients, state["felt"]),
                heard=_unless_none(read_heard, state["heard"]),
                heard_at=whole(state["heard_at"]),
                pending=_unless_none(_read_pending, state["pending"]),
                trial=_unless_none(_read_trial, state["trial"]),
                best=_unless_none(number, state["best"]),
                aim=str(state["aim"]),
                watched=str(state["watched"]),
                examples={path: read_example(call) for path, call in state["examples"].items()},
                seconds={str(name): number(s, 0) for name, s in state["seconds"].items()},
                stale=bool(state["stale"]),
            ), PruningReport.from_state(state["report"])
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise PruningError(
                f"The pruning state of the checkpoint is damaged ({type(error).__name__}: "
                f"{error}); take another checkpoint."
            ) from error


@dataclass(frozen=True)
class Asked:
    """What the options of a run ask for.

    Args:
        budget: What a cut may cost.
        aim: What the schedule leads to, where that is not a sparsity.
        calls: Positions of calls to store; 0 stores none.
        samples: Positions of every axis to store.
        steps: Training steps to take gradients from.
    """

    budget: AccuracyBudget | None = None
    aim: str = ""
    calls: int = 0
    samples: int = 0
    steps: int = 0


def reconcile(run: RunState, axes: list[WidthAxis], module: nn.Module, asked: Asked) -> list[str]:
    """Let go of what does not fit the options a run resumes with.

    Args:
        run: The run, as it was read.
        axes: Axes that may be cut now.
        module: The model.
        asked: What is asked for now.

    Returns:
        What was let go of, in a sentence each.
    """
    budget, aim = asked.budget, asked.aim
    surprises, names = [], {axis.name for axis in axes}
    places = {key: readers[0] for axis in axes for key, readers in axis.places.items()}
    widths = {key: module.get_parameter(f"{r}.weight").shape[1] for key, r in places.items()}
    shapes, heard = _shapes(blank(module, axes)), run.heard
    if run.felt is not None and (not asked.steps or _shapes(run.felt) != shapes):
        run.felt = None  # the rest of the epoch is felt anew
    if heard is not None and {key: m.dimension for key, m in heard.moments.items()} != widths:
        run.heard = None
        surprises.append("What was heard was of other axes; a cut waits for the next validation.")
    elif heard is not None and (
        (asked.calls and not any(stored for rank in heard.ranks for stored in rank.values()))
        or (asked.samples and {key: x.shape[-1] for key, x in heard.samples.items()} != widths)
        or (asked.steps and _shapes(heard.gradients or {}) != shapes)
    ):
        run.heard = None
        surprises.append(
            "What was heard is less than the options ask for now; a cut waits for the next "
            "validation."
        )
    if run.pending is not None and set(run.pending.selection.information) != names:
        run.pending = None
        surprises.append("The pending cut was chosen for other axes; it will be chosen again.")
    if run.aim != aim and run.fitted.epochs:
        # Goals are counted from the model as built: what is reached already asks for no cut.
        run.reached, run.fitted, run.schedule, run.pending = 0.0, Schedule(), Schedule(), None
        surprises.append(f"The budget was {run.aim or 'a sparsity'}; the schedule begins anew.")
    run.aim = aim
    watched = "" if budget is None else f"{budget.monitor} {budget.mode}"
    if run.watched != watched:
        if run.trial is not None:
            run.trial = None
            surprises.append("max_drop watches something else now: the last cut is kept.")
        run.best, run.watched = None, watched
    return surprises


def _shapes(sums: Mapping[str, GradientSums]) -> dict[str, tuple[int, int, bool]]:
    return {key: (s.dimension, s.units, s.inside) for key, s in sums.items()}


def _write_schedule(schedule: Schedule) -> dict[str, list[float]]:
    return {name: list(values) for name, values in asdict(schedule).items()}


def _unless_none(read: Callable[[Any], T], value: Any) -> T | None:
    return None if value is None else read(value)


def _read_schedule(state: Mapping[str, Any]) -> Schedule:
    epochs = tuple(whole(epoch) for epoch in state["epochs"])
    sparsities = tuple(number(s, 0, 1) for s in state["sparsities"])
    if len(epochs) != len(sparsities):
        raise ValueError(f"{len(epochs)} epochs and {len(sparsities)} sparsities")
    return Schedule(epochs, sparsities)


def _read_trial(state: Mapping[str, Any]) -> Trial:
    for optimizer in state["optimizers"]:
        for values in optimizer.values():
            tensors({k: v for k, v in values.items() if isinstance(v, Tensor)})
    return Trial(
        epoch=whole(state["epoch"]),
        reached=number(state["reached"], 0, 1),
        kept=number(state["kept"], 0, 1),
        plan=Plan.from_json(state["plan"]),
        weights=tensors(state["weights"]),
        optimizers=list(state["optimizers"]),
        failed_at=_unless_none(whole, state["failed_at"]),
    )


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
    information = {
        name: Information(number(i["total"]), number(i["kept"]))
        for name, i in state["information"].items()
    }
    plan = Plan.from_json(state["plan"])
    selection = Selection(plan, tensors(state["folded"]), information)
    return Pending(whole(state["epoch"]), number(state["sparsity"], 0, 1), selection)
