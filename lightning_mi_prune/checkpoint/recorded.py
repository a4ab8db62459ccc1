"""Plans and graphs that the configs of cut networks carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_mi_prune.checkpoint.stored_graph import check_networks
from lightning_mi_prune.core.errors import PruningError, require
from lightning_mi_prune.core.plan import (
    GRAPH_FIELD,
    MODEL_TYPE,
    TYPE_FIELD,
    PruningPlan,
    recorded_plan,
)
from lightning_mi_prune.core.untrusted import described
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, is_within

__all__ = [
    "config_of",
    "digest_of",
    "named_plan",
    "present_plan",
    "pruned_type",
    "recorded_graph",
    "recorded_networks",
]


def recorded_graph(network: nn.Module) -> PruningGraph | None:
    """The graph in the config of a cut network, named from that network; None if there is none.

    A graph recorded on an encoder is also found for a model with a head around it, and the other
    way round.

    Raises:
        PruningError: If the record is no graph, or one of other networks.

    Example:
        >>> recorded_graph(nn.Linear(2, 2)) is None
        True
    """
    text = getattr(getattr(network, "config", None), GRAPH_FIELD, None)
    if text is None:
        return None
    if not isinstance(text, str):
        raise PruningError(f"config.{GRAPH_FIELD} is {described(text)}; expected text.")
    graph = _named_here(network, PruningGraph.from_json(text))
    check_networks(network, graph)
    return graph


def digest_of(plan: PruningPlan, graph: PruningGraph | None) -> str:
    """Digest of a plan as it is named from the network that it cuts, if it is one.

    So the folder of a network and the checkpoint of the module around it have the same.

    Args:
        plan: The plan.
        graph: The groups that it names, if they are known.

    Example:
        >>> from lightning_mi_prune.graph.groups import DependencyGroup
        >>> plan = PruningPlan({"net.ffn": 4}, {"net.ffn": (0, 3)})
        >>> group = DependencyGroup("net.ffn", "ffn", 4, (), ("net.out",), network="net")
        >>> digest_of(plan, PruningGraph((group,))) == plan.under("net").digest()
        True
    """
    paths = {part.network for part in graph.parts if part.name in plan.sizes} if graph else set()
    outer = min(paths, key=len, default="")  # an encoder may be in the network that has its head
    inside = plan.under(outer if all(is_within(path, outer) for path in paths) else "")
    return (inside if len(inside.sizes) == len(plan.sizes) else plan).digest()


def recorded_networks(module: nn.Module) -> dict[str, PruningGraph]:
    """The graphs of all cut networks inside a module, by the path of the network."""
    found: dict[str, PruningGraph] = {}
    for path, network in module.named_modules():
        inside = any(path.startswith(f"{top}.") or top == "" for top in found)
        if not inside and hasattr(network, "base_model_prefix"):
            graph = recorded_graph(network)
            if graph is not None:
                found[path] = graph
    return found


def present_plan(module: nn.Module, groups: Sequence[DependencyGroup]) -> PruningPlan:
    """The plan of ``module`` now: full, unless the config of a network records another.

    Raises:
        PruningError: If a record is not a plan.
    """
    kept: dict[str, tuple[int, ...]] = {group.name: tuple(range(group.size)) for group in groups}
    for path in {group.network for group in groups}:
        mine = [group for group in groups if group.network == path]
        plan = named_plan(module.get_submodule(path), mine, path)
        if plan is not None:
            kept.update({name: k for name, k in plan.kept.items() if name in kept})
    return PruningPlan({group.name: group.size for group in groups}, kept)


def named_plan(
    network: nn.Module, groups: Sequence[DependencyGroup], path: str = ""
) -> PruningPlan | None:
    """The plan in the config of a network, with the names that groups of this class have.

    A plan recorded on an encoder is also found for a model with a head around it, and the other
    way round.

    Args:
        network: The network.
        groups: Its groups.
        path: Module path from which the groups are named.

    Raises:
        PruningError: If the record is not a plan.
    """
    plan = recorded_plan(network)
    if plan is None:
        return None
    mine = {group.name: group.size for group in groups}
    names = [plan.prefixed(path), *(other.prefixed(path) for other in _other_names(network, plan))]
    return max(names, key=lambda p: len(mine.items() & p.sizes.items()))


def _base(network: nn.Module) -> tuple[str, bool]:
    """The name of the base model of a class, and whether the network holds one by that name."""
    prefix = str(getattr(network, "base_model_prefix", ""))
    return prefix, bool(prefix) and isinstance(getattr(network, prefix, None), nn.Module)


def _other_names(network: Any, plan: PruningPlan) -> list[PruningPlan]:
    """The plan with names as in a model with a head, or without it."""
    prefix, has_base = _base(network)
    return [plan.prefixed(prefix) if has_base else plan.under(prefix)] if prefix else []


def _named_here(network: nn.Module, graph: PruningGraph) -> PruningGraph:
    """The graph with names as in this network, with a head or without it."""
    prefix, has_base = _base(network)
    stem = f"{prefix}."
    inside = [part.name.startswith(stem) for part in graph.parts]
    if not prefix or has_base == any(inside):
        return graph
    if not has_base:
        return graph.under(prefix)
    outside = graph.prefixed(prefix)  # the config is that of the whole network
    return PruningGraph(
        tuple(replace(group, network="") for group in outside.groups),
        tuple(replace(stack, network="") for stack in outside.stacks),
    )


def pruned_type(fields: Mapping[str, Any]) -> str:
    """The model type of the class that was pruned, from the config of a folder.

    Raises:
        PruningError: If the installed transformers do not know it.
    """
    known = require("transformers", "transformers").CONFIG_MAPPING
    found = fields.get(TYPE_FIELD)
    if not isinstance(found, str) or found == MODEL_TYPE or found not in known:
        raise PruningError(
            f"The config of a pruned model has {TYPE_FIELD}={described(found)}; expected a model "
            "type of the installed transformers. Was config.json edited? Copy or save the folder "
            "again, or install the version of transformers that it was saved with."
        )
    return found


def config_of(kind: Any, fields: Mapping[str, Any], **options: Any) -> Any:
    """A config of a class from its fields; ``from_dict`` of transformers.

    Args:
        kind: The class of the config.
        fields: Its fields, from a file.
        options: Those of ``from_dict``.

    Raises:
        PruningError: If the class refuses the fields.
    """
    try:
        return kind.from_dict(dict(fields), **options)
    except Exception as error:  # classes of transformers raise all kinds
        raise PruningError(
            f"The config of a pruned model is refused by {kind.__name__} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); expected the fields that it was saved with. "
            "Copy or save the folder again."
        ) from error
