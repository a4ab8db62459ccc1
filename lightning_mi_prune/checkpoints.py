"""KEEP     the plan travels in the state dict and is replayed before weights load."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_mi_prune.anatomy import Anatomy
from lightning_mi_prune.arrivals import (
    PLAN_KEY,
    arrives_uncut,
    changed_axes,
    check_weights,
    is_uncut,
    misfits,
    named_from,
    stored_plan,
)
from lightning_mi_prune.axes import WidthAxis, as_built, full_plan
from lightning_mi_prune.depth import DepthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import find_axes, is_within, present_plan
from lightning_mi_prune.families.residual import module_at
from lightning_mi_prune.families.stacks import find_stacks, stack_at
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.surgery import Spare, cancel, hollow, remodel

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
        >>> _ = reshape(net, keeper.axes, Plan({"hidden": 4}, {"hidden": (1, 2)}))
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
        self._all_finders: list[Find] = [find]
        self._anatomy = Anatomy()
        self._plan: Plan | None = None
        self._spare: dict[str, dict[int, nn.Module]] = {}
        self._below: dict[str, PlanKeeper] = {}
        self._shared: dict[str, Plan | None] = {}
        self._inside = ""
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

        It takes in what keepers of parts of the module know, and forgets networks that were
        replaced by others: what they can lose is found anew.
        """
        keeper = cls.held_by(module)
        if keeper is None:
            keeper = cls(module, find)
        elif find not in keeper._all_finders:
            keeper._finders.append(find)
            keeper._all_finders.append(find)
        keeper._forget_replaced()
        for path, part in module.named_modules():
            inner = cls.held_by(part)
            if inner is not None and inner is not keeper and path not in keeper._below:
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
            self._share()
        return self._anatomy

    @property
    def plan(self) -> Plan:
        """The plan the module carries now."""
        anatomy = self.anatomy
        if self._plan is None:
            self._plan = anatomy.full.joined(present_plan(self.module, anatomy.axes))
            self._share()
        for path, inner in self._below.items():  # weights may have been loaded into a part
            if inner._plan is not None and inner._plan is not self._shared.get(path):
                self._plan = self._plan.joined(inner._plan.prefixed(path))
                self._shared[path] = inner._plan
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = plan
        self._share()

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
        self._share()

    def close(self) -> None:
        """Take the hooks of this keeper and of those it made down; the module is ordinary again."""
        for handle in self._handles:
            handle.remove()
        self.module.__dict__.pop(_ATTRIBUTE, None)
        for inner in self._below.values():
            if PlanKeeper.held_by(inner.module) is inner:
                inner.close()

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
        """Take in what the keeper of a part knows; it stays, and both are kept alike."""
        plan = inner.plan.prefixed(path)
        own = Plan({}, {}) if self._plan is None else self._plan
        self._plan = own.joined(plan)
        self._anatomy = inner.anatomy.prefixed(path).joined(self._anatomy)
        self._spare |= {f"{path}.{name}": s for name, s in inner._spare.items()}
        self._below[path], self._shared[path] = inner, inner._plan
        _ = self.plan  # now, while the shapes are those of the inherited plan

    def _share(self) -> None:
        """Let keepers of all networks, and of encoders in them, know what this one knows.

        So a network that is taken out of its module, saved or copied by itself, knows its plan.
        """
        parts = self._anatomy.parts
        # A stack that is called itself has its plan in what holds it: from inside it has no name.
        nameless = {"", *(part.name for part in parts)}
        networks = {part.network for part in parts} - nameless
        for path in sorted((networks | {part.scope for part in parts}) - nameless):
            module = module_at(self.module, path)
            if module is None:
                continue
            inner = PlanKeeper.held_by(module)
            if inner is None:
                inner = PlanKeeper(module)
                if path not in networks:
                    outer = max((n for n in networks if is_within(path, n)), key=len, default="")
                    inner._inside = type(self.module.get_submodule(outer)).__name__
            self._below[path] = inner
            inner._finders.clear()
            inner._anatomy = self._anatomy.under(path)
            dot = f"{path}."
            inner._spare = {n[len(dot) :]: s for n, s in self._spare.items() if n.startswith(dot)}
            if self._plan is not None:
                inner._plan = self._shared[path] = self._plan.under(path)
        for path, inner in self._below.items():
            deeper = {p: k for p, k in self._below.items() if p.startswith(f"{path}.")}
            inner._below = {p[len(path) + 1 :]: keeper for p, keeper in deeper.items()}
            inner._shared = {p: keeper._plan for p, keeper in inner._below.items()}

    def _forget_replaced(self) -> None:
        """Forget networks in whose place others stand now."""
        for path, inner in list(self._below.items()):
            module = module_at(self.module, path)
            if module is not None and PlanKeeper.held_by(module) is inner:
                continue
            del self._below[path]
            self._shared.pop(path, None)
            top = next((p for p in self._below if is_within(path, p)), path)

            def stays(name: str, top: str = top) -> bool:
                return not is_within(name, top)

            self._anatomy = Anatomy.of(p for p in self._anatomy.parts if stays(p.name))
            self._spare = {name: s for name, s in self._spare.items() if stays(name)}
            if self._plan is not None:
                self._plan = self._plan.only(filter(stays, self._plan.sizes))
            self._finders = list(self._all_finders)

    def _write(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if self._plan is None:
            return
        mine = self._plan.only(
            n for n in self._plan.sizes if not any(is_within(n, path) for path in self._below)
        )
        if not mine.is_full:
            text = mine.to_json().encode()
            state[prefix + PLAN_KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _replay(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, **__: Any
    ) -> None:
        stored = stored_plan(state, prefix)
        if stored is None and self._plan is None:
            return
        arriving = named_from("", state, prefix)
        if stored is not None:
            anatomy = self._anatomy_for(stored)
            plan, current = self._completed(stored, anatomy, arriving)
            check_weights(module, anatomy, plan, current, arriving)
        elif is_uncut(self.anatomy, self.plan, arriving):
            anatomy, current = self.anatomy, self.plan
            plan = anatomy.full
        else:
            return  # weights for the present shape, or a part without the cut tensors
        if _told(plan) != _told(current):
            self._remodel(anatomy, plan, current, arriving)
        self._anatomy, self._plan = anatomy, plan
        self._share()

    def _remodel(
        self, anatomy: Anatomy, plan: Plan, current: Plan, arriving: Mapping[str, Any]
    ) -> None:
        """Give the module the shape of a plan, unless torch would refuse the weights then."""
        if self._inside:
            raise PruningError(
                f"The weights have another plan than this {type(self.module).__name__}, which is "
                f"part of a {self._inside} that would not follow. Load the weights of the whole."
            )
        changed = changed_axes(anatomy, plan, current)
        done = remodel(self.module, anatomy, plan, current=current, spare=self._spare, only=changed)
        why = misfits(self.module, arriving, strict=_is_strict())
        if why:
            self.store(cancel(self.module, anatomy, done))
            raise PruningError(
                f"The weights do not fit this {type(self.module).__name__}, which stays as it was. "
                f"{why} Build the model with the configuration it was trained with."
            )
        self.store(done.removed)

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
        self, stored: Plan, anatomy: Anatomy, state: Mapping[str, Any]
    ) -> tuple[Plan, Plan]:
        """The stored plan over all axes, and the present one.

        An axis that the stored one does not name is as built, or stays as it is.
        """
        now = anatomy.full.joined(present_plan(self.module, anatomy.axes))
        if self._plan is not None:
            now = now.joined(self.plan)
        grown = [axis for axis in anatomy.axes if arrives_uncut(axis, state)]
        return now.joined(full_plan(grown)).joined(stored), now


def _is_strict() -> bool:
    """Whether the ``load_state_dict`` under way is strict, which torch does not tell its hooks."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals.get("strict"))


def _told(plan: Plan) -> dict[str, tuple[int, ...]]:
    """What a plan removes."""
    return {name: kept for name, kept in plan.kept.items() if len(kept) < plan.sizes[name]}
