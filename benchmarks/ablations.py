"""Ablations: one part of the method changed at a time, without a training step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from benchmarks.methods import DEFAULT, SETTINGS, Setting
from benchmarks.records import Figures, Job, single
from benchmarks.subjects import (
    UNITS,
    Subject,
    calibrate_gradients,
    cut,
    opened,
    quality_of,
)
from benchmarks.tasks import SEEDS
from lightning_mi_prune.allocation.macs import measure_macs
from lightning_mi_prune.calibration.collect import collect_activations
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.gradients import GradientSums
from lightning_mi_prune.core.running import run_batch
from lightning_mi_prune.graph.groups import count_parameters, full_plan

__all__ = ["ablations"]


@lru_cache(maxsize=8)
def _activations(
    task: str, seed: int, positions: int, stored: int, also: tuple[str, ...]
) -> CalibrationData:
    subject, _ = opened(task, seed, calibrated=False)
    known = subject.model, subject.of((*UNITS, *also)), subject.validation, run_batch
    return collect_activations(*known, positions=positions, stored_positions=stored, seed=seed)


@lru_cache(maxsize=8)
def _gradients(task: str, seed: int, steps: int, also: tuple[str, ...]) -> dict[str, GradientSums]:
    subject, _ = opened(task, seed, calibrated=False)
    known = subject.model, subject.of((*UNITS, *also)), subject.validation
    return dict(calibrate_gradients(*known, steps=steps))


def calibrated(task: str, seed: int, setting: Setting) -> Subject:
    """The dense model with the calibration of a setting; settings share what they can."""
    sizes, also = (setting.positions, setting.stored), setting.also
    gradients = _gradients(task, seed, setting.steps, also)
    calibration = replace(_activations(task, seed, *sizes, also), gradients=gradients)
    subject, _ = opened(task, seed, calibrated=False)
    return replace(subject, chosen=subject.of((*UNITS, *also)), calibration=calibration)


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
            yield single(about, measured, task, seed, setting, sparsity)


def measured(task: str, seed: int, setting: Setting, sparsity: float) -> Figures:
    """Prune a copy of the model and test it.

    Args:
        task: The task.
        seed: Seed of the dense model.
        setting: How to prune.
        sparsity: Share of the parameters of neurons and heads to remove. Where other units are cut
            too, as many parameters of all of them together; where MACs are counted, as many MACs
            stay as with the default.
    """
    subject = calibrated(task, seed, setting)
    prunable = count_parameters(subject.of(UNITS))
    budget = sparsity * prunable / count_parameters(subject.chosen)
    work = measure_macs(subject.model, subject.groups, subject.calibration.examples)
    if setting.counted == "MACs":
        plain = replace(DEFAULT, weights="compensation")
        _, default = cut(calibrated(task, seed, DEFAULT), plain.options(sparsity, seed))
        budget = work.total(default.widths)
    started = time.process_time()
    model, plan = cut(subject, setting.options(budget, seed))
    seconds = time.process_time() - started
    before, left = (sum(p.numel() for p in net.parameters()) for net in (subject.model, model))
    return {
        **quality_of(subject, model),
        "reached": (before - left) / prunable,
        "macs": work.total(plan.widths),
        "dense_macs": work.total(full_plan(subject.groups).widths),
        "cpu_seconds": seconds,
    }
