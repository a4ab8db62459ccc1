"""Layers that stay make up for removed ones above them, by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.core.consumers import is_pointwise, why_not_consumer
from lightning_mi_prune.core.empty_linear import linear_at, module_at
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import copy_networks
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import is_within
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reconstruction.least_squares import Sum, reconstruct_networks
from lightning_mi_prune.reconstruction.targets import ReconstructedLayer
from lightning_mi_prune.surgery.tensors import parameter_of
from lightning_mi_prune.surgery.transaction import cut_model

__all__ = [
    "Replacements",
    "compensate_removed_layers",
    "replacements_for",
]


@dataclass(frozen=True)
class Replacements:
    """What the layers of the shorter model must reproduce.

    Args:
        layers: Layers of the shorter model that are solved again.
        norms: Normalisations of the shorter model that become copies of those of the present one.
        origins: Path in the present model of all of these, by their path in the shorter one.
        stacks: Stacks whose layers are solved again.
    """

    layers: tuple[ReconstructedLayer, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()


def replacements_for(graph: PruningGraph, current: PruningPlan, plan: PruningPlan) -> Replacements:
    """What is solved again where a plan removes layers.

    The last output projection of a layer below removed ones must reproduce the sum after that of
    the highest removed one, before any normalisation of the sum; where such a normalisation ends
    the layer (post-norm), it is copied. All projections above reproduce their own sums.

    Args:
        graph: All groups and stacks, as built.
        current: Plan the model carries now.
        plan: Plan it will carry.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune import discover
        >>> net = BertModel(BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50))
        >>> graph = PruningGraph(stacks=discover(net).stacks)
        >>> plan = graph.keep_layers(graph.full, {"encoder.layer": (0, 2)})
        >>> found = replacements_for(graph, graph.full, plan)
        >>> [(r.layer, r.target.layer) for r in found.layers][0]
        ('encoder.layer.0.output.dense', 'encoder.layer.1.output.dense')
        >>> found.norms
        {'encoder.layer.0.output.LayerNorm': 'encoder.layer.1.output.LayerNorm'}
    """
    after = current.then(plan)
    layers: list[ReconstructedLayer] = []
    norms: dict[str, str] = {}
    origins: dict[str, str] = {}
    stacks: list[str] = []
    for stack in graph.stacks:
        now = current.kept.get(stack.name, ())
        left = after.kept.get(stack.name, now)
        highest = dict(_removed_above(now, left))
        lowest = next((number for number in now if number not in left), None)
        if not stack.residual_branches or lowest is None:
            continue
        stacks.append(stack.name)
        *inner, last = stack.residual_branches
        for place, number in enumerate(left):
            new = f"{stack.name}.{place}"
            own, top = (
                f"{stack.name}.{now.index(n)}" for n in (number, highest.get(number, number))
            )
            found = [_layer(new, own, branch) for branch in inner] if number > lowest else []
            if number > lowest or number in highest:
                normed = number in highest and bool(stack.final_norm)
                found.append(replace(_layer(new, top, last), normed=normed))
            if number in highest and stack.final_norm:
                norms[f"{new}.{stack.final_norm}"] = f"{top}.{stack.final_norm}"
                origins[f"{new}.{stack.final_norm}"] = f"{own}.{stack.final_norm}"
            origins |= {one.layer: f"{own}{one.layer[len(new) :]}" for one in found}
            layers += found
    return Replacements(tuple(layers), norms, origins, tuple(stacks))


def compensate_removed_layers(
    module: nn.Module,
    graph: PruningGraph,
    current: PruningPlan,
    selection: Decision,
    data: CalibrationData,
    *,
    positions: int,
    add: Sum = lambda sums: sums,
    rank: int = 0,
    world: int = 1,
) -> Decision:
    """Let the layers that stay make up for those that go, without a training step.

    Args:
        module: The model as it stands; it is only run.
        graph: All its groups and stacks, as built.
        current: Plan it carries.
        selection: Layers that stay.
        data: Stored calls.
        positions: Positions that were asked for.
        add: As for :func:`least_squares.reconstruct_network`.
        rank: This process.
        world: Processes that solve together, each on its own calls.

    Returns:
        The selection with new values for the layers that stay; unchanged where the residual
        branches of the stacks are not known, or nothing was stored.

    Raises:
        PruningError: If the stored sample is smaller than what a layer has to learn from it, or
            one is no linear module whose values may be replaced.
    """
    found = replacements_for(graph, current, selection.plan)
    if not found.layers or not any(calls for rank in data.ranks for calls in rank.values()):
        return selection
    for layer in found.layers:
        for path in (layer.target.layer, found.origins[layer.layer]):
            _check_linear(module, path)
    for path in found.origins.values():
        _check_trainable(module, path)
    networks = {stack.network for stack in graph.stacks if stack.name in found.stacks}
    cut, inside = copy_networks(module, networks), _inside(graph, networks)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    norms = {
        f"{new}.{name}": parameters[f"{old}.{name}"].detach()
        for new, old in found.norms.items()
        for name in ("weight", "bias")
        if f"{old}.{name}" in parameters
    }
    cut_model(cut, inside, selection.plan, current=current, compensated=norms)
    solved = reconstruct_networks(
        module,
        cut,
        found.layers,
        data.ranks,
        positions=positions,
        add=add,
        rank=rank,
        world=world,
        once=True,
    )
    missing = [r.layer for r in found.layers if r.normed and f"{r.layer}.weight" not in solved]
    if missing:  # a copied normalisation expects the sum that the layer would have learned
        raise PruningError(
            f"No stored input reaches {missing} of the shorter model; expected some for each. "
            "Validate by calling the network that holds them, or set the method of reconstruction "
            "to 'none'."
        )
    return replace(selection, compensated={**selection.compensated, **norms, **solved})


def _removed_above(now: Sequence[int], left: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Layers that stay right below removed ones, each with the highest of these."""
    for number, following in zip(left, [*left[1:], None], strict=True):
        end = len(now) if following is None else now.index(following)
        if end > now.index(number) + 1:
            yield number, now[end - 1]


def _check_linear(module: nn.Module, path: str) -> None:
    """Refuse what least squares cannot solve.

    Raises:
        PruningError: If there is no linear module at the path.
    """
    place = module_at(module, path)
    found = place if place is None else linear_at(place)
    why = "there is none" if found is None else why_not_consumer(found)
    if why or found is None or not is_pointwise(found):
        why = why or f"{type(found).__name__} has a kernel of several positions."
        raise PruningError(
            f"{path!r} cannot be solved again: {why} Expected a plain linear layer; merge adapters "
            "first, or set the method of reconstruction to 'none'."
        )


def _check_trainable(module: nn.Module, path: str) -> None:
    """Refuse a module whose values may not be replaced.

    Raises:
        PruningError: If a parameter is frozen, computed, of another kind, or carries hooks.
    """
    part = linear_at(module.get_submodule(path))
    if "weight" not in part._parameters:
        raise PruningError(
            f"The weight of {path!r} is computed from others; remove the parametrization, or set "
            "the method of reconstruction to 'none'."
        )
    for name, _ in part.named_parameters(recurse=False):
        if not parameter_of(module, f"{path}.{name}").requires_grad:
            raise PruningError(
                f"{path}.{name} is frozen, so {path!r} cannot be solved again. Train it, or set "
                "the method of reconstruction to 'none'."
            )


def _inside(graph: PruningGraph, networks: Iterable[str]) -> PruningGraph:
    """The part of a graph that lies in some networks."""
    tops = list(networks)
    return PruningGraph.of(p for p in graph.parts if any(is_within(p.name, top) for top in tops))


def _layer(new: str, old: str, branch: tuple[str, str]) -> ReconstructedLayer:
    """A branch of the shorter model whose output must be that of the present model's."""
    projection, residual = branch
    replaces = ReconstructedLayer(f"{old}.{projection}", f"{old}.{residual}", None)
    return ReconstructedLayer(f"{new}.{projection}", f"{new}.{residual}", None, replaces=replaces)
