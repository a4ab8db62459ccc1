"""A dense model under test: its calibration, cuts of it, and what is left afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from benchmarks.tasks import Batch, finetuned
from lightning_mi_prune import PruningPlan, apply_plan, discover
from lightning_mi_prune.calibration.collect import collect_activations
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.gradients import GradientRecorder, GradientSums, check_gradients
from lightning_mi_prune.core.running import run_batch
from lightning_mi_prune.graph.graph import PruningGraph, choose_groups
from lightning_mi_prune.graph.groups import DependencyGroup, count_parameters, full_plan
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.pipeline import PipelineOptions, decide, reconstruct

__all__ = [
    "EVERY_UNIT",
    "POSITIONS",
    "STEPS",
    "STORED",
    "UNITS",
    "Kept",
    "Subject",
    "calibrate_gradients",
    "calibrated_for",
    "cut",
    "graph_of",
    "opened",
    "quality_of",
    "score",
    "settle",
    "size_of",
    "weight_names",
    "width_of",
]

UNITS = ("ffn", "heads")
EVERY_UNIT = (*UNITS, "head_dim")
# Samples of each group, positions of stored inputs, and batches whose gradients are taken.
POSITIONS, STORED, STEPS = 40_000, 65_536, 64

Kept = dict[str, list[int]]

_GRAPHS: dict[tuple[str, str], PruningGraph] = {}


def graph_of(model: nn.Module) -> PruningGraph:
    """What a model can lose; found once for models that are built alike, so outside all timing."""
    key = (type(model).__name__, str(getattr(model, "config", None)))
    if key not in _GRAPHS:
        _GRAPHS[key] = discover(model)
    return _GRAPHS[key]


def calibrate_gradients(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    batches: Sequence[Batch],
    *,
    steps: int = STEPS,
) -> Mapping[str, GradientSums]:
    """Gradients of the loss on some of the batches, evenly spread; no weight changes."""
    recorder = GradientRecorder(model, groups, steps=steps, batches=len(batches), taylor=True)
    with recorder:
        for index, batch in enumerate(batches):
            with recorder.step(index):
                model(**batch).loss.backward()
            model.zero_grad(set_to_none=True)
    check_gradients(recorder.sums)
    return recorder.sums


@dataclass(frozen=True)
class Subject:
    """A dense model with its calibration, the same for every method.

    Args:
        seed: Seed of the split and the model.
        model: The network, in evaluation mode; only run and copied.
        groups: Everything in it that can be cut.
        chosen: What is cut: by default neurons and heads.
        calibration: Moments, stored inputs and gradients from the validation split.
        validation: Batches of the validation split.
        test: Batches of the test split.
        accuracy: Accuracy on the test split.
        cross_entropy: Mean cross-entropy on it, in nats.
    """

    seed: int
    model: nn.Module
    groups: Sequence[DependencyGroup]
    chosen: Sequence[DependencyGroup]
    calibration: CalibrationData
    validation: Sequence[Batch]
    test: Sequence[Batch]
    accuracy: float
    cross_entropy: float

    def of(self, units: Sequence[str]) -> list[DependencyGroup]:
        """The groups of some kinds of unit."""
        return choose_groups(self.groups, kinds=units)

    def cutting(self, units: Sequence[str]) -> Subject:
        """The same, of which these kinds of unit are cut."""
        return replace(self, chosen=self.of(units))


def examine(
    seed: int,
    model: nn.Module,
    validation: Sequence[Batch],
    test: Sequence[Batch],
    *,
    calibrated: bool = True,
) -> Subject:
    """Calibrate on the validation split, and test the dense model."""
    groups = graph_of(model).groups
    chosen = choose_groups(groups, kinds=UNITS)
    known = model, groups, chosen, CalibrationData(), validation, test
    subject = Subject(seed, *known, *score(model, test))
    return replace(calibrated_for(subject, EVERY_UNIT), chosen=chosen) if calibrated else subject


def calibrated_for(subject: Subject, units: Sequence[str]) -> Subject:
    """The same, of which these kinds of unit are cut, calibrated for them."""
    model, every, rows = subject.model, subject.of(units), subject.validation
    sizes: dict[str, Any] = {
        "positions": POSITIONS,
        "stored_positions": STORED,
        "seed": subject.seed,
    }
    calibration = collect_activations(model, every, rows, run_batch, **sizes)
    calibration.gradients = calibrate_gradients(model, every, rows)
    return replace(subject, chosen=every, calibration=calibration)


@lru_cache(maxsize=1)  # jobs of one model follow one another
def opened(task: str, seed: int, *, calibrated: bool = True) -> tuple[Subject, Any]:
    """The fine-tuned model of a task, calibrated or not, and its data."""
    model, data = finetuned(task, seed)
    rows, test = [*data.val_dataloader()], [*data.test_dataloader()]
    return examine(seed, model, rows, test, calibrated=calibrated), data


@torch.no_grad()
def score(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Accuracy, and mean cross-entropy in nats."""
    right, nats, rows = 0, 0.0, 0
    for batch in batches:
        logits, labels = model(**batch).logits.float(), batch["labels"]
        right += int((logits.argmax(-1) == labels).sum())
        nats += float(functional.cross_entropy(logits, labels, reduction="sum"))
        rows += len(labels)
    return right / rows, nats / rows


def cut(subject: Subject, options: PipelineOptions) -> tuple[nn.Module, PruningPlan]:
    """Prune a copy of the model; also returns the plan."""
    data, groups, reconstruction = subject.calibration, subject.groups, options.reconstruction
    model, plan = copy.deepcopy(subject.model), full_plan(groups)
    decision = decide(options, model, groups, subject.chosen, plan, data)
    if decision is None:  # the model is as small already
        return model, plan
    decision = reconstruct(model, groups, plan, decision, reconstruction, data)
    apply_plan(model, groups, decision.plan, current=plan, compensated=decision.compensated)
    return model, plan.then(decision.plan)


def quality_of(subject: Subject, model: nn.Module) -> dict[str, Any]:
    """Accuracy and cross-entropy of a pruned model on the test split, beside the dense one."""
    accuracy, cross_entropy = score(model, subject.test)
    return {
        "n_test": sum(len(batch["labels"]) for batch in subject.test),
        "accuracy": accuracy,
        "dense_accuracy": subject.accuracy,
        "cross_entropy": cross_entropy,
        "dense_cross_entropy": subject.cross_entropy,
    }


def size_of(
    model: nn.Module, groups: Sequence[DependencyGroup], dims: Sequence[DependencyGroup] = ()
) -> dict[str, Any]:
    """What is left of a model whose masks are settled, counted alike for every method.

    Args:
        model: The pruned model.
        groups: Neurons and heads of the dense one.
        dims: Dimensions of heads, where they may have been removed.

    Returns:
        ``reached``, the share of the prunable parameters that was removed or is zero; ``masked``,
        whether any are zero; the ``parameters`` that are left; ``kept``, the units of every layer
        that is left, bottom to top, by kind of group.
    """
    modules = dict(model.named_modules())
    sizes = {}
    for group in dims:
        number = next(n for n in group.attributes if n.layout == ((group.name,),))
        module = model.get_submodule(number.module)
        sizes[group.name] = int(getattr(module, number.attribute))
    widths = {
        group.name: width_of(model, group, entries_of(group, sizes))
        for group in groups
        if group.consumers[0] in modules
    } | sizes
    groups = [*groups, *dims]
    kept: Kept = {}
    for group in sorted(groups, key=lambda group: group.level):
        if group.name in widths:
            kept.setdefault(group.kind, []).append(widths[group.name])
    # Layers are numbered anew when some are removed, so it is the top ones that have no width.
    left = count_parameters(groups, {group.name: widths.get(group.name, 0) for group in groups})
    weights = dict(model.named_parameters(remove_duplicate=False))  # without those of such layers
    known = (weights[name] for name in weight_names(groups) if name in weights)
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in known)
    reached = 1 - (left - zeros) / count_parameters(groups)
    parameters = sum(parameter.numel() for parameter in model.parameters()) - zeros
    return {"reached": reached, "masked": zeros > 0, "parameters": parameters, "kept": kept}


def weight_names(groups: Sequence[DependencyGroup]) -> list[str]:
    """Names of the weight matrices that the units of these groups consist of."""
    names = (s.tensor for group in groups for s in group.tensors if s.tensor.endswith(".weight"))
    return list(dict.fromkeys(names))


def settle(model: nn.Module) -> nn.Module:
    """Make masks of `torch.nn.utils.prune` permanent: zeros in plain weights."""
    for module in model.modules():
        if hasattr(module, "weight_mask"):
            prune.remove(module, "weight")  # type: ignore[no-untyped-call]
    return model


def entries_of(group: DependencyGroup, widths: Mapping[str, int] | None = None) -> int:
    """Entries of each unit in the first tensor of a group, at the widths of its partners."""
    return layout_size(group.tensors[0].layout, group.all_widths(widths or {}) | {group.name: 1})


def width_of(model: nn.Module, group: DependencyGroup, entries: int) -> int:
    """Units of a group that are there, each of so many entries."""
    return model.get_parameter(f"{group.consumers[0]}.weight").shape[1] // entries
