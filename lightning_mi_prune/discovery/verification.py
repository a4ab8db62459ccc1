"""Verification: a cut copy must give the outputs of the same module with those units masked.

Copies share every parameter with the module; only what is cut, masked or constant is allocated.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.spilling import spill_outputs, spilled
from lightning_mi_prune.discovery.copies import (
    Run,
    changed_within,
    failing_module,
    first_line,
    put_tensors,
    relative_difference,
    run_once,
    structural_copy,
    tensor_at,
    tensor_outputs,
)
from lightning_mi_prune.discovery.inference import Reduction
from lightning_mi_prune.discovery.tracing.recording import tensors_of
from lightning_mi_prune.graph.groups import DependencyGroup, LayerStack, full_depth
from lightning_mi_prune.graph.layouts import Factor, kept_positions, layout_names, map_layout
from lightning_mi_prune.surgery.layers import arrange_layers
from lightning_mi_prune.surgery.units import apply_plan

__all__ = [
    "LATE",
    "OutOfTime",
    "Outcome",
    "Verifier",
    "random_halves",
    "returns_input",
]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
_LOW_PRECISION = 3e-2  # of types with less than 24 bits, where an exact check is not possible
_MOST_NOISE = 1e-3  # a network that amplifies rounding more than this is not verified


LATE = "not verified in the time given; more seconds may be enough"


class OutOfTime(Exception):  # noqa: N818  # no error: what is left is refused
    """The time for verification is over."""


@dataclass(frozen=True)
class Outcome:
    """What one cut of a copy showed.

    Args:
        reason: Why the cut is wrong; "" if its outputs equal those of the masked module.
        module: Path of the innermost running module if the cut copy failed.
        shape: Whether an output has another shape.
    """

    reason: str = ""
    module: str = ""
    shape: bool = False

    @property
    def equal(self) -> bool:
        """Whether the outputs are equal."""
        return not self.reason


def random_halves(groups: Sequence[DependencyGroup], seed: int = 0) -> dict[str, tuple[int, ...]]:
    """A random half of the units of every group, about: most groups keep different shares.

    A number that follows the wrong one of two groups then has the wrong value, and so has one that
    counts two groups of which one alone is cut right.

    Example:
        >>> a, b = (DependencyGroup(n, "ffn", 8, (), ()) for n in "ab")
        >>> {name: len(kept) for name, kept in random_halves([a, b]).items()}
        {'a': 4, 'b': 5}
    """
    source, used = random.Random(seed), dict[int, int]()  # noqa: S311
    found = {}
    for group in groups:
        turn = used.get(group.size, seed + len(used))
        used[group.size] = turn + 1
        low, high = max(1, group.size // 3), max(1, (2 * group.size) // 3)
        width = low + (group.size // 2 - low + turn) % (high - low + 1)
        if group.multiple > 1:
            width = min(group.size, max(1, round(width / group.multiple)) * group.multiple)
        found[group.name] = tuple(sorted(source.sample(range(group.size), width)))
    return found


class Verifier:
    """Cuts copies of one module and holds each against the masked module.

    Args:
        module: The module; neither it nor its buffers change.
        run: Calls a module on the example.
        reductions: Operators of that call that compute statistics over units.
        sizes: Size of every group, by name.
        seconds: Time after which :class:`OutOfTime` is raised.
        advance: Called for every run of a copy.

    Attributes:
        clock: What the time is read from.
    """

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(
        self,
        module: nn.Module,
        run: Run,
        reductions: Sequence[Reduction] = (),
        sizes: Mapping[str, int] | None = None,
        seconds: float = 60.0,
        advance: Callable[[], object] = lambda: None,
    ) -> None:
        self.base = structural_copy(module, buffers=True)
        self.sizes = dict(sizes or {})
        self.runs = 0
        self._run, self._advance = run, advance
        self._reductions = tuple(reductions)
        self._end = self.clock() + seconds
        self._masked: tuple[object, dict[int, Tensor], list[Any], list[Tensor]] | None = None
        self._use_single_precision()

    def _use_single_precision(self) -> None:
        """Give the base single precision if it has less and runs with it: checks are exact then."""
        low = {
            id(t): t.detach().float()
            for t in (*self.base.parameters(), *self.base.buffers())
            if t.dtype in (torch.float16, torch.bfloat16)
        }
        if not low:
            return
        single = structural_copy(self.base)
        put_tensors(single, low)
        try:
            outputs = self.call(single)
        except Exception:  # inputs of its own may have the lower precision
            return
        if all(t.dtype == torch.float32 for t in outputs if t.is_floating_point()):
            self.base = single

    def with_factors(self, factor: Callable[[str], Factor], gone: Iterable[str]) -> Verifier:
        """The same for groups some of which became part of others.

        Args:
            factor: What stands for a name in the layouts now.
            gone: Names that are no longer those of groups.
        """
        other = copy.copy(self)
        other.sizes = {n: size for n, size in self.sizes.items() if n not in set(gone)}
        other._masked = None
        other._reductions = tuple(
            replace(r, dims=tuple((i, d, map_layout(layout, factor)) for i, d, layout in r.dims))
            for r in self._reductions
        )
        return other

    def vary_constants(self, groups: Sequence[DependencyGroup]) -> None:
        """Give tensors of groups that are constant, such as fresh biases, random values.

        Those of masked and cut copies are equal then, and nothing is hidden by zeros.
        """
        generator = torch.Generator().manual_seed(0)
        replaced: dict[int, Tensor] = {}
        for name in dict.fromkeys(s.tensor for group in groups for s in group.tensors):
            old = tensor_at(self.base, name)
            if old is None or id(old) in replaced or not old.is_floating_point():
                continue
            if not old.numel() or old.is_meta or not _is_constant(old.detach()):
                continue
            noise = torch.rand(old.shape, generator=generator).to(old)
            scale = 0.5 / max(1, old[0].numel()) ** 0.5 if old.ndim > 1 else 0.5
            replaced[id(old)] = old.detach() + scale * noise
        put_tensors(self.base, replaced)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - self.clock()

    def extend(self, seconds: float) -> None:
        """Move the end by some seconds; earlier ones are kept for what comes afterwards."""
        self._end += seconds

    def call(self, module: nn.Module, *modes: Any) -> list[Tensor]:
        """The outputs of a copy.

        Raises:
            OutOfTime: If the time was over before.
        """
        if self.left <= 0:
            raise OutOfTime
        self.runs += 1
        self._advance()
        return tensor_outputs(run_once(module, self._run, *modes))

    def masked(
        self, groups: Sequence[DependencyGroup], kept: Mapping[str, tuple[int, ...]]
    ) -> list[Tensor]:
        """Outputs of the module with the dropped units' entries set to zero in every tensor."""
        factors = _query_factors(groups, kept)
        dims = {g.name: [(s.tensor, s.dim, s.layout) for s in g.tensors] for g in groups}
        key = (dims, kept, factors)
        if self._masked is None or self._masked[0] != key:
            zeroed: dict[int, Tensor] = {}
            for name, dim, index in self._positions(groups, kept):
                old = tensor_at(self.base, name)
                if old is None or name.rpartition(".")[2] == "running_var":
                    continue  # the outputs are divided by its root
                if id(old) not in zeroed:
                    zeroed[id(old)] = spilled(old.detach().clone())
                gone = torch.ones(old.shape[dim], dtype=torch.bool)
                gone[index] = False
                where = gone.nonzero().flatten().to(old.device)
                zeroed[id(old)].index_fill_(dim, where, 0)
            for path, factor in factors.items():
                for name in ("weight", "bias"):
                    old = tensor_at(self.base, f"{path}.{name}")
                    if old is not None and id(old) in zeroed:
                        zeroed[id(old)].mul_(factor)
            names = set(kept)
            mine = [
                r for r in self._reductions if any(names & set(layout_names(d[2])) for d in r.dims)
            ]
            modes = [_RestrictedReductions(mine, kept, self.sizes)] if mine else []
            with changed_within(self.base):
                put_tensors(self.base, zeroed)
                self._masked = (key, zeroed, modes, self.call(self.base, *modes))
        return self._masked[3]

    def unchanged_by(self, change: Callable[[nn.Module], None]) -> bool:
        """Whether a change of the copy, which is taken back, leaves its outputs as they are.

        Raises:
            OutOfTime: If the time is over.
        """
        self._masked = ((), {}, [], self.call(self.base))
        with changed_within(self.base):
            change(self.base)
            got = self.call(self.base)
        return self._compared(got, self._masked[3]).equal

    def check(self, groups: Sequence[DependencyGroup], seed: int = 0) -> Outcome:
        """Cut a random half of the units of groups, all at once, on a copy.

        Args:
            groups: The groups, with attributes.
            seed: Of the choice of units.

        Raises:
            OutOfTime: If the time is over.
        """
        return self.check_kept(groups, random_halves(groups, seed))

    def check_kept(
        self, groups: Sequence[DependencyGroup], kept: Mapping[str, tuple[int, ...]]
    ) -> Outcome:
        """The same for given units that stay."""
        try:
            want = self.masked(groups, kept)
        except OutOfTime:
            raise
        except Exception as error:  # any code may run in a module
            return Outcome(f"the masked module fails ({first_line(error)})")
        plan = PruningPlan({group.name: group.size for group in groups}, kept)
        return self._tried(partial(apply_plan, self.base, groups, plan), want)

    def check_layer(self, stack: LayerStack, index: int) -> Outcome:
        """Remove one layer of a stack; outputs must be those as if it returned its input.

        Args:
            stack: The stack, with the numbers that depend on its depth.
            index: The layer.

        Raises:
            OutOfTime: If the time is over.
        """
        layer = self.base.get_submodule(f"{stack.name}.{index}" if stack.name else str(index))
        handle = layer.register_forward_hook(returns_input, with_kwargs=True)
        try:
            want = self.call(self.base)
        except OutOfTime:
            raise
        except Exception as error:  # any code may run in a module
            return Outcome(f"the module fails if the layer returns its input ({first_line(error)})")
        finally:
            handle.remove()
        self._masked = ((), {}, [], want)
        kept = tuple(each for each in range(stack.size) if each != index)
        plan = PruningPlan({stack.name: stack.size}, {stack.name: kept})
        now = full_depth([stack])
        return self._tried(partial(arrange_layers, self.base, [stack], plan, current=now), want)

    def _tried(self, change: Callable[[], object], want: Sequence[Tensor]) -> Outcome:
        """Whether the copy has some outputs after a change, which is taken back."""
        with changed_within(self.base):
            try:
                change()
                got = self.call(self.base)
            except OutOfTime:
                raise
            except Exception as error:  # any code may run in a module
                return Outcome(first_line(error), failing_module(error, self.base))
        return self._compared(got, want)

    def _positions(
        self, groups: Sequence[DependencyGroup], kept: Mapping[str, tuple[int, ...]]
    ) -> list[tuple[str, int, list[int]]]:
        """Kept positions of every dimension that is cut, each once."""
        dims = {(s.tensor, s.dim): s.layout for group in groups for s in group.tensors}
        return [
            (name, dim, kept_positions(layout, kept, self.sizes))
            for (name, dim), layout in dims.items()
        ]

    def _compared(self, got: Sequence[Tensor], want: Sequence[Tensor]) -> Outcome:
        if len(got) != len(want):
            return Outcome(f"{len(got)} outputs instead of {len(want)}")
        for mine, other in zip(got, want, strict=True):
            if mine.shape != other.shape:
                return Outcome(
                    f"an output has the shape {tuple(mine.shape)} instead of {tuple(other.shape)}",
                    shape=True,
                )
        difference = relative_difference(got, want)
        tolerance = max((_TOLERANCE.get(t.dtype, _LOW_PRECISION) for t in want), default=0.0)
        if tolerance < difference < _MOST_NOISE:
            tolerance = max(tolerance, 4 * self._noise(want))
        if difference <= tolerance:
            return Outcome()
        return Outcome(f"outputs differ by {difference:.1e} (relative) from the masked module's")

    def _noise(self, want: Sequence[Tensor]) -> float:
        """The difference that rounding each parameter of the masked module makes."""
        if self._masked is None:
            return 0.0
        _, zeroed, modes, _ = self._masked
        generator = torch.Generator().manual_seed(0)
        rounded: dict[int, Tensor] = {}
        for p in self.base.parameters():
            if p.is_floating_point():
                noise = torch.randn(p.shape, generator=generator).to(p)
                value = zeroed.get(id(p), p).detach()
                rounded[id(p)] = value * (1 + torch.finfo(p.dtype).eps * noise)
        for mode in modes:
            mode.restart()
        with changed_within(self.base):
            put_tensors(self.base, {**zeroed, **rounded})
            return relative_difference(self.call(self.base, *modes), want)


def _query_factors(
    groups: Sequence[DependencyGroup], kept: Mapping[str, tuple[int, ...]]
) -> dict[str, float]:
    """Factors of queries that make up for attention which divides by the size that heads have."""
    return {
        group.rotation.query: (group.size / max(1, len(kept[group.name]))) ** 0.5
        for group in groups
        if group.rotation is not None and group.rotation.rescaled
    }


def returns_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """A forward hook that replaces the first output of a layer by its first input.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> _ = layer.register_forward_hook(returns_input, with_kwargs=True)
        >>> layer(torch.ones(1, 2))
        tensor([[1., 1.]])
    """
    first = args[0] if args else next(iter(kwargs.values()))
    return type(output)([first, *output[1:]]) if type(output) in (tuple, list) else first


def _is_constant(tensor: Tensor) -> bool:
    first = tensor.flatten()[0]
    return all(bool((part == first).all()) for part in (tensor[:1], tensor))


class _RestrictedReductions(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Statistics over units are computed over the kept ones only, in the masked module."""

    def __init__(
        self,
        reductions: Sequence[Reduction],
        kept: Mapping[str, tuple[int, ...]],
        sizes: Mapping[str, int],
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._reductions = {reduction.index: reduction for reduction in reductions}
        self._kept, self._sizes, self._index = kept, sizes, 0
        self._alive: list[Any] = []

    def restart(self) -> None:
        """Count operators from the first one again."""
        self._index = 0
        self._alive.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        reduction = self._reductions.get(self._index)
        self._index += 1
        output = func(*args, **(kwargs or {}))
        # While it is alive, as in a recording: torch runs an operator more for such tensors.
        self._alive.append(output)
        spill_outputs(tensors_of(output), tensors_of((args, kwargs or {})))
        if reduction is None:
            return output
        name = func._schema.name.partition("::")[2]
        if name != reduction.operator:
            raise RuntimeError(
                f"operator {reduction.index} is {name}, not {reduction.operator} as recorded"
            )
        return self._restricted(reduction, func, (args, kwargs or {}), output)

    def _restricted(self, reduction: Reduction, func: Any, given: Any, output: Any) -> Any:
        leaves, tree = tree_flatten(given)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        first: tuple[int, list[int]] | None = None
        for position, dim, layout in reduction.dims:
            place = places[position]
            index = kept_positions(layout, self._kept, self._sizes)
            tensor = leaves[place]
            leaves[place] = tensor.index_select(dim, _index(index, tensor))
            if position == 0:
                first = (dim % tensor.ndim, index)
        args, kwargs = tree_unflatten(leaves, tree)
        args = _resized(reduction.operator, args)
        found, tree = tree_flatten(func(*args, **kwargs))
        if first is None:
            return tree_unflatten(found, tree)
        dim, index = first
        whole = tree_flatten(output)[0]
        for i, (mine, full) in enumerate(zip(found, whole, strict=True)):
            if isinstance(mine, Tensor) and mine.shape != full.shape:
                found[i] = torch.zeros_like(full).index_copy(dim, _index(index, mine), mine)
        return tree_unflatten(found, tree)


def _index(positions: Sequence[int], tensor: Tensor) -> Tensor:
    return torch.tensor(positions, dtype=torch.long, device=tensor.device)


def _resized(operator: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of an operator whose tensors became smaller, with the sizes among them."""
    if operator in ("native_layer_norm", "_fused_rms_norm", "rms_norm", "layer_norm"):
        shape = list(args[0].shape[args[0].ndim - len(args[1]) :])
        return (args[0], shape, *args[2:])
    if operator == "native_group_norm":  # input, weight, bias, examples, channels, pixels, groups
        return (*args[:4], args[0].shape[1], *args[5:])
    return args
