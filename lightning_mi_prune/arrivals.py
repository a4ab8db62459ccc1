"""ARRIVE   what a state dict holds: its plan, and whether its weights fit it; nothing changes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.anatomy import Anatomy
from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.incisions import shapes_at
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.states import is_plain_tensor
from lightning_mi_prune.untrusted import described

__all__ = [
    "PLAN_KEY",
    "arrives_uncut",
    "check_weights",
    "is_plan",
    "is_uncut",
    "stored_plan",
]

_NAME = "lightning_mi_prune.plan"
# A model without a keeper can only show the key, so the key says what to do.
PLAN_KEY = (
    f"{_NAME} (this checkpoint is pruned: open it with lightning_mi_prune.load_pruned, "
    "or with its callback in the Trainer)"
)
_LARGEST_ENTRY = 64 * 2**20


def is_plan(key: str) -> bool:
    """Whether an entry of a state dict is a plan; savers may have changed the prose of its key."""
    return _NAME in key


def stored_plan(state: dict[str, Any], prefix: str) -> Plan | None:
    """The plan in a state dict, its own and those that keepers of parts wrote; taken out of it."""
    found: dict[str, Plan] = {}
    # Found by its first words: the rest of the key is prose, and may be put better one day.
    for key in [key for key in state if key.startswith(prefix) and _NAME in key]:
        path = key[len(prefix) : key.index(_NAME, len(prefix))].removesuffix(".")
        found[path] = _read(state[key]).prefixed(path)
    for key in [key for key in state if key.startswith(prefix) and _NAME in key]:
        state.pop(key)
    plans = [found[path] for path in sorted(found, reverse=True)]  # its own, "", comes last
    return reduce(Plan.joined, plans) if plans else None


def arrives_uncut(axis: WidthAxis, state: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state dict holds all tensors of an axis at the width it was built with."""
    tensors = ((state.get(prefix + s.tensor), s.dim, s.shape) for s in axis.slices)
    return all(
        isinstance(t, Tensor) and t.ndim == len(shape) and t.shape[dim] == shape[dim]
        for t, dim, shape in tensors
    )


def is_uncut(anatomy: Anatomy, state: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state dict without a plan holds all layers, and every tensor as it was built."""
    tops = [f"{prefix}{stack.name}.{stack.size - 1}." for stack in anatomy.stacks]
    tensors = ((state.get(prefix + s.tensor), s.shape) for a in anatomy.axes for s in a.slices)
    return all(any(key.startswith(top) for key in state) for top in tops) and all(
        isinstance(t, Tensor) and tuple(t.shape) == shape for t, shape in tensors
    )


def check_weights(
    module: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    current: Plan,
    state: Mapping[str, Any],
    prefix: str,
) -> None:
    """Refuse weights that torch would refuse when the module has its new shape already.

    Args:
        module: The module as it stands.
        anatomy: What it can lose, as built.
        plan: Plan that arrives.
        current: Plan the module carries.
        state: What arrives.
        prefix: Before the names there.
    """
    for stack in anatomy.stacks:
        stem, layers = f"{prefix}{stack.name}.", plan.width(stack.name)
        found = {key[len(stem) :].partition(".")[0] for key in state if key.startswith(stem)}
        if found and found != set(map(str, range(layers))):
            raise PruningError(
                f"The plan of the checkpoint leaves {layers} layers of {stack.name!r}, but it "
                f"holds weights of layers {sorted(found)}; expected 0 to {layers - 1}."
            )
    shapes = shapes_at(anatomy.standing(plan), plan)
    present = dict(module.named_parameters(remove_duplicate=False))
    arriving = {id(p) for name, p in present.items() if prefix + name in state}
    moved = any(plan.kept[s.name] != current.kept[s.name] for s in anatomy.stacks)
    for name, shape in shapes.items():
        tensor = state.get(prefix + name)
        if isinstance(tensor, Tensor) and list(tensor.shape) != shape:
            raise PruningError(
                f"{name!r} has shape {tuple(tensor.shape)} in the checkpoint; expected "
                f"{tuple(shape)} from its plan and this model. Build the model with the "
                "configuration it was trained with."
            )
        old = present.get(name)
        absent = tensor is None if moved else old is not None and id(old) not in arriving
        if absent and (moved or (old is not None and list(old.shape) != shape)):
            raise PruningError(
                f"The checkpoint has a plan that cuts {name!r}, but not this tensor; expected all "
                "weights of pruned layers. Save the whole state dict."
            )


def _read(stored: Any) -> Plan:
    whole = isinstance(stored, Tensor) and is_plain_tensor(stored) and not stored.is_meta
    if not whole or stored.dtype != torch.uint8 or stored.ndim != 1:
        raise PruningError(
            f"The entry {_NAME!r} of the checkpoint is not a plan but {described(stored)}; is it "
            "damaged?"
        )
    if stored.numel() > _LARGEST_ENTRY:
        raise PruningError(f"The entry {_NAME!r} holds {stored.numel()} bytes: not a plan.")
    try:
        text = stored.detach().cpu().numpy().tobytes().decode()
    except UnicodeDecodeError as error:
        raise PruningError(f"The entry {_NAME!r} of the checkpoint is damaged.") from error
    return Plan.from_json(text)
