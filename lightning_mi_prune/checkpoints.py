"""KEEP     the plan travels in the state dict and is replayed before weights load."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_mi_prune.anatomy import Anatomy
from lightning_mi_prune.arrivals import (
    PLAN_KEY,
    arrives_uncut,
    check_weights,
    is_uncut,
    stored_plan,
)
from lightning_mi_prune.axes import WidthAxis, as_built, full_plan
from lightning_mi_prune.depth import DepthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import find_axes, present_plan
from lightning_mi_prune.families.stacks import find_stacks, stack_at
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.surgery import Spare, hollow, remodel

__all__ = ["PLAN_KEY", "PlanKeeper"]

_ATTRIBUTE = "_lightning_mi_prune_keeper"

Find = Callable[[nn.Module], Sequence[WidthAxis | DepthAxis]]


class PlanKeeper:
    """Writes the plan of a module into its state dict, and replays it before weights load.

    The plan is one uint8 tensor of JSON under one reserved key, so it survives
    ``save_weights_only=True`` and loads with ``weights_only=True``.

    Args:
        module: Root of the state dict (the LightningModule).
        find: Finds the axes of the module; called when they are first needed.

    Example:
        >>> from lightning_mi_prune.families import linear_axis
        >>> from lightning_mi_prune.surgery import reshape
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
        self._anatomy = Anatomy()
        self._plan: Plan | None = None
        self._spare: dict[str, dict[int, nn.Module]] = {}
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
        elif find not in keeper._finders:
            keeper._finders.append(find)
        for path, part in module.named_modules():
            inner = cls.held_by(part)
            if inner is not None and inner is not keeper:
                keeper._inherit(path, inner)
        return keeper

    @staticmethod
    def held_by(module: nn.Module) -> PlanKeeper | None:
        """The keeper of a module, or None."""
        keeper = module.__dict__.get(_ATTRIBUTE)
        return keeper if isinstance(keeper, PlanKeeper) else None

    @property
    def anatomy(self) -> Anatomy:
        """All that the module can lose, as built."""
        while self._finders:
            self._learn(self._finders[0](self.module))
            self._finders.pop(0)
        return self._anatomy

    @property
    def plan(self) -> Plan:
        """The plan the module carries now."""
        anatomy = self.anatomy
        if self._plan is None:
            self._plan = anatomy.full.joined(present_plan(self.module, anatomy.axes))
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = plan

    @property
    def axes(self) -> list[WidthAxis]:
        """Axes of the layers that are there, at the paths they have now."""
        anatomy = self.anatomy
        return anatomy.standing(self.plan) if anatomy.stacks else list(anatomy.axes)

    @property
    def spare(self) -> Spare:
        """Layers that are gone, without their memory."""
        return self._spare

    def store(self, removed: Spare) -> None:
        """Keep layers that left, without their memory, to have them where one must come back."""
        for name, layers in removed.items():
            mine = self._spare.setdefault(name, {})
            mine |= {place: hollow(layer) for place, layer in layers.items()}

    def close(self) -> None:
        """Take both hooks down; the module is an ordinary module again."""
        for handle in self._handles:
            handle.remove()
        self.module.__dict__.pop(_ATTRIBUTE, None)

    def _learn(self, parts: Sequence[WidthAxis | DepthAxis]) -> None:
        """Take in parts that were found on the module as it stands."""
        axes = [part for part in parts if isinstance(part, WidthAxis)]
        stacks = tuple(part for part in parts if isinstance(part, DepthAxis))
        sizes = {} if self._plan is None else self._plan.sizes
        axes = as_built(axes, {axis.here: sizes[axis.name] for axis in self._standing()})
        present = present_plan(self.module, axes)
        built = axes
        if self._plan is not None:
            built = self._anatomy.restated(axes, self._plan)
            names = {new.name: old.name for new, old in zip(built, axes, strict=True)}
            now = Plan(
                {name: present.sizes[old] for name, old in names.items()},
                {name: present.kept[old] for name, old in names.items()},
            )
            self._plan = now.joined(Anatomy(stacks=stacks).full).joined(self._plan)
        self._anatomy = self._anatomy.joined(Anatomy(tuple(built), stacks))

    def _standing(self) -> list[WidthAxis]:
        return [] if self._plan is None else self._anatomy.standing(self._plan)

    def _inherit(self, path: str, inner: PlanKeeper) -> None:
        """Take over from the keeper of a part."""
        plan = inner.plan.prefixed(path)
        own = Plan({}, {}) if self._plan is None else self._plan
        self._plan = own.joined(plan)
        self._anatomy = inner.anatomy.prefixed(path).joined(self._anatomy)
        self._spare |= {f"{path}.{name}": dict(s) for name, s in inner.spare.items()}
        inner.close()
        _ = self.plan  # now, while the shapes are those of the inherited plan

    def _write(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if self._plan is not None and not self._plan.is_full:
            text = self._plan.to_json().encode()
            state[prefix + PLAN_KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _replay(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, **__: Any
    ) -> None:
        stored = stored_plan(state, prefix)
        if stored is not None:
            anatomy = self._anatomy_for(stored)
            plan, current = self._completed(stored, anatomy, state, prefix)
            check_weights(module, anatomy, plan, current, state, prefix)
        elif self._plan is not None and is_uncut(self.anatomy, state, prefix):
            anatomy, current = self.anatomy, self.plan
            plan = anatomy.full
        else:
            return  # weights for the present shape, or a part without the cut tensors
        self.store(remodel(module, anatomy, plan, current=current, spare=self._spare))
        self._anatomy, self._plan = anatomy, plan

    def _anatomy_for(self, stored: Plan) -> Anatomy:
        """What is known, and what is found in the whole module if the plan names more."""
        unknown: PruningError | None = None
        try:
            anatomy = self.anatomy
        except PruningError as error:  # a model of no known family may still have lost layers
            anatomy, unknown = self._anatomy, error
        for find in (find_axes, find_stacks):
            names = {part.name for part in anatomy.parts}
            if not set(stored.sizes) <= names:
                with contextlib.suppress(PruningError):  # no family knows it: said below
                    found: Sequence[WidthAxis | DepthAxis] = find(self.module)
                    anatomy = anatomy.joined(Anatomy.of(found))
        sizes = {part.name: part.size for part in anatomy.parts}
        for name in sorted(set(stored.sizes) - set(sizes)):
            stack = stack_at(self.module, name)
            if stack is not None:
                anatomy, sizes[name] = anatomy.joined(Anatomy.of([stack])), stack.size
        if unknown is not None and not set(stored.sizes) <= set(sizes):
            raise unknown
        self._finders.clear()
        for name, size in stored.sizes.items():
            if sizes.get(name) != size:
                here = f"has {sizes[name]}" if name in sizes else "is missing"
                raise PruningError(
                    f"The stored plan was made for another model: axis {name!r} of size {size} "
                    f"{here} here. Build the model with the configuration it was trained with."
                )
        return anatomy

    def _completed(
        self, stored: Plan, anatomy: Anatomy, state: Mapping[str, Any], prefix: str
    ) -> tuple[Plan, Plan]:
        """The stored plan over all axes, and the present one.

        An axis that the stored one does not name is as built, or stays as it is.
        """
        now = anatomy.full.joined(present_plan(self.module, anatomy.axes))
        if self._plan is not None:
            now = now.joined(self._plan)
        grown = [axis for axis in anatomy.axes if arrives_uncut(axis, state, prefix)]
        return now.joined(full_plan(grown)).joined(stored), now
