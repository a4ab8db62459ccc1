"""Go on from a checkpoint, or back to a snapshot: what a run must check, drop or build again.

Lightning calls ``configure_optimizers`` of a resumed run when layers, and all units of others, have
left the model already. Groups that are made by layer, by parameter or by position would then be
others than those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from functools import update_wrapper
from itertools import chain
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.calibration.activations import input_sizes
from lightning_mi_prune.calibration.gradients import GradientSize, GradientSums, gradient_sizes
from lightning_mi_prune.callbacks.monitors import MetricGuard
from lightning_mi_prune.callbacks.schedule import CutSchedule, validates_after
from lightning_mi_prune.callbacks.state import RunState, Snapshot
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.empty_linear import empty_linears, place_linears, show_linears
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.untrusted import described, reading
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.surgery.layers import arrange_layers
from lightning_mi_prune.surgery.optimizer_state import parameters_in, state_fits
from lightning_mi_prune.surgery.optimizers import (
    parameter_names,
    restore_state,
    snapshot_state,
    update_optimizers,
)
from lightning_mi_prune.surgery.parameters import shapes_at
from lightning_mi_prune.surgery.transaction import cancel_cut, restore_model

__all__ = [
    "OptimizerPlan",
    "check_snapshot",
    "forget_metric",
    "reconcile_budget",
    "reconcile_units",
    "rerun_validation",
    "resumed",
    "roll_back",
    "take_snapshot",
]

_KEY, _ENTRY = "lightning_mi_prune", "optimizers_of"
_HOOK = "configure_optimizers"


class OptimizerPlan:
    """The plan at which the optimizers of a run were made; it is kept in its checkpoints."""

    def __init__(self) -> None:
        self._plan: PruningPlan | None = None

    def begin(self, tracker: PlanTracker) -> None:
        """Note the plan that the model carries, unless a checkpoint named another one."""
        if self._plan is None:
            self._plan = tracker.plan.bare()

    def save(self, checkpoint: MutableMapping[str, Any]) -> None:
        """Write the plan into a checkpoint."""
        if self._plan is not None and self._plan.sizes:
            checkpoint[_KEY] = {_ENTRY: self._plan.to_json()}

    def load(
        self, module: pl.LightningModule, tracker: PlanTracker, checkpoint: Mapping[str, Any]
    ) -> None:
        """Let the next ``configure_optimizers`` see the parameters that a checkpoint names.

        What is gone leaves its groups afterwards, as it did when it was cut.

        Args:
            module: The module, at the plan of the checkpoint.
            tracker: Its tracker.
            checkpoint: The checkpoint, which is not trusted.

        Raises:
            PruningError: If it holds something else.
        """
        noted = checkpoint.get(_KEY)
        if noted is None or self._plan is not None:  # a finder of learning rates loads again
            return
        text = noted.get(_ENTRY) if isinstance(noted, Mapping) else None
        if not isinstance(text, str):
            raise PruningError(
                f"The checkpoint holds {described(noted)} under {_KEY!r}; expected the plan at "
                "which its optimizers were made. Take another checkpoint."
            )
        self._plan = PruningPlan.from_json(text)
        first = not isinstance(module.__dict__.get(_HOOK), _Once)  # of two callbacks one does it
        now = tracker.plan
        begun = self._plan.only(now.sizes)
        stacks = {stack.name for stack in tracker.graph.stacks}
        lost = [
            name
            for name, kept in begun.kept.items()
            if (kept != now.kept[name] if name in stacks else kept and not now.kept[name])
        ]
        if first and lost:
            sizes = _sizes_in(checkpoint["optimizer_states"])
            module.__dict__[_HOOK] = _Once(module, tracker, begun, sizes)

    def abandon(self, module: pl.LightningModule) -> None:
        """Leave the module alone, if ``configure_optimizers`` was never called."""
        once = module.__dict__.get(_HOOK)
        if isinstance(once, _Once):
            once.restore()


class _Once:
    """Replaces ``configure_optimizers`` of a module for one call."""

    def __init__(
        self,
        module: pl.LightningModule,
        tracker: PlanTracker,
        begun: PruningPlan,
        sizes: list[list[int]],
    ) -> None:
        self._module, self._tracker, self._plan, self._sizes = module, tracker, begun, sizes
        self._set = module.__dict__.get(_HOOK)  # the user's own, as of LightningCLI
        self._configure = module.configure_optimizers
        update_wrapper(self, self._configure)

    def restore(self) -> None:
        del self._module.__dict__[_HOOK]
        if self._set is not None:
            self._module.__dict__[_HOOK] = self._set

    def __call__(self) -> Any:
        self.restore()
        module, tracker, now = self._module, self._tracker, self._tracker.plan
        stacks, then = tracker.graph.stacks, now.joined(self._plan)
        arrange_layers(module, stacks, self._plan, current=now, available=tracker.removed_layers)
        empty = empty_linears(module)
        begun = {group.name for group in tracker.graph.groups if then.width(group.name)}
        paths = {
            s.tensor.rpartition(".")[0]
            for group in tracker.graph.groups_at(then)
            for s in group.tensors
            if group.name in begun
        }
        show_linears(module, empty, paths)
        try:
            made = self._configure()
        finally:
            lost = [p for linear in empty.values() for p in linear.parameters() if not p.numel()]
            place_linears(module, empty)
            gone = arrange_layers(module, stacks, now, current=then)
            layers = [layer for stack in gone.values() for layer in stack.values()]
            lost += [parameter for layer in layers for parameter in layer.parameters()]
            tracker.store(gone)
        optimizers = list(_optimizers_in(made))
        update_optimizers(
            optimizers, [], lost, {id(p): name for name, p in module.named_parameters()}
        )
        found = [[len(subset["params"]) for subset in o.param_groups] for o in optimizers]
        if found != self._sizes:
            raise PruningError(
                f"The optimizers of the checkpoint have groups of {self._sizes} parameters; those "
                f"of configure_optimizers have {found}. Resume with the groups the run began with."
            )
        return made


def _optimizers_in(made: Any) -> Iterator[Optimizer]:
    """The optimizers in all that ``configure_optimizers`` may return, in the order of Lightning."""
    if isinstance(made, Optimizer):
        yield made
    elif isinstance(made, (list, tuple, Mapping)):
        for part in made.values() if isinstance(made, Mapping) else made:
            yield from _optimizers_in(part)


def _sizes_in(states: Sequence[Any]) -> list[list[int]]:
    return [[len(group["params"]) for group in s["param_groups"]] for s in states if s]


def rerun_validation(trainer: pl.Trainer, loops: dict[str, Any]) -> None:
    """Let a run that resumes here repeat the validation it stopped in, from its start.

    Lightning skips what is left of a validation when it resumes, and with it the epoch's end when
    the checkpoint was written after the last training batch. Does nothing for a checkpoint that was
    written elsewhere.

    Args:
        trainer: Trainer that writes a checkpoint.
        loops: Its entry ``"loops"``, changed in place.
    """
    fit = loops["fit_loop"]
    epoch, batches = fit["epoch_progress"]["current"], fit["epoch_loop.batch_progress"]
    current = batches["current"]
    in_epoch = epoch["ready"] == epoch["started"] == epoch["processed"] + 1
    if not in_epoch or not current["ready"] == current["processed"] > 0:
        return
    if not validates_after(trainer, current["ready"] - 1):
        return
    for counts in (batches["total"], current):
        counts["completed"] = counts["processed"]
    validation = fit["epoch_loop.val_loop.batch_progress"]
    ready = max(1, validation["total"]["ready"])
    validation["total"] |= {"ready": ready, "started": ready}
    validation["total"] |= {"processed": ready - 1, "completed": ready - 1}
    validation["current"] = dict.fromkeys(validation["current"], 0)
    validation["is_last_batch"] = False


_REMEDY = "take another checkpoint, or resume without max_drop, which keeps the last cut"


def reconcile_units(
    state: RunState,
    groups: Sequence[DependencyGroup],
    module: nn.Module,
    plan: PruningPlan,
    *,
    calls: int,
    steps: int,
) -> list[str]:
    """Drop what does not fit the options a run resumes with.

    Args:
        state: The run, as it was read.
        groups: Groups that may be cut now.
        module: The model.
        plan: The plan it carries.
        calls: Positions of calls to store now; 0 stores none.
        steps: Training steps to take gradients from now; 0 takes none.

    Returns:
        What was dropped, in a sentence each.
    """
    dropped, names = [], {group.name for group in groups}
    widths = input_sizes(module, groups)
    shapes, data = _shapes(gradient_sizes(module, groups, plan)), state.calibration
    if state.gradients is not None and (not steps or _shapes(state.gradients) != shapes):
        state.gradients = None  # collected anew in the rest of the epoch
    if data is not None and {key: m.dimension for key, m in data.moments.items()} != widths:
        state.calibration = None
        dropped.append("Calibration was of other groups; a cut waits for the next validation.")
    elif data is not None and (
        (calls and not any(stored for rank in data.ranks for stored in rank.values()))
        or (steps and _shapes(data.gradients or {}) != shapes)
    ):
        state.calibration = None
        dropped.append(
            "Calibration has less than the options ask for now; a cut waits for the next "
            "validation."
        )
    if state.pending is not None and set(state.pending.decision.information) != names:
        state.pending = None
        dropped.append("The pending cut was chosen for other groups; it will be chosen again.")
    return dropped


def reconcile_budget(state: RunState, budget: str) -> list[str]:
    """Drop the schedule of a run that resumes with another budget.

    Args:
        state: The run, as it was read.
        budget: What the schedule leads to now, where that is not a sparsity.

    Returns:
        What was dropped, in a sentence.
    """
    dropped = []
    if state.budget != budget and state.fitted.epochs:
        # Goals are counted from the model as built: what is reached already asks for no cut.
        state.reached, state.pending = 0.0, None
        state.fitted = state.schedule = CutSchedule()
        dropped.append(f"The budget was {state.budget or 'a sparsity'}; the schedule begins anew.")
    state.budget = budget
    return dropped


def resumed(state: RunState, plan: PruningPlan) -> dict[str, object]:
    """What all ranks must have read from the same checkpoint, by name."""
    return {
        "the plan of the model": plan.digest(),
        "the sparsity reached": state.reached,
        "the epoch of the last cut, not accepted yet": state.snapshot and state.snapshot.epoch,
        "the epoch of the pending cut": state.pending and state.pending.epoch,
    }


def take_snapshot(
    module: pl.LightningModule,
    optimizers: Sequence[Optimizer],
    plan: PruningPlan,
    epoch: int,
    state: RunState,
) -> Snapshot:
    """Keep what it takes to undo the cut that comes now: copies on the CPU."""
    tensors = chain(module.named_parameters(), module.named_buffers())
    names = {id(p): name for name, p in module.named_parameters()}
    return Snapshot(
        epoch=epoch,
        reached=state.reached,
        information_kept=state.information_kept,
        plan=plan,
        weights={name: t.detach().to("cpu", copy=True) for name, t in tensors},
        optimizers=snapshot_state(optimizers, names),
        groups=parameter_names(optimizers, names),
    )


def roll_back(
    module: pl.LightningModule,
    optimizers: Sequence[Optimizer],
    tracker: PlanTracker,
    snapshot: Snapshot,
) -> None:
    """Undo the last cut: shapes, weights, optimizer state and plan are as before it.

    Learning rates and everything else that follows time goes on.
    """
    before, current = {id(p) for p in module.parameters()}, tracker.plan
    done = restore_model(
        module,
        tracker.graph,
        snapshot.plan,
        snapshot.weights,
        current=current,
        available=tracker.removed_layers,
    )
    module.zero_grad(set_to_none=True)  # of the model that is given up
    try:
        replaced = {id(r.old): r.new for r in done.rewrites if id(r.old) in before}
        known = before | {id(new) for new in replaced.values()}
        names = {id(p): name for name, p in module.named_parameters()}
        returned = {name: p for name, p in module.named_parameters() if id(p) not in known}
        restore_state(optimizers, replaced, names, snapshot.optimizers, snapshot.groups, returned)
    except BaseException:
        tracker.store(cancel_cut(module, tracker.graph, done))
        raise
    tracker.plan = snapshot.plan


def check_snapshot(
    snapshot: Snapshot,
    module: nn.Module,
    graph: PruningGraph,
    current: PruningPlan,
    optimizers: Sequence[Optimizer],
) -> None:
    """Refuse, before the first batch, a snapshot that a rollback could not go back to.

    Args:
        snapshot: The model before the last cut, as a checkpoint holds it.
        module: The model.
        graph: What it can lose, as built.
        current: Plan it carries.
        optimizers: All optimizers of the run, with their state.

    Raises:
        PruningError: If names, shapes or kinds of weights or of states are others.
    """
    with reading("The snapshot before the last cut", _REMEDY):
        before = snapshot.plan
        for name in set(before.sizes) & set(current.sizes):
            if before.sizes[name] != current.sizes[name]:
                sizes = f"{before.sizes[name]}, not {current.sizes[name]}"
                raise ValueError(f"{described(name)} has size {sizes}")
            if not set(current.kept[name]) <= set(before.kept[name]):
                raise ValueError(f"{described(name)} has units now that it had not then")
        changed = tuple(
            f"{stack.name}."
            for stack in graph.stacks
            if before.kept.get(stack.name) != current.kept.get(stack.name)
        )
        _check_weights(
            snapshot, module, shapes_at(module, graph.groups_at(before), before), changed
        )
        _check_optimizers(snapshot, module, optimizers, changed)


def _check_weights(
    snapshot: Snapshot, module: nn.Module, shapes: Mapping[str, list[int]], changed: tuple[str, ...]
) -> None:
    """Names below ``changed`` are others where layers went since; the rollback compares those."""
    every = module.named_parameters(remove_duplicate=False)
    cut = {id(p): shapes[name] for name, p in every if name in shapes}  # tied under any name
    for name, parameter in module.named_parameters():
        if name.startswith(changed):
            continue
        shape, saved = cut.get(id(parameter), list(parameter.shape)), snapshot.weights.get(name)
        if saved is None or list(saved.shape) != shape:
            found = "nothing" if saved is None else described(saved)
            raise ValueError(f"{name!r} is {found}; expected shape {tuple(shape)}")
        _check_alike(name, saved, parameter)
    for name, buffer in module.named_buffers():  # their shapes may change as training goes on
        if name in snapshot.weights and not name.startswith(changed):
            _check_alike(name, snapshot.weights[name], buffer)


def _check_alike(name: str, saved: Tensor, present: Tensor) -> None:
    kinds = [
        (t.layout, t.is_quantized, t.is_floating_point(), t.is_complex()) for t in (saved, present)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name!r} is {described(saved)}; expected {described(present)}")


def _check_optimizers(
    snapshot: Snapshot, module: nn.Module, optimizers: Sequence[Optimizer], changed: tuple[str, ...]
) -> None:
    if len(snapshot.optimizers) != len(optimizers):
        raise ValueError(f"it has {len(snapshot.optimizers)} optimizers, not {len(optimizers)}")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer, states in zip(optimizers, snapshot.optimizers, strict=True):
        kind = type(optimizer).__name__
        # Those of torch keep everything of a parameter from its first step on.
        whole = type(optimizer).__module__.startswith("torch.optim")
        for _, _, parameter in parameters_in(optimizer):
            name, present = names.get(id(parameter), ""), optimizer.state.get(parameter, {})
            saved: Mapping[str, Any] = states.get(name, {})
            if not saved or name.startswith(changed):
                continue
            for key, value in saved.items():
                if not state_fits(key, value, snapshot.weights[name], present, parameter):
                    what = f"{described(key)} of {name!r} is {described(value)}"
                    now = described(present[key]) if key in present else "another kind"
                    raise ValueError(f"{what}; {kind} keeps {now}")
            if whole and present and set(saved) != set(present):
                raise ValueError(
                    f"the state of {name!r} has {sorted(saved)[:6]}; {kind} keeps {sorted(present)}"
                )


def forget_metric(state: RunState, guard: MetricGuard | None) -> list[str]:
    """Forget values of another metric; a sentence, if a cut was not accepted yet."""
    dropped = []
    monitored = "" if guard is None else f"{guard.monitor} {guard.mode}"
    if state.monitored != monitored:
        if state.snapshot is not None:
            state.snapshot = None
            dropped.append("max_drop compares something else now: the last cut is kept.")
        state.best, state.monitored = None, monitored
    return dropped


def _shapes(
    sums: Mapping[str, GradientSums] | Mapping[str, GradientSize],
) -> dict[str, tuple[int, int, bool]]:
    return {key: (s.dimension, s.units, s.over_units) for key, s in sums.items()}
