"""Replacements of ``forward`` for modules without units, and for arguments as wide as built."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.empty_linear import KEPT_UNITS
from lightning_mi_prune.graph.groups import EmptyForward, UnitArgument

__all__ = [
    "forward_without_units",
    "is_cut_forward",
    "set_forward_without_units",
    "unit_argument_forward",
]


def forward_without_units(
    module: nn.Module, empty_forward: EmptyForward, *inputs: Any, **options: Any
) -> Any:
    """The ``forward`` of a module without units: a tensor without entries, or the consumer's bias.

    All parameters take part, with zero gradients, so that DDP reports none as unused.

    Args:
        module: The module.
        empty_forward: Its submodules, named from it.
        inputs: Positional arguments; the hidden state is the first.
        options: Keyword arguments; only tensors that need gradients are used.
    """
    hidden = inputs[0] if inputs else options["hidden_states"]
    projected = [module.get_submodule(path)(hidden) for path in empty_forward.projections]
    output = torch.stack(projected).sum(0)
    for other in (*inputs[1:], *options.values()):
        if isinstance(other, Tensor) and other.requires_grad:
            output = output + other.flatten()[:0].sum()
    if empty_forward.consumer is not None:
        output = module.get_submodule(empty_forward.consumer)(output)
    if empty_forward.dropout is not None:
        output = module.get_submodule(empty_forward.dropout)(output)
    if empty_forward.norm is not None:
        output = module.get_submodule(empty_forward.norm)(hidden + output)
    return (output, None) if empty_forward.pair else output


def set_forward_without_units(model: nn.Module, empty_forward: EmptyForward) -> None:
    """Replace the ``forward`` of a module that cannot run without units.

    Args:
        model: Module from which the paths are named.
        empty_forward: The module, and what its outputs are made of then.
    """
    path = empty_forward.module

    def below(other: str) -> str:
        return other[len(path) + 1 :]

    module = model.get_submodule(path)
    inside = empty_forward.prefixed(below)
    module.__dict__["forward"] = partial(forward_without_units, module, inside)


def unit_argument_forward(
    module: nn.Module, unit_argument: UnitArgument, *inputs: Any, **options: Any
) -> Any:
    """The ``forward`` of a module that selects the entries of its kept units from one argument.

    Args:
        module: The module; its buffer ``kept_units`` holds the kept units, as numbered when built.
        unit_argument: The argument.
        inputs: Positional arguments.
        options: Keyword arguments.
    """
    forward = type(module).forward
    call = inspect.signature(forward).bind(module, *inputs, **options)
    whole = call.arguments.get(unit_argument.argument)
    if isinstance(whole, Tensor):
        kept = module.get_buffer(KEPT_UNITS)
        call.arguments[unit_argument.argument] = whole.index_select(unit_argument.dim, kept)
    return forward(*call.args, **call.kwargs)


def is_cut_forward(forward: Any) -> bool:
    """Whether the ``forward`` of a module instance was replaced by a cut."""
    return isinstance(forward, partial) and forward.func in (
        forward_without_units,
        unit_argument_forward,
    )
