"""Layers that are missed least: greedy, runs of neighbours, and how many losses that takes."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lightning_mi_prune.calibration.data import LayerComparison, LayerLosses
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.importance.layer_criteria import LayerSelector, StackCut
from lightning_mi_prune.importance.layer_losses import cheapest_removal


class Toy:
    """A loss of what is removed, which counts how often it is asked for."""

    def __init__(self, loss):
        self.loss, self.sweeps = loss, []

    def __call__(self, removals):
        self.sweeps.append(list(removals))
        return [self.loss(removed) for removed in removals]

    @property
    def asked(self):
        return [removed for sweep in self.sweeps for removed in sweep]


def test_a_run_wins_where_greedy_is_wrong():
    costs = [0.9, 0.5, 0.5, 0.5, 0.1, 0.9]
    toy = Toy(lambda gone: 1 + (0.01 if gone == {1, 2, 3} else sum(costs[layer] for layer in gone)))
    found = cheapest_removal(toy, range(6), 3)
    assert found.removed == (1, 2, 3)  # greedy takes 4 first, and then has lost
    assert (found.whole, found.after) == (1, pytest.approx(1.01))
    assert found.single == tuple(pytest.approx(1 + cost) for cost in costs)


def test_a_run_of_what_is_left_wins_after_a_greedy_step():
    costs = [0.1, 1.0, 0.4, 1.0, 0.5, 0.5]

    def loss(gone):
        together = gone >= {4, 5} and not gone & {1, 2, 3}
        return sum(costs[layer] for layer in (gone - {4, 5} if together else gone))

    assert cheapest_removal(Toy(loss), range(6), 3).removed == (0, 4, 5)


def test_greedy_wins_where_layers_are_far_apart():
    costs = [0.1, 1, 0.2, 1, 0.3, 1]
    toy = Toy(lambda gone: sum(costs[layer] for layer in gone))
    assert cheapest_removal(toy, range(6), 3).removed == (0, 2, 4)


@pytest.mark.parametrize("seed", range(5))
def test_costs_that_add_up_give_the_best_of_all(seed):
    draw = random.Random(seed)  # noqa: S311
    costs = [draw.random() for _ in range(9)]
    numbers = sorted(draw.sample(range(20), 9))  # others are gone already
    toy = Toy(lambda gone: sum(costs[numbers.index(layer)] for layer in gone))
    for count in range(1, 7):
        found = cheapest_removal(toy, numbers, count, fixed=2)
        ways = itertools.combinations(range(2, 9), count)
        assert found.after == pytest.approx(min(sum(costs[p] for p in way) for way in ways))
        assert set(found.removed) <= set(numbers[2:])
        assert found.single[:2] == (None, None)


@pytest.mark.parametrize(("layers", "count"), [(30, 3), (30, 6), (12, 3), (6, 5), (80, 20), (9, 1)])
def test_the_number_of_losses_is_bounded(layers, count):
    draw = random.Random(0)  # noqa: S311
    known = {}
    toy = Toy(lambda gone: known.setdefault(gone, draw.random() * len(gone)))
    found = cheapest_removal(toy, range(layers), count)
    assert len(toy.asked) == len(set(toy.asked)) == found.measured + 1
    assert len(toy.asked) <= 2 * layers + 2 + (count - 1) * (0.75 * layers + 2)
    assert len(toy.sweeps) <= count
    assert found.after == min(loss for gone, loss in known.items() if len(gone) == count)


def test_what_is_not_finite_is_never_chosen():
    toy = Toy(lambda gone: math.nan if 0 in gone else math.inf if 1 in gone else 2.0 + len(gone))
    found = cheapest_removal(toy, range(4), 2)
    assert found.removed == (2, 3)
    assert found.single == (None, None, 3.0, 3.0)
    with pytest.raises(PruningError, match="without 3 layers is NaN or infinite, whichever go"):
        cheapest_removal(toy, range(4), 3)
    with pytest.raises(PruningError, match="loss of the whole model is NaN or infinite"):
        cheapest_removal(Toy(lambda gone: math.nan), range(4), 2)


@pytest.mark.parametrize(("count", "fixed", "most"), [(0, 0, 3), (4, 0, 3), (3, 2, 2), (2, 3, 1)])
def test_a_number_that_cannot_go_is_named(count, fixed, most):
    toy = Toy(len)
    with pytest.raises(PruningError, match=f"^{count} of 4 layers .* expected 1 to {most}"):
        cheapest_removal(toy, range(4), count, fixed)
    assert toy.sweeps == []


def compared(losses=None):
    alike, angles = ((1.0,) * 4,) * 4, ((0.0,) * 5,) * 5
    return LayerComparison((0, 2, 3, 5), alike, angles, fixed=1, losses=losses)


LOSSES = LayerLosses(1.0, (None, 1.1, 1.2, 1.3), (2, 5), 1.25, 7)


def test_a_selector_takes_the_layers_that_were_measured():
    selector = LayerSelector(None, target=2, criterion="measured_loss")
    cut = selector.choose("stack", compared(LOSSES))
    assert (cut.removed, cut.losses) == ((2, 5), LOSSES)
    assert LayerSelector(None, target=2).choose("stack", compared(LOSSES)).losses is None
    for target, losses in ((2, None), (3, LOSSES)):
        selector = LayerSelector(None, target=target, criterion="measured_loss")
        with pytest.raises(PruningError, match="of 'stack' was not measured, but without"):
            selector.choose("stack", compared(losses))
    assert LayerSelector(None, 4, "measured_loss").choose("stack", compared()).removed == ()


def test_a_cut_with_losses_can_be_read_again():
    cut = LayerSelector(None, 2, "measured_loss").choose("stack", compared(LOSSES))
    written = {name: getattr(cut, name) for name in vars(cut)} | {"losses": dict(vars(LOSSES))}
    assert StackCut.read(written) == cut
    for wrong in ({"removed": [7]}, {"single": [1.0]}, {"whole": math.nan}, {"measured": -1}):
        with pytest.raises((TypeError, ValueError)):
            StackCut.read(written | {"losses": vars(LOSSES) | wrong})
