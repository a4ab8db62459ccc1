"""RunState: what a run must store to go on after a crash, as plain containers and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_mi_prune.allocation.latency import Device, LatencyTable
from lightning_mi_prune.calibration.calls import RecordedCall, is_plain
from lightning_mi_prune.calibration.data import CalibrationData, LayerComparison
from lightning_mi_prune.calibration.gradients import GradientSums
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.untrusted import (
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
from lightning_mi_prune.reconstruction.compensation import Decision, GroupInformation
from lightning_mi_prune.reporting.report import PruningReport, read_report
from lightning_mi_prune.surgery.optimizer_state import is_plain_tensor, is_state_known

__all__ = [
    "PendingCut",
    "RunState",
    "Snapshot",
    "check_finite",
    "check_tensors",
    "read_calibration",
    "read_example",
    "read_gradients",
    "read_pending",
    "read_snapshot",
    "tensor",
    "tensors",
    "write_calibration",
    "write_gradients",
    "write_pending",
    "write_snapshot",
]

_REPEATED = 8  # bytes that tensors may show for each that the file holds


_SMALL = 2**20


def check_tensors(state: Any) -> None:
    """Refuse tensors that claim more than a file holds, each and all together.

    A view can claim gigabytes with the few bytes of a small file behind it; so can a thousand
    views of a megabyte.

    Args:
        state: Containers that :func:`untrusted.check_nesting` found to be bounded.

    Raises:
        ValueError: If the elements of a tensor are not in the file.
    """
    claimed, storages, todo = 0, {}, [state]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, (list, tuple)):
            todo.extend(value)
        elif isinstance(value, Tensor):
            if value.device.type == "meta":
                raise ValueError(f"{described(value)} holds no elements")
            if is_plain_tensor(value):
                storage, size = value.untyped_storage(), value.numel() * value.element_size()
                if size > storage.nbytes():
                    raise ValueError(f"{described(value)} claims more elements than the file holds")
                claimed += size
                storages[storage.data_ptr()] = storage.nbytes()
    if claimed > _SMALL + _REPEATED * sum(storages.values()):
        raise ValueError("its tensors show the same few elements again and again")


def tensor(value: Any) -> Tensor:
    """A plain dense tensor."""
    if not isinstance(value, Tensor) or not is_plain_tensor(value):
        raise TypeError(f"{described(value)} is no plain dense tensor")
    return value.detach()


def tensors(value: Any) -> dict[str, Tensor]:
    """Plain dense tensors by name."""
    return {name: tensor(found) for name, found in mapping(value).items()}


def check_finite(found: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinite values; numbers that are no fractions never are."""
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{described(name)} holds NaN or infinite values")


_LARGEST = 2**20


def write_calibration(heard: CalibrationData) -> dict[str, Any]:
    """Everything a cut is decided from; calls that hold more than plain values are left out."""
    return {
        "moments": {n: (m.dimension, m.packed()) for n, m in heard.moments.items()},
        "gradients": None if heard.gradients is None else write_gradients(heard.gradients),
        "calls": [
            {
                path: plain
                for path, calls in rank.items()
                if (plain := [vars(call) for call in calls if is_plain(vars(call))])
            }
            for rank in heard.ranks
        ],
        "stacks": _write_compared(heard.stacks),
    }


def read_calibration(state: Mapping[str, Any]) -> CalibrationData:
    """What :func:`write_calibration` wrote; raises a plain exception for anything else."""
    moments = {}
    for name, entry in mapping(mapping(state)["moments"]).items():
        dimension, packed = listed(entry, 2)
        sums = tensor(packed)
        if sums.numel() < whole(dimension, _LARGEST) ** 2 // 2:  # before it is made that large
            raise ValueError(f"{sums.numel()} sums for a group of {dimension}")
        check_finite({name: sums})
        moments[name] = Moments(dimension).unpack(sums)
    gradients = state["gradients"]
    return CalibrationData(
        moments=moments,
        gradients=None if gradients is None else read_gradients(gradients),
        ranks=[
            {path: [read_example(call) for call in listed(calls)] for path, calls in rank.items()}
            for rank in map(mapping, listed(state["calls"]))
        ],
        stacks=_read_compared(state["stacks"]),
    )


def write_gradients(sums: Mapping[str, GradientSums]) -> dict[str, Any]:
    """Sums of gradients by key."""
    return {n: (s.dimension, s.units, s.over_units, s.packed()) for n, s in sums.items()}


def read_gradients(state: Mapping[str, Any]) -> dict[str, GradientSums]:
    """What :func:`write_gradients` wrote; raises a plain exception for anything else."""
    found = {}
    for name, entry in mapping(state).items():
        dimension, units, over_units, packed = listed(entry, 4)
        sums = tensor(packed)
        if sums.numel() < whole(dimension, _LARGEST) ** 2 // 2 + whole(units, _LARGEST):
            raise ValueError(f"{sums.numel()} sums of gradients for {dimension} outputs")
        check_finite({name: sums})
        found[name] = GradientSums(dimension, units, over_units=flag(over_units)).unpack(sums)
    return found


def _write_compared(stacks: Mapping[str, LayerComparison]) -> dict[str, Any]:
    """How alike the layers of stacks are, as plain lists."""
    return {name: asdict(compared) for name, compared in stacks.items()}


def _read_compared(state: Mapping[str, Any]) -> dict[str, LayerComparison]:
    """What :func:`_write_compared` wrote; raises a plain exception for anything else."""
    found = {}
    for name, parts in mapping(state).items():
        layers = tuple(whole(layer) for layer in listed(mapping(parts)["layers"]))
        sizes = {"similarity": len(layers), "angles": len(layers) + 1}
        matrices = {
            key: tuple(
                tuple(number(value) for value in listed(row, size))
                for row in listed(parts[key], size)
            )
            for key, size in sizes.items()
        }
        found[name] = LayerComparison(layers, **matrices, fixed=whole(parts["fixed"], len(layers)))
    return found


def read_example(state: Mapping[str, Any]) -> RecordedCall:
    """One call; raises a plain exception for anything else."""
    args, kwargs, mask = (mapping(state)[key] for key in ("args", "kwargs", "mask"))
    if not isinstance(args, tuple) or not isinstance(mask, (Tensor, type(None))):
        raise TypeError(f"a call with {described(args)} and the mask {described(mask)}")
    autocast = state.get("autocast", "")
    if not is_plain([args, mapping(kwargs), mask]):
        raise TypeError("a call with something else than tensors and plain values")
    if not isinstance(autocast, str) or autocast not in ("", "bfloat16", "float16"):
        raise ValueError(f"autocast to {described(autocast)}")
    return RecordedCall(args, dict(kwargs), mask, autocast)


@dataclass(frozen=True)
class PendingCut:
    """A cut that is decided and not yet made.

    Args:
        epoch: Epoch it belongs to the start of.
        sparsity: Sparsity it reaches.
        selection: What is cut.
    """

    epoch: int
    sparsity: float
    selection: Decision


@dataclass(frozen=True)
class Snapshot:
    """A cut on probation, and all that is needed to take it back.

    Args:
        epoch: Epoch that started with it.
        reached: Sparsity before it.
        kept: Share of the information that was left before it.
        plan: Plan before it.
        weights: Parameters and buffers before it, by name, on the CPU.
        optimizers: State of every optimizer before it, by parameter name, on the CPU.
        groups: Names of the parameters in every group of every optimizer before it.
        failed_at: Epoch at whose end it failed and after which it is taken back, or None.
    """

    epoch: int
    reached: float
    kept: float
    plan: PruningPlan
    weights: Mapping[str, Tensor]
    optimizers: list[dict[str, dict[str, Any]]]
    groups: list[list[list[str]]]
    failed_at: int | None = None


def read_snapshot(state: Mapping[str, Any]) -> Snapshot:
    """What :func:`write_snapshot` wrote; raises a plain exception for anything else.

    What an optimizer keeps must follow the parameter of that name, and be of one kind for all of
    its parameters. Parameters that were trained, and what is kept of them, hold no NaN: training
    would only spread it. Buffers and parameters that were not trained may hold anything: a mask is
    infinite, and an empty statistic may be NaN. So may squares of gradients overflow in half
    precision: they only stand still.
    """
    weights = {name: _weight(found) for name, found in mapping(mapping(state)["weights"]).items()}
    optimizers = [_read_states(states, weights) for states in listed(state["optimizers"])]
    groups = [
        [[text(name) for name in listed(names)] for names in listed(held)]
        for held in listed(state["groups"], len(optimizers))
    ]
    for states, held in zip(optimizers, groups, strict=True):
        strange = set(states) - {name for names in held for name in names}
        if strange:
            raise ValueError(f"no group of an optimizer holds {described(min(strange))}")
    return Snapshot(
        epoch=whole(state["epoch"]),
        reached=number(state["reached"], 0, 1),
        kept=number(state["kept"], 0, 1),
        plan=PruningPlan.from_json(state["plan"]),
        weights=weights,
        optimizers=optimizers,
        groups=groups,
        failed_at=None if state["failed_at"] is None else whole(state["failed_at"]),
    )


def _weight(value: Any) -> Tensor:
    """A parameter or a buffer; whether it is of the right class is compared with the model."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{described(value)} is no tensor")
    return value.detach()


def _read_states(given: Any, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What one optimizer keeps, by parameter."""
    found: dict[str, dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    for name, values in mapping(given).items():
        if name not in weights:
            raise ValueError(f"an optimizer keeps state of {described(name)}, which has no weight")
        found[name] = {}
        for key, value in mapping(values).items():
            what = f"the state {described(key)} of {described(name)}"
            if not is_state_known(key, value, weights[name].shape):
                shape = tuple(weights[name].shape)
                raise ValueError(f"{what} is {described(value)}; the parameter has shape {shape}")
            kind = _kind_of(value)
            if value is not None and kind != kinds.setdefault(key, kind):
                raise ValueError(f"{what} is {kind}, that of other parameters is {kinds[key]}")
            _check_trained(what, value, overflow=True)
            found[name][key] = value.detach() if isinstance(value, Tensor) else value
        if found[name]:
            _check_trained(f"the parameter {described(name)}", weights[name])
    return found


def _kind_of(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "no tensor"
    return "a tensor of fractions" if value.is_floating_point() else "a tensor of other numbers"


def _check_trained(what: str, value: Any, *, overflow: bool = False) -> None:
    """Refuse NaN and infinite values; with ``overflow``, only beside values below zero."""
    found = value if isinstance(value, Tensor) else torch.tensor(float(value or 0))
    if not bool(found.isfinite().all()) and not (overflow and bool((found >= 0).all())):
        raise ValueError(f"{what} holds NaN or infinite values")


def write_snapshot(trial: Snapshot) -> dict[str, Any]:
    """Plain containers and tensors for a checkpoint."""
    return {**vars(trial), "plan": trial.plan.to_json()}


def write_pending(pending: PendingCut) -> dict[str, Any]:
    """Plain containers and tensors for a checkpoint."""
    selection = pending.selection
    return {
        "epoch": pending.epoch,
        "sparsity": pending.sparsity,
        "plan": selection.plan.to_json(),
        "compensated": dict(selection.compensated),
        "rotated": {name: dict(dims) for name, dims in selection.rotated.items()},
        "information": {name: vars(i) for name, i in selection.information.items()},
    }


def read_pending(state: Mapping[str, Any]) -> PendingCut:
    """What :func:`write_pending` wrote; raises a plain exception for anything else."""
    information = {
        name: GroupInformation(number(mapping(i)["total"]), number(i["kept"]))
        for name, i in mapping(mapping(state)["information"]).items()
    }
    plan, compensated = PruningPlan.from_json(state["plan"]), tensors(state["compensated"])
    check_finite(compensated)
    rotated = {name: _read_maps(dims) for name, dims in mapping(state.get("rotated", {})).items()}
    selection = Decision(plan, compensated, information, rotated)
    return PendingCut(whole(state["epoch"]), number(state["sparsity"], 0, 1), selection)


def _read_maps(state: Any) -> dict[int, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"{described(state)} is no mapping")
    found = {whole(dim): tensor(maps) for dim, maps in state.items()}
    check_finite({f"the map of dimension {dim}": maps for dim, maps in found.items()})
    return found


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
    heard: CalibrationData | None = None
    heard_at: int = 0
    pending: PendingCut | None = None
    trial: Snapshot | None = None
    best: float | None = None
    aim: str = ""
    watched: str = ""
    examples: Mapping[str, RecordedCall] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    every: int = 1
    compared: CalibrationData = field(default_factory=CalibrationData)
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
            "heard": self.heard and write_calibration(self.heard),
            "pending": self.pending and write_pending(self.pending),
            "trial": self.trial and write_snapshot(self.trial),
            "best": self.best,
            "examples": {p: vars(e) for p, e in self.examples.items() if is_plain(vars(e))},
            "seconds": dict(self.seconds),
            "every": self.every,
            "compared": write_calibration(self.compared),
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
                heard=_unless_none(read_calibration, state["heard"]),
                heard_at=whole(state["heard_at"]),
                pending=_unless_none(read_pending, state["pending"]),
                trial=_unless_none(read_snapshot, state["trial"]),
                best=_unless_none(number, state["best"]),
                aim=text(state["aim"]),
                watched=text(state["watched"]),
                examples={p: read_example(call) for p, call in mapping(state["examples"]).items()},
                seconds={name: number(s, 0) for name, s in mapping(state["seconds"]).items()},
                every=whole(state["every"], low=1),
                compared=read_calibration(state["compared"]),
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
