"""The ``forward`` of modules whose units are all gone, or that take their units out of an argument."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.empty_linear import KEPT_UNITS
from lightning_mi_prune.discovery.groups import EmptyForward, UnitArgument

__all__ = [
    "forward_without_units",
    "is_cut_forward",
    "unit_argument_forward",
]


def forward_without_units(
    module: nn.Module, empty_forward: EmptyForward, *inputs: Any, **options: Any
) -> Any:
    """The ``forward`` of a module without units: a tensor without entries, or the consumer's bias.

    All parameters take part with gradients of zero entries or zero value, so that nothing is
    reported as unused.

    Args:
        module: The module.
        empty_forward: What it holds, named from it.
        inputs: What the module is called with; the stream comes first.
        options: Likewise; only tensors that need gradients matter.
    """
    stream = inputs[0] if inputs else options["hidden_states"]
    output = torch.stack([module.get_submodule(p)(stream) for p in empty_forward.projections]).sum(
        0
    )
    for other in (*inputs[1:], *options.values()):
        if isinstance(other, Tensor) and other.requires_grad:
            output = output + other.flatten()[:0].sum()
    if empty_forward.consumer is not None:
        output = module.get_submodule(empty_forward.consumer)(output)
    if empty_forward.dropout is not None:
        output = module.get_submodule(empty_forward.dropout)(output)
    if empty_forward.norm is not None:
        output = module.get_submodule(empty_forward.norm)(stream + output)
    return (output, None) if empty_forward.pair else output


def unit_argument_forward(
    module: nn.Module, selects: UnitArgument, *inputs: Any, **options: Any
) -> Any:
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


def is_cut_forward(forward: Any) -> bool:
    """Whether a ``forward`` on a module itself, not on its class, was put there by a cut."""
    return isinstance(forward, partial) and forward.func in (
        forward_without_units,
        unit_argument_forward,
    )
