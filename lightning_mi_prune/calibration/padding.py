"""Which positions of a running call are padding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.calibration.calls import RecordedCall, first_call

__all__ = [
    "Padding",
    "attention_mask_of",
    "complete",
    "pad_nested",
    "padded_encoders",
]

# What torch's own modules call their input, and the mask of its padding.
_ENCODERS = (nn.TransformerEncoder, nn.TransformerEncoderLayer)


_DECODERS = (nn.TransformerDecoder, nn.TransformerDecoderLayer)


_NAMES = {
    **dict.fromkeys(_ENCODERS, ("src", "src_key_padding_mask")),
    **dict.fromkeys(_DECODERS, ("tgt", "tgt_key_padding_mask")),
    nn.MultiheadAttention: ("query", "key_padding_mask"),
}


def attention_mask_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The argument ``attention_mask`` of a call, if it is a tensor."""
    given = _bound(module, args, kwargs).get("attention_mask")
    return given if isinstance(given, Tensor) else None


class _Known(NamedTuple):
    real: Tensor | None
    positions_first: bool


class Padding:
    """What torch's own modules for attention were told of the padding of the call that runs.

    ``src_key_padding_mask``, ``tgt_key_padding_mask`` and the ``key_padding_mask`` of
    self-attention count from the moment a module gets them, for all activations of that many
    examples and positions; so does the order of these two dimensions (``batch_first``). Calls in
    different threads and greenlets are kept apart.

    Example:
        >>> layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        >>> padding, masks = Padding(), torch.tensor([[False, False, True]])
        >>> handles = [*padding.attach(layer)]
        >>> _ = layer(torch.zeros(1, 3, 4), src_key_padding_mask=masks)
        >>> padding.real(torch.zeros(1, 3, 8))
        tensor([[ True,  True, False]])
    """

    def __init__(self) -> None:
        self._known: dict[Any, dict[tuple[int, ...], _Known]] = {}

    def attach(self, model: nn.Module) -> Iterator[RemovableHandle]:
        """Put hooks on all modules that are told of padding, one after another."""
        for module in model.modules():
            names = next((n for kind, n in _NAMES.items() if isinstance(module, kind)), None)
            if names is not None:
                yield module.register_forward_pre_hook(self._hook(*names), with_kwargs=True)

    def forget(self) -> None:
        """Another call begins."""
        self._known.pop(getcurrent(), None)

    def clear(self) -> None:
        """Forget all calls."""
        self._known.clear()

    def real(self, x: Tensor) -> Tensor | None:
        """The positions of activations that are not padding, as they lie; None: not known."""
        return self._of(x).real

    def positions_first(self, x: Tensor) -> bool:
        """Whether activations have the positions in their first dimension, then the examples."""
        return self._of(x).positions_first

    def rows_first(self, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Activations with the examples in their first dimension, and the mask of real positions.

        Args:
            x: Activations as they lie; nested ones come back as one long example, all of it real.
            given: ``attention_mask`` of the call, for where nothing else is known.
        """
        if x.is_nested:
            return torch.cat([part.reshape(-1, part.shape[-1]) for part in x.unbind()]), None
        real, positions_first = self._of(x)
        if positions_first:
            x, real = x.transpose(0, 1), None if real is None else real.mT
        if real is None and given is not None and given.shape == x.shape[:-1]:
            return x, given
        return x, real

    def call_mask(self, x: Tensor, rows: int) -> Tensor | None:
        """The mask ``(rows, positions)`` of the call that the activations ``x`` belong to.

        Args:
            x: Activations as they lie.
            rows: Examples of the call, if they come first in its arguments.
        """
        known = self._of(x)
        if known.positions_first:  # then the mask says how the arguments lie, too
            real = torch.ones(x.shape[:2], dtype=torch.bool) if known.real is None else known.real
            return real.mT
        fits = known.real is not None and known.real.ndim == 2 and len(known.real) == rows
        return known.real if fits else None

    def _of(self, x: Tensor) -> _Known:
        known = {} if x.is_nested else self._known.get(getcurrent(), {})
        return known.get(tuple(x.shape[:-1]), _NOTHING) if known else _NOTHING

    def _hook(self, stream: str, padding: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _bound(module, args, kwargs)
            x, mask = given.get(stream), given.get(padding)
            if not isinstance(x, Tensor) or x.is_nested or given.get("key", x) is not x:
                return
            batch_first = _batch_first(module)
            if batch_first is None:
                return
            positions_first = not batch_first and x.ndim == 3
            real = None
            if isinstance(mask, Tensor):
                real = _is_real(mask)
                real = real.mT if positions_first else real
                real = real if real.shape == x.shape[:-1] else None
            known = self._known.setdefault(getcurrent(), {})
            known[tuple(x.shape[:-1])] = _Known(real, positions_first)

        return hook


_NOTHING = _Known(None, False)


def complete(
    model: nn.Module,
    padding: Padding,
    calls: dict[str, RecordedCall],
    examples: dict[str, RecordedCall],
    x: Tensor,
) -> None:
    """Give calls that are under way the mask that was not among their arguments.

    Args:
        model: Module from which the calls are named.
        padding: What was found inside them.
        calls: The calls, by path.
        examples: Their first examples, which are taken again where they lie otherwise.
        x: Activations inside them.
    """
    for path, call in list(calls.items()):
        mask = None if call.mask is not None else padding.call_mask(x, call.rows)
        if mask is None:
            continue
        calls[path] = replace(call, mask=mask)
        if path in examples and examples[path].mask is None:
            module = model.get_submodule(path)
            examples[path] = first_call(module, call.args, call.kwargs, mask)


def _bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments


def _is_real(padding: Tensor) -> Tensor:
    """Where a mask of padding, true or added to the scores, has none."""
    if padding.is_floating_point():
        return padding > torch.finfo(padding.dtype).min / 2
    return ~padding.bool()


def _batch_first(module: nn.Module) -> bool | None:
    """Whether the examples come first in the input of one of torch's own modules."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = next(iter(module.layers), module)
    found = getattr(getattr(module, "self_attn", module), "batch_first", None)
    return found if isinstance(found, bool) else None


def pad_nested(model: nn.Module) -> Iterator[RemovableHandle]:
    """Put hooks on torch's encoder layers that let them run on nested tensors, as padded ones.

    With a mask of padding, torch's encoder hands its layers nested tensors, which they can only
    take as one opaque operator; that is off wherever a layer has hooks, and the layer fails. Here
    each layer runs on padded tensors and hands on nested ones, so that what comes out of the
    encoder, zeros at the padding included, is what it is without hooks. No switch is touched.

    To be put on after all other hooks: they then see the padded tensors.
    """
    widths: dict[Any, int] = {}
    lengths: dict[tuple[Any, nn.Module], tuple[list[int], torch.layout] | None] = {}

    def enter(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("src")
        if isinstance(x, Tensor) and not x.is_nested and x.ndim == 3:
            widths[getcurrent()] = x.shape[1]

    def leave(*_: object) -> None:
        widths.pop(getcurrent(), None)

    def pad(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(layer.forward).bind_partial(*args, **kwargs)
        x = bound.arguments.get("src")
        lengths[getcurrent(), layer] = None
        if not isinstance(x, Tensor) or not x.is_nested:
            return None
        if "src_key_padding_mask" not in bound.signature.parameters:
            return None
        sizes = [len(part) for part in x.unbind()]
        width = max([widths.get(getcurrent(), 0), *sizes])
        shape = (len(sizes), width, x.size(-1))
        lengths[getcurrent(), layer] = (sizes, x.layout)
        bound.arguments["src"] = torch.nested.to_padded_tensor(x, 0.0, shape)
        places = torch.arange(width, device=x.device)
        padding = places >= torch.tensor(sizes, device=x.device)[:, None]
        bound.arguments["src_key_padding_mask"] = padding
        return bound.args, bound.kwargs

    def nest(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        given = lengths.pop((getcurrent(), layer), None)
        if given is None:
            return None
        parts = [row[:size] for row, size in zip(output, given[0], strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=given[1])

    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            yield module.register_forward_pre_hook(enter, with_kwargs=True)
            yield module.register_forward_hook(leave)
        elif isinstance(module, nn.TransformerEncoderLayer):
            yield module.register_forward_pre_hook(pad, with_kwargs=True, prepend=True)
            yield module.register_forward_hook(nest)


@contextmanager
def padded_encoders(model: nn.Module) -> Iterator[None]:
    """Hooks of :func:`pad_nested`, for as long as the block lasts."""
    handles: list[RemovableHandle] = []
    try:
        handles.extend(pad_nested(model))
        yield
    finally:
        for handle in handles:
            handle.remove()
