"""HOLD     a module as it is while something runs it: modes, gradients, metrics, random state."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ["random_state", "still"]


@contextmanager
def random_state(module: nn.Module) -> Iterator[None]:
    """Put the random states of Python, numpy and torch back, on the devices of a module too."""
    numpy = sys.modules.get("numpy")  # a state that nobody can have used needs no care
    devices = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
    python, array = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array)


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
        with random_state(module):  # data loaders draw a seed
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
