"""HOOK     onto modules for as long as a with block lasts, and off again whatever happens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType

from torch import nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_mi_prune.padding import pad_nested

__all__ = ["Ear", "Hooked"]


class Hooked(ABC):
    """Hooks of its own on a network, which come off when its ``with`` block ends.

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
    def _drop(self) -> None:
        """Forget what is only held while hooks are on."""

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
        """Take our own hooks down; safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._drop()


class Ear(Hooked):
    """What listens in validation, and is told of every batch."""

    @abstractmethod
    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Say that a batch begins.

        Args:
            rows: Examples in the batch, if known.
            padded: How many of them, at the end, only repeat others: they are not heard.
        """
