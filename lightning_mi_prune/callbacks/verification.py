"""What is checked before a cut: steps run on a copy, and what else holds what is cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import Self

from lightning_mi_prune.callbacks.distributed import refuse_compiled
from lightning_mi_prune.callbacks.state import Session
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import call_step
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, LayerStack
from lightning_mi_prune.surgery.verification import held_elsewhere, verify_cut

__all__ = [
    "DryRun",
    "check_surroundings",
    "without_frozen",
]

Part = TypeVar("Part", DependencyGroup, LayerStack)


class DryRun:
    """Tries cuts on copies of a module, on the first batches that its steps are given."""

    def __init__(self) -> None:
        self._batches: dict[str, tuple[Any, int]] = {}

    def has(self, step: str) -> bool:
        """Whether a batch of a step was given."""
        return step in self._batches

    def remember(self, step: str, batch: Any, loader: int = 0) -> None:
        """Keep a copy of a batch, on the CPU.

        Args:
            step: ``"training_step"`` or ``"validation_step"``.
            batch: What the step is called with.
            loader: Index of its loader.
        """
        self._batches[step] = (_copied(batch, torch.device("cpu")), loader)

    def check(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        graph: PruningGraph,
        current: PruningPlan,
        plan: PruningPlan,
        *,
        only: str | None = None,
    ) -> None:
        """Run the steps on a copy that was cut; every rank must call it.

        Args:
            trainer: The trainer.
            module: The module; it is only copied.
            graph: What it can lose, as built.
            current: Plan it carries.
            plan: Plan to try.
            only: The one step to run; default: all that a batch is known of.

        Raises:
            PruningError: If a step cannot do without what the plan removes.
        """
        names = [name for name in self._batches if only in (None, name)]
        steps = {name: self._step(trainer, module, name) for name in names}
        detach = _detached_from(trainer)
        try:
            why = verify_cut(module, graph, current, plan, steps, prepare=detach)
        except PruningError as error:
            if "cannot be copied" not in str(error):
                raise
            why = str(error)
        if why:
            rank_zero_warn(
                "Whether anything outside the groups reads the units could not be tried on a copy, "
                f"which fails uncut too: {why.rstrip('.')}. Compare the metric after the cut.",
                category=PruningWarning,
            )

    def _step(
        self, trainer: pl.Trainer, module: pl.LightningModule, name: str
    ) -> Callable[[nn.Module], Any]:
        batch, loader = self._batches[name]
        training = name == "training_step"
        plugin, device = trainer.precision_plugin, module.device

        def run(whole: nn.Module) -> None:
            given = _copied(batch, device)
            modes = {part: part.training for part in whole.modules()}
            if not training:
                whole.eval()
            elif not any(modes.values()):
                whole.train()
            context = plugin.train_step_context() if training else plugin.val_step_context()
            with torch.set_grad_enabled(training), context:
                call_step(getattr(whole, name), given, loader)

        return run


class _Inert:
    """Replaces an optimizer or a schedule of a run: it can be read, and does nothing."""

    def __init__(self, real: Any = None) -> None:
        self._real = real

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name, None) if self._real is not None else None
        if value is None or callable(value):
            return lambda *_, **__: _Inert()
        return copy.copy(value) if isinstance(value, (list, dict)) else value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def _detached_from(trainer: pl.Trainer) -> Callable[[nn.Module], None]:
    """What keeps a copy of the module from logging, stepping and stopping in a run."""
    silenced = copy.copy(trainer)  # what a step sets on its trainer is set on this one
    silenced.loggers = [DummyLogger() for _ in trainer.loggers]

    def prepare(whole: nn.Module) -> None:
        if not isinstance(whole, pl.LightningModule):
            return
        whole.trainer = silenced
        real, schedules = whole.optimizers, whole.lr_schedulers
        whole.__dict__.update(
            dict.fromkeys(
                (
                    "log",
                    "log_dict",
                    "print",
                    "manual_backward",
                    "clip_gradients",
                    "toggle_optimizer",
                    "untoggle_optimizer",
                    "lr_scheduler_step",
                ),
                _nothing,
            )
        )
        whole.__dict__["toggled_optimizer"] = _no_context
        whole.__dict__["optimizers"] = lambda *_, **__: _inert(real)
        whole.__dict__["lr_schedulers"] = lambda: _inert(schedules)

    return prepare


def _inert(read: Callable[[], Any]) -> Any:
    found = read()
    if isinstance(found, (list, tuple)):
        return [_Inert(one) for one in found]
    return None if found is None else _Inert(found)


def _nothing(*_: object, **__: object) -> None:
    """Replaces what a step would log or do."""


def _no_context(*_: object, **__: object) -> AbstractContextManager[None]:
    return nullcontext()


def _copied(batch: Any, device: torch.device) -> Any:
    """A batch of one's own: steps may take entries out of theirs, or change its tensors."""
    try:
        batch = copy.deepcopy(batch)
    except Exception:  # of whatever class it is; then it is shared
        return batch
    return move_data_to_device(batch, device)


def check_surroundings(session: Session, parameters: Sequence[nn.Parameter], cut: set[str]) -> None:
    """Refuse compiled modules that a cut changes; warn of what holds parameters that it replaces.

    Args:
        session: The run.
        parameters: The parameters.
        cut: Paths of the modules that a cut changes.

    Raises:
        MisconfigurationException: Naming the module.
    """
    refuse_compiled(session.module, cut)
    others: list[pl.Callback] = session.trainer.callbacks  # type: ignore[attr-defined]
    strangers = {
        type(c).__name__: c
        for c in others
        if not type(c).__module__.startswith(("lightning.", "lightning_mi_prune."))
    }
    held = held_elsewhere({"": session.module, **strangers}, parameters)
    if held:
        rank_zero_warn(
            f"{', '.join(map(repr, held[:6]))} hold parameters that a cut replaces, and would "
            "go on with the old ones. Read them from the module where they are used "
            "(named_parameters), or collect them again in on_train_epoch_start.",
            category=PruningWarning,
        )


def without_frozen(module: pl.LightningModule, parts: list[Part]) -> list[Part]:
    """Leave out networks that are frozen whole, such as a teacher, beside one that is trained."""
    trained = {
        path
        for path in {part.network for part in parts}
        if any(p.requires_grad for p in module.get_submodule(path).parameters())
    }
    return [part for part in parts if part.network in trained] or parts
