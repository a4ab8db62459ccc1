"""Running statistics of BatchNorm, estimated again where the inputs of its layers have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_mi_prune.still import still

__all__ = ["has_running_statistics", "reestimate_batch_norm"]


def has_running_statistics(model: nn.Module) -> bool:
    """Whether a model normalises by statistics that it gathered in training."""
    return bool(_layers(model))


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]
) -> None:
    """Estimate the running mean and variance of every BatchNorm layer anew, on some batches.

    A cut changes what the layers above it get; statistics gathered before it are stale until the
    model trains again. The new ones are the means over the batches (cumulative average, as with
    ``momentum=None``). Everything else runs in evaluation mode, and stays as it was: parameters,
    modes, momenta, gradients, metrics, the random state.

    Args:
        model: The model, cut; changed in place.
        batches: Batches to estimate on.
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
    before = {layer: {n: t.clone() for n, t in layer.named_buffers()} for layer in layers}

    def put_back(layer: _BatchNorm) -> None:
        for name, value in before[layer].items():
            layer.get_buffer(name).copy_(value)

    with still(model), torch.no_grad():
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # a cumulative average
                layer.train()
            for batch in batches:
                forward(model, batch)
        except BaseException:
            for layer in layers:
                put_back(layer)
            raise
        finally:
            for layer in layers:
                layer.momentum = momenta[layer]
        for layer in layers:
            if not layer.num_batches_tracked:  # it never ran
                put_back(layer)


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [
        part
        for part in model.modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
    ]
