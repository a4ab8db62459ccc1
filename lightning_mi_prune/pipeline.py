"""The pipeline: calibrate, rank, allocate, compensate, reconstruct."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.allocation.allocate import allocate
from lightning_mi_prune.allocation.budget import Budget, budget_of, check_reach, sparsity_of
from lightning_mi_prune.allocation.constraints import check_left, resolve_bounds
from lightning_mi_prune.allocation.costs import Costs, ParameterCosts, measure_macs
from lightning_mi_prune.allocation.latency import Device, LatencyCosts, LatencyTable
from lightning_mi_prune.allocation.measuring import (
    cached_table,
    device_of,
    macs_of_calls,
    measure_table,
)
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.gradients import (
    GradientRecorder,
    GradientSums,
    check_gradients,
    relevance_of,
)
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.empty_linear import parameters_of
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.files import check_writable
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.core.running import (
    call_step,
    copy_networks,
    fixed_random_state,
    move_tensors,
    run_batch,
    undisturbed,
)
from lightning_mi_prune.discovery.families import find_groups, is_within, modules_without_groups
from lightning_mi_prune.discovery.graph import choose_groups
from lightning_mi_prune.discovery.groups import DependencyGroup, count_parameters
from lightning_mi_prune.importance.criteria import Criterion, MutualInformation
from lightning_mi_prune.importance.head_rotation import check_rotations
from lightning_mi_prune.importance.ranking import RelevanceSource, rank_groups
from lightning_mi_prune.reconstruction.compensation import Decision, GroupInformation, select_units
from lightning_mi_prune.reconstruction.least_squares import Sum, reconstruct_networks
from lightning_mi_prune.reconstruction.targets import layers_to_reconstruct
from lightning_mi_prune.surgery.batch_norm import reestimate_batch_norm
from lightning_mi_prune.surgery.optimizer_state import check_optimizers
from lightning_mi_prune.surgery.optimizers import update_optimizers
from lightning_mi_prune.surgery.units import apply_plan, check_cuttable, revert_rewrites
from lightning_mi_prune.surgery.verification import (
    compiled_part,
    half_plan,
    held_elsewhere,
    verify_cut,
)

__all__ = [
    "PruneResult",
    "PruningMethod",
    "prune",
    "reconstruct",
]

_SWEEPS = 2  # rankings of groups that cross, each by what the other keeps


@dataclass(frozen=True)
class PruningMethod:
    """Which units stay, and with which weights.

    Args:
        budget: How small the model must get.
        criterion: Who puts the units in order.
        widths: ``"global"`` lets all groups compete by what they lose for their cost, ``"uniform"``
            keeps the same share everywhere.
        relevance: What tells which part of the layer above matters: ``"gradient"`` of training
            steps, ``"weights"`` (the weights kept above), or None.
        compensate: Whether consumers' weights absorb dropped units by least squares.
        reconstruct: Whether output projections are solved again on what the cut model really hears.
        reconstruction_positions: Positions of inputs that are stored for that.
        reconstruction_ridge: Pull towards the weights that folding in left, as a share of the mean variance.
        constraints: Floors, caps and pins, and the step of widths.
        latency_table: File of measured latencies (JSON), measured and written if it is not there;
            a path that cannot be written to is refused before anything is measured.
        latency_batch: Examples in the call that is timed.
    """

    budget: Budget
    criterion: Criterion = field(default_factory=MutualInformation)
    widths: Literal["global", "uniform"] = "global"
    relevance: Literal["gradient", "weights"] | None = "gradient"
    compensate: bool = True
    reconstruct: bool = True
    reconstruction_positions: int = 16384
    reconstruction_ridge: float = 1e-2
    constraints: Constraints = field(default_factory=Constraints)
    latency_table: str | None = None
    latency_batch: int = 1

    def check(
        self,
        module: nn.Module,
        groups: Sequence[DependencyGroup],
        chosen: Sequence[DependencyGroup],
        current: Mapping[str, int],
        *,
        writes: bool = True,
    ) -> None:
        """Refuse what can be known to fail before anything is heard.

        Args:
            module: The model as it stands.
            groups: All its groups.
            chosen: Those that may shrink.
            current: Present widths of all groups.
            writes: Whether this process measures latencies and writes their file; others may not
                even see its disk.

        Raises:
            PruningError: If constraints contradict each other, the budget is out of reach, dimensions of
                heads may go where nothing tells which, or the file of latencies is of another
                device or cannot be written.
        """
        check_rotations(
            module, chosen, relevance=self.relevance, keep_information=self.budget.keep_information
        )
        if self.budget.measure == "parameters":
            check_reach(
                chosen,
                self.budget,
                costs=self.costs(module, groups, chosen, current, {}),
                widths=self.widths,
                current={group.name: current[group.name] for group in chosen},
                constraints=self.constraints,
            )
        else:
            now = {group.name: current[group.name] for group in chosen}
            resolve_bounds(self.constraints, chosen, now)
            if self.budget.measure == "ms" and self.latency_table is not None and writes:
                _check_table(self.latency_table, device_of(module))

    def costs(
        self,
        module: nn.Module,
        groups: Sequence[DependencyGroup],
        chosen: Sequence[DependencyGroup],
        current: Mapping[str, int],
        examples: Mapping[str, RecordedCall],
        tables: MutableMapping[Device, LatencyTable] | None = None,
    ) -> Costs:
        """What widths cost, in the measure of the budget.

        Args:
            module: The model as it stands.
            groups: All its groups.
            chosen: Those that may shrink.
            current: Present widths of all groups.
            examples: One call of each network; only MACs and latency need it.
            tables: Latencies that were measured before and are in no file; new ones are added.
        """
        if self.budget.kind == "target_parameters":  # of the whole module, whatever was cut of it
            fixed = sum(p.numel() for p in module.parameters()) - count_parameters(groups, current)
            return ParameterCosts(groups, fixed, held=current)
        if self.budget.measure == "parameters":
            return ParameterCosts(chosen)
        if not examples:
            raise PruningError(
                f"{self.budget} needs a call of the network to measure, but none was heard; run "
                "validation first."
            )
        device = next(module.parameters()).device  # those of a checkpoint are on the CPU
        examples = {
            path: replace(c, **move_tensors(vars(c), device)) for path, c in examples.items()
        }
        if self.budget.measure == "MACs":
            return measure_macs(module, groups, examples, current)
        index = torch.zeros(self.latency_batch, dtype=torch.long)
        calls = {path: call.select(index) for path, call in examples.items()}

        # Dimensions of heads take time to time: only where they may go, or some have gone.
        may = {group.name for group in chosen}
        timed = [
            a for a in groups if a.rotation is None or a.name in may or current[a.name] < a.size
        ]

        def measure() -> LatencyTable:
            return measure_table(module, timed, calls, multiple=self.constraints.multiple)

        table = cached_table(self.latency_table, measure, device_of(module, calls), tables)
        return LatencyCosts(table, timed, held=current)

    def decide(
        self,
        module: nn.Module,
        groups: Sequence[DependencyGroup],
        chosen: Sequence[DependencyGroup],
        current: PruningPlan,
        heard: CalibrationData,
        *,
        progress: float = 1.0,
        kept: float = 1.0,
        tables: MutableMapping[Device, LatencyTable] | None = None,
    ) -> Decision | None:
        """Choose the survivors; the model is only read.

        Args:
            module: The model as it stands.
            groups: All its groups.
            chosen: Those that may shrink.
            current: The plan it carries.
            heard: What was heard of it.
            progress: How far to go from the model as built to the budget.
            kept: Share of the information that earlier cuts left.
            tables: As for :meth:`costs`.

        Returns:
            What to cut, or None where the model is that small already.

        Raises:
            PruningError: If the budget is out of reach, or too little was heard.
        """
        weights = parameters_of(module)
        now = {name: len(units) for name, units in current.kept.items()}
        costs = self.costs(module, groups, chosen, now, heard.examples, tables)
        mine = {group.name: now[group.name] for group in chosen}
        relevance = self._relevance(heard)

        def rank(groups: Sequence[DependencyGroup] = chosen, **known: Any) -> dict[str, Ranking]:
            """What is known of the order, of some or all."""
            said = (heard.moments, weights, current, self.criterion)
            return rank_groups(groups, *said, relevance=relevance, **known)

        share = partial(
            allocate,
            chosen,
            self.budget,
            costs=costs,
            widths=self.widths,
            current=mine,
            constraints=self.constraints,
            progress=progress,
            kept=kept,
        )
        rankings: dict[str, Ranking] | None = None
        if self.widths == "global" or self.budget.kind == "keep_information":
            rankings = rank()
        widths = share(rankings=rankings)
        if rankings is not None and relevance == "weights":  # of which only some are kept above
            rankings = rank(widths=widths)
            widths = share(rankings=rankings)
        crossed = [group for group in chosen if group.product_with in mine]
        for _ in range(_SWEEPS if crossed else 0):
            if rankings is not None:
                known = rankings
                crossed_kept = {a.name: known[a.name].kept(widths[a.name]) for a in crossed}
                rankings = {**known, **rank(crossed, crossed_kept=crossed_kept)}
                widths = share(rankings=rankings)
        widths = {name: min(width, mine[name]) for name, width in widths.items()}
        if widths == mine:
            return None
        bounds = resolve_bounds(self.constraints, chosen, mine)
        told = {name for name, (_, most) in bounds.items() if not most}
        check_left(groups, {**now, **widths}, told, self.budget)
        if rankings is None:  # of all, so that what is lost can be set beside what there was
            rankings = rank(widths=widths)
        return select_units(
            chosen,
            heard.moments,
            weights,
            widths,
            current,
            self.criterion,
            relevance=relevance,
            rankings=rankings,
            compensate=self.compensate,
            ridge=getattr(self.criterion, "ridge", 1.0),
        )

    def _relevance(self, heard: CalibrationData) -> RelevanceSource:
        if self.relevance != "gradient":
            return self.relevance
        gradients = heard.gradients or {}
        if not gradients:
            raise PruningError(
                "relevance='gradient' asks for training steps, but none were heard. Train first, "
                "give a loss, or use relevance='weights', which needs none."
            )
        return relevance_of(gradients)


def _check_table(path: str, here: Device) -> None:
    """Refuse a file of another device, and one that could not be written after minutes of work."""
    if not os.path.isfile(path):  # Path.is_file may raise
        check_writable(path, "The latency table")
        return
    table = LatencyTable.load(path)
    cast = table.device.dtype in ("bfloat16", "float16")  # calls will tell
    table.check_device(replace(here, dtype=table.device.dtype) if cast else here)


def reconstruct(
    module: nn.Module,
    groups: Sequence[DependencyGroup],
    current: PruningPlan,
    selection: Decision,
    method: PruningMethod,
    heard: CalibrationData,
    add: Sum = lambda sums: sums,
    rank: int = 0,
    world: int = 1,
) -> Decision:
    """Refit what a selection leaves, on a cut copy; the model itself is only run.

    Args:
        module: The model as it stands.
        groups: All its groups.
        current: The plan it carries.
        selection: What will be cut.
        method: How.
        heard: What was heard.
        add: Adds sums up over ranks.
        rank: This process.
        world: Processes that solve together, each on its own calls.

    Returns:
        The selection with the refitted weights.

    Raises:
        PruningError: If the stored sample is smaller than what there is to learn from it.
    """
    found = layers_to_reconstruct(groups, current, selection.plan, selection.rotated)
    if not method.reconstruct or not found:
        return selection
    cut = copy_networks(module, {group.network for group in groups})
    apply_plan(cut, groups, selection.plan, current=current, compensated=selection.compensated)
    solved = reconstruct_networks(
        module,
        cut,
        found,
        heard.ranks,
        positions=method.reconstruction_positions,
        ridge=method.reconstruction_ridge,
        add=add,
        rank=rank,
        world=world,
    )
    return replace(selection, compensated={**selection.compensated, **solved})


_NOTHING = object()


Forward = Callable[[nn.Module, Any], Any]


Loss = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class PruneResult:
    """What one call of :func:`prune` did.

    Args:
        plan: Survivors of every group, with the order in which the others went.
        sparsity: Share of the prunable parameters that is gone, against the model as built; whole
            layers that went before do not count.
        parameters: Parameters of the module before and after.
        prunable_parameters: Those of the groups that could be cut, before and after.
        macs: Multiply-accumulates of one example, before and after.
        information: What each group kept of its information with the layer above.
        seconds: Time spent ``calibration``, feeling ``gradients``, ``scoring``, ``refitting``.
    """

    plan: PruningPlan
    sparsity: float
    parameters: tuple[int, int]
    prunable_parameters: tuple[int, int]
    macs: tuple[int, int]
    information: Mapping[str, GroupInformation]
    seconds: Mapping[str, float]


def prune(
    model: nn.Module,
    dataloader: Iterable[Any],
    sparsity: float | Budget | None = None,
    *,
    target_parameters: int | None = None,
    target_macs: int | None = None,
    target_latency_ms: float | None = None,
    keep_information: float | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    method: PruningMethod | None = None,
    units: Sequence[str] | None = None,
    module: str = "",
    include: str | None = None,
    exclude: str | None = None,
    positions: int = 16_384,
    relevance_steps: int = 64,
    training: Iterable[Any] | None = None,
    batch_norm: bool = True,
    optimizers: Sequence[Optimizer] = (),
    seed: int = 0,
) -> PruneResult:
    """Make a trained module smaller in one call: listen, rank, allocate, select, cut, reconstruct.

    The module is changed in place, its mode, its gradients and the random state stay. Everything is
    checked before the first change.

    Args:
        model: The module, trained.
        dataloader: Batches it would be validated on, which can be read more than once; a few
            thousand positions are enough.
        sparsity: Share of the prunable parameters to remove, or any :class:`Budget`. Default 0.5,
            unless one of the four budgets below is given.
        target_parameters: Instead: parameters of the whole module.
        target_macs: Instead: multiply-accumulates of one example.
        target_latency_ms: Instead: milliseconds of one forward pass, from a table measured here.
        keep_information: Instead: share of the information with the layers above that stays.
        loss: Loss of a batch, ``loss(model, batch)``: a bounded number of backward passes then
            tells which part of each layer matters. A LightningModule brings its ``training_step``.
            Without either, the weights that are kept above tell.
        forward: Runs the module on a batch; default ``model(**batch)``, ``model(*batch)`` or
            ``model(batch)`` by the type of the batch, ``validation_step`` of a LightningModule.
        method: Everything else that can be chosen; its budget is not looked at.
        units: Kinds of unit to cut (:func:`groups.choose_groups`).
        module: Path of the submodule to search.
        include: Only groups whose name this regular expression finds.
        exclude: No groups whose name this regular expression finds.
        positions: Samples to listen to on each group.
        relevance_steps: Batches of the backward passes.
        training: Batches for them; default those of ``dataloader``.
        batch_norm: Whether running statistics of BatchNorm are estimated anew, on as many batches,
            after the cut.
        optimizers: Optimizers whose state is carried across the cut.
        seed: Seed of the draw of positions.

    Raises:
        PruningError: If the module, the data, the budget or the method do not allow it.

    Example:
        >>> from lightning_mi_prune import linear_group
        >>> from lightning_mi_prune import register_family
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> @register_family("docs-oneshot", matches=lambda m: m is net)
        ... def describe(m):
        ...     return [linear_group(m, "hidden", kind="ffn", producers=["0"], consumers=["2"])]
        >>> batches = [torch.randn(500, 8) for _ in range(4)]
        >>> done = prune(net, batches, 0.75, loss=lambda m, x: m(x).square().mean())
        >>> net[0].out_features, done.plan.width("hidden")
        (16, 16)
    """
    targets = (target_parameters, target_macs, target_latency_ms, keep_information)
    asked = budget_of(sparsity, *targets)
    judged = loss is not None or hasattr(model, "training_step")
    if method is None:
        method = PruningMethod(asked, relevance="gradient" if judged else "weights")
    elif method.relevance == "gradient" and not judged:
        raise PruningError(
            "relevance='gradient' asks for training steps, but there is no loss. Expected "
            "loss(model, batch) or a LightningModule; or use relevance='weights'."
        )
    by_hand = not getattr(model, "automatic_optimization", True)
    if method.relevance == "gradient" and by_hand and loss is None:
        raise PruningError(
            f"{type(model).__name__} optimizes by hand, so its training_step cannot run without "
            "a Trainer. Pass loss(model, batch), or use relevance='weights'."
        )
    method = replace(method, budget=asked)
    first = _check_input(model, dataloader)
    known = PlanTracker.held_by(model)
    tracker = PlanTracker.of(model, partial(find_groups, within=module))
    try:
        groups, plan = tracker.groups, tracker.plan
        mine = [group for group in groups if is_within(group.name, module)]
        others = modules_without_groups(model, groups, module)
        chosen = choose_groups(mine, kinds=units, include=include, exclude=exclude, modules=others)
        check_cuttable(model, chosen, plan)
        _check_surroundings(model, chosen, optimizers)
        before = {name: len(kept) for name, kept in plan.kept.items()}
        method.check(model, groups, chosen, before)
        steps = {"forward": partial(_try_forward, forward or run_batch, first)}
        if method.relevance == "gradient":
            steps["loss"] = partial(_try_loss, loss or _train, first)
        with undisturbed(model):  # a function of the user may run the model that it knows by name
            verify_cut(model, tracker.graph, plan, half_plan(chosen, plan), steps)
        parameters = sum(p.numel() for p in model.parameters())
        seconds = dict.fromkeys(("calibration", "gradients", "ranking", "reconstruction"), 0.0)
        with _timed(seconds, "calibration"):
            heard = _hear(model, chosen, dataloader, forward or run_batch, method, positions, seed)
        if method.relevance == "gradient":
            with _timed(seconds, "gradients"):
                felt = GradientRecorder(model, chosen, steps=relevance_steps, plan=plan)
                batches = dataloader if training is None else training
                heard.gradients = _feel(model, batches, loss or _train, felt, relevance_steps)
        with _timed(seconds, "ranking"):
            selection = method.decide(model, groups, chosen, plan, heard)
        if selection is None:
            raise PruningError(f"The module meets {asked} already: nothing to cut. Ask for less.")
        macs = macs_of_calls(model, heard.examples)
        heard.moments = {}  # as large as the model; what follows needs the room
        with _timed(seconds, "reconstruction"):
            selection = reconstruct(model, groups, plan, selection, method, heard)
        compensated, rotated = selection.compensated, selection.rotated
        rewrites = apply_plan(
            model, groups, selection.plan, current=plan, compensated=compensated, rotated=rotated
        )
        try:
            update_optimizers(optimizers, rewrites)
        except BaseException:
            revert_rewrites(model, groups, plan, rewrites)
            raise
        if batch_norm:
            run = partial(_run_own, forward or run_batch)
            reestimate_batch_norm(model, _first(dataloader, relevance_steps), run)
    except BaseException:
        if known is None:  # a refused model keeps no hooks of ours
            tracker.close()
        raise
    tracker.plan = plan.then(selection.plan)
    after = {group.name: tracker.plan.width(group.name) for group in chosen}
    return PruneResult(
        plan=tracker.plan,
        sparsity=sparsity_of(chosen, after),
        parameters=(parameters, sum(p.numel() for p in model.parameters())),
        prunable_parameters=(count_parameters(chosen, before), count_parameters(chosen, after)),
        macs=(macs, macs_of_calls(model, heard.examples)),
        information=selection.information,
        seconds=seconds,
    )


def _check_input(model: nn.Module, batches: Iterable[Any]) -> Any:
    """Refuse a model or batches that cannot be calibrated; returns the first batch.

    Raises:
        PruningError: Naming what was found, and the remedy.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not any(True for _ in model.parameters()):
        raise PruningError(f"{type(model).__name__} has no parameters; expected a trained module.")
    if torch.is_inference_mode_enabled():
        raise PruningError(
            "prune() was called under torch.inference_mode, which allows no gradients; expected "
            "ordinary mode. Call it outside of that block."
        )
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.is_inference():
            where = "on the meta device" if tensor.is_meta else "made under torch.inference_mode"
            raise PruningError(
                f"{name!r} is {where}; expected ordinary tensors with values. Build the model "
                "outside of that block and load its weights first."
            )
    if isinstance(batches, (Mapping, Tensor, str)) or not isinstance(batches, Iterable):
        raise PruningError(
            f"A {type(batches).__name__} was given for the batches; expected a DataLoader or a "
            "list of batches. Put a single batch into a list."
        )
    if isinstance(batches, Iterator):
        raise PruningError(
            f"A {type(batches).__name__} was given for the batches: an iterator (such as a "
            "generator) is used up by the first pass; expected a DataLoader or a list, which can "
            "be read again. Pass list(batches)."
        )
    with fixed_random_state(model):  # a loader draws a seed
        first = next(iter(batches), _NOTHING)
    if first is _NOTHING:
        raise PruningError(
            f"The {type(batches).__name__} gave no batches; expected a few thousand samples. Check "
            "the data set, its filters and drop_last."
        )
    return first


def _check_surroundings(
    model: nn.Module, chosen: Sequence[DependencyGroup], optimizers: Sequence[Optimizer]
) -> None:
    """Refuse, or warn of, what holds the tensors that may be cut.

    Raises:
        PruningError: If a compiled module or an optimizer could not follow.
    """
    tensors = {s.tensor: model.get_parameter(s.tensor) for a in chosen for s in a.tensors}
    check_optimizers(optimizers, tensors.values())
    compiled = compiled_part(model, {name.rpartition(".")[0] for name in tensors})
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


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    """Some batches; a loader draws its seed when the first one is asked for, not before."""
    yield from islice(batches, count)


def _run_own(forward: Forward, model: nn.Module, batch: Any) -> None:
    forward(model, _own(batch, model))


def _try_forward(forward: Forward, batch: Any, model: nn.Module) -> None:
    with undisturbed(model), torch.no_grad():
        forward(model, _own(batch, model))


def _try_loss(loss: Loss, batch: Any, model: nn.Module) -> None:
    with undisturbed(model), torch.enable_grad():
        _checked(loss(model, _own(batch, model)), skips=loss is _train)


def _own(batch: Any, model: nn.Module) -> Any:
    """A batch where the model is, of which entries can be taken out."""
    return move_tensors(batch, next(model.parameters()).device)


def _hear(
    module: nn.Module,
    chosen: Sequence[DependencyGroup],
    dataloader: Iterable[Any],
    forward: Forward,
    method: PruningMethod,
    positions: int,
    seed: int,
) -> CalibrationData:
    """What the module says on the data."""
    recorder = ActivationRecorder(
        module,
        chosen,
        positions=positions,
        batches=_length(dataloader),
        seed=seed,
        calls=method.reconstruction_positions if method.reconstruct else 0,
    )
    _listen(module, dataloader, forward, recorder)
    recorder.check()
    return CalibrationData(
        recorder.moments, ranks=[recorder.stored], examples=recorder.calls(chosen)
    )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - started


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _listen(
    module: nn.Module, batches: Iterable[Any], forward: Forward, recorder: ActivationRecorder
) -> None:
    with undisturbed(module), torch.no_grad(), recorder:
        for batch in batches:
            recorder.start_batch()
            forward(module, _own(batch, module))
            if recorder.is_full:
                break


def _feel(
    module: nn.Module, batches: Iterable[Any], loss: Loss, felt: GradientRecorder, steps: int
) -> Mapping[str, GradientSums]:
    with undisturbed(module), torch.enable_grad(), felt:
        for index, batch in enumerate(islice(batches, steps)):
            for parameter in module.parameters():
                parameter.grad = None
            with felt.step(index):
                value = _checked(loss(module, _own(batch, module)), skips=loss is _train)
                if value is not None:
                    value.backward()  # type: ignore[no-untyped-call]
    check_gradients(felt.sums)
    return felt.sums


def _checked(value: Any, *, skips: bool) -> Tensor | None:
    """A loss that gradients can be taken of; None for a training step that skips its batch.

    Raises:
        PruningError: If it is something else.
    """
    if value is None and skips:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        what = f"a {type(value).__name__}" if value is not None else "None"
        if isinstance(value, Tensor):
            what = f"a tensor of shape {tuple(value.shape)}"
            what += "" if value.requires_grad else " without gradients"
        raise PruningError(
            f"The loss is {what}; expected one number that gradients can be taken of. Give "
            "loss(model, batch), with labels in the batches if the model makes its own loss."
        )
    return value


def _train(module: nn.Module, batch: Any) -> Any:
    """The loss of a LightningModule."""
    step: Any = module.training_step
    result = call_step(step, batch)
    return result.get("loss") if isinstance(result, Mapping) else result
