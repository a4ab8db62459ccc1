from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import find_axes, linear_axis
from lightning_mi_prune.optimizers import check_optimizers, rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.surgery import apply
from tests.models import CONFIGS, HEADS, batch, build, random_plan

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
}


def network():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return net, linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])


def step(net, optimizer, seed):
    """A step on data whose dropped units see no gradient difference: they are masked out."""
    x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_after_a_cut_every_step_equals_the_sliced_problem(kind):
    """Train, cut, train on == train, slice weights and state by hand, train on; bit for bit."""
    net, axis = network()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for seed in range(4):
        step(net, optimizer, seed)
    kept = [1, 2, 5, 6]
    old = [p.detach().clone() for p in net.parameters()]
    states = [copy.deepcopy(optimizer.state[p]) for p in net.parameters()]
    cuts = [{0: kept}, {0: kept}, {1: kept}, {}]

    def sliced(tensor, shape, cut):
        if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
            return tensor
        for dim, index in cut.items():
            tensor = tensor.index_select(dim, torch.tensor(index))
        return tensor.clone()

    reference = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    by_hand = OPTIMIZERS[kind](reference.parameters())
    with torch.no_grad():
        for p, value, state, cut in zip(reference.parameters(), old, states, cuts, strict=True):
            p.copy_(sliced(value, value.shape, cut))
            if state:
                by_hand.state[p] = {k: sliced(v, value.shape, cut) for k, v in state.items()}

    rebind([optimizer], apply(net, [axis], Plan({"hidden": 8}, {"hidden": tuple(kept)})))
    for seed in range(10, 16):
        step(net, optimizer, seed)
        step(reference, by_hand, seed)
        for a, b in zip(net.parameters(), reference.parameters(), strict=True):
            assert torch.equal(a, b)


def sliced_by_hand(tensor, name, axes, plan):
    """Cut a tensor by what the axes say of its name, without surgery."""
    for axis in axes:
        for s in axis.slices:
            if s.tensor == name:
                g = axis.entries
                rows = [unit * g + j for unit in plan.kept[axis.name] for j in range(g)]
                tensor = tensor.index_select(s.dim, torch.tensor(rows))
    return tensor


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", HEADS)
def test_adam_after_a_cut_equals_adam_on_the_sliced_problem_in_every_family(family, head):
    model = build(family, head)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)

    def train(network, optimizer, seed):
        output = network(**batch(seed=seed))
        logits = output.logits if "logits" in output else output.start_logits
        optimizer.zero_grad()
        logits.square().mean().backward()
        optimizer.step()

    for seed in range(3):
        train(model, adam, seed)
    axes = find_axes(model)
    plan = random_plan(axes)
    states = {n: copy.deepcopy(adam.state[p]) for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    rebind([adam], apply(model, axes, plan))

    reference = copy.deepcopy(model)
    by_hand = torch.optim.Adam(reference.parameters(), lr=1e-2)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(sliced_by_hand(values[name], name, axes, plan))
            by_hand.state[parameter] = {
                key: sliced_by_hand(v, name, axes, plan) if v.ndim else v
                for key, v in states[name].items()
            }
    for seed in range(10, 13):
        train(model, adam, seed)
        train(reference, by_hand, seed)
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_live_parameter_is_held_once_and_moves(kind, family):
    model = build(family)
    stack = find_axes(model)[0].name.partition(".0.")[0] + ".0"
    for name, parameter in model.get_submodule(stack).named_parameters():
        parameter.requires_grad_("attention" not in name)
    live = [p for p in model.parameters() if p.requires_grad]
    half = len(live) // 2
    groups = [{"params": live[:half], "weight_decay": 0.0}, {"params": live[half:]}]
    optimizer = OPTIMIZERS[kind](groups)
    lists = [group["params"] for group in optimizer.param_groups]

    def train():
        optimizer.zero_grad()
        model(**batch()).logits.square().sum().backward()
        optimizer.step()

    train()
    axes = find_axes(model)
    rebind([optimizer], apply(model, axes, random_plan(axes)))
    assert [group["params"] for group in optimizer.param_groups] == lists
    assert all(a is b["params"] for a, b in zip(lists, optimizer.param_groups, strict=True))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert set(map(id, optimizer.state)) <= set(held)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train()
    for name, parameter in model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        # A key's bias shifts all scores of a query alike: softmax gives it no gradient. Token
        # types and positions that do not occur have none either, but their tables do.
        if "key.bias" not in name and "k_lin.bias" not in name:
            assert moved == parameter.requires_grad, name


def test_schedules_keep_running_on_the_same_objects():
    net, axis = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    schedule = CosineAnnealingLR(optimizer, T_max=10)
    rates = []
    for i in range(6):
        if i == 3:
            groups = optimizer.param_groups
            rebind([optimizer], apply(net, [axis], Plan({"hidden": 8}, {"hidden": (0, 1)})))
            assert optimizer.param_groups is groups
        step(net, optimizer, i)
        schedule.step()
        rates.append(schedule.get_last_lr()[0])
    other = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.1)
    expected = CosineAnnealingLR(other, T_max=10)
    for rate in rates:
        other.step()
        expected.step()
        assert rate == pytest.approx(expected.get_last_lr()[0])


def test_two_optimizers_and_a_shared_parameter():
    net, axis = network()
    first = torch.optim.Adam(net[0].parameters())
    second = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, first, 0)
    step(net, second, 1)
    rebind([first, second], apply(net, [axis], Plan({"hidden": 8}, {"hidden": (0, 3)})))
    assert (
        first.param_groups[0]["params"][0] is net[0].weight is second.param_groups[0]["params"][0]
    )
    assert first.state[net[0].weight]["exp_avg"].shape == (2, 5)
    assert second.state[net[2].weight]["momentum_buffer"].shape == (3, 2)


def test_state_dict_of_a_cut_optimizer_loads_into_a_fresh_one():
    net, axis = network()
    optimizer = torch.optim.AdamW(net.parameters())
    step(net, optimizer, 0)
    rebind([optimizer], apply(net, [axis], Plan({"hidden": 8}, {"hidden": (0, 3)})))
    fresh = torch.optim.AdamW(copy.deepcopy(net).parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


class Strange(torch.optim.SGD):
    value: object = None

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["strange"] = self.value


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.LBFGS(p, lr=0.01), "LBFGS keeps a history"),
        (lambda p: torch.optim.Adafactor(p, lr=0.01), "Adafactor keeps sums over rows"),
        (
            lambda p: type("Listy", (Strange,), {"value": [1, 2]})(p, lr=0.1),
            r"Listy keeps state 'strange' \(list",
        ),
        (
            lambda p: type("Odd", (Strange,), {"value": torch.zeros(7)})(p, lr=0.1),
            r"Odd keeps state 'strange' .*shape \(7,\)",
        ),
    ],
)
def test_state_that_cannot_follow_is_refused_before_anything_changes(make, message):
    net, axis = network()
    optimizer = make(net.parameters())
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(lambda: net(torch.ones(1, 5, dtype=torch.float64)).sum())
    else:
        step(net, optimizer, 0)
    groups = [list(g["params"]) for g in optimizer.param_groups]
    with pytest.raises(PruningError, match=message):
        check_optimizers([optimizer], net.parameters())
    rewrites = apply(net, [axis], Plan({"hidden": 8}, {"hidden": (0, 3)}))
    with pytest.raises(PruningError, match=message):
        rebind([optimizer], rewrites)
    assert all(
        a is b
        for g, h in zip(groups, optimizer.param_groups, strict=True)
        for a, b in zip(g, h["params"], strict=True)
    )


def test_folded_weights_keep_their_state():
    net, axis = network()
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer, 0)
    before = optimizer.state[net[2].bias]["exp_avg"].clone()
    folded = {"2.weight": torch.ones(3, 2), "2.bias": torch.ones(3)}
    rewrites = apply(net, [axis], Plan({"hidden": 8}, {"hidden": (0, 3)}), folded=folded)
    rebind([optimizer], rewrites)
    assert torch.equal(net[2].bias, torch.ones(3, dtype=torch.float64))
    assert torch.equal(optimizer.state[net[2].bias]["exp_avg"], before)
