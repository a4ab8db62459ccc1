"""What each ATen operator does to dimensions: one table of rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_mi_prune.discovery.tracing.expressions import (
    Atom,
    Expression,
    fix,
    mark,
    part_of,
    product_of,
    reshaped,
    sum_of,
    terms_of,
)
from lightning_mi_prune.discovery.tracing.matrix_rules import MATRIX_RULES
from lightning_mi_prune.discovery.tracing.recording import Operator
from lightning_mi_prune.discovery.tracing.trace import DATA, Trace

__all__ = [
    "follow",
    "unchanged_dims",
]

Rule = Callable[[Trace, Operator], None]
_MASKS = (torch.bool, torch.uint8)
_FEW = 64  # places of an index that are read one by one


def follow(trace: Trace, operator: Operator) -> None:
    """Extend a trace by one operator; what no rule explains is fixed and noted.

    Args:
        trace: The trace so far.
        operator: The operator.
    """
    if operator.inputs and all(id(x) in trace.of_parameters for x in operator.inputs):
        trace.of_parameters |= {id(output) for output in operator.outputs}
    rule = RULES.get(operator.name)
    if rule is None and operator.pointwise:
        rule = _pointwise
    if rule is None:
        trace.refuse(operator)
        return
    try:
        rule(trace, operator)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        trace.refuse(operator)  # an overload that the rule was not written for


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


# --------------------------------------------------------------------------------- entry by entry

_LINEAR = _words(
    "add add_ sub sub_ rsub neg mul mul_ div div_ _to_copy clone copy_ lerp where masked_fill "
    "masked_fill_ native_dropout dropout to contiguous detach alias"
)


def _broadcast(trace: Trace, operator: Operator, output: Tensor) -> None:
    """Dimensions aligned from the right are equal; those of size 1 are no restriction."""
    found: list[Expression | None] = [None] * output.ndim
    for tensor in operator.inputs:
        dims = trace.dims(tensor)
        offset = output.ndim - len(dims)
        for i, dim in enumerate(dims):
            present = found[offset + i]
            if dim.size == 1:
                continue
            if present is None:
                found[offset + i] = dim
            elif dim is not present:
                trace.equal(present, dim, operator)
    trace.set(
        output,
        [Atom(n) if dim is None else dim for dim, n in zip(found, output.shape, strict=True)],
    )


def _pointwise(trace: Trace, operator: Operator) -> None:
    output = operator.outputs[0]
    shared = [t for t in operator.inputs if t.ndim and max(t.shape, default=1) > 1]
    _broadcast(trace, operator, output)
    for other in operator.outputs[1:]:
        trace.set(other, trace.dims(output))
    made = [trace.origin(t) for t in shared]
    known = [origin for origin in made if origin is not None]
    if operator.name in ("add", "add_") and len(set(known)) > 1:
        for dim in trace.dims(output):
            mark(dim, "added")
        trace.set_origin(output, operator.index)
    elif known:
        trace.set_origin(output, known[0])
    products = operator.name in ("mul", "mul_", "div", "div_") and len(shared) > 1
    if operator.name not in _LINEAR or products:
        for i, dim in enumerate(trace.dims(output)):
            wide = sum(_has_dim(t, output, i) for t in shared)
            if operator.name not in _LINEAR or wide > 1:
                mark(dim, "nonlinear")
    if len(operator.inputs) == 1 and operator.name in _COPIES:
        trace.alias(output, operator.inputs[0], range(output.ndim))


_COPIES = _words("_to_copy clone alias detach to contiguous lift_fresh lift_fresh_copy")


def _has_dim(tensor: Tensor, output: Tensor, dim: int) -> bool:
    position = dim - (output.ndim - tensor.ndim)
    return position >= 0 and tensor.shape[position] > 1


def _like(trace: Trace, operator: Operator) -> None:
    trace.set(operator.outputs[0], trace.dims(operator.inputs[0]))


def _dropout(trace: Trace, operator: Operator) -> None:
    _pointwise(trace, operator)
    for mask in operator.outputs[1:]:
        trace.set(mask, trace.dims(operator.outputs[0]))


def _copy_into(trace: Trace, operator: Operator) -> None:
    _broadcast(trace, operator, operator.outputs[0])


def _nothing(trace: Trace, operator: Operator) -> None:
    """Operators that return no tensor of any size, or read only the shape."""
    for tensor in operator.outputs:
        trace.set(tensor, [Atom(n, DATA if n > 1 else "") for n in tensor.shape])


# --------------------------------------------------------------------------------- new tensors


def _constant(trace: Trace, operator: Operator) -> None:
    """The same value everywhere: nothing depends on the size."""
    for tensor in operator.outputs:
        trace.set(tensor, [Atom(n) for n in tensor.shape])


def _numbered(trace: Trace, operator: Operator) -> None:
    """Values that depend on the place."""
    for tensor in operator.outputs:
        trace.set(tensor, [Atom(n, operator.label if n > 1 else "") for n in tensor.shape])


# --------------------------------------------------------------------------------- shapes


def unchanged_dims(before: Sequence[int], after: Sequence[int]) -> list[int | None]:
    """The dimension behind each one after ``view``; None for new, split and merged ones.

    Args:
        before: Shape before.
        after: Shape after.

    Example:
        >>> unchanged_dims((8, 3, 5), (1, 8, 15)), unchanged_dims((4, 1, 6), (2, 2, 6))
        ([None, 0, None], [None, None, 2])
    """
    found: list[int | None] = [None] * len(after)
    left = [i for i, n in enumerate(before) if n != 1]
    right = [i for i, n in enumerate(after) if n != 1]
    while left and right:
        one, two = [left.pop(0)], [right.pop(0)]
        sizes = before[one[0]], after[two[0]]
        while sizes[0] != sizes[1]:
            if sizes[0] < sizes[1] and left:
                one.append(left.pop(0))
                sizes = sizes[0] * before[one[-1]], sizes[1]
            elif sizes[0] > sizes[1] and right:
                two.append(right.pop(0))
                sizes = sizes[0], sizes[1] * after[two[-1]]
            else:  # without entries
                return found
        if len(one) == len(two) == 1:
            found[two[0]] = one[0]
    return found


def _moved(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    dims, n = trace.dims(source), source.ndim
    name = operator.name
    if name in ("t", "numpy_T"):
        order = [*reversed(range(n))]
    elif name in ("mT", "adjoint"):
        order = [*range(n - 2), n - 1, n - 2]
    elif name in ("transpose", "transpose_", "swapaxes"):
        order = list(range(n))
        i, j = operator.argument(1, "dim0") % n, operator.argument(2, "dim1") % n
        order[i], order[j] = order[j], order[i]
    else:
        order = [dim % n for dim in operator.argument(1, "dims")]
    trace.set(output, [dims[dim] for dim in order])
    trace.alias(output, source, order)


def _unsqueezed(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    dims, dim = trace.dims(source), operator.argument(1, "dim") % output.ndim
    whole = len(dims) == output.ndim  # changed in place before it was first used
    trace.set(output, dims if whole else [*dims[:dim], Atom(1), *dims[dim:]])
    trace.alias(output, source, unchanged_dims(source.shape, output.shape))


def _squeezed(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    chosen = operator.argument(1, "dim")
    every = list(range(source.ndim)) if chosen is None else chosen
    wanted = {dim % source.ndim for dim in ([every] if isinstance(every, int) else every)}
    dims = [d for i, d in enumerate(trace.dims(source)) if not (i in wanted and d.size == 1)]
    trace.set(output, dims)
    trace.alias(output, source, unchanged_dims(source.shape, output.shape))


def _viewed(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    if source.shape == output.shape:
        trace.set(output, trace.dims(source))
        trace.alias(output, source, range(source.ndim))
        return
    trace.set(output, reshaped(trace.dims(source), list(output.shape), operator.label))
    trace.alias(output, source, unchanged_dims(source.shape, output.shape))


def _expanded(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    dims = trace.dims(source)
    offset = output.ndim - len(dims)
    same = [
        None if i < offset or dims[i - offset].size != n else i - offset
        for i, n in enumerate(output.shape)
    ]
    sizes = zip(same, output.shape, strict=True)
    trace.set(output, [Atom(n) if dim is None else dims[dim] for dim, n in sizes])
    trace.alias(output, source, same)


def _repeated(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    dims = trace.dims(source)
    offset = output.ndim - len(dims)
    trace.set(
        output,
        [
            Atom(n)
            if i < offset
            else product_of([Atom(n // dims[i - offset].size), dims[i - offset]])
            for i, n in enumerate(output.shape)
        ],
    )


def _selected(trace: Trace, operator: Operator) -> None:
    source = operator.inputs[0]
    dims, dim = trace.dims(source), operator.argument(1, "dim", 0) % source.ndim
    expert = trace.chooses_expert(source, dim)
    fix(dims[dim], trace.experts(operator) if expert else operator.label)
    rest = [i for i in range(source.ndim) if i != dim]
    for output in operator.outputs:
        trace.set(output, [dims[i] for i in rest])
        if trace.parameter_of(source) is not None:
            trace.alias(output, source, rest)
        trace.set_origin(output, trace.origin(source))


def _sliced(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    dims, dim = trace.dims(source), operator.argument(1, "dim", 0) % source.ndim
    if operator.name == "narrow":
        start = operator.argument(2, "start")
        bounds = (start, start + operator.argument(3, "length"), 1)
    else:
        first, last = operator.argument(2, "start"), operator.argument(3, "end")
        step = operator.argument(4, "step", 1)
        bounds = slice(first, last, step).indices(dims[dim].size)
    part: Expression
    if bounds == (0, dims[dim].size, 1):
        trace.set(output, dims)
        trace.alias(output, source, range(source.ndim))
        return
    every, size = bounds[2], dims[dim].size
    if every > 1 and size % every == 0 and bounds[0] < every and bounds[1] > size - every:
        # Entries in turn, such as gates and values: a product with what is left out between.
        part, turn = reshaped([dims[dim]], [size // every, every], operator.label)
        fix(turn, operator.label)
    elif every != 1:
        fix(dims[dim], operator.label)
        part = Atom(output.shape[dim], operator.label)
    else:
        part = part_of(dims[dim], bounds[0], bounds[1], operator.label)
    trace.set(output, [*dims[:dim], part, *dims[dim + 1 :]])
    trace.set_origin(output, trace.origin(source))


def _split(trace: Trace, operator: Operator) -> None:
    source = operator.inputs[0]
    dim, start = operator.argument(2, "dim", 0) % source.ndim, 0
    for output in operator.outputs:
        dims = trace.dims(source)
        stop = start + output.shape[dim]
        dims[dim] = part_of(dims[dim], start, stop, operator.label)
        trace.set(output, dims)
        trace.set_origin(output, trace.origin(source))
        start = stop


def _joined(trace: Trace, operator: Operator) -> None:
    output = operator.outputs[0]
    dim = operator.argument(1, "dim", 0) % output.ndim
    # An empty tensor of one dimension may be joined to any other.
    parts = [t for t in operator.inputs if t.ndim == output.ndim]
    first = trace.dims(parts[0])
    for part in parts[1:]:
        for i, (a, b) in enumerate(zip(first, trace.dims(part), strict=True)):
            if i != dim:
                trace.equal(a, b, operator)
    whole = sum_of(trace.dims(part)[dim] for part in parts)
    trace.set(output, [whole if i == dim else d for i, d in enumerate(trace.dims(parts[0]))])
    for part in parts:
        trace.set_origin(output, trace.origin(part))


def _stacked(trace: Trace, operator: Operator) -> None:
    output = operator.outputs[0]
    dim = operator.argument(1, "dim", 0) % output.ndim
    first = trace.dims(operator.inputs[0])
    for part in operator.inputs[1:]:
        for a, b in zip(first, trace.dims(part), strict=True):
            trace.equal(a, b, operator)
    dims = trace.dims(operator.inputs[0])
    count = len(operator.inputs)
    trace.set(output, [*dims[:dim], Atom(count, operator.label if count > 1 else ""), *dims[dim:]])


def _parts_of_complex(trace: Trace, operator: Operator) -> None:
    """``view_as_real`` and its inverse: the last dimension counts real and imaginary part."""
    source, output = operator.inputs[0], operator.outputs[0]
    dims = trace.dims(source)
    if output.ndim > source.ndim:
        trace.set(output, [*dims, Atom(2, operator.label)])
    else:
        fix(dims[-1], operator.label)
        trace.set(output, dims[:-1])
    trace.set_origin(output, trace.origin(source))


def _padded(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    dims: list[Expression] = []
    for dim, n in zip(trace.dims(source), output.shape, strict=True):
        if dim.size != n:
            fix(dim, operator.label)
        dims.append(dim if dim.size == n else Atom(n, operator.label))
    trace.set(output, dims)
    trace.set_origin(output, trace.origin(source))


def _gated(trace: Trace, operator: Operator) -> None:
    """``glu``: one half of a dimension times a function of the other half."""
    source, output = operator.inputs[0], operator.outputs[0]
    dim = operator.argument(1, "dim", -1) % source.ndim
    whole, half = trace.dims(source)[dim], output.shape[dim]
    first = part_of(whole, 0, half, operator.label)
    trace.equal(first, part_of(whole, half, 2 * half, operator.label), operator)
    dims = trace.dims(source)
    dims[dim] = first
    trace.set(output, dims)
    mark(first, "nonlinear")
    trace.set_origin(output, trace.origin(source))


# --------------------------------------------------------------------------------- places


def _along(positions: Mapping[str, int]) -> Rule:
    """Operators that mix the entries of dimensions named by an argument, and keep the shape."""

    def rule(trace: Trace, operator: Operator) -> None:
        source = operator.inputs[0]
        position = positions[operator.name]
        chosen = operator.argument(position, "dims", operator.kwargs.get("dim", -1))
        dims = trace.dims(source)
        for dim in [chosen] if isinstance(chosen, int) else chosen:
            fix(dims[dim], operator.label)
        for output in operator.outputs:
            shape = zip(dims, output.shape, strict=True)
            trace.set(output, [d if d.size == n else Atom(n, operator.label) for d, n in shape])
            trace.set_origin(output, trace.origin(source))

    return rule


def _triangular(trace: Trace, operator: Operator) -> None:
    dims = trace.dims(operator.inputs[0])
    for dim in dims[-2:]:
        fix(dim, operator.label)
    trace.set(operator.outputs[0], dims)


def _indexed(trace: Trace, operator: Operator) -> None:
    """``x[i, :, j]`` with tensors as indices; a mask takes a dimension for each of its own."""
    source, output = operator.inputs[0], operator.outputs[0]
    dims, at = trace.dims(source), 0
    hit: list[int] = []
    for index in operator.argument(1, "indices"):
        width = 1 if index is None or index.dtype not in _MASKS else index.ndim
        for place in [] if index is None else range(at, at + width):
            hit.append(place)
            expert = trace.chooses_expert(source, place)
            reason = trace.experts(operator) if expert else operator.label
            _fix_places(dims[place], index, reason)
        at += width
    rest = [dim for place, dim in enumerate(dims) if place not in hit]
    adjacent = hit == list(range(hit[0], hit[0] + len(hit)))
    start = hit[0] if adjacent else 0
    fresh = output.shape[start : start + output.ndim - len(rest)]
    new = [Atom(n, DATA if n > 1 else "") for n in fresh]
    trace.set(output, [*rest[:start], *new, *rest[start:]])
    trace.set_origin(output, trace.origin(source))
    if hit == [0] and output.ndim == source.ndim and trace.chooses_expert(source, 0):
        trace.alias(output, source, range(source.ndim))


def _fix_places(dim: Expression, index: Tensor, reason: str) -> None:
    """Fix the terms of a sum that an index reads, as far as it is known."""
    constant = index.dtype not in _MASKS and index.numel() <= _FEW
    read = {int(i) % dim.size for i in index.flatten().tolist()} if constant else range(dim.size)
    end = 0
    for term in terms_of(dim):
        begin, end = end, end + term.size
        if any(begin <= place < end for place in read):
            fix(term, reason)


def _strided(trace: Trace, operator: Operator) -> None:
    """``as_strided`` where it is a view of all entries in their order."""
    source, output = operator.inputs[0], operator.outputs[0]
    if output.numel() != source.numel() or not output.is_contiguous():
        raise ValueError("entries in another order")
    dims = trace.dims(source)
    if [dim.size for dim in dims] != list(output.shape):
        dims = reshaped(dims, list(output.shape), operator.label)
    trace.set(output, dims)
    trace.alias(output, source, unchanged_dims(source.shape, output.shape))


def _put(trace: Trace, operator: Operator) -> None:
    """``x[i, :, j] = values``: what is not indexed is equal in both."""
    target, output = operator.inputs[0], operator.outputs[0]
    indices, values = operator.argument(1, "indices"), operator.argument(2, "values")
    dims = trace.dims(target)
    for dim, index in zip(dims, indices, strict=False):
        if index is not None:
            fix(dim, operator.label)
    free = dims[len(indices) :]
    for a, b in zip(reversed(free), reversed(trace.dims(values)), strict=False):
        if b.size > 1:
            trace.equal(a, b, operator)
    trace.set(output, dims)


def _index_selected(trace: Trace, operator: Operator) -> None:
    source, output = operator.inputs[0], operator.outputs[0]
    dims, dim = trace.dims(source), operator.argument(1, "dim") % source.ndim
    fix(dims[dim], operator.label)
    dims[dim] = Atom(output.shape[dim], DATA)
    trace.set(output, dims)


def _gathered(trace: Trace, operator: Operator) -> None:
    """All dimensions but one pass through; scatter likewise."""
    source, output = operator.inputs[0], operator.outputs[0]
    chosen = operator.argument(1, "dim") % source.ndim
    for other in operator.inputs[1:]:
        for i, (a, b) in enumerate(zip(trace.dims(source), trace.dims(other), strict=True)):
            if i == chosen or a.size != b.size:
                fix(a, operator.label)
                fix(b, operator.label)
            elif a.size > 1:
                trace.equal(a, b, operator)
    like = operator.inputs[1] if operator.name == "gather" else source
    trace.set(output, trace.dims(like))


def _added_at(trace: Trace, operator: Operator) -> None:
    """``index_add``: the other dimensions of the target and what is added are equal."""
    target, source = operator.inputs[0], operator.inputs[-1]
    chosen = operator.argument(1, "dim") % target.ndim
    for i, (a, b) in enumerate(zip(trace.dims(target), trace.dims(source), strict=True)):
        if i == chosen:
            fix(a, operator.label)
            fix(b, operator.label)
        else:
            trace.equal(a, b, operator)
    trace.set(operator.outputs[0], trace.dims(target))
    trace.set_origin(operator.outputs[0], trace.origin(source))


def _found(trace: Trace, operator: Operator) -> None:
    """Operators whose output has a size that depends on values."""
    for tensor in operator.inputs:
        for dim in trace.dims(tensor):
            fix(dim, operator.label)
    for output in operator.outputs:
        trace.set(output, [Atom(n, DATA if n > 1 else "") for n in output.shape])


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Rule] = {
    **MATRIX_RULES,
    **_named("copy_", _copy_into),
    **_named(
        "_to_copy clone alias detach to contiguous lift_fresh lift_fresh_copy bernoulli "
        "masked_fill masked_fill_ fill_ zero_ nan_to_num where isin _conj complex polar",
        _pointwise,
    ),
    # Not marked as such by torch, in one overload or all.
    **_named(
        "hardswish hardswish_ hardsigmoid hardtanh hardtanh_ mish mish_ gelu gelu_ elu celu relu "
        "leaky_relu softplus softshrink hardshrink threshold threshold_ prelu _prelu_kernel pow "
        "add_ mul_ abs_ ne_ eq_ ge_ round floor_divide fmod remainder log1p log10 copysign "
        "log_sigmoid_forward isfinite isinf isnan __rshift__ __lshift__",
        _pointwise,
    ),
    **_named("view_as_real view_as_complex", _parts_of_complex),
    **_named("native_dropout dropout", _dropout),
    **_named("ones_like zeros_like full_like empty_like new_empty_strided", _like),
    **_named(
        "zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor empty_strided",
        _constant,
    ),
    **_named("arange linspace eye rand randn randint randperm rand_like randn_like", _numbered),
    **_named(
        "sym_size _local_scalar_dense item is_same_size equal is_nonzero "
        "_assert_tensor_metadata _assert_async",
        _nothing,
    ),
    **_named("t numpy_T adjoint transpose transpose_ swapaxes permute", _moved),
    **_named("unsqueeze unsqueeze_", _unsqueezed),
    **_named("squeeze squeeze_", _squeezed),
    **_named("view reshape _unsafe_view _reshape_alias unflatten flatten", _viewed),
    **_named("as_strided as_strided_", _strided),
    **_named("expand expand_as", _expanded),
    **_named("repeat tile", _repeated),
    **_named("select unbind", _selected),
    **_named("slice narrow", _sliced),
    **_named("split split_with_sizes chunk unsafe_split unsafe_chunk tensor_split", _split),
    **_named("cat concat", _joined),
    **_named("stack", _stacked),
    **_named("constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d", _padded),
    **_named("glu", _gated),
    **_named(
        "_softmax softmax _log_softmax log_softmax _safe_softmax cumsum cumsum_ cumprod flip roll "
        "sort argsort topk logcumsumexp",
        _along(
            {
                **dict.fromkeys(("_softmax", "softmax", "_log_softmax", "log_softmax"), 1),
                **dict.fromkeys(("_safe_softmax", "cumsum", "cumsum_", "cumprod"), 1),
                **dict.fromkeys(("logcumsumexp", "flip", "sort", "argsort"), 1),
                **dict.fromkeys(("roll", "topk"), 2),
            }
        ),
    ),
    **_named("triu tril triu_ tril_", _triangular),
    **_named("index _unsafe_index", _indexed),
    **_named("index_put index_put_ _index_put_impl_", _put),
    **_named("index_select", _index_selected),
    **_named("gather scatter scatter_ scatter_add scatter_add_", _gathered),
    **_named("index_add index_add_", _added_at),
    **_named("nonzero masked_select unique_dim _unique2 bincount one_hot", _found),
}
