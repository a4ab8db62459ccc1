"""LISTEN   hooks on, sums per layer (torchmetrics.Metric, "sum" states), hooks off."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError

__all__ = ["Example", "Listener", "Moments"]


class Moments(Metric):
    """Count, sum and sum of outer products of what one axis carries, in float64.

    Sums of fixed shape, so memory does not depend on how much is heard and ranks are reduced by
    addition.

    Args:
        dimension: Entries ``d`` of the axis.

    Example:
        >>> moments = Moments(2)
        >>> moments.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        >>> mean, covariance = moments.compute()
        >>> mean, covariance
        (tensor([2., 4.], dtype=torch.float64), tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64))
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None

    count: Tensor
    total: Tensor
    outer: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        zeros = torch.zeros(dimension, dtype=torch.float64)
        self.dimension = dimension
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", zeros, dist_reduce_fx="sum")
        # Metric keeps a copy of every default, so this one starts as a scalar and is given its
        # d^2 entries by the first update: half the memory.
        self.add_state("outer", zeros.sum(), dist_reduce_fx="sum")

    def update(self, x: Tensor) -> None:
        """Add samples ``x (n, d)``."""
        # Validation runs in inference mode and maybe autocast; sums stay ordinary float64 tensors.
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.float64)
            if self.outer.ndim == 0:
                self.outer = torch.zeros(self.dimension, self.dimension).to(x)
            self.count += x.shape[0]
            self.total += x.sum(0)
            self.outer.addmm_(x.mT, x)

    def hear(self, x: Tensor) -> None:
        """Add samples where they are; sums live on the CPU if their device has no float64."""
        home = torch.device("cpu") if x.device.type == "mps" else x.device
        with torch.inference_mode(False):  # moved in inference mode, sums could not be added to
            self.to(home)
        self.update(x.to(home))

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean ``(d,)`` and covariance ``(d, d)`` (divided by ``N``)."""
        return self.statistics()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """What :meth:`compute` says, uncached, and unsqueezed where there is one entry."""
        mean = self.total / self.count
        return mean, (self.outer / self.count).addr_(mean, mean, alpha=-1)


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

    def start_batch(self) -> None:
        """Say that a batch begins, so that one that runs the network twice gets no double share."""
        self._left = {axis.name: self._quota for axis in self._axes}

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
            if mask is not None and mask.shape == x.shape[:-1]:
                live = mask.to(x.device).reshape(-1).bool()
                index = live.nonzero().flatten()
            else:
                index = torch.arange(flat.shape[0], device=x.device)
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
        """Refuse what was heard if it cannot be scored.

        Raises:
            PruningError: If an axis was never reached, or carries NaN or infinite values.
        """
        for name, moments in self.moments.items():
            if int(moments.count) == 0:
                raise PruningError(
                    f"Nothing was heard at {name!r}: its layer never ran in validation. Expected "
                    "validation_step to call the network; exclude the axis or name the module."
                )
            if not torch.isfinite(moments.total).all() or not torch.isfinite(moments.outer).all():
                raise PruningError(
                    f"NaN or infinite activations at {name!r} during validation. Expected finite "
                    "values; look for a diverged loss or an overflow in half precision first."
                )


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
