"""GradientRecorder: hooks that sum the loss gradients at the outputs of every group's consumers.

``G = E[sum_p s_p g_p g_p']``, with ``g_p`` the gradient of an example's loss at position ``p`` of
the output ``z`` of a consumer. Scoring against ``G^(1/2) z + noise`` weights outputs by how much
the loss depends on them, and ``1/2 tr(G Cov(z | kept))`` is the expected rise of the loss in nats.

``s_p = min(1, |z_p|^2 / median |z|^2)`` is 1 for half of the positions and more. A position whose
output is next to nothing cannot lose much, however large its gradient: with a norm behind the
output (Gemma), the first token of a text has by far the largest gradients of all.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.calibration.activations import ModuleHooks, read_shape
from lightning_mi_prune.calibration.calls import batch_size_of
from lightning_mi_prune.calibration.moments import (
    add_outer,
    check_packed,
    mirror,
    pack_symmetric,
    unpack_symmetric,
)
from lightning_mi_prune.calibration.padding import Padding
from lightning_mi_prune.core.consumers import (
    channels_last,
    consumer_input,
    fold_positions,
    input_gradient,
    stacked_weight,
)
from lightning_mi_prune.core.empty_linear import parameters_of
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.functional import intercept_gradients
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.spilling import in_file, is_spilling, spilled, spilled_zeros, spilling
from lightning_mi_prune.graph.containers import outermost_part
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.inputs import (
    ConsumerInput,
    ReadWeight,
    read_above,
    weight_name,
    widths_now,
)
from lightning_mi_prune.graph.layouts import layout_size

__all__ = [
    "GradientRecorder",
    "GradientSize",
    "GradientSums",
    "Relevance",
    "check_gradients",
    "empty_sums",
    "gradient_sizes",
    "position_weights",
    "relevance_of",
    "relevance_of_weights",
]


@dataclass(frozen=True)
class Relevance:
    """How much the loss depends on each part of the layer above one input.

    Args:
        matrix: ``G (m, m)`` over the outputs of the consumer or, where several layers read the same
            units, ``G (d, d)`` over the units themselves.
        over_units: Whether the matrix is over the units.
        taylor: First-order change of the loss without each unit ``(units,)``, if collected.
    """

    matrix: Tensor
    over_units: bool = False
    taylor: Tensor | None = None


class GradientSums:
    """Sums over a bounded sample of training steps at one input, in float64.

    Sums of fixed shape: ranks are reduced by addition.

    Args:
        dimension: Outputs of the consumer, or entries of the units where several layers read them.
        units: Units of the group.
        over_units: Whether the gradients are those of the units.
    """

    def __init__(self, dimension: int, units: int, *, over_units: bool = False) -> None:
        self.dimension, self.units, self.over_units = dimension, units, over_units
        self.matrix = spilled_zeros((dimension, dimension), torch.float64, torch.device("cpu"))
        self.taylor = torch.zeros(units, dtype=torch.float64)
        # Examples, steps, and steps left out because a gradient was not finite.
        self.counts = torch.zeros(3, dtype=torch.float64)

    @property
    def packed_size(self) -> int:
        """Length of :meth:`packed`."""
        return 3 + self.units + self.dimension * (self.dimension + 1) // 2

    def packed(self) -> Tensor:
        """All sums as one vector; of the symmetric matrix one triangle."""
        return torch.cat([self.counts, self.taylor, pack_symmetric(self.matrix)])

    def unpack(self, packed: Tensor) -> GradientSums:
        """Replace the sums by those that :meth:`packed` wrote.

        Raises:
            PruningError: If the vector is not of this shape.

        Example:
            >>> sums = GradientSums(2, 1)
            >>> sums.matrix += 3.0
            >>> GradientSums(2, 1).unpack(sums.packed()).matrix
            tensor([[3., 3.],
                    [3., 3.]], dtype=torch.float64)
        """
        size = self.packed_size
        check_packed(packed, size, f"gradients of dimension {self.dimension}")
        counts, taylor, triangle = torch.split(packed.cpu(), [3, self.units, size - 3 - self.units])
        self.counts, self.taylor = counts.clone(), taylor.clone()
        self.matrix = unpack_symmetric(triangle, self.dimension)
        return self


def check_gradients(sums: Mapping[str, GradientSums], *, scaled: bool = False) -> None:
    """Refuse sums that are empty or cannot be trusted.

    Args:
        sums: Sums at each input, by key.
        scaled: Whether a gradient scaler ran: it looks for the largest scale without overflow, so
            some steps are expected to be left out.

    Raises:
        PruningError: If there was no training step, no gradient, or one that was not finite.
    """
    for key, found in sums.items():
        _, steps, skipped = (int(n) for n in found.counts)
        if skipped and not (scaled and steps):
            raise PruningError(
                f"NaN or infinite gradients at {key!r} in {skipped} of "
                f"{counted(steps + skipped, 'training step')}. Expected finite ones; lower the "
                "learning rate, clip gradients, or use relevance='weights', which needs none."
            )
        if not steps:
            raise PruningError(
                f"relevance='gradient' needs training steps, but there were none at {key!r}. "
                "Expected at least one backward pass through the network before a cut; train "
                "first, or use relevance='weights', which needs none."
            )
        if found.dimension and not found.matrix.any():
            raise PruningError(
                f"No gradient reached {key!r} in {counted(steps, 'training step')}, so the loss "
                "does not depend on it. Exclude the group, or use relevance='weights'."
            )


def relevance_of(sums: Mapping[str, GradientSums]) -> dict[str, Relevance]:
    """``G`` as a mean over examples, by key of the input.

    Example:
        >>> sums = GradientSums(1, 1)
        >>> sums.matrix += 6.0
        >>> sums.counts += 2.0
        >>> relevance_of({"ffn": sums})["ffn"].matrix
        tensor([[3.]], dtype=torch.float64)
    """
    found = {}
    for key, each in sums.items():
        examples = each.counts[0].clamp_min(1)
        taylor = (each.taylor / examples).sqrt()
        found[key] = Relevance(spilled(each.matrix / examples), each.over_units, taylor)
    return found


def relevance_of_weights(
    group: DependencyGroup,
    weights: Mapping[str, Tensor],
    rows: Mapping[tuple[str, int], Tensor | None],
) -> dict[str, Relevance]:
    """``G = sum W'W`` over the kept outputs of all weights above: no gradients needed.

    Of a convolution above, the positions of its kernel add up, and so do the positions of a
    flattened map that a linear layer above reads.

    Args:
        group: The group whose consumers' outputs are weighted.
        weights: Parameters of the model as it is now, by qualified name.
        rows: Positions that are kept of each tensor above, by name and dimension; None or missing
            keeps all.
    """
    if not group.above or group.consumers_by_input:
        return {}
    first = ConsumerInput.of(group, group.consumers).weight(group.consumers[0])
    width = weights[first.tensor].shape[first.output]
    total: Tensor | None = None
    for consumer in group.above:
        name = weight_name(consumer, weights)
        weight = weights[name].detach().double()
        several = name == consumer and weight.ndim == 3
        dim = read_above(tuple(weight.shape), width, several=several)
        output = ReadWeight(name, dim, several).output
        kept = rows.get((name, output))
        if kept is not None:
            weight = weight.index_select(output, kept.to(weight.device))
        fold = weight.shape[dim] // width if weight.ndim == 2 else 1
        for part in stacked_weight(weight, dim, fold, several=several).unbind(2):
            total = part.mT @ part if total is None else total + part.mT @ part
    return {} if total is None else {group.name: Relevance(total)}


class GradientRecorder(ModuleHooks):
    """Hooks the consumers of every group and sums the gradients at their outputs, step by step.

    The gradients are those that ordinary training computes: of scaled losses, of losses divided for
    accumulation, of several losses in one step, through activation checkpoints. Pass the scale of
    a step to :meth:`end`, so that all steps have the same weight. A step with a gradient that is
    not finite is left out of all sums. Made in a block of :func:`spilling`, it has them in files.

    Args:
        model: Module that holds the groups.
        groups: Groups to record.
        steps: Training steps to record.
        batches: Training steps there will be; recorded ones are spread evenly over them. None
            records the first ones.
        taylor: Whether to sum first-order changes too, for the criterion of that name.
        plan: Plan that the model carries (default: as built).

    Example:
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> with GradientRecorder(net, [group]) as recorder:
        ...     with recorder.step(0):
        ...         net(torch.randn(5, 3)).square().mean().backward()
        >>> [int(n) for n in recorder.sums["hidden"].counts]
        [5, 1, 0]
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[DependencyGroup],
        *,
        steps: int = 64,
        batches: int | None = None,
        taylor: bool = False,
        plan: PruningPlan | None = None,
    ) -> None:
        super().__init__(model)
        self.sums = empty_sums(model, groups, plan)
        self._units = _unit_entries(groups, plan)
        # Groups whose units are in one input share its matrix: inputs are named by their consumers.
        keys: dict[tuple[tuple[str, ...], str, bool], list[str]] = {}
        self._first: dict[str, str] = {}
        for group in groups:
            for key, consumers in group.inputs.items():
                place = (consumers, group.scope or group.network, self.sums[key].over_units)
                same = keys.setdefault(place, [key])
                self._first[key] = same[0]
                if same[0] != key:
                    self.sums[key].matrix = self.sums[same[0]].matrix
                    same.append(key)
        self._consumers = [
            (tuple(same), consumer, path)
            for (consumers, path, _), same in keys.items()
            for consumer in consumers
        ]
        self._steps, self._taylor = steps, taylor
        self._padding = Padding()
        self._stride = 1 if batches is None else max(1, batches // steps)
        self._networks = sorted({group.scope or group.network for group in groups})
        # Steps may call the parts of the whole model instead of the model.
        whole = (consumers for consumers, path, _ in keys if not path)
        parts = {outermost_part(model, consumer) for several in whole for consumer in several}
        self._parts = sorted(parts - {""})
        self._staged: dict[str, list[Tensor]] = {}
        self._rows: Counter[tuple[str, bool]] = Counter()
        self._last: dict[str, int] = {}
        self._recording, self._in_files = False, is_spilling()
        self.seconds = 0.0  # spent on the sums, apart from the steps themselves

    @property
    def is_recording(self) -> bool:
        """Whether the step that runs is one of those that are recorded."""
        return self._recording

    @property
    def _hooked(self) -> Sequence[str]:
        return [consumer for _, consumer, _ in self._consumers]

    def _attach(self) -> Iterator[RemovableHandle]:
        for path in [*self._networks, *self._parts]:
            module, hook = self._model.get_submodule(path), partial(self._count, path)
            yield module.register_forward_pre_hook(hook, with_kwargs=True)
        yield from self._padding.attach(self._model)
        products: dict[str, list[Callable[[Tensor, Tensor], None]]] = defaultdict(list)
        names = parameters_of(self._model)
        for keys, consumer, path in self._consumers:
            if consumer in names:  # no layer: a parameter that a module multiplies with
                products[consumer].append(partial(self._add_at_input, keys))
                continue
            module, hook = self._model.get_submodule(consumer), self._on_output(keys, path)
            yield module.register_forward_hook(hook, with_kwargs=True)
        yield from intercept_gradients(self._model, products, self._is_wanted)

    @contextmanager
    def step(self, index: int, *, scale: float = 1.0) -> Iterator[None]:
        """A block in which one training step runs: :meth:`begin`, then :meth:`end`."""
        self.begin(index)
        yield
        self.end(scale=scale)

    def begin(self, index: int) -> None:
        """Start a training step.

        Args:
            index: Index of the step within its epoch.
        """
        self._clear()
        count, rest = divmod(index, self._stride)
        self._recording = count < self._steps and rest == self._stride - 1

    def end(self, *, scale: float = 1.0) -> None:
        """End a training step: add its gradients to the sums if all of them are finite.

        Args:
            scale: Factor on the mean loss of the step: the scale of a gradient scaler divided by
                the number of accumulated batches.
        """
        staged, self._recording = self._staged, False
        started = time.perf_counter()
        if staged:
            for matrix, _ in staged.values():
                mirror(matrix)
            values = [t for parts in staged.values() for t in parts]
            finite = bool(torch.stack([t.sum() for t in values]).isfinite().all())
            examples = self._examples()
            weight = (examples / scale) ** 2
            for key, sums in self.sums.items():
                if not finite:
                    sums.counts[2] += 1
                    continue
                sums.counts += torch.tensor([examples, 1.0, 0.0], dtype=torch.float64)
                if key in staged:
                    first = self._first[key]
                    if key == first or sums.matrix is not self.sums[first].matrix:
                        sums.matrix += staged[first][0].to("cpu", torch.float64) * weight
                    taylor = staged[key][1].to("cpu", torch.float64)
                    sums.taylor += taylor * weight
        self._clear()
        self.seconds += time.perf_counter() - started

    def _clear(self) -> None:
        self._staged, self._rows, self._recording = {}, Counter(), False
        self._last.clear()
        self._padding.clear()

    def _count(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._recording and torch.is_grad_enabled():
            self._last[path] = batch_size_of((*args, *kwargs.values())) or 0
            self._rows[path, _is_again()] += self._last[path]

    def _count_positions_first(self, path: str, x: Tensor) -> None:
        """Correct the count of a call whose inputs turn out to be ``(positions, rows, ...)``."""
        positions, rows = x.shape[:2]
        for called in [path] if path else ["", *self._parts]:
            if self._last.get(called) == positions:
                self._rows[called, _is_again()] += rows - positions
                self._last[called] = rows

    def _examples(self) -> int:
        """Examples of the step; each runs through every network once, or again in backward."""

        def most(paths: Sequence[str]) -> int:
            rows = (self._rows[path, False] or self._rows[path, True] for path in paths)
            return max(rows, default=0)

        return most(self._networks) or most(self._parts)

    def _is_wanted(self) -> bool:
        """Whether the call that runs now is one of a step that is recorded."""
        return self._recording and torch.is_grad_enabled()

    def _on_output(self, keys: Sequence[str], path: str) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor | None:
            if not self._is_wanted():
                return None
            if not output.requires_grad:
                # All below is frozen, yet gradients from above are wanted. A copy, because a leaf
                # that requires gradients does not allow operations in place.
                if not output.is_floating_point():
                    return None
                output = output.detach().requires_grad_().clone()
            x = consumer_input(args, kwargs).detach()
            power = _power(channels_last(module, output.detach()), getattr(module, "bias", None))
            swapped = self._padding.positions_first(channels_last(module, x))
            if swapped:
                self._count_positions_first(path, x)
            if self._in_files:  # what the gradient waits for
                is_read = self._taylor or self.sums[keys[0]].over_units
                x = in_file(x) if is_read else x.new_empty((0,) * x.ndim)
            add = partial(self._add_gradient, keys, x, power, module, swapped)
            output.register_hook(add)  # type: ignore[no-untyped-call]
            return output

        return hook

    def _add_gradient(
        self,
        keys: Sequence[str],
        x: Tensor,
        power: Tensor,
        module: nn.Module,
        swapped: bool,
        grad: Tensor,
    ) -> None:
        if not self._recording:
            return
        started, grad = time.perf_counter(), grad.detach()
        if swapped:
            x, power, grad = (t.transpose(0, 1) for t in (x, power, grad))
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            over_units = self.sums[keys[0]].over_units
            g = channels_last(module, grad).float()
            down = g
            if self._taylor or over_units:
                down = channels_last(module, input_gradient(module, x, grad))
                down = fold_positions(down, self._units[keys[0]][0])
            if over_units:
                inputs = fold_positions(channels_last(module, x), self._units[keys[0]][0])
                self._stage(keys, down, _power(inputs))
            else:
                self._stage(keys, g, power)
            if self._taylor:
                self._stage_change(keys, x.shape[0], channels_last(module, x), down)
        self.seconds += time.perf_counter() - started

    def _add_at_input(self, keys: Sequence[str], x: Tensor, grad: Tensor) -> None:
        """The same for a gradient at the input ``(..., entries)`` of a functional weight."""
        if not self._recording:
            return
        started = time.perf_counter()
        if self._padding.positions_first(x):
            x, grad = x.transpose(0, 1), grad.transpose(0, 1)
        with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
            down = fold_positions(grad, self._units[keys[0]][0]).float()
            self._stage(keys, down, _power(fold_positions(x, self._units[keys[0]][0])))
            if self._taylor:
                self._stage_change(keys, x.shape[0], x, down)
        self.seconds += time.perf_counter() - started

    def _stage(self, keys: Sequence[str], gradients: Tensor, power: Tensor) -> None:
        """Add gradients ``(examples, ..., dimension)`` to the matrix of an input.

        Args:
            keys: Keys of the input.
            gradients: Gradients of all positions.
            power: Squared norm ``(examples, ...)`` of what they are the gradients at.
        """
        rows = gradients * position_weights(gradients, power).sqrt().unsqueeze(-1)
        rows = rows.flatten(0, -2)
        for key in keys:
            if key not in self._staged:
                # new_zeros, as precision plugins change the default type; one matrix for all.
                size = self.sums[keys[0]].dimension if key == keys[0] else 0
                taylor = rows.new_zeros(self.sums[key].units)
                with spilling(self._in_files):  # a backward pass may run in another thread
                    home = torch.device("cpu") if self._in_files else rows.device
                    matrix = spilled_zeros((size, size), rows.dtype, home)
                self._staged[key] = [matrix, taylor]
        matrix = self._staged[keys[0]][0]
        if matrix.device == rows.device:
            add_outer(matrix, rows)
        else:
            matrix.add_((rows.mT @ rows).to(matrix.device))

    def _stage_change(self, keys: Sequence[str], examples: int, x: Tensor, down: Tensor) -> None:
        """Add first-order changes of the loss without each unit."""
        inputs = fold_positions(x, self._units[keys[0]][0])
        change = inputs.reshape(down.shape).float() * down
        change = change.reshape(examples, -1, down.shape[-1]).sum(1)
        for key in keys:
            entries, units = self._units[key][1], self.sums[key].units
            own = change if entries is None else change[:, entries.to(change.device)]
            self._staged[key][1] += own.view(examples, units, -1).sum(2).square().sum(0)


def _power(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Squared norm ``(...)`` of each position of ``x (..., d)`` without the bias."""
    x = x.float() if bias is None else x.float() - bias.detach()
    return x.square().sum(-1)


def position_weights(gradients: Tensor, power: Tensor) -> Tensor:
    """Weight of each position: its power over the median of its example, or 1 if that is more.

    Positions without a gradient, such as padding, do not count for the median.

    Args:
        gradients: Gradients ``(examples, ..., d)``.
        power: Squared norms ``(examples, ...)``.

    Example:
        >>> power = torch.tensor([[1.0, 100.0, 104.0, 900.0]])
        >>> position_weights(torch.ones(1, 4, 2), power)
        tensor([[0.0100, 1.0000, 1.0000, 1.0000]])
    """
    if power.ndim < 2:  # one position an example
        return torch.ones_like(power)
    counts = gradients.ne(0).any(-1)
    known = torch.where(counts, power, torch.nan).flatten(1)
    median = known.nanmedian(1).values.nan_to_num(1.0)
    median = median.view(-1, *[1] * (power.ndim - 1))
    return torch.where(median > 0, power / median, 1.0).clamp_max(1.0)


def _unit_entries(
    groups: Sequence[DependencyGroup], plan: PruningPlan | None
) -> dict[str, tuple[int, Tensor | None]]:
    """Of every input the positions that are samples, and the entries of its units, one by one.

    None for entries that are in that order, and for heads that rotate, which are one unit there.
    """
    found: dict[str, tuple[int, Tensor | None]] = {}
    for group in groups:
        for key, consumers in group.inputs.items():
            if group.rotation is not None:
                found[key] = (1, None)
                continue
            given = ConsumerInput.of(group, consumers)
            widths = group.all_widths({}) if plan is None else widths_now(group, plan)
            units = given.units(group.name, widths)
            entries = [position for unit in units for position in unit]
            whole = entries == [*range(layout_size(given.layout, widths))]
            found[key] = (given.fold, None if whole else torch.tensor(entries, dtype=torch.long))
    return found


def _is_again() -> bool:
    """Whether a forward pass runs inside a backward one: an activation checkpoint."""
    return bool(torch._C._current_graph_task_id() >= 0)


def empty_sums(
    model: nn.Module, groups: Sequence[DependencyGroup], plan: PruningPlan | None = None
) -> dict[str, GradientSums]:
    """Empty sums for every input, for a model that carries a plan (default: as built)."""
    return {
        key: GradientSums(size.dimension, size.units, over_units=size.over_units)
        for key, size in gradient_sizes(model, groups, plan).items()
    }


@dataclass(frozen=True)
class GradientSize:
    """Shape of the sums of gradients at one input.

    Args:
        dimension: Rows of their matrix: outputs of the consumer, or entries of the units.
        units: Units of the group.
        over_units: Whether the matrix is over the units.
    """

    dimension: int
    units: int
    over_units: bool


def gradient_sizes(
    model: nn.Module, groups: Sequence[DependencyGroup], plan: PruningPlan | None = None
) -> dict[str, GradientSize]:
    """Shape of the sums of every input, for a model that carries a plan (default: as built)."""
    widths = {} if plan is None else plan.widths
    parameters = parameters_of(model)
    sizes: dict[str, GradientSize] = {}
    for group in groups:
        for key, consumers in group.inputs.items():
            entries, outputs = read_shape(model, parameters, group, consumers)
            # Of units that several layers read, except where heads rotate: there, of outputs.
            shared, rotates = group.consumers_by_input or len(consumers) > 1, group.rotation
            shared = shared or consumers[0] in parameters  # of a functional weight: at its input
            over_units = bool(shared) and rotates is None
            if rotates is None:
                entries //= ConsumerInput.of(group, consumers).fold
            units = 1 if rotates is not None else widths.get(group.name, group.size)
            dimension = entries if over_units else outputs
            sizes[key] = GradientSize(dimension, units, over_units)
    return sizes
