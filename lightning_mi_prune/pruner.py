"""prune: all steps in one call, without a Trainer; prune_sizes: several sizes at once."""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypedDict

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import Unpack

from lightning_mi_prune.allocation.budget import Budget, budget_of, sparsity_of
from lightning_mi_prune.allocation.macs import macs_of_calls
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
from lightning_mi_prune.calibration.memory import (
    Memory,
    choose_memory,
    is_large,
    memory_needs,
)
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.options import (
    Calibration,
    Constraints,
    Importance,
    Latency,
    Reconstruction,
    Widths,
)
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import (
    clone_batch,
    first_examples,
    move_tensors,
    run_batch,
    undisturbed,
)
from lightning_mi_prune.core.spilling import check_room, spilling
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
)
from lightning_mi_prune.pipeline import PipelineOptions, check, decide, reconstruct
from lightning_mi_prune.reconstruction.compensation import Decision, GroupInformation
from lightning_mi_prune.reporting.records import Cut
from lightning_mi_prune.reporting.report import PruningReport, group_cuts, installed_versions
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
    "PruneOptions",
    "PruneResult",
    "prune",
    "prune_sizes",
]

_log = logging.getLogger(__name__)


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
        report: The same as a report: a page, JSON, and why single units went.
    """

    plan: PruningPlan
    sparsity: float
    parameters: tuple[int, int]
    prunable_parameters: tuple[int, int]
    macs: tuple[int, int]
    information: Mapping[str, GroupInformation]
    seconds: Mapping[str, float]
    memory: Memory = "ordinary"
    report: PruningReport = field(default_factory=PruningReport, repr=False)


class PruneOptions(TypedDict, total=False):
    """Options of :func:`prune` but for its budgets."""

    loss: Loss | None
    forward: Forward | None
    kinds: Sequence[str] | None
    module: str
    include: str | None
    exclude: str | None
    graph: PruningGraph | str | None
    widths: Widths
    calibration: Calibration | None
    importance: Importance | None
    constraints: Constraints | None
    latency: Latency | None
    reconstruction: Reconstruction | None
    training: Any
    batch_size: int
    batch_norm: bool
    seed: int


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
        widths: ``"global"``: all groups compete; ``"uniform"``: each keeps the same share;
            ``"config"``: widths that plain transformers open.
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
    with _calibrated(
        model,
        data,
        [budget_of(sparsity, *targets)],
        loss=loss,
        forward=forward,
        kinds=kinds,
        module=module,
        include=include,
        exclude=exclude,
        graph=graph,
        widths=widths,
        calibration=calibration,
        importance=importance,
        constraints=constraints,
        latency=latency,
        reconstruction=reconstruction,
        training=training,
        batch_size=batch_size,
        batch_norm=batch_norm,
        optimizers=optimizers,
        seed=seed,
    ) as calibrated:
        return _cut_to(calibrated, calibrated.options[0], model, optimizers, last=True)


def prune_sizes(
    model: nn.Module,
    data: Any,
    sizes: Sequence[float | Budget],
    **options: Unpack[PruneOptions],
) -> Iterator[tuple[nn.Module, PruneResult]]:
    """Copies of a trained module in several sizes, from one calibration; the module stays as it is.

    Each size is what :func:`prune` would make of the module, with the same options: units leave in
    the same order, and the weights that stay are solved for that size.

    Args:
        model: The module, trained.
        data: Calibration data, as for :func:`prune`.
        sizes: Shares of the prunable parameters to remove, or budgets; all of one measure.
        options: Those of :func:`prune`, but for its budgets and optimizers.

    Yields:
        A copy of that size, and what was done, in the order of ``sizes``; a copy is made when it
        is asked for, so at most one is in memory beside the module.

    Raises:
        PruningError: As :func:`prune`; whatever size is at fault, before the first copy.

    Example:
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> batches = [torch.randn(500, 8) for _ in range(4)]
        >>> [small[0].out_features for small, _ in prune_sizes(net, batches, [0.5, 0.75])]
        [32, 16]
        >>> net[0].out_features
        64
    """
    budgets = [size if isinstance(size, Budget) else budget_of(size) for size in sizes]
    if not budgets:
        raise PruningError("sizes is empty; expected one share or more, such as [0.5, 0.75, 0.9].")
    known = PlanTracker.held_by(model)
    with _calibrated(model, data, budgets, **options) as calibrated:
        for each in calibrated.options:
            small = copy.deepcopy(model)
            yield small, _cut_to(calibrated, each, small, (), last=each is calibrated.options[-1])
        if known is None:  # nothing was cut
            calibrated.tracker.close()


@dataclass
class _Calibrated:
    """A module with what calibration collected of it, and what it may lose.

    Args:
        model: The module, unchanged.
        tracker: Its tracker.
        chosen: Groups that may shrink.
        plan: The plan it carries.
        options: Options by size.
        collected: Moments, stored examples and gradients.
        estimate: Estimates the statistics of BatchNorm of a cut copy; None to leave them.
        memory: How sums were held.
        seconds: Time spent on each step of what all sizes share.
    """

    model: nn.Module
    tracker: PlanTracker
    chosen: Sequence[DependencyGroup]
    plan: PruningPlan
    options: Sequence[PipelineOptions]
    collected: CalibrationData
    estimate: Callable[[nn.Module], None] | None
    memory: Memory
    seconds: Mapping[str, float]


@contextmanager
def _calibrated(
    model: nn.Module,
    data: Any,
    budgets: Sequence[Budget],
    *,
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
) -> Iterator[_Calibrated]:
    """Check all that can be checked, and calibrate; the module is only run.

    A module that is refused, or whose cut fails, keeps no hooks of ours.
    """
    has_loss = loss is not None or hasattr(model, "training_step")
    if importance is None:
        importance = Importance(relevance="gradient" if has_loss else "weights")
    options = [
        PipelineOptions(
            budget,
            widths,
            importance,
            constraints or Constraints(),
            latency or Latency(),
            reconstruction or Reconstruction(),
            seed=seed,
        )
        for budget in budgets
    ]
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
        before = plan.widths
        for each in options:
            check(each, model, groups, chosen, before, names=each is options[0])
        steps = {"forward": partial(try_forward, run, first)}
        if with_gradients:
            steps["loss"] = partial(try_loss, loss or training_loss, first)
        seconds = dict.fromkeys(("calibration", "gradients"), 0.0)
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
                    stored_positions=options[0].reconstruction.stored_positions,
                    seed=seed,
                    halves=amount.stability,
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

        def estimate(cut: nn.Module) -> None:
            batches = first_batches(data, amount.gradient_steps)
            reestimate_batch_norm(cut, batches, partial(run_forward, run))

        yield _Calibrated(
            model,
            tracker,
            chosen,
            plan,
            options,
            collected,
            estimate if batch_norm else None,
            memory,
            seconds,
        )
    except BaseException:
        if known is None:  # a refused model keeps no hooks of ours
            tracker.close()
        raise


def _cut_to(
    calibrated: _Calibrated,
    options: PipelineOptions,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    *,
    last: bool,
) -> PruneResult:
    """Decide, reconstruct and cut the calibrated module itself, or a copy of it.

    Args:
        calibrated: The module, with what was collected of it.
        options: The options of this size.
        model: What is cut.
        optimizers: Optimizers of it.
        last: Whether the sums may be freed, which are as large as the model.
    """
    source, groups, plan = calibrated.model, calibrated.tracker.groups, calibrated.plan
    collected, seconds = calibrated.collected, {**calibrated.seconds}
    seconds |= dict.fromkeys(("ranking", "reconstruction"), 0.0)
    parameters = sum(p.numel() for p in source.parameters())
    with spilling(calibrated.memory == "low"):
        with _timed(seconds, "ranking"):
            decision = decide(options, source, groups, calibrated.chosen, plan, collected)
        if decision is None:
            raise PruningError(
                f"The module meets {options.budget} already: nothing to cut. Ask for less."
            )
        macs = macs_of_calls(source, collected.examples)
        if last:  # as large as the model; what follows needs the room
            collected.moments, collected.half, collected.gradients = {}, {}, None
        with _timed(seconds, "reconstruction"):
            decision = reconstruct(
                source, groups, plan, decision, options.reconstruction, collected
            )
    old = parameters_in(model, groups).values() if calibrated.memory == "low" else ()
    with parameters_in_files(model, old):
        _carry_out(model, groups, plan, decision, optimizers)
    if calibrated.estimate is not None:
        calibrated.estimate(model)
    tracker = PlanTracker.of(model)
    tracker.plan = plan.then(decision.plan)
    chosen, before = calibrated.chosen, plan.widths
    after = {group.name: tracker.plan.width(group.name) for group in chosen}
    now = sum(p.numel() for p in model.parameters())
    prunable = (count_parameters(chosen, before), count_parameters(chosen, after))
    macs_after = macs_of_calls(model, collected.examples)
    sparsity = sparsity_of(chosen, after)
    cut = Cut(
        epoch=0,
        sparsity=sparsity,
        parameters=now,
        prunable_parameters=prunable[1],
        macs=macs_after,
        groups=group_cuts(chosen, before, after, decision),
        seconds=dict(seconds),
        information_kept=decision.kept_share,
    )
    return PruneResult(
        plan=tracker.plan,
        sparsity=sparsity,
        parameters=(parameters, now),
        prunable_parameters=prunable,
        macs=(macs, macs_after),
        information=decision.information,
        seconds=seconds,
        memory=calibrated.memory,
        report=PruningReport(
            parameters, prunable[0], macs, cuts=[cut], versions=installed_versions()
        ),
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
