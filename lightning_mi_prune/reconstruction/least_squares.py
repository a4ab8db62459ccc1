"""Solve the layers of a cut model again, bottom-up, on the inputs they now receive.

The moments of a validation pass describe the uncut model; cutting below changes what the layers
above receive. So every output projection of the cut model is solved again on its real inputs, once
the layers below are done: least squares towards ``z_dense + stream_dense - stream_cut``, the output
that restores the residual stream, with a ridge towards the weights it has. Layers that read the
stream above the lowest cut are solved towards their outputs in the dense model, and normalisations
whose width was cut, entry by entry. How strong the ridge is, every layer finds out from examples
that were left out (:mod:`ridge`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mi_prune.calibration.calls import RecordedCall, merge_calls
from lightning_mi_prune.calibration.moments import add_outer, mirror, rounding_variance
from lightning_mi_prune.core.consumers import (
    input_dim,
    is_pointwise,
    stacked_weight,
    stored_weight,
    why_not_consumer,
)
from lightning_mi_prune.core.empty_linear import linear_at, parameters_of
from lightning_mi_prune.core.errors import PruningError, counted, number
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.graph.groups import is_within
from lightning_mi_prune.reconstruction.layerwise import LayerCall, run_layerwise
from lightning_mi_prune.reconstruction.ridge import FOLDS, choose_strength, linear_change
from lightning_mi_prune.reconstruction.targets import ReconstructedLayer, Targets

__all__ = [
    "Sum",
    "is_gain",
    "is_solvable",
    "reconstruct_network",
    "reconstruct_networks",
]

Sum = Callable[[Tensor], Tensor]
_PIECE = 4096
# Positions that the sample may have for each that was asked for, where padding cannot be cut off.
_PADDING = 3


def reconstruct_network(
    cut: nn.Module,
    layers: Sequence[ReconstructedLayer],
    path: str,
    targets: Targets,
    *,
    add: Sum = lambda sums: sums,
    share: float = 1.0,
    once: bool = False,
) -> dict[str, Tensor]:
    """Weights and biases that restore the residual stream of the dense model in a cut one.

    The model is only run, never changed: a layer is solved when all of the sample has reached it,
    and its new output goes on to the layers above. A layer that runs several times in a pass
    (ALBERT's are shared) stays as it is: each of its calls would make up for the same loss.

    Args:
        cut: The cut model, with compensated weights.
        layers: Layers to solve, for which :func:`is_solvable` holds.
        path: Network that is called.
        targets: The sample, and the outputs of the dense model on it.
        add: Adds sums up over ranks; every rank calls it for the same layers in the same order.
        share: Weight of this rank's sample; 0 for one that only takes part in the sums.
        once: As for :func:`layerwise.run_layerwise`.

    Returns:
        New values in the shape they have in the cut model, by tensor name.

    Raises:
        PruningError: If the sample is smaller than what a layer has to learn from it.
    """
    solved: dict[str, Tensor] = {}
    equations = _NormalEquations()

    def solve(layer: ReconstructedLayer, parts: Sequence[LayerCall]) -> Sequence[Tensor]:
        target = targets.take(layer.target.layer)
        module = cut.get_submodule(layer.layer)
        if target is None:
            return [part.output for part in parts]
        wanted = [
            _without_stream(layer, part, values)
            for part, values in zip(parts, _split(target, parts), strict=True)
        ]
        if is_gain(module):
            offset, plain = _normalized(module, [part.x for part in parts])
            pairs = [(part.valid(x), y) for part, x, y in zip(parts, plain, wanted, strict=True)]
            sums = share * sum((_norm_sums(x, y) for x, y in pairs), torch.tensor(0.0))
            new = _solve_norm(module, add(sums), offset)
            outputs = [x * (new["weight"] + offset) + new.get("bias", 0) for x in plain]
        else:
            missing = [y - part.valid(part.output) for part, y in zip(parts, wanted, strict=True)]
            new = _solve(layer, module, add(share * equations.sums(parts, missing)))
            outputs = [part.output for part in parts]
            if new:
                outputs = [functional.linear(p.x, new["weight"], new.get("bias")) for p in parts]
                stored = module.get_parameter("weight")
                matrix = new["weight"][..., None]
                new["weight"] = stored_weight(matrix, stored, input_dim(linear_at(module)))
        solved.update({f"{layer.layer}.{name}": value for name, value in new.items()})
        return outputs

    run_layerwise(cut, layers, path, targets.calls, solve, once=once)
    return solved


def reconstruct_networks(
    module: nn.Module,
    cut: nn.Module,
    layers: Sequence[ReconstructedLayer],
    ranks: Sequence[Mapping[str, Sequence[RecordedCall]]],
    *,
    positions: int,
    add: Sum = lambda sums: sums,
    rank: int = 0,
    world: int = 1,
    once: bool = False,
) -> dict[str, Tensor]:
    """:func:`reconstruct_network` of every network whose calls were stored.

    Args:
        module: The model as it stands; it is only run.
        cut: The cut model.
        layers: Layers to solve.
        ranks: Stored calls of each rank, by path of the network.
        positions: Positions that were asked for.
        add: As for :func:`reconstruct_network`.
        rank: This process.
        world: Processes that solve together, each on its own calls.
        once: As for :func:`layerwise.run_layerwise`.

    Returns:
        New values by tensor name.

    Raises:
        PruningError: If the sample is smaller than what a layer has to learn from it.
    """
    solved: dict[str, Tensor] = {}
    functional_weights = parameters_of(cut)  # those above units: no layer that could be solved
    for path in sorted({path for calls in ranks for path in calls}):
        numbered = _in_folds(ranks, path)
        stored = [call for calls in numbered[rank::world] for call in calls]
        # A rank without calls runs one of another's with weight 0: all must add the same sums.
        others = [call for calls in numbered for call in calls][:1]
        call = merge_calls(stored or others, _PADDING * positions // world)
        inside = [
            layer
            for layer in layers
            if is_within(layer.layer, path)
            and layer.layer not in functional_weights
            and is_solvable(cut.get_submodule(layer.layer))
        ]
        if call is None or not inside:
            continue
        device = next(module.parameters()).device
        call = replace(call, **move_tensors(vars(call), device))
        targets = Targets(module, inside, path, call, once=once)
        share = 1.0 if stored else 0.0
        solved |= reconstruct_network(cut, inside, path, targets, add=add, share=share, once=once)
    return solved


def _split(target: Tensor, parts: Sequence[LayerCall]) -> Sequence[Tensor]:
    """A target of the whole sample, divided among the calls."""
    return torch.split(target, [len(part.valid(part.output)) for part in parts])


def _without_stream(layer: ReconstructedLayer, part: LayerCall, target: Tensor) -> Tensor:
    """Output of the layer itself that, with the residual stream, gives the target."""
    if part.stream is None:
        return target
    stream = part.valid(part.stream)
    if layer.normed:
        target = _rescaled(target, stream + part.valid(part.output))
    return target - stream


def _rescaled(target: Tensor, present: Tensor) -> Tensor:
    """Each position with its present mean and spread, which a normalisation removes anyway."""
    mean, spread = present.mean(-1, keepdim=True), present.std(-1, keepdim=True)
    centred = target - target.mean(-1, keepdim=True)
    return mean + centred * (spread / target.std(-1, keepdim=True).clamp_min(1e-6))


class _NormalEquations:
    """Sums of least squares by fold; layers that read the same input share its part of them."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._valid: list[Tensor] = []
        self._folds: list[Tensor] = []
        self._outer = torch.empty(0)

    def sums(self, parts: Sequence[LayerCall], missing: Sequence[Tensor]) -> Tensor:
        """``[1 x]' [1 x]`` beside ``[1 x]' missing`` of every fold, without the padding."""
        given = [part.x for part in parts]
        fresh = [*map(id, given)] != [*map(id, self._x)]
        if fresh:
            self._x, self._valid = given, [part.valid(part.x) for part in parts]
            self._folds = [_folds_of(part) for part in parts]
            size = self._valid[0].shape[1] + 1
            self._outer = _double(given[0][:0]).new_zeros(FOLDS, size, size)
        cross = self._outer.new_zeros(*self._outer.shape[:2], missing[0].shape[1])
        for valid, rest, folds in zip(self._valid, missing, self._folds, strict=True):
            for fold in range(FOLDS):
                index = (folds == fold).nonzero().flatten()
                # In pieces: all of it in double precision would be larger than anything else.
                for some in torch.split(index, _PIECE) if len(index) else ():
                    inputs = functional.pad(_double(valid[some]), (1, 0), value=1.0)
                    cross[fold].addmm_(inputs.mT, _double(rest[some]))
                    if fresh:
                        add_outer(self._outer[fold], inputs)
        if fresh:
            for outer in self._outer:
                mirror(outer)
        return torch.cat([self._outer, cross], dim=2)


def _folds_of(part: LayerCall) -> Tensor:
    """The fold of every position that is not padding.

    Neighbours in one text are alike, so positions of one example are in one fold; in runs only
    where there is a single example, or the dimension of examples is not known.
    """
    dims, folds = part.x.shape[:-1], part.call.folds
    dim = next((d for d, size in enumerate(dims[:2]) if size == part.call.rows), None)
    if folds is None or dim is None:
        places = torch.arange(len(part.valid(part.x)), device=part.x.device)
        return places * FOLDS // max(1, len(places))
    shape = [-1 if place == dim else 1 for place in range(len(dims))]
    return part.valid(folds.to(part.x.device).view(shape).expand(dims)[..., None]).flatten()


def _in_folds(
    ranks: Sequence[Mapping[str, Sequence[RecordedCall]]], path: str
) -> list[list[RecordedCall]]:
    """Stored calls of every rank whose examples are in one fold after another, whoever has them."""
    found, count = [], 0
    several = sum(call.rows for calls in ranks for call in calls.get(path, ())) > 1
    for calls in ranks:
        mine = []
        for call in calls.get(path, ()):
            folds = (torch.arange(call.rows) + count) % FOLDS
            mine.append(replace(call, folds=folds if several else None))
            count += call.rows
        found.append(mine)
    return found


def _double(x: Tensor) -> Tensor:
    """In double precision; on the CPU where the device of ``x`` has none."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _solve(layer: ReconstructedLayer, module: nn.Module, folds: Tensor) -> dict[str, Tensor]:
    """New weight and bias of a linear module: as they are where no change is better on new data.

    Args:
        layer: The layer.
        module: Its module in the cut model.
        folds: Sums of every fold.

    Raises:
        PruningError: If there are fewer positions than unknowns, but for an optional layer.
    """
    sums, bias = folds.sum(0), module.bias
    size, count = sums.shape[0], float(sums[0, 0])
    if layer.optional and count < 2 * size:
        return {}
    if count <= size:
        raise PruningError(
            f"Only {counted(int(count), 'position')} to reconstruct {layer.layer!r} from, which "
            f"has {counted(size, 'number')} to learn for each output; expected more, better "
            f"{number(10 * size)}. Validate on more data, raise the positions of reconstruction, "
            "or set its method to 'none'."
        )
    intercept = isinstance(bias, Tensor)
    strength = choose_strength(folds, intercept=intercept)
    stored = module.get_parameter("weight").detach()
    weight = stacked_weight(stored, input_dim(linear_at(module)))[..., 0]
    new = {"weight": weight} | ({"bias": bias} if isinstance(bias, Tensor) else {})
    if strength is not None:
        change = linear_change(sums, strength, intercept=intercept)
        changes = {"weight": change.weight, "bias": change.bias}
        new = {name: (_double(value) + changes[name]).to(value) for name, value in new.items()}
    return {name: value.detach() for name, value in new.items()}


def _norm_sums(plain: Tensor, wanted: Tensor) -> Tensor:
    """Sums over positions that determine gain and offset of each entry, ``(5, entries)``."""
    x, y = _double(plain), _double(wanted)
    return torch.stack([v.sum(0) for v in (torch.ones_like(x), x, y, x * x, x * y)])


def is_gain(module: nn.Module) -> bool:
    """Whether a module normalises each position and multiplies each entry by a weight.

    Not those that expect the entries before the positions, as some of convolutions do.

    Example:
        >>> is_gain(nn.LayerNorm(4)), is_gain(nn.RMSNorm(4)), is_gain(nn.BatchNorm1d(4))
        (True, True, False)
    """
    if isinstance(module, nn.LayerNorm):
        return module.elementwise_affine and type(module).forward is nn.LayerNorm.forward
    own, name = dict(module.named_parameters()), type(module).__name__.lower()
    named = "norm" in name and "2d" not in name and [*own] == ["weight"]
    return named and own["weight"].ndim == 1 and not list(module.buffers())


def is_solvable(module: nn.Module) -> bool:
    """Whether a layer can be solved again: a gain, or a consumer of single positions.

    Example:
        >>> is_solvable(nn.Linear(4, 2)), is_solvable(nn.Conv2d(4, 2, 3)), is_solvable(nn.ReLU())
        (True, False, False)
    """
    layer = linear_at(module)
    return is_gain(layer) or (is_pointwise(layer) and not why_not_consumer(layer))


def _normalized(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
    """What a module adds to its weight before it multiplies, and inputs that are only normalised.

    Some add 1 (Gemma), so that a weight of 0 changes nothing.
    """
    if isinstance(module, nn.LayerNorm):
        shape, eps = module.normalized_shape, module.eps
        return 0.0, [functional.layer_norm(x, shape, eps=eps) for x in inputs]
    weight = module.get_parameter("weight").detach()

    def run(x: Tensor, value: float) -> Tensor:
        other = copy.copy(module)
        other.__dict__["_parameters"] = {"weight": torch.full_like(weight, value)}
        found: Tensor = other.forward(x)  # not called: it shares the hooks
        return found

    with torch.no_grad():
        low, high = zip(*((run(x, 0.0), run(x, 1.0)) for x in inputs), strict=True)
    offset = 1.0 if any(bool(x.any()) for x in low) else 0.0
    return offset, [b - a for a, b in zip(low, high, strict=True)]


def _solve_norm(module: nn.Module, sums: Tensor, offset: float = 0.0) -> dict[str, Tensor]:
    """New gain and offset of a normalisation, each entry by itself.

    Args:
        module: The normalisation.
        sums: What :func:`_norm_sums` returns.
        offset: What the module adds to its weight.
    """
    count = sums[0].clamp_min(1)
    _, mean_x, mean_y, square, product = sums / count
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    if not isinstance(module, nn.LayerNorm):  # through the origin: there is no bias
        mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
    variance = square - mean_x**2
    # The gain of an entry that never changes cannot be determined: it stays.
    constant = (variance <= rounding_variance(mean_x, count)) | (variance <= 1e-8 * variance.mean())
    gain = (product - mean_x * mean_y) / torch.where(constant, 1.0, variance)
    gain = torch.where(constant, _double(weight) + offset, gain)
    new = {"weight": (gain - offset).to(weight)}
    if isinstance(bias, Tensor):
        new["bias"] = (mean_y - gain * mean_x).to(bias)
    return {key: value.detach() for key, value in new.items()}
