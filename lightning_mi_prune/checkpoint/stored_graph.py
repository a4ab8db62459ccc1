"""A graph from a checkpoint, checked against the module before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from lightning_mi_prune.core.consumers import why_not_functional
from lightning_mi_prune.core.empty_linear import parameters_of
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.untrusted import described
from lightning_mi_prune.graph.containers import layer_container
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, LayerStack
from lightning_mi_prune.graph.layouts import Layout, layout_size
from lightning_mi_prune.surgery.configs import config_fields, config_value
from lightning_mi_prune.surgery.parameters import attribute_value, check_attributes
from lightning_mi_prune.surgery.tensors import tensors_of

__all__ = [
    "check_networks",
    "check_stored",
    "is_apart",
]

_FEW_UNITS = 2**17
_REPEATED = 8  # units for each entry of a dimension; a module that is cut had more

_REMEDY = "Build the model with the configuration it was trained with, or take another checkpoint."


def check_networks(module: nn.Module, graph: PruningGraph) -> None:
    """Refuse a graph of networks that a module does not have, or of far more units.

    So what is made for each unit, such as the plan that keeps all of them, is no larger than the
    module.

    Raises:
        PruningError: Naming the network, or the number of units.

    Example:
        >>> check_networks(nn.Linear(4, 8), PruningGraph())
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    for part in graph.parts:
        if part.network not in modules:
            raise _refusal(f"{described(part.name)} is of the network {described(part.network)}")
    units = sum(part.size for part in graph.parts)
    if units > _FEW_UNITS and units > _REPEATED * sum(
        sum(t.shape) for t in tensors_of(module).values()
    ):
        raise _refusal(f"its groups have {units} units in all")


def check_stored(module: nn.Module, graph: PruningGraph, now: PruningPlan) -> None:
    """Refuse a graph that is not one of this module; it may come from anywhere.

    Every tensor, module and number that it names must exist and have the size that its layouts
    give at the present plan. So a cut by it makes tensors and numbers smaller, and nothing else.

    Args:
        module: The module.
        graph: The graph, as built.
        now: Present plan of the module over all parts of the graph.

    Raises:
        PruningError: Naming what does not fit; nothing is changed.

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> dims = (PrunableDim("weight", 0, (8, 4), (("units",),)),)
        >>> group = DependencyGroup("units", "ffn", 8, dims, ("",))
        >>> check_stored(nn.Linear(4, 8), PruningGraph((group,)), PruningGraph((group,)).full)
    """
    for stack in graph.stacks:
        _check_stack(module, stack, now)
    tensors = {name: tuple(t.shape) for name, t in tensors_of(module).items()}
    groups = graph.groups_at(now)
    sizes = {group.name: group.size for group in graph.groups}
    seen: dict[tuple[str, int], Layout] = {}
    shapes: dict[str, dict[int, int]] = {}
    built: dict[str, tuple[int, ...]] = {}
    for group in groups:
        for name, size in group.partners:
            if sizes.get(name, size) != size:
                raise _refusal(
                    f"group {described(group.name)} gives {described(name)} {size} units"
                )
        at = group.all_widths(now.widths)
        for s in group.tensors:
            if seen.setdefault((s.tensor, s.dim), s.layout) != s.layout:
                raise _refusal(f"{described(s.tensor)} has two layouts along dimension {s.dim}")
            if built.setdefault(s.tensor, s.shape) != s.shape:
                raise _refusal(f"{described(s.tensor)} has two shapes")
            shapes.setdefault(s.tensor, {})[s.dim] = layout_size(s.layout, at)
    for name, dims in shapes.items():
        expected = tuple(dims.get(dim, size) for dim, size in enumerate(built[name]))
        if tensors.get(name) != expected:
            found = f"has shape {tensors[name]}" if name in tensors else "is missing"
            raise _refusal(f"{described(name)} {found} here and {expected} in it")
    modules = dict(module.named_modules(remove_duplicate=False))
    parameters = parameters_of(module)
    for group in groups:
        _check_names(modules, parameters, group)
        _check_numbers(module, group, now.widths)


def is_apart(group: DependencyGroup, graph: PruningGraph) -> bool:
    """Whether a group cuts no dimension of a tensor that a graph cuts too."""
    cut = {(s.tensor, s.dim) for other in graph.groups for s in other.tensors}
    return not any((s.tensor, s.dim) in cut for s in group.tensors)


def _refusal(reason: str) -> PruningError:
    return PruningError(f"The graph was made for another model: {reason}. {_REMEDY}")


def _check_names(
    modules: Mapping[str, nn.Module],
    parameters: Mapping[str, nn.Parameter],
    group: DependencyGroup,
) -> None:
    """All modules exist; no name of a field is private."""
    for path in _paths(group):
        if path not in modules:
            raise _refusal(f"group {described(group.name)} names the module {described(path)}")
    for path in (path for path in _consumers(group) if path not in modules):
        read = max((s.dim for s in group.tensors if s.tensor == path), default=1)
        if path not in parameters or why_not_functional(parameters[path], read):
            raise _refusal(f"group {described(group.name)} names the consumer {described(path)}")
    for name in _fields(group):
        _check_field(name)
    network = modules[group.network]
    config = getattr(network, "config", None)
    fields = [group.tie, *config_fields(group)]
    for field in (field for field in fields if field is not None and hasattr(config, "to_dict")):
        value, top = config_value(config, field), field.rpartition(".")[0]
        if top and not hasattr(config_value(config, top), "to_dict"):
            raise _refusal(f"it names the field {described(field)}, but {described(top)} is none")
        if isinstance(value, bool) or not isinstance(value, int | None):  # None: by another field
            raise _refusal(f"config.{field} is {described(value)}, not a number")


def _paths(group: DependencyGroup) -> Iterator[str]:
    yield from (group.network, group.scope, *group.norms)
    if group.residual is not None:
        yield group.residual
    for empty in group.empty_forward:
        yield from (empty.module, *empty.projections)
        yield from (p for p in (empty.consumer, empty.dropout, empty.norm) if p is not None)
    yield from (argument.module for argument in group.unit_arguments)
    if (rotation := group.rotation) is not None:
        yield from (rotation.query, rotation.key, rotation.value, rotation.consumer)


def _consumers(group: DependencyGroup) -> Iterator[str]:
    """Layers, or parameters that modules multiply with."""
    yield from (*group.consumers, *group.above)
    yield from (path for paths in group.consumers_by_input for path in paths)


def _fields(group: DependencyGroup) -> Iterator[str]:
    names = (*config_fields(group), *(() if group.tie is None else (group.tie,)))
    yield from (step for name in names for step in name.split("."))
    yield from (argument.argument for argument in group.unit_arguments)
    for number in group.attributes:
        yield from (step for step in number.attribute.split(".") if not step.isdecimal())


def _check_field(name: str) -> None:
    if not name.isidentifier() or name.startswith("_"):
        raise _refusal(f"it names the attribute {described(name)}")


def _check_numbers(module: nn.Module, group: DependencyGroup, widths: Mapping[str, int]) -> None:
    """All numbers on modules are as the layouts give them."""
    check_attributes(module, [group])
    at = group.all_widths(widths)
    for number in group.attributes:
        value, expected = attribute_value(module, number), layout_size(number.layout, at)
        if value != expected:
            where = f"{number.module}.{number.attribute}".lstrip(".")
            raise _refusal(f"{described(where)} is {value} here and {expected} in it")


def _check_stack(module: nn.Module, stack: LayerStack, now: PruningPlan) -> None:
    container = layer_container(module, stack.name)
    if len(container) != now.width(stack.name):
        raise _refusal(
            f"{described(stack.name)} has {len(container)} layers here and {stack.size} in it"
        )
    if stack.fixed > stack.size:
        raise _refusal(f"{described(stack.name)} has {stack.fixed} fixed layers")
    for name in (*(n for _, n in stack.config_fields), *(n for n, _ in stack.config_lists)):
        _check_field(name)
    for name in stack.index_attributes:
        _check_field(name)
    modules = dict(module.named_modules(remove_duplicate=False))
    for path in (stack.network, stack.scope, *(path for path, _ in stack.config_fields)):
        if path not in modules:
            raise _refusal(f"stack {described(stack.name)} names the module {described(path)}")
    for name, entries in stack.config_lists:
        if len(entries) != stack.size:
            raise _refusal(f"config.{name} has {len(entries)} entries for {stack.size} layers")
