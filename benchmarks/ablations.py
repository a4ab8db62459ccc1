"""What each part of the method is worth: one thing changed at a time, without a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from benchmarks.methods import DEFAULT, SETTINGS, Setting
from benchmarks.records import Figures, Job, single
from benchmarks.subjects import (
    UNITS,
    Subject,
    calibrate_activations,
    calibrate_gradients,
    cut,
    opened,
    tested,
)
from benchmarks.tasks import SEEDS
from lightning_mi_prune import Plan
from lightning_mi_prune.axes import count_parameters, full_plan
from lightning_mi_prune.costs import measure_macs
from lightning_mi_prune.sample import Heard

__all__ = ["Calibrations", "ablations", "measured"]


class Calibrations:
    """A dense model, and what was gathered of it: once for all settings that can share it.

    Args:
        plain: The model and its tests, not calibrated.
    """

    def __init__(self, plain: Subject) -> None:
        self.plain = plain
        self._activations: dict[Any, Heard] = {}
        self._gradients: dict[Any, Any] = {}

    def subject(self, setting: Setting) -> Subject:
        """The model with the calibration that a setting asks for."""
        model, rows = self.plain.model, self.plain.validation
        chosen = self.plain.of((*UNITS, *setting.also))
        about = setting.positions, setting.stored, setting.also
        if about not in self._activations:
            sizes = {"positions": setting.positions, "stored": setting.stored}
            found = calibrate_activations(model, chosen, rows, self.plain.seed, **sizes)
            self._activations[about] = found
        steps = setting.steps, setting.also
        if steps not in self._gradients:
            sums = calibrate_gradients(model, chosen, rows, steps=setting.steps)
            self._gradients[steps] = dict(sums)
        calibration = replace(self._activations[about], gradients=self._gradients[steps])
        return replace(self.plain, chosen=chosen, calibration=calibration)


def ablations(
    tasks: Sequence[str] = ("trec-6",),
    seeds: Sequence[int] = SEEDS,
    sparsities: Sequence[float] = (0.75, 0.9),
    settings: Sequence[str] = (),
) -> Iterator[Job]:
    """What each part of the method is worth, in one shot."""
    chosen = [setting for setting in SETTINGS if not settings or setting.name in settings]
    for task, seed in ((task, seed) for task in tasks for seed in seeds):
        for sparsity, setting in ((s, setting) for s in sparsities for setting in chosen):
            about = {"task": task, "seed": seed, "setting": setting.name, "sparsity": sparsity}
            yield single(about, _measured, task, seed, setting, sparsity)


@lru_cache(maxsize=1)
def calibrations_of(task: str, seed: int) -> Calibrations:
    """The dense model of a task, with what its settings have gathered so far."""
    return Calibrations(opened(task, seed, calibrated=False)[0])


def _measured(task: str, seed: int, setting: Setting, sparsity: float) -> Figures:
    return measured(calibrations_of(task, seed), setting, sparsity)


def measured(calibrations: Calibrations, setting: Setting, sparsity: float) -> Figures:
    """Prune a copy of the model and test it.

    Args:
        calibrations: The dense model and what is known of it.
        setting: How to prune.
        sparsity: Share of the parameters of neurons and heads that must go. Where other units are
            cut too, as many parameters go of all of them together; where MACs are counted, as many
            of them stay as the default leaves.
    """
    subject = calibrations.subject(setting)
    prunable = count_parameters(calibrations.plain.chosen)
    budget = sparsity * prunable / count_parameters(subject.chosen)
    work = measure_macs(subject.model, subject.axes, subject.calibration.examples)
    if setting.counted == "MACs":
        plain = replace(DEFAULT, reconstruction=False)
        _, default = cut(calibrations.subject(DEFAULT), plain, sparsity)
        budget = work.total(widths_of(default))
    started = time.process_time()
    model, plan = cut(subject, setting, budget)
    seconds = time.process_time() - started
    before, left = (sum(p.numel() for p in net.parameters()) for net in (subject.model, model))
    return {
        **tested(subject, model),
        "reached": (before - left) / prunable,
        "macs": work.total(widths_of(plan)),
        "dense_macs": work.total(widths_of(full_plan(subject.axes))),
        "cpu_seconds": seconds,
    }


def widths_of(plan: Plan) -> dict[str, int]:
    """Units that a plan keeps, by axis name."""
    return {name: plan.width(name) for name in plan.kept}
