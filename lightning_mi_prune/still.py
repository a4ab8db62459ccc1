"""HOLD     a module as it is while something runs it: modes, gradients, metrics, random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["still"]


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients and metrics of its own, nothing logged; all is put back."""
    modes = {part: part.training for part in module.modules()}
    gradients = {p: p.grad for p in module.parameters()}
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    states = [_state_of(metric) for metric in metrics]
    own = dict(module.__dict__)
    quiet = [name for name in ("log", "log_dict") if hasattr(module, name)]
    module.eval()
    module.__dict__.update(dict.fromkeys(quiet, _ignore))  # there is no loop to log to
    try:
        with torch.random.fork_rng(devices=[]):  # data loaders draw a seed
            yield
    finally:
        for name in quiet:
            module.__dict__.pop(name)
            module.__dict__ |= {name: own[name]} if name in own else {}
        for part, mode in modes.items():
            part.training = mode
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for metric, state in zip(metrics, states, strict=True):
            vars(metric).update(state)


def _state_of(metric: Metric) -> dict[str, Any]:
    """Everything an update of a metric changes, in place too."""
    states = {
        name: value.clone() if isinstance(value, Tensor) else list(value)
        for name, value in metric.metric_state.items()
    }
    return states | {name: getattr(metric, name) for name in ("_update_count", "_computed")}


def _ignore(*_: object, **__: object) -> None:
    """Stands in for ``self.log``."""
