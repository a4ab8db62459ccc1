"""GAUGE    multiply-accumulates and milliseconds of a network as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.benchmark import Timer

from lightning_mi_prune.counting import counting
from lightning_mi_prune.sample import Example, full, placed

__all__ = ["count_macs", "macs_of_calls", "measure_latency"]


def count_macs(network: nn.Module, example: Example) -> int:
    """Multiply-accumulates of one forward pass, counted operator by operator while it runs.

    What counts is said at :class:`counting.MacCounter`. The network stays as it is: modes, buffers
    and the random state are put back.

    Args:
        network: Module to run, in evaluation mode.
        example: Its inputs (:attr:`Listener.examples`).

    Example:
        >>> count_macs(nn.Linear(4, 3), Example((torch.zeros(5, 4),), {}))
        60
    """
    call = full(example, network)
    with counting(network) as counter:
        network(*call.args, **call.kwargs)
    return counter.macs


def macs_of_calls(model: nn.Module, calls: Mapping[str, Example]) -> int:
    """Multiply-accumulates of one call of each network of a model.

    Args:
        model: Module from which the networks are named.
        calls: Their calls, by path (:meth:`Listener.calls`), on any device.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> macs_of_calls(net, {"0": Example((torch.zeros(5, 4),), {})})
        60
    """
    total = 0
    for path, call in calls.items():
        network = model.get_submodule(path)
        place = next((p.device for p in network.parameters()), None)
        moved = call if place is None else replace(call, **placed(vars(call), place))
        total += count_macs(network, moved)
    return total


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
