"""Similarity of the layers of a stack: CKA and angles, and the recorders that sum them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.calibration.activations import CallRecorder, Recorder
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.data import LayerComparison, Matrix
from lightning_mi_prune.calibration.moments import ExactSums
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.options import check_choice, check_count, check_number
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.containers import layer_paths
from lightning_mi_prune.graph.groups import LayerStack

__all__ = [
    "Kernel",
    "LayerAngles",
    "LayerCKA",
    "LayerRecorder",
    "StackRecorder",
    "u_centered",
]

Kernel = Literal["linear", "rbf"]


class LayerCKA(ExactSums):
    """Centered kernel alignment (CKA) of every pair of layers, summed over minibatches.

    The sums are those of the unbiased HSIC (Song et al. 2012, eq. 5) of each batch, of fixed size
    ``layers x layers``: memory does not depend on the number of samples, and ranks are reduced by
    addition. Batches count by their ``n (n - 3)``, so that a short last one counts less than a full
    one (with equal batches: the minibatch CKA of Nguyen et al. 2021). About 0 for independent
    layers at any batch size, 1 for rotated and scaled copies.

    Args:
        layers: Number of layers ``L``.
        kernel: ``"linear"``, or ``"rbf"``: Gaussian, of the width ``bandwidth`` times the median
            distance of the batch (Kornblith et al. 2019, section 4).
        bandwidth: Share of the median distance; only for ``"rbf"``.

    Raises:
        PruningError: If an option is out of range.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> alignment = LayerCKA(layers=3)
        >>> for _ in range(50):
        ...     x, other = torch.randn(2, 32, 8)
        ...     alignment.update([x, -2 * x.flip(1), other])
        >>> [[abs(round(float(cka), 1)) for cka in row] for row in alignment.compute()]
        [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """

    products: Tensor
    pairs: Tensor

    def __init__(self, layers: int, kernel: Kernel = "linear", bandwidth: float = 1.0) -> None:
        super().__init__()
        check_count("layers", layers, least=1)
        check_choice("kernel", kernel, ("linear", "rbf"))
        check_number("bandwidth", bandwidth, above=0)
        self.layers, self.kernel, self.bandwidth = layers, kernel, bandwidth
        zeros = torch.zeros(layers, layers, dtype=torch.float64)
        self.add_state("products", zeros, dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[Tensor]) -> None:
        """Add the outputs of all layers on one batch of samples.

        The estimate needs four samples: smaller batches are left out.

        Args:
            outputs: One ``(n, d)`` a layer; widths may differ, samples are the same ones.

        Raises:
            PruningError: If there is another number of layers, or of samples in one of them.
        """
        sizes = [len(x) for x in outputs]
        if len(sizes) != self.layers or len(set(sizes)) != 1:
            raise PruningError(
                f"{counted(len(sizes), 'output')} of {sizes} samples; expected {self.layers}, one "
                "a layer, with the same samples in each."
            )
        if sizes[0] < 4:
            return
        with torch.inference_mode(False), torch.autocast(outputs[0].device.type, enabled=False):
            device = self.products.device
            grams = [self._gram(x.detach().to(device, torch.float64)).flatten() for x in outputs]
            centered = torch.stack(grams)
            # Not in place: sums that were reset in inference mode could not be added to outside.
            self.products = self.products + centered @ centered.mT
            self.pairs = self.pairs + sizes[0] * (sizes[0] - 3)

    def compute(self) -> Tensor:
        """CKA of every pair ``(L, L)``; 0 where a layer is constant.

        Raises:
            PruningError: If there are not enough samples, or values that are not finite.
        """
        if not self.pairs:
            raise PruningError(
                "No batch had four samples or more, so layers cannot be compared. Use larger "
                "validation batches."
            )
        hsic = self.products / self.pairs
        _check_finite(hsic, "The outputs of layers")
        scale = hsic.diagonal().clamp_min(0).sqrt()
        scales = torch.outer(scale, scale)
        return torch.where(scales > 0, hsic / scales, 0.0)

    def _gram(self, x: Tensor) -> Tensor:
        x = x - x.mean(0)  # changes no kernel here, and large means cost digits
        if self.kernel == "linear":
            return u_centered(x @ x.mT)
        distances = torch.cdist(x, x).square()
        pairs = distances[~torch.eye(len(x), dtype=torch.bool, device=x.device)]
        width = self.bandwidth**2 * pairs.median()
        if width == 0:  # a constant layer: by rounding two of them could look like copies
            return torch.zeros_like(distances)
        return u_centered((-distances / (2 * width)).exp())


class LayerAngles(ExactSums):
    """Mean angle between every pair of states of a stack, as a share of a half turn.

    ``arccos(cos(x, y)) / pi``, averaged over samples: 0 for the same direction, 1/2 for
    orthogonal states (Gromov et al. 2024, arXiv 2403.17887, eq. 7).

    Args:
        states: Number of states ``S``: the input of the first layer and every output.

    Raises:
        PruningError: If ``states`` is no whole number of at least 1.

    Example:
        >>> angles = LayerAngles(states=2)
        >>> angles.update([torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0]])])
        >>> round(float(angles.compute()[0, 1]), 4)
        0.25
    """

    total: Tensor
    count: Tensor

    def __init__(self, states: int) -> None:
        super().__init__()
        check_count("states", states, least=1)
        self.states = states
        zeros = torch.zeros(states, states, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Sequence[Tensor]) -> None:
        """Add samples of all states, each ``(n, d)`` of one width.

        Raises:
            PruningError: If their number, samples or widths differ.
        """
        shapes = [tuple(x.shape) for x in outputs]
        if len(shapes) != self.states or len(set(shapes)) != 1:
            raise PruningError(
                f"{len(shapes)} states of shapes {shapes}; expected {self.states} of one shape."
            )
        with torch.inference_mode(False), torch.autocast(outputs[0].device.type, enabled=False):
            device = self.total.device
            x = torch.stack([x.detach().to(device, torch.float64) for x in outputs])
            x = functional.normalize(x, dim=2)
            cosines = torch.einsum("and,bnd->abn", x, x).clamp(-1, 1)
            self.total = self.total + cosines.acos().sum(2) / math.pi
            self.count = self.count + x.shape[1]

    def compute(self) -> Tensor:
        """Mean angle of every pair ``(S, S)``; exactly 0 of a state with itself.

        Raises:
            PruningError: If there are no samples, or values that are not finite.
        """
        if not self.count:
            raise PruningError("No states were collected; run validation first.")
        angles = self.total / self.count
        _check_finite(angles, "States")
        return angles.fill_diagonal_(0)


def _check_finite(matrix: Tensor, what: str) -> None:
    odd = (~matrix.diagonal().isfinite()).nonzero().flatten().tolist()
    if odd:
        raise PruningError(
            f"{what} {odd} hold NaN or infinite values. Expected finite activations; look for a "
            "diverged loss or an overflow in half precision first."
        )


def u_centered(gram: Tensor) -> Tensor:
    """A Gram matrix ``(N, N)`` centered so that products of two are unbiased (U-centering).

    ``sum(u_centered(K) * u_centered(L)) / (N (N - 3))`` is the unbiased HSIC of Song et al. 2012.
    """
    n = gram.shape[0]
    gram = gram - torch.diag(gram.diagonal())
    means = gram.sum(0) / (n - 2)
    gram = gram - means[:, None] - means[None, :] + means.sum() / (n - 1)
    return gram - torch.diag(gram.diagonal())


class LayerRecorder(CallRecorder):
    """Hooks every layer of a stack and sums how similar and how far apart their outputs are.

    Samples are positions without padding, the same ones for all layers, drawn anew for each call
    of the network; outputs ``(rows, channels, height, width)`` are flattened to one sample a row.
    Only sums are kept.

    Args:
        model: Module from which everything is named.
        blocks: Paths of the layers, bottom to top.
        scope: Path of the module whose ``forward`` receives ``attention_mask``.
        network: Path of the whole network, one call of which is kept; default: ``scope``.
        positions: Most samples that are compared in one call, at least four.
        kernel: Kernel of the CKA.
        bandwidth: Its width (:class:`LayerCKA`).
        seed: Seed of the draw; the global random state is not touched.
        calls: Positions of the inputs to store, so that a shorter model can be run on them.
        batches: Batches there will be; None stores the first inputs.

    Raises:
        PruningError: If there are too few layers, a path is no module, or two are one.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> with LayerRecorder(net, ["1", "2"]) as recorder:
        ...     _ = net(torch.randn(64, 3))
        >>> recorder.alignment.compute().shape, recorder.angles.compute().shape
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
        super().__init__(model, calls, batches, seed)
        if len(blocks) < 2:
            raise PruningError(
                f"A stack of {counted(len(blocks), 'layer')} has nothing to compare; expected two "
                "or more."
            )
        check_count("positions", positions, least=4)
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
                "A layer occurs twice in the stack (its weights are shared), so it cannot be "
                "removed at one place only. Lower the number of repetitions in the config."
            )
        self.alignment = LayerCKA(len(blocks), kernel, bandwidth)
        self.angles = LayerAngles(len(blocks) + 1)
        self._blocks, self._scope, self._positions = list(blocks), scope, positions
        self._networks = tuple(dict.fromkeys((scope if network is None else network, scope)))
        self._mask: Tensor | None = None
        self._index: Tensor | None = None
        self._states: list[Tensor] = []
        self._shapes: list[tuple[int, ...]] = []

    def compared(self, layers: Sequence[int], fixed: int = 0) -> LayerComparison:
        """How similar the layers are.

        Args:
            layers: Their numbers as built.
            fixed: Layers at the bottom that must stay anyway.

        Raises:
            PruningError: If there are not enough samples, or values that are not finite.
        """
        similarity, angles = self.alignment.compute(), self.angles.compute()
        # An input of another shape counts as the zero vector, orthogonal to everything.
        reshaping = bool((angles[0, 1:] - 0.5).abs().max() < 1e-9)
        return LayerComparison(
            layers=tuple(layers),
            similarity=_rows(similarity),
            angles=_rows(angles),
            fixed=max(fixed, int(reshaping)),
        )

    def _attach(self) -> Iterator[RemovableHandle]:
        for path in reversed(self._networks):
            module = self._model.get_submodule(path)
            yield module.register_forward_pre_hook(self._on_call(path), with_kwargs=True)
        yield from self._padding.attach(self._model)  # after calls, before inputs of layers
        yield self._layers[0].register_forward_pre_hook(self._on_input, with_kwargs=True)
        for place, layer in enumerate(self._layers):
            yield layer.register_forward_hook(self._on_output(place))

    def _clear(self) -> None:
        super()._clear()
        self._mask = self._index = None
        self._states, self._shapes = [], []

    def _on_call(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = self._start_call(path, module, args, kwargs)
            if path == self._scope:
                above = {p: call for p, call in self._running.items() if p != path}
                self._clear()
                self._mask, self._running = call.mask, above
            self._running[path] = call

        return hook

    def _on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if isinstance(x, Tensor):
            each = float(x.shape[1:-1].numel() if x.ndim > 2 else 1)
            self._store_call(self._networks, x, each)
        self._add_state(0, x)

    def _on_output(self, place: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._add_state(place + 1, output)
            if place + 1 == len(self._layers):
                self._sum()

        return hook

    def _add_state(self, place: int, output: Any) -> None:
        """Keep the samples of one state, in the order in which layers run, until all are there."""
        started = time.perf_counter()
        x = output[0] if isinstance(output, (tuple, list)) else output
        if place == 0:
            self._states, self._shapes = [], []
        if not isinstance(x, Tensor) or len(self._states) != place:
            raise PruningError(
                f"The stack of {self._blocks[0]!r} runs in another order than it is listed in, or "
                "its layers return no tensor; expected layers that run one after another."
            )
        x, mask = self._padding.rows_first(x.detach(), self._mask)
        if self._index is None or not self._states:
            index = self._valid(x, mask, x.shape[:1] if x.ndim == 4 else x.shape[:-1])
            chosen = torch.randperm(len(index), generator=self._generator)[: self._positions]
            self._index = index[chosen.sort().values.to(x.device)]
        flat = x.flatten(1) if x.ndim == 4 else x.reshape(-1, x.shape[-1])
        self._states.append(flat[self._index])
        self._shapes.append(tuple(x.shape[1:]))
        self._seconds += time.perf_counter() - started

    def _sum(self) -> None:
        started, states, shapes = time.perf_counter(), self._states, self._shapes
        self._states, self._shapes, self._index = [], [], None
        if len(set(shapes[1:])) > 1:
            raise PruningError(
                f"The layers of {self._blocks[0]!r} and above have outputs of different widths, "
                f"{list(dict.fromkeys(shapes[1:]))}; expected one shape, so that a layer can be "
                "removed. Name a stack whose layers agree."
            )
        self.alignment.update(states[1:])
        reshapes = shapes[0] != shapes[1]
        self.angles.update([torch.zeros_like(states[1]), *states[1:]] if reshapes else states)
        self._seconds += time.perf_counter() - started


def _rows(matrix: Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())


class StackRecorder(Recorder):
    """Records several stacks at once, each with a :class:`LayerRecorder`.

    Args:
        model: Module from which everything is named.
        stacks: The stacks, as they are now.
        options: As for :class:`LayerRecorder`.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[LayerStack], **options: Any) -> None:
        super().__init__(model)
        self._recorders = {
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
        """Start a batch, as :meth:`Recorder.start_batch` documents."""
        for recorder in self._recorders.values():
            recorder.start_batch(rows, padded)

    @property
    def seconds(self) -> float:
        """Time spent on calibration."""
        return sum(recorder.seconds for recorder in self._recorders.values())

    @property
    def sums(self) -> dict[str, ExactSums]:
        """All sums by name, to be added up over ranks."""
        alignments = {f"{name} alignment": r.alignment for name, r in self._recorders.items()}
        return alignments | {f"{name} angles": r.angles for name, r in self._recorders.items()}

    @property
    def examples(self) -> dict[str, RecordedCall]:
        """One call of each network, or of its encoder where it is never called itself."""
        found: dict[str, RecordedCall] = {}
        for stack in self._stacks:
            examples = self._recorders[stack.name].examples
            path = stack.network if stack.network in examples else stack.scope
            found |= {path: examples[path]} if path in examples else {}
        return found

    @property
    def stored(self) -> dict[str, list[RecordedCall]]:
        """Stored inputs, by path of the network; stacks of one network store the same ones once."""
        recorders = reversed(self._recorders.values())
        return {path: calls for recorder in recorders for path, calls in recorder.stored.items()}

    def compared(self, plan: PruningPlan) -> dict[str, LayerComparison]:
        """How similar the layers of every stack are, numbered as built.

        Args:
            plan: Plan the model carries.

        Raises:
            PruningError: If a stack never ran, or too few samples or values that are not finite.
        """
        idle = [name for name, recorder in self._recorders.items() if not recorder.angles.count]
        if idle:
            ran = [name for name in self._recorders if name not in idle]
            raise PruningError(
                f"The layers of {idle[0]!r} never ran in validation, so they cannot be compared; "
                f"{ran or 'no others'} did. Let validation_step run them, or leave them out with "
                "stacks= or module=."
            )
        return {
            stack.name: self._recorders[stack.name].compared(plan.kept[stack.name], stack.fixed)
            for stack in self._stacks
        }

    def _attach(self) -> Iterator[RemovableHandle]:
        for recorder in self._recorders.values():
            yield from recorder._attach()

    def _clear(self) -> None:
        for recorder in self._recorders.values():
            recorder._clear()
