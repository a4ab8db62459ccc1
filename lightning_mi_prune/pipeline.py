"""The pipeline: rank, allocate, compensate, reconstruct; for the callback and prune() alike."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
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
from lightning_mi_prune.importance.stability import (
    Agreement,
    agreement_of_halves,
    warn_of_chance,
)
from lightning_mi_prune.reconstruction.compensation import Decision, select_units
from lightning_mi_prune.reconstruction.least_squares import Sum, reconstruct_networks
from lightning_mi_prune.reconstruction.targets import (
    calls_of_whole_networks,
    layers_to_reconstruct,
)
from lightning_mi_prune.surgery.units import apply_plan

__all__ = [
    "PipelineOptions",
    "check",
    "costs_of",
    "decide",
    "reconstruct",
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
    """

    budget: Budget
    widths: Widths = "global"
    importance: Importance = field(default_factory=Importance)
    constraints: Constraints = field(default_factory=Constraints)
    latency: Latency = field(default_factory=Latency)
    reconstruction: Reconstruction = field(default_factory=Reconstruction)
    criterion: Criterion | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("widths", self.widths, get_args(Widths))


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
    weights = parameters_of(module)
    now = {name: len(units) for name, units in current.kept.items()}
    mine = {group.name: now[group.name] for group in chosen}
    costs = costs_of(options, module, groups, chosen, now, data.examples, tables)
    criterion = options.criterion or criterion_of(options.importance, options.seed)
    relevance = _relevance(options.importance, data)
    compensate = options.reconstruction.method != "none"

    def rank(some: Sequence[DependencyGroup], **known: Any) -> dict[str, Ranking]:
        given = (data.moments, weights, current, criterion)
        return rank_groups(some, *given, relevance=relevance, compensate=compensate, **known)

    share = partial(
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
    rankings: dict[str, Ranking] | None = None
    if options.widths != "uniform" or options.budget.kind == "keep_information":
        rankings = rank(chosen)
    widths = share(rankings=rankings)
    if rankings is not None and relevance == "weights":  # of which only some are kept above
        rankings = rank(chosen, widths=widths)
        widths = share(rankings=rankings)
    crossed = [group for group in chosen if multiplied_with(group) & set(mine)]
    for _ in range(_SWEEPS if crossed else 0):
        if rankings is not None:
            crossed_kept = {g.name: rankings[g.name].kept(widths[g.name]) for g in crossed}
            rankings = {**rankings, **rank(crossed, crossed_kept=crossed_kept)}
            widths = share(rankings=rankings)
    widths = {name: min(width, mine[name]) for name, width in widths.items()}
    if widths == mine:
        return None
    bounds = resolve_bounds(options.constraints, chosen, mine)
    emptied = {name for name, (_, most) in bounds.items() if not most}
    check_left(groups, {**now, **widths}, emptied, options.budget)
    if options.widths == "config":
        units = {name: tuple(range(width)) for name, width in {**now, **widths}.items()}
        check_described(module, groups, PruningPlan(current.sizes, units))
    if rankings is None:  # of all, so that what is lost can be set beside what there was
        rankings = rank(chosen, widths=widths)
    agreement = _agreement(options, module, chosen, current, data, widths)
    found = select_units(
        chosen,
        data.moments,
        weights,
        widths,
        current,
        criterion,
        relevance=relevance,
        rankings=rankings,
        compensate=compensate,
        ridge=(
            criterion if isinstance(criterion, MutualInformation) else MutualInformation()
        ).ridge,
    )
    return replace(found, agreement=agreement)


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


def _agreement(
    options: PipelineOptions,
    module: nn.Module,
    chosen: Sequence[DependencyGroup],
    current: PruningPlan,
    data: CalibrationData,
    widths: Mapping[str, int],
) -> dict[str, Agreement]:
    """How far two halves of the data agree on the units that stay; nothing without halves."""
    if not data.half:
        return {}
    found = agreement_of_halves(
        chosen,
        data.moments,
        data.half,
        parameters_of(module),
        current,
        options.criterion or criterion_of(options.importance, options.seed),
        widths,
        relevance=_relevance(options.importance, data),
        compensate=options.reconstruction.method != "none",
    )
    warn_of_chance(found)
    return found


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
