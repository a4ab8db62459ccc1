"""PRUNE    a trained module in one call, without a Trainer."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.batch_norm import reestimate_batch_norm
from lightning_mi_prune.budget import Budget, asked_budget, sparsity_of
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.dry_run import (
    check_consumers,
    compiled_for,
    half_plan,
    held_elsewhere,
)
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.families import find_axes, is_within, untouched
from lightning_mi_prune.gradients import GradientListener
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.measure import macs_of_calls
from lightning_mi_prune.method import Method, pull_back
from lightning_mi_prune.optimizers import rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.relevance import GradientSums, check_gradients
from lightning_mi_prune.sample import Heard, call_step, placed, run_batch
from lightning_mi_prune.selection import Information
from lightning_mi_prune.states import check_optimizers
from lightning_mi_prune.still import random_state, still
from lightning_mi_prune.surgery import apply, check, revert

__all__ = ["Pruned", "prune"]

_NOTHING = object()

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Pruned:
    """What one call of :func:`prune` did.

    Args:
        plan: Survivors of every axis, with the order in which the others went.
        sparsity: Share of the prunable parameters that is gone, against the model as built; whole
            layers that went before do not count.
        parameters: Parameters of the module before and after.
        prunable_parameters: Those of the axes that could be cut, before and after.
        macs: Multiply-accumulates of one example, before and after.
        information: What each axis kept of its information with the layer above.
        seconds: Time spent ``listening``, feeling ``gradients``, ``scoring``, ``refitting``.
    """

    plan: Plan
    sparsity: float
    parameters: tuple[int, int]
    prunable_parameters: tuple[int, int]
    macs: tuple[int, int]
    information: Mapping[str, Information]
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
    method: Method | None = None,
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
) -> Pruned:
    """Make a trained module smaller in one call: listen, rank, allot, select, cut, refit.

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
        units: Kinds of unit to cut (:func:`axes.choose_axes`).
        module: Path of the submodule to search.
        include: Only axes whose name this regular expression finds.
        exclude: No axes whose name this regular expression finds.
        positions: Samples to listen to on each axis.
        relevance_steps: Batches of the backward passes.
        training: Batches for them; default those of ``dataloader``.
        batch_norm: Whether running statistics of BatchNorm are estimated anew, on as many batches,
            after the cut.
        optimizers: Optimizers whose state is carried across the cut.
        seed: Seed of the draw of positions.

    Raises:
        PruningError: If the module, the data, the budget or the method do not allow it.

    Example:
        >>> from lightning_mi_prune import linear_axis, register_family
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> @register_family("docs-oneshot", matches=lambda m: m is net)
        ... def describe(m):
        ...     return [linear_axis(m, "hidden", kind="ffn", producers=["0"], readers=["2"])]
        >>> batches = [torch.randn(500, 8) for _ in range(4)]
        >>> done = prune(net, batches, 0.75, loss=lambda m, x: m(x).square().mean())
        >>> net[0].out_features, done.plan.width("hidden")
        (16, 16)
    """
    targets = (target_parameters, target_macs, target_latency_ms, keep_information)
    asked = asked_budget(sparsity, *targets)
    judged = loss is not None or hasattr(model, "training_step")
    if method is None:
        method = Method(asked, relevance="gradient" if judged else "readers")
    elif method.relevance == "gradient" and not judged:
        raise PruningError(
            "relevance='gradient' asks for training steps, but there is no loss. Expected "
            "loss(model, batch) or a LightningModule; or use relevance='readers'."
        )
    by_hand = not getattr(model, "automatic_optimization", True)
    if method.relevance == "gradient" and by_hand and loss is None:
        raise PruningError(
            f"{type(model).__name__} optimizes by hand, so its training_step cannot run without "
            "a Trainer. Pass loss(model, batch), or use relevance='readers'."
        )
    method = replace(method, budget=asked)
    first = _check_input(model, dataloader)
    known = PlanKeeper.held_by(model)
    keeper = PlanKeeper.of(model, partial(find_axes, within=module))
    try:
        axes, plan = keeper.axes, keeper.plan
        mine = [axis for axis in axes if is_within(axis.name, module)]
        others = untouched(model, axes, module)
        chosen = choose_axes(mine, units=units, include=include, exclude=exclude, modules=others)
        check(model, chosen, plan)
        _check_surroundings(model, chosen, optimizers)
        before = {name: len(kept) for name, kept in plan.kept.items()}
        method.check(model, axes, chosen, before)
        steps = {"forward": partial(_try_forward, forward or run_batch, first)}
        if method.relevance == "gradient":
            steps["loss"] = partial(_try_loss, loss or _train, first)
        with still(model):  # a function of the user may run the model that it knows by name
            check_consumers(model, keeper.anatomy, plan, half_plan(chosen, plan), steps)
        parameters = sum(p.numel() for p in model.parameters())
        seconds = dict.fromkeys(("listening", "gradients", "scoring", "refitting"), 0.0)
        with _timed(seconds, "listening"):
            heard = _hear(model, chosen, dataloader, forward or run_batch, method, positions, seed)
        if method.relevance == "gradient":
            with _timed(seconds, "gradients"):
                felt = GradientListener(model, chosen, steps=relevance_steps, plan=plan)
                batches = dataloader if training is None else training
                heard.gradients = _feel(model, batches, loss or _train, felt, relevance_steps)
        with _timed(seconds, "scoring"):
            selection = method.decide(model, axes, chosen, plan, heard)
        if selection is None:
            raise PruningError(f"The module meets {asked} already: nothing to cut. Ask for less.")
        macs = macs_of_calls(model, heard.examples)
        heard.moments = {}  # as large as the model; what follows needs the room
        with _timed(seconds, "refitting"):
            selection = pull_back(model, axes, plan, selection, method, heard)
        folded, turned = selection.folded, selection.turned
        rewrites = apply(model, axes, selection.plan, current=plan, folded=folded, turned=turned)
        try:
            rebind(optimizers, rewrites)
        except BaseException:
            revert(model, axes, plan, rewrites)
            raise
        if batch_norm:
            run = partial(_run_own, forward or run_batch)
            reestimate_batch_norm(model, _first(dataloader, relevance_steps), run)
    except BaseException:
        if known is None:  # a refused model keeps no hooks of ours
            keeper.close()
        raise
    keeper.plan = plan.then(selection.plan)
    after = {axis.name: keeper.plan.width(axis.name) for axis in chosen}
    return Pruned(
        plan=keeper.plan,
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
    with random_state(model):  # a loader draws a seed
        first = next(iter(batches), _NOTHING)
    if first is _NOTHING:
        raise PruningError(
            f"The {type(batches).__name__} gave no batches; expected a few thousand samples. Check "
            "the data set, its filters and drop_last."
        )
    return first


def _check_surroundings(
    model: nn.Module, chosen: Sequence[WidthAxis], optimizers: Sequence[Optimizer]
) -> None:
    """Refuse, or warn of, what holds the tensors that may be cut.

    Raises:
        PruningError: If a compiled module or an optimizer could not follow.
    """
    tensors = {s.tensor: model.get_parameter(s.tensor) for a in chosen for s in a.slices}
    check_optimizers(optimizers, tensors.values())
    compiled = compiled_for(model, {name.rpartition(".")[0] for name in tensors})
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
    with still(model), torch.no_grad():
        forward(model, _own(batch, model))


def _try_loss(loss: Loss, batch: Any, model: nn.Module) -> None:
    with still(model), torch.enable_grad():
        _checked(loss(model, _own(batch, model)), skips=loss is _train)


def _own(batch: Any, model: nn.Module) -> Any:
    """A batch where the model is, of which entries can be taken out."""
    return placed(batch, next(model.parameters()).device)


def _hear(
    module: nn.Module,
    chosen: Sequence[WidthAxis],
    dataloader: Iterable[Any],
    forward: Forward,
    method: Method,
    positions: int,
    seed: int,
) -> Heard:
    """What the module says on the data."""
    listener = Listener(
        module,
        chosen,
        positions=positions,
        batches=_length(dataloader),
        seed=seed,
        calls=method.refit_positions if method.refit else 0,
    )
    _listen(module, dataloader, forward, listener)
    listener.check()
    return Heard(listener.moments, ranks=[listener.stored], examples=listener.calls(chosen))


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
    module: nn.Module, batches: Iterable[Any], forward: Forward, listener: Listener
) -> None:
    with still(module), torch.no_grad(), listener:
        for batch in batches:
            listener.start_batch()
            forward(module, _own(batch, module))
            if listener.is_full:
                break


def _feel(
    module: nn.Module, batches: Iterable[Any], loss: Loss, felt: GradientListener, steps: int
) -> Mapping[str, GradientSums]:
    with still(module), torch.enable_grad(), felt:
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
