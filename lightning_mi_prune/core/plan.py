"""PruningPlan: which units of every group stay, and in which order the others go."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.untrusted import described, number, read_json

__all__ = [
    "CONFIG_FIELD",
    "PruningPlan",
    "Ranking",
    "recorded_plan",
]

CONFIG_FIELD = "pruning_plan"


_VERSION = 1


_LARGEST_AXIS = 2**24


_LARGEST_TEXT = 64 * 2**20  # a plan is a few hundred kB; anything near this is not a plan


@dataclass(frozen=True)
class Ranking:
    """In which order a group gives up its units, to the last one, and what is lost on the way.

    Args:
        order: Positions in the model as built, the first to go first.
        loss: Expected rise of the task loss ``J``, in nats an example, after each of them is gone.
        nats: Information with the layer above that is lost after each of them is gone.

    Raises:
        PruningError: If the three differ in length, repeat a position or hold no plain numbers.

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
                f"A ranking of {counted(len(self.order), 'position')} has "
                f"{counted(len(self.loss), 'loss', 'losses')} and {len(self.nats)} nats; expected "
                "one of each for each position."
            )
        if not all(map(_is_count, self.order)) or len(set(self.order)) < len(self.order):
            raise PruningError(
                "A ranking repeats a position, or holds one that is no whole number; expected each."
            )
        try:
            for value in (*self.loss, *self.nats):
                number(value, 0)
        except (TypeError, ValueError) as error:
            raise PruningError(f"A ranking has a wrong loss: {error}; rank again.") from error

    def kept(self, units: int) -> tuple[int, ...]:
        """Survivors in increasing order when ``units`` stay."""
        return tuple(sorted(self.order[max(0, len(self.order) - units) :]))

    def lost(self, units: int) -> tuple[float, float]:
        """``J`` and nats lost when ``units`` stay."""
        gone = len(self.order) - units
        return (self.loss[gone - 1], self.nats[gone - 1]) if gone > 0 else (0.0, 0.0)


@dataclass(frozen=True)
class PruningPlan:
    """Which positions survive on each group, in the numbering of the model as it was built.

    Because the numbering never changes, a fresh model and the latest plan give the pruned model,
    however many cuts led there.

    Args:
        sizes: Size of every group as built, by group name.
        kept: Surviving positions of every group, strictly increasing, by group name.
        rankings: The order in which groups would go on to give up their units, if it is known, so
            that a smaller budget needs no new pass over the data. They decide nothing: two
            plans that keep the same are equal.

    Raises:
        PruningError: If the two name different groups, or a position is missing, repeated or outside.

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
                f"A plan needs a size and survivors for each group; check {', '.join(odd[:6])}."
            )
        for name, size in self.sizes.items():
            _check_group(name, size, self.kept[name])
        names = sorted(self.sizes)
        for name, ranking in self.rankings.items():
            if name not in self.sizes or not all(0 <= p < self.sizes[name] for p in ranking.order):
                raise PruningError(
                    f"The ranking of {described(name)} does not belong to this plan; expected "
                    "positions of a group that the plan names."
                )
        known = {n: self.rankings[n] for n in names if n in self.rankings}
        object.__setattr__(self, "rankings", MappingProxyType(known))
        object.__setattr__(self, "sizes", MappingProxyType({n: self.sizes[n] for n in names}))
        object.__setattr__(self, "kept", MappingProxyType({n: tuple(self.kept[n]) for n in names}))

    def __deepcopy__(self, memo: object) -> PruningPlan:
        return self  # nothing in it changes, and copies of a model hold it many times

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
        """Number of positions that survive on the group ``name``."""
        return len(self.kept[name])

    @property
    def is_full(self) -> bool:
        """Whether nothing is removed."""
        return all(self.width(name) == size for name, size in self.sizes.items())

    def then(self, later: PruningPlan) -> PruningPlan:
        """Compose with a later plan over the same or fewer groups; two cuts are one plan.

        Raises:
            PruningError: If ``later`` brings back a position that this plan removed.

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
                    f"The later plan keeps positions {back[:8]} of group {described(name)}, which "
                    "were already removed; expected a subset of what is left."
                )
        rankings = {**self.rankings, **later.rankings}
        return PruningPlan(self.sizes, {**self.kept, **later.kept}, rankings)

    def positions_in(self, current: PruningPlan) -> dict[str, tuple[int, ...]]:
        """Where this plan's survivors stand in a model that already carries ``current``.

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
        """Units that survive on each group."""
        return {name: len(kept) for name, kept in self.kept.items()}

    def under(self, prefix: str) -> PruningPlan:
        """The part of the plan below the module path ``prefix``, named from there."""
        dot = f"{prefix}." if prefix else ""
        names = [name for name in self.sizes if name.startswith(dot)]
        cut = len(dot)
        return PruningPlan(
            {n[cut:]: self.sizes[n] for n in names},
            {n[cut:]: self.kept[n] for n in names},
            {n[cut:]: self.rankings[n] for n in names if n in self.rankings},
        )

    def prefixed(self, prefix: str) -> PruningPlan:
        """The same plan with every group named from a module that holds this one at ``prefix``."""
        dot = f"{prefix}." if prefix else ""
        return PruningPlan(
            {dot + n: s for n, s in self.sizes.items()},
            {dot + n: k for n, k in self.kept.items()},
            {dot + n: r for n, r in self.rankings.items()},
        )

    def joined(self, other: PruningPlan) -> PruningPlan:
        """Both plans in one; where both name a group, the other holds."""
        rankings = {n: r for n, r in self.rankings.items() if n not in other.sizes}
        return PruningPlan(
            {**self.sizes, **other.sizes},
            {**self.kept, **other.kept},
            {**rankings, **other.rankings},
        )

    def only(self, names: Iterable[str]) -> PruningPlan:
        """The part of the plan that is about some groups, or about those of them that it names."""
        mine = [name for name in names if name in self.sizes]
        return PruningPlan(
            {name: self.sizes[name] for name in mine},
            {name: self.kept[name] for name in mine},
            {name: self.rankings[name] for name in mine if name in self.rankings},
        )

    def bare(self) -> PruningPlan:
        """The same plan without rankings."""
        return PruningPlan(self.sizes, self.kept)

    def digest(self) -> str:
        """SHA-256 of what the plan keeps, to compare plans across processes."""
        return hashlib.sha256(self.bare().to_json().encode()).hexdigest()

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
        body = read_json(text, "The plan", version=_VERSION, longest=_LARGEST_TEXT)
        sizes, kept = body.get("sizes"), body.get("kept")
        if not isinstance(sizes, dict) or not isinstance(kept, dict):
            raise PruningError("A plan needs the objects 'sizes' and 'kept'; was it edited?")
        for name, positions in kept.items():
            if not isinstance(positions, list):
                raise PruningError(
                    f"Group {described(name)} keeps {described(positions)}; expected a list of ints."
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


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_group(name: str, size: int, kept: tuple[int, ...]) -> None:
    if not _is_count(size) or not 1 <= size <= _LARGEST_AXIS:
        raise PruningError(
            f"Group {described(name)} has size {described(size)}; expected a whole number from 1 to "
            f"{_LARGEST_AXIS}."
        )
    if not all(_is_count(p) and 0 <= p < size for p in kept):
        bad = next(p for p in kept if not _is_count(p) or not 0 <= p < size)
        raise PruningError(
            f"Group {described(name)} keeps position {described(bad)}; expected 0 to {size - 1}."
        )
    if any(a >= b for a, b in pairwise(kept)):
        raise PruningError(f"Group {described(name)} keeps positions out of order; sort them.")


def recorded_plan(network: object) -> PruningPlan | None:
    """The plan recorded in ``network.config``, or None for a network that was never cut.

    The config of a Hugging Face model is saved and loaded with it; so is the plan.

    Raises:
        PruningError: If the record is not a plan.
    """
    text = getattr(getattr(network, "config", None), CONFIG_FIELD, None)
    if text is None:
        return None
    if not isinstance(text, str):
        raise PruningError(f"config.{CONFIG_FIELD} is {described(text)}; expected text.")
    return PruningPlan.from_json(text)
