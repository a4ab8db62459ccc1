"""The benchmarks of cost: rivals that say the same as we do, fits, records; never a time."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import rival_costs, scaling
from benchmarks.communication import encoder, refit_bytes, refit_reductions
from benchmarks.cost_tables import filled, markdown
from benchmarks.measuring import Cost, Part, cost_of_hooks, measured, take_turns
from benchmarks.rival_costs import noisy
from benchmarks.rival_scores import (
    log_det_from_samples,
    log_det_information,
    neighbour_information,
    symmetric_sum,
)
from lightning_mi_prune import MutualInformation
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.evidence import Evidence
from lightning_mi_prune.families import find_axes
from lightning_mi_prune.information import plugin_bias, unit_information

ROOT = Path(__file__).parent.parent
CLOCKS = ("wall_s", "cpu_s", "peak_mb")


def site(units=12, entries=1, outputs=5, samples=400):
    torch.manual_seed(1)
    d = units * entries
    x = torch.randn(samples, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
    readout = torch.randn(outputs, d, dtype=torch.float64)
    covariance = x.T.cov(correction=0)
    return x, Evidence("units", entries, samples, x.mean(0), covariance, readout)


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_a_determinant_a_neuron_gives_our_scores(ridge):
    _, known = site()
    joint = noisy(known, ridge)
    theirs = log_det_information(*joint, units=known.units)
    assert torch.allclose(unit_information(*joint), theirs, atol=1e-6)
    # What the criterion says is that, less a bias that all units share.
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


@pytest.mark.parametrize("entries", [1, 3])
def test_determinants_of_samples_are_those_of_their_covariances(entries):
    x, known = site(units=6, entries=entries)
    joint = noisy(known, 0.0)
    found = log_det_from_samples(x, x @ known.readout.T, 4, entries)
    assert torch.allclose(found, log_det_information(*joint, 4, entries), atol=1e-6)


def test_neighbours_find_the_information_of_a_gaussian_pair():
    torch.manual_seed(0)
    y = torch.randn(4000)
    x = torch.stack([0.8 * y + 0.6 * torch.randn(4000), torch.randn(4000)], dim=1)
    found = neighbour_information(x.numpy(), y.numpy())
    assert found == pytest.approx([0.5108, 0.0], abs=0.06)


def test_the_symmetric_product_is_a_triangle_of_the_whole_one():
    x = torch.randn(50, 7, dtype=torch.float64)
    total = torch.zeros(7, 7, dtype=torch.float64).numpy().T
    for _ in range(2):
        symmetric_sum(x.numpy(), total)
    assert torch.allclose(torch.tensor(total).triu(), 2 * (x.T @ x).triu())
    assert not torch.tensor(total).tril(-1).any()


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


def test_what_a_refit_sends_is_what_was_worked_out_on_paper():
    network = encoder(num_hidden_layers=2, hidden_size=24, intermediate_size=96)
    axes = choose_axes(find_axes(network))
    sizes = refit_reductions(network)
    assert len(sizes) == 9  # six linear layers a layer; query, key and value of the lowest stay
    assert sum(sizes) == refit_bytes(axes, network)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Both benchmarks on tiny shapes, as anybody calls them."""
    folder = tmp_path_factory.mktemp("results")
    bodies = []
    for module in (rival_costs, scaling):
        path = folder / f"{module.__name__}.json"
        module.main(["--quick", "--busy", "--repeats", "1", "--results", str(path)])
        bodies.append(json.loads(path.read_text()))
    return bodies


def test_records_say_what_was_measured_where_and_how(quick):
    for body in quick:
        assert body["machine"]["busy"] is True
        assert {"cpu", "cores", "threads", "torch"} <= set(body["machine"])
        assert body["settings"]["repeats"] == 1
        assert body["settings"]["seed"] == 0
    (record,) = quick[0]["records"]
    assert set(asdict(rival_costs.QUICK)) < set(quick[0]["settings"])
    for part in record["parts"].values():
        for key in CLOCKS:
            assert part[key]["min"] <= part[key]["median"] <= part[key]["max"]
    for name in ("log_det", "log_det_of_samples", "neighbours_one_readout"):
        part = record["parts"][name]
        assert 0 < part["timed_neurons"] < part["neurons"] == record["neurons"] == 96
    growth = quick[1]["sweeps"]
    assert set(growth) == {"width", "depth", "positions", "validation"}
    for sweep in growth.values():
        for part in sweep["parts"].values():
            assert len(part["costs"]) == len(sweep["sizes"])
            assert set(part["exponent"]) == {"cpu_s", "wall_s"}
    assert [r["ranks"] for r in quick[1]["ranks"]] == [1, 2, 4] * 2
    assert quick[1]["ranks"][0]["sent_mb"] == 0


def test_tables_are_made_of_every_part(quick):
    tables = markdown(*quick)
    (record,) = quick[0]["records"]
    assert tables["rivals"].count("\n") == len(record["parts"]) + 1
    assert "1 of 96 neurons" in tables["rivals"]
    parts = sum(len(sweep["parts"]) for sweep in quick[1]["sweeps"].values())
    assert tables["scaling"].count("\n") == parts + 1
    for name in ("rivals", "goals", "scaling", "ranks"):
        table = tables[name]
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1


def test_the_page_on_cost_is_what_the_records_say():
    results = ROOT / "benchmarks/results"
    bodies = [json.loads((results / f"{n}.json").read_text()) for n in ("rival_costs", "scaling")]
    page = (ROOT / "docs/cost.md").read_text()
    tables = markdown(*bodies)
    assert len(tables) == 6
    assert all(table in page for table in tables.values())
    assert filled(page, tables) == page
