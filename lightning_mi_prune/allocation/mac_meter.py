"""Multiply-accumulates by the weight, or the layout, that they are proportional to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mi_prune.allocation.mac_counter import MacCounter

__all__ = [
    "Product",
    "WeightMeter",
]

_aten = torch.ops.aten

# Position of the weight among the tensors of an operator, and its dimension that is summed over.
_MATRICES = {
    _aten.mm: {1: 0, 0: 1},
    _aten.addmm: {2: 0, 1: 1},
    _aten._addmm_activation: {2: 0, 1: 1},
    _aten.bmm: {1: 1, 0: 2},
    _aten.baddbmm: {2: 1, 1: 2},
    _aten.linear: {1: -1},
    _aten.convolution: {1: 1},
    _aten.mv: {0: 1},
    _aten.addmv: {1: 1},
}
# Operators for whole layers: their matrices, of which the second is the output projection.
_LAYERS = {
    _aten._native_multi_head_attention: (5, 7),
    _aten._transformer_encoder_layer_fwd: (3, 5, 14, 16),
}
_ATTENTION = "scaled_dot_product"


class Product(NamedTuple):
    """Multiply-accumulates of two activations, proportional to one dimension of a weight.

    Args:
        weight: ``id`` of the weight.
        dim: Its dimension.
        macs: How many there were.
    """

    weight: int
    dim: int
    macs: float


@dataclass(frozen=True)
class _Trace:
    """What is known of a storage.

    Args:
        weight: The weight it holds, or that was computed from it entry by entry.
        made_by: Weight and dimension that its entries come from.
        whole: Entries that this weight made.
        open: Numbers of the products that it depends on and that no weight has read yet.
        fixed: Whether it depends on parameters and buffers only.
    """

    weight: Tensor | None = None
    made_by: tuple[int, int] | None = None
    whole: int = 0
    open: frozenset[int] = frozenset()
    fixed: bool = False


_UNKNOWN = _Trace()


class WeightMeter(MacCounter):  # type: ignore[no-untyped-call]
    """A counter that attributes what it counts, by the identity of weights, whoever calls them.

    A product of two activations is attributed to the weight that its result ends in (values times
    scores, and scores, have an entry of the output projection's input for each entry and pair of
    positions), or, where the first operand is the whole output of a weight, to that weight's
    outputs (queries).

    Args:
        weights: Weights, by identity.
        constants: Buffers; they do not depend on the inputs.
        after: As for :class:`mac_counter.MacCounter`.

    Example:
        >>> weight = torch.nn.Linear(4, 3).weight
        >>> with torch.no_grad(), WeightMeter([weight]) as meter:
        ...     _ = torch.zeros(5, 4) @ weight.mT
        >>> meter.by_weight[id(weight)], meter.products
        (60, [])
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        constants: Collection[Tensor] = (),
        after: ExitStack | None = None,
    ) -> None:
        super().__init__(after)
        self.by_weight: dict[int, float] = defaultdict(int)
        self._open: list[tuple[float, tuple[int, int] | None]] = []
        self._closed: list[Product] = []
        self._traces: dict[int, _Trace] = {}
        self._ranges: dict[int, list[Tensor]] = defaultdict(list)
        for constant in constants:
            self._set(constant, _Trace(fixed=True))
        for weight in weights:
            if (key := _key(weight)) is not None:
                self._ranges[key].append(weight)
                self._traces[key] = _Trace(weight, fixed=True)

    @property
    def products(self) -> list[Product]:
        """All products that are proportional to a dimension of a weight."""
        return self._closed

    def ran(
        self, operator: Any, args: tuple[Any, ...], kwargs: Any, result: Any, macs: int
    ) -> None:
        """Attribute the work of an operator, and follow its inputs to its outputs."""
        inputs = list(_tensors((args, kwargs)))
        traces = [self._trace(x) for x in inputs]
        opened = frozenset[int]().union(*(trace.open for trace in traces))
        fixed = all(trace.fixed for trace in traces)
        outputs = list(_tensors(result))
        made: _Trace | None = None
        if macs and operator in _LAYERS:
            made = self._ran_layer([args[i] for i in _LAYERS[operator]], outputs, macs, fixed)
        elif macs:
            weights = [t.weight for t in traces if t.weight is not None and t.weight.ndim > 1]
            place = self._weight_place(operator, inputs, traces)
            if place is not None:
                made = self._ran_weight(operator, inputs, traces, place, outputs, macs, opened)
            elif weights:
                total = sum(w.numel() for w in weights)
                for each in weights:  # of recurrent layers
                    self.by_weight[id(each)] += macs * each.numel() / total
                made = _Trace(fixed=fixed)
            else:
                made = self._ran_product(operator, inputs, traces, outputs, macs, opened)
        if made is None:
            makers = {t.made_by for t in traces if t.made_by is not None}
            single = next(iter(makers)) if len(makers) == 1 else None
            whole = max((t.whole for t in traces), default=0)
            weight = _only_weight(inputs, traces, outputs) if fixed else None
            made = _Trace(weight, single, whole if single else 0, opened, fixed)
        own = {_key(x) for x in inputs}
        for output in outputs:
            if _key(output) not in own:
                self._set(output, made)
            elif not fixed or macs:  # written in place
                present = self._trace(output)
                if present.weight is None:
                    self._set(output, made)

    def _ran_weight(
        self,
        operator: Any,
        inputs: Sequence[Tensor],
        traces: Sequence[_Trace],
        place: int,
        outputs: Sequence[Tensor],
        macs: int,
        opened: frozenset[int],
    ) -> _Trace:
        weight = traces[place].weight
        assert weight is not None  # noqa: S101  # for mypy
        self.by_weight[id(weight)] += macs
        summed = _MATRICES[operator].get(place) if operator in _MATRICES else None
        inner = None if summed is None else _same_dim(weight, inputs[place], summed)
        if inner is not None:
            self._close(opened, (id(weight), inner))
        outer = None
        if operator is _aten.convolution:
            outer = 0
        elif inner is not None and weight.ndim == 2:
            outer = 1 - inner
        return _Trace(
            made_by=None if outer is None else (id(weight), outer),
            whole=sum(output.numel() for output in outputs),
            fixed=all(trace.fixed for trace in traces),
        )

    def _ran_product(
        self,
        operator: Any,
        inputs: Sequence[Tensor],
        traces: Sequence[_Trace],
        outputs: Sequence[Tensor],
        macs: int,
        opened: frozenset[int],
    ) -> _Trace:
        attention = _ATTENTION in str(operator) and len(inputs) > 2
        maker = _whole_maker(inputs[0], traces[0]) if inputs else None
        parts: list[tuple[float, tuple[int, int] | None]] = [(float(macs), maker)]
        if attention and any(x.is_nested for x in inputs[:3]):
            parts = [(float(macs), None)]
        elif attention:
            size, value = inputs[0].shape[-1], inputs[2].shape[-1]
            scores = macs * size / (size + value) if size + value else 0.0
            parts = [(scores, maker), (macs - scores, None)]
        numbers = range(len(self._open), len(self._open) + len(parts))
        self._open += parts
        return _Trace(open=opened | {*numbers}, fixed=all(trace.fixed for trace in traces))

    def _ran_layer(
        self, matrices: Sequence[Tensor], outputs: Sequence[Tensor], macs: int, fixed: bool
    ) -> _Trace:
        """A whole layer of torch's own encoder: rows times matrices, and two products."""
        weights = [self._trace(matrix).weight for matrix in matrices]
        rows = outputs[0].numel() // max(matrices[1].shape[0], 1)
        for weight, matrix in zip(weights, matrices, strict=True):
            if weight is not None:
                self.by_weight[id(weight)] += rows * matrix.numel()
        left = macs - rows * sum(matrix.numel() for matrix in matrices)
        if weights[1] is not None:
            self._closed.append(Product(id(weights[1]), 1, left))
        return _Trace(fixed=fixed)

    def _close(self, opened: Iterable[int], reader: tuple[int, int]) -> None:
        for number in opened:
            macs, maker = self._open[number]
            self._open[number] = (0.0, None)  # another weight may read the same result
            if macs:
                self._closed.append(Product(*(maker or reader), macs))

    def _weight_place(
        self, operator: Any, inputs: Sequence[Tensor], traces: Sequence[_Trace]
    ) -> int | None:
        """Which of the inputs is the weight; None if none is, or several are."""
        places = [i for i, t in enumerate(traces) if t.weight is not None and inputs[i].ndim > 1]
        usual = [place for place in _MATRICES.get(operator, ()) if place in places]
        if usual:
            return usual[0]
        return places[0] if len(places) == 1 else None

    def _trace(self, x: Tensor) -> _Trace:
        key = _key(x)
        found = _UNKNOWN if key is None else self._traces.get(key, _UNKNOWN)
        several = self._ranges.get(key, ()) if key is not None and found.weight is not None else ()
        if len(several) > 1:  # parameters that are parts of one storage
            inside = [w for w in several if _inside(x, w)]
            return _Trace(inside[0], fixed=True) if inside else found
        return found

    def _set(self, x: Tensor, trace: _Trace) -> None:
        if (key := _key(x)) is not None:
            self._traces[key] = trace


def _key(x: Tensor) -> int | None:
    """Identity of a storage; None for tensors without one."""
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


def _inside(x: Tensor, weight: Tensor) -> bool:
    start = weight.storage_offset()
    return start <= x.storage_offset() < start + max(weight.numel(), 1)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Tensors in arguments, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


def _same_dim(weight: Tensor, operand: Tensor, dim: int) -> int | None:
    """The dimension of a weight that a dimension of a view or copy of it is."""
    size, stride = operand.shape[dim], operand.stride(dim)
    if operand.shape == weight.shape and operand.stride() == weight.stride():
        return dim % weight.ndim
    found = [d for d in range(weight.ndim) if weight.stride(d) == stride]
    exact = [d for d in found if weight.shape[d] == size]
    return next(iter(exact or found), None)


def _only_weight(
    inputs: Sequence[Tensor], traces: Sequence[_Trace], outputs: Sequence[Tensor]
) -> Tensor | None:
    """The one weight that an output was computed from entry by entry: a copy, a normalised one."""
    weights = {id(t.weight): t.weight for t in traces if t.weight is not None and t.weight.ndim > 1}
    if len(weights) != 1 or not outputs:
        return None
    (weight,) = weights.values()
    return weight if weight is not None and outputs[0].numel() == weight.numel() else None


def _whole_maker(x: Tensor, trace: _Trace) -> tuple[int, int] | None:
    """Weight and dimension that made all entries of an operand, and nothing else."""
    return trace.made_by if trace.whole == x.numel() and not trace.open else None
