"""Which layers are solved again after a cut, and the dense outputs they are solved for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mi_prune.calibration.calls import RecordedCall, split_call
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.groups import DependencyGroup
from lightning_mi_prune.importance.statistics import kept_rows
from lightning_mi_prune.reconstruction.layerwise import LayerCall, run_layerwise
from lightning_mi_prune.surgery.parameters import RotationMaps, rotate_along

__all__ = [
    "ReconstructedLayer",
    "Targets",
    "layers_to_reconstruct",
]


@dataclass(frozen=True)
class ReconstructedLayer:
    """One layer that is solved again.

    Args:
        layer: Path of the linear layer, or of the normalisation.
        skip: Path of the module whose input is the stream that is added to the layer's output.
        rows: Outputs that survive the cut, as positions in the present model; None: all.
        spare: Whether the layer is left as it is where the sample is small.
        source: The layer of the present model whose words it must say; None: its own.
        normed: Whether a normalisation follows, so that level and scale of a position are free.
        rotation: Maps ``(heads, size, size)`` to the coordinates in which the layer speaks after the
            cut; None: those it has.
    """

    layer: str
    skip: str | None
    rows: Tensor | None
    spare: bool = False
    source: ReconstructedLayer | None = None
    normed: bool = False
    rotation: Tensor | None = None

    @property
    def spoken(self) -> ReconstructedLayer:
        """Where the present model says what the layer must say."""
        return self.source or self


def layers_to_reconstruct(
    groups: Sequence[DependencyGroup],
    current: PruningPlan,
    plan: PruningPlan,
    rotated: RotationMaps | None = None,
) -> list[ReconstructedLayer]:
    """What a plan leaves to be solved again: everything from the lowest cut upwards.

    Args:
        groups: All groups of the model.
        current: Plan the model carries now.
        plan: Plan it will carry.
        rotated: New coordinates of heads, by tensor.
    """
    maps = {name: dims[0] for name, dims in (rotated or {}).items() if 0 in dims}
    target = current.then(plan)
    cut = [group for group in groups if target.width(group.name) < current.width(group.name)]
    if not cut:
        return []
    lowest = min(group.level for group in cut)
    found = []
    for group in sorted(groups, key=lambda group: group.level):
        if group.residual is not None and group.level >= lowest:
            for consumer in group.consumers:
                rows = kept_rows(f"{consumer}.weight", target.kept, current, groups)
                found.append(ReconstructedLayer(consumer, group.residual, rows))
        if group.norms and group in cut:
            norms = [
                kept_rows(f"{norm}.weight", target.kept, current, groups) for norm in group.norms
            ]
            found += [
                ReconstructedLayer(n, None, r) for n, r in zip(group.norms, norms, strict=True)
            ]
    above = {r: None for group in cut for r in group.above}
    for consumer in above:
        rows = kept_rows(f"{consumer}.weight", target.kept, current, groups)
        turn = maps.get(f"{consumer}.weight")
        found.append(ReconstructedLayer(consumer, None, rows, spare=True, rotation=turn))
    return found


class Targets:
    """What the model as it stands says on a sample, where the cut model will be solved again.

    All of it at once would outgrow the model, so a few layers are held at a time, in the order in
    which they run: when the next one is asked for, the model runs again, for the layers that fit.

    Args:
        model: Module from which everything is named; it is only run.
        found: Layers that will be solved; they are asked for by the layer that speaks now.
        path: Network that is called.
        call: The sample.
        room: Bytes that may be held; the layer that is asked for is held in any case.
        once: Whether every layer runs once in a pass, so that what is above the last need not run.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[ReconstructedLayer],
        path: str,
        call: RecordedCall,
        room: int = 2**29,
        *,
        once: bool = False,
    ) -> None:
        self._model, self._path, self._room = model, path, room
        self._once = once
        self._left = {reading.spoken.layer: reading.spoken for reading in found}
        self._sizes: dict[str, float] = {}
        self._held: dict[str, Tensor] = {}
        self._often: set[str] = set()
        self._call, self._pieces = call, split_call(call)

    @property
    def calls(self) -> Sequence[RecordedCall]:
        """The sample in the pieces that targets come in, one after another.

        It is whole where a layer speaks of all examples at once, such as a table of distances.
        """
        if not self._sizes:
            self._hold("")
        return self._pieces

    def take(self, layer: str) -> Tensor | None:
        """The target ``(positions, outputs)`` of a layer, to be asked for once.

        None for one that runs several times in a pass, however often it is asked for.
        """
        if layer in self._left and layer not in self._held:
            self._hold(layer)
        return None if layer in self._often else self._held.pop(layer)

    def _wanted(self, asked: str) -> list[ReconstructedLayer]:
        """What to run for: all that is left, or what surely fits once the sizes are known."""
        left = list(self._left.values())
        if not self._sizes:
            return left
        room, found = self._room - self._sizes.get(asked, 0.0), [self._left[asked]]
        for layer, size in self._sizes.items():  # in the order in which they run
            if layer in self._left and layer != asked and size <= room:
                found.append(self._left[layer])
                room -= size
        return found

    def _hold(self, asked: str) -> None:
        """Run the model and hold what fits, and in any case what is asked for."""
        parts, used, ran = dict[str, list[Tensor]](), 0.0, set[str]()
        wanted, once = self._wanted(asked), self._once or bool(self._sizes)
        pieces, whole = self._pieces, False

        def keep(reading: ReconstructedLayer, given: Sequence[LayerCall]) -> Sequence[Tensor]:
            nonlocal used, whole
            (part,), layer = given, reading.layer
            if layer in ran:
                self._often.add(layer)
            elif part.call.rows not in _first_dims(part.output) and len(pieces) > 1:
                whole = True  # not by example, so there are no pieces of it
            elif layer in parts or part.call is pieces[0]:
                output = part.output
                said = part.heard(output if part.stream is None else output + part.stream)
                if reading.rotation is not None:
                    said = rotate_along(said, 1, reading.rotation.to(said))
                if reading.rows is not None:
                    said = said[:, reading.rows.to(said.device)]
                size = 0.0
                if layer not in parts:
                    size = self._sizes[layer] = said.nbytes * _share(self._call, part.call)
                if layer == asked or used + size <= self._room:
                    parts.setdefault(layer, []).append(said)
                    used += size
            ran.add(layer)
            return [part.output]

        for piece in pieces:
            ran.clear()
            run_layerwise(self._model, wanted, self._path, [piece], keep, once=once)
            if whole:
                break
        if whole:
            self._pieces = [self._call]
            self._sizes.clear()
            self._often.clear()
            self._hold(asked)
            return
        for layer in self._often:
            parts.pop(layer, None)
            self._left.pop(layer, None)
        for layer in list(parts):
            self._held[layer] = torch.cat(parts.pop(layer))
            del self._left[layer]


def _first_dims(output: Tensor) -> tuple[int, ...]:
    """The dimensions that may count examples; positions may come before them."""
    return tuple(output.shape[: max(1, output.ndim - 1)][:2])


def _share(whole: RecordedCall, piece: RecordedCall) -> float:
    """How much more the whole call holds than one of its pieces."""
    if whole.mask is None or piece.mask is None:
        return whole.rows / max(1, piece.rows)
    return float(whole.mask.sum()) / max(1.0, float(piece.mask.sum()))
