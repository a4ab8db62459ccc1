"""Which layers discovery lets go: those whose modules run if the layer returns its input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_mi_prune.discovery.discover import discover


class Block(nn.Module):
    """A residual block that returns its output in a list, as OpenAI's GPT in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x + self.last(torch.relu(self.first(x))), x.mean()]


class Layers(nn.Module):
    """Blocks that hand a list on."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_layers_that_return_a_list_can_go() -> None:
    (stack,) = discover(Layers(Block), torch.randn(2, 4, 6)).stacks
    assert (stack.name, stack.size, stack.fixed) == ("layers", 3, 0)


class Named(Block):
    """A block that returns a mapping, for which no input can stand in."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"hidden": super().forward(x)[0]}


class NamedLayers(Layers):
    """Blocks that hand a mapping on."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)["hidden"]
        return x


def test_a_layer_that_cannot_return_its_input_stays() -> None:
    graph = discover(NamedLayers(Named), torch.randn(2, 4, 6))
    assert not graph.stacks
    assert [group.size for group in graph.groups] == [10, 10, 10]
    (refused,) = [r for r in graph.refused if r.kind == "depth"]
    assert "fails if the layer returns its input (IndexError: " in refused.reason
