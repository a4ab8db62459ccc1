"""Networks that hold their units in every way a layout can describe, and their groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, SizeAttribute
from lightning_mi_prune.graph.layouts import Layout

Dim = tuple[str, int, Layout]


def group_of(
    model: nn.Module, name: str, size: int, dims: Sequence[Dim], *consumers: str, **more: Any
) -> DependencyGroup:
    """A group, its shapes read off the model."""
    state = model.state_dict()
    tensors = tuple(PrunableDim(t, d, tuple(state[t].shape), layout) for t, d, layout in dims)
    more.setdefault("kind", "channels")
    return DependencyGroup(name=name, size=size, tensors=tensors, consumers=consumers, **more)


def recorded(model: nn.Module, groups: Sequence[DependencyGroup], *calls: Any) -> Any:
    """Moments of the groups over some calls."""
    with ActivationRecorder(model, groups) as recorder, torch.no_grad():
        for call in calls:
            model(call)
    return recorder.moments


class Convolutions(nn.Module):
    """Two convolutions, the second with a kernel; channel 5 of the first is channel 2 again."""

    def __init__(self, kernel: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Conv2d(3, 6, 3)
        self.down = nn.Conv2d(6, 4, kernel, padding=kernel // 2, bias=bias)
        with torch.no_grad():
            self.up.weight[5], self.up.bias[5] = self.up.weight[2], self.up.bias[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def groups(self) -> list[DependencyGroup]:
        layout = (("channels",),)
        dims = [("up.weight", 0, layout), ("up.bias", 0, layout), ("down.weight", 1, layout)]
        sizes = (
            SizeAttribute("up", "out_channels", layout),
            SizeAttribute("down", "in_channels", layout),
        )
        return [group_of(self, "channels", 6, dims, "down", attributes=sizes)]


class Flattened(nn.Module):
    """A map of 2 x 2 positions, flattened for a linear layer; channel 5 is channel 2 again."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.pool = nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(2)
        self.down = nn.Linear(24, 3)
        with torch.no_grad():
            self.up.weight[5], self.up.bias[5] = self.up.weight[2], self.up.bias[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.pool(torch.relu(self.up(x))).flatten(1))

    def groups(self) -> list[DependencyGroup]:
        layout = (("channels",),)
        dims: list[Dim] = [("up.weight", 0, layout), ("up.bias", 0, layout)]
        dims.append(("down.weight", 1, (("channels", 4),)))
        sizes = (
            SizeAttribute("up", "out_channels", layout),
            SizeAttribute("down", "in_features", (("channels", 4),)),
        )
        return [group_of(self, "channels", 6, dims, "down", attributes=sizes)]


class Joined(nn.Module):
    """A layer that reads the units of two groups and the data, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(4, 5), nn.Linear(4, 6), nn.Linear(15, 3)

    def units(self, x: Tensor) -> Tensor:
        return torch.cat([torch.relu(self.first(x)), x, torch.tanh(self.second(x))], -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.units(x))

    def groups(self) -> list[DependencyGroup]:
        both = (("first",), (4,), ("second",))
        found = []
        for name, size, other in (("first", 5, ("second", 6)), ("second", 6, ("first", 5))):
            own = ((name,),)
            dims = [(f"{name}.weight", 0, own), (f"{name}.bias", 0, own), ("down.weight", 1, both)]
            sizes = (
                SizeAttribute(name, "out_features", own),
                SizeAttribute("down", "in_features", both),
            )
            more: dict[str, Any] = {"attributes": sizes, "partners": (other,), "kind": "ffn"}
            found.append(group_of(self, name, size, dims, "down", **more))
        return found


class Grouped(nn.Module):
    """Values of 3 heads, each read by 2 queries: units of ``2 x 4`` entries in the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(5, 12), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.tanh(self.value(x)).unflatten(-1, (3, 1, 4)).expand(*x.shape[:-1], 3, 2, 4)
        mixed = heads * torch.tensor([[1.0], [0.5]], dtype=x.dtype)
        return self.out(mixed.flatten(-3))

    def groups(self) -> list[DependencyGroup]:
        read = (("kv", "queries", "size"),)
        sizes = {"kv": 3, "queries": 2, "size": 4}
        made = (("kv", "size"),)
        dims: dict[str, list[Dim]] = {
            "kv": [("value.weight", 0, made), ("value.bias", 0, made), ("out.weight", 1, read)],
            "queries": [("out.weight", 1, read)],
            "size": [("value.weight", 0, made), ("value.bias", 0, made), ("out.weight", 1, read)],
        }
        return [
            group_of(
                self,
                name,
                size,
                dims[name],
                "out",
                kind="heads",
                partners=tuple((n, s) for n, s in sizes.items() if n != name),
            )
            for name, size in sizes.items()
        ]


class Pair(nn.Module):
    """Two layers of one class, ``nn.Linear`` or ``Conv1D``."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.up = Conv1D(7, 4) if transposed else nn.Linear(4, 7)
        self.down = Conv1D(3, 7) if transposed else nn.Linear(7, 3)
        self.transposed = transposed

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))

    def groups(self) -> list[DependencyGroup]:
        made, read = (1, 0) if self.transposed else (0, 1)
        layout = (("ffn",),)
        dims = [("up.weight", made, layout), ("up.bias", 0, layout), ("down.weight", read, layout)]
        number = SizeAttribute("up", "nf" if made else "out_features", layout)
        return [group_of(self, "ffn", 7, dims, "down", kind="ffn", attributes=(number,))]


def pairs() -> tuple[Pair, Pair]:
    """The same network of ``nn.Linear`` and of ``Conv1D``, in double precision."""
    torch.manual_seed(0)
    plain, transposed = Pair(False).double(), Pair(True).double()
    with torch.no_grad():
        for name in ("up", "down"):
            one, other = getattr(plain, name), getattr(transposed, name)
            other.weight.copy_(one.weight.mT)
            other.bias.copy_(one.bias)
    return plain, transposed
