"""COMPARE  the layers of a stack with each other while their network runs; hooks off afterwards."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.alignment import Alignment, Kernel
from lightning_mi_prune.angles import Angles
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.hooks import Hooked

__all__ = ["StackListener", "blocks_of"]


class StackListener(Hooked):
    """Hears what every layer of a stack says, and sums how alike and how far apart they are.

    Samples are positions without padding, the same ones for all layers, drawn anew for each call
    of the network; outputs ``(rows, channels, height, width)`` are flattened to one sample a row.
    Only sums are kept.

    Args:
        model: Module from which everything is named.
        blocks: Paths of the layers, bottom to top.
        scope: Path of the module whose ``forward`` receives ``attention_mask``.
        positions: Most samples that are compared in one call, at least four.
        kernel: Kernel of the alignment.
        bandwidth: Its width (:class:`alignment.Alignment`).
        seed: Seed of the draw.

    Raises:
        PruningError: If there are too few layers, a path is no module, or two are one.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> with StackListener(net, ["1", "2"]) as heard:
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
        positions: int = 512,
        kernel: Kernel = "linear",
        bandwidth: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if len(blocks) < 2:
            raise PruningError(
                f"A stack of {len(blocks)} layers has nothing to compare; expected two or more."
            )
        if positions < 4:
            raise PruningError(f"positions={positions}; expected 4 or more.")
        modules = dict(model.named_modules(remove_duplicate=False))
        missing = [path for path in (*blocks, scope) if path not in modules]
        if missing:
            raise PruningError(f"{missing} are no modules of {type(model).__name__}.")
        self._layers = [modules[path] for path in blocks]
        if len(set(map(id, self._layers))) < len(blocks):
            raise PruningError(
                "A layer stands in the stack twice (its weights are shared), so it cannot be "
                "removed at one place only. Lower the number of repetitions in the config."
            )
        self.alignment = Alignment(len(blocks), kernel, bandwidth)
        self.angles = Angles(len(blocks) + 1)
        self.seconds = 0.0
        self._blocks, self._scope, self._positions = list(blocks), modules[scope], positions
        self._generator = torch.Generator().manual_seed(seed)
        self._mask: Tensor | None = None
        self._index: Tensor | None = None
        self._states: list[Tensor] = []

    def _attach(self) -> Iterator[RemovableHandle]:
        yield self._scope.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield self._scope.register_forward_hook(self._end)
        yield self._layers[0].register_forward_pre_hook(self._on_input, with_kwargs=True)
        for place, layer in enumerate(self._layers):
            yield layer.register_forward_hook(self._on_output(place))

    def _drop(self) -> None:
        self._mask = self._index = None
        self._states = []

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._drop()
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
        given = bound.arguments.get("attention_mask")
        self._mask = given if isinstance(given, Tensor) else None

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hear(0, args[0] if args else next(iter(kwargs.values())))

    def _on_output(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._hear(place + 1, output)

        return hook

    def _hear(self, place: int, output: Any) -> None:
        started = time.perf_counter()
        x = output[0] if isinstance(output, (tuple, list)) else output
        if place == 0:
            self._states = []
        if not isinstance(x, Tensor) or len(self._states) != place:
            raise PruningError(
                f"The stack of {self._blocks[0]!r} runs in another order than it is listed in, or "
                "its layers hand on no tensor; expected layers that run one after another."
            )
        x = x.detach()
        flat = x.flatten(1) if x.ndim == 4 else x.reshape(-1, x.shape[-1])
        if self._index is None or not self._states:
            self._index = self._draw(x, len(flat))
        self._states.append(flat[self._index])
        self.seconds += time.perf_counter() - started

    def _draw(self, x: Tensor, rows: int) -> Tensor:
        live = torch.arange(rows)
        if self._mask is not None and self._mask.shape == x.shape[:-1]:
            live = self._mask.flatten().bool().cpu().nonzero().flatten()
        chosen = torch.randperm(len(live), generator=self._generator)[: self._positions]
        return live[chosen.sort().values].to(x.device)

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        started, states = time.perf_counter(), self._states
        self._drop()
        if len(states) != len(self._blocks) + 1:
            return  # another of the network's parts ran
        self.alignment.update(states[1:])
        if len({x.shape for x in states}) == 1:
            self.angles.update(states)
        self.seconds += time.perf_counter() - started


def blocks_of(model: nn.Module, stack: str) -> list[str]:
    """Paths of the layers of a container, bottom to top.

    Raises:
        PruningError: If the path is no ``nn.ModuleList`` or ``nn.Sequential`` of two layers or
            more of one class.

    Example:
        >>> blocks_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "")
        ['0', '1']
    """
    try:
        container = model.get_submodule(stack)
    except AttributeError as error:
        raise PruningError(f"{stack!r} is no module of {type(model).__name__}.") from error
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise PruningError(
            f"{stack!r} is a {type(container).__name__}; expected an nn.ModuleList or an "
            "nn.Sequential whose layers run one after another."
        )
    kinds = sorted({type(layer).__name__ for layer in container})
    if len(kinds) != 1 or len(container) < 2:
        raise PruningError(
            f"{stack!r} holds {len(container)} layers of {kinds}; expected two or more, all of one "
            "class."
        )
    return [f"{stack}.{name}" if stack else name for name, _ in container.named_children()]
