"""Whole layers removed: the first n stay, or those that CKA tells apart (MPruner)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_mi_prune import find_stacks
from lightning_mi_prune.depth import full_depth
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.sparing import LayerCriterion, Thinning
from lightning_mi_prune.stacks import StackListeners
from lightning_mi_prune.surgery import shorten


def first_layers(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], sparsity: float, seed: int
) -> nn.Module:
    """Remove the top layers."""
    return without_layers(model, batches, sparsity, "last")


def cka_layers(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], sparsity: float, seed: int
) -> nn.Module:
    """Remove the layers that say what the first of their cluster says."""
    return without_layers(model, batches, sparsity, "cka")


def layers_left(layers: int, sparsity: float) -> int:
    """Layers that stay, rounded in favour of the rival: at most the asked share goes.

    Example:
        >>> [layers_left(6, sparsity) for sparsity in (0.25, 0.5, 0.75, 0.9)]
        [5, 3, 2, 1]
    """
    return max(1, math.ceil(layers * (1 - sparsity) - 1e-9))


@torch.no_grad()
def without_layers(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    sparsity: float,
    criterion: LayerCriterion,
) -> nn.Module:
    """Remove layers of every stack of a model.

    Args:
        model: The dense model, which is changed.
        batches: What its layers are compared on.
        sparsity: Share of the layers that goes at most.
        criterion: Which layers go.
    """
    stacks = find_stacks(model)
    everything = full_depth(stacks)
    with StackListeners(model, stacks) as listeners:
        for batch in batches:
            listeners.start_batch()
            model(**batch)
    compared = listeners.compared(everything)
    kept = {}
    for stack in stacks:
        thinning = Thinning(None, target=layers_left(stack.size, sparsity), criterion=criterion)
        kept[stack.name] = thinning.choose(stack.name, compared[stack.name]).after
    shorten(model, stacks, Plan({stack.name: stack.size for stack in stacks}, kept))
    return model
