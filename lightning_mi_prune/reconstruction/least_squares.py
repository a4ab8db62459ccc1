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
from functools import partial

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
from lightning_mi_prune.core.progress import progress_step
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.core.spilling import spilled, spilled_zeros
from lightning_mi_prune.graph.groups import is_within
from lightning_mi_prune.reconstruction.block_runs import BlockRuns, LayerCall
from lightning_mi_prune.reconstruction.ridge import FOLDS, LinearChange, is_exact, linear_changes
from lightning_mi_prune.reconstruction.targets import ReconstructedLayer, Targets
from lightning_mi_prune.surgery.tensors import set_parameter

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
) -> dict[str, Tensor]:
    """Weights and biases that restore the residual stream of the dense model in a cut one.

    A layer is solved when the layers below it are; its new values are set in the cut model, which
    runs on, block by block. A layer that runs several times in a pass (ALBERT's are shared) stays
    as it is: each of its calls would make up for the same loss.

    Args:
        cut: The cut model, with compensated weights; it gets the new ones.
        layers: Layers to solve, for which :func:`is_solvable` holds.
        path: Network that is called.
        targets: The sample, and the outputs of the dense model on it.
        add: Adds sums up over ranks; every rank calls it for the same layers in the same order.
        share: Weight of this rank's sample; 0 for one that only takes part in the sums.

    Returns:
        New values in the shape they have in the cut model, by tensor name.

    Raises:
        PruningError: If the sample is smaller than what a layer has to learn from it.
    """
    solved: dict[str, Tensor] = {}
    runs = BlockRuns(cut, layers, path, targets.calls)
    total = sum(map(len, runs.waves))
    with progress_step("reconstruction", "layer", total) as progress:
        for wave in runs.waves:
            wanted = {layer.layer: targets.take(layer.target.layer) or {} for layer in wave}
            shared = _Outer()
            sums = {
                layer.layer: _sums_of(cut.get_submodule(layer.layer), shared)
                for layer in wave
                if wanted[layer.layer]
            }
            mine = [layer for layer in wave if layer.layer in sums]
            if mine:
                runs.visit(mine, partial(_add_call, wanted, sums))
            for path, new in _solve_wave(mine, sums, shared, add, share).items():
                module = linear_at(cut.get_submodule(path))
                for name, value in new.items():  # another parameter: of a tied one only this use
                    value = spilled(value)
                    set_parameter(module, name, value)
                    solved[f"{path}.{name}"] = value
            progress.advance(len(wave))
    return solved


def _solve_wave(
    wave: Sequence[ReconstructedLayer],
    sums: Mapping[str, _LinearSums | _GainSums],
    shared: _Outer,
    add: Sum,
    share: float,
) -> dict[str, dict[str, Tensor]]:
    """New values of layers that read the same input, by layer and name.

    Raises:
        PruningError: If there are fewer positions than unknowns, but for optional layers.
    """
    new: dict[str, dict[str, Tensor]] = {}
    linear: dict[str, _LinearSums] = {}
    for layer in wave:
        found = sums[layer.layer]
        if isinstance(found, _GainSums):
            new[layer.layer] = found.solve(add(share * found.total()))
        else:
            linear[layer.layer] = found
    if not linear:
        return new
    outer = add(shared.total().mul_(share))
    crosses = {name: add(found.cross().mul_(share)) for name, found in linear.items()}
    size, count = outer.shape[2], float(outer[:, 0, 0].sum())
    enough = [one for one in wave if one.layer in linear and _is_enough(one, size, count)]
    for bias in (False, True):
        names = [one.layer for one in enough if linear[one.layer].has_bias == bias]
        cross = [crosses[name] for name in names]
        changes = linear_changes(outer, cross, intercept=bias, exact=shared.is_exact)
        for name, change in zip(names, changes, strict=True):
            new[name] = linear[name].changed(change)
    return new


def _sums_of(module: nn.Module, shared: _Outer) -> _LinearSums | _GainSums:
    """Empty sums of a layer of the cut model."""
    return _GainSums(module) if is_gain(module) else _LinearSums(module, shared)


def _add_call(
    wanted: Mapping[str, Mapping[int, Tensor]],
    sums: Mapping[str, _LinearSums | _GainSums],
    number: int,
    layer: ReconstructedLayer,
    part: LayerCall,
) -> None:
    """Add one call of a layer to its sums, if the present model ran it too."""
    target = wanted[layer.layer].get(number)
    if target is not None:
        sums[layer.layer].add(number, part, _without_stream(layer, part, target))


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
        targets = Targets(module, inside, path, call)
        share = 1.0 if stored else 0.0
        solved |= reconstruct_network(cut, inside, path, targets, add=add, share=share)
    return solved


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


class _Outer:
    """``[1 x]' [1 x]`` of every fold, which layers that read the same input share.

    Products are in single precision where that is exact enough, of inputs around a center: far
    from zero their rounding would be larger than their spread.
    """

    def __init__(self) -> None:
        self.sums = torch.empty(0)
        self._center = torch.empty(0)
        self._number, self._pieces = -1, list[tuple[int, Tensor, Tensor]]()
        self.is_exact = True

    def pieces(self, number: int, part: LayerCall) -> list[tuple[int, Tensor, Tensor]]:
        """The inputs of a call in pieces: fold, positions, and ``[1 x - center]`` of these.

        In pieces, since rounding grows with what is added up in single precision. The first layer
        that asks for a call adds its inputs to the sums.
        """
        if number != self._number:
            x, folds = _exact(part.x)(part.valid(part.x)), _folds_of(part)
            inputs = self._centered(x)
            self._number, self._pieces = number, []
            if not self.sums.numel():
                self.sums = self.zeros(inputs.shape[1])
            for fold in range(FOLDS):
                index = (folds == fold).nonzero().flatten()
                for some in torch.split(index, _PIECE) if len(index) else ():
                    mine = inputs[some]
                    self._pieces.append((fold, some, mine))
                    self.sums[fold] += _outer(mine)
        return self._pieces

    def _centered(self, x: Tensor) -> Tensor:
        """``[1 x - center]`` of inputs ``(positions, inputs)``; the first ones give the center."""
        if not self._center.numel():
            self._center = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        self.is_exact &= x.dtype == torch.float64
        return functional.pad(x - self._center, (1, 0), value=1.0)

    def zeros(self, size: int) -> Tensor:
        """Sums of every fold ``(folds, 1 + inputs, size)``, in double precision."""
        like = _double(self._center)
        return spilled_zeros((FOLDS, len(like) + 1, size), like.dtype, like.device)

    def total(self) -> Tensor:
        """The sums of every fold ``(folds, 1 + inputs, 1 + inputs)``, to be asked for once."""
        self._pieces = []
        for outer in self.sums:
            mirror(outer)
        self.move(self.move(self.sums).mT)
        return self.sums

    def move(self, sums: Tensor) -> Tensor:
        """Make sums ``[1 x - center]' y`` those of ``[1 x]' y``, in place, fold by fold."""
        for fold in sums:
            fold[1:].addr_(_double(self._center), fold[0].clone())
        return sums


class _LinearSums:
    """Sums of least squares of a linear layer, fold by fold.

    Args:
        module: The layer in the cut model.
        shared: The part that layers with the same input have in common.
    """

    def __init__(self, module: nn.Module, shared: _Outer) -> None:
        self._module, self._shared = module, shared
        self._cross = torch.empty(0)
        self.has_bias = isinstance(module.bias, Tensor)

    def add(self, number: int, part: LayerCall, wanted: Tensor) -> None:
        """Add a call of that number, whose output should be ``wanted (positions, outputs)``."""
        pieces = self._shared.pieces(number, part)
        missing = _exact(part.x)(wanted - part.valid(part.output))
        if not self._cross.numel():
            self._cross = self._shared.zeros(missing.shape[1])
        for fold, some, inputs in pieces:
            self._cross[fold] += inputs.mT @ missing[some]

    def cross(self) -> Tensor:
        """``[1 x]' missing`` of every fold ``(folds, 1 + inputs, outputs)``."""
        return self._shared.move(self._cross)

    def changed(self, change: LinearChange | None) -> dict[str, Tensor]:
        """Weight and bias with a change, or as they are, in the layout of the module."""
        bias, stored = self._module.bias, self._module.get_parameter("weight").detach()
        new = {"weight": stored} | ({"bias": bias.detach()} if isinstance(bias, Tensor) else {})
        if change is None:
            return new
        read = input_dim(linear_at(self._module))
        matrix = _double(stacked_weight(stored, read)) + change.weight[..., None]
        new["weight"] = stored_weight(matrix, stored, read)
        if isinstance(bias, Tensor):
            new["bias"] = (_double(new["bias"]) + change.bias).to(bias)
        return new


class _GainSums:
    """Sums that determine gain and offset of each entry of a normalisation.

    Args:
        module: The normalisation in the cut model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, self._sums, self._offset = module, torch.zeros(()), 0.0

    def add(self, number: int, part: LayerCall, wanted: Tensor) -> None:
        """Add a call whose output should be ``wanted (positions, entries)``."""
        self._offset, plain = _normalized(self._module, part.x)
        found = _norm_sums(part.valid(plain), wanted)
        self._sums = self._sums.to(found) + found

    def total(self) -> Tensor:
        """``(5, entries)``: count, inputs, outputs, squares of inputs, products."""
        return self._sums

    def solve(self, sums: Tensor) -> dict[str, Tensor]:
        """New values by name."""
        return _solve_norm(self._module, sums, self._offset)


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


def _outer(x: Tensor) -> Tensor:
    """The upper triangle of ``x' x``, in the precision of ``x (positions, entries)``."""
    found = x.new_zeros(x.shape[1], x.shape[1])
    add_outer(found, x)
    return found


def _exact(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What gives tensors the precision in which they are multiplied with each other.

    Single precision where that is what was computed in, and products of it are not rounded further.
    """
    return torch.Tensor.float if x.dtype != torch.float64 and is_exact(x) else _double


def _double(x: Tensor) -> Tensor:
    """In double precision; on the CPU where the device of ``x`` has none."""
    return x.to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _is_enough(layer: ReconstructedLayer, size: int, count: float) -> bool:
    """Whether a layer with so many unknowns for each output is solved from so many positions.

    Raises:
        PruningError: If there are fewer positions than unknowns, but for an optional layer.
    """
    if layer.optional:
        return count >= 2 * size
    if count <= size:
        raise PruningError(
            f"Only {counted(int(count), 'position')} to reconstruct {layer.layer!r} from, which "
            f"has {counted(size, 'number')} to learn for each output; expected more, better "
            f"{number(10 * size)}. Validate on more data, raise the positions of reconstruction, "
            "or set its method to 'none'."
        )
    return True


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


def _norm_sums(plain: Tensor, wanted: Tensor) -> Tensor:
    """Sums over positions that determine gain and offset of each entry, ``(5, entries)``."""
    x, y = _double(plain), _double(wanted)
    return torch.stack([v.sum(0) for v in (torch.ones_like(x), x, y, x * x, x * y)])


def _normalized(module: nn.Module, x: Tensor) -> tuple[float, Tensor]:
    """What a module adds to its weight before it multiplies, and an input that is only normalised.

    Some add 1 (Gemma), so that a weight of 0 changes nothing.
    """
    if isinstance(module, nn.LayerNorm):
        return 0.0, functional.layer_norm(x, module.normalized_shape, eps=module.eps)
    weight = module.get_parameter("weight").detach()

    def run(value: float) -> Tensor:
        other = copy.copy(module)
        other.__dict__["_parameters"] = {"weight": torch.full_like(weight, value)}
        found: Tensor = other.forward(x)  # not called: it shares the hooks
        return found

    with torch.no_grad():
        low, high = run(0.0), run(1.0)
    return (1.0 if bool(low.any()) else 0.0), high - low


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
