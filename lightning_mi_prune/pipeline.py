"""The pipeline: rank, allocate, compensate, reconstruct; for the callback and prune() alike."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from typing import Any, get_args

import torch
from torch import nn

from lightning_mi_prune.allocation.allocate import allocate
from lightning_mi_prune.allocation.budget import Budget, check_reach
from lightning_mi_prune.allocation.classes import (
    WidthClass,
    choices_of,
    classes_of,
    groups_left_whole,
)
from lightning_mi_prune.allocation.constraints import check_left, resolve_bounds
from lightning_mi_prune.allocation.costs import Costs, ParameterCosts
from lightning_mi_prune.allocation.latency import Device, LatencyCosts, LatencyTable
from lightning_mi_prune.allocation.macs import measure_macs
from lightning_mi_prune.allocation.measuring import cached_table, device_of, measure_table
from lightning_mi_prune.allocation.plan_file import check_bounds, check_present
from lightning_mi_prune.allocation.width_plan import PlannedWidths, WidthPlan
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.gradients import relevance_of
from lightning_mi_prune.core.empty_linear import parameters_of
from lightning_mi_prune.core.errors import PruningError, counted, shortened
from lightning_mi_prune.core.files import check_writable
from lightning_mi_prune.core.options import (
    Constraints,
    Importance,
    Latency,
    Reconstruction,
    Widths,
    check_choice,
)
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.core.running import (
    copy_networks,
    move_tensors,
)
from lightning_mi_prune.discovery.config_fields import check_described, configs_accepting
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    count_parameters,
    modules_with,
)
from lightning_mi_prune.graph.inputs import multiplied_with
from lightning_mi_prune.importance.criteria import Criterion, MutualInformation, criterion_of
from lightning_mi_prune.importance.head_rotation import check_rotations
from lightning_mi_prune.importance.ranking import RelevanceSource, rank_groups
from lightning_mi_prune.reconstruction.compensation import Decision, select_units
from lightning_mi_prune.reconstruction.least_squares import Sum, reconstruct_networks
from lightning_mi_prune.reconstruction.targets import (
    calls_of_whole_networks,
    layers_to_reconstruct,
)
from lightning_mi_prune.surgery.units import apply_plan

__all__ = [
    "Allocation",
    "PipelineOptions",
    "allocated",
    "carrying_out",
    "check",
    "costs_of",
    "decide",
    "reconstruct",
    "selected",
]

_log = logging.getLogger(__name__)
_SWEEPS = 2  # rankings of groups that cross, each given what the other keeps


@dataclass(frozen=True)
class PipelineOptions:
    """The options of all steps, for the callback, :func:`prune` and the command line alike.

    Args:
        budget: How small the model must get.
        widths: ``"global"`` lets all groups compete by what they lose for their cost,
            ``"uniform"`` keeps the same share of every group, ``"config"`` lets classes of groups
            compete for which the config of a Hugging Face network has one field: then plain
            ``AutoModel.from_pretrained`` opens the pruned model.
        importance: What decides which units go first.
        constraints: Fewest and most units of groups.
        latency: How milliseconds are measured.
        reconstruction: How weights that stay make up for what was removed.
        criterion: An object in place of the one that ``importance`` names.
        seed: Seed of the criterion ``"random"``.
        planned: Widths of a plan, in place of those that the budget would get.
    """

    budget: Budget
    widths: Widths = "global"
    importance: Importance = field(default_factory=Importance)
    constraints: Constraints = field(default_factory=Constraints)
    latency: Latency = field(default_factory=Latency)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    criterion: Criterion | None = None
    seed: int = 0
    planned: PlannedWidths | None = None

    def __post_init__(self) -> None:
        check_choice("widths", self.widths, get_args(Widths))

    @property
    def aim(self) -> str:
        """The budget, or the plan, in words."""
        return str(self.budget) if self.planned is None else self.planned.label


def carrying_out(
    plan: WidthPlan,
    options: PipelineOptions,
    chosen: Sequence[DependencyGroup],
    current: Mapping[str, int],
) -> PipelineOptions:
    """The options that cut the widths of a plan.

    Args:
        plan: The plan.
        options: The other options.
        chosen: The groups that it cuts.
        current: Present widths of all groups.

    Raises:
        PruningError: If the plan does not fit the model as it stands, or contradicts the options.
    """
    check_present(plan, current)
    check_bounds(plan, options.constraints, chosen, current)
    if options.widths not in ("global", plan.widths):
        raise PruningError(
            f"widths={options.widths!r}, but the plan was made with widths={plan.widths!r}; leave "
            "the option out, or plan again with it."
        )
    return replace(
        options,
        widths=plan.widths,
        constraints=Constraints(multiple=plan.multiple),
        planned=plan.carried_out(),
    )


@dataclass(frozen=True)
class Allocation:
    """The width of every group that may shrink, and the order in which its units go.

    Args:
        widths: Units that stay.
        rankings: Orders of all groups; None where no width changes.
        first: Orders that every budget begins with, of all groups as they are now.
        ranked_at: Widths, before these, for which groups were put in order again.
    """

    widths: Mapping[str, int]
    rankings: Mapping[str, Ranking] | None
    first: Mapping[str, Ranking] | None = None
    ranked_at: tuple[Mapping[str, int], ...] = ()


def check(
    options: PipelineOptions,
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    current: Mapping[str, int],
    *,
    writes: bool = True,
    names: bool = True,
) -> None:
    """Refuse what can be known to fail before calibration.

    Args:
        options: The options.
        module: The model as it stands.
        groups: All its groups.
        chosen: Those that may shrink.
        current: Present widths of all groups.
        writes: Whether this process measures latencies and writes their file; others may not even
            see its disk.
        names: Whether the log names groups that stay whole as no config holds their width.

    Raises:
        PruningError: If constraints contradict each other, the budget is out of reach, dimensions
            of heads may go without gradients, or the file of latencies is of another device or
            cannot be written.
    """
    budget, constraints = options.budget, options.constraints
    check_rotations(
        module,
        chosen,
        relevance=options.importance.relevance,
        keep_information=budget.keep_information,
    )
    now = {group.name: current[group.name] for group in chosen}
    classes = _classes(options, module, groups, chosen, current)
    if classes and writes and names:
        _log_left_whole(chosen, classes)
    if options.planned is not None:
        if options.widths == "config":
            _check_planned(options.planned, module, groups, chosen, current, classes)
        return
    if budget.measure == "parameters":
        check_reach(
            chosen,
            budget,
            costs=costs_of(options, module, groups, chosen, current, {}),
            widths=options.widths,
            classes=classes,
            current=now,
            constraints=constraints,
        )
        return
    bounds = resolve_bounds(constraints, chosen, now)
    if options.widths == "config":
        choices_of(classes, chosen, bounds, now, constraints.multiple)
    if budget.measure == "ms" and options.latency.table is not None and writes:
        _check_table(options.latency.table, device_of(module))


def _classes(
    options: PipelineOptions,
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    current: Mapping[str, int],
) -> tuple[WidthClass, ...]:
    """Groups that a config gives one width, where widths are to be such."""
    if options.widths != "config":
        return ()
    names = {group.name for group in chosen}
    return classes_of(groups, names, configs_accepting(module, groups, current))


def _log_left_whole(chosen: Sequence[DependencyGroup], classes: Sequence[WidthClass]) -> None:
    """Name the groups that stay whole since no field of a config holds their width."""
    whole = groups_left_whole(chosen, classes)
    if not whole:
        return
    tied = sorted({group.tie for group in whole if group.tie is not None})
    remedy = f" They change with {', '.join(tied)} if its kind, 'hidden', is cut." if tied else ""
    _log.warning(
        "widths='config' leaves %s whole: no field of a config holds their width alone: %s.%s",
        counted(len(whole), "group"),
        shortened([group.name for group in whole]),
        remedy,
    )


def costs_of(
    options: PipelineOptions,
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    current: Mapping[str, int],
    examples: Mapping[str, RecordedCall],
    tables: MutableMapping[Device, LatencyTable] | None = None,
) -> Costs:
    """What widths cost, in the measure of the budget.

    Args:
        options: The options.
        module: The model as it stands.
        groups: All its groups.
        chosen: Those that may shrink.
        current: Present widths of all groups.
        examples: One call of each network; only MACs and latency need it.
        tables: Latencies that were measured before and are in no file; new ones are added.

    Raises:
        PruningError: If there is no call to measure.
    """
    budget = options.budget
    if budget.kind == "target_parameters":  # of the whole module, whatever was cut of it
        fixed = sum(p.numel() for p in module.parameters()) - count_parameters(groups, current)
        return ParameterCosts(groups, fixed, current=current)
    if budget.measure == "parameters":
        return ParameterCosts(chosen)
    if not examples:
        raise PruningError(
            f"{budget} needs a call of the network to measure, but none was recorded; run "
            "validation first."
        )
    device = next(module.parameters()).device  # those of a checkpoint are on the CPU
    examples = {path: replace(c, **move_tensors(vars(c), device)) for path, c in examples.items()}
    if budget.measure == "MACs":
        return measure_macs(module, groups, examples, current)
    index = torch.zeros(options.latency.batch, dtype=torch.long)
    calls = {path: call.select(index) for path, call in examples.items()}

    # Dimensions of heads take long to measure: only where they may go, or some have gone.
    may = {group.name for group in chosen}
    timed = [g for g in groups if g.rotation is None or g.name in may or current[g.name] < g.size]

    def measure() -> LatencyTable:
        return measure_table(module, timed, calls, multiple=options.constraints.multiple)

    table = cached_table(options.latency.table, measure, device_of(module, calls), tables)
    return LatencyCosts(table, timed, current=current)


def decide(
    options: PipelineOptions,
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    current: PruningPlan,
    data: CalibrationData,
    *,
    progress: float = 1.0,
    kept: float = 1.0,
    tables: MutableMapping[Device, LatencyTable] | None = None,
) -> Decision | None:
    """Rank the units, allocate widths, select what stays and compensate; the model is only read.

    Args:
        options: The options.
        module: The model as it stands.
        groups: All its groups.
        chosen: Those that may shrink.
        current: The plan it carries.
        data: What calibration collected.
        progress: How far to go from the model as built to the budget.
        kept: Share of the information that earlier cuts left.
        tables: As for :func:`costs_of`.

    Returns:
        What to cut, or None where the model is that small already.

    Raises:
        PruningError: If the budget is out of reach, or there were too few samples.
    """
    found = allocated(
        options,
        module,
        groups,
        chosen,
        current,
        data,
        progress=progress,
        kept=kept,
        tables=tables,
    )
    if found.rankings is None:
        return None
    return selected(options, module, chosen, current, data, found.widths, found.rankings)


def selected(
    options: PipelineOptions,
    module: nn.Module,
    chosen: Sequence[DependencyGroup],
    current: PruningPlan,
    data: CalibrationData,
    widths: Mapping[str, int],
    rankings: Mapping[str, Ranking],
) -> Decision:
    """Select the units that stay at some widths, and compensate; the model is only read.

    Args:
        options: The options.
        module: The model as it stands.
        chosen: Groups that may shrink.
        current: The plan it carries.
        data: What calibration collected.
        widths: Units that stay of each of them.
        rankings: Their orders.

    Raises:
        PruningError: If there were too few samples.
    """
    criterion = options.criterion or criterion_of(options.importance, options.seed)
    return select_units(
        chosen,
        data.moments,
        parameters_of(module),
        widths,
        current,
        criterion,
        relevance=_relevance(options.importance, data),
        rankings=rankings,
        compensate=options.reconstruction.method != "none",
        ridge=(
            criterion if isinstance(criterion, MutualInformation) else MutualInformation()
        ).ridge,
    )


def allocated(
    options: PipelineOptions,
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    current: PruningPlan,
    data: CalibrationData,
    *,
    progress: float = 1.0,
    kept: float = 1.0,
    tables: MutableMapping[Device, LatencyTable] | None = None,
    rankings: Mapping[str, Ranking] | None = None,
) -> Allocation:
    """Rank the units and allocate widths; the model is only read.

    Args:
        options: The options.
        module: The model as it stands.
        groups: All its groups.
        chosen: Those that may shrink.
        current: The plan it carries.
        data: What calibration collected.
        progress: How far to go from the model as built to the budget.
        kept: Share of the information that earlier cuts left.
        tables: As for :func:`costs_of`.
        rankings: The first orders, where they are known from another budget.

    Raises:
        PruningError: If the budget is out of reach, or there were too few samples.
    """
    weights, planned = parameters_of(module), options.planned
    now = {name: len(units) for name, units in current.kept.items()}
    mine = {group.name: now[group.name] for group in chosen}
    criterion = options.criterion or criterion_of(options.importance, options.seed)
    relevance = _relevance(options.importance, data)
    compensate = options.reconstruction.method != "none"

    def rank(some: Sequence[DependencyGroup], **known: Any) -> dict[str, Ranking]:
        given = (data.moments, weights, current, criterion)
        return rank_groups(some, *given, relevance=relevance, compensate=compensate, **known)

    crossed = [group for group in chosen if multiplied_with(group) & set(mine)]
    ranked = options.widths != "uniform" or options.budget.kind == "keep_information"
    again = (relevance == "weights") + (_SWEEPS if crossed else 0) if ranked else 0
    steps: list[Mapping[str, int]] = []
    if planned is None:
        costs = costs_of(options, module, groups, chosen, now, data.examples, tables)
        allot = partial(
            allocate,
            chosen,
            options.budget,
            costs=costs,
            widths=options.widths,
            classes=_classes(options, module, groups, chosen, now),
            current=mine,
            constraints=options.constraints,
            progress=progress,
            kept=kept,
        )

    def share(known: Mapping[str, Ranking] | None) -> Mapping[str, int]:
        if planned is None:
            steps.append(allot(rankings=known))
        else:
            step = len(steps) if len(steps) < again else None
            multiple = options.constraints.multiple
            steps.append(planned.at(chosen, mine, multiple, progress=progress, step=step))
        return steps[-1]

    first = (rankings or rank(chosen)) if ranked else None
    found, widths = first, share(first)
    if found is not None and relevance == "weights":  # of which only some are kept above
        found = rank(chosen, widths=widths)
        widths = share(found)
    for _ in range(_SWEEPS if crossed else 0):
        if found is not None:
            crossed_kept = {g.name: found[g.name].kept(widths[g.name]) for g in crossed}
            found = {**found, **rank(crossed, crossed_kept=crossed_kept)}
            widths = share(found)
    widths = {name: min(width, mine[name]) for name, width in widths.items()}
    if widths == mine:
        return Allocation(widths, None, first)
    bounds = resolve_bounds(options.constraints, chosen, mine)
    emptied = {name for name, (_, most) in bounds.items() if not most}
    if planned is not None:
        emptied |= {name for name, width in planned.widths.items() if not width}
    check_left(groups, {**now, **widths}, emptied, options.aim)
    if options.widths == "config":
        check_described(module, groups, _at_widths(current, {**now, **widths}))
    if found is None:  # of all, so that what is lost can be set beside what there was
        found = rank(chosen, widths=widths)
    return Allocation(widths, found, first, tuple(steps[:-1]))


def _check_planned(
    planned: PlannedWidths,
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    current: Mapping[str, int],
    classes: Sequence[WidthClass],
) -> None:
    """Refuse widths of a plan that no config could describe, where one is to.

    Raises:
        PruningError: Naming groups that share a field and disagree, or what else differs.
    """
    for one in classes:
        shares = {
            group.name: Fraction(planned.widths[group.name], group.size) for group in one.members
        }
        if len(set(shares.values())) > 1:
            least, most = (end(shares, key=shares.__getitem__) for end in (min, max))
            raise PruningError(
                f"The plan keeps {planned.widths[least]} units of {least!r} and "
                f"{planned.widths[most]} of {most!r}, but one field of the config, {one}, holds "
                "both. Give them one width; or plan with widths='global'."
            )
    widths = {**current, **{group.name: planned.widths[group.name] for group in chosen}}
    sizes = {group.name: group.size for group in groups}
    check_described(module, groups, _at_widths(PruningPlan.full(sizes), widths))


def _at_widths(current: PruningPlan, widths: Mapping[str, int]) -> PruningPlan:
    """Some plan of these widths."""
    units = {name: tuple(range(width)) for name, width in widths.items()}
    return PruningPlan(current.sizes, {name: units[name] for name in current.sizes})


def reconstruct(
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    current: PruningPlan,
    decision: Decision,
    reconstruction: Reconstruction,
    data: CalibrationData,
    *,
    add: Sum = lambda sums: sums,
    rank: int = 0,
    world: int = 1,
) -> Decision:
    """Solve the layers that a decision leaves again, on a cut copy; the model itself is only run.

    Args:
        module: The model as it stands.
        groups: All its groups.
        current: The plan it carries.
        decision: What will be cut.
        reconstruction: Whether, and on how many positions.
        data: What calibration collected.
        add: Adds sums up over ranks.
        rank: This process.
        world: Processes that solve together, each on its own calls.

    Returns:
        The decision with the new weights.

    Raises:
        PruningError: If the stored sample is smaller than the number of unknowns.
    """
    found = layers_to_reconstruct(groups, current, decision.plan, decision.rotated)
    if reconstruction.method != "layerwise" or not found:
        return decision
    # Shared with the module but for what is cut: both are only run.
    shared = {id(parameter): parameter for parameter in module.parameters()}
    cut = copy_networks(module, modules_with(groups), shared)
    apply_plan(cut, groups, decision.plan, current=current, compensated=decision.compensated)
    solved = reconstruct_networks(
        module,
        cut,
        found,
        calls_of_whole_networks(data.ranks, groups, current, decision.plan),
        positions=reconstruction.stored_positions,
        add=add,
        rank=rank,
        world=world,
    )
    return replace(decision, compensated={**decision.compensated, **solved})


def _relevance(importance: Importance, data: CalibrationData) -> RelevanceSource:
    if importance.relevance != "gradient":
        return importance.relevance
    if not data.gradients:
        raise PruningError(
            "relevance='gradient' asks for training steps, but none were collected. Train first, "
            "give a loss, or use relevance='weights', which needs none."
        )
    return relevance_of(data.gradients)


def _check_table(path: str, here: Device) -> None:
    """Refuse a file of another device, and one that could not be written after minutes of work."""
    if not os.path.isfile(path):  # Path.is_file may raise
        check_writable(path, "The latency table")
        return
    table = LatencyTable.load(path)
    cast = table.device.dtype in ("bfloat16", "float16")  # calls will tell
    table.check_device(replace(here, dtype=table.device.dtype) if cast else here)
