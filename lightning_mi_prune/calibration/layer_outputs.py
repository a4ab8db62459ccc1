"""LayerRecorder: forward hooks that compare the outputs of a stack's layers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.calibration.activations import Recorder
from lightning_mi_prune.calibration.calls import RecordedCall, StoredCalls, first_call
from lightning_mi_prune.calibration.data import LayerComparison
from lightning_mi_prune.calibration.layer_similarity import Kernel, LayerAngles, LayerCKA
from lightning_mi_prune.calibration.moments import ExactSums
from lightning_mi_prune.calibration.padding import Padding, attention_mask_of, complete
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.containers import layer_paths
from lightning_mi_prune.discovery.groups import LayerStack

__all__ = [
    "LayerRecorder",
    "StackRecorder",
]


class LayerRecorder(Recorder):
    """Hears what every layer of a stack says, and sums how alike and how far apart they are.

    Samples are positions without padding, the same ones for all layers, drawn anew for each call
    of the network; outputs ``(rows, channels, height, width)`` are flattened to one sample a row.
    Only sums are kept.

    Args:
        model: Module from which everything is named.
        blocks: Paths of the layers, bottom to top.
        scope: Path of the module whose ``forward`` receives ``attention_mask``.
        network: Path of the whole network, one call of which is kept; default: ``scope``.
        positions: Most samples that are compared in one call, at least four.
        kernel: Kernel of the alignment.
        bandwidth: Its width (:class:`layer_similarity.LayerCKA`).
        seed: Seed of the draw.
        calls: Positions of the inputs to store, so that a shorter model can be run on them.
        batches: Batches that will be heard; None stores inputs first come, first served.

    Raises:
        PruningError: If there are too few layers, a path is no module, or two are one.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> with LayerRecorder(net, ["1", "2"]) as heard:
        ...     _ = net(torch.randn(64, 3))
        >>> heard.alignment.compute().shape, heard.angles.compute().shape
        (torch.Size([2, 2]), torch.Size([3, 3]))
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        *,
        scope: str = "",
        network: str | None = None,
        positions: int = 256,
        kernel: Kernel = "linear",
        bandwidth: float = 1.0,
        seed: int = 0,
        calls: int = 0,
        batches: int | None = None,
    ) -> None:
        super().__init__(model)
        if len(blocks) < 2:
            raise PruningError(
                f"A stack of {counted(len(blocks), 'layer')} has nothing to compare; expected two "
                "or more."
            )
        if positions < 4:
            raise PruningError(f"positions={positions}; expected 4 or more.")
        modules = dict(model.named_modules(remove_duplicate=False))
        missing = [path for path in (*blocks, scope, network or "") if path not in modules]
        if missing:
            raise PruningError(
                f"{missing} are no modules of {type(model).__name__}; expected paths as "
                "named_modules() has them."
            )
        self._layers = [modules[path] for path in blocks]
        if len(set(map(id, self._layers))) < len(blocks):
            raise PruningError(
                "A layer stands in the stack twice (its weights are shared), so it cannot be "
                "removed at one place only. Lower the number of repetitions in the config."
            )
        self.alignment = LayerCKA(len(blocks), kernel, bandwidth)
        self.angles = LayerAngles(len(blocks) + 1)
        self.examples: dict[str, RecordedCall] = {}
        self.seconds = 0.0
        self._kept = StoredCalls(calls, batches, seed + 1)
        self._open: dict[str, RecordedCall] = {}
        self._blocks, self._scope, self._positions = list(blocks), scope, positions
        self._networks = dict.fromkeys((scope, scope if network is None else network))
        self._generator = torch.Generator().manual_seed(seed)
        self._mask: Tensor | None = None
        self._padding = Padding()
        self._index: Tensor | None = None
        self._states: list[Tensor] = []
        self._shapes: list[tuple[int, ...]] = []
        self._fresh: tuple[int, int] | None = None

    @property
    def stored(self) -> dict[str, list[RecordedCall]]:
        """Stored inputs, by path of the network that received them."""
        return self._kept.stored

    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Say that a batch begins, and how many of its examples, at its end, only repeat others."""
        self._fresh = (rows, rows - padded) if rows is not None and padded else None

    def compared(self, layers: Sequence[int], fixed: int = 0) -> LayerComparison:
        """How alike the layers are.

        Args:
            layers: Their numbers as built.
            fixed: Layers at the bottom that must stay anyway.

        Raises:
            PruningError: If too little was heard, or values that are not finite.
        """
        similarity, angles = self.alignment.compute(), self.angles.compute()
        # An input of another shape counts as the zero vector, at a right angle to everything.
        reshaping = bool((angles[0, 1:] - 0.5).abs().max() < 1e-9)
        return LayerComparison(
            layers=tuple(layers),
            similarity=_rows(similarity),
            angles=_rows(angles),
            fixed=max(fixed, int(reshaping)),
        )

    def _attach(self) -> Iterator[RemovableHandle]:
        for path in self._networks:
            module = self._model.get_submodule(path)
            yield module.register_forward_pre_hook(self._on_call(path), with_kwargs=True)
        yield from self._padding.attach(self._model)  # after calls, before what layers get
        yield self._layers[0].register_forward_pre_hook(self._on_input, with_kwargs=True)
        for place, layer in enumerate(self._layers):
            yield layer.register_forward_hook(self._on_output(place))

    def _drop(self) -> None:
        self._mask = self._index = None
        self._states, self._shapes = [], []
        self._open = {}
        self._padding.clear()

    def _on_call(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._padding.forget()
            mask = attention_mask_of(module, args, kwargs)
            if path not in self.examples:
                self.examples[path] = first_call(module, args, kwargs, mask)
            if path == self._scope:
                above = {p: call for p, call in self._open.items() if p != self._scope}
                self._drop()
                self._mask, self._open = mask, above
            self._open[path] = RecordedCall(args, kwargs, mask)

        return hook

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self._store_call(x)
        self._hear(0, x)

    def _store_call(self, x: Any) -> None:
        """Keep some examples of the call that is under way, of the outermost network there is."""
        calls, self._open = self._open, {}
        if isinstance(x, Tensor):
            complete(self._model, self._padding, calls, self.examples, x)
        path = next((p for p in reversed(self._networks) if p in calls), None)
        if path is None or not isinstance(x, Tensor):
            return
        real = calls[path].rows
        if self._fresh is not None and real == self._fresh[0]:
            real = self._fresh[1]
        each = x.shape[1:-1].numel() if x.ndim > 2 else 1
        self._kept.keep(path, calls[path], real=real, each=float(each))

    def _on_output(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._hear(place + 1, output)
            if place + 1 == len(self._layers):
                self._end()

        return hook

    def _hear(self, place: int, output: Any) -> None:
        started = time.perf_counter()
        x = output[0] if isinstance(output, (tuple, list)) else output
        if place == 0:
            self._states, self._shapes = [], []
        if not isinstance(x, Tensor) or len(self._states) != place:
            raise PruningError(
                f"The stack of {self._blocks[0]!r} runs in another order than it is listed in, or "
                "its layers hand on no tensor; expected layers that run one after another."
            )
        x, mask = self._padding.rows_first(x.detach(), self._mask)
        flat = x.flatten(1) if x.ndim == 4 else x.reshape(-1, x.shape[-1])
        if self._index is None or not self._states:
            self._index = self._draw(x, mask)
        self._states.append(flat[self._index])
        self._shapes.append(tuple(x.shape[1:]))
        self.seconds += time.perf_counter() - started

    def _draw(self, x: Tensor, mask: Tensor | None) -> Tensor:
        live = torch.ones(x.shape[:1] if x.ndim == 4 else x.shape[:-1], dtype=torch.bool)
        if mask is not None and mask.shape == live.shape:
            live &= mask.bool().cpu()
        if self._fresh is not None and x.shape[0] == self._fresh[0]:
            live[self._fresh[1] :] = False
        places = live.flatten().nonzero().flatten()
        chosen = torch.randperm(len(places), generator=self._generator)[: self._positions]
        return places[chosen.sort().values].to(x.device)

    def _end(self) -> None:
        started, states, shapes = time.perf_counter(), self._states, self._shapes
        self._states, self._shapes, self._index = [], [], None
        if len(set(shapes[1:])) > 1:
            raise PruningError(
                f"The layers of {self._blocks[0]!r} and above have outputs of different widths, "
                f"{list(dict.fromkeys(shapes[1:]))}; expected one shape, so that a layer can go. "
                "Name a stack whose layers agree."
            )
        self.alignment.update(states[1:])
        reshapes = shapes[0] != shapes[1]
        self.angles.update([torch.zeros_like(states[1]), *states[1:]] if reshapes else states)
        self.seconds += time.perf_counter() - started


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())


class StackRecorder(Recorder):
    """Hears several stacks at once, each by itself.

    Args:
        model: Module from which everything is named.
        stacks: The stacks, as they stand.
        options: As for :class:`LayerRecorder`.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[LayerStack], **options: Any) -> None:
        super().__init__(model)
        self._ears = {
            stack.name: LayerRecorder(
                model,
                layer_paths(model, stack.name),
                scope=stack.scope,
                network=stack.network,
                **options,
            )
            for stack in stacks
        }
        self._stacks = list(stacks)

    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Say that a batch begins."""
        for ear in self._ears.values():
            ear.start_batch(rows, padded)

    @property
    def seconds(self) -> float:
        """Time spent on calibration."""
        return sum(ear.seconds for ear in self._ears.values())

    @property
    def sums(self) -> dict[str, ExactSums]:
        """All sums by name, to be added up over ranks."""
        alike = {f"{name} alignment": ear.alignment for name, ear in self._ears.items()}
        return alike | {f"{name} angles": ear.angles for name, ear in self._ears.items()}

    @property
    def examples(self) -> dict[str, RecordedCall]:
        """One call of each network, or of its encoder where it is never called itself."""
        found: dict[str, RecordedCall] = {}
        for stack in self._stacks:
            heard = self._ears[stack.name].examples
            path = stack.network if stack.network in heard else stack.scope
            found |= {path: heard[path]} if path in heard else {}
        return found

    @property
    def stored(self) -> dict[str, list[RecordedCall]]:
        """Stored inputs, by path of the network; stacks of one network store the same ones once."""
        ears = reversed(self._ears.values())
        return {path: calls for ear in ears for path, calls in ear.stored.items()}

    def compared(self, plan: PruningPlan) -> dict[str, LayerComparison]:
        """How alike the layers of every stack are, numbered as built.

        Args:
            plan: Plan the model carries.

        Raises:
            PruningError: If a stack said nothing or too little, or values that are not finite.
        """
        silent = [name for name, ear in self._ears.items() if not ear.angles.count]
        if silent:
            ran = [name for name in self._ears if name not in silent]
            raise PruningError(
                f"The layers of {silent[0]!r} never ran in validation, so they cannot be compared; "
                f"{ran or 'no others'} did. Let validation_step run them, or leave them out with "
                "stacks= or module=."
            )
        return {
            stack.name: self._ears[stack.name].compared(plan.kept[stack.name], stack.fixed)
            for stack in self._stacks
        }

    def _attach(self) -> Iterator[RemovableHandle]:
        for ear in self._ears.values():
            yield from ear._attach()

    def _drop(self) -> None:
        for ear in self._ears.values():
            ear._drop()
