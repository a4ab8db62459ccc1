"""The monitored metric, and callbacks that compare it between models of different size."""

from __future__ import annotations

import ast
import inspect
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_mi_prune.callbacks.distributed import broadcast_decision
from lightning_mi_prune.callbacks.schedule import decision_epoch, is_last_validation
from lightning_mi_prune.callbacks.state import RunState, Snapshot
from lightning_mi_prune.core import options
from lightning_mi_prune.core.errors import number

__all__ = [
    "BestOf",
    "EarlyStoppingHold",
    "MetricGuard",
    "check_monitor",
    "compare_metric",
    "guard_of",
    "logged_in_code",
    "logged_in_validation",
    "restart_comparison",
    "validated_metrics",
    "without_best",
]

_MOST_METRICS = 32  # of a validation that a report notes
_OURS = ("lightning", "lightning_mi_prune", "pytorch_lightning", "torch")
_OTHER_LOOPS = re.compile("(on_)?(train|test|predict)|optimizer_|configure_")
_HARMLESS = {"isinstance", "super", "type"}  # what may be given the module without logging with it


def check_monitor(trainer: pl.Trainer, module: pl.LightningModule, monitor: str) -> None:
    """Refuse a metric that no line of the module logs, before anything runs.

    Raises:
        MisconfigurationException: If the code names all metrics, and this one is not among them.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    names = logged_in_code([module, *callbacks])
    stem = monitor.partition("/dataloader_idx_")[0]
    if names is None or {stem, stem.removesuffix("_epoch"), stem.removesuffix("_step")} & names:
        return
    raise MisconfigurationException(
        f"max_drop compares monitor={monitor!r}, which {type(module).__name__} never logs; "
        f"expected one of {sorted(names)}. Log it in validation_step, or change monitor."
    )


def logged_in_code(objects: Iterable[object]) -> set[str] | None:
    """Names that validation logs under, by the code of some classes; None if others may be logged.

    So it is with names that are put together as the code runs, and with a module that is given to
    other objects, which may log with it.

    Args:
        objects: The module and the callbacks of a run; those of libraries log nothing here.
    """
    names: set[str] = set()
    for given in objects:
        owner = "self" if isinstance(given, pl.LightningModule) else None
        try:
            trees = {
                name: [ast.parse(textwrap.dedent(inspect.getsource(f))) for f in functions]
                for name, functions in _functions(given).items()
            }
        except (OSError, TypeError, SyntaxError):
            return None
        for name in _reached(trees):
            for tree in trees[name]:
                found = _names_in(tree, owner)
                if found is None:
                    return None
                names |= found
    return names


def _functions(given: object) -> dict[str, list[FunctionType]]:
    """Functions in the classes of an object that are no library's, by name."""
    found: dict[str, list[FunctionType]] = {}
    for kind in type(given).__mro__:
        if kind.__module__.partition(".")[0] in (*_OURS, "builtins"):
            continue
        for name, value in vars(kind).items():
            inner = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(inner, FunctionType):
                found.setdefault(name, []).append(inner)
    return found


def _reached(trees: Mapping[str, Sequence[ast.AST]]) -> set[str]:
    """What validation may call: all but the steps of other loops, unless it names them."""
    reached = {name for name in trees if not _OTHER_LOOPS.match(name)}
    while True:
        nodes = [n for name in reached for tree in trees[name] for n in ast.walk(tree)]
        called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if not (called & set(trees)) - reached:
            return reached
        reached |= called & set(trees)


def _names_in(tree: ast.AST, owner: str | None) -> set[str] | None:
    """String literals that are logged in a function; None if something else may be."""
    names: set[str] = set()
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("log", "log_dict"):
            holder = node.value.id if isinstance(node.value, ast.Name) else ""
            if holder in ("torch", "math", "np", "numpy"):
                continue
            call = called.get(id(node))
            found = None if call is None else _literals(call, whole=node.attr == "log_dict")
            if found is None:
                return None
            names |= found
        elif isinstance(node, ast.Call) and owner is not None:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            by = node.func.id if isinstance(node.func, ast.Name) else ""
            if any(isinstance(a, ast.Name) and a.id == owner for a in given) and (
                by not in _HARMLESS
            ):
                return None
    return names


def _literals(call: ast.Call, *, whole: bool) -> set[str] | None:
    first = call.args[0] if call.args else next((k.value for k in call.keywords), None)
    keys = first.keys if whole and isinstance(first, ast.Dict) else [first]
    found = {key.value for key in keys if isinstance(key, ast.Constant)}
    texts = {name for name in found if isinstance(name, str)}
    return texts if len(texts) == len(keys) else None


def logged_in_validation(trainer: pl.Trainer) -> list[str]:
    """Metrics of the validation that just ran; all there are, where it is not known which."""
    results = getattr(trainer, "_results", None)
    mine = results.metrics(on_step=False)["callback"] if results else {}
    return sorted(mine or trainer.callback_metrics)


def validated_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """Finite metrics of the validation that just ran, by name; a few dozen at most."""
    logged = trainer.callback_metrics
    names = [name for name in logged_in_validation(trainer) if not name.startswith("prune/")]
    found = {name: float(logged[name]) for name in names[:_MOST_METRICS] if name in logged}
    return {name: value for name, value in found.items() if math.isfinite(value)}


@dataclass(frozen=True)
class MetricGuard:
    """How much of a metric a cut may cost after its recovery.

    Args:
        max_drop: Largest loss against the best accepted model, in the metric's own unit.
        monitor: Name of the logged metric.
        mode: ``max`` if more is better, ``min`` if less is.
        on_drop: ``halve`` tries half of the step next, ``stop`` makes no further cut.
    """

    max_drop: float
    monitor: str
    mode: Literal["max", "min"] = "max"
    on_drop: Literal["halve", "stop"] = "halve"

    def __str__(self) -> str:
        return f"{number(self.max_drop)} in {self.monitor!r}"

    def value(self, trainer: pl.Trainer) -> float:
        """The metric after this validation, as rank 0 sees it.

        Raises:
            MisconfigurationException: If it was not logged.
        """
        logged = trainer.callback_metrics

        def read() -> float:
            if self.monitor in logged:
                return float(logged[self.monitor])
            raise MisconfigurationException(
                f"max_drop compares monitor={self.monitor!r}, which was not logged in validation; "
                f"expected one of {logged_in_validation(trainer)}. Log it in validation_step, or "
                "change monitor."
            )

        return broadcast_decision(trainer.strategy, read)

    def better(self, value: float, best: float | None) -> float | None:
        """The better of two values; one that is not finite never is."""
        if not math.isfinite(value):
            return best
        return value if best is None else (max if self.mode == "max" else min)(value, best)

    def exceeded(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is more than ``max_drop`` worse than ``best``, or not a number."""
        if best is None:
            return False
        drop = best - value if self.mode == "max" else value - best
        return not drop <= self.max_drop


def compare_metric(
    trainer: pl.Trainer, guard: MetricGuard, state: RunState, end: float
) -> tuple[Snapshot | None, float | None]:
    """The snapshot and the best value after a validation.

    There is no snapshot any more where the cut after it is accepted, and one with a
    ``failed_epoch`` where that is to be rolled back.
    """
    value, snapshot = guard.value(trainer), state.snapshot
    if snapshot is None:
        return None, guard.better(value, state.best)
    following = next((e for e in state.schedule.left(state.reached) if e > snapshot.epoch), None)
    every = trainer.check_val_every_n_epoch or 1
    due = decision_epoch(snapshot.epoch, following, end, every)
    if trainer.current_epoch < due or not is_last_validation(trainer):
        return snapshot, state.best
    if guard.exceeded(value, state.best):
        return replace(snapshot, failed_epoch=trainer.current_epoch), state.best
    return None, guard.better(value, state.best)


def guard_of(
    max_drop: float | None, monitor: str | None, monitoring: options.Monitoring
) -> MetricGuard | None:
    """What guards a metric; None where every cut is kept.

    Raises:
        MisconfigurationException: If one of ``max_drop`` and ``monitor`` lacks the other, or is
            out of range.
    """
    if max_drop is None:
        if monitor is not None:
            raise MisconfigurationException(
                f"monitor={monitor!r} is compared for max_drop only, which is None; set both."
            )
        return None
    number = isinstance(max_drop, (int, float)) and not isinstance(max_drop, bool)
    if not number or not 0 <= max_drop < math.inf:
        raise MisconfigurationException(f"max_drop={max_drop!r}; expected a number from 0 on.")
    if monitor is None:
        raise MisconfigurationException(
            f"max_drop={max_drop} needs monitor; expected the name of a metric that validation "
            "logs."
        )
    return MetricGuard(float(max_drop), monitor, monitoring.mode, monitoring.on_drop)


BestOf = Literal["final_size", "each_size", "any_size"]


class EarlyStoppingHold:
    """Keeps early stopping from ending a run before its last cut.

    A stop because of a metric that is not finite, or past ``divergence_threshold``, stays a stop.
    """

    def __init__(self) -> None:
        self._thresholds: dict[EarlyStopping, float | None] = {}

    def hold(self, trainer: pl.Trainer) -> None:
        """Call before every check: nothing counts as too late, or as good enough, yet."""
        for stopping in _early_stoppings(trainer):
            self._thresholds.setdefault(stopping, stopping.stopping_threshold)
            stopping.stopping_threshold = None
            stopping.best_score = torch.tensor(_worst(stopping.mode))
            stopping.wait_count = 0

    def release(self) -> None:
        """From now on early stopping is on its own again."""
        for stopping, threshold in self._thresholds.items():
            stopping.stopping_threshold = threshold
        self._thresholds.clear()


def restart_comparison(trainer: pl.Trainer, best_of: BestOf) -> None:
    """Make every monitor forget what models of another size reached.

    Args:
        trainer: Trainer of the run, at the moment the size changes.
        best_of: ``final_size`` lets checkpoints of other sizes be the first to be replaced,
            ``each_size`` leaves the best of every size on disk.
    """
    for checkpoint in trainer.checkpoint_callbacks:
        if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor is not None:
            _restart_checkpoint(checkpoint, best_of)
    for stopping in _early_stoppings(trainer):
        stopping.best_score = torch.tensor(_worst(stopping.mode))
        stopping.wait_count = 0
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau):
            config.scheduler.best = config.scheduler.mode_worse
            config.scheduler.num_bad_epochs = 0


def without_best(trainer: pl.Trainer) -> list[str]:
    """Metrics of the checkpoint callbacks that have saved no model of the present size."""
    return [
        checkpoint.monitor
        for checkpoint in trainer.checkpoint_callbacks
        if isinstance(checkpoint, ModelCheckpoint)
        and checkpoint.monitor is not None
        and checkpoint.save_top_k != 0
        and not checkpoint.best_model_path
    ]


def _restart_checkpoint(checkpoint: ModelCheckpoint, best_of: BestOf) -> None:
    worst = torch.tensor(_worst(checkpoint.mode))
    old = list(checkpoint.best_k_models) if best_of == "final_size" else []
    checkpoint.best_k_models = dict.fromkeys(old, worst)
    checkpoint.kth_best_model_path = old[0] if old else ""
    checkpoint.kth_value = worst
    checkpoint.best_model_path, checkpoint.best_model_score = "", None
    checkpoint.current_score = None


def _worst(mode: str) -> float:
    return math.inf if mode == "min" else -math.inf


def _early_stoppings(trainer: pl.Trainer) -> list[EarlyStopping]:
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, EarlyStopping)]
