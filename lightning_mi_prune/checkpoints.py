"""KEEP     the plan travels in the state dict and is replayed before weights load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis, as_built, full_plan
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import find_axes, present_plan
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.surgery import reshape

__all__ = ["PLAN_KEY", "PlanKeeper"]

_NAME = "lightning_mi_prune.plan"
# A model without a keeper can only show the key, so the key says what to do.
PLAN_KEY = (
    f"{_NAME} (this checkpoint is pruned: open it with lightning_mi_prune.load_pruned, "
    "or with its callback in the Trainer)"
)
_ATTRIBUTE = "_lightning_mi_prune_keeper"
_LARGEST_ENTRY = 64 * 2**20

Find = Callable[[nn.Module], Sequence[WidthAxis]]


class PlanKeeper:
    """Writes the plan of a module into its state dict, and replays it before weights load.

    The plan is one uint8 tensor of JSON under one reserved key, so it survives
    ``save_weights_only=True`` and loads with ``weights_only=True``.

    Args:
        module: Root of the state dict (the LightningModule).
        find: Finds the axes of the module; called when they are first needed.

    Example:
        >>> from lightning_mi_prune.families import linear_axis
        >>> def build():
        ...     net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        ...     axis = linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])
        ...     return net, PlanKeeper(net, lambda module: [axis])
        >>> net, keeper = build()
        >>> reshape(net, keeper.axes, Plan({"hidden": 4}, {"hidden": (1, 2)}))
        >>> keeper.plan = Plan({"hidden": 4}, {"hidden": (1, 2)})
        >>> fresh, _ = build()
        >>> fresh.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> fresh[0].out_features
        2
    """

    def __init__(self, module: nn.Module, find: Find = find_axes) -> None:
        self.module = module
        self._finders: list[Find] = [find]
        self._axes: dict[str, WidthAxis] = {}
        self._plan: Plan | None = None
        self._inherited = Plan({}, {})
        # torch marks these hooks with an attribute, which bound methods do not take.
        self._handles = [
            module.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
                partial(PlanKeeper._write, self)
            ),
            module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                partial(PlanKeeper._replay, self)
            ),
        ]
        module.__dict__[_ATTRIBUTE] = self

    @classmethod
    def of(cls, module: nn.Module, find: Find = find_axes) -> PlanKeeper:
        """The one keeper of a module, made if there is none; it stays with copies of the module.

        Keepers of parts of the module hand over what they know: two would soon disagree.
        """
        keeper = cls.held_by(module)
        if keeper is None:
            keeper = cls(module, find)
        else:
            keeper._finders.append(find)
        for path, part in module.named_modules():
            inner = cls.held_by(part)
            if inner is not None and inner is not keeper:
                keeper._inherited = _merged(keeper._inherited, inner.plan.prefixed(path))
                inner.close()
        if keeper._inherited.sizes:
            keeper._plan = keeper.plan  # now, while the shapes are those of the inherited plan
        return keeper

    @staticmethod
    def held_by(module: nn.Module) -> PlanKeeper | None:
        """The keeper of a module, or None."""
        keeper = module.__dict__.get(_ATTRIBUTE)
        return keeper if isinstance(keeper, PlanKeeper) else None

    @property
    def axes(self) -> list[WidthAxis]:
        """All axes of the module, as built."""
        while self._finders:
            found = as_built(self._finders[0](self.module), self._inherited.sizes)
            new = [axis for axis in found if axis.name not in self._axes]
            if self._plan is not None and new:
                self._plan = _merged(self._plan, self._present(new))
            self._axes |= {axis.name: axis for axis in new}
            self._finders.pop(0)
        return list(self._axes.values())

    @property
    def plan(self) -> Plan:
        """The plan the module carries now."""
        axes = self.axes
        if self._plan is None:
            self._plan = self._present(axes)
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = plan

    def _present(self, axes: Sequence[WidthAxis]) -> Plan:
        known = {axis.name for axis in axes} & set(self._inherited.sizes)
        sizes, kept = self._inherited.sizes, self._inherited.kept
        other = [axis for axis in axes if axis.name not in known]
        inherited = Plan({n: sizes[n] for n in known}, {n: kept[n] for n in known})
        return _merged(present_plan(self.module, other), inherited)

    def close(self) -> None:
        """Take both hooks down; the module is an ordinary module again."""
        for handle in self._handles:
            handle.remove()
        self.module.__dict__.pop(_ATTRIBUTE, None)

    def _write(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if self._plan is not None and not self._plan.is_full:
            text = self._plan.to_json().encode()
            state[prefix + PLAN_KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _replay(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, **__: Any
    ) -> None:
        stored = _stored(state, prefix)
        axes = None
        if stored is not None:
            axes = self._axes_for(stored)
            plan = self._completed(stored, axes, state, prefix)
            _check_weights(module, axes, plan, state, prefix)
        elif self._plan is not None and self._is_uncut(state, prefix):
            axes = self.axes
            plan = full_plan(axes)
        if axes is None:
            return  # weights for the present shape, or a part without the cut tensors
        reshape(module, axes, plan)
        self._axes, self._plan = {axis.name: axis for axis in axes}, plan

    def _axes_for(self, stored: Plan) -> list[WidthAxis]:
        """The known axes, and those of the whole module if the plan names more."""
        known = {axis.name: axis for axis in self.axes}
        if not set(stored.sizes) <= set(known):
            with contextlib.suppress(PruningError):  # no family knows it: said below
                known = {axis.name: axis for axis in find_axes(self.module)} | known
        for name, size in stored.sizes.items():
            if name not in known or known[name].size != size:
                here = f"has {known[name].size}" if name in known else "is missing"
                raise PruningError(
                    f"The stored plan was made for another model: axis {name!r} of size {size} "
                    f"{here} here. Build the model with the configuration it was trained with."
                )
        return list(known.values())

    def _completed(
        self, stored: Plan, axes: Sequence[WidthAxis], state: Mapping[str, Any], prefix: str
    ) -> Plan:
        """The stored plan over all axes; one it does not name is as built, or stays as it is."""
        now = present_plan(self.module, axes)
        if self._plan is not None:
            now = _merged(now, self._plan)
        grown = [axis for axis in axes if _arrives_uncut(axis, state, prefix)]
        return _merged(_merged(now, full_plan(grown)), stored)

    def _is_uncut(self, state: Mapping[str, Any], prefix: str) -> bool:
        """Whether a state dict without a plan holds every cut tensor in the shape it was built."""
        slices = [s for axis in self.axes for s in axis.slices]
        tensors = ((state.get(prefix + s.tensor), s.shape) for s in slices)
        return all(isinstance(t, Tensor) and tuple(t.shape) == shape for t, shape in tensors)


def _stored(state: dict[str, Any], prefix: str) -> Plan | None:
    """The plan in a state dict, its own and those that keepers of parts wrote; taken out of it."""
    found: dict[str, Plan] = {}
    # Found by its first words: the rest of the key is prose, and may be put better one day.
    for key in [key for key in state if key.startswith(prefix) and _NAME in key]:
        path = key[len(prefix) : key.index(_NAME, len(prefix))].removesuffix(".")
        found[path] = _read(state[key]).prefixed(path)
    for key in [key for key in state if key.startswith(prefix) and _NAME in key]:
        state.pop(key)
    plans = [found[path] for path in sorted(found, reverse=True)]  # its own, "", comes last
    return reduce(_merged, plans) if plans else None


def _merged(first: Plan, second: Plan) -> Plan:
    """Both plans in one; where both name an axis, the second holds."""
    rankings = {n: r for n, r in first.rankings.items() if n not in second.sizes}
    return Plan(
        {**first.sizes, **second.sizes},
        {**first.kept, **second.kept},
        {**rankings, **second.rankings},
    )


def _arrives_uncut(axis: WidthAxis, state: Mapping[str, Any], prefix: str) -> bool:
    """Whether a state dict holds all tensors of an axis at the width it was built with."""
    tensors = ((state.get(prefix + s.tensor), s.dim, s.shape) for s in axis.slices)
    return all(
        isinstance(t, Tensor) and t.ndim == len(shape) and t.shape[dim] == shape[dim]
        for t, dim, shape in tensors
    )


def _check_weights(
    module: nn.Module, axes: Sequence[WidthAxis], plan: Plan, state: Mapping[str, Any], prefix: str
) -> None:
    """Refuse weights that torch would refuse when the module has its new shape already."""
    shapes: dict[str, list[int]] = {}
    for axis in axes:
        for s in axis.slices:
            shape = shapes.setdefault(s.tensor, list(s.shape))
            shape[s.dim] = plan.width(axis.name) * axis.entries
    present = dict(module.named_parameters(remove_duplicate=False))
    arriving = {id(p) for name, p in present.items() if prefix + name in state}
    for name, shape in shapes.items():
        tensor = state.get(prefix + name)
        if isinstance(tensor, Tensor) and list(tensor.shape) != shape:
            raise PruningError(
                f"{name!r} has shape {tuple(tensor.shape)} in the checkpoint; expected "
                f"{tuple(shape)} from its plan and this model. Build the model with the "
                "configuration it was trained with."
            )
        old = present.get(name)
        if old is not None and id(old) not in arriving and list(old.shape) != shape:
            raise PruningError(
                f"The checkpoint has a plan that cuts {name!r}, but not this tensor; expected all "
                "weights of pruned layers. Save the whole state dict."
            )


def _read(stored: Any) -> Plan:
    if not isinstance(stored, Tensor) or stored.dtype != torch.uint8 or stored.ndim != 1:
        raise PruningError(f"The entry {_NAME!r} of the checkpoint is not a plan; is it damaged?")
    if stored.numel() > _LARGEST_ENTRY:
        raise PruningError(f"The entry {_NAME!r} holds {stored.numel()} bytes: not a plan.")
    try:
        text = bytes(stored.cpu().tolist()).decode()
    except UnicodeDecodeError as error:
        raise PruningError(f"The entry {_NAME!r} of the checkpoint is damaged.") from error
    return Plan.from_json(text)
