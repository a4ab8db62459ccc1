"""Run several calls of one network together, layer by layer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.calibration.calls import RecordedCall, in_weight_precision
from lightning_mi_prune.calibration.padding import Padding, padded_encoders
from lightning_mi_prune.core.consumers import (
    channels_first,
    channels_last,
    consumer_input,
    has_kernel,
)
from lightning_mi_prune.core.running import evaluating
from lightning_mi_prune.surgery.attention import open_attention

__all__ = [
    "LayerCall",
    "ResidualLayer",
    "run_layerwise",
    "valid_positions",
]


class ResidualLayer(Protocol):
    """A layer, and where the residual stream is that is added to its output."""

    @property
    def layer(self) -> str:
        """Path of the layer."""

    @property
    def residual(self) -> str | None:
        """Path of the module whose input is the residual stream, if there is one."""


@dataclass(frozen=True)
class LayerCall:
    """A layer in one of the calls.

    Args:
        call: The call.
        x: Input of the layer, channels last, as all that follow.
        stream: Residual stream that is added to its output, where that is known.
        output: Its output.
        mask: Positions of these that are not padding, where torch's own attention received a mask.
    """

    call: RecordedCall
    x: Tensor
    stream: Tensor | None
    output: Tensor
    mask: Tensor | None = None

    def valid(self, x: Tensor) -> Tensor:
        """The positions of a tensor that are not padding, flat."""
        return valid_positions(x, self.call.mask if self.mask is None else self.mask)


Process = Callable[[Any, Sequence[LayerCall]], Sequence[Tensor]]


class _LastLayerError(Exception):
    """The last layer has run; nothing above it is needed."""


def run_layerwise(
    model: nn.Module,
    layers: Sequence[ResidualLayer],
    path: str,
    calls: Sequence[RecordedCall],
    process: Process,
    *,
    once: bool = False,
) -> None:
    """Run a network on several calls at once; ``process`` may replace the outputs of each layer.

    Every call runs until it reaches a layer, and waits there for the others. So texts of different
    lengths pass through each layer together, without being padded to the longest.

    Args:
        model: Module from which everything is named.
        layers: The layers.
        path: Network that is called.
        calls: What it is called with.
        process: Gets a layer and its part in each call; returns the outputs to go on with.
        once: Whether each layer runs once, so that a call may end with the last of them: logits of
            a large vocabulary would outgrow everything else.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
        >>> calls = [RecordedCall((torch.ones(rows, 1),), {}) for rows in (2, 3)]
        >>> @dataclass
        ... class Layer:
        ...     layer: str = "1"
        ...     residual: str | None = None
        >>> def process(layer, parts):
        ...     print(layer.layer, [len(part.x) for part in parts])
        ...     return [part.output for part in parts]
        >>> run_layerwise(net, [Layer()], "", calls, process)
        1 [2, 3]
    """
    network, main, padding = model.get_submodule(path), getcurrent(), Padding()
    remaining: dict[Any, set[str]] = {}
    streams: dict[tuple[Any, str], Tensor] = {}

    def store_stream(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            streams[getcurrent(), name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def replace_output(layer: ResidualLayer) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            task = getcurrent()
            x = channels_last(module, consumer_input(args, kwargs))
            stream = None if layer.residual is None else streams[task, layer.residual]
            if stream is not None and layer.residual is not None:
                reader = model.get_submodule(layer.residual)
                # A linear layer may add to what a convolution reads, with channels first.
                stream = channels_last(reader if has_kernel(reader) else module, stream)
            output = channels_last(module, output)
            # Wait in the main greenlet until all calls have reached the layer.
            new: Tensor = main.switch((layer, x, stream, output, padding.real(x)))
            remaining[task].discard(layer.layer)
            if once and not remaining[task]:
                raise _LastLayerError
            return channels_first(module, new)

        return hook

    def run(call: RecordedCall) -> None:
        with contextlib.suppress(_LastLayerError):
            network(*call.args, **call.kwargs)

    def hooks() -> Iterator[RemovableHandle]:
        yield from padding.attach(model)
        for name in sorted({layer.residual for layer in layers if layer.residual is not None}):
            module = model.get_submodule(name)
            yield module.register_forward_pre_hook(store_stream(name), with_kwargs=True)
        for layer in layers:
            module = model.get_submodule(layer.layer)
            yield module.register_forward_hook(replace_output(layer), with_kwargs=True)

    with contextlib.ExitStack() as stack, padded_encoders(network), evaluating(network):
        stack.enter_context(open_attention(model, [layer.layer for layer in layers]))
        for handle in hooks():
            stack.enter_context(handle)
        tasks = {greenlet(run): call for call in calls}
        remaining |= {task: {layer.layer for layer in layers} for task in tasks}
        try:
            waiting = {
                task: task.switch(in_weight_precision(call, network))
                for task, call in tasks.items()
            }
            while waiting := {task: part for task, part in waiting.items() if part is not None}:
                layer = next(iter(waiting.values()))[0]
                parts = {task: part[1:] for task, part in waiting.items() if part[0] is layer}
                outputs = [
                    *process(layer, [LayerCall(tasks[task], *part) for task, part in parts.items()])
                ]
                for task in list(parts):
                    parts[task] = waiting[task] = None  # frees memory before the call goes on
                    waiting[task] = task.switch(outputs.pop(0))
        finally:
            for task in tasks:
                task.throw()  # ends calls that an error left waiting


def valid_positions(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that are not padding, flat."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device).bool()]
    return x.flatten(0, -2)
