"""The plan travels in the state dict and is applied before weights load."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_networks
from lightning_mi_prune.checkpoint.stored_graph import check_networks, check_stored, is_apart
from lightning_mi_prune.checkpoint.validation import (
    PLAN_KEY,
    changed_groups,
    check_weights,
    is_group_uncut,
    is_uncut,
    load_errors,
    named_from,
    plan_in_state,
    write_plan,
)
from lightning_mi_prune.core.empty_linear import module_at
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.containers import stack_at
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    PrunableDim,
    Refusal,
    full_plan,
    is_within,
)
from lightning_mi_prune.surgery.layers import RemovedLayers, without_storage
from lightning_mi_prune.surgery.tensors import unsaved_buffers
from lightning_mi_prune.surgery.transaction import cancel_cut, reshape_model

__all__ = ["PlanTracker"]

_ATTRIBUTE = "_lightning_mi_prune_tracker"


class PlanTracker:
    """Writes the plan of a module into its state dict, and applies it before weights load.

    The plan is one uint8 tensor of JSON under one reserved key, so it survives
    ``save_weights_only=True`` and loads with ``weights_only=True``.

    Args:
        module: Root of the state dict (the LightningModule).
        graph: What the module can lose, as built, where that is known.

    Example:
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> from lightning_mi_prune.surgery.units import apply_plan
        >>> def build():
        ...     net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        ...     group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        ...     return net, PlanTracker(net, PruningGraph((group,)))
        >>> net, tracker = build()
        >>> plan = PruningPlan({"hidden": 4}, {"hidden": (1, 2)})
        >>> rewrites = apply_plan(net, tracker.groups, plan)
        >>> tracker.plan = plan
        >>> fresh, _ = build()
        >>> fresh.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> fresh[0].out_features
        2
    """

    def __init__(self, module: nn.Module, graph: PruningGraph | None = None) -> None:
        self.module = module
        self._graph = graph or PruningGraph()
        self._is_whole = graph is not None
        self._plan: PruningPlan | None = None
        self._removed: dict[str, dict[int, nn.Module]] = {}
        self._below: dict[str, PlanTracker] = {}
        self._shared: dict[str, PruningPlan | None] = {}
        self._inside = ""
        # torch marks these hooks with an attribute, which bound methods do not take.
        self._handles = [
            module.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
                partial(PlanTracker._write, self)
            ),
            module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                partial(PlanTracker._apply, self)
            ),
        ]
        module.__dict__[_ATTRIBUTE] = self

    @classmethod
    def of(cls, module: nn.Module) -> PlanTracker:
        """The one tracker of a module, made if there is none; copies of the module have a copy.

        It merges the graphs and plans of trackers on parts of the module, and those that configs
        of cut networks record; it drops networks that were replaced by others.
        """
        tracker = cls.held_by(module)
        if tracker is None:
            tracker = cls(module)
        tracker._drop_replaced()
        for path, graph in recorded_networks(module).items():
            part = module.get_submodule(path)
            if any(is_within(known.name, path) for known in tracker._graph.parts):
                continue  # from the weights, which say more than the config
            if part is module and not tracker.is_known:
                tracker._graph = graph
            elif cls.held_by(part) is None:
                cls(part, graph)
        for path, part in module.named_modules():
            inner = cls.held_by(part)
            if inner is None or inner is tracker or path in tracker._below or not inner.is_known:
                continue
            tracker._merge(path, inner)
        return tracker

    @staticmethod
    def held_by(module: nn.Module) -> PlanTracker | None:
        """The tracker of a module, or None."""
        tracker = module.__dict__.get(_ATTRIBUTE)
        return tracker if isinstance(tracker, PlanTracker) else None

    @property
    def is_known(self) -> bool:
        """Whether anything is known that the module can lose."""
        return bool(self._graph.parts)

    @property
    def is_whole(self) -> bool:
        """Whether all of that is known, not only what was cut before."""
        return self._is_whole

    @property
    def graph(self) -> PruningGraph:
        """All groups and stacks of the module, as built.

        Raises:
            PruningError: If it is not known yet.
        """
        if not self.is_known and not self._is_whole:
            raise PruningError(
                f"What {type(self.module).__name__} can lose is not known yet; expected one batch "
                "to run first. Or give graph=discover(model, ...)."
            )
        return self._graph

    @property
    def plan(self) -> PruningPlan:
        """The plan the module carries now."""
        graph = self.graph
        if self._plan is None:
            self._plan = graph.full.joined(present_plan(self.module, graph.groups))
            self._share()
        for path, inner in self._below.items():  # weights may have been loaded into a part
            if inner._plan is not None and inner._plan is not self._shared.get(path):
                self._plan = self._plan.joined(inner._plan.prefixed(path))
                self._shared[path] = inner._plan
        return self._plan

    @plan.setter
    def plan(self, plan: PruningPlan) -> None:
        self._plan = plan
        self._share()

    @property
    def groups(self) -> list[DependencyGroup]:
        """Groups of the layers that remain, at their present paths."""
        graph = self.graph
        return graph.groups_at(self.plan) if graph.stacks else list(graph.groups)

    @property
    def removed_layers(self) -> RemovedLayers:
        """Removed layers, without storage of their own."""
        return self._removed

    def store(self, removed: RemovedLayers) -> None:
        """Keep removed layers, without their storage, for plans that contain them again."""
        for name, layers in removed.items():
            known = self._removed.setdefault(name, {})
            known |= {place: without_storage(layer) for place, layer in layers.items()}
        self._share()

    def adopt(self, graph: PruningGraph) -> None:
        """Use a graph, as built, in place of what is known.

        Args:
            graph: What a file holds, or what is described by hand.

        Raises:
            PruningError: If it is the graph of another model.
        """
        self._graph = self._with_stored(self._graph, graph)
        self._complete()

    def extend(self, found: PruningGraph) -> None:
        """Add what a recorded call of the module in its present shape shows to what is known.

        Args:
            found: The graph of the present module; what was cut before keeps its names and sizes.
        """
        if self.is_known:
            plan = self.plan
            groups = self._graph.named_as_built(list(found.groups), plan)
            new = [g for g in _grown(groups, self._graph) if is_apart(g, self._graph)]
            found = replace(found, groups=tuple(new), refused=_still_refused(found, self._graph))
        self._graph = self._graph.joined(found)
        self._complete()

    def _complete(self) -> None:
        self._is_whole = True
        if self._plan is not None:
            self._plan = self._graph.full.joined(self._plan)
        self._share()

    def close(self) -> None:
        """Remove the hooks of this tracker and of those on parts of the module."""
        for handle in self._handles:
            handle.remove()
        self.module.__dict__.pop(_ATTRIBUTE, None)
        for inner in self._below.values():
            if PlanTracker.held_by(inner.module) is inner:
                inner.close()

    def _merge(self, path: str, inner: PlanTracker) -> None:
        """Add the graph and the plan of a part's tracker, which stays; both are kept equal."""
        plan = inner.plan.prefixed(path)
        own = PruningPlan({}, {}) if self._plan is None else self._plan
        self._plan = own.joined(plan)
        self._graph = inner.graph.prefixed(path).joined(self._graph)
        self._removed |= {f"{path}.{name}": s for name, s in inner._removed.items()}
        self._below[path], self._shared[path] = inner, inner._plan
        _ = self.plan  # now, while the shapes are those of the part's plan

    def _share(self) -> None:
        """Give all networks, and the encoders in them, trackers with their part of the plan.

        A network that is taken out of its module, saved or copied by itself, so keeps its plan.
        """
        parts = self._graph.parts
        # From inside, a stack that is the network itself has no name; its parent holds the plan.
        nameless = {"", *(part.name for part in parts)}
        networks = {part.network for part in parts} - nameless
        for path in sorted((networks | {part.scope for part in parts}) - nameless):
            module = module_at(self.module, path)
            if module is None:
                continue
            inner = PlanTracker.held_by(module)
            if inner is None:
                inner = PlanTracker(module)
                if path not in networks:
                    outer = max((n for n in networks if is_within(path, n)), key=len, default="")
                    inner._inside = type(self.module.get_submodule(outer)).__name__
            self._below[path] = inner
            inner._graph, inner._is_whole = self._graph.under(path), self._is_whole
            dot = f"{path}."
            inner._removed = {
                n[len(dot) :]: s for n, s in self._removed.items() if n.startswith(dot)
            }
            if self._plan is not None:
                inner._plan = self._shared[path] = self._plan.under(path)
        for path, inner in self._below.items():
            deeper = {p: k for p, k in self._below.items() if p.startswith(f"{path}.")}
            inner._below = {p[len(path) + 1 :]: tracker for p, tracker in deeper.items()}
            inner._shared = {p: tracker._plan for p, tracker in inner._below.items()}

    def _drop_replaced(self) -> None:
        """Drop networks that were replaced by others."""
        for path, inner in list(self._below.items()):
            module = module_at(self.module, path)
            if module is not None and PlanTracker.held_by(module) is inner:
                continue
            del self._below[path]
            self._shared.pop(path, None)
            top = next((p for p in self._below if is_within(path, p)), path)

            def stays(name: str, top: str = top) -> bool:
                return not is_within(name, top)

            self._graph = PruningGraph.of(p for p in self._graph.parts if stays(p.name))
            self._removed = {name: s for name, s in self._removed.items() if stays(name)}
            if self._plan is not None:
                self._plan = self._plan.only(filter(stays, self._plan.sizes))
            self._is_whole = False

    def _write(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if self._plan is None:
            return
        # The hidden size of an encoder reaches into the head around it, which a part cannot write.
        wide = {
            group.name
            for group in self._graph.groups
            if not any(_is_inside(group, path) for path in self._below)
        }
        own = self._plan.only(
            name
            for name in self._plan.sizes
            if name in wide or not any(is_within(name, path) for path in self._below)
        )
        if not own.is_full:
            state[prefix + PLAN_KEY] = write_plan(own, self._graph)

    def _apply(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, **__: Any
    ) -> None:
        stored, described = plan_in_state(state, prefix)
        if stored is None and self._plan is None:
            return
        weights = named_from("", state, prefix)
        if stored is not None:
            graph = self._graph_for(stored, described)
            plan, current = self._completed(stored, graph, weights)
            check_weights(module, graph, plan, current, weights)
        elif is_uncut(self.graph, self.plan, weights, unsaved_buffers(module)):
            graph, current = self.graph, self.plan
            plan = graph.full
        else:
            return  # weights for the present shape, or a part without the cut tensors
        if _removals(plan) != _removals(current):
            self._reshape(graph, plan, current, weights)
        self._graph, self._plan = graph, plan
        self._share()

    def _reshape(
        self,
        graph: PruningGraph,
        plan: PruningPlan,
        current: PruningPlan,
        weights: Mapping[str, Any],
    ) -> None:
        """Give the module the shape of a plan, unless torch would then refuse the weights."""
        if self._inside:
            raise PruningError(
                f"The weights have another plan than this {type(self.module).__name__}, which is "
                f"part of a {self._inside} that would keep its shape. Load the weights of the "
                f"{self._inside}."
            )
        changed = changed_groups(graph, plan, current)
        done = reshape_model(
            self.module, graph, plan, current=current, available=self._removed, only=changed
        )
        why = load_errors(self.module, weights, strict=_is_strict())
        if why:
            self.store(cancel_cut(self.module, graph, done))
            raise PruningError(
                f"The weights do not fit this {type(self.module).__name__}, which stays as it was. "
                f"{why} Build the model with the configuration it was trained with."
            )
        self.store(done.removed)

    def _graph_for(self, stored: PruningPlan, described: PruningGraph | None) -> PruningGraph:
        """The known graph if it has all that the plan names, else the stored one."""
        graph = self._graph
        if described is not None and not set(stored.sizes) <= {part.name for part in graph.parts}:
            graph = self._with_stored(graph, described)
        sizes = {part.name: part.size for part in graph.parts}
        for name in sorted(set(stored.sizes) - set(sizes)):
            stack = stack_at(self.module, name)
            if stack is not None:
                graph, sizes[name] = graph.joined(PruningGraph.of([stack])), stack.size
        for name, size in stored.sizes.items():
            if sizes.get(name) != size:
                here = f"has {sizes[name]}" if name in sizes else "is missing"
                raise PruningError(
                    f"The stored plan was made for another model: group {name!r} of size {size} "
                    f"{here} here. Build the model with the configuration it was trained with."
                )
        return graph

    def _with_stored(self, known: PruningGraph, described: PruningGraph) -> PruningGraph:
        """The graph of a checkpoint, and those known groups that cut nothing of what it cuts."""
        check_networks(self.module, described)
        now = described.full.joined(present_plan(self.module, described.groups))
        own = set() if self._plan is None else {*_removals(self._plan)}
        if own & {part.name for part in described.parts}:
            now = now.joined(self.plan.only(own & set(now.sizes)))
        check_stored(self.module, described, now)
        apart = [part for part in known.groups if is_apart(part, described)]
        cut = own & {part.name for part in known.groups} - {
            *(part.name for part in apart),
            *(part.name for part in described.groups),
        }
        if cut:
            raise PruningError(
                f"The checkpoint names other units than those that were cut here: {sorted(cut)[:6]}"
                ". Load it into a model as built."
            )
        graph = described.joined(PruningGraph(tuple(apart), known.stacks))
        if self._plan is not None:
            self._plan = self._plan.only(part.name for part in graph.parts)
        return graph

    def _completed(
        self, stored: PruningPlan, graph: PruningGraph, state: Mapping[str, Any]
    ) -> tuple[PruningPlan, PruningPlan]:
        """The stored plan over all groups, and the present one.

        A group that the stored one does not name is as built where the weights are, else unchanged.
        """
        now = graph.full.joined(present_plan(self.module, graph.groups))
        if self._plan is not None:
            now = now.joined(self.plan)
        unsaved = unsaved_buffers(self.module)
        grown = [group for group in graph.groups if is_group_uncut(group, state, unsaved)]
        return now.joined(full_plan(grown)).joined(stored), now


def _is_inside(group: DependencyGroup, path: str) -> bool:
    """Whether a group and all that it cuts are in one module."""
    return all(is_within(name, path) for name in (group.name, *(s.tensor for s in group.tensors)))


def _grown(groups: Sequence[DependencyGroup], before: PruningGraph) -> list[DependencyGroup]:
    """Groups found on a cut model, with tensors as large as built along what was cut."""
    known = {(s.tensor, s.dim): s for group in before.groups for s in group.tensors}
    sizes = {group.name: group.size for group in before.groups}

    def shape(s: PrunableDim) -> tuple[int, ...]:
        built = (known.get((s.tensor, dim)) for dim in range(len(s.shape)))
        return tuple(
            size if one is None else one.shape[dim]
            for dim, (size, one) in enumerate(zip(s.shape, built, strict=True))
        )

    return [
        replace(
            group,
            tensors=tuple(replace(s, shape=shape(s)) for s in group.tensors),
            partners=tuple((name, sizes.get(name, size)) for name, size in group.partners),
        )
        for group in groups
    ]


def _still_refused(found: PruningGraph, known: PruningGraph) -> tuple[Refusal, ...]:
    """What was refused, apart from groups that are known."""
    names = {group.name for group in known.groups}
    return tuple(each for each in found.refused if each.name not in names)


def _is_strict() -> bool:
    """Whether the running ``load_state_dict`` is strict, which torch does not pass to its hooks."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not nn.Module.load_state_dict.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals.get("strict"))


def _removals(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    """The kept positions of the groups and stacks that a plan makes smaller."""
    return {name: kept for name, kept in plan.kept.items() if len(kept) < plan.sizes[name]}
