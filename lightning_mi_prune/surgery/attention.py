"""``nn.MultiheadAttention`` whose output projection is a module that runs, of any size.

Torch's own ``forward`` passes the weight of ``out_proj`` to a function, so that hooks on it never
run, and asserts that queries, keys and values are as wide as the input. The one here computes the
same, takes its sizes from the weights and calls ``out_proj``. It is used while hooks are on, and
for good in attention that was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "attention_forward",
    "fit_attention",
    "fit_attentions",
    "is_open",
    "open_attention",
    "slow_path",
]


@contextmanager
def open_attention(model: nn.Module, consumers: Iterable[str] | None = None) -> Iterator[None]:
    """Run every ``nn.MultiheadAttention`` of a model through its ``out_proj`` module in the block.

    Outputs and gradients are the same. An attention with a ``forward`` of its own stays as it is.

    Args:
        model: The model.
        consumers: Paths of output projections; None opens all attention. Others stay as they are.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> x, widths = torch.zeros(3, 1, 4), []
        >>> _ = attention.out_proj.register_forward_hook(lambda m, a, y: widths.append(y.shape[-1]))
        >>> with open_attention(attention):
        ...     _ = attention(x, x, x)
        >>> widths
        [4]
    """
    wanted = None if consumers is None else set(consumers)
    opened: list[nn.MultiheadAttention] = []
    try:
        for path, module in model.named_modules():
            projection = f"{path}.out_proj" if path else "out_proj"
            if wanted is not None and projection not in wanted:
                continue
            if isinstance(module, nn.MultiheadAttention) and _can_open(module):
                module.__dict__["forward"] = partial(attention_forward, module)
                opened.append(module)
        yield
    finally:
        for module in opened:
            if _fits_torch(module):  # else it was cut in the block and needs the other one
                module.__dict__.pop("forward", None)


@contextmanager
def slow_path() -> Iterator[None]:
    """Switch torch's fused encoder operator off in the block, which hides what runs inside it.

    Example:
        >>> with slow_path():
        ...     torch.backends.mha.get_fastpath_enabled()
        False
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def fit_attentions(model: nn.Module, tensors: Iterable[str]) -> None:
    """:func:`fit_attention` of every attention that holds one of some tensors.

    Args:
        model: Module from which the tensors are named.
        tensors: Names of tensors that were replaced by others, of another size maybe.
    """
    parents = {name.rpartition(".")[0] for name in tensors}
    for path in sorted(parents | {parent.rpartition(".")[0] for parent in parents}):
        module = model.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            fit_attention(module, path)


def fit_attention(module: nn.MultiheadAttention, name: str = "") -> None:
    """Give an attention the ``forward`` that its present sizes need, for good.

    Where torch's own can compute them it is torch's own. The other one is kept by copies, and
    ``nn.TransformerEncoderLayer`` then never passes the weights to its fused operator.

    Args:
        module: The attention; ``num_heads`` must be that of its weights, ``head_dim`` as built.
        name: Its path, for the message.

    Raises:
        PruningError: If it has a ``forward`` of its own, which could not be replaced.

    Example:
        >>> attention = nn.MultiheadAttention(4, 2)
        >>> attention.in_proj_weight = nn.Parameter(attention.in_proj_weight[:, :3])
        >>> attention.out_proj.weight = nn.Parameter(attention.out_proj.weight[:3])
        >>> attention.out_proj.bias = nn.Parameter(attention.out_proj.bias[:3])
        >>> fit_attention(attention)
        >>> x = torch.zeros(5, 1, 3)
        >>> attention(x, x, x)[0].shape
        torch.Size([5, 1, 3])
    """
    if _fits_torch(module):
        if is_open(module):
            del module.__dict__["forward"]
        module._qkv_same_embed_dim = module.in_proj_weight is not None
        return
    if not is_open(module) and not _can_open(module):
        raise PruningError(
            f"{name or type(module).__name__!r} has a forward of its own, {module.forward!r:.80}; "
            "expected that of nn.MultiheadAttention, because the cut must replace it. Exclude its "
            "groups."
        )
    module.__dict__["forward"] = partial(attention_forward, module)
    module._qkv_same_embed_dim = False  # else fused operators would take the weights


def is_open(module: nn.Module) -> bool:
    """Whether an attention calls its output projection as a module."""
    forward = module.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is attention_forward


def _can_open(module: nn.MultiheadAttention) -> bool:
    """Whether an attention has the ``forward`` of torch."""
    plain = type(module).forward is nn.MultiheadAttention.forward
    return plain and "forward" not in module.__dict__


def _fits_torch(module: nn.MultiheadAttention) -> bool:
    """Whether all sizes are what torch's own ``forward`` asserts and assumes."""
    width, (query, _, value) = module.embed_dim, _rows(module)
    out: Any = module.out_proj.weight
    same = {query, value, *out.shape, module.num_heads * module.head_dim} == {width}
    return same and _inputs(module)[0] == width


def _rows(module: nn.MultiheadAttention) -> tuple[int, int, int]:
    """Rows of the projections of queries, keys and values."""
    if module.in_proj_weight is None:
        given: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        query, key, value = (len(weight) for weight in given)
        return query, key, value
    value = module.out_proj.weight.shape[1]  # of values, which may be narrower than the others
    query = (len(module.in_proj_weight) - value) // 2
    return query, query, value


def _inputs(module: nn.MultiheadAttention) -> tuple[int, int, int]:
    """Columns of the projections of queries, keys and values."""
    if module.in_proj_weight is not None:
        return (module.in_proj_weight.shape[1],) * 3
    given: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    query, key, value = (weight.shape[1] for weight in given)
    return query, key, value


def attention_forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The ``forward`` of ``nn.MultiheadAttention``, with sizes taken from the weights.

    Scores are divided by the root of ``head_dim``, the size of a head as built.

    Args:
        module: The attention.
        query: As for ``nn.MultiheadAttention``, like all that follow.
        key: The same.
        value: The same.
        key_padding_mask: The same.
        need_weights: The same.
        attn_mask: The same; one of three dimensions has an entry for each head there is now.
        average_attn_weights: The same.
        is_causal: The same.

    Raises:
        PruningError: If a mask has entries for another number of heads.
        RuntimeError: If ``is_causal`` is given without a mask, as by torch.
    """
    if query.is_nested:  # of nn.TransformerEncoder, which leaves out the padding
        lengths = [len(part) for part in query.unbind()]
        x = torch.nested.to_padded_tensor(query, 0.0)
        places = torch.arange(x.shape[1], device=x.device)
        padding = places >= torch.tensor(lengths, device=x.device)[:, None]
        given = (padding, need_weights, attn_mask, average_attn_weights, is_causal)
        padded, scores = attention_forward(module, x, x, x, *given)
        parts = [row[:length] for row, length in zip(padded, lengths, strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=query.layout), scores
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched, rows_first = query.ndim == 3, module.batch_first or query.ndim == 2
    q, k, v = _projected(module, query, key, value)
    if not batched:
        q, k, v = q[None], k[None], v[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not rows_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if module.bias_k is not None and module.bias_v is not None:
        k = torch.cat([k, module.bias_k.expand(len(k), 1, -1)], 1)
        v = torch.cat([v, module.bias_v.expand(len(v), 1, -1)], 1)
    if not module.num_heads:  # all heads were removed: the bias of the projection is left
        output = module.out_proj(v if rows_first else v.transpose(0, 1))
        return output if batched else output[0], None
    q, k, v = (x.view(*x.shape[:2], module.num_heads, -1).transpose(1, 2) for x in (q, k, v))
    if module.add_zero_attn:
        k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
    causal = is_causal and key_padding_mask is None and not need_weights
    mask = _mask(module, q, k, None if causal else attn_mask, key_padding_mask)
    dropout, scale = module.dropout if module.training else 0.0, module.head_dim**-0.5
    weights = None
    if need_weights:
        scores = (q * scale) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        if dropout > 0:
            weights = functional.dropout(weights, dropout)
        heads = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        heads = functional.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=causal, scale=scale
        )
    heads = heads.permute(0, 2, 1, 3) if rows_first else heads.permute(2, 0, 1, 3)
    output = module.out_proj(heads.flatten(-2) if batched else heads[0].flatten(-2))
    return output, weights if batched or weights is None else weights[0]


def _projected(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> Iterable[Tensor]:
    """Queries, keys and values, in the order of the inputs."""
    sizes, bias, weight = [*_rows(module)], module.in_proj_bias, module.in_proj_weight
    if weight is not None and query is key is value:
        return torch.split(functional.linear(query, weight, bias), sizes, -1)
    weights: Any = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights = weights if weight is None else torch.split(weight, sizes)
    biases: Any = (None, None, None) if bias is None else torch.split(bias, sizes)
    return [
        functional.linear(x, w, b)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    ]


def _mask(
    module: nn.MultiheadAttention,
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor | None:
    """What is added to the scores ``(rows, heads, queries, keys)``; None for nothing."""
    parts = []
    if attn_mask is not None:
        heads = module.num_heads
        if attn_mask.ndim == 3 and len(attn_mask) not in (1, len(q) * heads):
            raise PruningError(
                f"attn_mask has shape {tuple(attn_mask.shape)}; expected {len(q) * heads} "
                f"matrices, for {len(q)} examples and the {heads} heads there are now. Pass one of "
                "two dimensions, or select the entries of the heads that were kept."
            )
        added = _added(attn_mask, q)
        per_head = attn_mask.ndim == 3 and len(attn_mask) > 1
        parts.append(added.view(len(q), heads, *added.shape[1:]) if per_head else added)
    if key_padding_mask is not None:
        parts.append(_added(key_padding_mask, q)[:, None, None])
    # Keys that were added behind the others, a bias or zeros, are never masked.
    parts = [functional.pad(part, (0, k.shape[2] - part.shape[-1])) for part in parts]
    if len(parts) < 2:
        return parts[0] if parts else None
    return parts[0] + parts[1]


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask that is added to scores, of one that is true where attention is not allowed."""
    if mask.is_floating_point():
        return mask
    return like.new_zeros(mask.shape).masked_fill(mask.bool(), float("-inf"))
