"""Which layers of a stack are missed least, by the loss without them (no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from lightning_mi_prune.calibration.data import LayerLosses
from lightning_mi_prune.core.errors import PruningError, counted

__all__ = [
    "Losses",
    "cheapest_removal",
]

Removal: TypeAlias = frozenset[int]
Losses: TypeAlias = Callable[[Sequence[Removal]], Sequence[float]]
"""Measures the loss without each of some sets of layers, all in one sweep."""


def cheapest_removal(
    losses: Losses, layers: Sequence[int], count: int, fixed: int = 0
) -> LayerLosses:
    """The layers whose removal raises the loss least, of all removals that were measured.

    Greedy: the layer whose removal costs least goes, again and again. Beside it, in each sweep, all
    that is still to go as one run of neighbours, as layers may be missed less together than each
    alone; the best complete removal of any sweep wins. The first sweep measures every layer and
    every run; later ones, of what is left, the half of the layers and the quarter of the runs that
    cost least so far. So ``L`` layers need at most ``2 L + 2 + (count - 1) (3/4 L + 2)`` losses, in
    ``count`` sweeps.

    Args:
        losses: Measures the loss without sets of layers.
        layers: The layers that are there, bottom to top.
        count: Layers to remove.
        fixed: Layers at the bottom that must stay.

    Returns:
        The layers, with the losses with and without them.

    Raises:
        PruningError: If so many cannot be removed, or the loss is not finite.

    Example:
        >>> def loss(removed):  # those in the middle undo one another
        ...     alone = sum((0.3, 0.5, 0.4, 0.2)[layer] for layer in removed)
        ...     return 1.0 if removed == {1, 2} else 1 + alone
        >>> found = cheapest_removal(lambda sets: [loss(s) for s in sets], range(4), 2)
        >>> found.removed, found.after, found.measured
        ((1, 2), 1.0, 8)
    """
    free = list(layers[fixed:])
    if not 0 < count < len(layers) or count > len(free):
        raise PruningError(
            f"{count} of {counted(len(layers), 'layer')} cannot be removed, {fixed} of them must "
            f"stay; expected 1 to {len(layers) - max(1, fixed)}."
        )
    known: dict[Removal, float] = {}

    def measure(removals: Sequence[Removal]) -> None:
        new = [removal for removal in dict.fromkeys(removals) if removal not in known]
        found = losses(new) if new else []
        known.update(zip(new, (x if math.isfinite(x) else math.inf for x in found), strict=True))

    none: Removal = frozenset()
    alone = {layer: frozenset({layer}) for layer in free}
    measure([none, *alone.values(), *_runs(free, count)])
    if math.isinf(known[none]):
        raise PruningError(
            "The loss of the whole model is NaN or infinite; expected a finite one. Look for a "
            "diverged loss or an overflow in half precision first."
        )
    cost = {layer: known[alone[layer]] - known[none] for layer in free}
    removed = none
    while len(removed) < count:
        left = [layer for layer in free if layer not in removed]
        cheap = sorted(left, key=lambda layer: cost[layer])
        if removed:
            cheap = cheap[: -(-len(left) // 2)]
            runs = [*_runs(left, count - len(removed))]
            runs.sort(key=lambda run: sum(cost[layer] for layer in run))
            runs = runs[: -(-len(runs) // 4)]
            measure([removed | {layer} for layer in cheap] + [removed | run for run in runs])
        before = known[removed]
        for layer in cheap:
            more = known[removed | {layer}]
            cost[layer] = math.inf if math.isinf(more) else more - before
        removed |= {min(cheap, key=lambda layer: cost[layer])}
    complete = [removal for removal in known if len(removal) == count]
    best = min(complete, key=lambda removal: (known[removal], sorted(removal)))
    if math.isinf(known[best]):
        raise PruningError(
            f"The loss without {counted(count, 'layer')} is NaN or infinite, whichever go; "
            "expected a finite one. Remove fewer layers, or choose another criterion."
        )
    singles = (known.get(frozenset({layer}), math.inf) for layer in layers)
    return LayerLosses(
        whole=known[none],
        single=tuple(loss if math.isfinite(loss) else None for loss in singles),
        removed=tuple(layer for layer in layers if layer in best),
        after=known[best],
        measured=len(known) - 1,
    )


def _runs(layers: Sequence[int], length: int) -> Iterator[Removal]:
    """All runs of so many neighbours."""
    for first in range(len(layers) - length + 1):
        yield frozenset(layers[first : first + length])
