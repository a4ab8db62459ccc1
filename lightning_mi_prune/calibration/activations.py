"""ActivationRecorder: forward hooks that sum the inputs of every group's consumers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_mi_prune.calibration.calls import RecordedCall, StoredCalls, first_call
from lightning_mi_prune.calibration.moments import Moments, check_moments
from lightning_mi_prune.calibration.padding import Padding, attention_mask_of, complete, pad_nested
from lightning_mi_prune.discovery.groups import DependencyGroup

__all__ = [
    "ActivationRecorder",
    "ModuleHooks",
    "Recorder",
]


class ModuleHooks(ABC):
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


class Recorder(ModuleHooks):
    """What listens in validation, and is told of every batch."""

    @abstractmethod
    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Say that a batch begins.

        Args:
            rows: Examples in the batch, if known.
            padded: How many of them, at the end, only repeat others: they are not heard.
        """


# Samples that wait to be summed together: every product passes over a whole matrix of sums, so
# small ones, of many batches, would cost the more the longer validation is.
_TOGETHER = 512


class ActivationRecorder(Recorder):
    """Hooks the consumers of every group and sums what arrives, until the ``with`` block ends.

    One sample is one position that is not padding; where the layer has no positions (after
    pooling) it is one example. At most ``positions`` samples a group are taken, spread evenly over
    the batches and drawn at random within each, the same ones for every group of a network.

    Args:
        model: Module that holds the groups.
        groups: What to listen to.
        positions: Samples to take for each group.
        batches: Batches that will be heard; None takes positions first come, first served.
        seed: Seed of the draw; the global random state is not touched.
        calls: Positions of the inputs to store, so that a cut model can be run on them.

    Example:
        >>> from lightning_mi_prune.discovery.families.describe import linear_group
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> with ActivationRecorder(net, [group]) as heard:
        ...     _ = net(torch.randn(5, 3))
        >>> int(heard.moments["hidden"].count)
        5
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[DependencyGroup],
        *,
        positions: int = 16_384,
        batches: int | None = None,
        seed: int = 0,
        calls: int = 0,
    ) -> None:
        super().__init__(model)
        places = {key: consumers[0] for group in groups for key, consumers in group.inputs.items()}
        self._moments = {
            key: Moments(model.get_parameter(f"{consumer}.weight").shape[1])
            for key, consumer in places.items()
        }
        self._waiting: dict[str, list[Tensor]] = {key: [] for key in places}
        self._taken = dict.fromkeys(places, 0)
        self.examples: dict[str, RecordedCall] = {}
        self._kept = StoredCalls(calls, batches, seed + 1)
        self.seconds = 0.0
        self._groups, self._padding = groups, Padding()
        self._positions = positions
        self._quota = -(-positions // (1 if batches is None else max(1, batches)))
        self._generator = torch.Generator().manual_seed(seed)
        self._masks: dict[str, Tensor | None] = {}
        self._draws: dict[tuple[str, int], Tensor] = {}
        self._open: dict[str, RecordedCall] = {}
        self._left: dict[str, int] = {}
        self._fresh: tuple[int, int] | None = None

    def _attach(self) -> Iterator[RemovableHandle]:
        scopes = {group.network for group in self._groups} | {group.scope for group in self._groups}
        hooks = [(path, self._on_scope(path)) for path in sorted(scopes)]
        for group in self._groups:
            for key, consumers in group.inputs.items():
                hooks.append((consumers[0], self._on_reader(group, key)))
        for path, hook in hooks:
            module = self._model.get_submodule(path)
            yield module.register_forward_pre_hook(hook, with_kwargs=True)
        yield from self._padding.attach(self._model)  # last: a scope may be told of padding itself

    def _drop(self) -> None:
        self._masks.clear()
        self._draws.clear()
        self._open.clear()
        self._padding.clear()
        started = time.perf_counter()
        self._sum_up()
        self.seconds += time.perf_counter() - started

    @property
    def is_full(self) -> bool:
        """Whether every place has all the samples that were asked for."""
        return all(taken >= self._positions for taken in self._taken.values())

    @property
    def moments(self) -> dict[str, Moments]:
        """The sums at each place, of all that was heard so far."""
        self._sum_up()
        return self._moments

    def _sum_up(self) -> None:
        for key in self._waiting:
            self._add(key)

    def _add(self, key: str) -> None:
        """Add the samples that wait at a place to its sums."""
        waiting = self._waiting[key]
        if waiting:
            with torch.no_grad():
                self._moments[key].update(waiting[0] if len(waiting) == 1 else torch.cat(waiting))
            waiting.clear()

    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Say that a batch begins, so that one that runs the network twice gets no double share.

        Args:
            rows: Examples in the batch, if known.
            padded: How many of them, at the end, only repeat others: they are not heard.
        """
        self._left = dict.fromkeys(self._moments, self._quota)
        self._fresh = (rows, rows - padded) if rows is not None and padded else None

    def _on_scope(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._padding.forget()
            mask = attention_mask_of(module, args, kwargs)
            if path not in self.examples:
                self.examples[path] = first_call(module, args, kwargs, mask)
            self._masks[path], self._open[path] = mask, RecordedCall(args, kwargs, mask)
            self._draws.clear()

        return hook

    def _on_reader(self, group: DependencyGroup, key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            started = time.perf_counter()
            x = (args[0] if args else kwargs["input"]).detach()
            self._store_call(group, x)
            x, mask = self._padding.rows_first(x, self._masks.get(group.scope))
            flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
            room = self._positions - self._taken[key]
            wanted = min(self._left.get(key, self._quota), room)
            live = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            if mask is not None:
                live &= mask.to(x.device).bool()
            if self._fresh is not None and x.ndim > 1 and x.shape[0] == self._fresh[0]:
                live[self._fresh[1] :] = False
            index = live.reshape(-1).nonzero().flatten()
            if wanted <= 0:
                return
            if len(index) > wanted:
                index = index[self._draw(group.scope, len(index), wanted).to(x.device)]
            self._waiting[key].append(flat[index])
            self._taken[key] += len(index)
            if sum(map(len, self._waiting[key])) >= _TOGETHER:
                self._add(key)
            if key in self._left:
                self._left[key] -= len(index)
            self.seconds += time.perf_counter() - started

        return hook

    @property
    def stored(self) -> dict[str, list[RecordedCall]]:
        """Stored inputs, by path of the network that received them."""
        return self._kept.stored

    def _store_call(self, group: DependencyGroup, x: Tensor) -> None:
        """Keep some examples of the call that is under way, the first time a consumer hears of it."""
        if group.network not in self._open and group.scope not in self._open:
            return
        complete(self._model, self._padding, self._open, self.examples, x)
        path = group.network if group.network in self._open else group.scope
        call = self._open[path]
        self._open.clear()
        real = call.rows
        if self._fresh is not None and real == self._fresh[0]:
            real = self._fresh[1]
        positions = 1 if x.is_nested else x.shape[:-1].numel()  # such a call is not kept
        each = positions / max(1, call.rows)
        self._kept.keep(path, call, real=real, each=each)

    def _draw(self, scope: str, available: int, wanted: int) -> Tensor:
        key = (scope, available)
        if key not in self._draws:
            self._draws[key] = torch.randperm(available, generator=self._generator)
        return self._draws[key][:wanted]

    def calls(self, groups: Sequence[DependencyGroup]) -> dict[str, RecordedCall]:
        """One call of each network, or of its encoder where the network itself is never called."""
        found: dict[str, RecordedCall] = {}
        for network, scope in sorted({(group.network, group.scope) for group in groups}):
            path = network if network in self.examples else scope
            if path in self.examples:
                found[path] = self.examples[path]
        return found

    def check(self) -> None:
        """Refuse what was heard if it cannot be scored, as :func:`check_moments` does."""
        check_moments(self.moments)
