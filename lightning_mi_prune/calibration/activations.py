"""ActivationRecorder: forward hooks that sum the inputs of every group's consumers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.moments import Moments, check_moments
from lightning_mi_prune.calibration.recorder import CallRecorder
from lightning_mi_prune.discovery.groups import DependencyGroup

__all__ = ["ActivationRecorder"]

# Samples that are summed together: every product passes over a whole matrix of sums, so that many
# small ones would cost more the longer validation is.
_SAMPLES_TOGETHER = 512


class ActivationRecorder(CallRecorder):
    """Hooks the consumers of every group and sums their inputs, until the ``with`` block ends.

    One sample is one position that is not padding; where the layer has no positions (after
    pooling) it is one example. At most ``positions`` samples a group are taken, spread evenly over
    the batches and drawn at random within each, the same ones for every group of a network.

    Args:
        model: Module that holds the groups.
        groups: Groups to record.
        positions: Samples to take for each group.
        batches: Batches there will be; None takes the first positions.
        seed: Seed of the draw; the global random state is not touched.
        calls: Positions of the inputs to store, so that a cut model can be run on them.

    Example:
        >>> from lightning_mi_prune.discovery.families.describe import linear_group
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
    ) -> None:
        super().__init__(model, calls, batches, seed)
        self._consumers = {
            key: (group, consumers[0])
            for group in groups
            for key, consumers in group.inputs.items()
        }
        self._moments = {
            key: Moments(model.get_parameter(f"{consumer}.weight").shape[1])
            for key, (_, consumer) in self._consumers.items()
        }
        self._pending: dict[str, list[Tensor]] = {key: [] for key in self._moments}
        self._taken = dict.fromkeys(self._moments, 0)
        self._positions = positions
        self._quota = -(-positions // (1 if batches is None else max(1, batches)))
        self._left: dict[str, int] = {}
        self._masks: dict[str, Tensor | None] = {}
        self._draws: dict[tuple[str, int], Tensor] = {}

    def _attach(self) -> Iterator[RemovableHandle]:
        groups = [group for group, _ in self._consumers.values()]
        hooks = [
            (path, self._on_call(path))
            for path in sorted({path for group in groups for path in (group.network, group.scope)})
        ]
        for key, (group, consumer) in self._consumers.items():
            hooks.append((consumer, self._on_input(group, key)))
        for path, hook in hooks:
            module = self._model.get_submodule(path)
            yield module.register_forward_pre_hook(hook, with_kwargs=True)
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
    def moments(self) -> dict[str, Moments]:
        """The sums of all samples so far, by key of the input."""
        self._sum_pending()
        return self._moments

    def _sum_pending(self) -> None:
        for key in self._pending:
            self._sum(key)

    def _sum(self, key: str) -> None:
        """Add the pending samples of an input to its sums."""
        pending = self._pending[key]
        if pending:
            with torch.no_grad():
                self._moments[key].update(pending[0] if len(pending) == 1 else torch.cat(pending))
            pending.clear()

    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Start a batch; it has one share of the samples, however often it runs the network."""
        super().start_batch(rows, padded)
        self._left = dict.fromkeys(self._moments, self._quota)

    def _on_call(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self._start_call(path, module, args, kwargs)
            self._masks[path], self._running[path] = call.mask, call
            self._draws.clear()

        return hook

    def _on_input(self, group: DependencyGroup, key: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            started = time.perf_counter()
            x = (args[0] if args else kwargs["input"]).detach()
            self._store_call((group.network, group.scope), x)
            room = self._positions - self._taken[key]
            wanted = min(self._left.get(key, self._quota), room)
            if wanted <= 0:
                return
            x, mask = self._padding.rows_first(x, self._masks.get(group.scope))
            index = self._valid(x, mask, x.shape[:-1])
            if len(index) > wanted:
                index = index[self._draw(group.scope, len(index), wanted).to(x.device)]
            self._pending[key].append(x.reshape(x.shape[:-1].numel(), x.shape[-1])[index])
            self._taken[key] += len(index)
            if sum(map(len, self._pending[key])) >= _SAMPLES_TOGETHER:
                self._sum(key)
            if key in self._left:
                self._left[key] -= len(index)
            self.seconds += time.perf_counter() - started

        return hook

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
        """Refuse sums that cannot be scored, as :func:`check_moments` does."""
        check_moments(self.moments)
