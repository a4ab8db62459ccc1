"""What a user would pick instead, each as published, with one signature.

A rival takes a dense model (which it may change: give it a copy), batches with labels to rank on,
the share of the prunable parameters that must go, and a seed. It returns the model, smaller or with
masks; `size.settle` makes masks zeros, and `size.size_of` says what is left. One brings a model of
its own instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from examples.benchmark.rivals.layers import cka_layers, first_layers
from examples.benchmark.rivals.masks import magnitude_masks
from examples.benchmark.rivals.movement import Movement
from examples.benchmark.rivals.small import Begun, small_dense
from examples.benchmark.rivals.torchpruning import group_magnitude, group_taylor
from examples.benchmark.variants import FoldIn, Widths

Prune = Callable[[nn.Module, Sequence[dict[str, Tensor]], float, int], nn.Module]


@dataclass(frozen=True)
class Rival:
    """A method from elsewhere, named like the variants of our own.

    Args:
        method: Name of the method.
        widths: "global" where all layers compete, "uniform" where all keep the same share.
        prune: What prunes before any training step.
        gradual: Scores that prune during the steps instead.
        own: What brings a model of its own instead, for the dense one, a task, seed and sparsity.
        fold_in: Always "none": what is left keeps its weights.
        cuts: Always one.
    """

    method: str
    widths: Widths
    prune: Prune | None = None
    gradual: Callable[[nn.Module, float], Movement] | None = None
    own: Callable[[nn.Module, str, int, float], Begun] | None = None
    fold_in: FoldIn = "none"
    cuts: int = 1


RIVALS = (
    Rival("torch-pruning-magnitude", "uniform", group_magnitude(everywhere=False)),
    Rival("torch-pruning-magnitude", "global", group_magnitude(everywhere=True)),
    Rival("torch-pruning-taylor", "uniform", group_taylor(everywhere=False)),
    Rival("torch-pruning-taylor", "global", group_taylor(everywhere=True)),
    Rival("magnitude-masks", "global", magnitude_masks),
    Rival("first-layers", "uniform", first_layers),
    Rival("cka-layers", "uniform", cka_layers),
    Rival("small-dense", "uniform", own=small_dense),
    Rival("movement-masks", "uniform", gradual=Movement.of_weights),
    Rival("movement-masks", "global", gradual=Movement.of_all_weights),
    Rival("movement-units", "uniform", gradual=Movement.of_units),
)
