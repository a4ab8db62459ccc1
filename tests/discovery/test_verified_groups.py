"""A cut copy equals the masked module, or the group is refused; the module itself never changes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_mi_prune.discovery.copies import (
    changed_within,
    relative_difference,
    structural_copy,
    tensor_outputs,
)
from lightning_mi_prune.discovery.inference import infer
from lightning_mi_prune.discovery.search import solve
from lightning_mi_prune.discovery.verification import OutOfTime, Verifier, random_halves
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, SizeAttribute
from tests.support.models import batch, build


class RMSNorm(nn.Module):
    """Written with operators, as transformers do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Residual(nn.Module):
    """Two layers around a normalised stream of hidden states."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 12)
        self.norms = nn.ModuleList(norm(12) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(12, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, 12) for _ in range(2))
        self.last, self.head = norm(12), nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(norm(x))))
        return self.head(self.last(x))


IDS = torch.arange(10).reshape(2, 5)


def call(module: nn.Module) -> Tensor:
    return module(IDS)


def verifier_of(module: nn.Module, run=call, **options) -> tuple[Verifier, list[DependencyGroup]]:
    found = infer(module, run)
    verifier = Verifier(
        module, run, found.reductions, {g.name: g.size for g in found.groups}, **options
    )
    verifier.vary_constants(found.groups)
    return verifier, list(found.groups)


def with_numbers(module: nn.Module, verifier: Verifier, groups: list[DependencyGroup]):
    return list(solve(verifier, groups, (), set(), {}).groups)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, RMSNorm])
def test_the_hidden_size_under_normalisations_is_exact(norm: type[nn.Module]) -> None:
    net = Residual(norm).eval()
    verifier, groups = verifier_of(net)
    solved = with_numbers(net, verifier, groups)
    (hidden,) = [group for group in solved if group.kind == "hidden"]
    kept = random_halves([hidden])
    assert verifier.check_kept([hidden], kept).equal
    # Without the restricted statistics, the masked module is another one.
    found = infer(net, call)
    blind = Verifier(net, call, (), {g.name: g.size for g in found.groups})
    outcome = blind.check_kept([hidden], kept)
    assert "differ" in outcome.reason


def test_statistics_of_another_call_are_refused() -> None:
    net = Residual(nn.LayerNorm).eval()
    found = infer(net, call)
    moved = [replace(r, index=r.index + 1) for r in found.reductions]
    verifier = Verifier(net, call, moved, {g.name: g.size for g in found.groups})
    (hidden,) = [group for group in found.groups if group.kind == "hidden"]
    assert "not native_layer_norm as recorded" in verifier.check([hidden]).reason


def test_a_group_without_one_of_its_tensors_is_refused_by_name() -> None:
    net = Residual(nn.LayerNorm).eval()
    verifier, groups = verifier_of(net)
    for lost in ("up.0.bias", "down.0.weight"):
        wrong = [
            replace(g, tensors=tuple(s for s in g.tensors if s.tensor != lost)) for g in groups
        ]
        solution = solve(verifier, wrong, (), set(), {})
        refused = {r.name: r.reason for r in solution.refused}
        (name,) = [
            g.name for g in groups if any(s.tensor == lost for s in g.tensors) and g.kind == "ffn"
        ]
        assert name in refused
        assert len(refused[name]) > 10
        assert {g.name for g in solution.groups} >= {
            g.name for g in groups if g.kind == "ffn" and g.name != name
        }


class Heads(nn.Module):
    """Attention with queries, keys and values in one matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.fused, self.out = 4, nn.Linear(12, 48), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.fused(x).chunk(3, -1)
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (t.reshape(shape).transpose(1, 2) for t in (q, k, v))
        y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def heads_group(layout) -> DependencyGroup:
    dims = (
        PrunableDim("fused.weight", 0, (48, 12), layout),
        PrunableDim("fused.bias", 0, (48,), layout),
        PrunableDim("out.weight", 1, (3, 16), (("h", 4),)),
    )
    number = SizeAttribute("", "heads", (("h",),))
    return DependencyGroup("h", "heads", 4, dims, ("out",), (number,))


def test_a_wrong_layout_is_refused() -> None:
    net = Heads().eval()
    x = torch.randn(2, 5, 12)
    verifier = Verifier(net, lambda net: net(x), (), {"h": 4})
    assert verifier.check([heads_group((("h", 4), ("h", 4), ("h", 4)))]).equal
    for wrong in ((("h", 12),), ((4, "h"), ("h", 4), ("h", 4)), ((3, 4, "h"),)):
        assert not verifier.check([heads_group(wrong)]).equal


def test_what_does_not_follow_is_named_with_its_module() -> None:
    net = nn.Sequential(nn.Linear(12, 12), Heads()).eval()
    x = torch.randn(2, 5, 12)
    verifier = Verifier(net, lambda net: net(x), (), {"1.h": 4})
    group = heads_group((("h", 4), ("h", 4), ("h", 4))).prefixed("1")
    outcome = verifier.check([replace(group, tensors=group.tensors[:2])])
    assert outcome.module == "1.out"
    assert "shapes cannot be multiplied" in outcome.reason
    assert "differ" in verifier.check([replace(group, attributes=())]).reason


def test_nothing_of_the_module_changes() -> None:
    net = build("bert").train()
    inputs = batch(2)
    for parameter in list(net.parameters())[::2]:
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    ids = {name: id(value) for name, value in net.named_parameters()}
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    config = copy.deepcopy(net.config.to_dict())
    state = torch.get_rng_state()
    verifier, groups = verifier_of(net, lambda net: net(**inputs))
    assert solve(verifier, groups, (), set(), {}).groups
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert all(part.training for part in net.modules())
    assert {name: id(value) for name, value in net.named_parameters()} == ids
    assert all(p.grad is grads[name] for name, p in net.named_parameters())
    assert [p.requires_grad for p in net.parameters()] == [g is None for g in grads.values()]
    assert net.config.to_dict() == config
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_copies_share_parameters_and_are_put_back() -> None:
    net = Heads()
    copied = structural_copy(net)
    assert copied.fused.weight is net.fused.weight
    before = dict(vars(copied)), copied.fused.weight
    with changed_within(copied):
        copied.heads = 2
        copied.fused.weight = nn.Parameter(torch.zeros(1))
        copied.cache = torch.ones(3)
    assert copied.heads == 4
    assert not hasattr(copied, "cache")
    assert copied.fused.weight is before[1]
    assert net.heads == 4


def test_constant_tensors_prove_nothing_and_are_varied() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).eval()
    nn.init.zeros_(net[0].bias)
    nn.init.zeros_(net[3].weight)
    x = torch.randn(3, 4)
    verifier, groups = verifier_of(net, lambda net: net(x))
    base = verifier.base
    for name in ("0.bias", "1.weight", "1.bias", "3.weight"):
        assert base.get_parameter(name).std() > 0
    assert base[1].running_var.std() > 0
    assert base[1].running_var.min() > 0
    assert not net[3].weight.any()
    assert len(with_numbers(net, verifier, groups)) == 1
    (group,) = groups
    lost = replace(group, tensors=tuple(s for s in group.tensors if "running" not in s.tensor))
    assert not verifier.check([lost]).equal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_are_verified(dtype: torch.dtype) -> None:
    net = Residual(nn.LayerNorm).to(dtype).eval()
    verifier, groups = verifier_of(net)
    solved = with_numbers(net, verifier, groups)
    assert {g.kind for g in solved} == {"ffn", "hidden"}
    assert next(net.parameters()).dtype == dtype
    if dtype != torch.float64:  # exactly, in copies of single precision
        assert next(verifier.base.parameters()).dtype == torch.float32


def test_time_is_limited() -> None:
    net = Residual(nn.LayerNorm).eval()
    verifier, groups = verifier_of(net, seconds=0.0)
    with pytest.raises(OutOfTime):
        verifier.check(groups)
    solution = solve(verifier, groups, (), set(), {})
    assert not solution.groups
    assert all("time" in refusal.reason for refusal in solution.refused)
    assert len(solution.refused) == len(groups)


def test_groups_of_one_size_keep_different_numbers() -> None:
    groups = [
        DependencyGroup(f"g{i}", "ffn", size, (), ()) for i, size in enumerate((9, 9, 9, 2, 2))
    ]
    kept = random_halves(groups)
    assert len({len(kept[f"g{i}"]) for i in range(3)}) == 3
    assert all(0 < len(kept[g.name]) < g.size for g in groups)
    assert random_halves(groups) == kept != random_halves(groups, seed=1)


def test_outputs_of_any_container_are_compared() -> None:
    one, two = torch.ones(2), torch.zeros(3)
    assert len(tensor_outputs((one, {"a": [two]}))) == 2
    assert len(tensor_outputs({"logits": one, "past_key_values": (two,)})) == 1
    assert relative_difference([one], [one + 1e-3]) == pytest.approx(1e-3, rel=1e-2)
    assert relative_difference([one], [two]) == float("inf")
    nan = torch.tensor([1.0, float("nan")])
    assert relative_difference([nan], [nan]) == 0
    assert relative_difference([one], [nan]) == float("inf")
