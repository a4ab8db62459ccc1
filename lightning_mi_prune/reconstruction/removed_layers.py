"""Layers that stay make up for the removed ones above them, by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.core.empty_linear import linear_at
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import copy_networks
from lightning_mi_prune.discovery.families import is_within
from lightning_mi_prune.discovery.families.residual import module_at
from lightning_mi_prune.discovery.graph import PruningGraph
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reconstruction.least_squares import Sum, reconstruct_networks
from lightning_mi_prune.reconstruction.targets import ReconstructedLayer
from lightning_mi_prune.surgery.parameters import parameter_of
from lightning_mi_prune.surgery.transaction import cut_model

__all__ = [
    "Replacements",
    "compensate_removed_layers",
    "replacements_for",
]


@dataclass(frozen=True)
class Replacements:
    """Who says what once layers are gone.

    Args:
        readings: Layers of the shorter model that are solved again, each with its source in the
            present one.
        norms: Normalisations of the shorter model that become those of the present one.
        homes: Where what gets new values stands in the present model, by its path in the other.
        stacks: Stacks of which layers take over.
    """

    readings: tuple[ReconstructedLayer, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()


def replacements_for(graph: PruningGraph, current: PruningPlan, plan: PruningPlan) -> Replacements:
    """What is solved again where a plan removes layers.

    The last output projection of a layer that stays takes the words of that of the last layer
    removed above it, before any normalisation of the sum; where such a normalisation ends the layer
    (post-norm), it is handed on. All above says again what it said.

    Args:
        graph: All groups and stacks, as built.
        current: Plan the model carries now.
        plan: Plan it will carry.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune.discovery.families.stacks import find_stacks
        >>> net = BertModel(BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50))
        >>> graph = PruningGraph(stacks=tuple(find_stacks(net)))
        >>> plan = graph.keep_layers(graph.full, {"encoder.layer": (0, 2)})
        >>> found = replacements_for(graph, graph.full, plan)
        >>> [(r.layer, r.spoken.layer) for r in found.readings][0]
        ('encoder.layer.0.output.dense', 'encoder.layer.1.output.dense')
        >>> found.norms
        {'encoder.layer.0.output.LayerNorm': 'encoder.layer.1.output.LayerNorm'}
    """
    after = current.then(plan)
    readings: list[ReconstructedLayer] = []
    norms: dict[str, str] = {}
    homes: dict[str, str] = {}
    stacks: list[str] = []
    for stack in graph.stacks:
        layers = current.kept.get(stack.name, ())
        left = after.kept.get(stack.name, layers)
        last = dict(_runs(layers, left))
        lowest = next((layer for layer in layers if layer not in left), None)
        if not stack.residual_branches or lowest is None:
            continue
        stacks.append(stack.name)
        *inner, end = stack.residual_branches
        for place, layer in enumerate(left):
            mine = f"{stack.name}.{place}"
            own, top = (f"{stack.name}.{layers.index(n)}" for n in (layer, last.get(layer, layer)))
            found = [_reading(mine, own, add) for add in inner] if layer > lowest else []
            if layer > lowest or layer in last:
                normed = layer in last and bool(stack.final_norm)
                found.append(replace(_reading(mine, top, end), normed=normed))
            if layer in last and stack.final_norm:
                norms[f"{mine}.{stack.final_norm}"] = f"{top}.{stack.final_norm}"
                homes[f"{mine}.{stack.final_norm}"] = f"{own}.{stack.final_norm}"
            homes |= {r.layer: f"{own}{r.layer[len(mine) :]}" for r in found}
            readings += found
    return Replacements(tuple(readings), norms, homes, tuple(stacks))


def compensate_removed_layers(
    module: nn.Module,
    graph: PruningGraph,
    current: PruningPlan,
    selection: Decision,
    heard: CalibrationData,
    *,
    positions: int,
    ridge: float = 1e-2,
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
        heard: Stored calls.
        positions: Positions that were asked for.
        ridge: Pull towards the present weights, as for :func:`least_squares.reconstruct_network`.
        add: Adds sums up over ranks.
        rank: This process.
        world: Processes that solve together, each on its own calls.

    Returns:
        The selection with new values for the layers that stay; itself where it is not known what
        a layer of the stack adds, or nothing was stored.

    Raises:
        PruningError: If the stored sample is smaller than what a layer has to learn from it, or
            one is no linear module whose values may be replaced.
    """
    found = replacements_for(graph, current, selection.plan)
    readings = found.readings
    if not readings or not any(calls for rank in heard.ranks for calls in rank.values()):
        return selection
    for reading in readings:
        for path in (reading.spoken.layer, found.homes[reading.layer]):
            _check_linear(module, path)
    for path in found.homes.values():
        _check_open(module, path)
    networks = {stack.network for stack in graph.stacks if stack.name in found.stacks}
    cut, part = copy_networks(module, networks), _inside(graph, networks)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    norms = {
        f"{mine}.{name}": parameters[f"{other}.{name}"].detach()
        for mine, other in found.norms.items()
        for name in ("weight", "bias")
        if f"{other}.{name}" in parameters
    }
    cut_model(cut, part, selection.plan, current=current, compensated=norms)
    solved = reconstruct_networks(
        module,
        cut,
        readings,
        heard.ranks,
        positions=positions,
        ridge=ridge,
        add=add,
        rank=rank,
        world=world,
        once=True,
    )
    missing = [r.layer for r in readings if r.normed and f"{r.layer}.weight" not in solved]
    if missing:  # a normalisation would be handed on without what it was made for
        raise PruningError(
            f"No stored input reaches {missing} of the shorter model; expected some for each. "
            "Validate by calling the network that holds them, or set reconstruct=False."
        )
    return replace(selection, compensated={**selection.compensated, **norms, **solved})


def _runs(layers: Sequence[int], left: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Layers that stay with the last of those that go right above them."""
    for heir, above in zip(left, [*left[1:], None], strict=True):
        end = len(layers) if above is None else layers.index(above)
        if end > layers.index(heir) + 1:
            yield heir, layers[end - 1]


def _check_linear(module: nn.Module, path: str) -> None:
    """Refuse what least squares cannot solve.

    Raises:
        PruningError: If there is no linear module at the path.
    """
    place = module_at(module, path)
    found = place if place is None else linear_at(place)
    if not isinstance(found, nn.Linear):
        raise PruningError(
            f"{path!r} is a {type(found).__name__}; expected an nn.Linear. Merge adapters first, "
            "or set reconstruct=False."
        )


def _check_open(module: nn.Module, path: str) -> None:
    """Refuse a module whose values may not be replaced.

    Raises:
        PruningError: If a parameter is frozen, computed, of another kind, or carries hooks.
    """
    part = linear_at(module.get_submodule(path))
    if "weight" not in part._parameters:
        raise PruningError(
            f"The weight of {path!r} is computed from others; remove the parametrization, or set "
            "reconstruct=False."
        )
    for name, _ in part.named_parameters(recurse=False):
        if not parameter_of(module, f"{path}.{name}").requires_grad:
            raise PruningError(
                f"{path}.{name} is frozen, so {path!r} cannot say anything else. Train it, or set "
                "reconstruct=False."
            )


def _inside(graph: PruningGraph, networks: Iterable[str]) -> PruningGraph:
    """What of a body lies in some networks."""
    tops = list(networks)
    return PruningGraph.of(p for p in graph.parts if any(is_within(p.name, top) for top in tops))


def _reading(layer: str, source: str, add: tuple[str, str]) -> ReconstructedLayer:
    """What a layer adds to the stream, and what it must add: that of a layer of today."""
    projection, skip = add
    said = ReconstructedLayer(f"{source}.{projection}", f"{source}.{skip}", None)
    return ReconstructedLayer(f"{layer}.{projection}", f"{layer}.{skip}", None, source=said)
