"""Modules that store in evaluation mode what they computed from parameters, as LeViT of timm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.discover import discover
from lightning_mi_prune.surgery.units import apply_plan, reshape_tensors, restore_plan


class Biased(nn.Module):
    """Units with biases by position, which are looked up once in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.table = nn.Parameter(torch.randn(6, 3))
        self.register_buffer("places", torch.tensor([0, 2, 1]), persistent=False)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Biased:
        super().train(mode)
        if mode:
            self.cache = {}
        return self

    def biases(self) -> Tensor:
        if self.training:
            return self.table[:, self.places]
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.table[:, self.places]
        return self.cache["cpu"]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x) + self.biases().T))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    found = nn.Sequential(Biased(), nn.Dropout()).eval()
    found[1].train()
    return found


KEPT = (0, 2, 5)


def masked(net: nn.Module) -> nn.Module:
    found = copy.deepcopy(net)
    gone = torch.tensor([1, 3, 4])
    found[0].cache = {}
    with torch.no_grad():
        found[0].last.weight.index_fill_(1, gone, 0)
    return found


@torch.no_grad()
def run(net: nn.Module, x: Tensor) -> Tensor:
    return net[0](x)


def test_discovery_reads_the_parameters_of_a_module_that_ran(net: nn.Module) -> None:
    x = torch.randn(2, 3, 4)
    run(net, x)
    [group] = discover(net, x).groups
    assert {s.tensor for s in group.tensors} == {
        "0.first.weight",
        "0.first.bias",
        "0.table",
        "0.last.weight",
    }


def cut(net: nn.Module, groups: tuple, plan: PruningPlan) -> None:
    apply_plan(net, groups, plan)


def cut_back_and_forth(net: nn.Module, groups: tuple, plan: PruningPlan) -> None:
    whole = {name: value.clone() for name, value in net.state_dict().items()}
    apply_plan(net, groups, plan)
    run(net, torch.randn(1, 3, 4))
    restore_plan(net, groups, PruningPlan(plan.sizes, {n: range(6) for n in plan.sizes}), whole)
    run(net, torch.randn(1, 3, 4))
    apply_plan(net, groups, plan)


def load(net: nn.Module, groups: tuple, plan: PruningPlan) -> None:
    smaller = copy.deepcopy(net)
    apply_plan(smaller, groups, plan)
    reshape_tensors(net, groups, plan)
    net.load_state_dict(smaller.state_dict())


@pytest.mark.parametrize("change", [cut, cut_back_and_forth, load])
def test_what_was_stored_for_the_whole_module_is_gone_after_a_cut(
    net: nn.Module, change: Callable[..., None]
) -> None:
    x = torch.randn(2, 3, 4)
    groups = discover(net, x).groups
    plan = PruningPlan({groups[0].name: 6}, {groups[0].name: KEPT})
    want = run(masked(net), x)
    run(net, x)
    change(net, groups, plan)
    assert torch.allclose(run(net, x), want, atol=1e-6)
    assert [module.training for module in (net, net[0], net[0].last, net[1])] == [
        False,
        False,
        False,
        True,
    ]
