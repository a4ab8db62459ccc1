"""HAND ON  a layer that stays says what the run of removed layers above it said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_mi_prune.anatomy import Anatomy
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import is_within
from lightning_mi_prune.families.residual import module_at
from lightning_mi_prune.incisions import parameter_of
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.readings import Reading
from lightning_mi_prune.refit import Sum, refit_all
from lightning_mi_prune.sample import Heard, copied
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.standins import linear_at
from lightning_mi_prune.surgery import operate

__all__ = ["Succession", "succession", "take_over"]


@dataclass(frozen=True)
class Succession:
    """Who says what once layers are gone.

    Args:
        readings: Layers of the shorter model that are solved again, each with its source in the
            present one.
        norms: Normalisations of the shorter model that become those of the present one.
        homes: Where what gets new values stands in the present model, by its path in the other.
        stacks: Stacks of which layers take over.
    """

    readings: tuple[Reading, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()


def succession(anatomy: Anatomy, current: Plan, plan: Plan) -> Succession:
    """What is solved again where a plan removes layers.

    The last output projection of a layer that stays takes the words of that of the last layer
    removed above it, before any normalisation of the sum; where such a normalisation ends the layer
    (post-norm), it is handed on. All above says again what it said.

    Args:
        anatomy: All axes and stacks, as built.
        current: Plan the model carries now.
        plan: Plan it will carry.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune.families.stacks import find_stacks
        >>> net = BertModel(BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50))
        >>> anatomy = Anatomy(stacks=tuple(find_stacks(net)))
        >>> plan = anatomy.without(anatomy.full, {"encoder.layer": (0, 2)})
        >>> found = succession(anatomy, anatomy.full, plan)
        >>> [(r.layer, r.spoken.layer) for r in found.readings][0]
        ('encoder.layer.0.output.dense', 'encoder.layer.1.output.dense')
        >>> found.norms
        {'encoder.layer.0.output.LayerNorm': 'encoder.layer.1.output.LayerNorm'}
    """
    after = current.then(plan)
    readings: list[Reading] = []
    norms: dict[str, str] = {}
    homes: dict[str, str] = {}
    stacks: list[str] = []
    for stack in anatomy.stacks:
        layers = current.kept.get(stack.name, ())
        left = after.kept.get(stack.name, layers)
        last = dict(_runs(layers, left))
        lowest = next((layer for layer in layers if layer not in left), None)
        if not stack.adds or lowest is None:
            continue
        stacks.append(stack.name)
        *inner, end = stack.adds
        for place, layer in enumerate(left):
            mine = f"{stack.name}.{place}"
            own, top = (f"{stack.name}.{layers.index(n)}" for n in (layer, last.get(layer, layer)))
            found = [_reading(mine, own, add) for add in inner] if layer > lowest else []
            if layer > lowest or layer in last:
                normed = layer in last and bool(stack.closing)
                found.append(replace(_reading(mine, top, end), normed=normed))
            if layer in last and stack.closing:
                norms[f"{mine}.{stack.closing}"] = f"{top}.{stack.closing}"
                homes[f"{mine}.{stack.closing}"] = f"{own}.{stack.closing}"
            homes |= {r.layer: f"{own}{r.layer[len(mine) :]}" for r in found}
            readings += found
    return Succession(tuple(readings), norms, homes, tuple(stacks))


def take_over(
    module: nn.Module,
    anatomy: Anatomy,
    current: Plan,
    selection: Selection,
    heard: Heard,
    *,
    positions: int,
    ridge: float = 1e-2,
    add: Sum = lambda sums: sums,
    rank: int = 0,
    world: int = 1,
) -> Selection:
    """Let the layers that stay make up for those that go, without a training step.

    Args:
        module: The model as it stands; it is only run.
        anatomy: All its axes and stacks, as built.
        current: Plan it carries.
        selection: Layers that stay.
        heard: Stored calls.
        positions: Positions that were asked for.
        ridge: Pull towards the present weights, as for :func:`refit.refit`.
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
    found = succession(anatomy, current, selection.plan)
    readings = found.readings
    if not readings or not any(calls for rank in heard.ranks for calls in rank.values()):
        return selection
    for reading in readings:
        for path in (reading.spoken.layer, found.homes[reading.layer]):
            _check_linear(module, path)
    for path in found.homes.values():
        _check_open(module, path)
    networks = {stack.network for stack in anatomy.stacks if stack.name in found.stacks}
    cut, part = copied(module, networks), _inside(anatomy, networks)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    norms = {
        f"{mine}.{name}": parameters[f"{other}.{name}"].detach()
        for mine, other in found.norms.items()
        for name in ("weight", "bias")
        if f"{other}.{name}" in parameters
    }
    operate(cut, part, selection.plan, current=current, folded=norms)
    solved = refit_all(
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
            "Validate by calling the network that holds them, or set refit=False."
        )
    return replace(selection, folded={**selection.folded, **norms, **solved})


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
            "or set refit=False."
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
            "refit=False."
        )
    for name, _ in part.named_parameters(recurse=False):
        if not parameter_of(module, f"{path}.{name}").requires_grad:
            raise PruningError(
                f"{path}.{name} is frozen, so {path!r} cannot say anything else. Train it, or set "
                "refit=False."
            )


def _inside(anatomy: Anatomy, networks: Iterable[str]) -> Anatomy:
    """What of a body lies in some networks."""
    tops = list(networks)
    return Anatomy.of(p for p in anatomy.parts if any(is_within(p.name, top) for top in tops))


def _reading(layer: str, source: str, add: tuple[str, str]) -> Reading:
    """What a layer adds to the stream, and what it must add: that of a layer of today."""
    projection, skip = add
    said = Reading(f"{source}.{projection}", f"{source}.{skip}", None)
    return Reading(f"{layer}.{projection}", f"{layer}.{skip}", None, source=said)
