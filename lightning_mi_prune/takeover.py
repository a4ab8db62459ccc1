"""HAND ON  a layer that stays says what the run of removed layers above it said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from lightning_mi_prune.anatomy import Anatomy
from lightning_mi_prune.families.residual import module_at
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.readings import Reading
from lightning_mi_prune.refit import Sum, refit_all
from lightning_mi_prune.sample import Heard, copied
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.surgery import operate

__all__ = ["Succession", "succession", "take_over"]


@dataclass(frozen=True)
class Succession:
    """Who says what once layers are gone.

    Args:
        readings: Layers of the shorter model that are solved again, each with its source in the
            present one.
        norms: Normalisations of the shorter model that become those of the present one.
    """

    readings: tuple[Reading, ...] = ()
    norms: Mapping[str, str] = field(default_factory=dict)


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
    for stack in anatomy.stacks:
        layers = current.kept.get(stack.name, ())
        left = after.kept.get(stack.name, layers)
        last = dict(_runs(layers, left))
        lowest = next((layer for layer in layers if layer not in left), None)
        if not stack.adds or lowest is None:
            continue
        for place, layer in enumerate(left):
            mine = f"{stack.name}.{place}"
            own, top = (f"{stack.name}.{layers.index(n)}" for n in (layer, last.get(layer, layer)))
            *inner, end = stack.adds
            if layer > lowest:
                readings += [_reading(mine, own, add) for add in inner]
            if layer > lowest or layer in last:
                normed = layer in last and bool(stack.closing)
                readings.append(replace(_reading(mine, top, end), normed=normed))
            if layer in last and stack.closing:
                norms[f"{mine}.{stack.closing}"] = f"{top}.{stack.closing}"
    return Succession(tuple(readings), norms)


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
        a layer of the stack adds, or something else than linear modules adds it.

    Raises:
        PruningError: If the stored sample is smaller than what a layer has to learn from it.
    """
    found = succession(anatomy, current, selection.plan)
    if not found.readings or not any(heard.ranks):
        return selection
    networks = {part.network for part in anatomy.parts}
    cut = copied(module, networks)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    folded = {
        f"{mine}.{name}": parameters[f"{other}.{name}"].detach()
        for mine, other in found.norms.items()
        for name in ("weight", "bias")
        if f"{other}.{name}" in parameters
    }
    operate(cut, anatomy, selection.plan, current=current, folded=folded)
    spoken = all(_is_linear(module, reading.spoken.layer) for reading in found.readings)
    if not (spoken and all(_is_linear(cut, reading.layer) for reading in found.readings)):
        return selection
    folded |= refit_all(
        module,
        cut,
        found.readings,
        heard.ranks,
        positions=positions,
        ridge=ridge,
        add=add,
        rank=rank,
        world=world,
    )
    return replace(selection, folded={**selection.folded, **folded})


def _runs(layers: Sequence[int], left: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Layers that stay with the last of those that go right above them."""
    for heir, above in zip(left, [*left[1:], None], strict=True):
        end = len(layers) if above is None else layers.index(above)
        if end > layers.index(heir) + 1:
            yield heir, layers[end - 1]


def _is_linear(module: nn.Module, path: str) -> bool:
    return isinstance(module_at(module, path), nn.Linear)


def _reading(layer: str, source: str, add: tuple[str, str]) -> Reading:
    """What a layer adds to the stream, and what it must add: that of a layer of today."""
    projection, skip = add
    said = Reading(f"{source}.{projection}", f"{source}.{skip}", None)
    return Reading(f"{layer}.{projection}", f"{layer}.{skip}", None, source=said)
