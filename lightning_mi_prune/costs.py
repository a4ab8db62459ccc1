"""PRICE    what widths cost: parameters of the module, multiply-accumulates of an example."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, cast

from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.counting import MacCounter, counting
from lightning_mi_prune.sample import Example, full

__all__ = ["Costs", "MacCosts", "ParameterCosts", "measure_macs"]


class Costs(Protocol):
    """What a model of given widths costs, and how that changes along one axis."""

    @property
    def measure(self) -> str:
        """What is counted: ``"parameters"``, ``"MACs"`` or ``"ms"``."""

    def total(self, widths: Mapping[str, float]) -> float:
        """Cost of everything that is counted; axes that are not named stay as they are."""

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        """What goes when one axis shrinks from its place in ``widths`` to each of ``options``."""

    def neighbours(self, name: str) -> frozenset[str]:
        """Other axes whose units get cheaper when this one shrinks: they share tensors."""


@dataclass(frozen=True)
class _TensorCosts:
    """A sum over tensors; subclasses say what one entry of each costs."""

    axes: Sequence[WidthAxis]
    fixed: float = 0
    held: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    def _weigh(self, tensor: str) -> float:
        return 1

    @cached_property
    def _terms(self) -> dict[tuple[str, ...], float]:
        """Coefficient of each product of widths, by the axes that it is a product of."""
        shapes: dict[str, list[int]] = {}
        cut_by: dict[str, list[str]] = defaultdict(list)
        names = {axis.name for axis in self.axes}
        for axis in self.axes:
            for s in axis.slices:
                # What two axes cut together has an entry for each pair of their units.
                each = 1 if axis.crossed in names else axis.entries
                shapes.setdefault(s.tensor, list(s.shape))[s.dim] = each
                cut_by[s.tensor].append(axis.name)
        terms: dict[tuple[str, ...], float] = defaultdict(float)
        for tensor, shape in shapes.items():
            if weight := self._weigh(tensor):
                terms[tuple(sorted(cut_by[tensor]))] += math.prod(shape) * weight
        return terms

    @cached_property
    def _along(self) -> dict[str, list[tuple[float, int, list[str]]]]:
        """By axis, its products: coefficient, power of its own width, the other axes."""
        found: dict[str, list[tuple[float, int, list[str]]]] = defaultdict(list)
        for names, coefficient in self._terms.items():
            for name in set(names):
                others = [other for other in names if other != name]
                found[name].append((coefficient, names.count(name), others))
        return dict(found)

    def _filled(self, widths: Mapping[str, float]) -> dict[str, float]:
        return {**{a.name: self.held.get(a.name, a.size) for a in self.axes}, **widths}

    def total(self, widths: Mapping[str, float]) -> float:
        """Cost of everything that is counted, the fixed part included."""
        at = self._filled(widths)
        return self.fixed + sum(c * math.prod(at[n] for n in ns) for ns, c in self._terms.items())

    def savings(
        self, name: str, widths: Mapping[str, float], options: Sequence[float]
    ) -> list[float]:
        """What goes when one axis shrinks to each of ``options``."""
        at, powers = self._filled(widths), defaultdict[int, float](float)
        for coefficient, power, others in self._along.get(name, ()):
            powers[power] += coefficient * math.prod(at[other] for other in others)
        now = sum(c * at[name] ** p for p, c in powers.items())
        return [now - sum(c * width**p for p, c in powers.items()) for width in options]

    def neighbours(self, name: str) -> frozenset[str]:
        """Other axes that cut the same tensors."""
        return frozenset(n for _, _, others in self._along.get(name, ()) for n in others)


@dataclass(frozen=True)
class ParameterCosts(_TensorCosts):
    """Parameters of the whole module.

    Args:
        axes: Axes that may shrink, and any other that cuts the same tensors.
        fixed: Parameters of the tensors that no axis cuts.
        held: Present widths of axes that a caller does not name (default: as built).

    Example:
        >>> from lightning_mi_prune.axes import Slice
        >>> rows = WidthAxis("rows", "ffn", 6, 1, (Slice("w", 0, (6, 4)),), ("down",))
        >>> columns = WidthAxis("columns", "ffn", 4, 1, (Slice("w", 1, (6, 4)),), ("down",))
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
        axes: Axes that may shrink, and any other that cuts the same tensors.
        fixed: Multiply-accumulates that no axis changes.
        positions: Rows that pass through each weight in one example, over all calls of its
            layer, by tensor name. Tensors without an entry (biases, norms, embeddings) are free.
        products: Multiply-accumulates of each head beside its weights (scores, mixture), by axis,
            at the size that heads have where ``held`` says so.
        held: Present widths of axes that a caller does not name (default: as built).
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
        axes = {axis.name: axis for axis in self.axes}
        for name, product in self.products.items():
            crossed = axes[name].crossed if name in axes else ""
            if crossed in axes:  # scores and mixture grow with the size of a head
                size = self.held.get(crossed, axes[crossed].size)
                pair = tuple(sorted((name, crossed)))
                terms[pair] = terms.get(pair, 0) + product / size
            else:
                terms[name,] = terms.get((name,), 0) + product
        return terms


def measure_macs(
    root: nn.Module,
    axes: Sequence[WidthAxis],
    calls: Mapping[str, Example],
    widths: Mapping[str, int] | None = None,
) -> MacCosts:
    """Run each network once on an example and learn what its multiply-accumulates depend on.

    The sum at the present widths is what :func:`measure.count_macs` counts for these calls. The
    networks stay as they are: modes, buffers and the random state are put back.

    Args:
        root: Module from which the axes are named.
        axes: All axes of its networks.
        calls: One example call by module path (:meth:`Listener.calls`).
        widths: Present widths (default: as built).

    Example:
        >>> import torch
        >>> from lightning_mi_prune.families import linear_axis
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> axis = linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])
        >>> costs = measure_macs(net, [axis], {"": Example((torch.zeros(1, 5, 3),), {})})
        >>> costs.total({"hidden": 4}), costs.savings("hidden", {"hidden": 4}, [3])
        (100.0, [25.0])
    """
    now = {axis.name: axis.size for axis in axes} | dict(widths or {})
    meter = _Meter(root, axes)
    try:
        for path, example in calls.items():
            meter.run(root.get_submodule(path), example)
    finally:
        meter.close()
    positions, products = {}, {}
    for axis in axes:
        passed = []
        for s in axis.slices:
            owner, _, kind = s.tensor.rpartition(".")
            key = _key(root.get_submodule(owner)) if kind == "weight" else 0
            rows, pairs = meter.passed.get(key, (0, 0))
            if rows:
                positions[s.tensor] = rows
                passed.append(pairs)
        if axis.kind != "heads" or not passed:
            continue
        units, work = now[axis.name], meter.inside[axis.name]
        # Where no head is left there is nothing to see: scores and mixture of plain attention.
        products[axis.name] = (
            work / units if units and work else 2 * max(passed) * axis.entries_at(now)
        )
    products = {n: int(p) if float(p).is_integer() else p for n, p in products.items()}
    draft = MacCosts(axes, 0, positions, products, held=now)
    return MacCosts(axes, meter.total - draft.total(now), positions, products, held=now)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Meter:
    """Hooks that tell the work of weights from the work beside them."""

    def __init__(self, root: nn.Module, axes: Sequence[WidthAxis]) -> None:
        self.total = 0
        self.passed: dict[int, tuple[int, int]] = {}
        self.inside: dict[str, int] = dict.fromkeys((axis.name for axis in axes), 0)
        self._counter, self._linear = MacCounter(), 0
        self._handles = []
        for module in _weighted(root, axes):
            self._handles.append(module.register_forward_hook(self._on_weight(module)))
        for axis in axes:
            if axis.kind == "heads":
                module, (before, after) = root.get_submodule(_common(axis)), self._around(axis.name)
                self._handles.append(module.register_forward_pre_hook(before))
                self._handles.append(module.register_forward_hook(after))

    def run(self, network: nn.Module, example: Example) -> None:
        """Run one call and add up its work."""
        call, self._linear = full(example, network), 0
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


def _weighted(root: nn.Module, axes: Sequence[WidthAxis]) -> list[nn.Module]:
    """Modules that multiply with a weight: linear layers, convolutions, and their stand-ins.

    A layer that has lost all its rows or columns may be of any class by then; it is known by its
    weight, which an axis cuts. Embeddings and normalisations multiply with no matrix.
    """
    plain = (m for m in root.modules() if isinstance(m, (nn.Linear, *_CONVOLUTIONS)))
    found: dict[int, nn.Module] = {id(module): module for module in plain}
    for path in {s.tensor.removesuffix(".weight") for a in axes for s in a.slices}:
        try:
            module = root.get_submodule(path)
        except AttributeError:  # a parameter of another name, such as a bias
            continue
        weight = getattr(module, "weight", None)
        looked_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if isinstance(weight, Tensor) and weight.ndim > 1 and not looked_up:
            found[id(module)] = module
    return list(found.values())


def _common(axis: WidthAxis) -> str:
    """The module that holds all tensors of an axis."""
    paths = [s.tensor.split(".")[:-1] for s in axis.slices]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
