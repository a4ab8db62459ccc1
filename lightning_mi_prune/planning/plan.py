"""plan: what a cut would leave, for several budgets side by side; nothing changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from torch import nn
from typing_extensions import Unpack

from lightning_mi_prune.allocation.budget import Budget, budget_of
from lightning_mi_prune.allocation.costs import Costs
from lightning_mi_prune.allocation.latency import Device, LatencyTable
from lightning_mi_prune.allocation.width_plan import (
    PlannedBudget,
    PlannedGroup,
    PlannedSize,
    WidthPlan,
    budget_label,
)
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Reconstruction
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.core.spilling import spilling
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.pipeline import PipelineOptions, allocated, costs_of
from lightning_mi_prune.pruner import PruneOptions, calibrated

__all__ = [
    "BUDGETS",
    "LOSS_UNITS",
    "plan",
    "propose",
    "side_by_side",
    "without_solving",
]

BUDGETS = (0.5, 0.75, 0.9)
"""Shares of the prunable parameters that go, side by side, unless others are asked for."""

LOSS_UNITS = {
    "gradient": "nats per example",
    "weights": "squared error of the layers above, as weights kept there count it",
    None: "squared error of the layers above",
}
"""Unit of expected losses, by what relevance is."""


def plan(
    model: nn.Module,
    data: Any,
    budgets: Sequence[float | Budget] = BUDGETS,
    **options: Unpack[PruneOptions],
) -> WidthPlan:
    """What :func:`prune` would leave of a module, for several budgets; nothing is changed.

    The module is calibrated, its units are ranked and the widths of all groups chosen for every
    budget. The plan can be printed, written as YAML, edited, and carried out: ``plan=`` of
    :func:`prune` and of the callback, which calibrate again and cut to its widths. As it is, it
    makes the cut of ``prune(model, data, budgets[0], **options)``.

    Args:
        model: The module, trained.
        data: Calibration data, as for :func:`prune`.
        budgets: Shares of the prunable parameters to remove, or budgets of any measure. The first
            is the one to be carried out. Those out of reach are left out, with the reason.
        options: Those of :func:`prune`, but for its budgets and optimizers. With
            ``latency=Latency(table=...)`` milliseconds are predicted, too.

    Raises:
        PruningError: As :func:`prune`, for the first budget.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> batches = [torch.randn(500, 8) for _ in range(4)]
        >>> found = plan(net, batches, loss=lambda m, x: m(x).square().mean())
        >>> {column.label: dict(column.widths) for column in found.columns}
        {'50%': {'0.ffn': 32}, '75%': {'0.ffn': 16}}
        >>> [*found.left_out], net[0].out_features  # 90% of them would be all neurons
        (['90%'], 64)
    """
    columns = side_by_side(budgets)
    solving = without_solving(options.get("reconstruction") or Reconstruction())
    options = {**options, "reconstruction": solving}
    known, unmet = PlanTracker.held_by(model), dict[str, str]()
    with calibrated(model, data, columns, unmet=unmet, **options) as found:
        with spilling(found.memory == "low"):
            planned = propose(
                found.options,
                model,
                found.tracker.groups,
                found.chosen,
                found.plan,
                found.collected,
            )
        if known is None:
            found.tracker.close()
    seconds = {**found.seconds, **planned.seconds}
    return replace(planned, left_out={**unmet, **planned.left_out}, seconds=seconds)


def side_by_side(budgets: Sequence[float | Budget]) -> list[Budget]:
    """Budgets from shares and budgets, each once, in their order.

    Raises:
        PruningError: If there are none, or one is out of range.

    Example:
        >>> [str(budget) for budget in side_by_side([0.5, Budget(target_macs=9), 0.5])]
        ['sparsity=0.5', 'target_macs=9']
    """
    if isinstance(budgets, (int, float, str, Budget)) or not budgets:
        raise PruningError(
            f"budgets={budgets!r:.60}; expected a list of one share or more, such as "
            "[0.5, 0.75, 0.9]."
        )
    found = [each if isinstance(each, Budget) else budget_of(each) for each in budgets]
    return list({budget_label(budget): budget for budget in found}.values())


def without_solving(reconstruction: Reconstruction) -> Reconstruction:
    """The option where no weights are wanted: no inputs are stored; widths are the same.

    Example:
        >>> without_solving(Reconstruction()).stored_positions
        0
    """
    if reconstruction.method == "layerwise":
        return replace(reconstruction, method="compensation")
    return reconstruction


def propose(
    options: Sequence[PipelineOptions],
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    current: PruningPlan,
    data: CalibrationData,
    *,
    tables: MutableMapping[Device, LatencyTable] | None = None,
    kept: float = 1.0,
) -> WidthPlan:
    """Rank units and choose widths for several budgets; the model is only read.

    Args:
        options: Those of every budget; they differ in nothing else.
        module: The model as it stands.
        groups: All its groups.
        chosen: Those that may shrink.
        current: The plan it carries.
        data: What calibration collected.
        tables: Latencies that were measured before and are in no file; new ones are added.
        kept: Share of the information that earlier cuts left.

    Raises:
        PruningError: If the first budget is out of reach, or there were too few samples.
    """
    started, first = perf_counter(), options[0]
    now = current.widths
    mine = {group.name: now[group.name] for group in chosen}
    rankings: Mapping[str, Ranking] | None = None
    columns, left_out = list[PlannedBudget](), dict[str, str]()
    known = (module, groups, chosen, current, data)
    tables = {} if tables is None else tables
    sizes = _Sizes(options, module, groups, chosen, now, data, tables)
    for each in options:
        try:
            found = allocated(*(each, *known), tables=tables, kept=kept, rankings=rankings)
        except PruningError as error:
            if each is first:
                raise
            left_out[budget_label(each.budget)] = str(error)
            continue
        rankings, ranked = found.first, found.rankings or {}
        losses = {n: float(f"{r.lost(found.widths[n])[0]:.4g}") for n, r in ranked.items()}
        steps = tuple(
            {name: width for name, width in step.items() if width != found.widths[name]}
            for step in found.ranked_at
        )
        columns.append(
            PlannedBudget(
                each.budget,
                found.widths,
                {name: losses.get(name, 0.0) for name in mine},
                sizes.at({**now, **found.widths}),
                steps if any(steps) else (),
            )
        )
    pins = first.constraints.pins
    return WidthPlan(
        model=type(module).__name__,
        groups=tuple(
            PlannedGroup(
                name=group.name,
                kind=group.kind,
                built=group.size,
                now=now[group.name],
                parameters=sizes.of(group.name),
                pin=columns[0].widths[group.name]
                if any(re.search(expression, group.name) for expression in pins)
                else None,
            )
            for group in chosen
        ),
        columns=tuple(columns),
        cut=columns[0].label,
        widths=first.widths,
        multiple=first.constraints.multiple,
        size=sizes.at(now),
        loss_unit=LOSS_UNITS[first.importance.relevance],
        left_out=left_out,
        seconds={"ranking": perf_counter() - started},
    )


class _Sizes:
    """Sizes of a model at any widths, in every measure that can be had.

    Args:
        options: Those of every budget.
        module: The model as it stands.
        groups: All its groups.
        chosen: Those that may shrink.
        current: Present widths of all groups.
        data: What calibration collected.
        tables: Latencies that were measured before.
    """

    def __init__(
        self,
        options: Sequence[PipelineOptions],
        module: nn.Module,
        groups: Sequence[DependencyGroup],
        chosen: Sequence[DependencyGroup],
        current: Mapping[str, int],
        data: CalibrationData,
        tables: MutableMapping[Device, LatencyTable],
    ) -> None:
        def costs(budget: Budget) -> Costs:
            asked = replace(options[0], budget=budget)
            return costs_of(asked, module, groups, chosen, current, data.examples, tables)

        timed = any(each.budget.measure == "ms" or each.latency.table for each in options)
        self._current = current
        self._parameters = costs(Budget(target_parameters=1))
        self._macs = costs(Budget(target_macs=1)) if data.examples else None
        self._ms = costs(Budget(target_latency_ms=1.0)) if timed else None

    def at(self, widths: Mapping[str, int]) -> PlannedSize:
        """The size of the model at some widths of all groups."""
        return PlannedSize(
            parameters=round(self._parameters.total(widths)),
            macs=None if self._macs is None else round(self._macs.total(widths)),
            ms=None if self._ms is None else float(f"{self._ms.total(widths):.4g}"),
        )

    def of(self, name: str) -> int:
        """Parameters that go with all units of a group, the others as they are."""
        return round(self._parameters.savings(name, self._current, [0])[0])
