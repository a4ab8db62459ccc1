"""BODY     Anatomy: all axes and stacks of a model as built, and where they stand at a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.depth import DepthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.plan import Plan

__all__ = ["Anatomy"]


@dataclass(frozen=True)
class Anatomy:
    """What a model can lose, units and layers, in the numbering it was built with.

    When a layer goes, those above it move down: their axes keep their names, but their tensors
    and modules stand at other paths. The units of a layer that is gone are gone.

    Args:
        axes: Axes of units.
        stacks: Stacks of layers.

    Raises:
        PruningError: If two of them have the same name.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune.families import find_axes
        >>> from lightning_mi_prune.families.stacks import find_stacks
        >>> net = BertModel(BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50))
        >>> anatomy = Anatomy(tuple(find_axes(net)), tuple(find_stacks(net)))
        >>> plan = anatomy.without(anatomy.full, {"encoder.layer": (0, 2)})
        >>> top = next(a for a in anatomy.standing(plan) if a.name == "encoder.layer.2.ffn")
        >>> top.readers
        ('encoder.layer.1.output.dense',)
        >>> plan.kept["encoder.layer.1.ffn"]
        ()
    """

    axes: tuple[WidthAxis, ...] = ()
    stacks: tuple[DepthAxis, ...] = ()

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PruningError(f"{twice} name two things that can be lost; expected one of each.")

    def __deepcopy__(self, memo: object) -> Anatomy:
        return self  # nothing in it changes, and copies of a model hold it many times

    @classmethod
    def of(cls, parts: Iterable[WidthAxis | DepthAxis]) -> Anatomy:
        """Axes and stacks out of one list."""
        found = list(parts)
        return cls(
            tuple(part for part in found if isinstance(part, WidthAxis)),
            tuple(part for part in found if isinstance(part, DepthAxis)),
        )

    @property
    def parts(self) -> tuple[WidthAxis | DepthAxis, ...]:
        """Axes and stacks in one list."""
        return self.axes + self.stacks

    @cached_property
    def full(self) -> Plan:
        """The plan that keeps everything."""
        return Plan.full({part.name: part.size for part in self.parts})

    def standing(self, plan: Plan) -> list[WidthAxis]:
        """The axes of the layers that are there at a plan, at the paths they then have."""
        path = self._paths(plan)
        found = [axis.moved(path) for axis in self.axes]
        return [
            axis
            for axis, built in zip(found, self.axes, strict=True)
            if axis.readers or not built.readers
        ]

    def restated(self, axes: list[WidthAxis], plan: Plan) -> list[WidthAxis]:
        """Axes that were found on a model at a plan, as they were named when it was built."""
        path = self._paths(plan, back=True)
        names = [path(axis.name) or axis.name for axis in axes]
        return [
            replace(
                axis.moved(path), name=name, here="", crossed=path(axis.crossed) or axis.crossed
            )
            for axis, name in zip(axes, names, strict=True)
        ]

    def without(self, plan: Plan, layers: Mapping[str, tuple[int, ...]]) -> Plan:
        """A plan that keeps only the given layers of stacks, and no unit of the others.

        Args:
            plan: Plan to start from.
            layers: Layers that stay, as numbered when built, by name of the stack.

        Raises:
            PruningError: If a stack is not known, or a layer is gone already.
        """
        sizes = {stack.name: stack.size for stack in self.stacks if stack.name in layers}
        later = plan.then(Plan(sizes, {name: layers[name] for name in sizes}))
        there = {axis.name for axis in self.standing(later)}
        gone = {axis.name: () for axis in self.axes if axis.name not in there}
        return Plan(later.sizes, {**later.kept, **gone}, later.rankings)

    def joined(self, other: Anatomy) -> Anatomy:
        """Both in one; what both name is that of this one."""
        names = {part.name for part in self.parts}
        return Anatomy(
            self.axes + tuple(axis for axis in other.axes if axis.name not in names),
            self.stacks + tuple(stack for stack in other.stacks if stack.name not in names),
        )

    def prefixed(self, prefix: str) -> Anatomy:
        """The same, named from a module that holds this one at ``prefix``."""
        return Anatomy(
            tuple(axis.prefixed(prefix) for axis in self.axes),
            tuple(stack.prefixed(prefix) for stack in self.stacks),
        )

    def under(self, prefix: str) -> Anatomy:
        """What lies below a module path, named from there."""

        def path(name: str) -> str | None:
            return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None

        def certain(name: str) -> str:
            return path(name) or ""

        axes = [axis for axis in self.axes if axis.name.startswith(f"{prefix}.")]
        stacks = [stack for stack in self.stacks if stack.name.startswith(f"{prefix}.")]
        return Anatomy(
            tuple(
                replace(a.moved(path), name=certain(a.name), here="", crossed=certain(a.crossed))
                for a in axes
            ),
            tuple(
                replace(
                    stack,
                    name=certain(stack.name),
                    fields=tuple(
                        (certain(module), name)
                        for module, name in stack.fields
                        if module == prefix or module.startswith(f"{prefix}.")
                    ),
                    network=certain(stack.network),
                    scope=certain(stack.scope),
                )
                for stack in stacks
            ),
        )

    def _paths(self, plan: Plan, *, back: bool = False) -> Callable[[str], str | None]:
        """Present paths by those as built (or back); None where the layer is not there."""
        moves: dict[str, dict[str, str]] = {}
        for stack in self.stacks:
            kept = plan.kept.get(stack.name, tuple(range(stack.size)))
            if len(kept) < stack.size:
                pairs = [(str(old), str(new)) for new, old in enumerate(kept)]
                moves[f"{stack.name}."] = {b: a for a, b in pairs} if back else dict(pairs)

        def path(name: str) -> str | None:
            for stem, places in moves.items():
                if name.startswith(stem):
                    layer, dot, rest = name[len(stem) :].partition(".")
                    return f"{stem}{places[layer]}{dot}{rest}" if layer in places else None
            return name

        return path
