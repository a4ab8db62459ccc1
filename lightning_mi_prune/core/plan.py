"""PruningPlan: the units of every group that stay, and the elimination order of the others."""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.untrusted import LARGEST_TEXT, described, number, read_json

__all__ = [
    "CONFIG_FIELD",
    "GRAPH_FIELD",
    "MODEL_TYPE",
    "OPENING_FIELD",
    "PARTS_FIELD",
    "TYPE_FIELD",
    "PruningPlan",
    "Ranking",
    "recorded_plan",
]

CONFIG_FIELD = "pruning_plan"
GRAPH_FIELD = "pruning_graph"
MODEL_TYPE = "lightning_mi_prune"  # of configs that do not describe the model
OPENING_FIELD = "how_to_open"  # a sentence in such a config
PARTS_FIELD = "pruned_parts"  # shapes and numbers of the model, resolved from plan and graph
TYPE_FIELD = "pruned_model_type"  # of the model as built, beside it
_VERSION = 1
_LARGEST_GROUP = 2**24


@dataclass(frozen=True)
class Ranking:
    """Elimination order of a group's units, to the last one, with its loss curve.

    Args:
        order: Units as numbered when built, the first to be removed first.
        loss: Expected rise of the task loss ``J``, in nats per example, after each removal.
        nats: Information with the layer above that is lost, after each removal.

    Raises:
        PruningError: If the three differ in length, a unit is repeated or a number is not finite.

    Example:
        >>> Ranking(order=(2, 0, 1), loss=(0.0, 0.1, 0.9), nats=(0.0, 0.5, 2.0)).kept(1)
        (1,)
    """

    order: tuple[int, ...]
    loss: tuple[float, ...]
    nats: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.order) == len(self.loss) == len(self.nats):
            raise PruningError(
                f"A ranking of {counted(len(self.order), 'unit')} has "
                f"{counted(len(self.loss), 'loss', 'losses')} and {len(self.nats)} nats; expected "
                "one of each for each unit."
            )
        if not all(map(_is_whole, self.order)) or len(set(self.order)) < len(self.order):
            raise PruningError(
                "A ranking repeats a unit, or one is not a whole number; expected each unit once."
            )
        try:
            for value in (*self.loss, *self.nats):
                number(value, 0)
        except (TypeError, ValueError) as error:
            raise PruningError(
                f"A ranking has an invalid loss: {error}; expected finite numbers of at least 0."
            ) from error

    def kept(self, units: int) -> tuple[int, ...]:
        """The units that stay, in increasing order, when ``units`` of them do."""
        return tuple(sorted(self.order[max(0, len(self.order) - units) :]))

    def lost(self, units: int) -> tuple[float, float]:
        """``J`` and nats lost when ``units`` stay."""
        gone = len(self.order) - units
        return (self.loss[gone - 1], self.nats[gone - 1]) if gone > 0 else (0.0, 0.0)


@dataclass(frozen=True)
class PruningPlan:
    """The units of each group that stay, as numbered when the model was built.

    Because the numbering never changes, a fresh model and the latest plan give the pruned model,
    however many cuts led there.

    Args:
        sizes: Size of every group as built, by group name.
        kept: Units of every group that stay, strictly increasing, by group name.
        rankings: Elimination order of groups, if known: a smaller budget then needs no new
            calibration. Plans are compared without it.

    Raises:
        PruningError: If sizes and kept name different groups, or a unit is repeated or outside.

    Example:
        >>> plan = PruningPlan(sizes={"ffn": 4, "heads": 2}, kept={"ffn": (0, 2, 3), "heads": (1,)})
        >>> plan.width("ffn")
        3
        >>> PruningPlan.from_json(plan.to_json()) == plan
        True
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]]
    rankings: Mapping[str, Ranking] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if set(self.sizes) != set(self.kept):
            odd = sorted(map(described, set(self.sizes) ^ set(self.kept)))
            raise PruningError(
                f"A plan has only the size or only the kept units of {', '.join(odd[:6])}; "
                "expected both for every group."
            )
        for name, size in self.sizes.items():
            _check_group(name, size, self.kept[name])
        names = sorted(self.sizes)
        for name, ranking in self.rankings.items():
            if name not in self.sizes or not all(0 <= p < self.sizes[name] for p in ranking.order):
                raise PruningError(
                    f"The ranking of {described(name)} does not belong to this plan; expected "
                    "units of a group that the plan names."
                )
        known = {n: self.rankings[n] for n in names if n in self.rankings}
        object.__setattr__(self, "rankings", MappingProxyType(known))
        object.__setattr__(self, "sizes", MappingProxyType({n: self.sizes[n] for n in names}))
        object.__setattr__(self, "kept", MappingProxyType({n: tuple(self.kept[n]) for n in names}))

    def __deepcopy__(self, memo: object) -> PruningPlan:
        return self  # immutable, and held many times by copies of a model

    def __reduce__(self) -> tuple[Any, ...]:
        return PruningPlan, (dict(self.sizes), dict(self.kept), dict(self.rankings))

    @classmethod
    def full(cls, sizes: Mapping[str, int]) -> PruningPlan:
        """The plan that keeps everything.

        Example:
            >>> PruningPlan.full({"ffn": 3}).kept["ffn"]
            (0, 1, 2)
        """
        return cls(sizes=sizes, kept={name: tuple(range(size)) for name, size in sizes.items()})

    def width(self, name: str) -> int:
        """Number of units of the group ``name`` that stay."""
        return len(self.kept[name])

    @property
    def is_full(self) -> bool:
        """Whether nothing is removed."""
        return all(self.width(name) == size for name, size in self.sizes.items())

    def then(self, later: PruningPlan) -> PruningPlan:
        """Compose with a later plan over the same or fewer groups; two cuts are one plan.

        Raises:
            PruningError: If ``later`` brings back a unit that this plan removed.

        Example:
            >>> first = PruningPlan({"ffn": 4}, {"ffn": (0, 1, 3)})
            >>> first.then(PruningPlan({"ffn": 4}, {"ffn": (1, 3)})).kept["ffn"]
            (1, 3)
        """
        for name in later.sizes:
            if name not in self.sizes or later.sizes[name] != self.sizes[name]:
                has = ", ".join(f"{described(n)}: {size}" for n, size in self.sizes.items())
                raise PruningError(
                    f"Group {described(name)} of size {later.sizes[name]} is not in the earlier "
                    f"plan (which has {has[:200]}); plans compose only over the same model."
                )
            back = sorted(set(later.kept[name]) - set(self.kept[name]))
            if back:
                raise PruningError(
                    f"The later plan keeps units {back[:8]} of group {described(name)}, which "
                    "were already removed; expected a subset of what is left."
                )
        rankings = {**self.rankings, **later.rankings}
        return PruningPlan(self.sizes, {**self.kept, **later.kept}, rankings)

    def positions_in(self, current: PruningPlan) -> dict[str, tuple[int, ...]]:
        """Positions of this plan's kept units in a model that was cut to ``current``.

        Example:
            >>> now = PruningPlan({"ffn": 4}, {"ffn": (0, 2, 3)})
            >>> PruningPlan({"ffn": 4}, {"ffn": (0, 3)}).positions_in(now)
            {'ffn': (0, 2)}
        """
        current.then(self)
        places = {n: {p: i for i, p in enumerate(current.kept[n])} for n in self.kept}
        return {n: tuple(places[n][p] for p in kept) for n, kept in self.kept.items()}

    @property
    def widths(self) -> dict[str, int]:
        """Number of units that stay, by group."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def under(self, prefix: str) -> PruningPlan:
        """The part of the plan below the module path ``prefix``, named from there."""
        dot = f"{prefix}." if prefix else ""
        return self._renamed({n: n[len(dot) :] for n in self.sizes if n.startswith(dot)})

    def prefixed(self, prefix: str) -> PruningPlan:
        """The same plan with every group named from a module that holds this one at ``prefix``."""
        dot = f"{prefix}." if prefix else ""
        return self._renamed({name: dot + name for name in self.sizes})

    def _renamed(self, names: Mapping[str, str]) -> PruningPlan:
        """The part of the plan for the groups in ``names``, under the names given there."""
        return PruningPlan(
            {new: self.sizes[name] for name, new in names.items()},
            {new: self.kept[name] for name, new in names.items()},
            {new: self.rankings[name] for name, new in names.items() if name in self.rankings},
        )

    def joined(self, other: PruningPlan) -> PruningPlan:
        """Both plans in one; where both name a group, ``other`` decides."""
        rankings = {n: r for n, r in self.rankings.items() if n not in other.sizes}
        return PruningPlan(
            {**self.sizes, **other.sizes},
            {**self.kept, **other.kept},
            {**rankings, **other.rankings},
        )

    def only(self, names: Iterable[str]) -> PruningPlan:
        """The part of the plan for those of the given groups that it names."""
        return self._renamed({name: name for name in names if name in self.sizes})

    def bare(self) -> PruningPlan:
        """The same plan without rankings."""
        return PruningPlan(self.sizes, self.kept)

    def digest(self) -> str:
        """SHA-256 of the groups that lost units, to compare plans across processes and files.

        Rankings do not count, and neither do whole groups, of which a file may name others than
        the graph in memory does.

        Example:
            >>> plan = PruningPlan({"ffn": 4}, {"ffn": (0, 3)})
            >>> plan.digest() == plan.joined(PruningPlan({"heads": 2}, {"heads": (0, 1)})).digest()
            True
        """
        fewer = self.only(n for n, kept in self.kept.items() if len(kept) < self.sizes[n])
        return hashlib.sha256(fewer.bare().to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical compact JSON; equal plans give equal text."""
        body: dict[str, Any] = {
            "version": _VERSION,
            "sizes": dict(self.sizes),
            "kept": {name: list(kept) for name, kept in self.kept.items()},
        }
        if self.rankings:
            body["rankings"] = {name: vars(ranking) for name, ranking in self.rankings.items()}
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan from untrusted text.

        Raises:
            PruningError: If the text is not a plan of a known version.
        """
        body = read_json(text, "The plan", version=_VERSION, longest=LARGEST_TEXT)
        sizes, kept = body.get("sizes"), body.get("kept")
        if not isinstance(sizes, dict) or not isinstance(kept, dict):
            raise PruningError("A plan needs the objects 'sizes' and 'kept'; was it edited?")
        for name, positions in kept.items():
            if not isinstance(positions, list):
                raise PruningError(
                    f"Group {described(name)} keeps {described(positions)}; expected integers."
                )
        return cls(
            sizes=sizes,
            kept={name: tuple(p) for name, p in kept.items()},
            rankings=_read_rankings(body.get("rankings", {})),
        )


def _read_rankings(found: Any) -> dict[str, Ranking]:
    fields = ("order", "loss", "nats")
    if not isinstance(found, dict) or not all(
        isinstance(ranking, dict) and all(isinstance(ranking.get(f), list) for f in fields)
        for ranking in found.values()
    ):
        raise PruningError("The rankings of a plan need 'order', 'loss' and 'nats'; was it edited?")
    return {n: Ranking(*(tuple(ranking[f]) for f in fields)) for n, ranking in found.items()}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_group(name: str, size: int, kept: tuple[int, ...]) -> None:
    if not _is_whole(size) or not 1 <= size <= _LARGEST_GROUP:
        raise PruningError(
            f"Group {described(name)} has size {described(size)}; expected a whole number from 1 "
            f"to {_LARGEST_GROUP}."
        )
    # Plans are made again and again, of thousands of units: what is right is seen quickly.
    right = set(map(type, kept)) == {int} and min(kept) >= 0 and max(kept) < size
    wrong = [] if right else [p for p in kept if not _is_whole(p) or not 0 <= p < size]
    if wrong:
        raise PruningError(
            f"Group {described(name)} keeps unit {described(wrong[0])}; expected 0 to {size - 1}."
        )
    if not all(map(operator.lt, kept, kept[1:])):
        raise PruningError(f"Group {described(name)} keeps units out of order; sort them.")


def recorded_plan(network: object) -> PruningPlan | None:
    """The plan recorded in ``network.config``, or None for a network that was never cut.

    Raises:
        PruningError: If the record is not a plan.
    """
    text = getattr(getattr(network, "config", None), CONFIG_FIELD, None)
    if text is None:
        return None
    if not isinstance(text, str):
        raise PruningError(f"config.{CONFIG_FIELD} is {described(text)}; expected text.")
    return PruningPlan.from_json(text)
