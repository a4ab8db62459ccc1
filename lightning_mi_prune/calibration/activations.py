"""Recorders: forward hooks on a network; ActivationRecorder sums the inputs of consumers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from lightning_mi_prune.calibration.calls import (
    RecordedCall,
    StoredCalls,
    first_call,
    positions_of,
)
from lightning_mi_prune.calibration.moments import Moments, check_moments
from lightning_mi_prune.calibration.padding import (
    Padding,
    add_masks,
    attention_mask_of,
    pad_nested,
)
from lightning_mi_prune.calibration.samples import MomentsOnDemand, StoredSamples
from lightning_mi_prune.core.consumers import (
    channels_last,
    consumer_input,
    fold_positions,
    has_kernel,
    input_dim,
    output_dim,
)
from lightning_mi_prune.core.empty_linear import linear_at, parameters_of
from lightning_mi_prune.core.functional import intercept_inputs
from lightning_mi_prune.core.spilling import is_spilling
from lightning_mi_prune.graph.containers import outermost_part
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.inputs import ConsumerInput, weight_name
from lightning_mi_prune.surgery.attention import open_attention

__all__ = [
    "ActivationRecorder",
    "CallRecorder",
    "ModuleHooks",
    "Recorder",
    "input_sizes",
    "read_shape",
]


class ModuleHooks(ABC):
    """Hooks on a module and its submodules, removed when the ``with`` block ends.

    Args:
        model: Module that is hooked, with everything in it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._opened = ExitStack()

    @abstractmethod
    def _attach(self) -> Iterator[RemovableHandle]:
        """Put the hooks on, one after another."""

    @property
    def _hooked(self) -> Sequence[str]:
        """Paths of the modules whose calls the hooks need; attention is opened for some."""
        return ()

    @abstractmethod
    def _clear(self) -> None:
        """Drop what is only needed while hooks are on."""

    def __enter__(self) -> Self:
        self.close()
        try:
            self._opened.enter_context(open_attention(self._model, self._hooked))
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
        self._opened.close()
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


# Samples that are summed together: every product passes over a whole matrix of sums, so that many
# small ones would cost more the longer validation is.
_SAMPLES_TOGETHER = 512


class ActivationRecorder(CallRecorder):
    """Hooks the consumers of every group and sums their inputs, until the ``with`` block ends.

    One sample is one position that is not padding, of a text or of an image; where the layer has no
    positions (after pooling) it is one example. At most ``positions`` samples a group are taken,
    spread evenly over the batches and drawn at random within each, the same ones for every group of
    a network. Made in a block of :func:`spilling`, it stores the samples in files instead of their
    sums in memory.

    Args:
        model: Module that holds the groups.
        groups: Groups to record.
        positions: Samples to take for each group.
        batches: Batches there will be; None takes the first positions.
        seed: Seed of the draw; the global random state is not touched.
        calls: Positions of the inputs to store, so that a cut model can be run on them.
        halves: Whether every second batch, from the first, is also summed apart.

    Example:
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> with ActivationRecorder(net, [group]) as recorder:
        ...     _ = net(torch.randn(5, 3))
        >>> int(recorder.moments["hidden"].count)
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
        halves: bool = False,
    ) -> None:
        super().__init__(model, calls, batches, seed)
        # Groups whose units are in one input share its sums: inputs are named by their consumer.
        first: dict[tuple[str, str, str], str] = {}
        self._shared: dict[str, str] = {}
        self._consumers: dict[str, tuple[DependencyGroup, str]] = {}
        for group in groups:
            for key, consumers in group.inputs.items():
                place = (consumers[0], group.scope, group.network)
                self._shared[key] = first.setdefault(place, key)
                if self._shared[key] == key:
                    self._consumers[key] = (group, consumers[0])
        sizes = input_sizes(model, groups)
        self._folds = {key: _fold(g, g.inputs[key]) for key, (g, _) in self._consumers.items()}
        self._in_files = is_spilling()
        kind = StoredSamples if self._in_files else Moments
        self._moments = {key: kind(sizes[key]) for key in self._consumers}
        self._half = {key: kind(sizes[key]) for key in self._consumers if halves}
        self._batch = 0
        self._pending: dict[str, list[Tensor]] = {key: [] for key in self._moments}
        self._taken = dict.fromkeys(self._moments, 0)
        self._positions = positions
        self._quota = -(-positions // (1 if batches is None else max(1, batches)))
        self._left: dict[str, int] = {}
        self._masks: dict[str, Tensor | None] = {}
        self._draws: dict[tuple[str, int], Tensor] = {}

    @property
    def _hooked(self) -> Sequence[str]:
        return [consumer for _, consumer in self._consumers.values()]

    def _attach(self) -> Iterator[RemovableHandle]:
        groups = [group for group, _ in self._consumers.values()]
        hooks = [
            (path, self._on_call(path))
            for path in sorted({path for group in groups for path in self._around(group)})
        ]
        products: dict[str, list[Callable[[Tensor], None]]] = defaultdict(list)
        names = parameters_of(self._model)
        for key, (group, consumer) in self._consumers.items():
            if consumer in names:  # no layer: a parameter that a module multiplies with
                products[consumer].append(partial(self._add_input, group, key, None))
            else:
                hooks.append((consumer, self._on_input(group, key)))
        for path, hook in hooks:
            module = self._model.get_submodule(path)
            yield module.register_forward_pre_hook(hook, with_kwargs=True)
        yield from intercept_inputs(self._model, products)
        yield from self._padding.attach(self._model)  # last: a scope may receive such masks itself

    def _clear(self) -> None:
        super()._clear()
        self._masks.clear()
        self._draws.clear()
        started = time.perf_counter()
        self._sum_pending()
        self.seconds += time.perf_counter() - started

    @property
    def is_full(self) -> bool:
        """Whether all the samples that were asked for were taken."""
        return all(taken >= self._positions for taken in self._taken.values())

    @property
    def moments(self) -> Mapping[str, Moments]:
        """The sums of all samples so far, by key; those of the same input are one object."""
        return self._by_key(self._moments)

    @property
    def half(self) -> Mapping[str, Moments]:
        """The same of every second batch; empty unless halves were asked for."""
        return self._by_key(self._half) if self._half else {}

    def _by_key(self, sums: Mapping[str, Moments | StoredSamples]) -> Mapping[str, Moments]:
        self._sum_pending()
        found = {key: sums[first] for key, first in self._shared.items()}
        samples = {key: each for key, each in found.items() if isinstance(each, StoredSamples)}
        if self._in_files:
            return MomentsOnDemand(samples)
        return {key: each for key, each in found.items() if isinstance(each, Moments)}

    def _sum_pending(self) -> None:
        for key in self._pending:
            self._sum(key)

    def _sum(self, key: str) -> None:
        """Add the pending samples of an input to its sums."""
        pending = self._pending[key]
        if pending:
            samples = pending[0] if len(pending) == 1 else torch.cat(pending)
            with torch.no_grad():
                self._moments[key].update(samples)
                if self._half and self._batch % 2:
                    self._add_to_half(key, samples)
            pending.clear()

    def _add_to_half(self, key: str, samples: Tensor) -> None:
        half, whole = self._half[key], self._moments[key]
        if isinstance(half, StoredSamples) and isinstance(whole, StoredSamples):
            half.share_last(whole)
        else:
            half.update(samples)

    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Start a batch; it has one share of the samples, however often it runs the network."""
        super().start_batch(rows, padded)
        if self._half:  # what is summed together is of one batch
            self._sum_pending()
        self._batch += 1
        self._left = dict.fromkeys(self._moments, self._quota)

    def _on_call(self, path: str) -> Any:
        named = {p for group, _ in self._consumers.values() for p in (group.network, group.scope)}

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path not in named and "" in self.examples:
                return
            call = self._start_call(path, module, args, kwargs)
            self._masks[path], self._running[path] = call.mask, call
            self._draws.clear()

        return hook

    def _on_input(self, group: DependencyGroup, key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = channels_last(module, consumer_input(args, kwargs).detach())
            self._add_input(group, key, module, x)

        return hook

    def _add_input(
        self, group: DependencyGroup, key: str, module: nn.Module | None, x: Tensor
    ) -> None:
        """Add the input of a consumer ``(..., entries)`` to the samples.

        Args:
            group: The group whose units it holds.
            key: Key of the input.
            module: The consumer; None if it is a parameter.
            x: The input.
        """
        started = time.perf_counter()
        x = fold_positions(x, self._folds[key])
        with_kernel = module is not None and has_kernel(module)
        around = self._around(group)
        self._store_call(around, x, self._each(with_kernel))
        room = self._positions - self._taken[key]
        wanted = min(self._left.get(key, self._quota), room)
        if wanted <= 0:
            return
        masks = [self._masks[path] for path in around[1:] if path in self._masks]
        x, mask = self._padding.rows_first(x, masks[0] if masks else None)
        index = self._valid(x, mask, x.shape[:-1])
        if len(index) > wanted:
            index = index[self._draw(group.scope, len(index), wanted).to(x.device)]
        if with_kernel:  # a copy of the chosen positions only
            samples = x[torch.unravel_index(index, x.shape[:-1])]
        else:
            samples = x.reshape(x.shape[:-1].numel(), x.shape[-1])[index]
        self._pending[key].append(samples)
        self._taken[key] += len(index)
        if sum(map(len, self._pending[key])) >= _SAMPLES_TOGETHER:
            self._sum(key)
        if key in self._left:
            self._left[key] -= len(index)
        self.seconds += time.perf_counter() - started

    def _around(self, group: DependencyGroup) -> list[str]:
        """Network and scope of a group; a part of the whole model while only parts are called."""
        if group.network or "" in self.examples:
            return [group.network, group.scope]
        return [group.network, group.scope, outermost_part(self._model, group.consumers[0])]

    def _each(self, with_kernel: bool) -> float | None:
        """Positions that one example counts for when calls are stored: those of an image are few.

        Layers that are solved again after the convolutions have one position for each image.
        """
        return (
            None
            if not with_kernel
            else float(max(map(positions_of, self._running.values()), default=1))
        )

    def _draw(self, scope: str, available: int, wanted: int) -> Tensor:
        key = (scope, available)
        if key not in self._draws:
            self._draws[key] = torch.randperm(available, generator=self._generator)
        return self._draws[key][:wanted]

    def calls(self, groups: Sequence[DependencyGroup]) -> dict[str, RecordedCall]:
        """One call of each network, or of its encoder where the network itself is never called."""
        found: dict[str, RecordedCall] = {}
        for paths in sorted({tuple(self._around(group)) for group in groups}):
            path = next((path for path in paths if path in self.examples), None)
            if path is not None:
                found[path] = self.examples[path]
        return found

    def check(self) -> None:
        """Refuse sums that cannot be scored, as :func:`check_moments` does."""
        moments = self.moments
        if isinstance(moments, MomentsOnDemand):
            moments.check()
        else:
            check_moments(moments)


def input_sizes(model: nn.Module, groups: Sequence[DependencyGroup]) -> dict[str, int]:
    """Entries of a sample of every input, by key.

    Args:
        model: Module that holds the groups.
        groups: The groups.

    Example:
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> input_sizes(net, [group])
        {'hidden': 4}
    """
    parameters = parameters_of(model)
    return {
        key: read_shape(model, parameters, group, consumers)[0] // _fold(group, consumers)
        for group in groups
        for key, consumers in group.inputs.items()
    }


def read_shape(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    group: DependencyGroup,
    consumers: Sequence[str],
) -> tuple[int, int]:
    """Entries and outputs of the first consumer of an input.

    Args:
        model: Module that holds the group.
        parameters: Its parameters by name.
        group: A group whose units are in the input.
        consumers: Consumers that read it.
    """
    first = consumers[0]
    shape = parameters[weight_name(first, parameters)].shape
    if first in parameters:
        weight = ConsumerInput.of(group, consumers).weight(first)
        return shape[weight.read], shape[weight.output]
    read = input_dim(linear_at(model.get_submodule(first)))
    return shape[read], shape[output_dim(read)]


def _fold(group: DependencyGroup, consumers: Sequence[str]) -> int:
    """Positions of a flattened map that are samples; heads that rotate have none."""
    return 1 if group.rotation is not None else ConsumerInput.of(group, consumers).fold
