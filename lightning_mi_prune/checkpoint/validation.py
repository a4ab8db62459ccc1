"""The plan in a state dict, and whether its weights fit."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.core.untrusted import described
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, join_path
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.surgery.optimizer_state import is_plain_tensor
from lightning_mi_prune.surgery.tensors import tensors_of, unsaved_buffers

__all__ = [
    "PLAN_KEY",
    "changed_groups",
    "check_weights",
    "is_group_uncut",
    "is_plan",
    "is_uncut",
    "load_errors",
    "named_from",
    "plan_in_state",
    "write_plan",
]

_NAME = "lightning_mi_prune.plan"

# torch prints the key where a model has no tracker, so the key itself holds the remedy.
PLAN_KEY = (
    f"{_NAME} (this checkpoint is pruned: open it with lightning_mi_prune.load_pruned, "
    "or with its callback in the Trainer)"
)

_GRAPH = "graph"  # beside the fields of the plan, which readers of plans alone pass over

_LARGEST_ENTRY = 64 * 2**20

_SHOWN = 6  # names in an error


def is_plan(key: str) -> bool:
    """Whether an entry of a state dict is a plan; the text of its key may have been changed."""
    return _NAME in key


def write_plan(plan: PruningPlan, graph: PruningGraph) -> Tensor:
    """An entry of a state dict with a plan and the graph of what it names.

    Example:
        >>> from lightning_mi_prune.core.plan import PruningPlan
        >>> entry = write_plan(PruningPlan({"ffn": 4}, {"ffn": (0, 2)}), PruningGraph())
        >>> plan_in_state({PLAN_KEY: entry}, "")[0].kept["ffn"]
        (0, 2)
    """
    named = PruningGraph.of(part for part in graph.parts if part.name in plan.sizes)
    body = json.loads(plan.to_json()) | {_GRAPH: named.to_json()}
    return torch.frombuffer(bytearray(json.dumps(body).encode()), dtype=torch.uint8)


def plan_in_state(
    state: dict[str, Any], prefix: str
) -> tuple[PruningPlan | None, PruningGraph | None]:
    """The plan in a state dict, joined from those of all networks, and removed from it.

    Returns:
        The plan and the graph of what it names; None where the state dict holds none.

    Raises:
        PruningError: If an entry is no plan, or two entries contradict each other.
    """
    graph: PruningGraph | None = None
    sizes: dict[str, int] = {}
    kept: dict[str, tuple[int, ...]] = {}
    rankings: dict[str, Ranking] = {}
    # Found by the name that the key starts with; the text after it may change.
    keys = [key for key in state if key.startswith(prefix) and _NAME in key]
    keys.sort(key=lambda key: key.index(_NAME))  # a part knows less of a group than the whole
    for key in keys:
        path = key[len(prefix) : key.index(_NAME, len(prefix))].removesuffix(".")
        plan, found = _read(state[key])
        plan = plan.prefixed(path)
        if found is not None:
            found = found.prefixed(path)
            graph = found if graph is None else graph.joined(found)
        for name, size in plan.sizes.items():
            if sizes.get(name, size) != size or kept.get(name, plan.kept[name]) != plan.kept[name]:
                raise PruningError(
                    f"The checkpoint holds two plans that differ in group {name!r}; expected one. "
                    "Save the state dict again."
                )
            sizes[name], kept[name] = size, plan.kept[name]
        rankings |= plan.rankings
    for key in keys:
        state.pop(key)
    return (PruningPlan(sizes, kept, rankings) if keys else None), graph


def named_from(path: str, state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of a state dict below a prefix, named from a module that holds them at a path."""
    return {
        join_path(path, key[len(prefix) :]): value
        for key, value in state.items()
        if key.startswith(prefix)
    }


def is_group_uncut(
    group: DependencyGroup, state: Mapping[str, Any], unsaved: Collection[str] = ()
) -> bool:
    """Whether weights hold all tensors of a group at the width it was built with.

    Args:
        group: The group.
        state: The weights.
        unsaved: Names of buffers that no state dict holds.
    """
    saved = (s for s in group.tensors if s.tensor not in unsaved)
    tensors = ((state.get(s.tensor), s.dim, s.shape) for s in saved)
    return all(
        isinstance(t, Tensor) and t.ndim == len(shape) and t.shape[dim] == shape[dim]
        for t, dim, shape in tensors
    )


def is_uncut(
    graph: PruningGraph,
    current: PruningPlan,
    state: Mapping[str, Any],
    unsaved: Collection[str] = (),
) -> bool:
    """Whether weights without a plan hold, as built, all that was cut from the module.

    Args:
        graph: Groups and stacks of the module.
        current: Its present plan.
        state: Weights to load, named from the module.
        unsaved: Names of buffers that no state dict holds.
    """
    cut = {name for name, size in current.sizes.items() if current.width(name) < size}
    tops = [f"{s.name}.{s.size - 1}." for s in graph.stacks if s.name in cut]
    return (
        bool(cut)
        and all(any(key.startswith(top) for key in state) for top in tops)
        and all(
            is_group_uncut(group, state, unsaved) for group in graph.groups if group.name in cut
        )
    )


def changed_groups(
    graph: PruningGraph, plan: PruningPlan, current: PruningPlan
) -> list[DependencyGroup]:
    """Groups whose kept units, or whose layers, differ between a plan and the present one."""
    moved = tuple(f"{s.name}." for s in graph.stacks if plan.kept[s.name] != current.kept[s.name])
    return [
        group
        for group in graph.groups_at(plan)
        if plan.kept[group.name] != current.kept[group.name] or group.name.startswith(moved)
    ]


def check_weights(
    module: nn.Module,
    graph: PruningGraph,
    plan: PruningPlan,
    current: PruningPlan,
    state: Mapping[str, Any],
) -> None:
    """Refuse weights that lack a tensor which a plan cuts, or have it in another shape.

    torch checks all other tensors.

    Args:
        module: The module in its present shape.
        graph: Its groups and stacks, as built.
        plan: Plan of the weights.
        current: Present plan of the module.
        state: The weights, named from the module.

    Raises:
        PruningError: Naming the tensor, before anything is changed.
    """
    for stack in graph.stacks:
        stem, layers = f"{stack.name}.", plan.width(stack.name)
        found = {key[len(stem) :].partition(".")[0] for key in state if key.startswith(stem)}
        if found and found != set(map(str, range(layers))):
            raise PruningError(
                f"The plan of the checkpoint leaves {counted(layers, 'layer')} of {stack.name!r}, "
                f"but it holds weights of layers {sorted(found)}; expected 0 to {layers - 1}. "
                "Build the model with the configuration it was trained with."
            )
    present = tensors_of(module)
    stored = {id(p) for name, p in present.items() if name in state}
    unsaved = unsaved_buffers(module)
    moved = any(plan.kept[s.name] != current.kept[s.name] for s in graph.stacks)
    lengths: dict[str, dict[int, int]] = {}
    for group in changed_groups(graph, plan, current):
        at = group.all_widths(plan.widths)
        for s in (s for s in group.tensors if s.tensor not in unsaved):
            lengths.setdefault(s.tensor, {})[s.dim] = layout_size(s.layout, at)
    built = {s.tensor: s.shape for a in graph.groups_at(plan) for s in a.tensors}
    for name, expected in lengths.items():
        tensor, whole = state.get(name), present[name].shape if name in present else built[name]
        if isinstance(tensor, Tensor):
            fits = tensor.ndim == len(built[name])
            if not fits or any(tensor.shape[dim] != n for dim, n in expected.items()):
                shape = tuple(expected.get(dim, length) for dim, length in enumerate(whole))
                raise PruningError(
                    f"{name!r} has shape {tuple(tensor.shape)} in the checkpoint; expected {shape} "
                    "from its plan and this model. Build the model with the configuration it was "
                    "trained with."
                )
        elif 0 not in expected.values() and (moved or id(present.get(name)) not in stored):
            raise PruningError(
                f"The checkpoint has a plan that cuts {name!r}, but not this tensor; expected all "
                "weights of pruned layers. Save the whole state dict."
            )


def load_errors(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> str:
    """Why torch would refuse weights for a module in its present shape; "" if it would not.

    Modules that load in their own way, by hooks or by overriding torch's methods, are left out.

    Args:
        module: The module.
        state: The weights, named from the module.
        strict: Whether keys must match too.
    """
    wanted: dict[str, Tensor] = {}
    lenient: list[str] = []
    for path, part in module.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        if _has_own_loading(part):
            lenient.append(dot)
        wanted |= {dot + n: p for n, p in part._parameters.items() if p is not None}
        wanted |= {
            dot + name: buffer
            for name, buffer in part._buffers.items()
            if buffer is not None and name not in part._non_persistent_buffers_set
        }

    def plain(name: str) -> bool:
        return not name.startswith(tuple(lenient))

    missing = [name for name in wanted if strict and name not in state and plain(name)]
    unexpected = [name for name in state if strict and name not in wanted and plain(name)]
    others = [
        f"{name} {tuple(value.shape)} for {tuple(wanted[name].shape)}"
        for name, value in state.items()
        if isinstance(value, Tensor)
        and name in wanted
        and plain(name)
        and not nn.parameter.is_lazy(wanted[name])
        and value.shape != wanted[name].shape
        and (value.shape, wanted[name].ndim) != ((1,), 0)  # of the oldest checkpoints
    ]
    found = {"Missing key(s)": missing, "Unexpected key(s)": unexpected, "Other shapes": others}
    return " ".join(
        f"{what}: {', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''}."
        for what, names in found.items()
        if names
    )


def _has_own_loading(part: nn.Module) -> bool:
    kind = type(part)
    hooks = part._load_state_dict_pre_hooks.values()
    own = f"{__name__.rpartition('.')[0]}.state_dict"  # PlanTracker's
    foreign = [hook for hook in hooks if _origin(hook) != own]
    return (
        kind._load_from_state_dict is not nn.Module._load_from_state_dict
        or kind.get_extra_state is not nn.Module.get_extra_state
        or bool(foreign)
    )


def _origin(hook: Any) -> str | None:
    """The module in which a hook is defined."""
    inner = getattr(hook, "hook", hook)  # torch wraps hooks that take the module
    return getattr(getattr(inner, "func", inner), "__module__", None)


def _read(stored: Any) -> tuple[PruningPlan, PruningGraph | None]:
    plain = isinstance(stored, Tensor) and is_plain_tensor(stored) and not stored.is_meta
    if not plain or stored.dtype != torch.uint8 or stored.ndim != 1:
        raise PruningError(
            f"The entry {_NAME!r} of the checkpoint is not a plan but {described(stored)}; "
            "take another checkpoint."
        )
    if stored.numel() > _LARGEST_ENTRY:
        raise PruningError(
            f"The entry {_NAME!r} of {counted(stored.numel(), 'byte')} is too large, not a plan; "
            "take another checkpoint."
        )
    try:
        text = stored.detach().cpu().numpy().tobytes().decode()
    except UnicodeDecodeError as error:
        raise PruningError(
            f"The entry {_NAME!r} of the checkpoint is damaged; take another checkpoint."
        ) from error
    plan, given = PruningPlan.from_json(text), json.loads(text).get(_GRAPH)
    return plan, None if given is None else PruningGraph.from_json(given)
