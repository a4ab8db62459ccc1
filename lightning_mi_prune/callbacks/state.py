"""RunState: what a run must store to go on, and the codec that checkpoints keep it by."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mi_prune.allocation.latency import Device, LatencyTable
from lightning_mi_prune.allocation.macs import macs_of_calls
from lightning_mi_prune.calibration.calls import RecordedCall, is_plain
from lightning_mi_prune.calibration.data import CalibrationData, LayerComparison
from lightning_mi_prune.calibration.gradients import GradientSums
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.callbacks.distributed import world_size
from lightning_mi_prune.callbacks.schedule import CutSchedule
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
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
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, count_parameters
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reporting.report import PruningReport, installed_versions, read_report
from lightning_mi_prune.surgery.optimizer_state import is_plain_tensor, is_state_known

__all__ = [
    "PendingCut",
    "RunState",
    "Session",
    "Snapshot",
    "check_tensors",
    "read",
    "saved_graph",
    "write",
]

_VERSION = 8
_REPEATED = 8  # bytes that tensors may show for each that the file holds
_SMALL = 2**20
_LARGEST = 2**20  # entries of a group

T = TypeVar("T")
Share = Annotated[float, (0, 1)]


@dataclass(frozen=True)
class PendingCut:
    """A cut that is decided and not yet made.

    Args:
        epoch: Epoch that starts with it.
        sparsity: Sparsity it reaches, or how far it goes to another budget.
        decision: What is cut.
    """

    epoch: int
    sparsity: Share
    decision: Decision


@dataclass(frozen=True)
class Snapshot:
    """The model before a cut that is not accepted yet.

    Args:
        epoch: Epoch that started with the cut.
        reached: Sparsity before it.
        information_kept: Share of the information that was left before it.
        plan: Plan before it.
        weights: Parameters and buffers before it, by name, on the CPU.
        optimizers: State of every optimizer before it, by parameter name, on the CPU.
        groups: Names of the parameters in every group of every optimizer before it.
        failed_epoch: Epoch at whose end the cut was found to cost too much and after which it is
            rolled back, or None.
    """

    epoch: int
    reached: float
    information_kept: float
    plan: PruningPlan
    weights: Mapping[str, Tensor]
    optimizers: list[dict[str, dict[str, Any]]]
    groups: list[list[list[str]]]
    failed_epoch: int | None = None


@dataclass
class RunState:
    """Everything of a run that is not in the model, the optimizers or the loops.

    Args:
        fitted: The schedule as it was fitted to the run.
        schedule: The schedule now; another one after a rollback.
        reached: Sparsity that was asked for last, and met.
        information_kept: Share of the information that the cuts so far have left.
        begin: Epochs that were over when the schedule was fitted.
        gradients: Sums of gradients of the training steps of this epoch, of this rank.
        batches: Training batches of this epoch and rank, whose loss is measured without layers.
        calibration: What the last validation collected, until a cut is decided from it.
        calibration_epoch: Epoch of that validation.
        pending: The cut that comes next.
        snapshot: The model before the last cut, until that is accepted.
        best: Best value of the monitored metric of an accepted model.
        budget: What the schedule leads to, where that is not a sparsity.
        monitored: The monitored metric, and whether more of it is better.
        examples: One call of each network, to count its work.
        seconds: Time spent on the cut that comes next.
        cluster_step: 1 removes all layers of a cluster but the first, 2 every second, 3 every
            third; one more after a rollback.
        comparison: What the last cut of layers was decided from.
        outdated: Whether no validation ran since the size changed: the logged metrics are older.
        report: Every cut so far.
        graph: What the first batch showed that the model can lose; None where that is described.
        tables: Latencies that were measured in this process and are in no file; not saved.
    """

    fitted: CutSchedule = field(default_factory=CutSchedule)
    schedule: CutSchedule = field(default_factory=CutSchedule)
    reached: Share = 0.0
    information_kept: Share = 1.0
    begin: int = 0
    gradients: Mapping[str, GradientSums] | None = None
    batches: list[RecordedCall] = field(default_factory=list)
    calibration: CalibrationData | None = None
    calibration_epoch: int = 0
    pending: PendingCut | None = None
    snapshot: Snapshot | None = None
    best: float | None = None
    budget: str = ""
    monitored: str = ""
    examples: Mapping[str, RecordedCall] = field(default_factory=dict)
    seconds: dict[str, Annotated[float, (0, 2**31)]] = field(default_factory=dict)
    cluster_step: Annotated[int, (1, 2**31)] = 1
    comparison: CalibrationData = field(default_factory=CalibrationData)
    outdated: bool = False
    report: PruningReport = field(default_factory=PruningReport)
    graph: PruningGraph | None = None
    tables: dict[Device, LatencyTable] = field(default_factory=dict, metadata={"saved": False})

    @property
    def has_saved_calibration(self) -> bool:
        """Whether there is a calibration that checkpoints hold: not one in temporary files."""
        return self.calibration is not None and not self.calibration.is_in_files

    def to_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, which ``torch.load(weights_only=True)`` opens."""
        examples = {path: c for path, c in self.examples.items() if is_plain(vars(c))}
        batches = [batch for batch in self.batches if is_plain(vars(batch))]
        calibration = self.calibration if self.has_saved_calibration else None
        saved = replace(self, examples=examples, batches=batches, calibration=calibration)
        return {"version": _VERSION, **write(saved)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> RunState:
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
            return read(cls, {name: state[name] for name in state if name != "version"})


def saved_graph(checkpoint: Mapping[str, Any], key: str) -> PruningGraph | None:
    """The graph in the state of a callback; None where a checkpoint has none.

    Args:
        checkpoint: The checkpoint, which is not trusted.
        key: Key of the state of the callback.

    Raises:
        PruningError: If it holds something else.
    """
    states = checkpoint.get("callbacks")
    state = states.get(key) if isinstance(states, Mapping) else None
    graph = state.get("graph") if isinstance(state, Mapping) else None
    if graph is None:
        return None
    with reading("The graph in the checkpoint", "take another checkpoint"):
        return PruningGraph.from_json(graph)


@dataclass(frozen=True)
class Session:
    """What a step of a run works on.

    Args:
        trainer: The trainer.
        module: The module as it stands.
        tracker: What can be pruned, and the plan the module carries.
        state: The run so far.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    tracker: PlanTracker
    state: RunState

    @property
    def plan(self) -> PruningPlan:
        """The plan the module carries."""
        return self.tracker.plan

    @property
    def graph(self) -> PruningGraph:
        """All that the module can lose, as built."""
        return self.tracker.graph

    @property
    def world(self) -> int:
        """Processes that train together."""
        return world_size(self.trainer.strategy)

    def begin_report(self, chosen: Sequence[DependencyGroup] = ()) -> PruningReport:
        """The report of a run that starts with the module as it stands.

        Args:
            chosen: Groups that may be cut.
        """
        present = {name: len(kept) for name, kept in self.plan.kept.items()}
        parameters, groups = sum(p.numel() for p in self.module.parameters()), self.tracker.groups
        gone = count_parameters(groups) - count_parameters(groups, present)
        prunable = count_parameters(chosen, present)
        return PruningReport(
            parameters=parameters
            + gone
            + self.absent_parameters(list(self.tracker.removed_layers)),
            prunable_parameters=count_parameters(chosen),
            start={"parameters": parameters, "prunable_parameters": prunable},
            versions=installed_versions(),
        )

    def absent_parameters(self, stacks: Sequence[str]) -> int:
        """Parameters of layers that were removed; empty copies that came back do not count."""
        present = {id(part) for part in self.module.modules()}
        return sum(
            p.numel()
            for name in stacks
            for layer in self.tracker.removed_layers.get(name, {}).values()
            if id(layer) not in present
            for p in layer.parameters()
        )

    def count_macs(self) -> int:
        """Multiply-accumulates of one example of every network; 0 where they cannot be counted."""
        examples = self.state.examples
        if not examples:  # layers of a stack that was given by path may be called one by one
            rank_zero_warn(
                "MACs are not counted and are reported as 0: the module that holds the layers was "
                "never called itself. Call it, as self(x), instead of its layers one by one."
            )
            return 0
        try:
            with self.trainer.precision_plugin.forward_context():
                return macs_of_calls(self.module, examples)
        except Exception as error:  # a number for the report is not worth a training run
            rank_zero_warn(f"MACs could not be counted and are reported as 0: {error}")
            return 0


def write(value: Any) -> Any:
    """Plain containers and tensors of a record, its parts, or containers of them."""
    if type(value) in _WRITERS:
        return _WRITERS[type(value)](value)
    if is_dataclass(value):
        return {f.name: write(getattr(value, f.name)) for f in _saved(type(value))}
    if isinstance(value, Mapping):
        return {key: write(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [write(part) for part in value]
    return value


def read(kind: type[T], value: Any) -> T:
    """A value of a type out of what :func:`write` made of it; trusts nothing.

    Args:
        kind: A record, or a type that a field of one has; numbers may have a range as annotation.
        value: What a checkpoint holds.

    Raises:
        Exception: A plain one, if it is something else (:func:`untrusted.reading` makes one
            sentence of it).

    Example:
        >>> read(CutSchedule, write(CutSchedule((1, 2), (0.2, 0.5))))
        CutSchedule(epochs=(1, 2), sparsities=(0.2, 0.5))
    """
    return _read(kind, value)  # type: ignore[no-any-return]


def _read(kind: Any, value: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if kind in _READERS:
        return _READERS[kind](value)
    if origin is Annotated:
        low, high = parts[1]
        return whole(value, high, low) if parts[0] is int else number(value, low, high)
    if origin in (Union, types.UnionType):  # with None, which is the last of the two
        return None if value is None else _read(parts[0], value)
    if origin is tuple:
        return tuple(_read(parts[0], part) for part in listed(value))
    if origin in (list, Sequence):
        return [_read(parts[0], part) for part in listed(value)]
    if origin in (dict, Mapping):
        if parts[0] is int and not isinstance(value, Mapping):
            raise TypeError(f"{described(value)} is no mapping")
        found = mapping(value) if parts[0] is str else value
        return {_read(parts[0], key): _read(parts[1], part) for key, part in found.items()}
    hints, names = get_type_hints(kind, include_extras=True), [f.name for f in _saved(kind)]
    found = mapping(value, names)
    made = kind(**{name: _read(hints[name], found[name]) for name in names})
    if kind in _CHECKS:
        _CHECKS[kind](made)
    return made


def _saved(kind: Any) -> list[Any]:
    return [f for f in fields(kind) if f.metadata.get("saved", True)]


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


def _tensor(value: Any) -> Tensor:
    """A plain dense tensor of finite values."""
    if not isinstance(value, Tensor) or not is_plain_tensor(value):
        raise TypeError(f"{described(value)} is no plain dense tensor")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{described(value)} holds NaN or infinite values")
    return value.detach()


def _write_calibration(data: CalibrationData) -> dict[str, Any]:
    """Everything a cut is decided from; calls that hold more than plain values are left out."""
    ranks = [
        {
            path: plain
            for path, calls in rank.items()
            if (plain := [call for call in calls if is_plain(vars(call))])
        }
        for rank in data.ranks
    ]
    parts = {**vars(data), "ranks": ranks, "examples": {}}
    return {name: write(part) for name, part in parts.items()}


def _read_moments(value: Any) -> Moments:
    dimension, packed = listed(value, 2)
    sums = _tensor(packed)
    if sums.numel() < whole(dimension, _LARGEST) ** 2 // 2:  # before it is made that large
        raise ValueError(f"{sums.numel()} sums for a group of {dimension}")
    return Moments(dimension).unpack(sums)


def _read_gradients(value: Any) -> GradientSums:
    dimension, units, over_units, packed = listed(value, 4)
    sums = _tensor(packed)
    if sums.numel() < whole(dimension, _LARGEST) ** 2 // 2 + whole(units, _LARGEST):
        raise ValueError(f"{sums.numel()} sums of gradients for {dimension} outputs")
    return GradientSums(dimension, units, over_units=flag(over_units)).unpack(sums)


def _read_call(value: Any) -> RecordedCall:
    args, kwargs, mask = (mapping(value)[key] for key in ("args", "kwargs", "mask"))
    if not isinstance(args, tuple) or not isinstance(mask, (Tensor, type(None))):
        raise TypeError(f"a call with {described(args)} and the mask {described(mask)}")
    autocast = value.get("autocast", "")
    if not is_plain([args, mapping(kwargs), mask]):
        raise TypeError("a call with something else than tensors and plain values")
    if not isinstance(autocast, str) or autocast not in ("", "bfloat16", "float16"):
        raise ValueError(f"autocast to {described(autocast)}")
    return RecordedCall(args, dict(kwargs), mask, autocast)


def _check_comparison(found: LayerComparison) -> None:
    count = len(found.layers)
    for matrix, size in ((found.similarity, count), (found.angles, count + 1)):
        if len(matrix) != size or any(len(row) != size for row in matrix):
            raise ValueError(f"a comparison of {count} layers that is not square")
    whole(found.fixed, count)
    for layer in found.layers:
        whole(layer)
    losses = found.losses
    if losses is not None and (
        len(losses.single) != count or not set(losses.removed) <= set(found.layers)
    ):
        raise ValueError(f"losses of other layers than the {count} that were compared")


def _check_schedule(found: CutSchedule) -> None:
    if len(found.sparsities) != len(found.epochs):
        raise ValueError(f"{len(found.epochs)} epochs with {len(found.sparsities)} sparsities")
    for sparsity in found.sparsities:
        number(sparsity, 0, 1)


def _read_snapshot(state: Any) -> Snapshot:
    """A snapshot; what an optimizer keeps must follow the parameter of that name.

    It must be of one kind for all parameters of the optimizer. Parameters that were trained, and
    what is kept of them, hold no NaN: training would only spread it. Buffers and parameters that
    were not trained may hold anything: a mask is infinite, and an empty statistic may be NaN. So
    may squares of gradients overflow in half precision: their parameters only stop moving.
    """
    found = mapping(state, [f.name for f in fields(Snapshot)])
    weights = {name: _weight(value) for name, value in mapping(found["weights"]).items()}
    optimizers = [_read_states(states, weights) for states in listed(found["optimizers"])]
    groups = [
        [[text(name) for name in listed(names)] for names in listed(held)]
        for held in listed(found["groups"], len(optimizers))
    ]
    for states, held in zip(optimizers, groups, strict=True):
        strange = set(states) - {name for names in held for name in names}
        if strange:
            raise ValueError(f"no group of an optimizer holds {described(min(strange))}")
    return Snapshot(
        epoch=whole(found["epoch"]),
        reached=number(found["reached"], 0, 1),
        information_kept=number(found["information_kept"], 0, 1),
        plan=PruningPlan.from_json(found["plan"]),
        weights=weights,
        optimizers=optimizers,
        groups=groups,
        failed_epoch=None if found["failed_epoch"] is None else whole(found["failed_epoch"]),
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


_WRITERS: dict[type, Callable[[Any], Any]] = {
    CalibrationData: _write_calibration,
    GradientSums: lambda sums: (sums.dimension, sums.units, sums.over_units, sums.packed()),
    Moments: lambda moments: (moments.dimension, moments.packed()),
    PruningGraph: lambda graph: graph.to_json(),
    PruningPlan: lambda plan: plan.to_json(),
    PruningReport: lambda report: report.state_dict(),
    RecordedCall: lambda call: dict(vars(call)),
    Snapshot: lambda snapshot: {**vars(snapshot), "plan": snapshot.plan.to_json()},
}
_READERS: dict[Any, Callable[[Any], Any]] = {
    GradientSums: _read_gradients,
    Moments: _read_moments,
    PruningGraph: PruningGraph.from_json,
    PruningPlan: PruningPlan.from_json,
    PruningReport: read_report,
    RecordedCall: _read_call,
    Snapshot: _read_snapshot,
    Tensor: _tensor,
    bool: flag,
    float: number,
    int: whole,
    str: text,
}
_CHECKS: dict[type, Callable[[Any], None]] = {
    CutSchedule: _check_schedule,
    LayerComparison: _check_comparison,
}
