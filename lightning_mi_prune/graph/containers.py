"""Containers whose layers run one after another."""

from __future__ import annotations

from torch import nn

from lightning_mi_prune.core.empty_linear import module_at
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.graph.groups import LayerStack

__all__ = [
    "layer_container",
    "layer_paths",
    "outermost_part",
    "stack_at",
]


def layer_container(model: nn.Module, stack: str) -> nn.ModuleList | nn.Sequential:
    """The container of a stack; its layers are renumbered when one is removed.

    Args:
        model: Module from which the stack is named.
        stack: Path of the container.

    Raises:
        PruningError: If the path is not an ``nn.ModuleList`` or ``nn.Sequential`` of different,
            numbered layers.

    Example:
        >>> len(layer_container(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ""))
        2
    """
    try:
        container = model.get_submodule(stack)
    except AttributeError as error:
        children = [name for name, _ in model.named_children()]
        raise PruningError(
            f"{stack!r} is no module of {type(model).__name__}; expected a path below {children}."
        ) from error
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise PruningError(
            f"{stack!r} is a {type(container).__name__}; expected an nn.ModuleList or an "
            "nn.Sequential whose layers run one after another."
        )
    names = list(container._modules)
    if names != [str(index) for index in range(len(names))]:
        raise PruningError(
            f"The layers of {stack!r} are named {names[:4]}; expected numbers from 0. Build the "
            "container from a plain list."
        )
    if len(set(map(id, container))) < len(container):
        raise PruningError(f"{stack!r} holds a layer twice; expected different layers.")
    return container


def layer_paths(model: nn.Module, stack: str) -> list[str]:
    """Paths of the layers of a container, bottom to top.

    Raises:
        PruningError: If the path is not a container of two or more layers of one class.

    Example:
        >>> layer_paths(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "")
        ['0', '1']
    """
    container = layer_container(model, stack)
    kinds = sorted({type(layer).__name__ for layer in container})
    if len(kinds) != 1 or len(container) < 2:
        raise PruningError(
            f"{stack!r} holds {counted(len(container), 'layer')} of {kinds}; expected two or more, "
            "all of one class."
        )
    return [f"{stack}.{index}" if stack else str(index) for index in range(len(container))]


def stack_at(model: nn.Module, path: str) -> LayerStack | None:
    """The stack of the container at a path, or None if there is no container.

    Example:
        >>> stack_at(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "").size
        2
    """
    container = module_at(model, path)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)) or not len(container):
        return None
    # A ModuleList is not called itself, but its parent is.
    scope = path if isinstance(container, nn.Sequential) else path.rpartition(".")[0]
    return LayerStack(name=path, size=len(container), network=scope, scope=scope)


def outermost_part(model: nn.Module, path: str) -> str:
    """Path of the outermost part of a model around a layer or parameter; "" for none.

    It is what runs where the model itself is not called: steps call its parts one by one. Lists
    of parts are never called.

    Example:
        >>> net = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(2, 2))]))
        >>> outermost_part(net, "0.0.0")
        '0.0'
    """
    names = path.split(".")
    for end in range(1, len(names) + 1):
        part = module_at(model, ".".join(names[:end]))
        if not isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            return "" if part is None else ".".join(names[:end])
    return ""
