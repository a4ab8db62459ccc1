"""FEEL     hooks on readers in training steps: gradients of a bounded sample of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.hooks import Hooked
from lightning_mi_prune.padding import Padding
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.sample import rows_of

__all__ = ["GradientListener", "blank"]


class GradientListener(Hooked):
    """Hooks the readers of every axis and sums the gradients at their outputs, step by step.

    The gradients are those that ordinary training computes: of scaled losses, of losses divided for
    accumulation, of several losses in one step, through activation checkpoints. Where a step was
    scaled, say so, and gradients of different steps weigh the same. A step with a gradient that is
    not finite is left out at every place.

    Args:
        model: Module that holds the axes.
        axes: What to feel.
        steps: Steps to hear.
        batches: Steps there will be; they are heard evenly spread. None hears the first ones.
        taylor: Whether to gather first-order changes too, for the criterion of that name.
        plan: Plan that the model carries (default: as built).

    Example:
        >>> from lightning_mi_prune.families import linear_axis
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> axis = linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])
        >>> with GradientListener(net, [axis]) as felt:
        ...     with felt.step(0):
        ...         net(torch.randn(5, 3)).square().mean().backward()
        >>> [int(n) for n in felt.sums["hidden"].counts]
        [5, 1, 0]
    """

    def __init__(
        self,
        model: nn.Module,
        axes: Sequence[WidthAxis],
        *,
        steps: int = 64,
        batches: int | None = None,
        taylor: bool = False,
        plan: Plan | None = None,
    ) -> None:
        super().__init__(model)
        self.sums = blank(model, axes, plan)
        self._readers = [
            (key, reader, axis.scope or axis.network)
            for axis in axes
            for key, readers in axis.places.items()
            for reader in readers
        ]
        self._steps, self._taylor = steps, taylor
        self._padding = Padding()
        self._stride = 1 if batches is None else max(1, batches // steps)
        self._networks = sorted({axis.scope or axis.network for axis in axes})
        self._staged: dict[str, list[Tensor]] = {}
        self._rows: Counter[tuple[str, bool]] = Counter()
        self._last: dict[str, int] = {}
        self._hearing = False

    def _attach(self) -> Iterator[RemovableHandle]:
        for path in self._networks:
            module, hook = self._model.get_submodule(path), partial(self._count, path)
            yield module.register_forward_pre_hook(hook, with_kwargs=True)
        yield from self._padding.attach(self._model)
        for key, reader, path in self._readers:
            module, feel = self._model.get_submodule(reader), self._on_reader(key, path)
            yield module.register_forward_hook(feel, with_kwargs=True)

    @contextmanager
    def step(self, index: int, *, scale: float = 1.0) -> Iterator[None]:
        """The block in which one training step runs: :meth:`begin` and :meth:`end`."""
        self.begin(index)
        yield
        self.end(scale=scale)

    def begin(self, index: int) -> None:
        """A training step begins.

        Args:
            index: Index of the step within its epoch.
        """
        self._drop()
        turn, rest = divmod(index, self._stride)
        self._hearing = turn < self._steps and rest == self._stride - 1

    def end(self, *, scale: float = 1.0) -> None:
        """A training step is over: add what was felt to the sums, if all of it is finite.

        Args:
            scale: What one example's loss was multiplied with times the number of examples of the
                step: the scale of a gradient scaler over the number of accumulated batches.
        """
        staged, self._hearing = self._staged, False
        if staged:
            values = [t for parts in staged.values() for t in parts]
            finite = bool(torch.stack([t.sum() for t in values]).isfinite().all())
            examples = self._examples()
            weight = (examples / scale) ** 2
            for key, sums in self.sums.items():
                if not finite:
                    sums.counts[2] += 1
                    continue
                sums.counts += torch.tensor([examples, 1.0, 0.0], dtype=torch.float64)
                if key in staged:
                    matrix, taylor = (t.to("cpu", torch.float64) for t in staged[key])
                    sums.matrix += matrix * weight
                    sums.taylor += taylor * weight
        self._drop()

    def _drop(self) -> None:
        self._staged, self._rows, self._hearing = {}, Counter(), False
        self._last.clear()
        self._padding.clear()

    def _count(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._hearing and torch.is_grad_enabled():
            self._last[path] = rows_of((*args, *kwargs.values())) or 0
            self._rows[path, _is_again()] += self._last[path]

    def _count_positions_first(self, path: str, x: Tensor) -> None:
        """Correct the count of a call whose inputs have positions first, as they turn out to."""
        positions, rows = x.shape[:2]
        if self._last.get(path) == positions:
            self._rows[path, _is_again()] += rows - positions
            self._last[path] = rows

    def _examples(self) -> int:
        """Examples of the step; each goes through every network, and may do so once more."""
        return max(
            (self._rows[path, False] or self._rows[path, True] for path in self._networks),
            default=0,
        )

    def _on_reader(self, key: str, path: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if not self._hearing or not torch.is_grad_enabled():
                return None
            if not output.requires_grad:
                # Everything below is frozen, but what is above still says what matters here. Of
                # a copy: a leaf that needs gradients takes no operation in place.
                if not output.is_floating_point():
                    return None
                output = output.detach().requires_grad_().clone()
            x = (args[0] if args else kwargs["input"]).detach()
            weight: Any = module.weight
            swapped = self._padding.positions_first(x)
            if swapped:
                self._count_positions_first(path, x)
            feel = partial(self._feel, key, x, weight.detach(), swapped)
            output.register_hook(feel)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _feel(self, key: str, x: Tensor, weight: Tensor, swapped: bool, grad: Tensor) -> None:
        if not self._hearing:
            return
        if swapped:
            x, grad = x.transpose(0, 1), grad.transpose(0, 1)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            sums = self.sums[key]
            g = grad.detach().flatten(0, -2).float()
            down = g @ weight.float() if self._taylor or sums.inside else g
            heard = down if sums.inside else g
            if key not in self._staged:
                # Of a given type: precision plugins change what torch makes by itself.
                self._staged[key] = [
                    g.new_zeros(sums.dimension, sums.dimension),
                    g.new_zeros(sums.units),
                ]
            matrix, taylor = self._staged[key]
            matrix.addmm_(heard.mT, heard)
            if self._taylor:
                change = (x.reshape(down.shape).float() * down).view(x.shape[0], -1, x.shape[-1])
                entries = x.shape[-1] // max(1, sums.units)
                change = change.sum(1).view(x.shape[0], sums.units, entries).sum(2)
                taylor += change.square().sum(0)


def _is_again() -> bool:
    """Whether a forward pass runs inside a backward one: an activation checkpoint."""
    return bool(torch._C._current_graph_task_id() >= 0)


def blank(
    model: nn.Module, axes: Sequence[WidthAxis], plan: Plan | None = None
) -> dict[str, GradientSums]:
    """Empty sums for every place, in the shape the model has now, at a plan (default: as built)."""
    widths = {} if plan is None else plan.widths
    sums: dict[str, GradientSums] = {}
    for axis in axes:
        for key, readers in axis.places.items():
            rows, columns = model.get_parameter(f"{readers[0]}.weight").shape
            # What several layers read, unless it is what they make that is asked for.
            inside = (bool(axis.sites) or len(readers) > 1) and axis.turn is None
            units = 1 if axis.turn is not None else columns // axis.entries_at(widths)
            sums[key] = GradientSums(columns if inside else rows, units, inside=inside)
    return sums
