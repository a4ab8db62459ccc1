"""Which layers are solved again after a cut, and the outputs they must reproduce."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lightning_mi_prune.calibration.calls import RecordedCall, split_call
from lightning_mi_prune.core.consumers import output_dim
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.inputs import read_dims, weight_name
from lightning_mi_prune.importance.statistics import kept_rows
from lightning_mi_prune.reconstruction.block_runs import BlockRuns, LayerCall
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

    All of them at once would outgrow the model, so the model runs one block at a time, when the
    first layer in it is asked for.

    Args:
        model: Module from which everything is named; it is only run.
        layers: Layers that will be solved.
        path: Network that is called.
        call: The sample.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ReconstructedLayer],
        path: str,
        call: RecordedCall,
    ) -> None:
        self._left = {layer.target.layer: layer.target for layer in layers}
        self._stored: dict[str, dict[int, Tensor]] = {}
        self._runs = BlockRuns(model, [*self._left.values()], path, split_call(call))
        if self._runs.is_whole and len(self._runs.calls) > 1:
            self._runs = BlockRuns(model, [*self._left.values()], path, [call])

    @property
    def calls(self) -> Sequence[RecordedCall]:
        """The sample in the pieces that targets come in, one after another.

        It is one piece where the outputs of a layer are not per example, such as a table of
        distances.
        """
        return self._runs.calls

    def take(self, layer: str) -> dict[int, Tensor] | None:
        """The target ``(positions, outputs)`` of a layer in every piece, to be asked for once.

        By number of the piece; None for a layer that does not run exactly once in a call.
        """
        if not self._runs.runs_once(layer):
            return None
        if layer not in self._stored:
            self._store_block(layer)
        return self._stored.pop(layer)

    def _store_block(self, asked: str) -> None:
        """Run up to a layer, and to the others of its block."""
        found = self._runs.beside(asked, [*self._left.values()])
        layers = [self._left.pop(layer.layer) for layer in found]
        self._stored |= {layer.layer: {} for layer in layers}

        def store(number: int, layer: ReconstructedLayer, part: LayerCall) -> None:
            output = part.output
            target = part.valid(output if part.stream is None else output + part.stream)
            if layer.rotation is not None:
                target = rotate_along(target, 1, layer.rotation.to(target))
            if layer.rows is not None:
                target = target[:, layer.rows.to(target.device)]
            self._stored[layer.layer][number] = target

        self._runs.visit(layers, store, final=True)
