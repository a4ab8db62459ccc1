"""STAND IN what a module does when its units are gone, or need a part of what all layers share."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import Selects, Silence

__all__ = ["KEPT_UNITS", "is_ours", "selecting", "silent"]

KEPT_UNITS = "kept_units"


def silent(module: nn.Module, silence: Silence, *inputs: Any, **options: Any) -> Any:
    """The ``forward`` of a module without units: a tensor without entries, or the reader's bias.

    All parameters take part with gradients of zero entries or zero value, so that nothing is
    reported as unused.

    Args:
        module: The module.
        silence: What it holds, named from it.
        inputs: What the module is called with; the stream comes first.
        options: Likewise; only tensors that need gradients matter.
    """
    stream = inputs[0] if inputs else options["hidden_states"]
    output = torch.stack([module.get_submodule(p)(stream) for p in silence.projections]).sum(0)
    for other in (*inputs[1:], *options.values()):
        if isinstance(other, Tensor) and other.requires_grad:
            output = output + other.flatten()[:0].sum()
    if silence.reader is not None:
        output = module.get_submodule(silence.reader)(output)
    if silence.dropout is not None:
        output = module.get_submodule(silence.dropout)(output)
    if silence.norm is not None:
        output = module.get_submodule(silence.norm)(stream + output)
    return (output, None) if silence.pair else output


def selecting(module: nn.Module, selects: Selects, *inputs: Any, **options: Any) -> Any:
    """The ``forward`` of a module that takes its own units out of one argument.

    Args:
        module: The module; its buffer ``kept_units`` holds the positions as built.
        selects: The argument.
        inputs: What the module is called with.
        options: Likewise.
    """
    forward = type(module).forward
    call = inspect.signature(forward).bind(module, *inputs, **options)
    whole = call.arguments.get(selects.argument)
    if isinstance(whole, Tensor):
        kept = module.get_buffer(KEPT_UNITS)
        call.arguments[selects.argument] = whole.index_select(selects.dim, kept)
    return forward(*call.args, **call.kwargs)


def is_ours(forward: Any) -> bool:
    """Whether a ``forward`` on a module itself, not on its class, was put there by a cut."""
    return isinstance(forward, partial) and forward.func in (silent, selecting)
