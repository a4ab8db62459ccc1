"""A small dense model: the first layers of the pretrained encoder, fine-tuned like the dense model.

There is no pretrained model of the asked size. This one begins with as many layers as
`first-layers` leaves, and gets the recipe of the dense model: rows, order, epochs, head and seed.
Nothing of the fine-tuned dense model is in it.
"""

from typing import NamedTuple

from torch import nn

from examples.benchmark.finetuned import dense_record, finetuned
from examples.benchmark.rivals.layers import layers_left
from lightning_mi_prune import find_stacks


class Begun(NamedTuple):
    """A model before the steps that all methods get, and what it took to have it.

    Args:
        model: The model.
        seconds: Wall clock.
        cpu_seconds: Of the processor.
    """

    model: nn.Module
    seconds: float
    cpu_seconds: float


def small_dense(model: nn.Module, task: str, seed: int, sparsity: float) -> Begun:
    """Fine-tune a small model, or open the one that was trained before.

    The seconds are those of its own fine-tuning, as recorded then: other methods begin with the
    dense model, which is there; this one needs a training of its own for every size.

    Args:
        model: The dense model, only for its number of layers.
        task: Name of the task.
        seed: Seed of the split and of the training.
        sparsity: Share of the layers that is lacking at most.
    """
    (stack,) = find_stacks(model)
    layers = layers_left(stack.size, sparsity)
    small, _ = finetuned(task, seed, layers)
    record = dense_record(task, seed, layers)
    return Begun(small, record["seconds"], record["cpu_seconds"])
