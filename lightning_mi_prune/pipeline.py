"""The pipeline: calibrate, rank, allocate, compensate, reconstruct; and all of it in one call."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mi_prune.allocation.allocate import allocate
from lightning_mi_prune.allocation.budget import Budget, budget_of, check_reach, sparsity_of
from lightning_mi_prune.allocation.classes import (
    WidthClass,
    choices_of,
    classes_of,
    groups_left_whole,
)
from lightning_mi_prune.allocation.constraints import check_left, resolve_bounds
from lightning_mi_prune.allocation.costs import Costs, ParameterCosts
from lightning_mi_prune.allocation.latency import Device, LatencyCosts, LatencyTable
from lightning_mi_prune.allocation.macs import macs_of_calls, measure_macs
from lightning_mi_prune.allocation.measuring import cached_table, device_of, measure_table
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.collect import (
    Forward,
    Loss,
    check_input,
    collect_activations,
    collect_gradients,
    explaining_failures,
    first_batches,
    run_forward,
    training_loss,
    try_forward,
    try_loss,
)
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.datasets import batches_of
from lightning_mi_prune.calibration.gradients import relevance_of
from lightning_mi_prune.calibration.memory import (
    Memory,
    choose_memory,
    is_large,
    memory_needs,
)
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.empty_linear import parameters_of
from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted, shortened
from lightning_mi_prune.core.files import check_writable
from lightning_mi_prune.core.options import (
    Calibration,
    Constraints,
    Importance,
    Latency,
    Reconstruction,
    Widths,
    check_choice,
)
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.core.running import (
    clone_batch,
    copy_networks,
    first_examples,
    move_tensors,
    run_batch,
    undisturbed,
)
from lightning_mi_prune.core.spilling import check_room, spilling
from lightning_mi_prune.discovery.config_fields import check_said, configs_accepting
from lightning_mi_prune.discovery.copies import structural_copy
from lightning_mi_prune.discovery.discover import discover_run
from lightning_mi_prune.graph.graph import (
    PruningGraph,
    check_within,
    choose_groups,
    modules_without_groups,
)
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    count_parameters,
    is_within,
    modules_with,
)
from lightning_mi_prune.graph.inputs import multiplied_with
from lightning_mi_prune.importance.criteria import Criterion, MutualInformation, criterion_of
from lightning_mi_prune.importance.head_rotation import check_rotations
from lightning_mi_prune.importance.ranking import RelevanceSource, rank_groups
from lightning_mi_prune.reconstruction.compensation import Decision, GroupInformation, select_units
from lightning_mi_prune.reconstruction.least_squares import Sum, reconstruct_networks
from lightning_mi_prune.reconstruction.targets import (
    calls_of_whole_networks,
    layers_to_reconstruct,
)
from lightning_mi_prune.surgery.batch_norm import reestimate_batch_norm
from lightning_mi_prune.surgery.optimizer_state import check_optimizers
from lightning_mi_prune.surgery.optimizers import update_optimizers
from lightning_mi_prune.surgery.tensors import parameters_in_files
from lightning_mi_prune.surgery.units import apply_plan, check_cuttable, revert_rewrites
from lightning_mi_prune.surgery.verification import (
    compiled_part,
    half_plan,
    held_elsewhere,
    parameters_in,
    verify_cut,
)

__all__ = [
    "PipelineOptions",
    "PruneResult",
    "check",
    "costs_of",
    "decide",
    "prune",
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
    if classes and writes:
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
    """Name the groups that stay whole since no field of a config says their width."""
    whole = groups_left_whole(chosen, classes)
    if not whole:
        return
    tied = sorted({group.tie for group in whole if group.tie is not None})
    remedy = f" They change with {', '.join(tied)} if its kind, 'hidden', is cut." if tied else ""
    _log.warning(
        "widths='config' leaves %s whole, since no field of a config says their width alone: %s.%s",
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
        check_said(module, groups, PruningPlan(current.sizes, units))
    if rankings is None:  # of all, so that what is lost can be set beside what there was
        rankings = rank(chosen, widths=widths)
    return select_units(
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


@dataclass(frozen=True)
class PruneResult:
    """What one call of :func:`prune` did.

    Args:
        plan: Units of every group that stay, with the order in which the others went.
        sparsity: Share of the prunable parameters that is gone, against the model as built; whole
            layers that went before do not count.
        parameters: Parameters of the module before and after.
        prunable_parameters: Those of the groups that could be cut, before and after.
        macs: Multiply-accumulates of one example, before and after.
        information: What each group kept of its information with the layer above.
        seconds: Time spent on ``calibration``, ``gradients``, ``ranking`` and ``reconstruction``.
        memory: Whether sums were all in memory, or made one after another from temporary files.
    """

    plan: PruningPlan
    sparsity: float
    parameters: tuple[int, int]
    prunable_parameters: tuple[int, int]
    macs: tuple[int, int]
    information: Mapping[str, GroupInformation]
    seconds: Mapping[str, float]
    memory: Memory = "ordinary"


def prune(
    model: nn.Module,
    data: Any,
    sparsity: float | Budget | None = None,
    *,
    target_parameters: int | None = None,
    target_macs: int | None = None,
    target_latency_ms: float | None = None,
    keep_information: float | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    kinds: Sequence[str] | None = None,
    module: str = "",
    include: str | None = None,
    exclude: str | None = None,
    graph: PruningGraph | str | None = None,
    widths: Widths = "global",
    calibration: Calibration | None = None,
    importance: Importance | None = None,
    constraints: Constraints | None = None,
    latency: Latency | None = None,
    reconstruction: Reconstruction | None = None,
    training: Any = None,
    batch_size: int = 32,
    batch_norm: bool = True,
    optimizers: Sequence[Optimizer] = (),
    seed: int = 0,
) -> PruneResult:
    """Make a trained module smaller in one call, without a Trainer and without training.

    The module is changed in place; its mode, its gradients and the random state stay. Everything is
    checked before the first change.

    Args:
        model: The module, trained.
        data: Calibration data: batches the module would be validated on, which can be read more
            than once; or a ``datasets.Dataset`` of tokenized rows, its folder or its name. A few
            thousand positions are enough.
        sparsity: Share of the prunable parameters to remove. Default 0.5, unless one of the four
            budgets below is given.
        target_parameters: Instead: parameters of the whole module.
        target_macs: Instead: multiply-accumulates of one example.
        target_latency_ms: Instead: milliseconds of one forward pass, from a table measured here.
        keep_information: Instead: share of the information with the layers above that stays.
        loss: Loss of a batch, ``loss(model, batch)``: a bounded number of backward passes then
            measures which part of each layer matters. A LightningModule has its own in
            ``training_step``.
        forward: Runs the module on a batch; default ``model(**batch)``, ``model(*batch)`` or
            ``model(batch)`` by the type of the batch, ``validation_step`` of a LightningModule.
        kinds: Kinds of unit to cut; default ``"ffn"``, ``"heads"``, ``"channels"``.
        module: Path of the submodule to search.
        include: Only groups whose name this regular expression finds.
        exclude: No groups whose name this regular expression finds.
        graph: What the module can lose, or its file; default: found in the first batch.
        widths: ``"global"`` lets all groups compete for the budget, ``"uniform"`` keeps the same
            share of every group, ``"config"`` gives groups one width that share a field of a
            Hugging Face config: then plain ``AutoModel.from_pretrained`` opens what
            ``model.save_pretrained`` writes.
        calibration: How much is collected.
        importance: What decides which units go first; default: mutual information, weighted by
            gradients where there is a loss, else by the weights that are kept above.
        constraints: Fewest and most units of groups.
        latency: How milliseconds are measured.
        reconstruction: How weights that stay make up for what was removed.
        training: Batches for the loss, or a data set likewise; default ``data``.
        batch_size: Rows of a batch of a data set; batches that are given stay as they are.
        batch_norm: Whether running statistics of BatchNorm are estimated again after the cut.
        optimizers: Optimizers whose state is carried across the cut.
        seed: Seed of the draw of positions, and of the criterion ``"random"``.

    Raises:
        PruningError: If the module, the data, the budget or the options do not allow it.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> batches = [torch.randn(500, 8) for _ in range(4)]
        >>> result = prune(net, batches, 0.75, loss=lambda m, x: m(x).square().mean())
        >>> net[0].out_features, net[2].in_features
        (16, 16)
    """
    targets = (target_parameters, target_macs, target_latency_ms, keep_information)
    has_loss = loss is not None or hasattr(model, "training_step")
    if importance is None:
        importance = Importance(relevance="gradient" if has_loss else "weights")
    options = PipelineOptions(
        budget_of(sparsity, *targets),
        widths,
        importance,
        constraints or Constraints(),
        latency or Latency(),
        reconstruction or Reconstruction(),
        seed=seed,
    )
    amount, run = calibration or Calibration(), forward or run_batch
    with_gradients = importance.relevance == "gradient"
    if with_gradients:
        _check_loss(model, loss)
    data = batches_of(data, batch_size=batch_size, seed=seed)
    if training is not None:
        training = batches_of(training, batch_size=batch_size, seed=seed)
    first = check_input(model, data)
    known = PlanTracker.held_by(model)
    check_within(model, module)
    large = is_large(amount, model)
    if large:  # a copy of what can be cut has to fit
        check_room(sum(p.numel() * p.element_size() for p in model.parameters()))
    tracker = PlanTracker.of(model)
    try:
        if graph is not None:
            tracker.adopt(PruningGraph.load(graph) if isinstance(graph, str) else graph)
        elif not tracker.is_whole:
            with spilling(large):
                tracker.extend(_discovered(model, run, first))
        groups, plan = tracker.groups, tracker.plan
        mine = [group for group in groups if is_within(group.name, module)]
        others = modules_without_groups(model, groups, module)
        chosen = choose_groups(mine, kinds=kinds, include=include, exclude=exclude, modules=others)
        check_cuttable(model, chosen, plan)
        _check_surroundings(model, chosen, optimizers)
        before = {name: len(units) for name, units in plan.kept.items()}
        check(options, model, groups, chosen, before)
        steps = {"forward": partial(try_forward, run, first)}
        if with_gradients:
            steps["loss"] = partial(try_loss, loss or training_loss, first)
        parameters = sum(p.numel() for p in model.parameters())
        seconds = dict.fromkeys(("calibration", "gradients", "ranking", "reconstruction"), 0.0)
        # A function of the user may run the model that it knows by name.
        with undisturbed(model), spilling(large):
            verify_cut(model, tracker.graph, plan, half_plan(chosen, plan), steps)
        memory = _memory_for(amount, model, chosen, plan, with_gradients=with_gradients)
        with spilling(memory == "low"):
            with _timed(seconds, "calibration"):
                collected = collect_activations(
                    model,
                    chosen,
                    data,
                    run,
                    positions=amount.samples,
                    stored_positions=options.reconstruction.stored_positions,
                    seed=seed,
                )
            if with_gradients:
                with _timed(seconds, "gradients"):
                    collected.gradients = collect_gradients(
                        model,
                        chosen,
                        plan,
                        data if training is None else training,
                        loss or training_loss,
                        steps=amount.gradient_steps,
                    )
            with _timed(seconds, "ranking"):
                decision = decide(options, model, groups, chosen, plan, collected)
            if decision is None:
                raise PruningError(
                    f"The module meets {options.budget} already: nothing to cut. Ask for less."
                )
            macs = macs_of_calls(model, collected.examples)
            # As large as the model; what follows needs the room.
            collected.moments, collected.gradients = {}, None
            with _timed(seconds, "reconstruction"):
                decision = reconstruct(
                    model, groups, plan, decision, options.reconstruction, collected
                )
        old = parameters_in(model, groups).values() if memory == "low" else ()
        with parameters_in_files(model, old):
            _carry_out(model, groups, plan, decision, optimizers)
        if batch_norm:
            batches = first_batches(data, amount.gradient_steps)
            reestimate_batch_norm(model, batches, partial(run_forward, run))
    except BaseException:
        if known is None:  # a refused model keeps no hooks of ours
            tracker.close()
        raise
    tracker.plan = plan.then(decision.plan)
    after = {group.name: tracker.plan.width(group.name) for group in chosen}
    return PruneResult(
        plan=tracker.plan,
        sparsity=sparsity_of(chosen, after),
        parameters=(parameters, sum(p.numel() for p in model.parameters())),
        prunable_parameters=(count_parameters(chosen, before), count_parameters(chosen, after)),
        macs=(macs, macs_of_calls(model, collected.examples)),
        information=decision.information,
        seconds=seconds,
        memory=memory,
    )


def _memory_for(
    calibration: Calibration,
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    *,
    with_gradients: bool,
) -> Memory:
    """Whether the sums of these groups are all in memory.

    Raises:
        PruningError: If not even those of one group fit.
    """
    needs = memory_needs(
        model, groups, plan, positions=calibration.samples, gradients=with_gradients
    )
    memory = choose_memory(calibration, needs, next(model.parameters()).device)
    if memory == "low":
        _log.info("Calibration with memory='low': %s.", needs)
    return memory


def _carry_out(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    current: PruningPlan,
    decision: Decision,
    optimizers: Sequence[Optimizer],
) -> None:
    """Cut a model as decided, with the state of its optimizers; after an error it is as before."""
    rewrites = apply_plan(
        model,
        groups,
        decision.plan,
        current=current,
        compensated=decision.compensated,
        rotated=decision.rotated,
    )
    try:
        update_optimizers(optimizers, rewrites)
    except BaseException:
        revert_rewrites(model, groups, current, rewrites)
        raise


def _discovered(model: nn.Module, forward: Forward, batch: Any) -> PruningGraph:
    """What the first batch shows that a model can lose."""

    def run(given: Any, called: nn.Module) -> Any:
        with undisturbed(called), torch.no_grad():
            return forward(called, clone_batch(given))

    batch = move_tensors(batch, next(model.parameters()).device)
    few = partial(run, first_examples(batch))
    try:
        few(model)
    except Exception:  # examples of the whole batch may belong together
        few = partial(run, batch)
    with undisturbed(model), explaining_failures(model, batch, 0):
        _check_runs_copies(model, few)
    return discover_run(model, few)


def _check_runs_copies(model: nn.Module, run: Callable[[nn.Module], Any]) -> None:
    """Refuse a function that runs the model it was written for, whatever it is given."""
    ran: list[nn.Module] = []
    handles = [
        part.register_forward_pre_hook(lambda part, _: ran.append(part)) for part in model.modules()
    ]
    try:
        run(structural_copy(model))
    finally:
        for handle in handles:
            handle.remove()
    if ran:
        raise PruningError(
            f"forward runs {type(ran[0]).__name__} of the original model when it is given a copy, "
            "so no cut can be verified. Run the model that is passed in: "
            "forward=lambda model, batch: model(batch). Or give what can be cut: graph=."
        )


def _relevance(importance: Importance, data: CalibrationData) -> RelevanceSource:
    if importance.relevance != "gradient":
        return importance.relevance
    if not data.gradients:
        raise PruningError(
            "relevance='gradient' asks for training steps, but none were collected. Train first, "
            "give a loss, or use relevance='weights', which needs none."
        )
    return relevance_of(data.gradients)


def _check_loss(model: nn.Module, loss: Loss | None) -> None:
    """Refuse gradients where nothing gives a loss.

    Raises:
        PruningError: Naming the remedy.
    """
    if loss is None and not hasattr(model, "training_step"):
        raise PruningError(
            "relevance='gradient' asks for training steps, but there is no loss. Expected "
            "loss(model, batch) or a LightningModule; or use relevance='weights'."
        )
    if loss is None and not getattr(model, "automatic_optimization", True):
        raise PruningError(
            f"{type(model).__name__} optimizes by hand, so its training_step cannot run without "
            "a Trainer. Pass loss(model, batch), or use relevance='weights'."
        )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started


def _check_table(path: str, here: Device) -> None:
    """Refuse a file of another device, and one that could not be written after minutes of work."""
    if not os.path.isfile(path):  # Path.is_file may raise
        check_writable(path, "The latency table")
        return
    table = LatencyTable.load(path)
    cast = table.device.dtype in ("bfloat16", "float16")  # calls will tell
    table.check_device(replace(here, dtype=table.device.dtype) if cast else here)


def _check_surroundings(
    model: nn.Module, chosen: Sequence[DependencyGroup], optimizers: Sequence[Optimizer]
) -> None:
    """Refuse, or warn of, what holds the tensors that may be cut.

    Raises:
        PruningError: If a compiled module or an optimizer could not follow.
    """
    tensors = parameters_in(model, chosen)
    check_optimizers(optimizers, tensors.values())
    paths = {s.tensor.rpartition(".")[0] for group in chosen for s in group.tensors}
    compiled = compiled_part(model, paths)
    if compiled is not None:
        raise PruningError(
            f"{compiled!r} is compiled for the uncut shape; expected a plain module. Prune first, "
            "then call torch.compile on the result."
        )
    held = held_elsewhere({"": model}, tensors.values())
    if held:
        warnings.warn(
            f"{', '.join(map(repr, held[:6]))} hold parameters that the cut replaces, and would go "
            "on with the old ones. Read them from the module where they are used.",
            PruningWarning,
            stacklevel=3,
        )
