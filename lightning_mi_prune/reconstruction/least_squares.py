"""Solve the layers of a cut model again, bottom-up, on the inputs they now receive.

The moments of a validation pass describe the uncut model; cutting below changes what the layers
above receive. So every output projection of the cut model is solved again on the inputs that it
really gets, when they get there: least squares towards ``z_dense + skip_dense - skip_cut``, the
output that puts the residual stream back where it was, with a ridge towards the weights it has.
Layers that read the stream above the lowest cut are solved towards what they said in the dense
model, and normalisations whose width was cut, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mi_prune.calibration.calls import RecordedCall, merge_calls
from lightning_mi_prune.calibration.moments import add_outer, mirror, rounding_variance, stabilize
from lightning_mi_prune.core.errors import PruningError, counted, number
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.discovery.families import is_within
from lightning_mi_prune.importance.information import mean_variance
from lightning_mi_prune.reconstruction.layerwise import LayerCall, run_layerwise
from lightning_mi_prune.reconstruction.targets import ReconstructedLayer, Targets

__all__ = [
    "Sum",
    "reconstruct_network",
    "reconstruct_networks",
]

Sum = Callable[[Tensor], Tensor]


_PIECE = 4096


# Positions that the sample may have for each that was asked for, where padding cannot be cut off.
_PADDING = 3


def reconstruct_network(
    cut: nn.Module,
    found: Sequence[ReconstructedLayer],
    path: str,
    targets: Targets,
    *,
    ridge: float = 1e-2,
    add: Sum = lambda sums: sums,
    share: float = 1.0,
    once: bool = False,
) -> dict[str, Tensor]:
    """Weights and biases that pull the residual stream of a cut model back to the dense one's.

    The model is only run, never changed: a layer is solved when all of the sample has reached it,
    and hands the new output on, so that everything above sees the refitted stream. A layer that
    runs several times in a pass (ALBERT's are shared) stays as it is: each of its calls would want
    to make up for the same loss of the stream.

    Args:
        cut: The cut model, with the weights that folding in left.
        found: Layers to solve.
        path: Network that is called.
        targets: The sample, and what the dense model says on it.
        ridge: Pull towards the present weights, as a share of the mean variance of the inputs.
        add: Adds sums up over ranks; every rank comes by in the same order.
        share: Weight of this rank's sample; 0 for one that only keeps the others company.
        once: As for :func:`targets.run_with`.

    Returns:
        New values in the shape they have in the cut model, by tensor name.

    Raises:
        PruningError: If the sample is smaller than what a layer has to learn from it.
    """
    solved: dict[str, Tensor] = {}
    inputs = _Inputs()

    def solve(reading: ReconstructedLayer, parts: Sequence[LayerCall]) -> Sequence[Tensor]:
        wanted = targets.take(reading.spoken.layer)
        layer = cut.get_submodule(reading.layer)
        if wanted is None:
            return [part.output for part in parts]
        asked = [
            _missing(reading, part, share)
            for part, share in zip(parts, _split(wanted, parts), strict=True)
        ]
        if isinstance(layer, nn.LayerNorm):
            plain = [
                functional.layer_norm(p.x, layer.normalized_shape, eps=layer.eps) for p in parts
            ]
            pairs = [(part.heard(x), y) for part, x, y in zip(parts, plain, asked, strict=True)]
            sums = share * sum((_norm_sums(x, y) for x, y in pairs), torch.tensor(0.0))
            new = _solve_norm(layer, add(sums))
            outputs = [x * new["weight"] + new.get("bias", 0) for x in plain]
        else:
            missing = [y - part.heard(part.output) for part, y in zip(parts, asked, strict=True)]
            new = _solve(reading, layer, add(share * inputs.sums(parts, missing)), ridge)
            outputs = [part.output for part in parts]
            if new:
                outputs = [functional.linear(p.x, new["weight"], new.get("bias")) for p in parts]
        solved.update({f"{reading.layer}.{name}": value for name, value in new.items()})
        return outputs

    run_layerwise(cut, found, path, targets.calls, solve, once=once)
    return solved


def reconstruct_networks(
    module: nn.Module,
    cut: nn.Module,
    found: Sequence[ReconstructedLayer],
    ranks: Sequence[Mapping[str, Sequence[RecordedCall]]],
    *,
    positions: int,
    ridge: float,
    add: Sum = lambda sums: sums,
    rank: int = 0,
    world: int = 1,
    once: bool = False,
) -> dict[str, Tensor]:
    """:func:`reconstruct_network` of every network whose calls were stored.

    Args:
        module: The model as it stands; it is only run.
        cut: The cut model.
        found: Layers to solve.
        ranks: Stored calls of each rank, by path of the network.
        positions: Positions that were asked for.
        ridge: As for :func:`reconstruct_network`.
        add: Adds sums up over ranks.
        rank: This process.
        world: Processes that solve together, each on its own calls.
        once: As for :func:`targets.run_with`.

    Returns:
        New values by tensor name.

    Raises:
        PruningError: If the sample is smaller than what a layer has to learn from it.
    """
    solved: dict[str, Tensor] = {}
    for path in sorted({path for calls in ranks for path in calls}):
        stored = [call for calls in ranks[rank::world] for call in calls.get(path, ())]
        # A rank that heard nothing borrows a call of no weight, to come by when sums are added.
        lent = [call for calls in ranks for call in calls.get(path, ())][:1]
        call = merge_calls(stored or lent, _PADDING * positions // world)
        mine = [reading for reading in found if is_within(reading.layer, path)]
        if call is None or not mine:
            continue
        device = next(module.parameters()).device
        call = RecordedCall(*move_tensors((call.args, call.kwargs, call.mask), device))
        targets = Targets(module, mine, path, call, once=once)
        solved |= reconstruct_network(
            cut,
            mine,
            path,
            targets,
            ridge=ridge,
            add=add,
            share=1.0 if stored else 0.0,
            once=once,
        )
    return solved


def _split(wanted: Tensor, parts: Sequence[LayerCall]) -> Sequence[Tensor]:
    """A target of the whole sample, by what each call brings."""
    return torch.split(wanted, [len(part.heard(part.output)) for part in parts])


def _missing(reading: ReconstructedLayer, part: LayerCall, wanted: Tensor) -> Tensor:
    """What the layer itself must say, so that with the stream it is what is wanted."""
    if part.stream is None:
        return wanted
    stream = part.heard(part.stream)
    if reading.normed:
        wanted = _levelled(wanted, stream + part.heard(part.output))
    return wanted - stream


def _levelled(wanted: Tensor, said: Tensor) -> Tensor:
    """Each position with the mean and the spread it has now, which a normalisation takes away."""
    mean, spread = said.mean(-1, keepdim=True), said.std(-1, keepdim=True)
    centred = wanted - wanted.mean(-1, keepdim=True)
    return mean + centred * (spread / wanted.std(-1, keepdim=True).clamp_min(1e-6))


class _Inputs:
    """Normal equations; layers that read the same input share its part of them."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._heard: list[Tensor] = []
        self._outer = torch.empty(0)

    def sums(self, parts: Sequence[LayerCall], missing: Sequence[Tensor]) -> Tensor:
        """``[1 x]' [1 x]`` beside ``[1 x]' missing``, over the positions that are not padding."""
        given = [part.x for part in parts]
        fresh = [*map(id, given)] != [*map(id, self._x)]
        if fresh:
            self._x, self._heard = given, [part.heard(part.x) for part in parts]
            size = self._heard[0].shape[1] + 1
            self._outer = _double(given[0][:0]).new_zeros(size, size)
        cross = self._outer.new_zeros(len(self._outer), missing[0].shape[1])
        for heard, rest in zip(self._heard, missing, strict=True):
            # In pieces: all of it in double precision would be larger than anything else.
            for x, y in zip(torch.split(heard, _PIECE), torch.split(rest, _PIECE), strict=True):
                inputs = functional.pad(_double(x), (1, 0), value=1.0)
                cross.addmm_(inputs.mT, _double(y))
                if fresh:
                    add_outer(self._outer, inputs)
        if fresh:
            mirror(self._outer)
        return torch.cat([self._outer, cross], dim=1)


def _double(x: Tensor) -> Tensor:
    """In double precision; on the CPU where the device of ``x`` has none."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _solve(
    reading: ReconstructedLayer, layer: nn.Module, sums: Tensor, ridge: float
) -> dict[str, Tensor]:
    """New weight and bias of a linear layer; nothing where it can be spared."""
    size = sums.shape[0]
    outer, cross = sums[:, :size], sums[:, size:]
    count, weight, bias = outer[0, 0], layer.weight, layer.bias
    if reading.spare and float(count) < 2 * size:
        return {}
    if float(count) <= size:
        raise PruningError(
            f"Only {counted(int(count), 'position')} to reconstruct {reading.layer!r} from, which has "
            f"{counted(size, 'number')} to learn for each output; expected more, better "
            f"{number(10 * size)}. Validate on more data, raise reconstruction_positions, or set "
            "reconstruct=False."
        )
    assert isinstance(weight, Tensor)  # noqa: S101
    first = 0 if isinstance(bias, Tensor) else 1
    if first == 0:  # centred: the bias takes what the means ask for
        mean, shift = outer[0, 1:] / count, cross[0] / count
        outer = stabilize(outer[1:, 1:] / count - torch.outer(mean, mean), mean, count)
        cross = cross[1:] / count - torch.outer(mean, shift)
        cross[outer.diagonal() == 0] = 0.0  # constants say nothing but the bias
    else:
        outer, cross = outer[1:, 1:] / count, cross[1:] / count
    if size > 1:
        outer = outer + ridge * mean_variance(outer) * torch.eye(size - 1).to(outer)
        change = torch.cholesky_solve(cross, torch.linalg.cholesky(outer)).mT
    else:
        change = cross.mT
    new = {"weight": (_double(weight) + change).to(weight)}
    if isinstance(bias, Tensor):
        new["bias"] = (_double(bias) + shift - change @ mean).to(bias)
    return {key: value.detach() for key, value in new.items()}


def _norm_sums(plain: Tensor, wanted: Tensor) -> Tensor:
    """Sums over positions that tell gain and offset of each entry, ``(5, entries)``."""
    x, y = _double(plain), _double(wanted)
    return torch.stack([v.sum(0) for v in (torch.ones_like(x), x, y, x * x, x * y)])


def _solve_norm(layer: nn.LayerNorm, sums: Tensor) -> dict[str, Tensor]:
    """New gain and offset of a normalisation, each entry by itself."""
    count = sums[0].clamp_min(1)
    _, mean_x, mean_y, square, product = sums / count
    variance = square - mean_x**2
    # An entry that never changes says nothing of its gain.
    silent = (variance <= rounding_variance(mean_x, count)) | (variance <= 1e-8 * variance.mean())
    gain = (product - mean_x * mean_y) / torch.where(silent, 1.0, variance)
    gain = torch.where(silent, _double(layer.weight), gain)
    new = {"weight": gain.to(layer.weight)}
    if layer.bias is not None:
        new["bias"] = (mean_y - gain * mean_x).to(layer.bias)
    return {key: value.detach() for key, value in new.items()}
