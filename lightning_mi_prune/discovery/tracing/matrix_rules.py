"""Rules of operators that multiply, convolve, attend, normalise, pool and reduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from lightning_mi_prune.discovery.tracing.expressions import (
    Atom,
    Product,
    fix,
    mark,
    product_of,
)
from lightning_mi_prune.discovery.tracing.recording import Operator
from lightning_mi_prune.discovery.tracing.trace import DATA, Statistic, Trace, WeightUse

__all__ = [
    "MATRIX_RULES",
]

Rule = Callable[[Trace, Operator], None]


def _note_use(
    trace: Trace, operator: Operator, source: Tensor, weight: Tensor, contracted: int
) -> None:
    """Note a product with a parameter, if one of its factors is a parameter."""
    output = operator.outputs[0]
    known = trace.parameter_of(weight)
    trace.set_origin(output, operator.index)
    if known is None:
        return
    name, order = known
    trace.uses.append(
        WeightUse(
            operator.index,
            operator.name,
            name,
            operator.module,
            order[contracted],
            trace.root(source),
            output,
        )
    )


def _matrix(trace: Trace, operator: Operator) -> None:
    """``mm``, ``bmm`` and their sums with a bias."""
    tensors = operator.inputs
    biased = operator.name in ("addmm", "baddbmm", "addbmm")
    x, w = (tensors[1], tensors[2]) if biased else (tensors[0], tensors[1])
    trace.equal(trace.dims(x)[-1], trace.dims(w)[-2], operator)
    if x.ndim == 3:
        trace.equal(trace.dims(x)[0], trace.dims(w)[0], operator)
        if trace.parameter_of(w) is None and trace.parameter_of(x) is None:
            mark(trace.dims(x)[0], "batched")
    dims = [*trace.dims(x)[:-1], trace.dims(w)[-1]]
    if biased:
        bias = trace.dims(tensors[0])
        for a, b in zip(reversed(dims), reversed(bias), strict=False):
            if b.size > 1:
                trace.equal(a, b, operator)
    trace.set(operator.outputs[0], dims)
    if trace.parameter_of(w) is None and trace.parameter_of(x) is not None:
        _note_use(trace, operator, w, x, x.ndim - 1)
    else:
        _note_use(trace, operator, x, w, w.ndim - 2)


def _linear(trace: Trace, operator: Operator) -> None:
    x, w = operator.inputs[:2]
    trace.equal(trace.dims(x)[-1], trace.dims(w)[-1], operator)
    rows = trace.dims(w)[:-1]
    if len(operator.inputs) > 2:
        trace.equal(rows[0], trace.dims(operator.inputs[2])[0], operator)
    trace.set(operator.outputs[0], [*trace.dims(x)[:-1], *rows])
    _note_use(trace, operator, x, w, w.ndim - 1)


def _vector(trace: Trace, operator: Operator) -> None:
    """``mv`` and ``dot``."""
    x, w = operator.inputs
    trace.equal(trace.dims(x)[-1], trace.dims(w)[0], operator)
    trace.set(operator.outputs[0], trace.dims(x)[:-1])
    trace.set_origin(operator.outputs[0], operator.index)


def _grouped_matrix(trace: Trace, operator: Operator) -> None:
    """``_grouped_mm`` and its stand-in in transformers: each row of ``x`` times its expert."""
    x, w = operator.inputs[:2]
    if x.ndim != 2 or w.ndim != 3:
        raise ValueError("another form of _grouped_mm")
    fix(trace.dims(w)[0], trace.experts(operator))
    trace.equal(trace.dims(x)[1], trace.dims(w)[1], operator)
    trace.set(operator.outputs[0], [trace.dims(x)[0], trace.dims(w)[2]])
    if operator.name == "_grouped_mm":  # its kernels need rows of a multiple of 16 bytes
        for dim in trace.dims(w)[1:]:
            mark(dim, "aligned")
    _note_use(trace, operator, x, w, 1)


def _convolution(trace: Trace, operator: Operator) -> None:
    x, w = operator.inputs[:2]
    bias = operator.argument(2, "bias")
    transposed, groups = bool(operator.argument(6, "transposed")), operator.argument(8, "groups")
    channels = trace.dims(x)[1]
    rows, columns = (1, 0) if transposed else (0, 1)
    if groups == 1:
        trace.equal(channels, trace.dims(w)[columns], operator)
        made = trace.dims(w)[rows]
    elif groups == x.shape[1] and w.shape[1] == 1 and not transposed:  # depthwise
        each = w.shape[0] // groups
        made = trace.dims(w)[0]
        wide = channels if each == 1 else Product([channels, Atom(each)])
        trace.equal(made, wide, operator)
    elif not transposed:  # whole groups can go, or the same channels of every group
        outer = Atom(groups)
        trace.equal(channels, product_of([outer, trace.dims(w)[1]]), operator)
        each_made = product_of([outer, Atom(w.shape[0] // groups)])
        trace.equal(trace.dims(w)[0], each_made, operator)
        made = trace.dims(w)[0]
    else:
        label = f"a transposed convolution of {groups} groups in {operator.module}"
        for dim in (channels, *trace.dims(w)[:2]):
            fix(dim, label)
        made = Atom(operator.outputs[0].shape[1], label)
    if bias is not None:
        trace.equal(trace.dims(bias)[0], made, operator)
    for dim in trace.dims(w)[2:]:
        fix(dim, f"kernel of {operator.module}")
    output = operator.outputs[0]
    for dim in trace.dims(x)[2:]:
        fix(dim, f"positions of {operator.module}")
    pixels = [Atom(n, DATA if n > 1 else "") for n in output.shape[2:]]
    trace.set(output, [trace.dims(x)[0], made, *pixels])
    trace.set_origin(output, operator.index)
    if groups == 1 or w.shape[1] > 1:  # depthwise filters read no other channel
        _note_use(trace, operator, x, w, columns)


def _attention(trace: Trace, operator: Operator) -> None:
    """Scaled dot-product attention of ``(examples, heads, positions, head size)``."""
    q, k, v = operator.inputs[:3]
    output = operator.outputs[0]
    trace.equal(trace.dims(k)[1], trace.dims(v)[1], operator)
    repeats = q.shape[1] // k.shape[1]
    heads = trace.dims(k)[1]
    shared = heads if repeats == 1 else product_of([heads, Atom(repeats)])
    trace.equal(trace.dims(q)[1], shared, operator)
    trace.equal(trace.dims(q)[3], trace.dims(k)[3], operator)
    trace.equal(trace.dims(k)[2], trace.dims(v)[2], operator)
    for other in (k, v):
        trace.equal(trace.dims(q)[0], trace.dims(other)[0], operator)
    for mask in operator.inputs[3:]:
        if mask.ndim == 4 and mask.shape[1] == q.shape[1] > 1:
            trace.equal(trace.dims(q)[1], trace.dims(mask)[1], operator)
    for tensor in (q, k):
        mark(trace.dims(tensor)[1], "batched")
    mark(trace.dims(q)[0], "batched")
    trace.set(output, [*trace.dims(q)[:3], trace.dims(v)[3]])
    trace.set_origin(output, operator.index)
    for other in operator.outputs[1:]:
        trace.set(other, [Atom(n, DATA if n > 1 else "") for n in other.shape])


def _embedding(trace: Trace, operator: Operator) -> None:
    table, index = operator.inputs[:2]
    rows, columns = trace.dims(table)
    fix(rows, f"rows of the table in {operator.module}")
    trace.set(operator.outputs[0], [*trace.dims(index), columns])
    trace.set_origin(operator.outputs[0], operator.index)
    known = trace.parameter_of(table)
    if known is not None:
        trace.embedded.add(known[0])


def _cdist(trace: Trace, operator: Operator) -> None:
    a, b = operator.inputs[:2]
    trace.equal(trace.dims(a)[-1], trace.dims(b)[-1], operator)
    trace.set(operator.outputs[0], [*trace.dims(a)[:-1], trace.dims(b)[-2]])


# ------------------------------------------------------------------------------- normalisation


def _normalised(trace: Trace, operator: Operator) -> None:
    """``layer_norm`` and ``rms_norm``: statistics over the last dimensions."""
    x, output = operator.inputs[0], operator.outputs[0]
    count = len(operator.argument(1, "normalized_shape"))
    start = x.ndim - count
    places = [(0, i) for i in range(start, x.ndim)]
    for position, weight in enumerate(operator.inputs[1:], start=1):
        for i, (a, b) in enumerate(zip(trace.dims(x)[start:], trace.dims(weight), strict=True)):
            trace.equal(a, b, operator)
            places.append((position, i))
    _note_statistic(trace, operator, places)
    trace.set(output, trace.dims(x))
    trace.set_origin(output, trace.origin(x))
    for other in operator.outputs[1:]:
        trace.set(
            other,
            [
                d if i < start and d.size == n else Atom(n, DATA if n > 1 else "")
                for i, (d, n) in enumerate(zip(trace.dims(x), other.shape, strict=False))
            ],
        )


def _note_statistic(trace: Trace, operator: Operator, places: Sequence[tuple[int, int]]) -> None:
    dims = [(p, i, trace.dims(operator.inputs[p])[i]) for p, i in places]
    for _, _, dim in dims:
        mark(dim, "normed")
    found = tuple(each for each in dims if each[2].size > 1)
    if found:
        trace.statistics.append(Statistic(operator.index, operator.name, found))


def _batch_normalised(trace: Trace, operator: Operator) -> None:
    """Statistics of each channel by itself, so channels can go."""
    x, output = operator.inputs[0], operator.outputs[0]
    for other in operator.inputs[1:]:
        trace.equal(trace.dims(x)[1], trace.dims(other)[0], operator)
    trace.set(output, trace.dims(x))
    trace.set_origin(output, trace.origin(x))
    for stat in operator.outputs[1:]:
        trace.set(stat, [Atom(n) for n in stat.shape])


def _group_normalised(trace: Trace, operator: Operator) -> None:
    """Channels are split into groups of fixed size."""
    x, output = operator.inputs[0], operator.outputs[0]
    channels = trace.dims(x)[1]
    for other in operator.inputs[1:]:
        trace.equal(channels, trace.dims(other)[0], operator)
    fix(trace.dims(x)[1], operator.label)
    trace.set(output, trace.dims(x))
    trace.set_origin(output, trace.origin(x))
    for stat in operator.outputs[1:]:
        trace.set(stat, [Atom(n, DATA if n > 1 else "") for n in stat.shape])


# Of weights as a whole these are penalties of a loss, to which removed weights add nothing.
_SUMS = frozenset(("sum", "norm", "linalg_vector_norm"))


def _reduced(trace: Trace, operator: Operator) -> None:
    """``mean``, ``sum``, ``amax`` ... over some dimensions or all."""
    x, output = operator.inputs[0], operator.outputs[0]
    dims = trace.dims(x)
    position = 2 if operator.name in ("linalg_vector_norm", "norm") else 1
    chosen = operator.argument(position, "dim")
    if isinstance(chosen, (bool, float)) or chosen is None or chosen == []:
        chosen = operator.kwargs.get("dim") or range(x.ndim)
    over = (
        {dim % x.ndim for dim in ([chosen] if isinstance(chosen, int) else chosen)}
        if dims
        else set()
    )
    keep = output.ndim == x.ndim
    if keep:
        _note_statistic(trace, operator, [(0, dim) for dim in sorted(over)])
    elif not (operator.name in _SUMS and id(x) in trace.of_parameters and output.numel() == 1):
        for dim in over:
            fix(dims[dim], operator.label)
    for result in operator.outputs:
        trace.set(
            result,
            [Atom(1) if i in over else d for i, d in enumerate(dims) if keep or i not in over],
        )
        trace.set_origin(result, trace.origin(x))


def _pooled(spatial: int) -> Rule:
    """Pooling and resizing of the last dimensions."""

    def rule(trace: Trace, operator: Operator) -> None:
        x = operator.inputs[0]
        start, kernel = x.ndim - spatial, operator.argument(1, "kernel_size")
        plain = "avg_pool" in operator.name and "adaptive" not in operator.name
        dims = trace.dims(x)
        for i, dim in enumerate(dims[start:]):
            # A window of one entry leaves a dimension as it is.
            if (
                plain
                and kernel[i % len(kernel)] == 1
                and operator.outputs[0].shape[start + i] == dim.size
            ):
                continue
            fix(dim, operator.label)
            dims[start + i] = Atom(operator.outputs[0].shape[start + i], DATA)
        for output in operator.outputs:
            trace.set(output, dims)
            trace.set_origin(output, trace.origin(x))

    return rule


def _named(names: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


MATRIX_RULES: Mapping[str, Rule] = {
    **_named("mm addmm bmm baddbmm", _matrix),
    **_named("linear", _linear),
    **_named("mv dot", _vector),
    **_named("_grouped_mm grouped_mm_fallback", _grouped_matrix),
    **_named("convolution", _convolution),
    **_named(
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
        "_scaled_dot_product_attention_math scaled_dot_product_attention "
        "_scaled_dot_product_fused_attention_overrideable",
        _attention,
    ),
    **_named("embedding", _embedding),
    **_named("_cdist_forward", _cdist),
    **_named("native_layer_norm layer_norm rms_norm _fused_rms_norm", _normalised),
    **_named(
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
        "_batch_norm_with_update _batch_norm_no_update cudnn_batch_norm batch_norm",
        _batch_normalised,
    ),
    **_named("native_group_norm", _group_normalised),
    **_named(
        "mean sum var std amax amin any all argmax argmin max min var_mean prod linalg_vector_norm "
        "norm nansum logsumexp",
        _reduced,
    ),
    **_named(
        "max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_avg_pool2d "
        "adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d",
        _pooled(2),
    ),
    **_named(
        "avg_pool1d max_pool1d adaptive_avg_pool1d max_pool1d_with_indices upsample_linear1d "
        "upsample_nearest1d",
        _pooled(1),
    ),
    **_named("avg_pool3d max_pool3d_with_indices _adaptive_avg_pool3d", _pooled(3)),
}
