"""PruningCallback: the hooks of the Trainer, each of them one step that the engine documents.

What loggers get after every epoch:

``prune/parameters``         parameters of the whole module
``prune/sparsity``           share of the prunable parameters that is gone, of the model as built
``prune/macs``               multiply-accumulates of one example, from the first calibration on
``prune/information_kept``   share of the information that all cuts so far left
``prune/width/<group>``      units of every group
``prune/depth/<stack>``      layers of every stack
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_mi_prune.callbacks.engine import PruningStrategy, RunEngine
from lightning_mi_prune.callbacks.monitors import guard_of
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Monitoring, check_choice, check_count
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.reporting.report import PruningReport, check_suffix

__all__ = [
    "PruningCallback",
    "as_misconfiguration",
    "checked_options",
]

# What each rank may have as it likes: only rank 0 uses it.
_PRIVATE = ("self", "__class__", "verbose", "write_report", "latency.table")


@contextmanager
def as_misconfiguration() -> Iterator[None]:
    """Turn the errors of options into those that Lightning raises for them."""
    try:
        yield
    except PruningError as error:
        raise MisconfigurationException(str(error)) from error


def checked_options(owner: type, given: Mapping[str, object]) -> dict[str, object]:
    """Refuse options of a wrong type; returns those that decide on the result, by name.

    Args:
        owner: Class whose constructor takes them.
        given: The ``locals()`` of its constructor, before anything else is there.

    Returns:
        What all ranks must have alike; fields of records as ``"schedule.cuts"``.

    Raises:
        MisconfigurationException: Naming the option and its value.
    """
    defaults, found = inspect.signature(owner).parameters, dict[str, object]()
    for name, value in given.items():
        kind = type(defaults[name].default) if name in defaults else object
        if is_dataclass(kind):
            if not isinstance(value, kind):
                raise MisconfigurationException(
                    f"{name}={value!r:.60}; expected options.{kind.__name__}(...)."
                )
            found |= {f"{name}.{field}": part for field, part in vars(value).items()}
        else:
            found[name] = value
    with as_misconfiguration():
        check_count("seed", given["seed"], least=0)
        check_choice("verbose", given["verbose"], (True, False))
        where = given["write_report"]
        if isinstance(where, str):
            check_suffix(where)
        else:
            check_choice("write_report", where, (True, False))
    for name in {"module", "include", "exclude", "monitor"} & given.keys():
        if not isinstance(given[name], (str, type(None))):
            raise MisconfigurationException(f"{name}={given[name]!r}; expected text or None.")
        if name in ("include", "exclude"):
            _check_expression(name, str(given[name] or ""))
    kinds = given.get("kinds")
    if kinds is not None and (isinstance(kinds, str) or not kinds):
        raise MisconfigurationException(
            f"kinds={kinds!r}; expected a list of kinds such as ['ffn', 'heads']."
        )
    return {name: value for name, value in found.items() if name not in _PRIVATE}


def _check_expression(name: str, value: str) -> None:
    try:
        re.compile(value)
    except re.error as error:
        raise MisconfigurationException(
            f"{name}={value!r} is not a regular expression ({error}); expected one, such as 'ffn$'."
        ) from error


class PruningCallback(pl.Callback):
    """Prunes by a strategy while the Trainer runs.

    Args:
        strategy: What is removed, and how it is chosen.
        options: What all ranks must have alike, by name.
        graph: What the module can lose, or a file that holds it; None finds it.
        max_drop: Largest loss of ``monitor`` that a cut may cost; None keeps every cut.
        monitor: Name of a metric that validation logs.
        monitoring: How it is compared.
        verbose: Whether each cut prints a table on rank zero.
        write_report: Whether, or where, a run ends with its report.
    """

    def __init__(
        self,
        strategy: PruningStrategy,
        options: Mapping[str, object],
        *,
        graph: PruningGraph | str | None,
        max_drop: float | None,
        monitor: str | None,
        monitoring: Monitoring,
        verbose: bool,
        write_report: bool | str,
    ) -> None:
        super().__init__()
        with as_misconfiguration():
            given = PruningGraph.load(graph) if isinstance(graph, str) else graph
        self.engine = RunEngine(
            strategy,
            name=type(self).__name__,
            options=options,
            graph=given,
            guard=guard_of(max_drop, monitor, monitoring),
            best_of=monitoring.best_of,
            verbose=verbose,
            write_report=write_report,
        )

    @property
    def report(self) -> PruningReport:
        """Every cut of the run so far."""
        return self.engine.state.report

    @property
    def graph(self) -> PruningGraph | None:
        """All groups and stacks of the module, as built; None before they are known."""
        return self.engine.graph

    @property
    def plan(self) -> PruningPlan | None:
        """The plan the module carries now; None before ``setup``, or before the first batch."""
        return self.engine.plan

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.engine.setup(trainer, pl_module, stage)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.engine.state.to_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.engine.load(state_dict)

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.engine.save(trainer, checkpoint, self.state_key)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.engine.load_optimizers(trainer, pl_module, checkpoint, self.state_key)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.begin_fit(trainer, pl_module)

    @override
    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.check_metric_is_logged(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.begin_training(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.begin_validation(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.engine.begin_validation_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.end_validation(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.end_epoch(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.carry_out(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.engine.begin_step(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.engine.end_step()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.engine.end_training(trainer)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.engine.close()

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self.engine.close(pl_module)
