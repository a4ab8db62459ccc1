"""Run a network on stored calls again and again; what cannot change any more is not run again.

Every layer of a cut model is solved on inputs that the solved layers below it give, so the network
runs again and again, each time a little further. What ended before the first layer of a visit is
*final*: no layer in it or below it will change. The outputs of modules that are final are stored,
and from then on they return them without running. So each visit costs what lies between two
neighbouring layers, whatever the depth of the network.

A *block* is a child of one of the lists of modules. Memory holds, for each stored call, the outputs
of the outermost modules inside the present block that are final, and of the blocks below it those
of the last one, where that is all that what follows needs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.calibration.calls import RecordedCall, in_weight_precision
from lightning_mi_prune.calibration.padding import Padding, has_attention, padded_encoders
from lightning_mi_prune.core.consumers import channels_last, consumer_input, has_kernel
from lightning_mi_prune.core.running import clone_batch, evaluating, map_tensors
from lightning_mi_prune.core.spilling import spilled
from lightning_mi_prune.surgery.attention import open_attention

__all__ = ["BlockRuns", "LayerCall", "ResidualLayer", "valid_positions"]

# Blocks with more layers to solve are divided, where they hold lists of modules themselves.
_MOST_LAYERS = 16
# Examples of a call that shows in which order layers run.
_FEW = 3


class ResidualLayer(Protocol):
    """A layer, and where the residual stream is that is added to its output."""

    @property
    def layer(self) -> str:
        """Path of the layer."""

    @property
    def residual(self) -> str | None:
        """Path of the module whose input is the residual stream, if there is one."""


Layer = TypeVar("Layer", bound=ResidualLayer)


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


class _DoneError(Exception):
    """All that was asked of a call has run; nothing above it is needed."""


@dataclass
class _Shown:
    """What one run of a network shows: events in their order, and what layers receive.

    Args:
        events: Kind (``"layer"``, ``"start"``, ``"end"``) and path of each.
        inputs: The input of every layer, held so that no other gets its ``id``.
        received: Copies of the input and of the residual stream of every layer.
        whole: Whether a layer's outputs are not per example, such as a table of distances.
    """

    events: list[tuple[str, str]] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    received: dict[str, list[Tensor]] = field(default_factory=dict)
    whole: bool = False


@dataclass
class _Progress:
    """How far one call has run.

    Args:
        call: The call.
        padding: What its runs showed of its padding.
        outputs: Outputs of modules that are final.
    """

    call: RecordedCall
    padding: Padding = field(default_factory=Padding)
    outputs: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Pass:
    """How far several calls have run.

    Args:
        calls: Each of them.
        reached: The event before which all that ended is final.
        stored: The outermost modules that are, whose outputs are stored.
    """

    calls: Sequence[_Progress]
    reached: int = 0
    stored: list[str] = field(default_factory=list)


class BlockRuns(Generic[Layer]):
    """Runs of one network on several calls, in which modules that are final do not run again.

    Args:
        model: Module from which everything is named; it is only run.
        layers: The layers that will be visited.
        path: Network that is called.
        calls: What it is called with.

    Example:
        >>> net = nn.Sequential(nn.Identity(), nn.Linear(1, 1))
        >>> @dataclass
        ... class Layer:
        ...     layer: str = "1"
        ...     residual: str | None = None
        >>> calls = [RecordedCall((torch.ones(rows, 1),), {}) for rows in (2, 3)]
        >>> runs = BlockRuns(net, [Layer()], "", calls)
        >>> runs.blocks, [layer.layer for wave in runs.waves for layer in wave]
        (('0', '1'), ['1'])
        >>> runs.visit(runs.waves[0], lambda number, layer, part: print(number, len(part.x)))
        0 2
        1 3
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        path: str,
        calls: Sequence[RecordedCall],
    ) -> None:
        self._model, self._network, self._path = model, model.get_submodule(path), path
        self._layers = {layer.layer: layer for layer in layers}
        self._known: dict[str, nn.Module] = {}
        self._has_attention = has_attention(model)
        self.calls = calls
        self._pass = _Pass([_Progress(call) for call in calls])
        few = calls[0].select(torch.arange(min(_FEW, max(1, calls[0].rows))))
        try:
            shown = self._show(few)
        except Exception:  # which dimension counts examples may not be known: then all of them
            few = calls[0]
            shown = self._show(few)
        self.is_whole = shown.whole
        times, places = Counter(shown.events), {e: n for n, e in enumerate(shown.events)}
        once = {event: place for event, place in places.items() if times[event] == 1}
        self._place = {
            name: once["layer", name] for name in self._layers if ("layer", name) in once
        }
        blocks = _blocks_in(self._network, path, [*self._layers])
        over = {name: once["end", name] for name in blocks if ("end", name) in once}
        self.blocks = tuple(sorted(over, key=over.__getitem__))
        self._below = {
            name: sum(end < place for end in over.values()) for name, place in self._place.items()
        }
        self._over = over
        self._ends = {
            name: once["end", name]
            for name, module in self._modules()
            if {("start", name), ("end", name)} <= once.keys()
            and any(f"{name}.".startswith(f"{block}.") for block in over)
            and any(True for _ in module.parameters())
        }
        self._read_until = {name: self._last_reader(name, end) for name, end in self._ends.items()}
        self.waves = self._in_waves(shown)
        # Only the last outputs of a list of blocks, those of all blocks, or none at all.
        for shared in (frozenset(self.blocks), frozenset[str]()):
            self._shared = shared
            if self._gives_the_same(few, shown):
                return
        self._ends = {}

    def runs_once(self, layer: str) -> bool:
        """Whether a layer runs exactly once in a call."""
        return layer in self._place

    def visit(
        self,
        layers: Sequence[Layer],
        visit: Callable[[int, Layer, LayerCall], None],
        *,
        final: bool = False,
    ) -> None:
        """Run every call up to some layers.

        Args:
            layers: Layers to visit; those below them are as they will stay.
            visit: Called with the number of a call, a layer, and the layer in that call.
            final: Whether the visited layers and the rest of their block stay as they are too.
        """
        self._visit(self._pass, layers, visit, final=final)

    def beside(self, layer: str, others: Sequence[Layer]) -> list[Layer]:
        """Those of some layers that lie between the same two ends of blocks as a layer."""
        return [one for one in others if self._below.get(one.layer) == self._below[layer]]

    # -------------------------------------------------------------------------------------- runs

    def _visit(
        self,
        runs: _Pass,
        layers: Sequence[Layer],
        visit: Callable[[int, Layer, LayerCall], None],
        *,
        final: bool = False,
    ) -> None:
        """Run calls up to some layers, as :meth:`visit` documents, and note how far they are."""
        places = [self._place[layer.layer] for layer in layers]
        event, last = min(places), max(places)
        if event < runs.reached:  # a layer inside what is stored: everything runs again
            skipped, stored = list[str](), runs.stored
        else:
            skipped = [name for name in runs.stored if self._read_until[name] < event]
            if final:
                event = max([last, *(self._end_around(layer.layer) + 1 for layer in layers)])
            stored = self._final_at(event, last)
        fresh = [name for name in stored if name not in set(runs.stored)]
        with self._evaluating():
            keys = {self._key(name) for name in stored}
            for number, progress in enumerate(runs.calls):
                self._run(number, progress, layers, visit, skipped, fresh, final=final)
                progress.outputs = {k: v for k, v in progress.outputs.items() if k in keys}
        runs.reached, runs.stored = max(event, runs.reached), stored

    def _run(
        self,
        number: int,
        progress: _Progress,
        layers: Sequence[Layer],
        visit: Callable[[int, Layer, LayerCall], None],
        skipped: Sequence[str],
        fresh: Sequence[str],
        *,
        final: bool,
    ) -> None:
        """Run one call.

        Args:
            number: Its number.
            progress: How far it is.
            layers: As for :meth:`visit`, like the next one.
            visit: The same.
            skipped: Modules that return what is stored.
            fresh: Modules whose outputs are stored.
            final: Whether the run goes on until all of these are.
        """
        remaining = {("layer", layer.layer) for layer in layers}
        remaining |= {("end", name) for name in fresh if final}
        call, padding, streams = progress.call, progress.padding, dict[str, Tensor]()

        def done(kind: str, name: str) -> None:
            remaining.discard((kind, name))
            if not remaining:
                raise _DoneError

        def on_layer(layer: Layer) -> Any:
            def hook(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
            ) -> None:
                x = channels_last(module, consumer_input(args, kwargs))
                stream = self._stream_of(layer, module, streams)
                part = LayerCall(call, x, stream, channels_last(module, output), padding.real(x))
                visit(number, layer, part)
                done("layer", layer.layer)

            return hook

        def store(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                progress.outputs[self._key(name)] = map_tensors(clone_batch(output), spilled)
                done("end", name)

            return hook

        with self._hooking(padding) as hooks, self._skipping(progress.outputs, skipped):
            for name in sorted({layer.residual for layer in layers if layer.residual}):
                module = self._module(name)
                hook = module.register_forward_pre_hook(_note(streams, name), with_kwargs=True)
                hooks.append(hook)
            for layer in layers:
                module = self._module(layer.layer)
                hooks.append(module.register_forward_hook(on_layer(layer), with_kwargs=True))
            for name in fresh:
                hooks.append(self._module(name).register_forward_hook(store(name)))
            self._call(call)

    def _stream_of(
        self, layer: Layer, module: nn.Module, streams: Mapping[str, Tensor]
    ) -> Tensor | None:
        """The residual stream that is added to the output of a layer, channels last."""
        if layer.residual is None:
            return None
        reader = self._module(layer.residual)
        # A linear layer may add to what a convolution reads, with channels first.
        return channels_last(reader if has_kernel(reader) else module, streams[layer.residual])

    def _call(self, call: RecordedCall) -> None:
        call = in_weight_precision(call, self._network)
        with contextlib.suppress(_DoneError):
            self._network(*call.args, **call.kwargs)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """A block in which the network runs without gradients."""
        with evaluating(self._network), contextlib.ExitStack() as stack:
            if self._has_attention:
                stack.enter_context(padded_encoders(self._network))
                stack.enter_context(open_attention(self._model, [*self._layers]))
            yield

    @contextlib.contextmanager
    def _hooking(self, padding: Padding) -> Iterator[list[RemovableHandle]]:
        """A block at whose end the hooks in the list come off."""
        hooks: list[RemovableHandle] = []
        try:
            if self._has_attention:
                hooks += padding.attach(self._model)
            yield hooks
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _skipping(self, outputs: Mapping[str, Any], names: Sequence[str]) -> Iterator[None]:
        """A block in which modules return what they returned before, where that is stored."""
        modules = [(self._module(name), self._key(name)) for name in names]
        modules = [(module, key) for module, key in modules if key in outputs]
        before = [module.__dict__.get("forward") for module, _ in modules]
        try:
            for module, key in modules:
                module.__dict__["forward"] = _returns(outputs[key])
            yield
        finally:
            for (module, _), forward in zip(modules, before, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _key(self, name: str) -> str:
        """The name that the outputs of a module have: those of one list replace each other."""
        return name.rpartition(".")[0] + "." if name in self._shared else name

    # ------------------------------------------------------------------------------ what is known

    def _show(self, call: RecordedCall) -> _Shown:
        """Run a few examples and note what happens."""
        shown, streams = _Shown(), dict[str, Tensor]()

        def on_layer(layer: Layer) -> Any:
            def hook(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
            ) -> None:
                x, stream = consumer_input(args, kwargs), None
                shown.events.append(("layer", layer.layer))
                shown.inputs[layer.layer] = x
                if layer.residual in streams:  # else it is not known which one is added
                    stream = self._stream_of(layer, module, streams)
                shown.received[layer.layer] = _copies(channels_last(module, x), stream)
                output = channels_last(module, output)
                dims = output.shape[: max(1, output.ndim - 1)][:2]
                shown.whole |= call.rows not in dims

            return hook

        def on(kind: str, name: str) -> Any:
            return lambda *_: shown.events.append((kind, name))

        with self._evaluating(), self._hooking(Padding()) as hooks:
            for name in sorted({one.residual for one in self._layers.values() if one.residual}):
                module = self._module(name)
                hook = module.register_forward_pre_hook(_note(streams, name), with_kwargs=True)
                hooks.append(hook)
            for layer in self._layers.values():
                module = self._module(layer.layer)
                hooks.append(module.register_forward_hook(on_layer(layer), with_kwargs=True))
            for name, module in self._modules():
                hooks.append(module.register_forward_pre_hook(on("start", name)))
                hooks.append(module.register_forward_hook(on("end", name)))
            self._call(call)
        return shown

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules inside the network with their paths, outer ones first."""
        stem = f"{self._path}." if self._path else ""
        return ((stem + path, part) for path, part in self._network.named_modules() if path)

    def _module(self, path: str) -> nn.Module:
        """The module at a path, which is the same in all runs."""
        if path not in self._known:
            self._known[path] = self._model.get_submodule(path)
        return self._known[path]

    def _last_reader(self, name: str, end: int) -> int:
        """Where the last layer above a module is whose residual stream is inside of it, else 0."""
        inside = (
            place
            for layer, place in self._place.items()
            if place > end and (self._layers[layer].residual or "").startswith(f"{name}.")
        )
        return max(inside, default=0)

    def _final_at(self, event: int, last: int) -> list[str]:
        """The outermost modules that ended before an event.

        Args:
            event: The event.
            last: Place of the last layer that needs what is inside of them.
        """
        found: dict[str, None] = {}
        for name, end in self._ends.items():
            known = end < event and self._read_until[name] <= last
            if known and not any(outer in found for outer in _around(name)):
                found[name] = None
        return [*found]

    def _end_around(self, layer: str) -> int:
        """Where the block ends that holds a layer; where the layer is, outside of all."""
        held = (end for name, end in self._over.items() if layer.startswith(f"{name}."))
        return max(held, default=self._place[layer])

    def _in_waves(self, shown: _Shown) -> list[list[Layer]]:
        """Layers in the order in which they run, neighbours that read the same input together."""
        waves: list[list[Layer]] = []
        ran = sorted(self._place, key=self._place.__getitem__)
        for place, name in enumerate(ran):
            same = place and shown.inputs[name] is shown.inputs[ran[place - 1]]
            if same and self._below[name] == self._below[ran[place - 1]]:
                waves[-1].append(self._layers[name])
            else:
                waves.append([self._layers[name]])
        return waves

    def _gives_the_same(self, call: RecordedCall, shown: _Shown) -> bool:
        """Whether every layer, visited wave by wave, receives what it does in one whole run."""
        runs, same = _Pass([_Progress(call)]), True

        def compare(number: int, layer: Layer, part: LayerCall) -> None:
            nonlocal same
            known, found = shown.received[layer.layer], _copies(part.x, part.stream)
            same &= len(found) == len(known) and all(map(torch.equal, found, known))

        for wave in self.waves:
            try:
                self._visit(runs, wave, compare)
            except Exception:  # any code may run in a network
                return False
            if not same:
                return False
        return True


def _copies(*tensors: Tensor | None) -> list[Tensor]:
    """What tensors hold now: a network may write into them."""
    return [tensor.clone() for tensor in tensors if tensor is not None]


def _around(name: str) -> Iterator[str]:
    """Paths of the modules around a module, from the innermost one."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _note(streams: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams[name] = args[0] if args else next(iter(kwargs.values()))

    return hook


def _returns(output: Any) -> Callable[..., Any]:
    # A copy each time: what follows may write into it.
    return lambda *_, **__: clone_batch(output)


def _blocks_in(network: nn.Module, path: str, layers: Sequence[str]) -> list[str]:
    """Paths of the outermost children of lists of modules in a network.

    One with many layers is divided where it holds such lists.
    """
    found: list[str] = []

    def walk(module: nn.Module, name: str) -> None:
        lists = isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        for key, child in module.named_children():
            there = f"{name}.{key}" if name else key
            if not lists:
                walk(child, there)
                continue
            start, before = f"{there}.", len(found)
            if sum(layer.startswith(start) for layer in layers) > _MOST_LAYERS:
                walk(child, there)
            if len(found) == before:
                found.append(there)

    walk(network, path)
    return found


def valid_positions(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions that are not padding, flat."""
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.to(x.device).bool()]
    return x.flatten(0, -2)
