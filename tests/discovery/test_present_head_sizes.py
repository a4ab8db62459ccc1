"""Attention that divides scores by the root of the size that heads have now."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.zoo.checking import check_groups
from benchmarks.zoo.models import Inputs, randomized
from lightning_mi_prune.discovery.discover import discover_run
from lightning_mi_prune.graph.graph import PruningGraph


class Attention(nn.Module):
    """Three heads, by numbers that the module holds or one in the code."""

    def __init__(self, *, held: bool) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 12) for _ in range(3))
        self.out = nn.Linear(12, 8)
        if held:
            self.num_heads, self.head_dim = 3, 4

    def forward(self, x: Tensor) -> Tensor:
        shape = (self.num_heads, self.head_dim) if hasattr(self, "num_heads") else (3, -1)
        q, k, v = (
            layer(x).unflatten(-1, shape).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def found(net: nn.Module, x: Tensor) -> PruningGraph:
    torch.manual_seed(0)
    return discover_run(randomized(net), lambda net: net(x), kinds=["heads", "head_dim"])


def test_the_check_of_the_zoo_makes_up_for_it_as_training_does() -> None:
    net, x = Attention(held=True), torch.randn(2, 5, 8)
    groups = found(net, x).groups
    assert {group.kind for group in groups} == {"heads", "head_dim"}
    rotations = [group.rotation for group in groups if group.rotation is not None]
    assert [rotation.rescaled for rotation in rotations] == [True]
    outcomes = check_groups(net, Inputs((x,)), groups)
    assert {name: o.verdict for name, o in outcomes.items()} == dict.fromkeys(
        ("heads", "head_dim", "all"), "exact"
    )


def test_dimensions_of_heads_that_stay_are_cut() -> None:
    net, x = Attention(held=False), torch.randn(2, 5, 8)
    graph = found(net, x)
    (group,) = graph.groups
    assert (group.kind, group.size, group.partners) == ("head_dim", 4, ())
    assert "heads" in {refused.kind for refused in graph.refused}
    (outcome,) = check_groups(net, Inputs((x,)), graph.groups).values()
    assert (outcome.verdict, outcome.reason) == ("exact", "")
