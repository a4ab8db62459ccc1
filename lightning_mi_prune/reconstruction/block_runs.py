"""Run a network on stored calls, block by block: what has run is not run again.

Every layer of a cut model is solved on inputs that the solved layers below it give, so the network
runs again and again, each time a little further. A *block* is a child of one of its lists of
modules. Once all layers in it are solved, its outputs are stored, and from then on it returns them
without running. So each run costs about one block, whatever the number of blocks, and memory holds
one block's outputs for each stored call.
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
from lightning_mi_prune.calibration.padding import Padding, padded_encoders
from lightning_mi_prune.core.consumers import channels_last, consumer_input, has_kernel
from lightning_mi_prune.core.running import clone_batch, evaluating, tensors_in
from lightning_mi_prune.surgery.attention import open_attention

__all__ = ["BlockRuns", "LayerCall", "ResidualLayer", "valid_positions"]

# Blocks with more layers to solve are divided, where they hold lists of modules themselves.
_MOST_LAYERS = 16
# Examples of a call that shows in which order layers run.
_FEW = 3
_NOTHING = torch.empty(0)


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
    """What one run of a network shows: events in their order, and what they passed on.

    Args:
        events: Kind (``"layer"``, ``"stream"``, ``"start"``, ``"end"``) and path of each.
        inputs: The input of every layer, held so that no other gets its ``id``.
        given: Tensors in the arguments of every block.
        returned: Output of every block.
        whole: Whether a layer's outputs are not per example, such as a table of distances.
    """

    events: list[tuple[str, str]] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, list[Tensor]] = field(default_factory=dict)
    returned: dict[str, Any] = field(default_factory=dict)
    whole: bool = False


class BlockRuns(Generic[Layer]):
    """Runs of one network on several calls, whose finished blocks are not run again.

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
        self._model, self._network = model, model.get_submodule(path)
        self._layers = {layer.layer: layer for layer in layers}
        self.calls = calls
        self._paddings = [Padding() for _ in calls]
        self._outputs: list[dict[str, Any]] = [{} for _ in calls]
        self.finished, self._keep_all = 0, False
        candidates = _blocks_in(self._network, path, [*self._layers])
        few = calls[0].select(torch.arange(min(_FEW, max(1, calls[0].rows))))
        try:
            shown = self._show(few, candidates)
        except Exception:  # which dimension counts examples may not be known: then all of them
            few = calls[0]
            shown = self._show(few, candidates)
        self.is_whole = shown.whole
        times = Counter(shown.events)
        self.blocks = tuple(
            name for kind, name in shown.events if kind == "end" and times[kind, name] == 1
        )
        ran = [name for kind, name in shown.events if kind == "layer" and times[kind, name] == 1]
        self._below = {name: self._blocks_below(shown, self._layers[name]) for name in ran}
        self.waves = self._in_waves(shown, ran)
        self._keep_all = not self._is_chain(few, shown)

    def runs_once(self, layer: str) -> bool:
        """Whether a layer runs exactly once in a call."""
        return layer in self._below

    def visit(
        self,
        layers: Sequence[Layer],
        visit: Callable[[int, Layer, LayerCall], None],
        *,
        finish: bool = False,
    ) -> None:
        """Run every call up to some layers.

        Args:
            layers: Layers to visit.
            visit: Called with the number of a call, a layer, and the layer in that call.
            finish: Whether the next block is finished too: its outputs are stored.
        """
        block = self.blocks[self.finished] if finish else None
        below = min((self._below[layer.layer] for layer in layers), default=self.finished)
        # What an earlier block passes on may be needed: then everything runs again.
        skipped = self.blocks[: self.finished] if below >= self.finished else ()
        with self._evaluating():
            for number, call in enumerate(self.calls):
                self._run(number, call, layers, visit, block, skipped)
        self.finished += finish

    def finish_below(self, layer: Layer) -> None:
        """Store the outputs of all blocks below a layer."""
        while self.finished < self._below[layer.layer]:
            self.visit((), _ignore, finish=True)

    def left_in_block(self, layers: Sequence[Layer]) -> list[Layer]:
        """Those of some layers that are visited before the next block is finished."""
        return [layer for layer in layers if self._below.get(layer.layer) == self.finished]

    def is_below(self, layer: str) -> bool:
        """Whether the next block lies below a layer."""
        return self.finished < self._below[layer]

    # -------------------------------------------------------------------------------------- runs

    def _run(
        self,
        number: int,
        call: RecordedCall,
        layers: Sequence[Layer],
        visit: Callable[[int, Layer, LayerCall], None],
        block: str | None,
        skipped: Sequence[str],
    ) -> None:
        remaining, padding = {layer.layer for layer in layers}, self._paddings[number]
        if block is not None:
            remaining.add(block + ".")  # no layer has such a name
        streams: dict[str, Tensor] = {}

        def done(name: str) -> None:
            remaining.discard(name)
            if not remaining:
                raise _DoneError

        def on_layer(layer: Layer) -> Any:
            def hook(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
            ) -> None:
                x = channels_last(module, consumer_input(args, kwargs))
                stream = None if layer.residual is None else streams[layer.residual]
                if stream is not None and layer.residual is not None:
                    reader = self._model.get_submodule(layer.residual)
                    # A linear layer may add to what a convolution reads, with channels first.
                    stream = channels_last(reader if has_kernel(reader) else module, stream)
                part = LayerCall(call, x, stream, channels_last(module, output), padding.real(x))
                visit(number, layer, part)
                done(layer.layer)

            return hook

        def store(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            assert block is not None  # noqa: S101
            self._outputs[number][self._key(block)] = clone_batch(output)
            done(block + ".")

        with self._hooking(padding) as hooks, self._skipping(number, skipped):
            for name in sorted({layer.residual for layer in layers if layer.residual}):
                module = self._model.get_submodule(name)
                hook = module.register_forward_pre_hook(_note(streams, name), with_kwargs=True)
                hooks.append(hook)
            for layer in layers:
                module = self._model.get_submodule(layer.layer)
                hooks.append(module.register_forward_hook(on_layer(layer), with_kwargs=True))
            if block is not None:
                module = self._model.get_submodule(block)
                hooks.append(module.register_forward_hook(store))
            self._call(call)

    def _call(self, call: RecordedCall) -> None:
        call = in_weight_precision(call, self._network)
        with contextlib.suppress(_DoneError):
            self._network(*call.args, **call.kwargs)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """A block in which the network runs without gradients."""
        opened = open_attention(self._model, [*self._layers])
        with padded_encoders(self._network), evaluating(self._network), opened:
            yield

    @contextlib.contextmanager
    def _hooking(self, padding: Padding) -> Iterator[list[RemovableHandle]]:
        """A block at whose end the hooks in the list come off."""
        hooks: list[RemovableHandle] = []
        try:
            hooks += padding.attach(self._model)
            yield hooks
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def _skipping(
        self, number: int, blocks: Sequence[str], outputs: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """A block in which blocks return what they returned before."""
        known = self._outputs[number] if outputs is None else outputs
        modules = [(self._model.get_submodule(name), self._key(name)) for name in blocks]
        modules = [(module, key) for module, key in modules if key in known]
        before = [module.__dict__.get("forward") for module, _ in modules]
        try:
            for module, key in modules:
                module.__dict__["forward"] = _returns(known[key])
            yield
        finally:
            for (module, _), forward in zip(modules, before, strict=True):
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward

    def _key(self, block: str) -> str:
        """The name that the outputs of a block have: those of one list replace each other."""
        return block if self._keep_all else block.rpartition(".")[0]

    # ------------------------------------------------------------------------------ what is known

    def _show(
        self,
        call: RecordedCall,
        blocks: Sequence[str],
        outputs: Mapping[str, Any] | None = None,
        skipped: Sequence[str] = (),
        until: str | None = None,
    ) -> _Shown:
        """Run a few examples and note what happens.

        Args:
            call: The examples.
            blocks: Blocks to note.
            outputs: Outputs of the skipped blocks.
            skipped: Blocks that do not run.
            until: Block that need not run any more.
        """
        shown = _Shown()

        def on_layer(name: str) -> Any:
            def hook(
                module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
            ) -> None:
                shown.events.append(("layer", name))
                shown.inputs[name] = consumer_input(args, kwargs)
                output = channels_last(module, output)
                dims = output.shape[: max(1, output.ndim - 1)][:2]
                shown.whole |= call.rows not in dims

            return hook

        def on_stream(name: str) -> Any:
            return lambda *_: shown.events.append(("stream", name))

        def on_start(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                shown.events.append(("start", name))
                shown.given[name] = [x.clone() for x in tensors_in((args, kwargs))]
                if name == until:
                    raise _DoneError

            return hook

        def on_end(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                shown.events.append(("end", name))
                shown.returned[name] = clone_batch(output)

            return hook

        hooking, skipping = self._hooking(Padding()), self._skipping(0, skipped, outputs)
        with self._evaluating(), hooking as hooks, skipping:
            for name in sorted({one.residual for one in self._layers.values() if one.residual}):
                module = self._model.get_submodule(name)
                hooks.append(module.register_forward_pre_hook(on_stream(name)))
            for name in self._layers:
                module = self._model.get_submodule(name)
                hooks.append(module.register_forward_hook(on_layer(name), with_kwargs=True))
            for name in blocks:
                module = self._model.get_submodule(name)
                hooks.append(module.register_forward_pre_hook(on_start(name), with_kwargs=True))
                hooks.append(module.register_forward_hook(on_end(name)))
            self._call(call)
        return shown

    def _blocks_below(self, shown: _Shown, layer: Layer) -> int:
        """How many blocks are over before a layer, and its residual stream, are needed."""
        names = {("layer", layer.layer), ("stream", layer.residual)}
        first = next(place for place, event in enumerate(shown.events) if event in names)
        ended = {name for kind, name in shown.events[:first] if kind == "end"}
        below = 0
        while below < len(self.blocks) and self.blocks[below] in ended:
            below += 1
        return below

    def _in_waves(self, shown: _Shown, ran: Sequence[str]) -> list[list[Layer]]:
        """Layers in the order in which they run, neighbours that read the same input together."""
        waves: list[list[Layer]] = []
        for place, name in enumerate(ran):
            same = place and shown.inputs[name] is shown.inputs[ran[place - 1]]
            if same and self._below[name] == self._below[ran[place - 1]]:
                waves[-1].append(self._layers[name])
            else:
                waves.append([self._layers[name]])
        return waves

    def _is_chain(self, call: RecordedCall, shown: _Shown) -> bool:
        """Whether the last outputs of every list are all that what follows needs.

        Tried for every block: with those below it skipped, the next one must get the same inputs,
        and what follows the last one must be the same.
        """
        outputs: dict[str, Any] = {}
        for place, name in enumerate(self.blocks):
            outputs[self._key(name)] = shown.returned[name]
            following = self.blocks[place + 1] if place + 1 < len(self.blocks) else None
            again = self._show(
                call,
                () if following is None else (following,),
                outputs,
                self.blocks[: place + 1],
                following,
            )
            if following is not None and not _equal(again.given, shown.given, following):
                return False
            above = [name for name, below in self._below.items() if below == len(self.blocks)]
            for layer in above if following is None else ():
                if not torch.equal(again.inputs.get(layer, _NOTHING), shown.inputs[layer]):
                    return False
        return True


def _equal(
    found: Mapping[str, Sequence[Tensor]], wanted: Mapping[str, Sequence[Tensor]], name: str
) -> bool:
    pairs = [found.get(name, ()), wanted[name]]
    return len(pairs[0]) == len(pairs[1]) and all(map(torch.equal, *pairs))


def _note(streams: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        streams[name] = args[0] if args else next(iter(kwargs.values()))

    return hook


def _returns(output: Any) -> Callable[..., Any]:
    # A copy each time: what follows may write into it.
    return lambda *_, **__: clone_batch(output)


def _ignore(*_: object) -> None:
    """Visit of nothing."""


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
