"""What is left of a pruned model, counted alike for every method."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import prune

from lightning_mi_prune import WidthAxis
from lightning_mi_prune.axes import count_parameters

Kept = dict[str, list[int]]


@dataclass(frozen=True)
class Size:
    """What is left of a model.

    Args:
        sparsity: Share of the prunable parameters that is gone or zero.
        parameters: All parameters that are there and not masked.
        prunable: Those of them that neurons and heads consist of.
        kept: Units of every layer that is there, bottom to top, by kind of axis.
        masked: Whether parameters were set to zero where they stand, so that nothing got smaller.
    """

    sparsity: float
    parameters: int
    prunable: int
    kept: Kept
    masked: bool


def weights_of(axes: Sequence[WidthAxis]) -> list[str]:
    """Names of the weight matrices that the units of these axes consist of."""
    names = (s.tensor for axis in axes for s in axis.slices if s.tensor.endswith(".weight"))
    return list(dict.fromkeys(names))


def settle(model: nn.Module) -> nn.Module:
    """Make masks of `torch.nn.utils.prune` permanent: zeros in plain weights."""
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")  # type: ignore[no-untyped-call]
    return model


def size_of(model: nn.Module, axes: Sequence[WidthAxis], dims: Sequence[WidthAxis] = ()) -> Size:
    """Count what is left of a model whose masks are settled.

    Args:
        model: The pruned model.
        axes: Neurons and heads of the dense one.
        dims: Dimensions of heads, where they may have gone.
    """
    modules = dict(model.named_modules())
    sizes = {axis.name: size_now(model, axis) for axis in dims}
    widths = {
        axis.name: width_of(model, axis, axis.entries_at(sizes))
        for axis in axes
        if axis.readers[0] in modules
    } | sizes
    axes = [*axes, *dims]
    kept: Kept = {}
    for axis in sorted(axes, key=lambda axis: axis.level):
        if axis.name in widths:
            kept.setdefault(axis.kind, []).append(widths[axis.name])
    # Layers close up when some are removed, so it is the top ones that have no width.
    left = count_parameters(axes, {axis.name: widths.get(axis.name, 0) for axis in axes})
    zeros = sum(zeros_of(model, name) for name in weights_of(axes))
    total = sum(parameter.numel() for parameter in model.parameters())
    return Size(
        sparsity=1 - (left - zeros) / count_parameters(axes),
        parameters=total - zeros,
        prunable=left - zeros,
        kept=kept,
        masked=zeros > 0,
    )


def width_of(model: nn.Module, axis: WidthAxis, entries: int) -> int:
    """Units of an axis that are there, each of so many entries."""
    return model.get_parameter(f"{axis.readers[0]}.weight").shape[1] // entries


def size_now(model: nn.Module, axis: WidthAxis) -> int:
    """Dimensions that heads have: the number that their module knows."""
    (count,) = axis.counts
    return int(getattr(model.get_submodule(count.module), count.attribute))


def zeros_of(model: nn.Module, name: str) -> int:
    """Entries of a tensor that are exactly zero; none where there is no such tensor."""
    try:
        tensor = model.get_parameter(name)
    except AttributeError:
        return 0
    return int(torch.count_nonzero(tensor == 0))
