"""Try a cut on a copy of the whole module before the module changes.

Groups cover the tensors of a network. A head, penalty or metric of the user around the network
may depend on its units too: this shows when the steps of the module run on a copy after the cut.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import copy_networks, fixed_random_state
from lightning_mi_prune.core.spilling import is_spilling
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.surgery.transaction import cut_model

__all__ = [
    "Failure",
    "compiled_part",
    "copy_module",
    "half_plan",
    "held_elsewhere",
    "parameters_in",
    "verify_cut",
]

Step = Callable[[nn.Module], Any]
_DEPTH = 3  # of nested containers
_MOST_VALUES = 100_000  # to look at: a data set in memory has more, but no parameters
_LIBRARIES = ("builtins", "lightning", "pytorch_lightning", "torch", "torchmetrics", "transformers")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # copied by torch


@dataclass(frozen=True)
class Failure:
    """A step that could not run.

    Args:
        step: Name of the step.
        module: Path of the innermost running module, "" if none was.
        kind: Class of that module.
        error: Class and first line of the exception.
    """

    step: str
    module: str
    kind: str
    error: str

    def __str__(self) -> str:
        where = f"{self.module!r} ({self.kind}) in {self.step}" if self.module else self.step
        return f"{where}: {self.error}"


def verify_cut(
    module: nn.Module,
    graph: PruningGraph,
    current: PruningPlan,
    plan: PruningPlan,
    steps: Mapping[str, Step],
    *,
    prepare: Callable[[nn.Module], None] = lambda _: None,
) -> str:
    """Run the steps of a module on a cut copy, and refuse a cut after which one of them fails.

    The module and the random state do not change.

    Args:
        module: The whole module; it is only copied.
        graph: Groups and stacks as built.
        current: Plan of the module now.
        plan: Plan to try.
        steps: Functions of the module to run, by name.
        prepare: Called with every copy, to isolate its steps from trainer and loggers.

    Returns:
        Why a step fails on an uncut copy too, so that it tests nothing; "" otherwise.

    Raises:
        PruningError: Naming the group, and the module or step that fails without its units.
    """
    # Where memory is short the copy shares what it does not cut; steps only read parameters.
    shared = {id(p): p for p in module.parameters()} if is_spilling() else None

    def attempt(tried: PruningPlan | None) -> Failure | None:
        whole = copy_module(module, shared)
        if tried is not None:
            cut_model(whole, graph, tried, current=current)
        prepare(whole)
        for name, step in steps.items():
            failure = _failure_of(whole, name, step)
            if failure is not None:
                return failure
        return None

    with fixed_random_state(module):
        failure = attempt(plan)
        if failure is None:
            return ""
        plain = attempt(None)
        if plain is not None:
            return str(plain)
        parts = _parts(graph, current, plan)
        culprit = next(
            ((name, f) for name, part in parts if (f := attempt(part)) is not None),
            ("", failure),
        )
    name, failure = culprit
    what = repr(name) if name else " and ".join(repr(each) for each, _ in parts[:2])
    raise PruningError(
        f"A cut of {what} would break {failure}. Expected all consumers of the units in their "
        "group; leave the group out (exclude, or other kinds), or make that part adapt to the "
        "width of the network."
    )


def parameters_in(module: nn.Module, groups: Sequence[DependencyGroup]) -> dict[str, nn.Parameter]:
    """The parameters that groups cut, by name; not their buffers."""
    known = dict(module.named_parameters(remove_duplicate=False))
    names = [s.tensor for group in groups for s in group.tensors]
    return {name: known[name] for name in names if name in known}


def half_plan(groups: Sequence[DependencyGroup], current: PruningPlan) -> PruningPlan:
    """The plan that keeps the first half of every group's present units.

    Example:
        >>> group = DependencyGroup("ffn", "ffn", 6, (), ("down",))
        >>> half_plan([group], PruningPlan({"ffn": 6}, {"ffn": (0, 2, 3, 5)})).kept["ffn"]
        (0, 2)
    """
    kept = {}
    for group in groups:
        width = group.multiple * -(-current.width(group.name) // (2 * group.multiple))
        kept[group.name] = current.kept[group.name][:width]
    return PruningPlan({group.name: group.size for group in groups}, kept)


def compiled_part(module: nn.Module, cut: Iterable[str]) -> str | None:
    """Path of a compiled module that contains one of the modules to cut, or None."""
    paths = list(cut)
    for name, part in module.named_modules():
        compiled = hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None)
        if compiled and any(not name or f"{path}.".startswith(f"{name}.") for path in paths):
            return name or type(part).__name__
    return None


def held_elsewhere(owners: Mapping[str, Any], parameters: Iterable[nn.Parameter]) -> list[str]:
    """Attributes, such as lists of the user, that would hold old parameters after a cut.

    Args:
        owners: Objects whose attributes are searched (for a module, those of all its submodules),
            by the name they are reported under.
        parameters: Parameters that a cut replaces.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> net.penalized = {"all": [net.weight]}
        >>> held_elsewhere({"": net}, [net.weight])
        ['penalized']
    """
    wanted, left = {id(p) for p in parameters}, _MOST_VALUES
    found = []

    def holds(value: Any, depth: int) -> bool:
        nonlocal left
        left -= 1
        if isinstance(value, Tensor):
            return id(value) in wanted
        if depth < 0 or left < 0 or isinstance(value, (nn.Module, str, bytes, int, float)):
            return False
        if isinstance(value, Optimizer):
            inner: Iterable[Any] = [group["params"] for group in value.param_groups]
        elif isinstance(value, Mapping):
            inner = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset, deque)):
            inner = list(value)
        elif _is_user_object(value):
            inner = list(vars(value).values())
        else:
            return False
        return any(holds(each, depth - 1) for each in inner)

    for name, owner in owners.items():
        parts = owner.named_modules() if isinstance(owner, nn.Module) else [("", owner)]
        for path, part in parts:
            for attribute, value in vars(part).items():
                if (
                    attribute not in _MODULE_ATTRIBUTES
                    and attribute[:1] != "_"
                    and holds(value, _DEPTH)
                ):
                    found.append(".".join(filter(None, (name, path, attribute))))
    return found


def _is_user_object(value: Any) -> bool:
    """Whether an object is an instance of a class outside the libraries used here."""
    library = type(value).__module__.partition(".")[0] in _LIBRARIES
    return hasattr(value, "__dict__") and not library and not isinstance(value, type)


def copy_module(module: nn.Module, shared: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a module with its training flags and hooks, but not those of this package.

    Attributes that cannot be copied (open files, locks, non-leaf tensors) are shared.

    Args:
        module: The module.
        shared: Objects that are not copied, by ``id``.

    Raises:
        PruningError: If the module cannot be copied nevertheless.
    """
    try:
        whole = copy_networks(module, {""}, shared)
    except Exception:  # any class may be copied
        memo = {**(shared or {}), **{id(value): value for value in _uncopyable(module)}}
        try:
            whole = copy_networks(module, {""}, memo)
        except Exception as error:
            raise PruningError(
                f"{type(module).__name__} cannot be copied ({_line(error)}), so no cut can be "
                "tried first; expected a module that copy.deepcopy can copy."
            ) from error
    pairs = list(zip(module.modules(), whole.modules(), strict=True))
    mine = {id(old): new for old, new in pairs}
    for old, new in pairs:
        new.training = old.training
        for name in _HOOKS:
            hooks = getattr(new, name)
            for key, hook in list(hooks.items()):
                if str(getattr(hook, "__module__", "")).startswith("lightning_mi_prune."):
                    del hooks[key]
                elif isinstance(hook, MethodType) and id(hook.__self__) in mine:
                    hooks[key] = MethodType(hook.__func__, mine[id(hook.__self__)])
    return whole


def _uncopyable(module: nn.Module) -> Iterator[Any]:
    """Attributes of modules that ``copy.deepcopy`` refuses."""
    for part in module.modules():
        for name, value in vars(part).items():
            if name in _MODULE_ATTRIBUTES or isinstance(value, nn.Module):
                continue
            try:
                copy.deepcopy(value)
            except Exception:  # any class may be copied
                yield value


def _failure_of(whole: nn.Module, name: str, step: Step) -> Failure | None:
    """Why a step cannot run on a copy; None if it can."""
    with _running(whole) as stack:
        try:
            step(whole)
        except PruningError:  # not caused by the cut
            raise
        except Exception as error:  # any code may run in a step
            path = stack[-1] if stack else ""
            kind = type(whole.get_submodule(path)).__name__ if path else ""
            return Failure(name, path, kind, _line(error))
    return None


@contextmanager
def _running(module: nn.Module) -> Iterator[list[str]]:
    """Paths of the running modules, outermost first; those that failed are not removed."""
    stack: list[str] = []
    handles = []

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            stack.append(path)

        return hook

    def leave(*_: Any) -> None:
        stack.pop()

    try:
        for path, part in module.named_modules():
            if path:
                handles.append(part.register_forward_pre_hook(enter(path)))
                handles.append(part.register_forward_hook(leave))
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _parts(
    graph: PruningGraph, current: PruningPlan, plan: PruningPlan
) -> list[tuple[str, PruningPlan]]:
    """The plan in parts of one group or stack each, the hidden size first."""
    kinds = {part.name: part.kind for part in graph.parts}
    present = {group.name for group in graph.groups_at(current.then(plan))}
    present |= {stack.name for stack in graph.stacks}
    cut = [n for n in plan.sizes if plan.kept[n] != current.kept[n] and n in present]
    order = sorted(cut, key=lambda name: (kinds[name] != "hidden", kinds[name], name))
    return [(name, plan.only([name])) for name in order]


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0].rstrip('.')}"[:300] if lines else type(error).__name__
    )
