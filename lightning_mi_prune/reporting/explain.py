"""Why the units of a group stay or went, as a record and as a short text."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.importance.stability import Agreement
from lightning_mi_prune.reporting.records import Cut, GroupCut

__all__ = [
    "Explanation",
    "UnitExplanation",
    "explain_group",
]

_SHOWN = 12  # units in the text


@dataclass(frozen=True)
class UnitExplanation:
    """One unit of a group.

    Args:
        unit: The unit, as numbered when built.
        epoch: Epoch of the cut that removed it; None where it stays.
        place: Its place in the order of that cut, from 1; of a unit that stays, in the last cut.
        score: Information with the layer above, in nats, that goes with it, given the units that
            are still there when its turn comes.
        loss: Expected rise of the loss, in nats per example, once it and all before it are gone.
        made_up: Share of its variance that the kept units predict, with which the layer above goes
            on; None where it stays or nothing makes up for it.
        best: The kept unit that predicts most of it.
    """

    unit: int
    epoch: int | None
    place: int
    score: float
    loss: float
    made_up: float | None = None
    best: int | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it stays."""
        return self.epoch is None


@dataclass(frozen=True)
class Explanation:
    """The units of a group in the order in which they went, or would go.

    Args:
        group: Name of the group.
        kind: Kind of its units.
        before: Units before the first cut.
        after: Units that stay.
        information: Share of the information with the layer above that the last cut of the group
            left.
        units: All units that were ranked, the first to go first.
        agreement: How far two halves of the calibration data agree on the last cut.
    """

    group: str
    kind: str
    before: int
    after: int
    information: float
    units: tuple[UnitExplanation, ...]
    agreement: Agreement | None = None

    @property
    def removed(self) -> tuple[UnitExplanation, ...]:
        """The units that went."""
        return tuple(unit for unit in self.units if not unit.is_kept)

    @property
    def kept(self) -> tuple[UnitExplanation, ...]:
        """The units that stay, the next to go first."""
        return tuple(unit for unit in self.units if unit.is_kept)

    def __str__(self) -> str:
        last = self.removed[-1] if self.removed else None
        lines = [
            f"{self.group}: {counted(self.after, 'unit')} of {self.before} stay (kind {self.kind})."
        ]
        if last is not None:
            lines.append(
                f"Removing {counted(len(self.removed), 'unit')} was expected to raise the loss by "
                f"{last.loss:.4g} nats per example; the last cut left {self.information:.1%} of "
                "the information with the layer above."
            )
        shares = [unit.made_up for unit in self.removed if unit.made_up is not None]
        if shares:
            lines.append(
                f"The kept units predict {sum(shares) / len(shares):.1%} of the variance of a "
                "removed one, on average; the layer above goes on with that."
            )
        if self.agreement is not None:
            found = self.agreement
            worth = "no better than chance" if found.is_chance else "chance"
            lines.append(
                f"Two halves of the calibration data agree on {found.share:.1%} of the kept units "
                f"({worth}: {found.chance:.1%})."
            )
        return "\n".join([*lines, "", *self._rows()])

    def _rows(self) -> list[str]:
        """A table of the last units that went and the next that would."""
        near = [*self.removed[-_SHOWN // 2 :], *self.kept[: _SHOWN // 2]]
        rows = [("unit", "", "nats", "loss", "made up", "mostly by")]
        for each in near:
            made = "" if each.made_up is None else f"{each.made_up:.1%}"
            best = "" if each.best is None else str(each.best)
            state = "stays" if each.is_kept else f"went {each.place}."
            numbers = (f"{each.score:.4g}", f"{each.loss:.4g}")
            rows.append((str(each.unit), state, *numbers, made, best))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(t.rjust(w) for t, w in zip(r, widths, strict=True)) for r in rows]
        left = len(self.units) - len(near)
        if left:
            lines.append(f"... and {counted(left, 'unit')} before and after; all are in .units")
        return [line.rstrip() for line in lines]


def explain_group(cuts: Sequence[Cut], name: str) -> Explanation:
    """The order of a group's units over all cuts, and what each of them cost.

    Args:
        cuts: All cuts, in order.
        name: Name of the group, or its end.

    Raises:
        PruningError: If no cut ranked such a group.
    """
    ranked = {g.name for cut in cuts for g in cut.groups if g.ranking is not None}
    full = _full_name(name, ranked)
    found = [(cut, g) for cut in cuts for g in cut.groups if g.name == full and g.ranking]
    units: list[UnitExplanation] = []
    for cut, group in found:
        units += _removed(cut, group)
    last = found[-1][1]
    units += [each for each in _in_order(last) if each.place > last.before - last.after]
    return Explanation(
        group=full,
        kind=last.kind,
        before=found[0][1].before,
        after=last.after,
        information=last.information_fraction,
        units=tuple(units),
        agreement=last.agreement,
    )


def _full_name(name: str, ranked: set[str]) -> str:
    if name in ranked:
        return name
    ends = [known for known in sorted(ranked) if known.endswith(f".{name}")]
    if len(ends) == 1:
        return ends[0]
    if not ranked:
        raise PruningError(
            f"No group {name!r} can be explained: the report has no cut that ranked units. Explain "
            "after the first cut."
        )
    near = ends or difflib.get_close_matches(name, sorted(ranked), 3, 0.3) or sorted(ranked)
    meant = "ends the names of several groups" if ends else "is no group that was ranked"
    raise PruningError(f"{name!r} {meant}; expected one such as {', '.join(map(repr, near[:3]))}.")


def _in_order(group: GroupCut) -> list[UnitExplanation]:
    """All units of a ranking, as if each stayed."""
    ranking = group.ranking
    if ranking is None:
        return []
    before = (0.0, *ranking.nats)
    rows = zip(ranking.order, ranking.loss, ranking.nats, before, strict=False)
    return [
        UnitExplanation(unit, None, place, float(f"{nats - earlier:.6g}"), loss)
        for place, (unit, loss, nats, earlier) in enumerate(rows, 1)
    ]


def _removed(cut: Cut, group: GroupCut) -> list[UnitExplanation]:
    made = {}
    if group.stand_ins is not None:
        known = group.stand_ins
        made = {u: (s, b) for u, s, b in zip(known.units, known.shares, known.best, strict=True)}
    gone = _in_order(group)[: group.before - group.after]
    return [
        UnitExplanation(
            each.unit,
            cut.epoch,
            each.place,
            each.score,
            each.loss,
            *made.get(each.unit, (None, None)),
        )
        for each in gone
    ]
