"""WidthPlan: the widths that a cut would leave, for several budgets side by side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.constraints import step_of
from lightning_mi_prune.core.errors import PruningError, number
from lightning_mi_prune.core.options import Widths
from lightning_mi_prune.graph.groups import DependencyGroup

__all__ = [
    "PlannedBudget",
    "PlannedGroup",
    "PlannedSize",
    "PlannedWidths",
    "WidthPlan",
    "budget_label",
]


def budget_label(budget: Budget) -> str:
    """Name of a budget's column.

    Example:
        >>> budget_label(Budget(0.75)), budget_label(Budget(target_macs=2000000))
        ('75%', '2000000 MACs')
        >>> budget_label(Budget(target_latency_ms=1.5)), budget_label(Budget(keep_information=0.9))
        ('1.5 ms', '90% information')
    """
    share = f"{round(100 * budget.amount, 9):.12g}%"
    return {
        "sparsity": share,
        "target_parameters": f"{budget.amount} parameters",
        "target_macs": f"{budget.amount} MACs",
        "target_latency_ms": f"{budget.amount:g} ms",
        "keep_information": f"{share} information",
    }[budget.kind]


@dataclass(frozen=True)
class PlannedSize:
    """Size of a model.

    Args:
        parameters: Parameters of the whole module.
        macs: Multiply-accumulates of one example; None where no call was recorded.
        ms: Milliseconds of one forward pass, predicted from a latency table; None without one.
    """

    parameters: int | None = None
    macs: int | None = None
    ms: float | None = None


@dataclass(frozen=True)
class PlannedGroup:
    """One group of the model that may shrink.

    Args:
        name: Path of the group.
        kind: Kind of unit.
        built: Units of the model as built.
        now: Units when the plan was made.
        parameters: Parameters that would go with all its units, the other groups as they are.
        pin: Units that stay whatever the budget; None leaves the choice to the columns.
        exclude: Whether it is left alone.
    """

    name: str
    kind: str
    built: int
    now: int
    parameters: int | None = None
    pin: int | None = None
    exclude: bool = False


@dataclass(frozen=True)
class PlannedWidths:
    """Widths that are cut as they are, instead of those that a budget would get.

    Args:
        label: What they are, for messages.
        widths: Units that stay, by group.
        ranked_at: Widths, where they are others, for which the groups were put in order, in the
            order in which that was done: of what is above a group, or of the partners of heads.
    """

    label: str
    widths: Mapping[str, int]
    ranked_at: tuple[Mapping[str, int], ...] = ()

    def at(
        self,
        groups: Sequence[DependencyGroup],
        current: Mapping[str, int],
        multiple: int,
        *,
        progress: float = 1.0,
        step: int | None = None,
    ) -> dict[str, int]:
        """The widths, or those of a share of the way from the model as built to them.

        Args:
            groups: The groups.
            current: Their present widths, which are never exceeded.
            multiple: Widths on the way are multiples of this.
            progress: How far to go, above 0 and up to 1.
            step: Which of the widths that groups were put in order for; None for those to cut.

        Example:
            >>> group = DependencyGroup("ffn", "ffn", 64, (), ("down",))
            >>> planned = PlannedWidths("plan", {"ffn": 20})
            >>> [planned.at([group], {"ffn": 64}, 8, progress=p)["ffn"] for p in (0.25, 0.5, 1)]
            [56, 48, 20]
        """
        widths = {group.name: self.widths[group.name] for group in groups}
        if progress < 1:
            for group in groups:
                by, least = step_of(group, multiple), widths[group.name]
                on_the_way = group.size - progress * (group.size - least)
                widths[group.name] = max(least, by * math.ceil(on_the_way / by - 1e-9))
        elif step is not None and step < len(self.ranked_at):
            widths |= {name: w for name, w in self.ranked_at[step].items() if name in widths}
        return {name: min(width, current[name]) for name, width in widths.items()}


@dataclass(frozen=True)
class PlannedBudget:
    """One column of a plan.

    Args:
        budget: How small the model gets.
        widths: Units that stay, by group.
        loss: Expected rise of the loss by group, in the unit of the plan.
        size: Size of the model.
        ranked_at: As of :class:`PlannedWidths`.
    """

    budget: Budget
    widths: Mapping[str, int]
    loss: Mapping[str, float] = field(default_factory=dict)
    size: PlannedSize = PlannedSize()
    ranked_at: tuple[Mapping[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("widths", "loss"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        steps = tuple(MappingProxyType(dict(step)) for step in self.ranked_at)
        object.__setattr__(self, "ranked_at", steps)

    def __reduce__(self) -> tuple[Any, ...]:
        steps = tuple(map(dict, self.ranked_at))
        return PlannedBudget, (self.budget, dict(self.widths), dict(self.loss), self.size, steps)

    @property
    def label(self) -> str:
        """Name of the column."""
        return budget_label(self.budget)

    @property
    def total_loss(self) -> float:
        """Expected rise of the loss of all groups together."""
        return float(f"{sum(self.loss.values()):.4g}")


@dataclass(frozen=True)
class WidthPlan:
    """What a cut would leave of a model: widths of every group, for several budgets.

    ``print`` shows it as tables; :func:`plan_file.write_plan` writes it as YAML that can be edited.
    Which units stay is decided again when it is carried out, from calibration at that time.

    Args:
        model: Class of the model.
        groups: Its groups that may shrink.
        columns: The budgets, at least one.
        cut: Label of the column that is carried out.
        widths: How widths were chosen.
        multiple: Widths of neurons are multiples of this.
        size: Size of the model when the plan was made.
        loss_unit: Unit of the expected losses.
        left_out: Budgets that are out of reach, with the reason.
        seconds: Time spent on calibration, gradients and ranking; not part of the file.

    Raises:
        PruningError: If two columns have one label, or ``cut`` is none of them.

    Example:
        >>> groups = (PlannedGroup("ffn", "ffn", built=64, now=64),)
        >>> column = PlannedBudget(Budget(0.5), {"ffn": 32}, {"ffn": 0.125}, PlannedSize(900, 800))
        >>> plan = WidthPlan("Net", groups, (column,), cut="50%", size=PlannedSize(1500, 1400))
        >>> plan.carried_out().widths
        {'ffn': 32}
        >>> print(plan)
        Net: what a cut would leave
               parameters   MACs  expected loss
        now         1,500  1,400
        50% *         900    800          0.125
        <BLANKLINE>
        group  kind  now  50%
        ffn    ffn    64   32
    """

    model: str
    groups: tuple[PlannedGroup, ...]
    columns: tuple[PlannedBudget, ...]
    cut: str
    widths: Widths = "global"
    multiple: int = 8
    size: PlannedSize = PlannedSize()
    loss_unit: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict, compare=False)
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        labels = [column.label for column in self.columns]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise PruningError(f"A plan has {twice[0]!r} twice; expected every budget once.")
        self.column(self.cut)

    def column(self, label: str) -> PlannedBudget:
        """The column of a label.

        Raises:
            PruningError: If there is none.
        """
        for column in self.columns:
            if column.label == label:
                return column
        labels = ", ".join(repr(column.label) for column in self.columns)
        raise PruningError(
            f"cut: {label!r:.60} is no budget of the plan; expected one of {labels}."
        )

    def for_budget(self, budget: Budget | None) -> WidthPlan:
        """The same plan, to be carried out for another of its budgets; None changes nothing.

        Raises:
            PruningError: If the plan has no column for it.
        """
        if budget is None or budget == self.column(self.cut).budget:
            return self
        if all(column.budget != budget for column in self.columns):
            labels = ", ".join(column.label for column in self.columns)
            raise PruningError(
                f"{budget} is no budget of the plan, which has {labels}. Leave the budget out, "
                "choose one of these, or plan again with it."
            )
        return replace(self, cut=budget_label(budget))

    def carried_out(self) -> PlannedWidths:
        """The widths of the column to cut, with pins, without groups that are left alone."""
        column, widths = self.column(self.cut), {}
        for group in self.groups:
            if not group.exclude:
                pin = group.pin
                widths[group.name] = column.widths[group.name] if pin is None else pin
        found = PlannedWidths(f"{column.label} of the plan", widths, column.ranked_at)
        digest = hashlib.sha256(repr(sorted(widths.items())).encode()).hexdigest()[:8]
        return replace(found, label=f"{found.label} ({digest})")

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return {
            "model": self.model,
            "cut": self.cut,
            "widths": self.widths,
            "multiple": self.multiple,
            "loss_unit": self.loss_unit,
            "now": asdict(self.size),
            "groups": [asdict(group) for group in self.groups],
            "budgets": [
                {
                    "label": column.label,
                    "budget": {column.budget.kind: column.budget.amount},
                    **asdict(column.size),
                    "expected_loss": column.total_loss,
                    "widths": dict(column.widths),
                    "loss": dict(column.loss),
                }
                for column in self.columns
            ],
            "left_out": dict(self.left_out),
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        lines = [f"{self.model}: what a cut would leave"]
        lines += _aligned(*self.totals(), left=1)
        lines += ["", *_aligned(*self.rows(), left=2)]
        notes = [f"{label} is left out: {reason}" for label, reason in self.left_out.items()]
        return "\n".join([*lines, *notes])

    def totals(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of the table of sizes."""
        head = ["", "parameters", "MACs", "ms", "expected loss"]
        rows = [["now", *_sizes(self.size), ""]]
        for column in self.columns:
            mark = " *" if column.label == self.cut else ""
            loss = number(column.total_loss) if column.loss else ""
            rows.append([column.label + mark, *_sizes(column.size), loss])
        used = [i for i, name in enumerate(head) if not name or any(row[i] for row in rows)]
        return [head[i] for i in used], [[row[i] for i in used] for row in rows]

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of the table of groups; names without the path that all share."""
        shared = _shared_path([group.name for group in self.groups])
        rows = []
        for group in self.groups:
            note = "stays" if group.exclude else "" if group.pin is None else f"pin {group.pin}"
            widths = [str(column.widths.get(group.name, "")) for column in self.columns]
            rows.append([group.name[len(shared) :], group.kind, str(group.now), *widths, note])
        head = ["group", "kind", "now", *(column.label for column in self.columns), "note"]
        if not any(row[-1] for row in rows):
            return head[:-1], [row[:-1] for row in rows]
        return head, rows


def _sizes(size: PlannedSize) -> list[str]:
    parameters, macs = (None if n is None else f"{n:,}" for n in (size.parameters, size.macs))
    return [parameters or "", macs or "", "" if size.ms is None else f"{size.ms:.3g}"]


def _shared_path(names: Sequence[str]) -> str:
    """The path that all names begin with, with a dot at its end."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for each in zip(*parts, strict=False):
        if len(set(each)) > 1:
            break
        shared.append(each[0])
    return "".join(f"{part}." for part in shared) if len(names) > 1 else ""


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    table = [head, *rows]
    sizes = [max(len(row[i]) for row in table) for i in range(len(head))]
    lines = []
    for row in table:
        cells = [
            text.ljust(size) if i < left else text.rjust(size)
            for i, (text, size) in enumerate(zip(row, sizes, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
