"""PruningGraph: all groups and stacks of a model as built, and the choice of those to prune."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted, shortened
from lightning_mi_prune.core.files import write_whole
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.untrusted import read_text
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    LayerStack,
    Refusal,
    count_parameters,
    is_within,
    join_path,
)
from lightning_mi_prune.graph.storage import fields_from_json, fields_to_json

__all__ = [
    "PruningGraph",
    "Refusal",
    "check_within",
    "choose_groups",
    "modules_without_groups",
    "summarize_groups",
]


@dataclass(frozen=True)
class PruningGraph:
    """All groups of units and stacks of layers of a model, as built.

    When a layer is removed, those above it get lower numbers: their groups keep their names, but
    tensors and modules have other paths.

    Args:
        groups: Groups of units.
        stacks: Stacks of layers.
        refused: What is in a parameter but cannot be cut, and why.
        unknown: Operators without a rule, each with the module that called it.
        parameters: Parameters of the module; 0 if they were not counted.
        reachable: Those of them that the groups cut.

    Raises:
        PruningError: If two of them have the same name.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune import discover
        >>> net = BertModel(BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50))
        >>> graph = discover(net)
        >>> plan = graph.keep_layers(graph.full, {"encoder.layer": (0, 2)})
        >>> top = next(a for a in graph.groups_at(plan) if a.name == "encoder.layer.2.ffn")
        >>> top.consumers
        ('encoder.layer.1.output.dense',)
        >>> plan.kept["encoder.layer.1.ffn"]
        ()
    """

    groups: tuple[DependencyGroup, ...] = ()
    stacks: tuple[LayerStack, ...] = ()
    refused: tuple[Refusal, ...] = ()
    unknown: tuple[str, ...] = ()
    parameters: int = 0
    reachable: int = 0

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PruningError(f"{twice} name several groups or stacks; expected unique names.")

    def __deepcopy__(self, memo: object) -> PruningGraph:
        return self  # immutable, and held many times by copies of a model

    @classmethod
    def of(cls, parts: Iterable[DependencyGroup | LayerStack]) -> PruningGraph:
        """A graph of the groups and stacks in one list."""
        found = list(parts)
        return cls(
            tuple(part for part in found if isinstance(part, DependencyGroup)),
            tuple(part for part in found if isinstance(part, LayerStack)),
        )

    def __str__(self) -> str:
        """A table: group, kind, units, parameters, verified or why not; equal layers in one row."""
        return _table(self)

    def to_json(self) -> str:
        """The graph as JSON text."""
        return fields_to_json({field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_json(cls, given: Any) -> PruningGraph:
        """The graph in a JSON text.

        Args:
            given: Text of :meth:`to_json`; it may come from anywhere.

        Raises:
            PruningError: If it is anything else.

        Example:
            >>> ffn = DependencyGroup("ffn", "ffn", 8, (), ("down",))
            >>> graph = PruningGraph((ffn,), unknown=("einsum in 'net'",))
            >>> PruningGraph.from_json(graph.to_json()) == graph
            True
        """
        return _parsed(given) if isinstance(given, str) else cls(**fields_from_json(given))

    def save(self, path: str | Path) -> None:
        """Write the graph to a JSON file, whole or not at all.

        Raises:
            PruningError: If the file cannot be written.
        """
        write_whole(path, self.to_json(), "The pruning graph")

    @classmethod
    def load(cls, path: str | Path) -> PruningGraph:
        """Read a graph that :meth:`save` wrote.

        Raises:
            PruningError: If the file cannot be read or is no graph.
        """
        given = read_text(path, "The pruning graph", "give a file of PruningGraph.save")
        return cls.from_json(given)

    @property
    def parts(self) -> tuple[DependencyGroup | LayerStack, ...]:
        """Groups and stacks in one list."""
        return self.groups + self.stacks

    @cached_property
    def full(self) -> PruningPlan:
        """The plan that keeps everything."""
        return PruningPlan.full({part.name: part.size for part in self.parts})

    def groups_at(self, plan: PruningPlan) -> list[DependencyGroup]:
        """The groups of a model cut to a plan, at their paths there; none of removed layers."""
        path = self._paths(plan)
        found = [group.at_paths(path) for group in self.groups]
        return [
            group
            for group, built in zip(found, self.groups, strict=True)
            if group.consumers or not built.consumers
        ]

    def named_as_built(
        self, groups: list[DependencyGroup], plan: PruningPlan
    ) -> list[DependencyGroup]:
        """Groups found on a model cut to a plan, with the names and paths of the model as built."""
        path = self._paths(plan, back=True)
        names = [path(group.name) or group.name for group in groups]
        return [
            replace(
                group.at_paths(path).renamed(lambda n: path(n) or n), name=name, current_name=""
            )
            for group, name in zip(groups, names, strict=True)
        ]

    def keep_layers(self, plan: PruningPlan, layers: Mapping[str, tuple[int, ...]]) -> PruningPlan:
        """A plan that keeps only the given layers of stacks, and no units of removed layers.

        Args:
            plan: Plan to start from.
            layers: Layers that stay, as numbered when built, by name of the stack.

        Raises:
            PruningError: If a layer was removed before.
        """
        sizes = {stack.name: stack.size for stack in self.stacks if stack.name in layers}
        later = plan.then(PruningPlan(sizes, {name: layers[name] for name in sizes}))
        present = {group.name for group in self.groups_at(later)}
        removed = {group.name: () for group in self.groups if group.name not in present}
        return PruningPlan(later.sizes, {**later.kept, **removed}, later.rankings)

    def joined(self, other: PruningGraph) -> PruningGraph:
        """Both graphs in one; of parts with the same name, those of this graph."""
        names = {part.name for part in self.parts}
        return PruningGraph(
            self.groups + tuple(group for group in other.groups if group.name not in names),
            self.stacks + tuple(stack for stack in other.stacks if stack.name not in names),
            tuple(dict.fromkeys(self.refused + other.refused)),
            tuple(dict.fromkeys(self.unknown + other.unknown)),
            max(self.parameters, other.parameters),
            max(self.reachable, other.reachable),
        )

    def prefixed(self, prefix: str) -> PruningGraph:
        """The same, named from a module that holds this one at ``prefix``."""
        return PruningGraph(
            tuple(group.prefixed(prefix) for group in self.groups),
            tuple(stack.prefixed(prefix) for stack in self.stacks),
            tuple(replace(each, name=join_path(prefix, each.name)) for each in self.refused),
            self.unknown,
            self.parameters,
            self.reachable,
        )

    def under(self, prefix: str) -> PruningGraph:
        """The groups and stacks below a module path, named from there."""

        def path(name: str) -> str | None:
            return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None

        def or_empty(name: str) -> str:
            return path(name) or ""

        groups = [group for group in self.groups if group.name.startswith(f"{prefix}.")]
        stacks = [stack for stack in self.stacks if stack.name.startswith(f"{prefix}.")]
        return PruningGraph(
            tuple(replace(a.at_paths(path).renamed(or_empty), current_name="") for a in groups),
            tuple(
                replace(
                    stack,
                    name=or_empty(stack.name),
                    config_fields=tuple(
                        (or_empty(module), name)
                        for module, name in stack.config_fields
                        if module == prefix or module.startswith(f"{prefix}.")
                    ),
                    network=or_empty(stack.network),
                    scope=or_empty(stack.scope),
                )
                for stack in stacks
            ),
        )

    def _paths(self, plan: PruningPlan, *, back: bool = False) -> Callable[[str], str | None]:
        """Map paths as built to those at a plan, or ``back``; None for paths in removed layers."""
        moves: dict[str, dict[str, str]] = {}
        for stack in self.stacks:
            kept = plan.kept.get(stack.name, tuple(range(stack.size)))
            if len(kept) < stack.size:
                pairs = [(str(old), str(new)) for new, old in enumerate(kept)]
                moves[f"{stack.name}."] = {b: a for a, b in pairs} if back else dict(pairs)

        def path(name: str) -> str | None:
            for stem, numbers in moves.items():
                if name.startswith(stem):
                    layer, dot, rest = name[len(stem) :].partition(".")
                    return f"{stem}{numbers[layer]}{dot}{rest}" if layer in numbers else None
            return name

        return path


_DEFAULT = ("ffn", "heads", "channels")


@lru_cache(maxsize=4)  # a model that is opened is read several times
def _parsed(given: str) -> PruningGraph:
    return PruningGraph(**fields_from_json(given))


def _table(graph: PruningGraph) -> str:
    groups = [(g.name, (g.kind, g.size, count_parameters([g]), "yes")) for g in graph.groups]
    stacks = [(s.name, ("depth", s.size, 0, "yes")) for s in graph.stacks]
    refused = [(r.name, (r.kind or "-", r.size, r.parameters, r.reason)) for r in graph.refused]
    rows = [("group", "kind", "units", "parameters", "verified")]
    for part in (groups, stacks, refused):
        alike: dict[tuple[str, int, int, str], list[str]] = {}
        for name, values in part:
            alike.setdefault(values, []).append(name)
        rows += [
            (shortened(names), kind, f"{size:,}", f"{count:,}" if count else "-", reason)
            for (kind, size, count, reason), names in alike.items()
        ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index in (2, 3) else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if graph.parameters:
        share = graph.reachable / graph.parameters
        lines.append(
            f"{graph.reachable:,} of {counted(graph.parameters, 'parameter')} ({share:.1%}) are in "
            f"{counted(len(graph.groups), 'group')}"
        )
    if graph.unknown:
        lines.append(f"operators without a rule: {', '.join(graph.unknown)}")
    return "\n".join(lines)


def choose_groups(
    groups: Sequence[DependencyGroup],
    *,
    kinds: Sequence[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    modules: Sequence[str] = (),
) -> list[DependencyGroup]:
    """Choose groups by kind and by regular expressions searched in their names.

    If an expression is also the name of one of ``modules``, which it cannot match, a warning
    names the groups that it matches instead.

    Args:
        groups: All groups of a model.
        kinds: Kinds to choose; None chooses neurons, heads and channels, or every kind if there
            are none of these.
        include: Choose only groups whose name contains a match.
        exclude: Leave out groups whose name contains a match.
        modules: Paths of modules without any group (:func:`modules_without_groups`).

    Raises:
        PruningError: If a kind or an expression matches no group, is not valid, or nothing is left.
    """
    present = sorted({group.kind for group in groups})
    given = kinds is not None
    if kinds is None:
        kinds = [kind for kind in _DEFAULT if kind in present] or present
    for kind in kinds:
        if kind not in present:
            raise PruningError(f"kinds={list(kinds)} names {kind!r}; this model has {present}.")
    chosen = [group for group in groups if group.kind in kinds]
    unread = [group.name for group in chosen if group.name in _unread(groups)]
    if unread and (given or len(unread) == len(chosen)):
        raise PruningError(
            f"kinds={list(kinds)} names {shortened(unread)}, which no layer reads alone: queries "
            "and keys are multiplied with each other. A plan can cut them (apply_plan), but "
            "nothing ranks them; leave the kind out."
        )
    chosen = [group for group in chosen if group.name not in unread]
    for option, expression in (("include", include), ("exclude", exclude)):
        if expression is not None:
            found = _found(chosen, option, expression, modules)
            chosen = [group for group in chosen if (group in found) == (option == "include")]
    if not chosen:
        raise PruningError(
            f"Nothing is left to prune: kinds={list(kinds)}, include={include!r} and "
            f"exclude={exclude!r} leave no group of {len(groups)}; loosen one of them."
        )
    return chosen


def _unread(groups: Sequence[DependencyGroup]) -> set[str]:
    """Names of dimensions of heads that can be cut, but not rotated and so not ranked."""
    return {
        g.name for g in groups if not g.consumers or (g.kind == "head_dim" and g.rotation is None)
    }


def check_within(module: Any, path: str) -> None:
    """Refuse a path of the option ``module`` that is no part of the model.

    Raises:
        PruningError: Naming the parts that there are.

    Example:
        >>> from torch import nn
        >>> check_within(nn.Sequential(nn.ReLU()), "0")
    """
    try:
        module.get_submodule(path)
    except AttributeError as error:
        children = [name for name, _ in module.named_children()]
        raise PruningError(
            f"module={path!r} is not part of {type(module).__name__}; it has {children}."
        ) from error


def modules_without_groups(
    module: Any, groups: Sequence[DependencyGroup], within: str = ""
) -> list[str]:
    """Paths of the modules with weight matrices that take part in no group.

    Args:
        module: Module from which the groups are named.
        groups: All its groups.
        within: Path of a submodule to look at instead of all of ``module``.

    Example:
        >>> from torch import nn
        >>> from lightning_mi_prune import linear_group
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 2))
        >>> group = linear_group(net, "ffn", kind="ffn", producers=["0"], consumers=["2"])
        >>> modules_without_groups(net, [group])
        ['3']
    """
    touched = {""}
    for group in groups:
        for path in (group.name, *group.consumers, *(s.tensor for s in group.tensors)):
            parts = path.split(".")
            touched |= {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
    return [
        path
        for path, part in module.named_modules()
        if path not in touched
        and is_within(path, within)
        and any(p.ndim > 1 for p in part.parameters())
    ]


def summarize_groups(groups: Sequence[DependencyGroup]) -> str:
    """Number and names of the groups of each kind, as text.

    Example:
        >>> groups = [DependencyGroup(f"net.{i}.ffn", "ffn", 8, (), ("down",)) for i in (0, 1)]
        >>> summarize_groups([*groups, DependencyGroup("net.0.heads", "heads", 4, (), ("out",))])
        "3 groups: 2 of kind 'ffn' (net.{0,1}.ffn), 1 of kind 'heads' (net.0.heads)"
    """
    parts = []
    for kind in dict.fromkeys(group.kind for group in groups):
        names = [group.name for group in groups if group.kind == kind]
        parts.append(f"{len(names)} of kind {kind!r} ({shortened(names)})")
    return f"{counted(len(groups), 'group')}: {', '.join(parts)}"


def _found(
    groups: Sequence[DependencyGroup], option: str, expression: str, modules: Sequence[str]
) -> list[DependencyGroup]:
    """The groups that an expression matches; a warning if it is also the name of a module."""
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise PruningError(
            f"{option}={expression!r} is not a regular expression ({error}); expected one "
            "such as 'ffn$'."
        ) from error
    found = [group for group in groups if pattern.search(group.name)]
    namesakes = _namesakes(pattern, modules)
    paths = shortened(map(repr, namesakes), most=3)
    if not found:
        sample = [group.name for group in groups[:4]]
        mention = f" No group belongs to the module {paths}: print(graph) shows why."
        raise PruningError(
            f"{option}={expression!r} matches no group; the names look like {sample}."
            f"{mention if namesakes else ''}"
        )
    if namesakes:
        describe = "describe its units by hand (linear_group), or "
        warnings.warn(
            f"{option}={expression!r} finds {summarize_groups(found)}. No group belongs to the "
            f"module {paths}, which stays as it is: {describe if option == 'include' else ''}write "
            f"an expression that finds groups only, such as '{found[0].kind}$'.",
            PruningWarning,
            stacklevel=4,
        )
    return found


def _namesakes(pattern: re.Pattern[str], modules: Sequence[str]) -> list[str]:
    """The topmost modules whose path, or its last part, an expression matches completely."""
    top: list[str] = []
    for path in modules:
        below = any(path.startswith(f"{other}.") for other in top)
        names = {path, path.rpartition(".")[2]}  # a number is an index, not a name
        if not below and any(pattern.fullmatch(n) for n in names if not n.isdigit()):
            top.append(path)
    return top
