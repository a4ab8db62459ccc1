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
from lightning_mi_prune.core.running import evaluating

__all__ = [
    "LayerCall",
    "StreamLayer",
    "run_layerwise",
    "valid_positions",
]


class StreamLayer(Protocol):
    """A layer, and the module whose input is the stream that is added to what it says."""

    @property
    def layer(self) -> str:
        """Path of the layer."""

    @property
    def skip(self) -> str | None:
        """Path of that module, if there is one."""


@dataclass(frozen=True)
class LayerCall:
    """What one of the calls brings to a layer.

    Args:
        call: The call.
        x: Input of the layer.
        stream: What is added to its output, where that is known.
        output: Its output.
        real: Positions of these that are not padding, where torch's own attention was told.
    """

    call: RecordedCall
    x: Tensor
    stream: Tensor | None
    output: Tensor
    real: Tensor | None = None

    def heard(self, x: Tensor) -> Tensor:
        """The positions of a tensor that are not padding, flat."""
        return valid_positions(x, self.call.mask if self.real is None else self.real)


Act = Callable[[Any, Sequence[LayerCall]], Sequence[Tensor]]


class _EnoughError(Exception):
    """The last layer has spoken."""


def run_layerwise(
    model: nn.Module,
    found: Sequence[StreamLayer],
    path: str,
    calls: Sequence[RecordedCall],
    act: Act,
    *,
    once: bool = False,
) -> None:
    """Run a network on several calls at once; what a layer says to all goes through ``act``.

    Every call runs until it reaches a layer, and waits there for the others. So texts of different
    lengths are seen together by each layer, without being padded to the longest.

    Args:
        model: Module from which everything is named.
        found: The layers.
        path: Network that is called.
        calls: What it is called with.
        act: Gets the layer and what each call brings; returns the outputs to go on with.
        once: Whether each layer runs once, so that a call may end with the last of them: logits of
            a large vocabulary would outgrow everything else.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
        >>> calls = [RecordedCall((torch.ones(rows, 1),), {}) for rows in (2, 3)]
        >>> @dataclass
        ... class Layer:
        ...     layer: str = "1"
        ...     skip: str | None = None
        >>> def act(spot, parts):
        ...     print(spot.layer, [len(part.x) for part in parts])
        ...     return [part.output for part in parts]
        >>> run_layerwise(net, [Layer()], "", calls, act)
        1 [2, 3]
    """
    network, here, padding = model.get_submodule(path), getcurrent(), Padding()
    silent: dict[Any, set[str]] = {}
    streams: dict[tuple[Any, str], Tensor] = {}

    def hold(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            streams[getcurrent(), name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def change(spot: StreamLayer) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            mine = getcurrent()
            x = args[0] if args else kwargs["input"]
            stream = None if spot.skip is None else streams[mine, spot.skip]
            changed: Tensor = here.switch(  # until all calls are here
                (spot, x, stream, output, padding.real(x))
            )
            silent[mine].discard(spot.layer)
            if once and not silent[mine]:
                raise _EnoughError
            return changed

        return hook

    def speak(call: RecordedCall) -> None:
        with contextlib.suppress(_EnoughError):
            network(*call.args, **call.kwargs)

    with (
        _hooked(model, found, hold, change, padding),
        padded_encoders(network),
        evaluating(network),
    ):
        voices = {greenlet(speak): call for call in calls}
        silent |= {voice: {spot.layer for spot in found} for voice in voices}
        try:
            waiting = {
                voice: voice.switch(in_weight_precision(call, network))
                for voice, call in voices.items()
            }
            while waiting := {voice: what for voice, what in waiting.items() if what is not None}:
                spot = next(iter(waiting.values()))[0]
                there = {voice: what[1:] for voice, what in waiting.items() if what[0] is spot}
                changed = [
                    *act(spot, [LayerCall(voices[voice], *what) for voice, what in there.items()])
                ]
                for voice in list(there):
                    there[voice] = waiting[voice] = None  # what is done with makes room for more
                    waiting[voice] = voice.switch(changed.pop(0))
        finally:
            for voice in voices:
                voice.throw()  # what still waits there has nothing to wait for


@contextlib.contextmanager
def _hooked(
    model: nn.Module,
    found: Sequence[StreamLayer],
    hold: Callable[[str], Any],
    change: Callable[[StreamLayer], Any],
    padding: Padding,
) -> Iterator[None]:
    """The hooks of a run, which leave with it."""
    handles: list[RemovableHandle] = []
    try:
        handles.extend(padding.attach(model))
        for name in sorted({spot.skip for spot in found if spot.skip is not None}):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hold(name), with_kwargs=True))
        for spot in found:
            module = model.get_submodule(spot.layer)
            handles.append(module.register_forward_hook(change(spot), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def valid_positions(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that are not padding, flat."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device).bool()]
    return x.flatten(0, -2)
