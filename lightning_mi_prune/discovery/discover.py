"""discover: the pruning graph of any module, from one recorded call, verified on a copy."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mi_prune.core.empty_linear import linear_at
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.progress import progress_step
from lightning_mi_prune.core.running import map_tensors, undisturbed
from lightning_mi_prune.discovery.attributes import numbers_of, seen_numbers
from lightning_mi_prune.discovery.config_fields import with_config_fields, with_depth_fields
from lightning_mi_prune.discovery.copies import (
    Run,
    changed_within,
    failing_module,
    first_line,
    relative_difference,
    run_once,
    structural_copy,
    tensor_at,
    tensor_outputs,
)
from lightning_mi_prune.discovery.example_inputs import example_inputs
from lightning_mi_prune.discovery.heads import with_empty_attention, with_rotations
from lightning_mi_prune.discovery.hints import why_layers_stay
from lightning_mi_prune.discovery.inference import Inference, Reduction, infer
from lightning_mi_prune.discovery.labels import short_names
from lightning_mi_prune.discovery.search import solve, without_groups
from lightning_mi_prune.discovery.verification import LATE, OutOfTime, Verifier
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    LayerStack,
    Refusal,
    SizeAttribute,
    count_parameters,
)
from lightning_mi_prune.graph.layouts import layout_names, map_layout
from lightning_mi_prune.surgery.parameters import number_steps, set_number
from lightning_mi_prune.surgery.verification import compiled_part

__all__ = [
    "discover",
    "discover_run",
]

_EXAMPLES = 2  # of a batch; one would not show which dimension counts them
# Verification takes some hundred calls, of large modules many of them as long as the first.
_SECONDS, _CALLS = 60.0, 400
_SHARE = 0.5  # of the parameters; a graph that reaches fewer deserves a warning
_MOST_FIXED = 2  # layers at the bottom of a stack that others may depend on
_REPEATED = 1e-6  # largest relative difference of two equal calls


def discover(module: nn.Module, *args: Any, **kwargs: Any) -> PruningGraph:
    """Find what of a module can be pruned: run it once, infer groups, verify each on a copy.

    The module is called with the arguments; batches are reduced to two examples. Module, buffers,
    gradients and random state stay as they are. ``print(graph)`` shows a table of the groups, and
    why the rest cannot be cut.

    Args:
        module: The module.
        args: Arguments of one call. A Hugging Face model needs none.
        kwargs: Arguments by name.

    Raises:
        PruningError: If the module cannot be called or copied, or nothing of it can be pruned.

    Warns:
        PruningWarning: If less than half of the parameters are in groups.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = discover(net, torch.randn(4, 3))
        >>> [(group.kind, group.size, group.consumers) for group in graph.groups]
        [('ffn', 8, ('2',))]
        >>> str(graph).splitlines()[-1]
        '48 of 50 parameters (96.0%) are in 1 group'
    """
    _check_supported(module)
    compiled = compiled_part(module, [path for path, _ in module.named_modules()])
    if compiled is not None:
        raise PruningError(
            f"{compiled!r} is compiled for its present sizes; expected the module as it was "
            "written. Compile it after pruning."
        )
    if not args and not kwargs:
        kwargs = example_inputs(module)
    for_all = inspect.signature(module.forward).parameters
    if "use_cache" in for_all and "use_cache" not in kwargs:
        kwargs = {**kwargs, "use_cache": False}
    few = _few_examples((args, kwargs))

    def run(called: nn.Module) -> Any:
        return called(*few[0], **few[1])

    return discover_run(module, run)


def discover_run(
    module: nn.Module,
    run: Run,
    *,
    seconds: float | None = None,
    kinds: Sequence[str] | None = None,
) -> PruningGraph:
    """The same for a function that calls a module, such as a training step.

    Args:
        module: The module from which groups are named.
        run: Calls it, or a copy of it, always on the same example; what it returns is compared.
            If it returns no tensor, the output of the last child that ran is.
        seconds: Time for verification; what is not verified by then is refused. Default: a minute,
            or that of 400 calls if they take longer.
        kinds: Kinds of groups to find; None for all.

    Raises:
        PruningError: As :func:`discover`.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(4, 3)
        >>> discover_run(net, lambda net: net(x)).groups[0].consumers
        ('2',)
    """
    _check_supported(module)
    call = _with_outputs(run)
    shown, eager = progress_step("discovery", "check"), torch.compiler.set_stance("force_eager")
    with shown as progress, undisturbed(module), _full_precision(module), eager:
        copied = structural_copy(module, buffers=True)
        started = time.monotonic()
        _check_repeats(copied, call)
        if seconds is None:
            seconds = max(_SECONDS, _CALLS * (time.monotonic() - started) / 2)
        inference = _of_kinds(infer(copied, call), kinds)
        del copied
        sizes = {group.name: group.size for group in inference.groups}
        given = (inference.reductions, sizes, seconds)
        verifier = Verifier(module, call, *given, advance=progress.advance)
        verifier.vary_constants(inference.groups)
        seen = seen_numbers(verifier.base, call) if inference.groups else set()
        numbers = numbers_of(verifier.base)
        solution = solve(verifier, inference.groups, numbers, seen, inference.roles)
        layers = [stack.name for stack in inference.stacks]
        rotated = with_rotations(verifier, solution.groups, inference.roles, layers)
        groups, unturned = _without_unverified(solution.groups, rotated)
        groups = with_empty_attention(verifier, module, _that_may_be_empty(verifier, groups))
        groups = _with_short_names(groups, layers)
        groups = _with_config_fields(verifier, module, groups, call)
        stacks, wrong = _that_can_be_shortened(
            verifier, with_depth_fields(module, inference.stacks)
        )
    graph = PruningGraph(
        groups,
        stacks,
        (*solution.refused, *unturned, *inference.refused, *wrong),
        inference.unknown,
        sum(p.numel() for p in module.parameters()),
        _reachable(module, groups),
    )
    _check_found(module, graph, warn=kinds is None)
    return graph


def _check_supported(module: nn.Module) -> None:
    """Refuse modules whose calls cannot be followed, or whose parameters cannot be replaced."""
    kind = type(module).__name__
    if isinstance(module, DistributedDataParallel):
        raise PruningError(f"{kind} wraps the module to prune; give its attribute 'module'.")
    for path, part in module.named_modules():
        name, where = type(part).__name__, repr(path) if path else "the module"
        if isinstance(part, torch.jit.ScriptModule):
            raise PruningError(
                f"{where} is a scripted module ({name}), whose parts cannot be replaced; expected "
                "the module as it was written. Script it after pruning."
            )
        if "FullyShardedDataParallel" in name or any(
            base.__name__ == "FSDPModule" for base in type(part).__mro__
        ):
            raise PruningError(
                f"{where} is sharded ({name}), so no process holds its whole parameters; expected "
                "the module before it is wrapped. Discover and prune it first."
            )
        if getattr(getattr(part, "config", None), "chunk_size_feed_forward", 0):
            raise PruningError(
                f"{where} ({name}) splits its sequences into chunks, where padding cannot be "
                "identified. Set config.chunk_size_feed_forward=0 when the model is built."
            )
    for path, tensor in module.named_parameters():
        if nn.parameter.is_lazy(tensor):
            raise PruningError(
                f"{path!r} has no shape yet: it is a lazy parameter. Call the module once first."
            )
        if tensor.is_meta:
            raise PruningError(
                f"{path!r} has no values (device meta); expected a module with weights, since cuts "
                "are verified on its outputs. Load or initialise it first."
            )
    if not any(True for _ in module.parameters()):
        raise PruningError(f"{kind} has no parameters; expected a network to prune.")


def _few_examples(values: Any) -> Any:
    """Arguments reduced to two examples of the batch, which is the first dimension.

    Raises:
        PruningError: If the batch is empty.
    """
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(values, note)
    sizes = [t.shape[0] for t in tensors if t.ndim]
    if any(not t.numel() for t in tensors):
        raise PruningError(
            "The example holds a tensor without entries; expected a batch of one or more examples."
        )
    batch = sizes[0] if sizes else 0
    if batch <= _EXAMPLES or sizes.count(batch) < len(sizes):
        return values  # few as it is, or it is not clear which dimension counts the examples
    return map_tensors(values, lambda t: t[:_EXAMPLES] if t.ndim else t)


def _with_outputs(run: Run) -> Run:
    """A run that returns what the last child returned, if it returns no tensor itself."""

    def call(module: nn.Module) -> Any:
        last: list[Any] = []
        handles = [
            child.register_forward_hook(lambda *given: last.__setitem__(slice(None), given[-1:]))
            for child in module.children()
        ]
        try:
            result = run(module)
        finally:
            for handle in handles:
                handle.remove()
        return result if tensor_outputs(result) or not last else last[0]

    return call


@contextmanager
def _full_precision(module: nn.Module) -> Iterator[None]:
    """No autocast, in which rounding would hide what a cut changes."""
    devices = {p.device.type for p in module.parameters()}
    with torch.autocast("cuda" if "cuda" in devices else "cpu", enabled=False):
        yield


def _check_repeats(copied: nn.Module, call: Run) -> None:
    """Refuse a call that fails, returns nothing, or returns something else when repeated."""
    kind = type(copied).__name__
    try:
        first = tensor_outputs(run_once(copied, call))
    except PruningError:
        raise
    except Exception as error:  # any code may run in a module
        path = failing_module(error, copied)
        raise PruningError(
            f"The example call of {kind} fails in {path or 'the module'!r} "
            f"({first_line(error)}); expected arguments with which it runs. Give them: "
            "discover(module, *args, **kwargs)."
        ) from error
    if not first:
        raise PruningError(
            f"The example call of {kind} returns no tensor; expected its outputs, which are "
            "compared to verify cuts. Return them from the function that calls the module."
        )
    difference = relative_difference(tensor_outputs(run_once(copied, call)), first)
    if difference > _REPEATED:
        raise PruningError(
            f"Two equal calls of {kind} in evaluation mode differ by {difference:.1e} (relative), "
            "from the same random state; expected equal outputs, or no cut can be verified. Does "
            "it keep a state, or draw numbers from a generator of its own?"
        )


def _of_kinds(inference: Inference, kinds: Sequence[str] | None) -> Inference:
    """The inference with groups of some kinds only; all else is constant in its layouts."""
    named = dict.fromkeys(
        name
        for layouts in (
            *([s.layout for s in group.tensors] for group in inference.groups),
            *([layout for _, _, layout in r.dims] for r in inference.reductions),
        )
        for layout in layouts
        for name in layout_names(layout)
    )
    chosen = [g for g in inference.groups if kinds is None or g.kind in kinds]
    kept = {group.name for group in chosen}
    sizes = {g.name: g.size for g in inference.groups}
    sizes |= {name: size for group in inference.groups for name, size in group.partners}
    gone = {name: sizes[name] for name in named if name not in kept and name in sizes}

    def fixed(reduction: Reduction) -> Reduction:
        dims = (
            (i, dim, map_layout(layout, lambda name: gone.get(name, name)))
            for i, dim, layout in reduction.dims
        )
        return replace(reduction, dims=tuple(d for d in dims if layout_names(d[2])))

    reductions = [fixed(r) for r in inference.reductions]
    return replace(
        inference,
        groups=tuple(without_groups(chosen, gone)),
        reductions=tuple(r for r in reductions if r.dims),
    )


def _without_unverified(
    before: Sequence[DependencyGroup], rotated: Sequence[DependencyGroup]
) -> tuple[tuple[DependencyGroup, ...], tuple[Refusal, ...]]:
    """Leave out dimensions of heads that are right only if queries are scaled, which failed."""
    failed = [a for a, b in zip(before, rotated, strict=True) if a.rotation and not b.rotation]
    gone = {group.name: group.size for group in failed}
    reason = "scores are divided by the root of the present head size, which queries cannot undo"
    return (
        tuple(without_groups([g for g in rotated if g.name not in gone], gone)),
        tuple(Refusal(g.name, g.kind, g.size, count_parameters([g]), reason) for g in failed),
    )


def _with_short_names(
    groups: Sequence[DependencyGroup], stacks: Sequence[str]
) -> tuple[DependencyGroup, ...]:
    """The groups with the names of their layers for dimensions of heads that became one."""
    short = short_names([g.name for g in groups if g.kind == "head_dim"], "head_dim", stacks)
    return tuple(group.renamed(lambda name: short.get(name, name)) for group in groups)


def _with_config_fields(
    verifier: Verifier, module: nn.Module, groups: tuple[DependencyGroup, ...], call: Run
) -> tuple[DependencyGroup, ...]:
    """Note config fields; numbers that a network built from them has otherwise stay as they are."""
    copied = structural_copy(module, buffers=True)
    before = tensor_outputs(run_once(copied, call))

    def unused(numbers: Mapping[tuple[str, str], Any]) -> bool:
        with changed_within(copied):
            try:
                for (path, attribute), value in numbers.items():
                    number = SizeAttribute(path, attribute, ())
                    part = linear_at(copied.get_submodule(path))
                    set_number(part, number_steps(number), value)
                after = tensor_outputs(run_once(copied, call))
            except Exception:  # any code may run in a module
                return False
        return relative_difference(after, before) <= _REPEATED

    noted = with_config_fields(module, groups, unused)
    if [group.attributes for group in noted] == [group.attributes for group in groups]:
        return noted
    try:
        right = verifier.check(noted).equal
    except OutOfTime:
        right = False
    return noted if right else with_config_fields(module, groups)


def _that_may_be_empty(
    verifier: Verifier, groups: Sequence[DependencyGroup]
) -> tuple[DependencyGroup, ...]:
    """Note which neurons beside a residual stream can all go: then the layer only adds its bias."""
    names = {g.name for g in groups if g.kind == "ffn" and g.residual is not None}
    some = [replace(g, may_be_empty=True) for g in groups if g.name in names]
    try:
        empty = bool(some) and verifier.check_kept(some, dict.fromkeys(names, ())).equal
    except OutOfTime:
        empty = False
    return tuple(
        replace(group, may_be_empty=True) if empty and group.name in names else group
        for group in groups
    )


def _that_can_be_shortened(
    verifier: Verifier, stacks: Sequence[LayerStack]
) -> tuple[tuple[LayerStack, ...], tuple[Refusal, ...]]:
    """The stacks of which a layer can go, and why others cannot.

    Others may use what the first layers compute: these stay where a layer above them can go.
    """
    found, refused = [], []
    for stack in stacks:
        reason = why_layers_stay(verifier.base.get_submodule(stack.network))
        if reason:
            refused.append(Refusal(stack.name, "depth", stack.size, 0, reason))
            continue
        for fixed in range(stack.fixed, min(stack.fixed + _MOST_FIXED, stack.size - 1) + 1):
            try:
                why = verifier.check_layer(stack, fixed).reason
            except OutOfTime:
                why = LATE
            if not why:
                found.append(replace(stack, fixed=fixed))
                break
            reason = reason or why
        else:
            refused.append(Refusal(stack.name, "depth", stack.size, 0, reason))
    return tuple(found), tuple(refused)


def _reachable(module: nn.Module, groups: Sequence[DependencyGroup]) -> int:
    """Number of parameters that the groups cut."""
    found = {
        id(tensor): tensor.numel()
        for group in groups
        for s in group.tensors
        if isinstance(tensor := tensor_at(module, s.tensor), nn.Parameter)
    }
    return sum(found.values())


def _check_found(module: nn.Module, graph: PruningGraph, *, warn: bool) -> None:
    """Refuse a graph of nothing, and warn where it reaches little."""
    kind = type(module).__name__
    reasons = [f"{r.name} ({r.reason})" for r in graph.refused[:3]]
    reasons += [f"no rule for {label}" for label in graph.unknown[:3]]
    why = f": {'; '.join(reasons)}" if reasons else ""
    if not graph.parts:
        raise PruningError(
            f"Nothing of {kind} can be pruned{why}. Expected a call in which units of one layer "
            "are read by another; call the whole network on an example."
        )
    if warn and graph.reachable < _SHARE * graph.parameters:
        warnings.warn(
            f"Only {graph.reachable / graph.parameters:.0%} of the parameters of {kind} are in "
            f"groups that can be pruned{why}. print(graph) shows all of it.",
            PruningWarning,
            stacklevel=4,
        )
