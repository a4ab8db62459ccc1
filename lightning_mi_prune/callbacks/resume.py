"""What a resumed run must check, drop or build again.

Lightning calls ``configure_optimizers`` of a resumed run when layers, and all units of others, have
left the model already. Groups that are made by layer, by parameter or by position would then be
others than those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.calibration.gradients import GradientSums, empty_sums
from lightning_mi_prune.callbacks.monitors import MetricGuard
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.state import RunState, Snapshot
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.empty_linear import empty_linears, place_linears, show_linears
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.untrusted import described, reading
from lightning_mi_prune.discovery.graph import PruningGraph
from lightning_mi_prune.discovery.groups import DependencyGroup
from lightning_mi_prune.surgery.layers import arrange_layers
from lightning_mi_prune.surgery.optimizer_state import parameters_in, state_fits
from lightning_mi_prune.surgery.optimizers import update_optimizers
from lightning_mi_prune.surgery.parameters import shapes_at

__all__ = [
    "OptimizerPlan",
    "RunOptions",
    "check_snapshot",
    "reconcile",
    "resumed",
    "watch_anew",
]

_KEY, _ENTRY = "lightning_mi_prune", "optimizers_of"


_HOOK = "configure_optimizers"


class OptimizerPlan:
    """The plan at which the optimizers of a run were made; it travels with its checkpoints."""

    def __init__(self) -> None:
        self._begun: PruningPlan | None = None

    def begin(self, tracker: PlanTracker) -> None:
        """Note the plan that the model carries, unless a checkpoint told of another one."""
        if self._begun is None:
            self._begun = tracker.plan.bare()

    def save(self, checkpoint: MutableMapping[str, Any]) -> None:
        """Tell a checkpoint."""
        if self._begun is not None and self._begun.sizes:
            checkpoint[_KEY] = {_ENTRY: self._begun.to_json()}

    def load(
        self, module: pl.LightningModule, tracker: PlanTracker, checkpoint: Mapping[str, Any]
    ) -> None:
        """Let the next ``configure_optimizers`` see the parameters that a checkpoint tells of.

        What is gone leaves its groups afterwards, as it did when it was cut.

        Args:
            module: The module, at the plan of the checkpoint.
            tracker: Its tracker.
            checkpoint: The checkpoint, which is not trusted.

        Raises:
            PruningError: If it tells of something else.
        """
        noted = checkpoint.get(_KEY)
        if noted is None or self._begun is not None:  # a finder of learning rates loads again
            return
        text = noted.get(_ENTRY) if isinstance(noted, Mapping) else None
        if not isinstance(text, str):
            raise PruningError(
                f"The checkpoint holds {described(noted)} under {_KEY!r}; expected the plan at "
                "which its optimizers were made. Take another checkpoint."
            )
        self._begun = PruningPlan.from_json(text)
        alone = not isinstance(module.__dict__.get(_HOOK), _Once)  # of two callbacks one does it
        now = tracker.plan
        begun = self._begun.only(now.sizes)
        stacks = {stack.name for stack in tracker.graph.stacks}
        lost = [
            name
            for name, kept in begun.kept.items()
            if (kept != now.kept[name] if name in stacks else kept and not now.kept[name])
        ]
        if alone and lost:
            sizes = _sizes_in(checkpoint["optimizer_states"])
            module.__dict__[_HOOK] = _Once(module, tracker, begun, sizes)

    def abandon(self, module: pl.LightningModule) -> None:
        """Leave the module alone, if ``configure_optimizers`` was never called."""
        once = module.__dict__.get(_HOOK)
        if isinstance(once, _Once):
            once.step_aside()


class _Once:
    """Stands in for ``configure_optimizers`` of a module, for one call."""

    def __init__(
        self,
        module: pl.LightningModule,
        tracker: PlanTracker,
        begun: PruningPlan,
        sizes: list[list[int]],
    ) -> None:
        self._module, self._tracker, self._begun, self._sizes = module, tracker, begun, sizes
        self._set = module.__dict__.get(_HOOK)  # the user's own, as of LightningCLI
        self._configure = module.configure_optimizers
        update_wrapper(self, self._configure)

    def step_aside(self) -> None:
        del self._module.__dict__[_HOOK]
        if self._set is not None:
            self._module.__dict__[_HOOK] = self._set

    def __call__(self) -> Any:
        self.step_aside()
        module, tracker, now = self._module, self._tracker, self._tracker.plan
        stacks, then = tracker.graph.stacks, now.joined(self._begun)
        arrange_layers(module, stacks, self._begun, current=now, available=tracker.removed_layers)
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


_REMEDY = "take another checkpoint, or resume without max_drop, which keeps the last cut"


@dataclass(frozen=True)
class RunOptions:
    """What the options of a run ask for.

    Args:
        budget: What a cut may cost.
        aim: What the schedule leads to, where that is not a sparsity.
        calls: Positions of calls to store; 0 stores none.
        steps: Training steps to take gradients from.
    """

    budget: MetricGuard | None = None
    aim: str = ""
    calls: int = 0
    steps: int = 0


def reconcile(
    run: RunState,
    groups: list[DependencyGroup],
    module: nn.Module,
    plan: PruningPlan,
    asked: RunOptions,
) -> list[str]:
    """Let go of what does not fit the options a run resumes with.

    Args:
        run: The run, as it was read.
        groups: Groups that may be cut now.
        module: The model.
        plan: The plan it carries.
        asked: What is asked for now.

    Returns:
        What was let go of, in a sentence each.
    """
    budget, aim = asked.budget, asked.aim
    surprises, names = [], {group.name for group in groups}
    places = {key: consumers[0] for group in groups for key, consumers in group.inputs.items()}
    widths = {key: module.get_parameter(f"{r}.weight").shape[1] for key, r in places.items()}
    shapes, heard = _shapes(empty_sums(module, groups, plan)), run.heard
    if run.felt is not None and (not asked.steps or _shapes(run.felt) != shapes):
        run.felt = None  # the rest of the epoch is felt anew
    if heard is not None and {key: m.dimension for key, m in heard.moments.items()} != widths:
        run.heard = None
        surprises.append("What was heard was of other groups; a cut waits for the next validation.")
    elif heard is not None and (
        (asked.calls and not any(stored for rank in heard.ranks for stored in rank.values()))
        or (asked.steps and _shapes(heard.gradients or {}) != shapes)
    ):
        run.heard = None
        surprises.append(
            "What was heard is less than the options ask for now; a cut waits for the next "
            "validation."
        )
    if run.pending is not None and set(run.pending.selection.information) != names:
        run.pending = None
        surprises.append("The pending cut was chosen for other groups; it will be chosen again.")
    if run.aim != aim and run.fitted.epochs:
        # Goals are counted from the model as built: what is reached already asks for no cut.
        run.reached, run.fitted, run.schedule, run.pending = 0.0, Schedule(), Schedule(), None
        surprises.append(f"The budget was {run.aim or 'a sparsity'}; the schedule begins anew.")
    run.aim = aim
    return surprises + watch_anew(run, budget)


def resumed(run: RunState, plan: PruningPlan) -> dict[str, object]:
    """What all ranks must have read from the same checkpoint, by name."""
    return {
        "the plan of the model": plan.digest(),
        "the sparsity reached": run.reached,
        "the epoch of the cut on probation": run.trial and run.trial.epoch,
        "the epoch of the pending cut": run.pending and run.pending.epoch,
    }


def check_snapshot(
    trial: Snapshot,
    module: nn.Module,
    graph: PruningGraph,
    current: PruningPlan,
    optimizers: Sequence[Optimizer],
) -> None:
    """Refuse, before the first batch, a snapshot that a rollback could not go back to.

    Args:
        trial: The cut on probation, as a checkpoint holds it.
        module: The model.
        graph: What it can lose, as built.
        current: Plan it carries.
        optimizers: All optimizers of the run, with their state.

    Raises:
        PruningError: If names, shapes or kinds of weights or of states are others.
    """
    with reading("The snapshot before the last cut", _REMEDY):
        before = trial.plan
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
        _check_weights(trial, module, shapes_at(module, graph.groups_at(before), before), changed)
        _check_optimizers(trial, module, optimizers, changed)


def _check_weights(
    trial: Snapshot, module: nn.Module, shapes: Mapping[str, list[int]], changed: tuple[str, ...]
) -> None:
    """Names below ``changed`` are others where layers went since; the rollback compares those."""
    every = module.named_parameters(remove_duplicate=False)
    cut = {id(p): shapes[name] for name, p in every if name in shapes}  # tied under any name
    for name, parameter in module.named_parameters():
        if name.startswith(changed):
            continue
        shape, saved = cut.get(id(parameter), list(parameter.shape)), trial.weights.get(name)
        if saved is None or list(saved.shape) != shape:
            found = "nothing" if saved is None else described(saved)
            raise ValueError(f"{name!r} is {found}; expected shape {tuple(shape)}")
        _check_alike(name, saved, parameter)
    for name, buffer in module.named_buffers():  # their shapes may change as training goes on
        if name in trial.weights and not name.startswith(changed):
            _check_alike(name, trial.weights[name], buffer)


def _check_alike(name: str, saved: Tensor, present: Tensor) -> None:
    kinds = [
        (t.layout, t.is_quantized, t.is_floating_point(), t.is_complex()) for t in (saved, present)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name!r} is {described(saved)}; expected {described(present)}")


def _check_optimizers(
    trial: Snapshot, module: nn.Module, optimizers: Sequence[Optimizer], changed: tuple[str, ...]
) -> None:
    if len(trial.optimizers) != len(optimizers):
        raise ValueError(f"it has {len(trial.optimizers)} optimizers, not {len(optimizers)}")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer, states in zip(optimizers, trial.optimizers, strict=True):
        kind = type(optimizer).__name__
        # Those of torch keep everything of a parameter from its first step on.
        whole = type(optimizer).__module__.startswith("torch.optim")
        for _, _, parameter in parameters_in(optimizer):
            name, present = names.get(id(parameter), ""), optimizer.state.get(parameter, {})
            saved: Mapping[str, Any] = states.get(name, {})
            if not saved or name.startswith(changed):
                continue
            for key, value in saved.items():
                if not state_fits(key, value, trial.weights[name], present, parameter):
                    what = f"{described(key)} of {name!r} is {described(value)}"
                    now = described(present[key]) if key in present else "another kind"
                    raise ValueError(f"{what}; {kind} keeps {now}")
            if whole and present and set(saved) != set(present):
                raise ValueError(
                    f"the state of {name!r} has {sorted(saved)[:6]}; {kind} keeps {sorted(present)}"
                )


def watch_anew(run: RunState, budget: MetricGuard | None) -> list[str]:
    """Forget what another metric said; says so, if a cut was on probation."""
    surprises = []
    watched = "" if budget is None else f"{budget.monitor} {budget.mode}"
    if run.watched != watched:
        if run.trial is not None:
            run.trial = None
            surprises.append("max_drop watches something else now: the last cut is kept.")
        run.best, run.watched = None, watched
    return surprises


def _shapes(sums: Mapping[str, GradientSums]) -> dict[str, tuple[int, int, bool]]:
    return {key: (s.dimension, s.units, s.over_units) for key, s in sums.items()}
