"""RECORD   Plan: which positions survive on each axis, counted in the model as it was built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from lightning_mi_prune.errors import PruningError

__all__ = ["CONFIG_FIELD", "Plan", "recorded_plan"]

CONFIG_FIELD = "pruning_plan"

_VERSION = 1
_LARGEST_AXIS = 2**24
_LARGEST_TEXT = 64 * 2**20  # a plan is a few hundred kB; anything near this is not a plan


@dataclass(frozen=True)
class Plan:
    """Which positions survive on each axis, in the numbering of the model as it was built.

    Because the numbering never changes, a fresh model and the latest plan give the pruned model,
    however many cuts led there.

    Args:
        sizes: Size of every axis as built, by axis name.
        kept: Surviving positions of every axis, strictly increasing, by axis name.

    Raises:
        PruningError: If the two name different axes, or a position is missing, repeated or outside.

    Example:
        >>> plan = Plan(sizes={"ffn": 4, "heads": 2}, kept={"ffn": (0, 2, 3), "heads": (1,)})
        >>> plan.width("ffn")
        3
        >>> Plan.from_json(plan.to_json()) == plan
        True
    """

    sizes: Mapping[str, int]
    kept: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if set(self.sizes) != set(self.kept):
            odd = sorted(set(self.sizes) ^ set(self.kept))
            raise PruningError(f"A plan needs a size and survivors for each axis; check {odd}.")
        for name, size in self.sizes.items():
            _check_axis(name, size, self.kept[name])
        names = sorted(self.sizes)
        object.__setattr__(self, "sizes", MappingProxyType({n: self.sizes[n] for n in names}))
        object.__setattr__(self, "kept", MappingProxyType({n: tuple(self.kept[n]) for n in names}))

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, (dict(self.sizes), dict(self.kept))

    @classmethod
    def full(cls, sizes: Mapping[str, int]) -> Plan:
        """The plan that keeps everything.

        Example:
            >>> Plan.full({"ffn": 3}).kept["ffn"]
            (0, 1, 2)
        """
        return cls(sizes=sizes, kept={name: tuple(range(size)) for name, size in sizes.items()})

    def width(self, name: str) -> int:
        """Number of positions that survive on the axis ``name``."""
        return len(self.kept[name])

    @property
    def is_full(self) -> bool:
        """Whether nothing is removed."""
        return all(self.width(name) == size for name, size in self.sizes.items())

    def then(self, later: Plan) -> Plan:
        """Compose with a later plan over the same or fewer axes; two cuts are one plan.

        Raises:
            PruningError: If ``later`` brings back a position that this plan removed.

        Example:
            >>> first = Plan({"ffn": 4}, {"ffn": (0, 1, 3)})
            >>> first.then(Plan({"ffn": 4}, {"ffn": (1, 3)})).kept["ffn"]
            (1, 3)
        """
        for name in later.sizes:
            if name not in self.sizes or later.sizes[name] != self.sizes[name]:
                raise PruningError(
                    f"Axis {name!r} of size {later.sizes[name]} is not in the earlier plan "
                    f"(which has {dict(self.sizes)}); plans compose only over the same model."
                )
            back = sorted(set(later.kept[name]) - set(self.kept[name]))
            if back:
                raise PruningError(
                    f"The later plan keeps positions {back[:8]} of axis {name!r}, which were "
                    "already removed; expected a subset of what is left."
                )
        return Plan(self.sizes, {**self.kept, **later.kept})

    def positions_in(self, current: Plan) -> dict[str, tuple[int, ...]]:
        """Where this plan's survivors stand in a model that already carries ``current``.

        Example:
            >>> now = Plan({"ffn": 4}, {"ffn": (0, 2, 3)})
            >>> Plan({"ffn": 4}, {"ffn": (0, 3)}).positions_in(now)
            {'ffn': (0, 2)}
        """
        current.then(self)
        places = {n: {p: i for i, p in enumerate(current.kept[n])} for n in self.kept}
        return {n: tuple(places[n][p] for p in kept) for n, kept in self.kept.items()}

    def under(self, prefix: str) -> Plan:
        """The part of the plan below the module path ``prefix``, named from there."""
        dot = f"{prefix}." if prefix else ""
        names = [name for name in self.sizes if name.startswith(dot)]
        cut = len(dot)
        return Plan({n[cut:]: self.sizes[n] for n in names}, {n[cut:]: self.kept[n] for n in names})

    def prefixed(self, prefix: str) -> Plan:
        """The same plan with every axis named from a module that holds this one at ``prefix``."""
        dot = f"{prefix}." if prefix else ""
        return Plan(
            {dot + n: s for n, s in self.sizes.items()}, {dot + n: k for n, k in self.kept.items()}
        )

    def digest(self) -> str:
        """SHA-256 of the plan, to compare plans across processes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical compact JSON; equal plans give equal text."""
        body = {
            "version": _VERSION,
            "sizes": dict(self.sizes),
            "kept": {name: list(kept) for name, kept in self.kept.items()},
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan from untrusted text.

        Raises:
            PruningError: If the text is not a plan of a known version.
        """
        if len(text) > _LARGEST_TEXT:
            raise PruningError(f"A plan of {len(text)} characters; expected under {_LARGEST_TEXT}.")
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PruningError(f"The plan is not valid JSON ({error}); was it edited?") from error
        if not isinstance(body, dict) or body.get("version") != _VERSION:
            found = body.get("version") if isinstance(body, dict) else type(body).__name__
            raise PruningError(f"Plan version {found!r}; this package reads version {_VERSION}.")
        sizes, kept = body.get("sizes"), body.get("kept")
        if not isinstance(sizes, dict) or not isinstance(kept, dict):
            raise PruningError("A plan needs the objects 'sizes' and 'kept'; was it edited?")
        for name, positions in kept.items():
            if not isinstance(positions, list):
                raise PruningError(f"Axis {name!r} keeps {positions!r}; expected a list of ints.")
        return cls(sizes=sizes, kept={name: tuple(p) for name, p in kept.items()})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_axis(name: str, size: int, kept: tuple[int, ...]) -> None:
    if not _is_count(size) or not 1 <= size <= _LARGEST_AXIS:
        raise PruningError(
            f"Axis {name!r} has size {size!r}; expected a whole number from 1 to {_LARGEST_AXIS}."
        )
    if not kept:
        raise PruningError(f"Axis {name!r} keeps no position; expected at least one of its {size}.")
    if not all(_is_count(p) and 0 <= p < size for p in kept):
        bad = next(p for p in kept if not _is_count(p) or not 0 <= p < size)
        raise PruningError(f"Axis {name!r} keeps position {bad!r}; expected 0 to {size - 1}.")
    if any(a >= b for a, b in pairwise(kept)):
        raise PruningError(f"Axis {name!r}: kept positions must be strictly increasing.")


def recorded_plan(network: object) -> Plan | None:
    """The plan recorded in ``network.config``, or None for a network that was never cut.

    The config of a Hugging Face model is saved and loaded with it; so is the plan.

    Raises:
        PruningError: If the record is not a plan.
    """
    text = getattr(getattr(network, "config", None), CONFIG_FIELD, None)
    if text is None:
        return None
    if not isinstance(text, str):
        raise PruningError(f"config.{CONFIG_FIELD} is a {type(text).__name__}; expected text.")
    return Plan.from_json(text)
