"""LISTEN   hooks on, a fair share of the positions of every batch, hooks off."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.moments import Moments, check_moments

__all__ = ["Example", "Listener"]


@dataclass(frozen=True)
class Example:
    """One real call of a network, cut down to its first example: enough to count its work."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Listener:
    """Hooks the readers of every axis and sums what arrives, until the ``with`` block ends.

    One sample is one position that is not padding; where the layer has no positions (after
    pooling) it is one example. At most ``positions`` samples an axis are taken, spread evenly over
    the batches and drawn at random within each, the same ones for every axis of a network.

    Args:
        model: Module that holds the axes.
        axes: What to listen to.
        positions: Samples to take for each axis.
        batches: Batches that will be heard; None takes positions first come, first served.
        seed: Seed of the draw; the global random state is not touched.

    Example:
        >>> from lightning_mi_prune.families import linear_axis
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> axis = linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])
        >>> with Listener(net, [axis]) as heard:
        ...     _ = net(torch.randn(5, 3))
        >>> int(heard.moments["hidden"].count)
        5
    """

    def __init__(
        self,
        model: nn.Module,
        axes: Sequence[WidthAxis],
        *,
        positions: int = 16_384,
        batches: int | None = None,
        seed: int = 0,
    ) -> None:
        self.moments = {
            axis.name: Moments(model.get_parameter(f"{axis.readers[0]}.weight").shape[1])
            for axis in axes
        }
        self.examples: dict[str, Example] = {}
        self.seconds = 0.0
        self._model, self._axes = model, axes
        self._positions = positions
        self._quota = positions if batches is None else max(1, -(-positions // max(1, batches)))
        self._generator = torch.Generator().manual_seed(seed)
        self._masks: dict[str, Tensor | None] = {}
        self._draws: dict[tuple[str, int], Tensor] = {}
        self._left: dict[str, int] = {}
        self._fresh: tuple[int, int] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Listener:
        self.close()
        hook = {axis.network for axis in self._axes} | {axis.scope for axis in self._axes}
        for path in sorted(hook):
            self._attach(path, self._on_scope(path))
        for axis in self._axes:
            self._attach(axis.readers[0], self._on_reader(axis))
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
        self._masks.clear()
        self._draws.clear()

    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Say that a batch begins, so that one that runs the network twice gets no double share.

        Args:
            rows: Examples in the batch, if known.
            padded: How many of them, at the end, only repeat others: they are not heard.
        """
        self._left = {axis.name: self._quota for axis in self._axes}
        self._fresh = (rows, rows - padded) if rows is not None and padded else None

    def _attach(self, path: str, hook: Any) -> None:
        module = self._model.get_submodule(path)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _on_scope(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in self.examples:
                rows = _rows((*args, *kwargs.values()))
                self.examples[path] = Example(_first(args, rows), _first(kwargs, rows))
            bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
            mask = bound.arguments.get("attention_mask")
            self._masks[path] = mask if isinstance(mask, Tensor) else None
            self._draws.clear()

        return hook

    def _on_reader(self, axis: WidthAxis) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            started = time.perf_counter()
            x = (args[0] if args else kwargs["input"]).detach()
            mask = self._masks.get(axis.scope)
            flat = x.reshape(-1, x.shape[-1])
            moments = self.moments[axis.name]
            room = self._positions - int(moments.count)
            wanted = min(self._left.get(axis.name, self._quota), room)
            live = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            if mask is not None and mask.shape == x.shape[:-1]:
                live &= mask.to(x.device).bool()
            if self._fresh is not None and x.ndim > 1 and x.shape[0] == self._fresh[0]:
                live[self._fresh[1] :] = False
            index = live.reshape(-1).nonzero().flatten()
            if wanted <= 0:
                return
            if len(index) > wanted:
                index = index[self._draw(axis.scope, len(index), wanted).to(x.device)]
            moments.hear(flat[index])
            if axis.name in self._left:
                self._left[axis.name] -= len(index)
            self.seconds += time.perf_counter() - started

        return hook

    def _draw(self, scope: str, available: int, wanted: int) -> Tensor:
        key = (scope, available)
        if key not in self._draws:
            self._draws[key] = torch.randperm(available, generator=self._generator)
        return self._draws[key][:wanted]

    def calls(self, axes: Sequence[WidthAxis]) -> dict[str, Example]:
        """One call of each network, or of its encoder where the network itself is never called."""
        found: dict[str, Example] = {}
        for network, scope in sorted({(axis.network, axis.scope) for axis in axes}):
            path = network if network in self.examples else scope
            if path in self.examples:
                found[path] = self.examples[path]
        return found

    def check(self) -> None:
        """Refuse what was heard if it cannot be scored, as :func:`check_moments` does."""
        check_moments(self.moments)


def _first(value: Any, rows: int | None) -> Any:
    """The first example of every tensor with that many rows, in nested containers."""
    if isinstance(value, Tensor):
        batched = value.ndim > 0 and value.shape[0] == rows
        return (value[:1] if batched else value).detach().clone()
    if isinstance(value, tuple):
        return tuple(_first(v, rows) for v in value)
    if isinstance(value, list):
        return [_first(v, rows) for v in value]
    if isinstance(value, dict):
        return {k: _first(v, rows) for k, v in value.items()}
    return value


def _rows(values: Iterable[Any]) -> int | None:
    """Batch size of a call: rows of its first tensor with two dimensions or more."""
    return next((v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim > 1), None)
