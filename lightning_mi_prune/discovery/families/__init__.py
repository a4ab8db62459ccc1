"""Groups of known model families, and the registration of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan, recorded_plan
from lightning_mi_prune.discovery.families import transformers
from lightning_mi_prune.graph.groups import DependencyGroup, as_built

__all__ = [
    "NotDescribedError",
    "find_groups",
    "is_within",
    "modules_without_groups",
    "plan_for",
    "present_plan",
    "register_family",
]

Matches = Callable[[nn.Module], bool]
Describe = Callable[[nn.Module], Sequence[DependencyGroup]]


class NotDescribedError(PruningError):
    """No family describes a model; what it can lose shows when it runs."""


@dataclass(frozen=True)
class _Family:
    name: str
    matches: Matches
    describe: Describe


_FAMILIES: list[_Family] = [
    _Family("transformers", transformers.matches, transformers.describe),
]


def register_family(name: str, matches: Matches) -> Callable[[Describe], Describe]:
    """Decorate a function that returns the groups of a model the package does not know.

    Args:
        name: A unique name.
        matches: Whether the function describes a module; tried before the built-in families.

    Raises:
        PruningError: If the name is taken.

    Example:
        >>> from lightning_mi_prune import linear_group
        >>> class MLP(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(4, 16), nn.Linear(16, 2)
        >>> @register_family("docs-mlp", matches=lambda module: isinstance(module, MLP))
        ... def mlp(net):
        ...     return [linear_group(net, "ffn", kind="ffn", producers=["up"], consumers=["down"])]
        >>> [(group.name, group.size) for group in find_groups(nn.ModuleDict({"net": MLP()}))]
        [('net.ffn', 16)]
    """
    if any(family.name == name for family in _FAMILIES):
        raise PruningError(f"A family {name!r} is registered already; choose another name.")

    def decorate(describe: Describe) -> Describe:
        _FAMILIES.insert(0, _Family(name, matches, describe))
        return describe

    return decorate


def find_groups(module: nn.Module, within: str = "") -> list[DependencyGroup]:
    """Groups of every prunable network inside ``module``, named from ``module``, as built.

    Args:
        module: Any module that holds a network of a known family, at any depth.
        within: Path of a submodule to search instead of all of ``module``.

    Raises:
        NotDescribedError: If no known network is found.
        PruningError: If a layer is not what its family expects.
    """
    try:
        root = module.get_submodule(within)
    except AttributeError as error:
        children = [name for name, _ in module.named_children()]
        raise PruningError(
            f"module={within!r} is not part of {type(module).__name__}; it has {children}."
        ) from error
    groups: list[DependencyGroup] = []
    seen: list[str] = []
    for path, network in module.named_modules():
        if any(is_within(path, top) for top in seen):
            continue
        family = next((f for f in _FAMILIES if f.matches(network)), None)
        if family is not None and (is_within(path, within) or is_within(within, path)):
            seen.append(path)
            found = family.describe(network)
            plan = plan_for(network, found)
            sizes = {} if plan is None else plan.sizes
            groups += [a.prefixed(path) for a in as_built(found, sizes)]
    groups = [group for group in groups if is_within(group.name, within)]
    if not groups:
        raise NotDescribedError(_unknown(root))
    return groups


def present_plan(module: nn.Module, groups: Sequence[DependencyGroup]) -> PruningPlan:
    """The plan of ``module`` now: full, unless it contains a pruned network."""
    kept: dict[str, tuple[int, ...]] = {group.name: tuple(range(group.size)) for group in groups}
    for path in {group.network for group in groups}:
        mine = [group for group in groups if group.network == path]
        plan = plan_for(module.get_submodule(path), mine, path)
        if plan is not None:
            named = plan.prefixed(path)
            kept.update({name: k for name, k in named.kept.items() if name in kept})
    return PruningPlan({group.name: group.size for group in groups}, kept)


def plan_for(
    network: nn.Module, groups: Sequence[DependencyGroup], path: str = ""
) -> PruningPlan | None:
    """The plan recorded in the config of a network, named from that network.

    A plan recorded on an encoder is also found for a model with a head around it, and the other
    way round.

    Args:
        network: A network of a known family.
        groups: Its groups.
        path: Module path from which the groups are named.

    Raises:
        PruningError: If the record is not a plan.
    """
    plan = recorded_plan(network)
    prefix = str(getattr(network, "base_model_prefix", ""))
    names = {group.name for group in groups}
    if plan is None or not prefix or names & set(plan.prefixed(path).sizes):
        return plan
    if isinstance(getattr(network, prefix, None), nn.Module):
        other = plan.prefixed(prefix)
    else:
        other = plan.under(prefix)
    return other if names & set(other.prefixed(path).sizes) else plan


def is_within(path: str, top: str) -> bool:
    """Whether a module path is ``top`` or below it."""
    return top == "" or path == top or path.startswith(f"{top}.")


def modules_without_groups(
    module: nn.Module, groups: Sequence[DependencyGroup], within: str = ""
) -> list[str]:
    """Paths of the modules with weight matrices that take part in no group.

    Args:
        module: Module from which the groups are named.
        groups: All its groups.
        within: Path of a submodule to look at instead of all of ``module``.

    Example:
        >>> from lightning_mi_prune import linear_group
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 2))
        >>> group = linear_group(net, "ffn", kind="ffn", producers=["0"], consumers=["2"])
        >>> modules_without_groups(net, [group])
        ['3']
    """
    touched = {""}
    for group in groups:
        for path in (group.name, *group.consumers, *(s.tensor for s in group.tensors)):
            parts = path.split(".")
            touched |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return [
        path
        for path, part in module.named_modules()
        if path not in touched
        and is_within(path, within)
        and any(p.ndim > 1 for p in part.parameters())
    ]


def _unknown(module: nn.Module) -> str:
    unknown = transformers.first_unknown(module) or module
    kind = getattr(getattr(unknown, "config", None), "model_type", None)
    name = type(unknown).__name__
    linear = [path for path, part in unknown.named_modules() if type(part) is nn.Linear and path]
    up, down = (*linear, "up", "down")[:2] if len(linear) != 1 else (linear[0], "down")
    return (
        f"Nothing to prune was found in {name}{f' (model type {kind!r})' if kind else ''}. Known "
        f"families: {sorted(transformers.MODEL_TYPES)}. Describe the groups of another model by "
        f"hand (its first linear layers are {linear[:6]}):\n\n"
        "    from lightning_mi_prune import linear_group, register_family\n\n"
        f'    @register_family("mine", matches=lambda m: type(m).__name__ == "{name}")\n'
        "    def mine(network):\n"
        f'        return [linear_group(network, "ffn", kind="ffn", producers=["{up}"], '
        f'consumers=["{down}"])]\n'
    )
