"""Dimensions of heads: optimizer state rotates with its parameter."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_mi_prune.surgery.optimizers import update_optimizers
from lightning_mi_prune.surgery.parameters import rotate_along
from lightning_mi_prune.surgery.units import Rewrite

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_rotates_with_its_parameter(momentum):
    """Training a rotated problem and turning a trained one are one thing."""
    generator = torch.Generator().manual_seed(0)
    maps, _ = torch.linalg.qr(torch.randn(2, 3, 3, generator=generator, dtype=torch.float64))
    straight = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
    turning = nn.Parameter(rotate_along(straight.detach(), 0, maps))
    target = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    first = torch.optim.SGD([straight], lr=0.1, momentum=momentum)

    def step(optimizer, parameter, goal):
        optimizer.zero_grad()
        (parameter - goal).pow(2).sum().backward()
        optimizer.step()

    for _ in range(3):
        step(first, straight, target)
    turning = nn.Parameter(rotate_along(straight.detach(), 0, maps))
    second = torch.optim.SGD([straight], lr=0.1, momentum=momentum)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    update_optimizers([second], [Rewrite(straight, turning, {}, {0: maps})])
    for _ in range(3):
        step(first, straight, target)
        step(second, turning, rotate_along(target, 0, maps))
    assert torch.allclose(turning, rotate_along(straight.detach(), 0, maps))


def test_squares_stay_squares_and_gradients_go_the_other_way():
    """Of a stretch, gradients shrink as weights grow."""
    old = nn.Parameter(torch.ones(4, 2))
    new = nn.Parameter(torch.ones(2, 2))
    adam = torch.optim.Adam([old], lr=0.1)
    (old * torch.tensor([1.0, -2.0])).sum().backward()
    adam.step()
    maps = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]])
    before = copy.deepcopy(adam.state[old])
    update_optimizers([adam], [Rewrite(old, new, {0: torch.tensor([0, 2])}, {0: maps})])
    state = adam.state[new]
    scale = torch.tensor([[0.5], [1.0]])
    assert torch.allclose(state["exp_avg"], before["exp_avg"][[0, 2]] * scale)
    assert torch.allclose(state["exp_avg_sq"], before["exp_avg_sq"][[0, 2]] * scale**2)


def trained_and_turned(make, steps=3):
    """A parameter after some steps, the same in new coordinates, and its optimizer."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    old = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
    optimizer = make([old])
    for _ in range(steps):
        optimizer.zero_grad()
        (old - 2.0 + torch.randn(6, 4, generator=generator)).pow(2).sum().backward()
        optimizer.step()
    new = nn.Parameter(rotate_along(old.detach(), 0, maps))
    before = copy.deepcopy(optimizer.state[old])
    update_optimizers([optimizer], [Rewrite(old, new, {}, {0: maps})])
    return old, new, maps, before, optimizer


def test_squares_stay_at_least_those_of_their_mean():
    def make(parameters):
        return torch.optim.RMSprop(parameters, lr=0.1, centered=True)

    _, new, maps, before, optimizer = trained_and_turned(make)
    state = optimizer.state[new]
    mean = rotate_along(before["grad_avg"], 0, torch.linalg.inv(maps).mT)
    assert torch.allclose(state["grad_avg"], mean)
    assert (state["square_avg"] >= mean.square() * (1 - 1e-9)).all()
    (new * torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert new.isfinite().all()


def test_averages_of_weights_rotate_like_weights():
    def make(parameters):
        return torch.optim.ASGD(parameters, lr=0.01, t0=0)

    old, new, maps, before, optimizer = trained_and_turned(make)
    assert torch.allclose(optimizer.state[new]["ax"], rotate_along(before["ax"], 0, maps))
    assert not torch.equal(before["ax"], old)


@pytest.mark.parametrize(
    ("make", "key", "of_weights"),
    [
        (lambda p: torch.optim.Adamax(p, lr=0.1), "exp_inf", False),
        (lambda p: torch.optim.Rprop(p, lr=0.1), "step_size", True),
    ],
    ids=["adamax", "rprop"],
)
def test_sizes_are_no_squares(make, key, of_weights):
    _, new, maps, before, optimizer = trained_and_turned(make)
    used = maps if of_weights else torch.linalg.inv(maps).mT
    expected = rotate_along(before[key], 0, used.abs())
    assert torch.allclose(optimizer.state[new][key], expected)
