"""Parameters and buffers of a model by name and by identity, and their replacement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_mi_prune.core.empty_linear import linear_at, modules_of, parameters_of
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.spilling import in_file
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import kept_positions

__all__ = [
    "is_saved",
    "keep_whole",
    "owners",
    "parameter_of",
    "parameters_in_files",
    "replace_tensors",
    "set_parameter",
    "tensor_of",
    "tensors_of",
    "unsaved_at",
    "unsaved_buffers",
]

WHOLE_BUFFERS = "whole_buffers"
"""Attribute of a module with those of its buffers, as built, that are cut but not saved."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, also those without entries, by every name they have."""
    buffers = model.named_buffers(remove_duplicate=False)
    return {**parameters_of(model), **dict(buffers)}


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Modules and attributes that hold each parameter and buffer, by its ``id``."""
    found: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for _, module in modules_of(model):
        for held in (module._parameters, module._buffers):
            for attribute, tensor in held.items():
                if tensor is not None:
                    found[id(tensor)].append((module, attribute))
    return found


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a name, if it can be cut.

    Raises:
        PruningError: If there is none, or a parameter cannot be cut (:func:`parameter_of`).
    """
    module, attribute = _holder(model, name)
    buffer = module._buffers.get(attribute)
    return parameter_of(model, name) if buffer is None else buffer


def parameter_of(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of a name, if it can be cut.

    Raises:
        PruningError: If there is none, it is not a plain parameter, or it has hooks.
    """
    module, attribute = _holder(model, name)
    if is_parametrized(module, attribute):
        raise PruningError(
            f"{name!r} is computed by a parametrization; expected a plain torch.nn.Parameter. "
            "Remove it first (torch.nn.utils.parametrize.remove_parametrizations)."
        )
    parameter = module._parameters.get(attribute)
    if parameter is None:
        raise PruningError(f"The model has no parameter {name!r}; was it replaced?")
    if type(parameter) is not nn.Parameter:
        raise PruningError(
            f"{name!r} is a {type(parameter).__name__}; expected a plain torch.nn.Parameter. "
            "Prune before quantizing or sharding."
        )
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise PruningError(
            f"{name!r} has gradient hooks, which would remain on the old parameter. Remove them "
            "before the cut and register them again after it."
        )
    return parameter


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    *path, attribute = name.split(".")
    module: nn.Module | None = model
    for part in path:  # get_submodule takes ten times as long, and this runs for every tensor
        module = None if module is None else module._modules.get(part)
    if module is None:
        raise PruningError(f"The model has no parameter {name!r}; was it replaced?")
    return linear_at(module), attribute


def replace_tensors(model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Replace parameters and buffers in all modules that hold them; after an error none is.

    Args:
        model: The module that holds them.
        pairs: Old and new tensors.
    """
    homes = owners(model)
    moves = [(module, name, *pair) for pair in pairs for module, name in homes.get(id(pair[0]), ())]
    try:
        for module, name, _, new in moves:
            setattr(module, name, new)
    except BaseException:
        for module, name, old, _ in moves:
            held = module._parameters if name in module._parameters else module._buffers
            held[name] = old  # type: ignore[assignment]  # as it was
        raise


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Give a module another parameter, which no other module shares, without a gradient.

    Args:
        module: A module of a copy.
        name: Name of the parameter in it.
        value: Its new value.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> set_parameter(layer, "weight", torch.ones(1, 1))
        >>> layer.weight
        Parameter containing:
        tensor([[1.]])
    """
    module._parameters[name] = nn.Parameter(value, requires_grad=False)


@contextmanager
def parameters_in_files(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A block in which parameters are in temporary files, so that smaller ones fit beside them.

    Those that the model still has at its end return to memory.

    Args:
        model: The model.
        parameters: Some of its parameters.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> with parameters_in_files(layer, layer.parameters()):
        ...     pass
    """
    moved = list(parameters)
    try:
        for parameter in moved:
            parameter.data = in_file(parameter.data)
        yield
    finally:
        present = {id(parameter) for parameter in model.parameters()}
        for parameter in moved:
            if id(parameter) in present:
                parameter.data = parameter.data.clone()


def unsaved_buffers(model: nn.Module) -> frozenset[str]:
    """Names of the buffers that no state dict holds.

    Example:
        >>> net = nn.Identity()
        >>> net.register_buffer("steps", torch.zeros(3), persistent=False)
        >>> sorted(unsaved_buffers(net))
        ['steps']
    """
    return frozenset(
        f"{path}.{name}" if path else name
        for path, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    )


def is_saved(model: nn.Module, name: str) -> bool:
    """Whether a tensor is in the state dict: a parameter or a persistent buffer."""
    module, attribute = _holder(model, name)
    return attribute not in module._non_persistent_buffers_set


def keep_whole(model: nn.Module, groups: Sequence[DependencyGroup]) -> None:
    """Keep buffers that are not saved as they are now, if they are as built and groups cut them.

    A cut does not change their values, and no checkpoint has them: this is what they can be made
    from for any other plan.
    """
    for group in groups:
        for s in group.tensors:
            if not is_saved(model, s.tensor):
                module, attribute = _holder(model, s.tensor)
                buffer = module._buffers.get(attribute)
                if buffer is not None and tuple(buffer.shape) == s.shape:
                    vars(module).setdefault(WHOLE_BUFFERS, {}).setdefault(attribute, buffer)


def unsaved_at(
    model: nn.Module, groups: Sequence[DependencyGroup], kept: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Buffers that are cut but not saved, at a plan, made from those as built.

    Args:
        model: Module from which the groups are named.
        groups: Groups whose buffers are wanted; :func:`keep_whole` was called with them.
        kept: Units of every group that stay, as numbered when built.

    Raises:
        PruningError: If a buffer was cut before, and what it was as built is not known.
    """
    found: dict[str, Tensor] = {}
    done: set[tuple[str, int]] = set()
    for group in groups:
        for s in group.tensors:
            if is_saved(model, s.tensor) or (s.tensor, s.dim) in done:
                continue
            done.add((s.tensor, s.dim))
            module, attribute = _holder(model, s.tensor)
            present = module._buffers[attribute]
            whole = vars(module).get(WHOLE_BUFFERS, {}).get(attribute)
            if whole is None:
                raise PruningError(
                    f"The buffer {s.tensor!r} is not of shape {s.shape} as built, and no state "
                    "dict holds it, so it cannot be given another width. Build the model anew."
                )
            value = found.get(s.tensor, whole)
            places = torch.tensor(kept_positions(s.layout, kept, group.all_widths({})))
            home = value.device if present is None else present.device
            found[s.tensor] = value.to(home).index_select(s.dim, places.long().to(home))
    return found
