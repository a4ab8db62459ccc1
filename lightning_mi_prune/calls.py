"""KEEP     a bounded sample of the calls that networks receive, spread over the batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mi_prune.sample import Example, is_plain

__all__ = ["StoredCalls"]


class StoredCalls:
    """Examples of real calls, so that a smaller model can be run on them.

    Args:
        positions: Positions to store for each network; 0 stores none.
        batches: Batches that will be heard; None takes positions first come, first served.
        seed: Seed of the draw; the global random state is not touched.

    Example:
        >>> kept = StoredCalls(6, batches=2, seed=0)
        >>> call = Example((torch.zeros(4, 3),), {})
        >>> for _ in range(2):
        ...     kept.keep("net", call, real=4, each=1.0)
        >>> [example.rows for example in kept.stored["net"]]
        [3, 3]
    """

    def __init__(self, positions: int, batches: int | None, seed: int) -> None:
        self.stored: dict[str, list[Example]] = {}
        self._quota = -(-positions // (1 if batches is None else max(1, batches)))
        self._positions = float(positions)
        self._generator = torch.Generator().manual_seed(seed)
        self._owed: dict[str, float] = {}
        self._room: dict[str, float] = {}

    def keep(self, path: str, call: Example, *, real: int, each: float) -> None:
        """Store some examples of a call that is under way.

        One that brings more than plain values is left out: a cache would go on filling up, and
        what other objects hold cannot be kept apart by example, nor written to a checkpoint.

        Args:
            path: The network that received it.
            call: The call.
            real: Examples of it, from its start, that do not only repeat others.
            each: Positions that an example of it has.
        """
        rows = call.rows
        if not self._quota or not _is_plain(call):
            return
        if call.mask is not None and call.mask.ndim > 1:
            each = float(call.mask.sum()) / max(1, rows)
        room = self._room.get(path, self._positions)
        owed = min(self._owed.get(path, 0.0) + self._quota, room)
        wanted = min(real, int(owed / max(1.0, each)))
        if path not in self.stored:
            wanted = max(1, wanted)  # less than one example of each batch would be none for ever
        if wanted:
            index = torch.randperm(real, generator=self._generator)[:wanted].sort().values
            self.stored.setdefault(path, []).append(call.some(index))
        self._owed[path], self._room[path] = owed - wanted * each, room - wanted * each


def _is_plain(call: Example) -> bool:
    """Whether it is made of plain values, but for what kinds of tensors there are."""

    def bare(value: Any) -> Any:
        if isinstance(value, Tensor) and not value.is_nested:
            return None
        if type(value) in (list, tuple):
            return [bare(part) for part in value]
        return {key: bare(part) for key, part in value.items()} if type(value) is dict else value

    return is_plain(bare([list(call.args), call.kwargs]))
