"""GAUGE    multiply-accumulates and milliseconds of a network as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from lightning_mi_prune.sample import Example

__all__ = ["count_macs", "measure_latency"]


def count_macs(network: nn.Module, example: Example) -> int:
    """Multiply-accumulates of one forward pass, counted by torch while it runs.

    Linear maps, convolutions and the two products of attention count; element-wise work does not.

    Args:
        network: Module to run, in evaluation mode; every mode flag is put back.
        example: Its inputs (:attr:`Listener.examples`).

    Example:
        >>> count_macs(nn.Linear(4, 3), Example((torch.zeros(5, 4),), {}))
        60
    """
    modes = {module: module.training for module in network.modules()}
    counter = FlopCounterMode(display=False)
    network.eval()
    try:
        # The fused CPU kernel is opaque to the counter; the plain one shows its two products.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            network(*example.args, **example.kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    return int(counter.get_total_flops()) // 2


def measure_latency(
    calls: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, rounds: int = 5
) -> dict[str, float]:
    """Median latency of several calls in ms, measured in turn so that a drifting machine is fair.

    Args:
        calls: What to time, by name.
        seconds: Time for each call in all.
        rounds: How often the calls take turns.

    Example:
        >>> sorted(measure_latency({"a": lambda: None, "b": lambda: None}, seconds=0.01))
        ['a', 'b']
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    threads = torch.get_num_threads()
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            timer = Timer("call()", globals={"call": call}, num_threads=threads)
            measured = timer.blocked_autorange(min_run_time=seconds / rounds)
            times[name] += [t * 1e3 for t in measured.times]
    return {name: float(torch.tensor(values).median()) for name, values in times.items()}
