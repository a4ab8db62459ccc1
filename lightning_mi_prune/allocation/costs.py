"""What widths cost: parameters of the module, or multiply-accumulates of an example."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

from torch import Tensor, nn

from lightning_mi_prune.allocation.mac_counter import MacCounter, counting
from lightning_mi_prune.calibration.calls import RecordedCall, in_weight_precision
from lightning_mi_prune.discovery.groups import DependencyGroup

__all__ = [
    "Costs",
    "MacCosts",
    "ParameterCosts",
    "measure_macs",
]


class Costs(Protocol):
    """What a model of given widths costs, and how that changes along one group."""

    @property
    def measure(self) -> str:
        """What is counted: ``"parameters"``, ``"MACs"`` or ``"ms"``."""

    def total(self, widths: Mapping[str, float]) -> float:
        """Cost of everything that is counted; groups that are not named stay as they are."""

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        """What goes when one group shrinks from its place in ``widths`` to each of ``options``."""

    def neighbours(self, name: str) -> frozenset[str]:
        """Other groups whose units get cheaper when this one shrinks: they share tensors."""


@dataclass(frozen=True)
class _TensorCosts:
    """A sum over tensors; subclasses say what one entry of each costs."""

    groups: Sequence[DependencyGroup]
    fixed: float = 0
    held: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    def _weigh(self, tensor: str) -> float:
        return 1

    @cached_property
    def _terms(self) -> dict[tuple[str, ...], float]:
        """Coefficient of each product of widths, by the groups that it is a product of."""
        shapes: dict[str, list[int]] = {}
        cut_by: dict[str, list[str]] = defaultdict(list)
        names = {group.name for group in self.groups}
        for group in self.groups:
            for s in group.tensors:
                # What two groups cut together has an entry for each pair of their units.
                each = 1 if group.product_with in names else group.entries
                shapes.setdefault(s.tensor, list(s.shape))[s.dim] = each
                cut_by[s.tensor].append(group.name)
        terms: dict[tuple[str, ...], float] = defaultdict(float)
        for tensor, shape in shapes.items():
            if weight := self._weigh(tensor):
                terms[tuple(sorted(cut_by[tensor]))] += math.prod(shape) * weight
        return terms

    @cached_property
    def _along(self) -> dict[str, list[tuple[float, int, list[str]]]]:
        """By group, its products: coefficient, power of its own width, the other groups."""
        found: dict[str, list[tuple[float, int, list[str]]]] = defaultdict(list)
        for names, coefficient in self._terms.items():
            for name in set(names):
                others = [other for other in names if other != name]
                found[name].append((coefficient, names.count(name), others))
        return dict(found)

    def _filled(self, widths: Mapping[str, float]) -> dict[str, float]:
        return {**{a.name: self.held.get(a.name, a.size) for a in self.groups}, **widths}

    def total(self, widths: Mapping[str, float]) -> float:
        """Cost of everything that is counted, the fixed part included."""
        at = self._filled(widths)
        return self.fixed + sum(c * math.prod(at[n] for n in ns) for ns, c in self._terms.items())

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        """What goes when one group shrinks to each of ``options``."""
        at, powers = self._filled(widths), defaultdict[int, float](float)
        for coefficient, power, others in self._along.get(name, ()):
            powers[power] += coefficient * math.prod(at[other] for other in others)
        now = sum(c * at[name] ** p for p, c in powers.items())
        return [now - sum(c * width**p for p, c in powers.items()) for width in options]

    def neighbours(self, name: str) -> frozenset[str]:
        """Other groups that cut the same tensors."""
        return frozenset(n for _, _, others in self._along.get(name, ()) for n in others)


@dataclass(frozen=True)
class ParameterCosts(_TensorCosts):
    """Parameters of the whole module.

    Args:
        groups: Groups that may shrink, and any other that cuts the same tensors.
        fixed: Parameters of the tensors that no group cuts.
        held: Present widths of groups that a caller does not name (default: as built).

    Example:
        >>> from lightning_mi_prune.discovery.groups import PrunableDim
        >>> rows = DependencyGroup("rows", "ffn", 6, 1, (PrunableDim("w", 0, (6, 4)),), ("down",))
        >>> columns = DependencyGroup("columns", "ffn", 4, 1, (PrunableDim("w", 1, (6, 4)),), ("down",))
        >>> costs = ParameterCosts([rows, columns], fixed=10)
        >>> costs.total({"rows": 6, "columns": 4})
        34.0
        >>> costs.savings("rows", {"rows": 6, "columns": 2}, [5, 3])
        [2.0, 6.0]
    """

    @property
    def measure(self) -> str:
        """Parameters."""
        return "parameters"


@dataclass(frozen=True)
class MacCosts(_TensorCosts):
    """Multiply-accumulates of one example; :func:`measure_macs` fills it from a call.

    Args:
        groups: Groups that may shrink, and any other that cuts the same tensors.
        fixed: Multiply-accumulates that no group changes.
        positions: Rows that pass through each weight in one example, over all calls of its
            layer, by tensor name. Tensors without an entry (biases, norms, embeddings) are free.
        products: Multiply-accumulates of each head beside its weights (scores, mixture), by group,
            at the size that heads have where ``held`` says so.
        held: Present widths of groups that a caller does not name (default: as built).
    """

    positions: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[str, float] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        """Multiply-accumulates."""
        return "MACs"

    def _weigh(self, tensor: str) -> float:
        return self.positions.get(tensor, 0)

    @cached_property
    def _terms(self) -> dict[tuple[str, ...], float]:
        terms = super()._terms
        groups = {group.name: group for group in self.groups}
        for name, product in self.products.items():
            crossed = groups[name].product_with if name in groups else ""
            if crossed in groups:  # scores and mixture grow with the size of a head
                size = self.held.get(crossed, groups[crossed].size)
                pair = tuple(sorted((name, crossed)))
                terms[pair] = terms.get(pair, 0) + product / size
            else:
                terms[name,] = terms.get((name,), 0) + product
        return terms


def measure_macs(
    root: nn.Module,
    groups: Sequence[DependencyGroup],
    calls: Mapping[str, RecordedCall],
    widths: Mapping[str, int] | None = None,
) -> MacCosts:
    """Run each network once on an example and learn what its multiply-accumulates depend on.

    The sum at the present widths is what :func:`measuring.count_macs` counts for these calls. The
    networks stay as they are: modes, buffers and the random state are put back.

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
        # Where no head is left there is nothing to see: scores and mixture of plain attention.
        products[group.name] = (
            work / units if units and work else 2 * max(passed) * group.entries_at(now)
        )
    products = {n: int(p) if float(p).is_integer() else p for n, p in products.items()}
    draft = MacCosts(groups, 0, positions, products, held=now)
    return MacCosts(groups, meter.total - draft.total(now), positions, products, held=now)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Meter:
    """Hooks that tell the work of weights from the work beside them."""

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
                module, (before, after) = (
                    root.get_submodule(_common(group)),
                    self._around(group.name),
                )
                self._handles.append(module.register_forward_pre_hook(before))
                self._handles.append(module.register_forward_hook(after))

    def run(self, network: nn.Module, example: RecordedCall) -> None:
        """Run one call and add up its work."""
        call, self._linear = in_weight_precision(example, network), 0
        with counting(network) as self._counter:
            network(*call.args, **call.kwargs)
        self.total += self._counter.macs

    def close(self) -> None:
        """Take the hooks down."""
        for handle in self._handles:
            handle.remove()

    def _on_weight(self, module: nn.Module) -> Callable[..., None]:
        """A hook that adds up what passes through the weight of a module: rows, and their pairs."""
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
        def beside() -> int:
            return self._counter.macs - self._linear

        def before(*_: object) -> None:
            self.inside[name] -= beside()

        def after(*_: object) -> None:
            self.inside[name] += beside()

        return before, after


def _key(module: nn.Module) -> int:
    """What tells weights apart: shared ones are one; what stands in may make its own each time."""
    weight = module.weight
    return id(weight) if weight is module.weight else id(module)


def _weighted(root: nn.Module, groups: Sequence[DependencyGroup]) -> list[nn.Module]:
    """Modules that multiply with a weight: linear layers, convolutions, and their stand-ins.

    A layer that has lost all its rows or columns may be of any class by then; it is known by its
    weight, which a group cuts. Embeddings and normalisations multiply with no matrix.
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
