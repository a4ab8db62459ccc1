"""Multiply-accumulates of a model, counted while it runs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_mi_prune.allocation.costs import MacCosts
from lightning_mi_prune.allocation.mac_counter import MacCounter, counting
from lightning_mi_prune.allocation.mac_meter import Product, WeightMeter
from lightning_mi_prune.calibration.calls import RecordedCall, in_weight_precision
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.inputs import weight_name
from lightning_mi_prune.graph.layouts import Layout, layout_size
from lightning_mi_prune.surgery.tensors import tensors_of

__all__ = [
    "count_macs",
    "macs_of_calls",
    "measure_macs",
]


def count_macs(network: nn.Module, example: RecordedCall) -> int:
    """Multiply-accumulates of one forward pass, counted operator by operator while it runs.

    :class:`mac_counter.MacCounter` lists what counts. The network stays as it is, with its modes
    and buffers; so does the random state.

    Args:
        network: Module to run, in evaluation mode.
        example: Its inputs (:attr:`ActivationRecorder.examples`).

    Example:
        >>> import torch
        >>> count_macs(nn.Linear(4, 3), RecordedCall((torch.zeros(5, 4),), {}))
        60
    """
    call = in_weight_precision(example, network)
    with counting(network, MacCounter) as counter:
        network(*call.args, **call.kwargs)
    return counter.macs


def macs_of_calls(model: nn.Module, calls: Mapping[str, RecordedCall]) -> int:
    """Multiply-accumulates of one call of each network of a model.

    Args:
        model: Module from which the networks are named.
        calls: Their calls, by path (:meth:`ActivationRecorder.calls`), on any device.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        >>> macs_of_calls(net, {"0": RecordedCall((torch.zeros(5, 4),), {})})
        60
    """
    total = 0
    for path, call in calls.items():
        network = model.get_submodule(path)
        device = next((p.device for p in network.parameters()), None)
        moved = call if device is None else replace(call, **move_tensors(vars(call), device))
        total += count_macs(network, moved)
    return total


def measure_macs(
    root: nn.Module,
    groups: Sequence[DependencyGroup],
    calls: Mapping[str, RecordedCall],
    widths: Mapping[str, int] | None = None,
) -> MacCosts:
    """Run each network once on an example to find what its multiply-accumulates depend on.

    The total at the present widths is what :func:`count_macs` counts for these calls. The networks
    and the random state stay as they are.

    Args:
        root: Module from which the groups are named.
        groups: All groups of its networks.
        calls: One example call by module path (:meth:`ActivationRecorder.calls`).
        widths: Present widths (default: as built).

    Example:
        >>> import torch
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> costs = measure_macs(net, [group], {"": RecordedCall((torch.zeros(1, 5, 3),), {})})
        >>> costs.total({"hidden": 4}), costs.savings("hidden", {"hidden": 4}, [3])
        (100.0, [25.0])
    """
    now = {group.name: group.size for group in groups} | dict(widths or {})
    weights = {name: t for name, t in tensors_of(root).items() if t.ndim > 1}
    named = {id(t): name for name, t in reversed(weights.items())}  # a tied one by its first name
    matrices = [t for t in weights.values() if isinstance(t, nn.Parameter)]
    constants = [t for t in tensors_of(root).values() if id(t) not in set(map(id, matrices))]
    with _EmptyLayers(root, groups) as empty:
        total, work, products = 0, Counter[int](), list[Product]()
        for path, example in calls.items():
            network = root.get_submodule(path)
            call = in_weight_precision(example, network)
            with counting(network, partial(WeightMeter, matrices, constants)) as meter:
                network(*call.args, **call.kwargs)
            total += meter.macs
            work.update(meter.by_weight)
            products += meter.products
    positions: dict[str, float] = dict(empty.rows)
    layouts: dict[tuple[int, int], tuple[Layout, int]] = {}
    for group in groups:
        at = group.all_widths(now)
        for s in group.tensors:
            weight = weights.get(s.tensor)
            if weight is None:
                continue
            layouts[id(weight), s.dim] = s.layout, layout_size(s.layout, at)
            if weight.numel() and id(weight) in work:
                positions[named[id(weight)]] = work[id(weight)] / weight.numel()
    shares = [
        (layout, product.macs / size)
        for product in products
        for layout, size in [layouts.get((product.weight, product.dim), ((), 0))]
        if size
    ]
    for group in groups:
        if group.empty_forward and not now[group.name]:
            shares += _unseen_attention(group, empty)
    positions = {name: _plain(value) for name, value in positions.items()}
    merged: dict[Layout, float] = defaultdict(float)
    for layout, share in shares:
        merged[layout] += share
    each = tuple((layout, _plain(share)) for layout, share in merged.items())
    draft = MacCosts(groups, 0, positions, each, current=now)
    return MacCosts(groups, total - draft.total(now), positions, each, current=now)


def _plain(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def _unseen_attention(
    group: DependencyGroup, empty: _EmptyLayers
) -> Iterator[tuple[Layout, float]]:
    """The products of heads that are all gone, of which nothing can be counted: plain attention."""
    pairs = max((empty.pairs.get(s.tensor, 0) for s in group.tensors), default=0)
    names = {s.tensor for s in group.tensors}
    consumers = {weight_name(consumer, names) for consumer in group.consumers}
    layout = next((s.layout for s in group.tensors if s.tensor in consumers), None)
    if layout is not None and pairs:
        yield layout, 2 * pairs


class _EmptyLayers:
    """Hooks on layers without inputs or outputs, of any class: they multiply with nothing.

    Args:
        root: Module from which the groups are named.
        groups: The groups; only layers whose weight they cut are of interest.
    """

    def __init__(self, root: nn.Module, groups: Sequence[DependencyGroup]) -> None:
        self.rows: dict[str, int] = Counter()
        self.pairs: dict[str, int] = Counter()
        self._handles = []
        done: set[int] = set()
        for name in dict.fromkeys(s.tensor for group in groups for s in group.tensors):
            path, _, kind = name.rpartition(".")
            try:
                module = root.get_submodule(path)
            except AttributeError:  # a parameter in a container of parameters
                continue
            weight = getattr(module, kind, None)
            empty = isinstance(weight, Tensor) and weight.ndim > 1 and not weight.numel()
            if kind == "weight" and empty and id(module) not in done:
                done.add(id(module))
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def __enter__(self) -> _EmptyLayers:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if output.is_nested:
                rows, length = sum(math.prod(part.shape[:-1]) for part in output.unbind()), 1
            else:
                shape = output.shape
                rows, length = math.prod(shape[:-1]), shape[-2] if len(shape) > 1 else 1
            self.rows[name] += rows
            self.pairs[name] += rows * length

        return hook
