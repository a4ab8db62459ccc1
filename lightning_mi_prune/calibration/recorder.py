"""Recorders: forward hooks on a network, for as long as a ``with`` block lasts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_mi_prune.calibration.calls import RecordedCall, StoredCalls, first_call
from lightning_mi_prune.calibration.padding import (
    Padding,
    add_masks,
    attention_mask_of,
    pad_nested,
)

__all__ = [
    "CallRecorder",
    "ModuleHooks",
    "Recorder",
]


class ModuleHooks(ABC):
    """Hooks on a module and its submodules, removed when the ``with`` block ends.

    Args:
        model: Module that is hooked, with everything in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def _attach(self) -> Iterator[RemovableHandle]:
        """Put the hooks on, one after another."""

    @abstractmethod
    def _clear(self) -> None:
        """Drop what is only needed while hooks are on."""

    def __enter__(self) -> Self:
        self.close()
        try:
            self._handles.extend(self._attach())
            self._handles.extend(pad_nested(self._model))  # after all others
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._clear()


class Recorder(ModuleHooks):
    """A recorder of validation, which is notified of every batch."""

    @abstractmethod
    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Start a batch.

        Args:
            rows: Examples in the batch, if known.
            padded: How many of them, at its end, only repeat others: they are not recorded.
        """


class CallRecorder(Recorder):
    """A recorder that also stores calls of the networks it is on.

    Args:
        model: Module that is hooked.
        calls: Positions of the inputs to store, so that a cut model can be run on them.
        batches: Batches to spread them over; None stores the first ones.
        seed: Seed of the draw; the global random state is not touched.
    """

    def __init__(self, model: nn.Module, calls: int, batches: int | None, seed: int) -> None:
        super().__init__(model)
        self.examples: dict[str, RecordedCall] = {}
        self.seconds = 0.0
        self._storage = StoredCalls(calls, batches, seed + 1)
        self._generator = torch.Generator().manual_seed(seed)
        self._padding = Padding()
        self._running: dict[str, RecordedCall] = {}
        self._repeats: tuple[int, int] | None = None

    @property
    def stored(self) -> dict[str, list[RecordedCall]]:
        """Stored inputs, by path of the network that received them."""
        return self._storage.stored

    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Start a batch, as :meth:`Recorder.start_batch` documents."""
        self._repeats = (rows, rows - padded) if rows is not None and padded else None

    def _clear(self) -> None:
        self._running.clear()
        self._padding.clear()

    def _start_call(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> RecordedCall:
        """Note that a module is called, and keep its very first example."""
        self._padding.start_call()
        mask = attention_mask_of(module, args, kwargs)
        if path not in self.examples:
            self.examples[path] = first_call(module, args, kwargs, mask)
        return RecordedCall(args, kwargs, mask)

    def _store_call(self, paths: Sequence[str], x: Tensor, each: float | None = None) -> None:
        """Store examples of the call that runs, when activations inside it are first seen.

        Args:
            paths: The network and its encoder; the first of them that runs is stored.
            x: Activations inside it.
            each: Positions of one example; default by the size of ``x``.
        """
        path = next((path for path in paths if path in self._running), None)
        if path is None:
            return
        add_masks(self._model, self._padding, self._running, self.examples, x)
        call = self._running[path]
        self._running.clear()
        if each is None:
            each = (1 if x.is_nested else x.shape[:-1].numel()) / max(1, call.rows)
        self._storage.keep(path, call, real=self._distinct(call.rows), each=each)

    def _distinct(self, rows: int) -> int:
        """How many examples, of so many, do not only repeat others."""
        return self._repeats[1] if self._repeats and rows == self._repeats[0] else rows

    def _valid(self, x: Tensor, mask: Tensor | None, dims: Sequence[int]) -> Tensor:
        """Flat indices of positions that are neither padding nor of repeated examples.

        Args:
            x: Activations, examples first.
            mask: Mask of positions that are not padding; ignored where it is of another shape.
            dims: Dimensions of examples and positions.
        """
        valid = torch.ones(dims, dtype=torch.bool, device=x.device)
        if mask is not None and mask.shape == valid.shape:
            valid &= mask.to(x.device).bool()
        if valid.ndim:
            valid[self._distinct(len(valid)) :] = False
        return valid.reshape(-1).nonzero().flatten()
