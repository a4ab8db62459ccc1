"""sensitivity(): expected and measured losses of every group; the model stays as it is."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lightning_mi_prune import PruningError, plan, prune
from lightning_mi_prune.core.options import Constraints, Importance, Reconstruction
from lightning_mi_prune.planning.sensitivity import sensitivity
from tests.conftest import count_hooks
from tests.planning.test_planned_pruning import alike, loss, network, rows
from tests.support.boring import Classifier
from tests.support.graphs import graph_of

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def test_losses_are_measured_on_copies() -> None:
    model, random = network().train(), torch.get_rng_state()
    before = copy.deepcopy(model)
    given = [part.data_ptr() for part in model.parameters()]
    found = sensitivity(model, rows(), loss=loss, measured=True, points=3, batches=2)
    assert alike(model, before)
    assert [part.data_ptr() for part in model.parameters()] == given
    assert torch.equal(torch.get_rng_state(), random)
    assert count_hooks(model) == 0
    assert model.training
    with torch.no_grad():
        dense = sum(float(loss(before.eval(), x)) for x in rows()[:2]) / 2
    assert found.loss == dense
    assert found.evaluations == 1 + 3 * 3
    for group in found.groups:
        assert group.measured[0] == (group.units, dense)
        assert len(group.measured) == 4
        widths = [width for width, _ in group.measured]
        assert widths == sorted(widths, reverse=True)


def test_a_measured_loss_is_that_of_a_cut_to_this_width() -> None:
    found = sensitivity(network(), rows(), loss=loss, measured=True, points=2, batches=4)
    for group in found.groups:
        for width, value in group.measured[1:]:
            model = network()
            others = {f"^{g.name}$": g.units for g in found.groups if g.name != group.name}
            pins = Constraints(pins={**others, f"^{group.name}$": width})
            solving = Reconstruction("compensation")
            prune(model, rows(), 0.01, loss=loss, constraints=pins, reconstruction=solving)
            with torch.no_grad():
                mean = sum(float(loss(model, x)) for x in rows()) / 4
            assert value == pytest.approx(mean, rel=1e-6)


def test_expected_losses_rise_as_units_go_and_are_those_of_a_plan() -> None:
    found = sensitivity(network(), rows(), loss=loss)
    planned = plan(network(), rows(), loss=loss)
    assert found.loss is None
    assert found.evaluations == 0
    assert [group.name for group in found.groups] == [group.name for group in planned.groups]
    for group in found.groups:
        assert group.measured == ()
        assert group.expected[-1] == 0.0
        assert group.units == next(g.now for g in planned.groups if g.name == group.name)
        assert all(less >= more for less, more in pairwise(group.expected))
        assert group.expected[0] > 0
        for column in planned.columns:
            at = group.expected[column.widths[group.name]]
            assert column.loss[group.name] == pytest.approx(at, rel=1e-3)
    assert json.loads(json.dumps(found.to_dict()))["groups"][0]["name"] == "0.ffn"
    assert len(str(found).splitlines()) == 5


def test_a_module_of_lightning_has_its_own_loss() -> None:
    module = Classifier()
    data = [next(iter(module.val_dataloader()))]
    options = {"kinds": ["heads"], "graph": graph_of(module)}
    found = sensitivity(module, data, measured=True, points=1, batches=1, **options)
    with torch.no_grad():
        assert found.loss == float(module.eval().loss(data[0]))
    assert [width for group in found.groups for width, _ in group.measured] == [4, 0, 4, 0]


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(PruningError, match="measured=True needs a loss"):
        sensitivity(network(), rows(), measured=True)
    weights = Importance(relevance="weights")
    with pytest.raises(PruningError, match="The loss is a Tensor; expected one number"):
        sensitivity(network(), rows(), loss=lambda m, x: m(x), measured=True, importance=weights)
    for wrong in ({"points": 0}, {"batches": 0.5}):
        with pytest.raises(PruningError, match="expected a whole number of at least 1"):
            sensitivity(network(), rows(), loss=loss, **wrong)


def test_the_plot_shows_every_group_and_every_point(tmp_path: Path) -> None:
    found = sensitivity(network(), rows(), loss=loss, measured=True, points=2, batches=1)
    figure = found.plot(tmp_path / "deep" / "curves.png")
    assert (tmp_path / "deep" / "curves.png").stat().st_size > 10_000
    (axes,) = figure.axes
    assert len(axes.lines) == len(axes.collections) == len(found.groups)
    for line, points, group in zip(axes.lines, axes.collections, found.groups, strict=True):
        assert tuple(line.get_ydata()) == group.expected
        assert len(points.get_offsets()) == len(group.measured) == 3
    figure = sensitivity(network(), rows(), loss=loss).plot()
    assert len(figure.axes[0].collections) == 0
