"""Which positions of the call that runs now are padding."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.calibration.calls import RecordedCall, first_call

__all__ = [
    "Padding",
    "add_masks",
    "attention_mask_of",
    "has_attention",
    "pad_nested",
    "padded_encoders",
]

# Arguments of torch's own modules: the input, and the mask of its padding.
_NAMES = {
    nn.TransformerEncoder: ("src", "src_key_padding_mask"),
    nn.TransformerEncoderLayer: ("src", "src_key_padding_mask"),
    nn.TransformerDecoder: ("tgt", "tgt_key_padding_mask"),
    nn.TransformerDecoderLayer: ("tgt", "tgt_key_padding_mask"),
    nn.MultiheadAttention: ("query", "key_padding_mask"),
}
_KINDS = tuple(_NAMES)


def attention_mask_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The argument ``attention_mask`` of a call, if it is a tensor."""
    given = _bound(module, args, kwargs).get("attention_mask")
    return given if isinstance(given, Tensor) else None


def has_attention(model: nn.Module) -> bool:
    """Whether torch's own attention is in a model, which is given masks of padding itself.

    Example:
        >>> has_attention(nn.Sequential(nn.MultiheadAttention(4, 2))), has_attention(nn.ReLU())
        (True, False)
    """
    return any(isinstance(module, _KINDS) for module in model.modules())


class _Known(NamedTuple):
    real: Tensor | None = None
    positions_first: bool = False


class Padding:
    """The masks of padding that torch's own attention modules receive in the call that runs now.

    A ``src_key_padding_mask``, ``tgt_key_padding_mask`` or the ``key_padding_mask`` of
    self-attention applies from the moment a module receives it, to all activations with that many
    examples and positions; so does the order of these two dimensions (``batch_first``). Calls in
    different threads are kept apart.

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
        """Put hooks on all modules that receive such masks, one after another."""
        for module in model.modules():
            if isinstance(module, _KINDS):
                names = next(n for kind, n in _NAMES.items() if isinstance(module, kind))
                yield module.register_forward_pre_hook(self._hook(*names), with_kwargs=True)

    def start_call(self) -> None:
        """Forget the masks of the previous call."""
        self._known.pop(threading.get_ident(), None)

    def clear(self) -> None:
        """Forget the masks of all calls."""
        self._known.clear()

    def real(self, x: Tensor) -> Tensor | None:
        """The positions of activations that are not padding, in their order; None if not known."""
        return self._of(x).real

    def positions_first(self, x: Tensor) -> bool:
        """Whether activations are ``(positions, rows, ...)``."""
        return self._of(x).positions_first

    def rows_first(self, x: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Activations with the examples in their first dimension, and the mask of real positions.

        Args:
            x: Activations; nested ones are returned as one long example without padding.
            given: ``attention_mask`` of the call, used where no module received a mask.
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
            x: Activations.
            rows: Examples of the call, if they come first in its arguments.
        """
        known = self._of(x)
        if known.positions_first:  # the mask then also shows the order in the arguments
            real = torch.ones(x.shape[:2], dtype=torch.bool) if known.real is None else known.real
            return real.mT
        fits = known.real is not None and known.real.ndim == 2 and len(known.real) == rows
        return known.real if fits else None

    def _of(self, x: Tensor) -> _Known:
        known = {} if x.is_nested else self._known.get(threading.get_ident(), {})
        return known.get(tuple(x.shape[:-1]), _Known()) if known else _Known()

    def _hook(self, input_name: str, mask_name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = _bound(module, args, kwargs)
            x, mask = given.get(input_name), given.get(mask_name)
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
            known = self._known.setdefault(threading.get_ident(), {})
            known[tuple(x.shape[:-1])] = _Known(real, positions_first)

        return hook


def add_masks(
    model: nn.Module,
    padding: Padding,
    calls: dict[str, RecordedCall],
    examples: dict[str, RecordedCall],
    x: Tensor,
) -> None:
    """Add masks that only modules inside received to the calls that run now.

    Args:
        model: Module from which the calls are named.
        padding: The masks that modules inside received.
        calls: The calls, by path.
        examples: Their first examples; they are selected anew, as the mask may show another order.
        x: Activations inside the calls.
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
    """Positions without padding, by a mask that is true at padding or added to the scores."""
    if padding.is_floating_point():
        return padding > torch.finfo(padding.dtype).min / 2
    return ~padding.bool()


def _batch_first(module: nn.Module) -> bool | None:
    """``batch_first`` of one of torch's own modules, if it has one."""
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = next(iter(module.layers), module)
    found = getattr(getattr(module, "self_attn", module), "batch_first", None)
    return found if isinstance(found, bool) else None


def pad_nested(model: nn.Module) -> Iterator[RemovableHandle]:
    """Put hooks on torch's encoder layers that convert nested inputs to padded ones and back.

    With a mask of padding, torch's encoder passes nested tensors to its layers, which only one
    fused operator supports. Torch does not use it where a layer has hooks, so the layer fails.
    With these hooks each layer runs on padded tensors and returns nested ones, so that the output
    of the encoder, zeros at the padding included, is the same as without hooks. No global setting
    changes.

    Put these hooks on after all others, which then receive the padded tensors.
    """
    widths: dict[Any, int] = {}
    lengths: dict[tuple[Any, nn.Module], tuple[list[int], torch.layout] | None] = {}

    def enter(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("src")
        if isinstance(x, Tensor) and not x.is_nested and x.ndim == 3:
            widths[threading.get_ident()] = x.shape[1]

    def leave(*_: object) -> None:
        widths.pop(threading.get_ident(), None)

    def pad(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(layer.forward).bind_partial(*args, **kwargs)
        x = bound.arguments.get("src")
        lengths[threading.get_ident(), layer] = None
        if not isinstance(x, Tensor) or not x.is_nested:
            return None
        if "src_key_padding_mask" not in bound.signature.parameters:
            return None
        sizes = [len(part) for part in x.unbind()]
        width = max([widths.get(threading.get_ident(), 0), *sizes])
        shape = (len(sizes), width, x.size(-1))
        lengths[threading.get_ident(), layer] = (sizes, x.layout)
        bound.arguments["src"] = torch.nested.to_padded_tensor(x, 0.0, shape)
        places = torch.arange(width, device=x.device)
        padding = places >= torch.tensor(sizes, device=x.device)[:, None]
        bound.arguments["src_key_padding_mask"] = padding
        return bound.args, bound.kwargs

    def nest(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        given = lengths.pop((threading.get_ident(), layer), None)
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
