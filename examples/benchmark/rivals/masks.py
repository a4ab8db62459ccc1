"""Single weights masked by magnitude, all of the encoder ranked together (torch.nn.utils.prune).

It is what Lightning's ModelPruning does with `l1_unstructured` and global pruning. Masks save
neither memory nor time in dense products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from examples.benchmark.rivals.size import weights_of
from lightning_mi_prune import find_axes
from lightning_mi_prune.axes import count_parameters
from lightning_mi_prune.choosing import choose_axes


@torch.no_grad()  # the masked weights are then plain tensors, which can be copied
def magnitude_masks(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], sparsity: float, seed: int
) -> nn.Module:
    """Mask the smallest weights of neurons and heads; training keeps the masks.

    Args:
        model: The dense model, which is changed.
        batches: Not used.
        sparsity: Share of the parameters of neurons and heads; biases count, but stay.
        seed: Not used.
    """
    axes = choose_axes(find_axes(model))
    paths = [name.removesuffix(".weight") for name in weights_of(axes)]
    count = round(sparsity * count_parameters(axes))
    prune.global_unstructured(
        [(model.get_submodule(path), "weight") for path in paths],
        pruning_method=prune.L1Unstructured,
        amount=count,
    )
    return model
