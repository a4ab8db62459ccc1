"""What a resumed run lets go of, where its options are others than those it stopped with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.anatomy import Anatomy
from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.records import Trial
from lightning_mi_prune.callbacks.schedule import Schedule
from lightning_mi_prune.callbacks.state import RunState
from lightning_mi_prune.gradients import blank
from lightning_mi_prune.incisions import shapes_at
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.states import fits, held
from lightning_mi_prune.untrusted import described, reading

__all__ = ["Asked", "check_trial", "reconcile", "resumed", "watch_anew"]

_REMEDY = "take another checkpoint, or resume without max_drop, which keeps the last cut"


@dataclass(frozen=True)
class Asked:
    """What the options of a run ask for.

    Args:
        budget: What a cut may cost.
        aim: What the schedule leads to, where that is not a sparsity.
        calls: Positions of calls to store; 0 stores none.
        steps: Training steps to take gradients from.
    """

    budget: AccuracyBudget | None = None
    aim: str = ""
    calls: int = 0
    steps: int = 0


def reconcile(
    run: RunState, axes: list[WidthAxis], module: nn.Module, plan: Plan, asked: Asked
) -> list[str]:
    """Let go of what does not fit the options a run resumes with.

    Args:
        run: The run, as it was read.
        axes: Axes that may be cut now.
        module: The model.
        plan: The plan it carries.
        asked: What is asked for now.

    Returns:
        What was let go of, in a sentence each.
    """
    budget, aim = asked.budget, asked.aim
    surprises, names = [], {axis.name for axis in axes}
    places = {key: readers[0] for axis in axes for key, readers in axis.places.items()}
    widths = {key: module.get_parameter(f"{r}.weight").shape[1] for key, r in places.items()}
    shapes, heard = _shapes(blank(module, axes, plan)), run.heard
    if run.felt is not None and (not asked.steps or _shapes(run.felt) != shapes):
        run.felt = None  # the rest of the epoch is felt anew
    if heard is not None and {key: m.dimension for key, m in heard.moments.items()} != widths:
        run.heard = None
        surprises.append("What was heard was of other axes; a cut waits for the next validation.")
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
        surprises.append("The pending cut was chosen for other axes; it will be chosen again.")
    if run.aim != aim and run.fitted.epochs:
        # Goals are counted from the model as built: what is reached already asks for no cut.
        run.reached, run.fitted, run.schedule, run.pending = 0.0, Schedule(), Schedule(), None
        surprises.append(f"The budget was {run.aim or 'a sparsity'}; the schedule begins anew.")
    run.aim = aim
    return surprises + watch_anew(run, budget)


def resumed(run: RunState, plan: Plan) -> dict[str, object]:
    """What all ranks must have read from the same checkpoint, by name."""
    return {
        "the plan of the model": plan.digest(),
        "the sparsity reached": run.reached,
        "the epoch of the cut on probation": run.trial and run.trial.epoch,
        "the epoch of the pending cut": run.pending and run.pending.epoch,
    }


def check_trial(
    trial: Trial,
    module: nn.Module,
    anatomy: Anatomy,
    current: Plan,
    optimizers: Sequence[Optimizer],
) -> None:
    """Refuse, before the first batch, a snapshot that a rollback could not go back to.

    Args:
        trial: The cut on probation, as a checkpoint holds it.
        module: The model.
        anatomy: What it can lose, as built.
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
            for stack in anatomy.stacks
            if before.kept.get(stack.name) != current.kept.get(stack.name)
        )
        _check_weights(trial, module, shapes_at(module, anatomy.standing(before), before), changed)
        _check_optimizers(trial, module, optimizers, changed)


def _check_weights(
    trial: Trial, module: nn.Module, shapes: Mapping[str, list[int]], changed: tuple[str, ...]
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
    trial: Trial, module: nn.Module, optimizers: Sequence[Optimizer], changed: tuple[str, ...]
) -> None:
    if len(trial.optimizers) != len(optimizers):
        raise ValueError(f"it has {len(trial.optimizers)} optimizers, not {len(optimizers)}")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for optimizer, states in zip(optimizers, trial.optimizers, strict=True):
        kind = type(optimizer).__name__
        # Those of torch keep everything of a parameter from its first step on.
        whole = type(optimizer).__module__.startswith("torch.optim")
        for _, _, parameter in held(optimizer):
            name, present = names.get(id(parameter), ""), optimizer.state.get(parameter, {})
            saved: Mapping[str, Any] = states.get(name, {})
            if not saved or name.startswith(changed):
                continue
            for key, value in saved.items():
                if not fits(key, value, trial.weights[name], present, parameter):
                    what = f"{described(key)} of {name!r} is {described(value)}"
                    now = described(present[key]) if key in present else "another kind"
                    raise ValueError(f"{what}; {kind} keeps {now}")
            if whole and present and set(saved) != set(present):
                raise ValueError(
                    f"the state of {name!r} has {sorted(saved)[:6]}; {kind} keeps {sorted(present)}"
                )


def watch_anew(run: RunState, budget: AccuracyBudget | None) -> list[str]:
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
    return {key: (s.dimension, s.units, s.inside) for key, s in sums.items()}
