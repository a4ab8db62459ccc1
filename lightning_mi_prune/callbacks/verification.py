"""What the user's own steps show on a copy: what can be cut, and whether a cut would work.

And what else holds the parameters that are cut.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import Metric
from typing_extensions import Self

from lightning_mi_prune.callbacks.distributed import refuse_compiled
from lightning_mi_prune.callbacks.state import Session
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import (
    call_step,
    clone_batch,
    first_examples,
    fixed_random_state,
    map_tensors,
)
from lightning_mi_prune.discovery.copies import structural_copy, tensor_outputs
from lightning_mi_prune.discovery.discover import discover_run
from lightning_mi_prune.discovery.tracing.recording import tensors_in
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, LayerStack
from lightning_mi_prune.surgery.verification import copy_module, held_elsewhere, verify_cut

__all__ = [
    "DryRun",
    "check_surroundings",
    "discover_in_step",
    "quiet_copy",
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


def discover_in_step(
    trainer: pl.Trainer, module: pl.LightningModule, step: str, batch: Any, loader: int = 0
) -> PruningGraph | None:
    """Find what a module can lose by what it does in a step; the module is only copied.

    The copy runs two examples, in evaluation mode, in single precision or better, and by itself:
    ranks that wait for this one take no part in what it gathers.

    Args:
        trainer: The trainer.
        module: The module.
        step: ``"training_step"`` or ``"validation_step"``.
        batch: What the step is called with.
        loader: Index of its loader.

    Returns:
        What it can lose; None if the step runs no network, so that another one has to show it.

    Raises:
        PruningError: If the step cannot run on a copy, or nothing can be cut.
    """
    whole, detach = copy_module(module), _detached_from(trainer)
    _leave_ranks(whole)
    halves = {p.dtype for p in whole.parameters()} & {torch.float16, torch.bfloat16}
    if halves:
        whole.float()
        batch = map_tensors(batch, lambda x: x.float() if x.dtype in halves else x)
    autocast = trainer.precision_plugin.val_step_context
    tries = [
        _Observed(step, given, loader, context, detach)
        for context in (nullcontext, autocast)  # only some modules need theirs
        for given in (first_examples(batch), batch)
    ]
    with fixed_random_state(module):
        run, failure = _first_that_runs(tries, whole)
        if run is None:
            raise PruningError(
                f"What {type(module).__name__} can lose could not be found: its {step} fails on a "
                f"copy in evaluation mode ({failure}). Expected a step that runs again on the same "
                "batch; or give graph=discover(model, ...)."
            )
        run = run.of_activations(whole)
        return discover_run(whole, run) if tensor_outputs(run(whole)) else None


def quiet_copy(trainer: pl.Trainer, module: pl.LightningModule) -> nn.Module:
    """A copy that shares the parameters, in evaluation mode: its steps leave nothing behind.

    They log, step, stop and gather nothing in the run.

    Args:
        trainer: The trainer.
        module: The module; it is only read.

    Raises:
        PruningError: If it cannot be copied.
    """
    whole = structural_copy(module, buffers=True)
    _detached_from(trainer)(whole)
    _leave_ranks(whole)
    return whole


def _leave_ranks(whole: nn.Module) -> None:
    """Let a copy run by itself: other ranks take no part in what it gathers."""
    whole.__dict__["all_gather"] = _alone
    for part in whole.modules():
        if isinstance(part, Metric):
            part.distributed_available_fn = _never


def _first_that_runs(tries: Sequence[_Observed], whole: nn.Module) -> tuple[_Observed | None, str]:
    """The first way to run a module that works, else why the first one does not."""
    failures = []
    for run in tries:
        why = _failure_of(run, whole)
        if not why:
            return run, ""
        failures.append(why)
    return None, failures[0]


def _failure_of(run: Callable[[nn.Module], Any], whole: nn.Module) -> str:
    try:
        run(whole)
    except Exception as error:  # any code may run in a step
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


@dataclass(frozen=True)
class _Observed:
    """Runs a step of a copy; returns all that it makes: its result, what it logs, last outputs.

    Args:
        step: Name of the step.
        batch: What it is called with.
        loader: Index of its loader.
        context: Context in which it runs.
        detach: Keeps a copy from logging, stepping and stopping in a run.
        names: Names of the logged values to return; None for all.
    """

    step: str
    batch: Any
    loader: int
    context: Callable[[], AbstractContextManager[Any]]
    detach: Callable[[nn.Module], None]
    names: frozenset[str] | None = None

    def __call__(self, whole: nn.Module) -> dict[str, Any]:
        logged: dict[str, Any] = {}

        def log(name: str, value: Any, *_: object, **__: object) -> None:
            if isinstance(value, Tensor) and (self.names is None or name in self.names):
                logged[name] = value

        def log_dict(values: Mapping[str, Any], *_: object, **__: object) -> None:
            for name, value in values.items():
                log(name, value)

        if getattr(whole, "_trainer", None) is None:  # a copy, which has no trainer yet
            self.detach(whole)
        whole.__dict__.update(log=log, log_dict=log_dict)
        whole.eval()
        torch.manual_seed(0)  # a step that draws numbers draws the same each time
        with torch.no_grad(), self.context(), _last_outputs(whole) as outputs:
            result = call_step(getattr(whole, self.step), clone_batch(self.batch), self.loader)
        seen = outputs.of_models or (outputs.others if not tensors_in([result, logged]) else [])
        return {"result": result, "logged": logged, "outputs": list(seen)}

    def of_activations(self, whole: nn.Module) -> _Observed:
        """The same without logged values that are not computed from activations.

        Every cut changes a number of parameters, however right it is.
        """
        with _Activations().following(whole, self.batch) as known:
            logged = self(whole)["logged"]
        return replace(self, names=frozenset(n for n, v in logged.items() if known.has(v)))


class _Activations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which tensors are computed from a batch, or from what modules return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, Tensor] = {}  # kept alive, so that no other gets the same id

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of them."""
        return id(tensor) in self._known

    def add(self, values: Any) -> None:
        """Count all tensors in nested containers among them."""
        self._known |= {id(tensor): tensor for tensor in tensors_in(values)}

    @contextmanager
    def following(self, whole: nn.Module, batch: Any) -> Iterator[Self]:
        """A block in which a module runs on a batch."""
        self.add(batch)
        parts = [part for part in whole.modules() if any(True for _ in part.parameters())]
        handles = [part.register_forward_hook(lambda *given: self.add(given[-1])) for part in parts]
        try:
            with self:
                yield self
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if any(map(self.has, tensors_in((args, kwargs)))):
            self.add(output)
        return output


class _Outputs(NamedTuple):
    """Tensors that networks returned: predictions and losses, or what a step may read on."""

    of_models: list[Tensor]
    others: list[Tensor]


@contextmanager
def _last_outputs(whole: nn.Module) -> Iterator[_Outputs]:
    """The tensors that the last module called from a step returns: its predictions, mostly.

    And the losses of other networks that compute their own: no later one reads what they return.
    What a network without a loss returns by name, such as hidden states, the step may read on.
    """
    depth, found, losses, handles = 0, _Outputs([], []), list[Tensor](), []

    def enter(*_: object) -> None:
        nonlocal depth
        depth += 1

    def leave(part: nn.Module, _: object, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0 and any(True for _ in part.parameters()):
            named = isinstance(output, Mapping)
            loss = output.get("loss") if named else None
            every = list(output.values()) if named else output
            every = every if isinstance(every, (list, tuple)) else [every]
            values = [value for value in every if isinstance(value, Tensor)]
            read_on = named and not isinstance(loss, Tensor)
            found.of_models[:] = [*losses, *([] if read_on else values)]
            found.others[:] = values
            losses.extend([loss] if isinstance(loss, Tensor) else [])

    try:
        for part in whole.modules():
            handles.append(part.register_forward_pre_hook(enter))
            handles.append(part.register_forward_hook(leave, always_call=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _alone(data: Any, *_: object, **__: object) -> Any:
    """What ``all_gather`` returns to a process that trains alone."""
    return data


def _never() -> bool:
    return False


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
