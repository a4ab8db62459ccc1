"""The user's own loss without layers: training batches that are kept, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from lightning_mi_prune.calibration.bypass import loss_in, losses_without
from lightning_mi_prune.calibration.calls import RecordedCall, is_plain
from lightning_mi_prune.calibration.data import LayerLosses
from lightning_mi_prune.callbacks.distributed import gather_ranks, sum_tensor
from lightning_mi_prune.callbacks.state import Session, write
from lightning_mi_prune.callbacks.verification import quiet_copy
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.running import call_step, clone_batch
from lightning_mi_prune.discovery.copies import first_line, run_once
from lightning_mi_prune.graph.containers import layer_paths
from lightning_mi_prune.graph.groups import LayerStack
from lightning_mi_prune.importance.layer_losses import cheapest_removal

__all__ = [
    "BatchCollection",
    "measure_removal",
]


class BatchCollection:
    """Keeps copies of the first training batches of an epoch that ends with a decision.

    Args:
        steps: Training steps whose batch is kept, over all ranks.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def begin(self, session: Session, batch: Any, index: int) -> None:
        """A training step begins; the first of an epoch begins anew."""
        state = session.state
        if index == 0:
            state.batches = []
        if len(state.batches) < -(-self._steps // session.world):
            kept = move_data_to_device(clone_batch(batch), torch.device("cpu"))
            state.batches.append(RecordedCall((kept,), {}))

    def end(self) -> None:
        """A training step is over."""

    def close(self) -> None:
        """There are no hooks to take down."""

    def save(self, session: Session, state: dict[str, Any]) -> None:
        """Put the batches of all ranks into the callback's part of a checkpoint, in turn.

        Those that hold more than plain values are left out: a run that resumes takes later ones.
        """
        if session.world > 1:
            mine = [batch for batch in session.state.batches if is_plain(vars(batch))]
            ranks = gather_ranks(session.trainer.strategy, mine)
            most = max(map(len, ranks))
            state["batches"] = write([r[i] for i in range(most) for r in ranks if i < len(r)])

    def resume(self, session: Session) -> None:
        """Leave the batches of other ranks out, of those that a checkpoint holds."""
        batches = session.state.batches
        session.state.batches = batches[session.trainer.global_rank :: session.world]


def measure_removal(
    session: Session, stack: LayerStack, count: int, fixed: int
) -> LayerLosses | None:
    """The layers of a stack without which the loss of the kept batches is lowest.

    The loss is that of the module's own ``training_step``, in evaluation mode and without
    gradients, as the mean over the batches of all ranks: one all-reduce a sweep. The step runs on a
    copy that shares the parameters, so that nothing it sets or logs remains, from the same random
    state each time. Every rank must call it.

    Args:
        session: The run.
        stack: The stack.
        count: Layers to remove.
        fixed: Layers at its bottom that must stay.

    Returns:
        The layers, as numbered when built; None if no rank has a batch.

    Raises:
        PruningError: If the step fails, or returns no finite loss.
    """
    strategy, batches = session.trainer.strategy, session.state.batches
    held = sum_tensor(strategy, torch.tensor([len(batches)], dtype=torch.float64))
    if not held:
        return None
    whole = quiet_copy(session.trainer, session.module) if batches else session.module
    numbers = session.plan.kept[stack.name]
    paths = dict(zip(numbers, layer_paths(session.module, stack.name), strict=True))
    steps = [partial(_loss, session.trainer, whole, batch.args[0]) for batch in batches]

    def losses(removals: Sequence[frozenset[int]]) -> list[float]:
        sums, failure = torch.zeros(len(removals) + 1, dtype=torch.float64), None
        try:
            gone = [[whole.get_submodule(paths[n]) for n in sorted(r)] for r in removals]
            sums[:-1] = losses_without(gone, steps)
        except Exception as error:  # the other ranks must not wait for this one
            failure, sums[-1] = error, 1
        *means, failed = (sum_tensor(strategy, sums) / held).tolist()
        if failure is not None:
            raise _explained(failure, session.module, stack) from failure
        if failed:
            raise PruningError(
                f"The loss without layers of {stack.name!r} fails on another rank; see its message."
            )
        return means

    return cheapest_removal(losses, numbers, count, fixed)


def _loss(trainer: pl.Trainer, whole: nn.Module, batch: Any) -> float:
    """The loss of one training step of a copy, which changes nothing of the run."""

    def run(module: Any) -> Any:
        given = move_data_to_device(clone_batch(batch), trainer.strategy.root_device)
        with trainer.precision_plugin.train_step_context():
            return call_step(module.training_step, given)

    return loss_in(run_once(whole, run))


def _explained(failure: Exception, module: nn.Module, stack: LayerStack) -> PruningError:
    if isinstance(failure, PruningError):
        return failure
    return PruningError(
        f"The loss without layers of {stack.name!r} could not be measured: the training_step of "
        f"{type(module).__name__} fails on a copy in evaluation mode ({first_line(failure)}). "
        "Expected a step that runs again on the same batch; or choose another criterion."
    )
