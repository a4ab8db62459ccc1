"""Numbers of modules that follow a width: those of the descriptions by hand are found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_mi_prune.discovery.attributes import (
    candidates_of,
    describing_attributes,
    numbers_of,
    pattern_of,
    seen_numbers,
    sub_layouts,
)
from lightning_mi_prune.discovery.copies import structural_copy
from lightning_mi_prune.discovery.discover import discover_run
from lightning_mi_prune.discovery.search import solve, without_groups
from lightning_mi_prune.discovery.verification import Verifier
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, SizeAttribute
from lightning_mi_prune.graph.layouts import layout_size
from tests.support.graphs import groups_of
from tests.support.models import EVERY, build, inputs_of


def needed(groups: list[DependencyGroup]) -> set[SizeAttribute]:
    return {a for group in groups for a in group.attributes}


def solution_of(model: nn.Module, groups: list[DependencyGroup], **inputs: Tensor):
    def run(module: nn.Module):
        return module(**inputs)

    bare = [replace(group, attributes=()) for group in groups]
    verifier = Verifier(model, run, (), {group.name: group.size for group in groups})
    verifier.vary_constants(bare)
    seen = seen_numbers(verifier.base, run)
    return solve(verifier, bare, numbers_of(verifier.base), seen, {})


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "deberta-v2", "albert", "vit"])
def test_the_numbers_of_the_descriptions_are_found_again(family: str) -> None:
    head = dict(EVERY)[family]
    model = build(family, head)
    # The hidden size needs the operators of normalisations; attention scaled by its head size
    # cannot be cut along that without rotation.
    kinds = ("ffn", "heads", "pooler")
    gone = {g.name: g.size for g in groups_of(model) if g.kind not in kinds}
    groups = without_groups([g for g in groups_of(model) if g.kind in kinds], gone)
    solution = solution_of(model, groups, **inputs_of(head))
    assert not solution.refused
    sizes = {group.name: group.size for group in groups}
    found = {(a.module, a.attribute): a for a in needed(list(solution.groups))}
    for attribute in needed(groups):
        other = found[attribute.module, attribute.attribute]
        assert other.sequence == attribute.sequence
        for widths in (sizes, {name: max(1, size // 2) for name, size in sizes.items()}):
            assert layout_size(other.layout, widths) == layout_size(attribute.layout, widths)


def conv_group(*dims: tuple[str, int, int], name: str = "c", size: int = 6) -> DependencyGroup:
    tensors = tuple(PrunableDim(t, d, (0,) * 4, ((name, k),)) for t, d, k in dims)
    return DependencyGroup(name, "channels", size, tensors, ())


def test_convolutions_normalisations_and_conv1d_describe_their_tensors() -> None:
    from transformers.pytorch_utils import Conv1D

    net = nn.ModuleDict(
        {
            "plain": nn.Conv2d(3, 6, 3),
            "deep": nn.Conv2d(6, 12, 3, groups=6),
            "norm": nn.BatchNorm2d(6),
            "up": nn.ConvTranspose2d(6, 5, 2),
            "layer": nn.LayerNorm(6),
            "group": nn.GroupNorm(2, 6),
            "flat": nn.Linear(24, 7),
            "conv1d": Conv1D(12, 6),
        }
    )
    group = conv_group(
        ("plain.weight", 0, 1),
        ("plain.bias", 0, 1),
        ("deep.weight", 0, 2),
        ("norm.weight", 0, 1),
        ("norm.running_mean", 0, 1),
        ("up.weight", 0, 1),
        ("layer.weight", 0, 1),
        ("group.weight", 0, 1),
        ("flat.weight", 1, 4),
        ("conv1d.weight", 0, 1),
        ("conv1d.weight", 1, 2),
    )
    found = {
        (a.module, a.attribute): layout_size(a.layout, {"c": 2})
        for a in describing_attributes(net, [group])
    }
    assert found == {
        ("plain", "out_channels"): 2,
        ("deep", "out_channels"): 4,
        ("deep", "in_channels"): 2,
        ("deep", "groups"): 2,
        ("norm", "num_features"): 2,
        ("up", "in_channels"): 2,
        ("layer", "normalized_shape"): 2,
        ("group", "num_channels"): 2,
        ("flat", "in_features"): 8,
        ("conv1d", "nx"): 2,
        ("conv1d", "nf"): 4,
    }


def test_a_tied_weight_describes_both_modules() -> None:
    net = nn.Module()
    net.table, net.head = nn.Embedding(9, 4), nn.Linear(4, 9)
    net.head.weight = net.table.weight
    group = DependencyGroup(
        "h", "hidden", 4, (PrunableDim("table.weight", 1, (9, 4), (("h",),)),), ()
    )
    found = {(a.module, a.attribute) for a in describing_attributes(net, [group])}
    assert found == {("table", "embedding_dim"), ("head", "in_features")}


class Numbers(nn.Module):
    """Numbers in attributes, lists and products; only some reach an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.sizes, self.offset, self.pad = 3, [4, 12], 12, 12
        self.inside = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        y = y.view(-1, self.heads, self.offset // self.heads)
        return torch.split(y, [self.sizes[0] // 2, 2], -1)[0] * self.pad


def test_numbers_that_reach_a_size_are_seen() -> None:
    net = structural_copy(Numbers())
    before = dict(vars(net))
    seen = seen_numbers(net, lambda net: net(torch.ones(2, 12)))
    assert seen == {("", "heads"), ("", "offset"), ("", "sizes.0")}
    assert {name: type(value) for name, value in vars(net).items() if type(value) is int} == {
        name: int for name, value in before.items() if type(value) is int
    }


def test_a_call_that_fails_with_such_integers_shows_none() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 3

        def forward(self, x: Tensor) -> Tensor:
            if type(self.heads) is not int:
                raise TypeError("heads")
            return x

    net = structural_copy(Strict())
    assert seen_numbers(net, lambda net: net(torch.ones(2))) == set()
    assert type(net.heads) is int


def test_parts_of_layouts() -> None:
    layout = (("kv", 2, "size"), ("kv", "size"), (7,))
    found = set(sub_layouts(layout, "kv"))
    assert {(("kv",),), (("kv", 2),), (("kv", "size"),), layout[:2], layout} <= found
    assert all("size" in str(part) for part in sub_layouts(layout, "size"))
    assert (("inner",),) in set(sub_layouts(((2, (("inner",), (3,))),), "inner"))


def test_candidates_are_of_their_own_layer() -> None:
    layers = nn.ModuleList(nn.ModuleDict({"part": Numbers()}) for _ in range(2))
    groups = [
        DependencyGroup(
            f"{i}.h",
            "heads",
            3,
            (PrunableDim(f"{i}.part.inside.weight", 0, (12, 12), ((f"{i}.h", 4),)),),
            (),
        )
        for i in range(2)
    ]
    every = {group.name: group for group in groups}
    found = candidates_of(groups, numbers_of(layers), {("0.part", "heads")}, every)
    first = found[0]
    assert first.seen
    assert {(a.module, a.layout) for a in first.attributes} == {
        ("0.part", (("0.h",),)),
        ("1.part", (("1.h",),)),
    }
    assert pattern_of("0.h") == "#.h"


class Strided(nn.Conv2d):
    """A convolution of another package, whose numbers are not those of ``torch.nn``."""


class Squeeze(nn.Module):
    """Two units that scale channels, before a convolution with a stride of two."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)
        self.last = Strided(6, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(torch.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return self.last(x * scale.sigmoid()).mean((2, 3))


def test_a_stride_counts_no_units() -> None:
    torch.manual_seed(0)
    net, x = Squeeze(), torch.randn(2, 6, 4, 4)
    assert not numbers_of(net)  # those of a convolution describe its own tensors
    [group] = discover_run(net, lambda net: net(x), kinds=["channels"]).groups
    assert group.size == 2
    assert {a.module for a in group.attributes} == {"reduce", "expand"}
