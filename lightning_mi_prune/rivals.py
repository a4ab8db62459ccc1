"""RIVALS   other ways to say which layers go: how far they turn, the last, any (no torch)."""

from __future__ import annotations

import random
from collections.abc import Sequence

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.redundancy import square

__all__ = ["closest_run", "last_layers", "least_turning", "random_layers"]


def least_turning(angles: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The layers that turn their input least, each by itself (ShortGPT's block influence).

    Men et al. 2024 (arXiv 2403.03853) rank by ``1 - cos`` of input and output; the angle gives the
    same order for one sample, and is what is averaged here.

    Args:
        angles: Mean angle between every pair of states, input of the first layer first
            (:class:`angles.Angles`): one more than there are layers.
        count: Layers to remove.

    Example:
        >>> least_turning([[0.0, 0.4, 0.5], [0.4, 0.0, 0.1], [0.5, 0.1, 0.0]], 1)
        (1,)
    """
    layers = square(angles, "angles") - 1
    check_count(count, layers)
    turned = [angles[layer][layer + 1] for layer in range(layers)]
    return tuple(sorted(sorted(range(layers), key=lambda layer: (turned[layer], layer))[:count]))


def closest_run(angles: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The ``count`` neighbouring layers that together turn their input least.

    Gromov et al. 2024 (arXiv 2403.17887): the run from ``l`` with the least distance between the
    states ``l`` and ``l + count``.

    Args:
        angles: Mean angle between every pair of states, input of the first layer first.
        count: Layers to remove.

    Example:
        >>> closest_run([[0.0, 0.4, 0.5], [0.4, 0.0, 0.1], [0.5, 0.1, 0.0]], 1)
        (1,)
    """
    layers = square(angles, "angles") - 1
    check_count(count, layers)
    first = min(range(layers - count + 1), key=lambda at: (angles[at][at + count], at))
    return tuple(range(first, first + count))


def last_layers(layers: int, count: int) -> tuple[int, ...]:
    """The top ``count`` layers.

    Example:
        >>> last_layers(6, 2)
        (4, 5)
    """
    check_count(count, layers)
    return tuple(range(layers - count, layers))


def random_layers(layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """Any ``count`` layers; the same ones for the same seed.

    Example:
        >>> random_layers(6, 2, seed=1) == random_layers(6, 2, seed=1)
        True
    """
    check_count(count, layers)
    return tuple(sorted(random.Random(seed).sample(range(layers), count)))  # noqa: S311


def check_count(count: int, layers: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < layers:
        raise PruningError(
            f"count={count!r}; expected whole layers to remove, from 0 and below the {layers} "
            "there are."
        )
