"""REFIT    pull the cut model back to the dense one, bottom-up, in one forward pass.

The moments of a validation pass describe the uncut model; cutting below changes what the layers
above receive. So every output projection of the cut model is solved again on the inputs that it
really gets, when they get there: least squares towards ``z_dense + skip_dense - skip_cut``, the
output that puts the residual stream back where it was, with a ridge towards the weights it has.
Layers that read the stream above the lowest cut are solved towards what they said in the dense
model, and normalisations whose width was cut, entry by entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.evidence import kept_rows
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.sample import Example, run

__all__ = ["Reading", "readings", "record", "refit"]

Sum = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reading:
    """One layer that is solved again.

    Args:
        layer: Path of the linear layer, or of the normalisation.
        skip: Path of the module whose input is the stream that is added to the layer's output.
        rows: Outputs that survive the cut, as positions in the present model; None: all.
        spare: Whether the layer is left as it is where the sample is small.
    """

    layer: str
    skip: str | None
    rows: Tensor | None
    spare: bool = False


def readings(axes: Sequence[WidthAxis], current: Plan, plan: Plan) -> list[Reading]:
    """What a plan leaves to be solved again: everything from the lowest cut upwards.

    Args:
        axes: All axes of the model.
        current: Plan the model carries now.
        plan: Plan it will carry.
    """
    target = current.then(plan)
    cut = [axis for axis in axes if target.width(axis.name) < current.width(axis.name)]
    if not cut:
        return []
    lowest = min(axis.level for axis in cut)
    found = []
    for axis in sorted(axes, key=lambda axis: axis.level):
        if axis.skip is not None and axis.level >= lowest:
            for reader in axis.readers:
                rows = kept_rows(f"{reader}.weight", target.kept, current, axes)
                found.append(Reading(reader, axis.skip, rows))
        if axis.norms and axis in cut:
            norms = [kept_rows(f"{norm}.weight", target.kept, current, axes) for norm in axis.norms]
            found += [Reading(n, None, r) for n, r in zip(axis.norms, norms, strict=True)]
    above = {r: None for axis in cut for r in axis.above}
    for reader in above:
        rows = kept_rows(f"{reader}.weight", target.kept, current, axes)
        found.append(Reading(reader, None, rows, spare=True))
    return found


def record(model: nn.Module, found: Sequence[Reading], path: str, call: Example) -> _Targets:
    """What the model as it stands says on a sample, where the cut model will be solved again.

    Args:
        model: Module from which everything is named.
        found: Layers that will be solved.
        path: Network that is called.
        call: The sample.

    Returns:
        Target ``(positions, outputs)`` of every call of every layer, by layer.
    """
    targets: _Targets = {}

    def keep(reading: Reading, x: Tensor, skip: Tensor | None, output: Tensor) -> Tensor:
        wanted = output if skip is None else output + skip
        wanted = _heard(wanted, call.mask)
        if reading.rows is not None:
            wanted = wanted[:, reading.rows.to(wanted.device)]
        targets.setdefault(reading.layer, []).append(wanted)
        return output

    _run_with(model, found, path, call, keep)
    return targets


def refit(
    cut: nn.Module,
    found: Sequence[Reading],
    path: str,
    call: Example,
    targets: Mapping[str, Sequence[Tensor]],
    *,
    ridge: float = 1e-2,
    add: Sum = lambda sums: sums,
    share: float = 1.0,
) -> dict[str, Tensor]:
    """Weights and biases that pull the residual stream of a cut model back to the dense one's.

    The model is only run, never changed: each hook solves its layer when the data arrives and hands
    the new output on, so that everything above sees the refitted stream. A layer that runs several
    times in a pass (ALBERT's are shared) stays as it is: each of its calls would want to make up
    for the same loss of the stream.

    Args:
        cut: The cut model, with the weights that folding in left.
        found: Layers to solve.
        path: Network that is called.
        call: The sample, the same as for :func:`record`.
        targets: What :func:`record` returned.
        ridge: Pull towards the present weights, as a share of the mean variance of the inputs.
        add: Adds sums up over ranks; every rank comes by in the same order.
        share: Weight of this rank's sample; 0 for one that only keeps the others company.

    Returns:
        New values in the shape they have in the cut model, by tensor name.

    Raises:
        PruningError: If the sample is smaller than what a layer has to learn from it.
    """
    solved: dict[str, Tensor] = {}
    inputs = _Inputs(call.mask)

    def solve(reading: Reading, x: Tensor, skip: Tensor | None, output: Tensor) -> Tensor:
        if len(targets[reading.layer]) > 1:
            return output
        wanted, layer = targets[reading.layer][0], cut.get_submodule(reading.layer)
        if skip is not None:
            wanted = wanted - _heard(skip, call.mask)
        if isinstance(layer, nn.LayerNorm):
            plain = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps)
            new = _solve_norm(layer, _heard(plain, call.mask), wanted, add, share)
            solved.update({f"{reading.layer}.{name}": value for name, value in new.items()})
            return plain * new["weight"] + new.get("bias", 0)
        sums = share * inputs.sums(x, wanted - _heard(output, call.mask))
        new = _solve(reading, layer, add(sums), ridge)
        solved.update({f"{reading.layer}.{name}": value for name, value in new.items()})
        return functional.linear(x, new["weight"], new.get("bias")) if new else output

    _run_with(cut, found, path, call, solve)
    return solved


_Targets = dict[str, list[Tensor]]
_Act = Callable[[Reading, Tensor, Tensor | None, Tensor], Tensor]


def _run_with(
    model: nn.Module, found: Sequence[Reading], path: str, call: Example, act: _Act
) -> None:
    """Run the network once; every layer's output goes through ``act``."""
    skips: dict[str, Tensor] = {}
    handles = []

    def hold(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            skips[name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def change(reading: Reading) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            x = args[0] if args else kwargs["input"]
            skip = None if reading.skip is None else skips[reading.skip]
            return act(reading, x, skip, output)

        return hook

    try:
        for name in sorted({r.skip for r in found if r.skip is not None}):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hold(name), with_kwargs=True))
        for reading in found:
            module = model.get_submodule(reading.layer)
            handles.append(module.register_forward_hook(change(reading), with_kwargs=True))
        run(model.get_submodule(path), call)
    finally:
        for handle in handles:
            handle.remove()


def _heard(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that are not padding, flat."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device).bool()]
    return x.flatten(0, -2)


class _Inputs:
    """Normal equations; layers that read the same input share its part of them."""

    def __init__(self, mask: Tensor | None) -> None:
        self._mask = mask
        self._x: Tensor | None = None
        self._inputs = self._outer = torch.empty(0)

    def sums(self, x: Tensor, missing: Tensor) -> Tensor:
        """``[1 x]' [1 x]`` beside ``[1 x]' missing``, over the positions that are not padding."""
        if x is not self._x:
            heard = _heard(x, self._mask).double()
            ones = heard.new_ones(len(heard), 1)  # there may be no input left
            self._inputs = torch.cat([ones, heard], dim=1)
            self._outer, self._x = self._inputs.mT @ self._inputs, x
        return torch.cat([self._outer, self._inputs.mT @ missing.double()], dim=1)


def _solve(reading: Reading, layer: nn.Module, sums: Tensor, ridge: float) -> dict[str, Tensor]:
    """New weight and bias of a linear layer; nothing where it can be spared."""
    size = sums.shape[0]
    outer, cross = sums[:, :size], sums[:, size:]
    count, weight, bias = outer[0, 0], layer.weight, layer.bias
    if reading.spare and float(count) < 2 * size:
        return {}
    if float(count) <= size:
        raise PruningError(
            f"{int(count)} positions were stored to refit {reading.layer!r}, which has {size} "
            f"numbers to learn for each output; expected more, better {10 * size}. Validate on "
            "more data, raise refit_positions, or set refit=False."
        )
    assert isinstance(weight, Tensor)  # noqa: S101
    first = 0 if isinstance(bias, Tensor) else 1
    if first == 0:  # centred: the bias takes what the means ask for
        mean, shift = outer[0, 1:] / count, cross[0] / count
        outer = outer[1:, 1:] / count - torch.outer(mean, mean)
        cross = cross[1:] / count - torch.outer(mean, shift)
    else:
        outer, cross = outer[1:, 1:] / count, cross[1:] / count
    if size > 1:
        strength = ridge * outer.diagonal().mean().clamp_min(torch.finfo(outer.dtype).tiny)
        outer = outer + strength * torch.eye(size - 1).to(outer)
        change = torch.cholesky_solve(cross, torch.linalg.cholesky(outer)).mT
    else:
        change = cross.mT
    new = {"weight": (weight.double() + change).to(weight.dtype)}
    if isinstance(bias, Tensor):
        new["bias"] = (bias.double() + shift - change @ mean).to(bias.dtype)
    return {key: value.detach() for key, value in new.items()}


def _solve_norm(
    layer: nn.LayerNorm, plain: Tensor, wanted: Tensor, add: Sum, share: float
) -> dict[str, Tensor]:
    """New gain and offset of a normalisation, each entry by itself."""
    x, y = plain.double(), wanted.double()
    ones = torch.ones_like(x)
    sums = add(share * torch.stack([v.sum(0) for v in (ones, x, y, x * x, x * y)]))
    count, mean_x, mean_y, square, product = sums / sums[0].clamp_min(1) * torch.ones_like(sums)
    del count
    variance = (square - mean_x**2).clamp_min(torch.finfo(square.dtype).tiny)
    gain = (product - mean_x * mean_y) / variance
    # An entry that never changes says nothing of its gain.
    gain = torch.where(variance > 1e-8 * variance.mean(), gain, layer.weight.double())
    new = {"weight": gain.to(layer.weight.dtype)}
    if layer.bias is not None:
        new["bias"] = (mean_y - gain * mean_x).to(layer.bias.dtype)
    return {key: value.detach() for key, value in new.items()}
