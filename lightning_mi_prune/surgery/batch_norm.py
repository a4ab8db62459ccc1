"""Running statistics of BatchNorm, estimated again after a cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_mi_prune.core.errors import PruningWarning
from lightning_mi_prune.core.progress import progress_step
from lightning_mi_prune.core.running import undisturbed

__all__ = [
    "has_running_statistics",
    "reestimate_batch_norm",
]

Statistics = dict[_BatchNorm, dict[str, Tensor]]
_SINGLE_ROW_ERROR = "more than 1 value per channel"  # of torch, for a batch of one row


def has_running_statistics(model: nn.Module) -> bool:
    """Whether a model has BatchNorm layers with running statistics."""
    return bool(_layers(model))


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]
) -> None:
    """Estimate the running mean and variance of every BatchNorm layer again.

    A cut changes the inputs of the layers above it, so statistics from before it no longer fit.
    The new ones are means over the batches (as with ``momentum=None``). All other modules run in
    evaluation mode. Nothing else changes, not even gradients, metrics or the random state.

    Args:
        model: The model after the cut; changed in place.
        batches: Batches to estimate on; those of a single row are left out.
        forward: Runs the model on a batch, ``forward(model, batch)``.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1))
        >>> batches = [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])]
        >>> reestimate_batch_norm(net, batches, lambda net, x: net(x))
        >>> net[0].running_mean, net[0].momentum, net[0].training
        (tensor([3.]), 0.1, True)
    """
    layers = _layers(model)
    if not layers:
        return
    momenta = {layer: layer.momentum for layer in layers}
    before = _statistics(layers)
    with progress_step("batch norm", "batch") as progress, undisturbed(model), torch.no_grad():
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a cumulative average
                layer.train()
            for batch in batches:
                _run_batch(model, batch, forward, layers)
                progress.advance()
        except BaseException:
            _put_back(before)
            raise
        finally:
            for layer in layers:
                layer.momentum = momenta[layer]
        ran = [layer for layer in layers if layer.num_batches_tracked]
        _put_back({layer: values for layer, values in before.items() if layer not in ran})
    if not ran:
        warnings.warn(
            f"The BatchNorm statistics of this {type(model).__name__} stay as they were before the "
            "cut: none of the batches had two or more rows. Give larger batches.",
            PruningWarning,
            stacklevel=2,
        )


def _run_batch(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any],
    layers: list[_BatchNorm],
) -> None:
    """Run one batch; the statistics skip a batch of a single row, which has no variance."""
    before = _statistics(layers)
    try:
        forward(model, batch)
    except ValueError as error:
        if _SINGLE_ROW_ERROR not in str(error):
            raise
        _put_back(before)


def _statistics(layers: list[_BatchNorm]) -> Statistics:
    return {layer: {n: t.clone() for n, t in layer.named_buffers()} for layer in layers}


def _put_back(statistics: Statistics) -> None:
    for layer, values in statistics.items():
        for name, value in values.items():
            layer.get_buffer(name).copy_(value)


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [
        part
        for part in model.modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]
