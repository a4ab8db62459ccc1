from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import nn

from lightning_mi_prune import prune
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.empty_linear import parameters_of
from lightning_mi_prune.core.errors import PruningWarning
from lightning_mi_prune.core.options import Calibration
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.spilling import spilling
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.importance.criteria import MutualInformation
from lightning_mi_prune.importance.stability import Agreement, agreement_of_halves, warn_of_chance
from tests.support.ranks import launch
from tests.support.runs import fit

UNITS, KEPT = 48, 12


def agreement(readout, *, seed, samples=1_000, kept=KEPT):
    """Agreement of halves of independent units that a layer reads with the given weight."""
    units = readout.shape[1]
    net = nn.Sequential(nn.Linear(2, units), nn.ReLU(), nn.Linear(units, len(readout)))
    group = linear_group(net, "units", kind="ffn", producers=["0"], consumers=["2"])
    with torch.no_grad():
        net[2].weight.copy_(readout)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, units, generator=generator)
    whole, half = Moments(units), Moments(units)
    whole.update(x)
    half.update(x[: samples // 2])
    current = PruningPlan.full({"units": units})
    given = ({"units": whole}, {"units": half}, parameters_of(net), current)
    found = agreement_of_halves([group], *given, MutualInformation(), {"units": kept})
    return found.get("units")


def test_halves_agree_on_informative_units_among_noise():
    """A layer that reads some units a thousand times stronger: no half can miss them."""
    weight = torch.full((UNITS,), 1e-3)
    chosen = torch.randperm(UNITS, generator=torch.Generator().manual_seed(0))[:KEPT]
    weight[chosen] = 1.0
    found = agreement(torch.diag(weight), seed=1)
    assert found == Agreement(UNITS, KEPT, KEPT)
    assert found.share == 1
    assert not found.is_chance


def test_halves_agree_by_chance_on_units_that_are_all_alike():
    """Equal units in equal noise: what either half keeps is drawn at random."""
    found = [agreement(torch.eye(UNITS), seed=seed) for seed in range(40)]
    chance = KEPT / UNITS
    assert {each.chance for each in found} == {chance}
    mean = statistics.fmean(each.share for each in found)
    deviation = (found[0].limit - chance) / 2 / math.sqrt(len(found))
    assert abs(mean - chance) < 4 * deviation
    assert sum(each.is_chance for each in found) > 0.9 * len(found)


def test_chance_and_its_limit_are_those_of_drawn_sets():
    """Mean and deviation of the overlap of two random sets, drawn many times."""
    units, kept, draws = 30, 8, 20_000
    noise = torch.rand(2, draws, units, generator=torch.Generator().manual_seed(0))
    first, second = noise.argsort(-1) < kept
    overlaps = ((first & second).sum(-1) / kept).tolist()
    found = Agreement(units, kept, 0)
    assert found.chance == pytest.approx(statistics.fmean(overlaps), abs=0.005)
    limit = found.chance + 2 * statistics.pstdev(overlaps)
    assert found.limit == pytest.approx(limit, abs=0.01)


def test_of_a_few_units_nothing_can_be_concluded():
    assert Agreement(4, 2, 2).limit > 1
    assert not Agreement(4, 2, 1).is_chance
    for odd in ((4, 4, 4), (4, 0, 0), (4, 2, 3), (1, 1, 1)):
        with pytest.raises(ValueError, match="whole number"):
            Agreement(*odd)


def test_the_warning_names_the_groups_that_are_noise():
    noise, order = Agreement(40, 10, 2), Agreement(40, 10, 9)
    named = {f"layers.{i}.ffn": noise if i < 2 else order for i in range(4)}
    with pytest.warns(PruningWarning, match=r"chance.*2 groups of 4: layers\.\{0,1\}\.ffn\."):
        warn_of_chance(named)
    warn_of_chance({"ffn": order})


def net_and_batches(batches=4):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    return net, [torch.randn(400, 8) for _ in range(batches)]


def pruned(calibration, batches=4):
    net, data = net_and_batches(batches)
    return prune(net, data, 0.5, loss=lambda m, x: m(x).square().mean(), calibration=calibration)


@pytest.mark.parametrize("memory", ["ordinary", "low"])
def test_stability_is_reported_and_the_plan_stays(memory):
    plain = pruned(Calibration(memory=memory))
    found = pruned(Calibration(memory=memory, stability=True))
    assert found.plan == plain.plan
    (group,) = found.report.cuts[0].groups
    assert group.agreement is not None
    assert (group.agreement.units, group.agreement.kept) == (32, 16)
    assert plain.report.cuts[0].groups[0].agreement is None


def test_a_single_batch_has_no_halves(caplog):
    found = pruned(Calibration(stability=True), batches=1)
    assert found.report.cuts[0].groups[0].agreement is None
    assert "at least two batches" in caplog.text


@pytest.mark.parametrize("low", [False, True])
def test_the_half_is_every_second_batch(low):
    net, data = net_and_batches(5)
    group = linear_group(net, "units", kind="ffn", producers=["0"], consumers=["2"])
    with spilling(low):
        recorder = ActivationRecorder(net, [group], batches=5, halves=True)
    with recorder, torch.no_grad():
        for batch in data:
            recorder.start_batch()
            net(batch)
        inside = torch.cat([net[1](net[0](batch)) for batch in data[::2]])
    half, whole = recorder.half["units"], recorder.moments["units"]
    assert (int(half.count), int(whole.count)) == (1_200, 2_000)
    expected = Moments(32)
    expected.update(inside)
    assert torch.allclose(half.compute()[1], expected.compute()[1])
    rest = whole.without(half)
    assert int(rest.count) == 800
    assert torch.allclose(half.total + rest.total, whole.total)


def _agreements(folder, **options):
    _, _, watch = fit(folder, pruning={"stability": True}, max_epochs=3, **options)
    return [g.agreement for cut in watch.pruning.report.cuts for g in cut.groups]


def _on_two(folder):
    return _agreements(folder, devices=2, strategy="ddp")


@pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
def test_two_ranks_find_the_same_agreement_as_one(tmp_path):
    alone = _agreements(tmp_path)
    assert any(found is not None for found in alone)
    first, second = launch(2, _on_two, tmp_path).values()
    assert first == second == alone
