"""The benchmarks of cost: baselines that compute what we do, fits, records; never a time."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from benchmarks import costs, measuring, scaling
from benchmarks.costs import log_det_information, noisy
from benchmarks.measuring import Cost, Part, _quietly, cost_of_hooks, measured, take_turns
from benchmarks.scaling import encoder, reconstruction_bytes
from lightning_mi_prune import PruningPlan
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.core.options import Reconstruction
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.importance.criteria import MutualInformation
from lightning_mi_prune.importance.information import plugin_bias, unit_information
from lightning_mi_prune.importance.statistics import UnitStatistics
from lightning_mi_prune.pipeline import reconstruct
from lightning_mi_prune.reconstruction.compensation import Decision
from tests.support.graphs import groups_of

CLOCKS = ("wall_s", "cpu_s", "peak_mb")


def site(units=12, entries=1, outputs=5, samples=400):
    torch.manual_seed(1)
    d = units * entries
    x = torch.randn(samples, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
    readout = torch.randn(outputs, d, dtype=torch.float64)
    covariance = x.T.cov(correction=0)
    return x, UnitStatistics("units", entries, samples, x.mean(0), covariance, readout)


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_a_determinant_a_neuron_gives_our_scores(ridge: float) -> None:
    _, known = site()
    joint = noisy(known, ridge)
    theirs = log_det_information(*joint, units=known.units)
    assert torch.allclose(unit_information(*joint), theirs, atol=1e-6)
    # What the criterion computes is that, less a bias that all units share.
    effective = float(torch.linalg.solve(joint[2], known.above()).diagonal().sum())
    ours = MutualInformation("topk", ridge=ridge).scores(known)
    assert torch.allclose(ours + plugin_bias(known.samples, effective), theirs, atol=1e-6)
    assert theirs.max() - theirs.min() > 0.1


def test_a_determinant_a_head_gives_our_scores():
    _, known = site(units=6, entries=3)
    joint = noisy(known, 0.5)
    theirs = log_det_information(*joint, units=6, entries=3)
    # Ours sees a head through a noise of a millionth of its variance.
    assert torch.allclose(unit_information(*joint, 3), theirs, atol=1e-4)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_fit_finds_a_power_law(power):
    sizes = [8, 16, 64, 512]
    assert scaling.exponent(sizes, [3e-4 * s**power for s in sizes]) == pytest.approx(power)


def test_the_fit_is_that_of_least_squares():
    x, noise = torch.arange(1.0, 6, dtype=torch.float64), torch.tensor([0.1, -0.2, 0.0, 0.3, -0.1])
    design = torch.stack([x.log(), torch.ones(5)], dim=1).double()
    logs = 2 * x.log() + noise
    expected = torch.linalg.lstsq(design, logs[:, None]).solution[0, 0]
    assert scaling.exponent(x.tolist(), logs.exp().tolist()) == pytest.approx(float(expected))


def test_parts_take_turns_and_say_how_much_of_them_was_measured():
    seen = []
    parts = {
        "whole": Part(lambda: seen.append("whole")),
        "share": Part(lambda: seen.append("share") or Cost(2.0, 3.0, 0.0), 2, 10, "neurons"),
    }
    found = take_turns(parts, 2, warm=True)
    assert seen == ["whole", "share"] * 3
    assert found["share"]["wall_s"] == {"median": 10.0, "min": 10.0, "max": 10.0}
    assert found["share"]["cpu_s"]["median"] == 15.0
    assert found["share"]["timed_neurons"] == 2
    assert found["share"]["neurons"] == 10
    assert set(found["whole"]) == set(CLOCKS)


def test_peak_memory_is_that_of_the_work_alone():
    measured(lambda: torch.ones(20_000_000))  # 80 MB, gone afterwards
    assert 35e6 < measured(lambda: torch.ones(10_000_000)).peak < 60e6
    assert measured(lambda: None).peak < 10e6


def test_hooks_are_timed_without_what_they_hang_on():
    layer = nn.Identity()
    slow = layer.register_forward_hook(lambda *_: time.sleep(0.05))
    cost = cost_of_hooks([layer], nullcontext(), lambda: layer(torch.ones(1)))
    slow.remove()
    assert 0 <= cost.wall < 0.05  # of the sleep that is outside, nothing
    assert not layer._forward_pre_hooks


def test_what_a_reconstruction_sends_is_what_was_worked_out_on_paper() -> None:
    network = encoder(num_hidden_layers=2, hidden_size=24, intermediate_size=96)
    groups = choose_groups(groups_of(network))
    with ActivationRecorder(network, groups, positions=512, batches=1, calls=512) as recorder:
        network(torch.randint(5, 1000, (16, 32)))
    sizes: list[int] = []

    def add(sums: Tensor) -> Tensor:
        sizes.append(sums.nbytes)
        return sums

    plan = PruningPlan(
        {a.name: a.size for a in groups}, {a.name: range(a.size // 2) for a in groups}
    )
    found = CalibrationData(recorder.moments, ranks=[recorder.stored])
    method = Reconstruction(positions=512)
    known = network, groups, full_plan(groups), Decision(plan, {}, {}), method, found
    reconstruct(*known, add=add)
    # Seven inputs, which query, key and value share, and nine layers: those of the lowest stay.
    assert len(sizes) == 7 + 9
    assert sum(sizes) == reconstruction_bytes(groups, network)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the seconds that a process takes to start, or to collect the garbage of all tests."""
    monkeypatch.setattr(measuring.gc, "collect", lambda: 0)
    for module in (costs, scaling):
        monkeypatch.setattr(
            module, "in_fresh_process", lambda work, *given: _quietly(work, 1, given)
        )


def test_parts_of_a_shape_are_measured_whole_or_in_part() -> None:
    pytest.importorskip("torch_pruning")
    (job,) = costs.costs(["tiny"], repeats=1)
    (figures,) = job.run()
    for part in figures["parts"].values():
        for key in CLOCKS:
            assert part[key]["min"] <= part[key]["median"] <= part[key]["max"]
    part = figures["parts"]["log_det"]
    assert 0 < part["timed_neurons"] < part["neurons"] == 96
    assert figures["repeats"] == 1


def test_the_steps_of_one_cut_are_measured() -> None:
    (job,) = costs.one_cut(["tiny"], repeats=2)
    (figures,) = job.run()
    assert figures["sums, MB"]["min"] == figures["sums, MB"]["max"] > 0
    whole = figures["reconstruction, CPU s"]["median"]
    assert 0 < figures["of which sums, CPU s"]["min"] < whole
    assert 0 < figures["of which strengths, CPU s"]["min"] < whole


def test_every_sweep_has_costs_and_exponents() -> None:
    for job in scaling.scaling(repeats=1, tiny=True):
        for setting, figures in zip(job.settings, job.run(), strict=True):
            assert figures["sizes"] == [*scaling.TINY[setting["grows"]]]
            for clock in ("cpu_s", "wall_s"):
                assert len(figures[clock]) == len(figures["sizes"])
                slope = scaling.exponent(figures["sizes"], figures[clock])
                assert figures[f"{clock}_exponent"] == pytest.approx(slope, abs=1e-3)
