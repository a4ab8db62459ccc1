"""What verification keeps when its time is over."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import Tensor, nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.discovery.discover import discover_run
from lightning_mi_prune.discovery.verification import Verifier
from lightning_mi_prune.graph.graph import PruningGraph

LATE = "not verified in the time given; more seconds may be enough"


class Fixed(nn.Module):
    """Units in a shape that is written in the code, beside numbers that could count them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 4)
        self.width, self.inner, self.units, self.size = 6, 6, 6, 6

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).view(-1, 2, 3).relu().flatten(1))


class Net(nn.Module):
    """A pair of layers that can be cut, and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.fixed = Fixed()

    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(self.free(x))


def graph_within(seconds: float, monkeypatch: pytest.MonkeyPatch) -> PruningGraph | None:
    """What is found if every look at the clock takes a second."""
    torch.manual_seed(0)
    net, x, ticks = Net(), torch.randn(3, 4), count()
    monkeypatch.setattr(Verifier, "clock", staticmethod(lambda: float(next(ticks))))
    try:
        return discover_run(net, lambda net: net(x), seconds=seconds, kinds=["ffn"])
    except PruningError:
        return None


def test_what_passed_before_the_time_was_over_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = [graph_within(seconds, monkeypatch) for seconds in range(0, 60, 2)]
    found = [graph for graph in graphs if graph is not None]
    assert graphs[0] is None
    assert {group.name for graph in found for group in graph.groups} == {"free.ffn", "free.2.ffn"}
    late = [graph for graph in found if any(r.reason == LATE for r in graph.refused)]
    assert late
    assert len(late) < len(found)  # with more time there is another reason
