from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_mi_prune import prune
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Reconstruction
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.importance.stability import Agreement
from lightning_mi_prune.reconstruction.compensation import StandIns
from lightning_mi_prune.reporting.records import Cut, GroupCut
from lightning_mi_prune.reporting.report import PruningReport


def cut(epoch, *groups):
    return Cut(epoch, 0.5, 60, 40, 600, groups, {"ranking": 1.0}, information_kept=0.9)


HEADS = GroupCut(
    "net.layers.3.heads",
    "heads",
    4,
    2,
    2.0,
    0.8,
    Ranking((2, 0, 1, 3), (0.1, 0.3, 0.9, 2.0), (0.2, 0.5, 1.5, 4.0)),
    StandIns((0, 2), (0.75, 0.25), (3, 1)),
    Agreement(4, 2, 2),
)
LATER = GroupCut(
    "net.layers.3.heads",
    "heads",
    2,
    1,
    1.0,
    0.5,
    Ranking((3, 1), (0.4, 1.0), (0.6, 2.0)),
    StandIns((3,), (0.5,), (1,)),
)
OTHER = replace(HEADS, name="net.layers.4.heads")
REPORT = PruningReport(100, 80, 1000, cuts=[cut(1, HEADS, OTHER), cut(2, LATER)])


def test_units_of_all_cuts_are_explained_in_their_order():
    found = REPORT.explain("net.layers.3.heads")
    rows = [(u.unit, u.epoch, u.place, u.loss, u.made_up, u.best) for u in found.units]
    assert rows == [
        (2, 1, 1, 0.1, 0.25, 1),
        (0, 1, 2, 0.3, 0.75, 3),
        (3, 2, 1, 0.4, 0.5, 1),
        (1, None, 2, 1.0, None, None),
    ]
    assert [u.score for u in found.units] == pytest.approx([0.2, 0.3, 0.6, 1.4])
    assert (found.before, found.after, found.information) == (4, 1, 0.5)
    assert [u.unit for u in found.kept] == [1]
    text = str(found)
    for part in ("1 unit of 4 stay", "0.4 nats", "50.0%", "stays", "went 2."):
        assert part in text


def test_the_end_of_a_name_is_enough_where_it_is_one():
    assert REPORT.explain("layers.4.heads").group == "net.layers.4.heads"
    assert "100.0% of the kept units (chance: 50.0%)" in str(REPORT.explain("layers.4.heads"))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("layers.3.head", r"no group that was ranked; expected one such as 'net.layers.3.heads'"),
        ("heads", r"ends the names of several groups.*'net.layers.3.heads', 'net.layers.4.heads'"),
        ("", r"no group that was ranked"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, match):
    with pytest.raises(PruningError, match=match):
        REPORT.explain(name)


def test_without_cuts_nothing_is_explained():
    with pytest.raises(PruningError, match="after the first cut"):
        PruningReport(5, 4, 3).explain("layers.3.heads")


def duplicated():
    """Units 8 to 15 are copies of 0 to 7, and a layer that reads all of them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    with torch.no_grad():
        net[0].weight[8:] = net[0].weight[:8]
        net[0].bias[8:] = net[0].bias[:8]
    return net


def test_copies_are_made_up_for_by_the_units_that_they_copy():
    net = duplicated()
    batches = [torch.randn(500, 16) for _ in range(4)]
    result = prune(net, batches, 0.5, loss=lambda m, x: m(x).square().mean())
    found = result.report.explain(next(iter(result.plan.sizes)))
    assert (found.before, found.after) == (16, 8)
    kept = {unit.unit for unit in found.kept}
    assert kept == set(result.plan.kept[found.group])
    for unit in found.removed:
        assert unit.made_up == pytest.approx(1, abs=1e-3)
        assert (unit.best - unit.unit) % 8 == 0
        assert unit.best in kept
    assert found.removed[-1].loss < 1e-3 * found.kept[-1].loss
    assert [unit.loss for unit in found.units] == sorted(unit.loss for unit in found.units)


def test_without_compensation_nothing_makes_up():
    batches = [torch.randn(500, 16) for _ in range(4)]
    options = {"reconstruction": Reconstruction("none")}
    result = prune(duplicated(), batches, 0.5, loss=lambda m, x: m(x).square().mean(), **options)
    found = result.report.explain(next(iter(result.plan.sizes)))
    assert all(unit.made_up is None for unit in found.units)
    assert "predict" not in str(found)
