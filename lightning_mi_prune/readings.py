"""READ     what the dense model says wherever the cut one will be solved again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.evidence import kept_rows
from lightning_mi_prune.joining import pieces_of
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.sample import Example, run

__all__ = ["Reading", "Targets", "heard_of", "readings", "run_with"]


@dataclass(frozen=True)
class Reading:
    """One layer that is solved again.

    Args:
        layer: Path of the linear layer, or of the normalisation.
        skip: Path of the module whose input is the stream that is added to the layer's output.
        rows: Outputs that survive the cut, as positions in the present model; None: all.
        spare: Whether the layer is left as it is where the sample is small.
        source: The layer of the present model whose words it must say; None: its own.
        normed: Whether a normalisation follows, so that level and scale of a position are free.
    """

    layer: str
    skip: str | None
    rows: Tensor | None
    spare: bool = False
    source: Reading | None = None
    normed: bool = False

    @property
    def spoken(self) -> Reading:
        """Where the present model says what the layer must say."""
        return self.source or self


Act = Callable[[Reading, Tensor, Tensor | None, Tensor], Tensor]


def readings(axes: Sequence[WidthAxis], current: Plan, plan: Plan) -> list[Reading]:
    """What a plan leaves to be solved again: everything from the lowest cut upwards.

    Args:
        axes: All axes of the model.
        current: Plan the model carries now.
        plan: Plan it will carry.
    """
    target = current.then(plan)
    cut = [axis for axis in axes if target.width(axis.name) < current.width(axis.name)]
    if not cut:
        return []
    lowest = min(axis.level for axis in cut)
    found = []
    for axis in sorted(axes, key=lambda axis: axis.level):
        if axis.skip is not None and axis.level >= lowest:
            for reader in axis.readers:
                rows = kept_rows(f"{reader}.weight", target.kept, current, axes)
                found.append(Reading(reader, axis.skip, rows))
        if axis.norms and axis in cut:
            norms = [kept_rows(f"{norm}.weight", target.kept, current, axes) for norm in axis.norms]
            found += [Reading(n, None, r) for n, r in zip(axis.norms, norms, strict=True)]
    above = {r: None for axis in cut for r in axis.above}
    for reader in above:
        rows = kept_rows(f"{reader}.weight", target.kept, current, axes)
        found.append(Reading(reader, None, rows, spare=True))
    return found


class Targets:
    """What the model as it stands says on a sample, where the cut model will be solved again.

    All of it at once would outgrow the model, so a few layers are held at a time, in the order in
    which they run: when the next one is asked for, the model runs again, for the layers that fit.

    Args:
        model: Module from which everything is named; it is only run.
        found: Layers that will be solved; they are asked for by the layer that speaks now.
        path: Network that is called.
        call: The sample.
        room: Bytes that may be held; the layer that is asked for is held in any case.
        once: Whether every layer runs once in a pass, so that what is above the last need not run.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Sequence[Reading],
        path: str,
        call: Example,
        room: int = 2**29,
        *,
        once: bool = False,
    ) -> None:
        self._model, self._path, self._call, self._room = model, path, call, room
        self._once = once
        self._left = {reading.spoken.layer: reading.spoken for reading in found}
        self._sizes: dict[str, float] = {}
        self._held: dict[str, Tensor] = {}
        self._often: set[str] = set()

    def take(self, layer: str) -> Tensor | None:
        """The target ``(positions, outputs)`` of a layer, to be asked for once.

        None for one that runs several times in a pass, however often it is asked for.
        """
        if layer in self._left and layer not in self._held:
            self._hold(layer)
        return None if layer in self._often else self._held.pop(layer)

    def _wanted(self, asked: str) -> list[Reading]:
        """What to run for: all that is left, or what surely fits once the sizes are known."""
        left = list(self._left.values())
        if not self._sizes:
            return left
        room, found = self._room - self._sizes.get(asked, 0.0), [self._left[asked]]
        for layer, size in self._sizes.items():  # in the order in which they run
            if layer in self._left and layer != asked and size <= room:
                found.append(self._left[layer])
                room -= size
        return found

    def _hold(self, asked: str) -> None:
        pieces = pieces_of(self._call)
        parts, whole = dict[str, list[Tensor]](), dict[str, Reading]()
        used, ran, call = 0.0, set[str](), self._call
        wanted, once = self._wanted(asked), self._once or bool(self._sizes)

        def keep(reading: Reading, x: Tensor, skip: Tensor | None, output: Tensor) -> Tensor:
            nonlocal used
            layer = reading.layer
            if layer in ran:
                self._often.add(layer)
            elif layer in whole or (layer not in parts and call is not pieces[0]):
                pass
            elif output.shape[0] != call.rows and len(pieces) > 1:
                whole[layer] = reading  # not by example, so there are no pieces of it
            else:
                said = heard_of(output if skip is None else output + skip, call.mask)
                if reading.rows is not None:
                    said = said[:, reading.rows.to(said.device)]
                if layer not in parts:
                    self._sizes[layer] = said.nbytes * _share(self._call, call)
                size = 0.0 if layer in parts else self._sizes[layer]
                if layer == asked or used + size <= self._room:
                    parts.setdefault(layer, []).append(said)
                    used += size
            ran.add(layer)
            return output

        for call in pieces:
            ran.clear()
            run_with(self._model, wanted, self._path, call, keep, once=once)
        if whole:
            for layer in whole:
                parts.pop(layer, None)
            again = list(whole.values())
            pieces = [self._call]
            call = self._call
            whole.clear()
            ran.clear()
            run_with(self._model, again, self._path, call, keep, once=self._once)
        for layer in self._often:
            parts.pop(layer, None)
            self._left.pop(layer, None)
        for layer in list(parts):
            self._held[layer] = torch.cat(parts.pop(layer))
            del self._left[layer]


def _share(whole: Example, piece: Example) -> float:
    """How much more the whole call holds than one of its pieces."""
    if whole.mask is None or piece.mask is None:
        return whole.rows / max(1, piece.rows)
    return float(whole.mask.sum()) / max(1.0, float(piece.mask.sum()))


class _EnoughError(Exception):
    """The last layer has spoken."""


def run_with(
    model: nn.Module,
    found: Sequence[Reading],
    path: str,
    call: Example,
    act: Act,
    *,
    once: bool = False,
) -> None:
    """Run the network; every layer's output goes through ``act``.

    Args:
        model: Module from which everything is named.
        found: The layers.
        path: Network that is called.
        call: What it is called with.
        act: Gets the layer, its input, the stream and its output; returns the output to go on with.
        once: Whether each layer runs once, so that the run may end with the last of them: logits
            of a large vocabulary would outgrow everything else.
    """
    skips: dict[str, Tensor] = {}
    handles = []
    silent = {reading.layer for reading in found}

    def hold(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            skips[name] = args[0] if args else next(iter(kwargs.values()))

        return hook

    def change(reading: Reading) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            x = args[0] if args else kwargs["input"]
            skip = None if reading.skip is None else skips[reading.skip]
            changed = act(reading, x, skip, output)
            silent.discard(reading.layer)
            if once and not silent:
                raise _EnoughError
            return changed

        return hook

    try:
        for name in sorted({r.skip for r in found if r.skip is not None}):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(hold(name), with_kwargs=True))
        for reading in found:
            module = model.get_submodule(reading.layer)
            handles.append(module.register_forward_hook(change(reading), with_kwargs=True))
        with contextlib.suppress(_EnoughError):
            run(model.get_submodule(path), call)
    finally:
        for handle in handles:
            handle.remove()


def heard_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that are not padding, flat."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device).bool()]
    return x.flatten(0, -2)
