"""Multiply-accumulates of a model, counted while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from lightning_mi_prune.allocation.costs import MacCosts
from lightning_mi_prune.allocation.mac_counter import MacCounter, counting
from lightning_mi_prune.calibration.calls import RecordedCall, in_weight_precision
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.graph.groups import DependencyGroup

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
    with counting(network) as counter:
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
        >>> from lightning_mi_prune.discovery.families.describe import linear_group
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> costs = measure_macs(net, [group], {"": RecordedCall((torch.zeros(1, 5, 3),), {})})
        >>> costs.total({"hidden": 4}), costs.savings("hidden", {"hidden": 4}, [3])
        (100.0, [25.0])
    """
    now = {group.name: group.size for group in groups} | dict(widths or {})
    meter = _Meter(root, groups)
    try:
        for path, example in calls.items():
            meter.run(root.get_submodule(path), example)
    finally:
        meter.close()
    positions, products = {}, {}
    for group in groups:
        passed = []
        for s in group.tensors:
            owner, _, kind = s.tensor.rpartition(".")
            key = _key(root.get_submodule(owner)) if kind == "weight" else 0
            rows, pairs = meter.passed.get(key, (0, 0))
            if rows:
                positions[s.tensor] = rows
                passed.append(pairs)
        if group.kind != "heads" or not passed:
            continue
        units, work = now[group.name], meter.inside[group.name]
        # Where no head is left nothing can be counted: assume plain attention.
        products[group.name] = (
            work / units if units and work else 2 * max(passed) * group.entries_at(now)
        )
    products = {n: int(p) if float(p).is_integer() else p for n, p in products.items()}
    draft = MacCosts(groups, 0, positions, products, current=now)
    return MacCosts(groups, meter.total - draft.total(now), positions, products, current=now)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Meter:
    """Hooks that separate the work of weights from all other work."""

    def __init__(self, root: nn.Module, groups: Sequence[DependencyGroup]) -> None:
        self.total = 0
        self.passed: dict[int, tuple[int, int]] = {}
        self.inside: dict[str, int] = dict.fromkeys((group.name for group in groups), 0)
        self._counter, self._linear = MacCounter(), 0
        self._handles = []
        for module in _weighted(root, groups):
            self._handles.append(module.register_forward_hook(self._on_weight(module)))
        for group in groups:
            if group.kind == "heads":
                module = root.get_submodule(_common(group))
                before, after = self._around(group.name)
                self._handles.append(module.register_forward_pre_hook(before))
                self._handles.append(module.register_forward_hook(after))

    def run(self, network: nn.Module, example: RecordedCall) -> None:
        """Run one call and add up its work."""
        call, self._linear = in_weight_precision(example, network), 0
        with counting(network) as self._counter:
            network(*call.args, **call.kwargs)
        self.total += self._counter.macs

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _on_weight(self, module: nn.Module) -> Callable[..., None]:
        """A hook that counts positions through the weight of a module, and pairs of positions."""
        key, weight = _key(module), cast(Tensor, module.weight)
        size, dims, maps = weight.numel(), weight.ndim, isinstance(module, _CONVOLUTIONS)

        def hook(module: Any, args: Any, output: Any) -> None:
            if output.is_nested:
                rows, pairs = sum(math.prod(part.shape[:-1]) for part in output.unbind()), 1
            elif maps:  # (examples, channels, ...), or one example without its dimension
                shape = output.shape if output.ndim == dims else (1, *output.shape)
                rows, pairs = shape[0] * math.prod(shape[2:]), 1
            else:
                shape = output.shape
                rows, pairs = math.prod(shape[:-1]), shape[-2] if len(shape) > 1 else 1
            before = self.passed.get(key, (0, 0))
            self.passed[key] = (before[0] + rows, before[1] + rows * pairs)
            self._linear += rows * size

        return hook

    def _around(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks that add up the work of a module that is not of weights."""

        def before(*_: object) -> None:
            self.inside[name] -= self._counter.macs - self._linear

        def after(*_: object) -> None:
            self.inside[name] += self._counter.macs - self._linear

        return before, after


def _key(module: nn.Module) -> int:
    """Identity of a weight; of the module where each access computes the weight anew."""
    weight = module.weight
    return id(weight) if weight is module.weight else id(module)


def _weighted(root: nn.Module, groups: Sequence[DependencyGroup]) -> list[nn.Module]:
    """Modules that multiply with a weight: linear layers, convolutions, and what replaced them.

    A layer without rows or columns may be of any class; a group cuts its weight. Embeddings and
    normalisations multiply with no matrix.
    """
    plain = (m for m in root.modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS)))
    found: dict[int, nn.Module] = {id(module): module for module in plain}
    for path in {s.tensor.removesuffix(".weight") for a in groups for s in a.tensors}:
        try:
            module = root.get_submodule(path)
        except AttributeError:  # a parameter of another name, such as a bias
            continue
        weight = getattr(module, "weight", None)
        looked_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if isinstance(weight, Tensor) and weight.ndim > 1 and not looked_up:
            found[id(module)] = module
    return list(found.values())


def _common(group: DependencyGroup) -> str:
    """The module that holds all tensors of a group."""
    paths = [s.tensor.split(".")[:-1] for s in group.tensors]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
