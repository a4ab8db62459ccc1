"""Which layers are solved again after a cut, and the outputs they must reproduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mi_prune.calibration.calls import RecordedCall, split_call
from lightning_mi_prune.core.consumers import output_dim
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.inputs import read_dims, weight_name
from lightning_mi_prune.importance.statistics import kept_rows
from lightning_mi_prune.reconstruction.layerwise import LayerCall, run_layerwise
from lightning_mi_prune.surgery.parameters import RotationMaps, rotate_along

__all__ = [
    "ReconstructedLayer",
    "Targets",
    "calls_of_whole_networks",
    "layers_to_reconstruct",
]


@dataclass(frozen=True)
class ReconstructedLayer:
    """One layer that is solved again.

    Args:
        layer: Path of the linear layer, or of the normalisation.
        residual: Path of the module whose input is the residual stream that is added to the
            layer's output; None where nothing is added.
        rows: Outputs that survive the cut, as positions in the present model; None: all.
        optional: Whether the layer is left as it is where the sample is small.
        replaces: Layer of the present model whose output this one must reproduce; None: its own.
        normed: Whether a normalisation follows, so that level and scale of a position are free.
        rotation: Maps ``(heads, size, size)`` to the coordinates of the layer's outputs after the
            cut; None: those it has.
    """

    layer: str
    residual: str | None
    rows: Tensor | None
    optional: bool = False
    replaces: ReconstructedLayer | None = None
    normed: bool = False
    rotation: Tensor | None = None

    @property
    def target(self) -> ReconstructedLayer:
        """The layer of the present model whose output is the target."""
        return self.replaces or self


def layers_to_reconstruct(
    groups: Sequence[DependencyGroup],
    current: PruningPlan,
    plan: PruningPlan,
    rotated: RotationMaps | None = None,
) -> list[ReconstructedLayer]:
    """Layers that are solved again after a plan: those from the lowest cut upwards.

    Args:
        groups: All groups of the model.
        current: Plan the model carries now.
        plan: Plan it will carry.
        rotated: New coordinates of heads, by tensor.
    """
    maps = {name: dims[0] for name, dims in (rotated or {}).items() if 0 in dims}
    after = current.then(plan)
    cut = [group for group in groups if after.width(group.name) < current.width(group.name)]
    if not cut:
        return []

    read = read_dims(groups)

    def rows(layer: str) -> Tensor | None:
        name = f"{layer}.weight"
        return kept_rows(name, after.kept, current, groups, output_dim(read.get(name, 1)))

    lowest = min(group.level for group in cut)
    found = []
    for group in sorted(groups, key=lambda group: group.level):
        if group.residual is not None and group.level >= lowest:
            found += [ReconstructedLayer(c, group.residual, rows(c)) for c in group.consumers]
        if group in cut:
            found += [ReconstructedLayer(norm, None, rows(norm)) for norm in group.norms]
    for consumer in dict.fromkeys(consumer for group in cut for consumer in group.above):
        turn = maps.get(f"{consumer}.weight")
        found.append(
            ReconstructedLayer(consumer, None, rows(consumer), optional=True, rotation=turn)
        )
    # Heads and their dimensions have the same consumer.
    return list({one.layer: one for one in reversed(found)}.values())[::-1]


def calls_of_whole_networks(
    ranks: Sequence[Mapping[str, Sequence[RecordedCall]]],
    groups: Sequence[DependencyGroup],
    current: PruningPlan,
    plan: PruningPlan,
) -> list[dict[str, Sequence[RecordedCall]]]:
    """Stored calls without those of networks that receive units which a plan removes.

    Steps of a LightningModule may pass the output of one layer to the next themselves. What was
    stored for the second one then has the width from before the cut.

    Args:
        ranks: Stored calls of each rank, by path of the network.
        groups: All groups of the model.
        current: Plan the model carries now.
        plan: Plan it will carry.
    """
    after = current.then(plan)
    cut = [group for group in groups if after.width(group.name) < current.width(group.name)]

    def receives(path: str) -> bool:
        stem = f"{path}." if path else ""
        for group in cut:
            names = {s.tensor for s in group.tensors}
            read = {weight_name(consumer, names) for consumer in group.consumers}
            if any(name.startswith(stem) for name in read) and not all(
                name.startswith(stem) for name in names
            ):
                return True
        return False

    skipped = {path for calls in ranks for path in calls if receives(path)}
    return [{p: calls[p] for p in calls if p not in skipped} for calls in ranks]


class Targets:
    """Outputs of the present model on a sample, for the layers of the cut one to reproduce.

    All of them at once would outgrow the model, so a few layers are stored at a time, in the order
    in which they run: when the next one is asked for, the model runs again, for the layers that
    fit.

    Args:
        model: Module from which everything is named; it is only run.
        layers: Layers that will be solved.
        path: Network that is called.
        call: The sample.
        room: Bytes that may be stored; the layer that is asked for is stored in any case.
        once: Whether every layer runs once in a pass, so that what is above the last need not run.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ReconstructedLayer],
        path: str,
        call: RecordedCall,
        room: int = 2**29,
        *,
        once: bool = False,
    ) -> None:
        self._model, self._path, self._room = model, path, room
        self._once = once
        self._left = {layer.target.layer: layer.target for layer in layers}
        self._sizes: dict[str, float] = {}
        self._stored: dict[str, Tensor] = {}
        self._repeated: set[str] = set()
        self._call, self._pieces = call, split_call(call)

    @property
    def calls(self) -> Sequence[RecordedCall]:
        """The sample in the pieces that targets come in, one after another.

        It is one piece where the outputs of a layer are not per example, such as a table of
        distances.
        """
        if not self._sizes:
            self._run("")
        return self._pieces

    def take(self, layer: str) -> Tensor | None:
        """The target ``(positions, outputs)`` of a layer, to be asked for once.

        None for one that runs several times in a pass, however often it is asked for.
        """
        if layer in self._left and layer not in self._stored:
            self._run(layer)
        return None if layer in self._repeated else self._stored.pop(layer)

    def _chosen(self, asked: str) -> list[ReconstructedLayer]:
        """Layers to run for: all that are left, or those that fit once the sizes are known."""
        left = list(self._left.values())
        if not self._sizes:
            return left
        room, found = self._room - self._sizes.get(asked, 0.0), [self._left[asked]]
        for layer, size in self._sizes.items():  # in the order in which they run
            if layer in self._left and layer != asked and size <= room:
                found.append(self._left[layer])
                room -= size
        return found

    def _run(self, asked: str) -> None:
        """Run the model; store what fits, and the layer that is asked for in any case."""
        parts, used, ran = dict[str, list[Tensor]](), 0.0, set[str]()
        chosen, once = self._chosen(asked), self._once or bool(self._sizes)
        pieces, whole = self._pieces, False

        def store(layer: ReconstructedLayer, calls: Sequence[LayerCall]) -> Sequence[Tensor]:
            nonlocal used, whole
            (part,), name = calls, layer.layer
            if name in ran:
                self._repeated.add(name)
            elif part.call.rows not in _first_dims(part.output) and len(pieces) > 1:
                whole = True  # its outputs are not per example, so they cannot come in pieces
            elif name in parts or part.call is pieces[0]:
                output = part.output
                target = part.valid(output if part.stream is None else output + part.stream)
                if layer.rotation is not None:
                    target = rotate_along(target, 1, layer.rotation.to(target))
                if layer.rows is not None:
                    target = target[:, layer.rows.to(target.device)]
                size = 0.0
                if name not in parts:
                    size = self._sizes[name] = target.nbytes * _scale(self._call, part.call)
                if name == asked or used + size <= self._room:
                    parts.setdefault(name, []).append(target)
                    used += size
            ran.add(name)
            return [part.output]

        for piece in pieces:
            ran.clear()
            run_layerwise(self._model, chosen, self._path, [piece], store, once=once)
            if whole:
                break
        if whole:
            self._pieces = [self._call]
            self._sizes.clear()
            self._repeated.clear()
            self._run(asked)
            return
        for layer in self._repeated:
            parts.pop(layer, None)
            self._left.pop(layer, None)
        for layer in list(parts):
            self._stored[layer] = torch.cat(parts.pop(layer))
            del self._left[layer]


def _first_dims(output: Tensor) -> tuple[int, ...]:
    """The dimensions that may count examples; positions may come before them."""
    return tuple(output.shape[: max(1, output.ndim - 1)][:2])


def _scale(whole: RecordedCall, piece: RecordedCall) -> float:
    """How many times as large the whole call is as one of its pieces."""
    if whole.mask is None or piece.mask is None:
        return whole.rows / max(1, piece.rows)
    return float(whole.mask.sum()) / max(1.0, float(piece.mask.sum()))
