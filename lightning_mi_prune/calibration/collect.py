"""Collect activations and gradients by running a model on batches, without a Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.gradients import (
    GradientRecorder,
    GradientSums,
    check_gradients,
)
from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import (
    call_step,
    fixed_random_state,
    move_tensors,
    tensors_in,
    undisturbed,
)
from lightning_mi_prune.core.spilling import spilling_saved_tensors
from lightning_mi_prune.graph.groups import DependencyGroup

__all__ = [
    "Forward",
    "Loss",
    "check_input",
    "collect_activations",
    "collect_gradients",
    "explaining_failures",
    "first_batches",
    "run_forward",
    "training_loss",
    "try_forward",
    "try_loss",
]

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""

Loss = Callable[[nn.Module, Any], Any]
"""Loss of a batch: one number with gradients, or None from a training step that skips it."""

_NOTHING = object()


def check_input(model: nn.Module, batches: Iterable[Any]) -> Any:
    """Refuse a model or batches that cannot be calibrated; returns the first batch.

    Raises:
        PruningError: Naming what was found, and the remedy.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not any(True for _ in model.parameters()):
        raise PruningError(f"{type(model).__name__} has no parameters; expected a trained module.")
    if torch.is_inference_mode_enabled():
        raise PruningError(
            "prune() was called under torch.inference_mode, which allows no gradients; expected "
            "ordinary mode. Call it outside of that block."
        )
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.is_inference():
            where = "on the meta device" if tensor.is_meta else "made under torch.inference_mode"
            raise PruningError(
                f"{name!r} is {where}; expected ordinary tensors with values. Build the model "
                "outside of that block and load its weights first."
            )
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise PruningError(
            f"A {type(batches).__name__} was given for the batches; expected a DataLoader or a "
            "list of batches. Put a single batch into a list."
        )
    if isinstance(batches, Iterator):
        raise PruningError(
            f"A {type(batches).__name__} was given for the batches: an iterator (such as a "
            "generator) is used up by the first pass; expected a DataLoader or a list, which can "
            "be read again. Pass list(batches)."
        )
    with fixed_random_state(model):  # a loader draws a seed
        first = next(iter(batches), _NOTHING)
    if first is _NOTHING:
        raise PruningError(
            f"The {type(batches).__name__} gave no batches; expected a few thousand samples. Check "
            "the data set, its filters and drop_last."
        )
    return first


def collect_activations(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    batches: Iterable[Any],
    forward: Forward,
    *,
    positions: int,
    stored_positions: int = 0,
    seed: int = 0,
    halves: bool = False,
) -> CalibrationData:
    """Run a model on batches until every group has its samples.

    Args:
        model: The model; its mode, gradients and random state stay.
        groups: Groups whose consumers' inputs are summed.
        batches: Batches; read once.
        forward: Runs the model on a batch.
        positions: Samples of every group.
        stored_positions: Positions of inputs to store; 0 stores none.
        seed: Seed of the draw of positions.
        halves: Whether every second batch is also summed apart.

    Raises:
        PruningError: If there were too few samples, or values that are not finite.
    """
    recorder = ActivationRecorder(
        model,
        groups,
        positions=positions,
        batches=_length(batches),
        seed=seed,
        calls=stored_positions,
        halves=halves,
    )
    with undisturbed(model), torch.no_grad(), recorder:
        for index, batch in enumerate(batches):
            recorder.start_batch()
            with explaining_failures(model, batch, index):
                run_forward(forward, model, batch)
            if recorder.is_full:
                break
    recorder.check()
    calls = recorder.calls(groups)
    return CalibrationData(
        recorder.moments, half=recorder.half, ranks=[recorder.stored], examples=calls
    )


def collect_gradients(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    batches: Iterable[Any],
    loss: Loss,
    *,
    steps: int,
) -> Mapping[str, GradientSums]:
    """Sum the loss gradients at the outputs of every group's consumers.

    Args:
        model: The model; its mode, gradients and random state stay.
        groups: The groups.
        plan: The plan that the model carries.
        batches: Batches of training steps.
        loss: Loss of a batch.
        steps: Batches to take at most.

    Raises:
        PruningError: If a loss is no number with gradients, or gradients are not finite.
    """
    recorder, without_loss, taken = GradientRecorder(model, groups, steps=steps, plan=plan), 0, 0
    with undisturbed(model), torch.enable_grad(), recorder, _no_gradients_kept(model):
        for index, batch in enumerate(islice(batches, steps)):
            taken += 1
            recorder.begin(index)
            with explaining_failures(model, batch, index), spilling_saved_tensors(model):
                value = _checked(loss(model, _own(batch, model)), skips=loss is training_loss)
            if value is not None and value.isnan():
                without_loss += 1  # a mean over no label at all
            elif value is not None:
                value.backward()  # type: ignore[no-untyped-call]
                recorder.end()
            del value  # with all that its backward pass needed
    if taken and without_loss == taken:
        raise PruningError(
            f"The loss of all {counted(taken, 'batch', 'batches')} is NaN, so nothing shows what "
            "matters for it; expected finite losses. Labels of -100 are ignored: give batches with "
            "others, or look for a diverged model."
        )
    if without_loss:
        warnings.warn(
            f"The loss of {without_loss} of {counted(taken, 'batch', 'batches')} is NaN; they are "
            "left out. Look for batches without labels.",
            PruningWarning,
            stacklevel=2,
        )
    check_gradients(recorder.sums)
    return recorder.sums


@contextmanager
def _no_gradients_kept(model: nn.Module) -> Iterator[None]:
    """A block in which no parameter keeps a gradient: all together are as large as the model."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    mine = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in mine:
        parameter.grad = None
    handles = [p.register_post_accumulate_grad_hook(drop) for p in mine]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def explaining_failures(model: nn.Module, batch: Any, index: int) -> Iterator[None]:
    """Say what is wrong with a batch that a model cannot run on, where that can be seen.

    Args:
        model: The model.
        batch: What it is run on in the block.
        index: Number of the batch, from 0.

    Raises:
        PruningError: In place of the error of the embedding, if whole numbers in the batch are
            larger than every table of the model, or texts are longer than its positions.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        explained = _unusable(model, batch, index, ids=isinstance(error, IndexError))
        if explained is None or isinstance(error, PruningError):
            raise
        raise explained from error


def _unusable(model: nn.Module, batch: Any, index: int, *, ids: bool) -> PruningError | None:
    """What a batch has that no embedding of the model holds; None if it is something else."""
    rows = [part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)]
    whole = [x for x in tensors_in(batch) if x.dtype in (torch.int32, torch.int64) and x.numel()]
    highest, name = max((int(x.max()) for x in whole), default=0), type(model).__name__
    if ids and rows and highest >= max(rows):
        return PruningError(
            f"Batch {index} of the calibration data has ids up to {highest}, but the largest table "
            f"of {name} has {max(rows)} rows; expected ids below that. Use the tokenizer of this "
            "model."
        )
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    longest = max((x.shape[1] for x in whole if x.ndim > 1), default=0)
    if isinstance(most, int) and longest > most:
        return PruningError(
            f"Batch {index} of the calibration data has texts of {longest} positions, but {name} "
            f"has {most}; expected at most that many. Truncate the texts."
        )
    return None


def first_batches(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Some batches; a loader draws its seed when the first one is asked for, not before."""
    yield from islice(batches, count)


def run_forward(forward: Forward, model: nn.Module, batch: Any) -> None:
    """Run a model on a copy of a batch, on the model's device."""
    forward(model, _own(batch, model))


def try_forward(forward: Forward, batch: Any, model: nn.Module) -> None:
    """Run a model once, without a trace."""
    with undisturbed(model), torch.no_grad():
        run_forward(forward, model, batch)


def try_loss(loss: Loss, batch: Any, model: nn.Module) -> None:
    """Compute a loss once, without a trace."""
    with undisturbed(model), torch.enable_grad(), spilling_saved_tensors(model):
        _checked(loss(model, _own(batch, model)), skips=loss is training_loss)


def training_loss(module: nn.Module, batch: Any) -> Any:
    """The loss of a LightningModule's ``training_step``."""
    step: Any = module.training_step
    result = call_step(step, batch)
    return result.get("loss") if isinstance(result, Mapping) else result


def _own(batch: Any, model: nn.Module) -> Any:
    """A batch on the model's device; steps may take entries out of it."""
    return move_tensors(batch, next(model.parameters()).device)


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _checked(value: Any, *, skips: bool) -> Tensor | None:
    """A loss that gradients can be taken of; None for a training step that skips its batch.

    Raises:
        PruningError: If it is something else.
    """
    if value is None and skips:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a {type(value).__name__}" if value is not None else "None"
        if isinstance(value, Tensor):
            what = f"a tensor of shape {tuple(value.shape)}"
            what += "" if value.requires_grad else " without gradients"
        raise PruningError(
            f"The loss is {what}; expected one number that gradients can be taken of. Give "
            "loss(model, batch), with labels in the batches if the model makes its own loss."
        )
    return value
