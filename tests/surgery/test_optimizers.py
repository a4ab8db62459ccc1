from __future__ import annotations

import collections
import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers.optimization import Adafactor as HFAdafactor

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.surgery.optimizer_state import check_optimizers
from lightning_mi_prune.surgery.optimizers import (
    parameter_names,
    restore_state,
    snapshot_state,
    update_optimizers,
)
from lightning_mi_prune.surgery.units import Rewrite, apply_plan, reshape_tensors
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, SOME, batch, build, entries_of, random_plan

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
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "adafactor-foreach": lambda p: torch.optim.Adafactor(p, lr=0.01, foreach=True),
    "adafactor-transformers": lambda p: HFAdafactor(p),
    "adafactor-transformers-momentum": lambda p: HFAdafactor(
        p, lr=0.01, relative_step=False, beta1=0.9
    ),
}


def network():
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return net, linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])


def step(net, optimizer, seed):
    """A step on data whose dropped units see no gradient difference: they are masked out."""
    x = torch.randn(16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_after_a_cut_every_step_equals_the_sliced_problem(kind):
    """Train, cut, train on == train, slice weights and state by hand, train on; bit for bit."""
    net, group = network()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for seed in range(4):
        step(net, optimizer, seed)
    kept = [1, 2, 5, 6]
    old = [p.detach().clone() for p in net.parameters()]
    states = [copy.deepcopy(optimizer.state[p]) for p in net.parameters()]
    cuts = [{0: kept}, {0: kept}, {1: kept}, {}]

    def sliced(tensor, shape, cut, key=None):
        if not isinstance(tensor, torch.Tensor):
            return tensor
        summed = {"exp_avg_sq_row": (0,), "exp_avg_sq_col": (1,)}
        for place, dim in enumerate(summed.get(key, range(tensor.ndim))):
            if dim in cut and tensor.shape[place] == shape[dim]:  # not where it is summed to one
                tensor = tensor.index_select(place, torch.tensor(cut[dim]))
        return tensor.clone()

    reference = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    by_hand = OPTIMIZERS[kind](reference.parameters())
    with torch.no_grad():
        for p, value, state, cut in zip(reference.parameters(), old, states, cuts, strict=True):
            p.copy_(sliced(value, value.shape, cut))
            if state:
                by_hand.state[p] = {k: sliced(v, value.shape, cut, k) for k, v in state.items()}

    update_optimizers(
        [optimizer], apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": tuple(kept)}))
    )
    for seed in range(10, 16):
        step(net, optimizer, seed)
        step(reference, by_hand, seed)
        for a, b in zip(net.parameters(), reference.parameters(), strict=True):
            assert torch.equal(a, b)


def sliced_by_hand(tensor, name, groups, plan):
    """Cut a tensor as the groups with its name do, without surgery."""
    for group in groups:
        for s in group.tensors:
            if s.tensor == name:
                if plan.width(group.name) == group.size:
                    continue
                g = entries_of(group)
                rows = [unit * g + j for unit in plan.kept[group.name] for j in range(g)]
                tensor = tensor.index_select(s.dim, torch.tensor(rows))
    return tensor


@pytest.mark.parametrize(("family", "head"), [pair for pair in SOME if pair[1] != "image"])
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
    groups = groups_of(model)
    plan = random_plan(groups)
    states = {n: copy.deepcopy(adam.state[p]) for n, p in model.named_parameters()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    update_optimizers([adam], apply_plan(model, groups, plan))

    reference = copy.deepcopy(model)
    by_hand = torch.optim.Adam(reference.parameters(), lr=1e-2)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(sliced_by_hand(values[name], name, groups, plan))
            by_hand.state[parameter] = {
                key: sliced_by_hand(v, name, groups, plan) if v.ndim else v
                for key, v in states[name].items()
            }
    for seed in range(10, 13):
        train(model, adam, seed)
        train(reference, by_hand, seed)
        for a, b in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, "bert") for kind in OPTIMIZERS] + [("adamw", f) for f in CONFIGS if f != "bert"],
)
def test_every_live_parameter_is_held_once_and_moves(kind, family):
    model = build(family)
    heads = next(group.name for group in groups_of(model) if group.kind == "heads")
    stack = heads.partition(".0.")[0] + ".0"
    for name, parameter in model.get_submodule(stack).named_parameters():
        parameter.requires_grad_("attention" not in name)
    live = [p for p in model.parameters() if p.requires_grad]
    half = len(live) // 2
    subsets = [{"params": live[:half], "weight_decay": 0.0}, {"params": live[half:]}]
    optimizer = OPTIMIZERS[kind](subsets)
    lists = [group["params"] for group in optimizer.param_groups]

    def train():
        optimizer.zero_grad()
        model(**batch()).logits.square().sum().backward()
        optimizer.step()

    train()
    groups = groups_of(model)
    update_optimizers([optimizer], apply_plan(model, groups, random_plan(groups)))
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
    net, group = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    schedule = CosineAnnealingLR(optimizer, T_max=10)
    rates = []
    for i in range(6):
        if i == 3:
            groups = optimizer.param_groups
            update_optimizers(
                [optimizer],
                apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 1)})),
            )
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
    net, group = network()
    first = torch.optim.Adam(net[0].parameters())
    second = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, first, 0)
    step(net, second, 1)
    update_optimizers(
        [first, second], apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 3)}))
    )
    assert (
        first.param_groups[0]["params"][0] is net[0].weight is second.param_groups[0]["params"][0]
    )
    assert first.state[net[0].weight]["exp_avg"].shape == (2, 5)
    assert second.state[net[2].weight]["momentum_buffer"].shape == (3, 2)


def test_state_dict_of_a_cut_optimizer_loads_into_a_fresh_one():
    net, group = network()
    optimizer = torch.optim.AdamW(net.parameters())
    step(net, optimizer, 0)
    update_optimizers(
        [optimizer], apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 3)}))
    )
    fresh = torch.optim.AdamW(copy.deepcopy(net).parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert fresh.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


class Packed(torch.Tensor):
    """Shaped like the state of torchao: a subclass that hides its codes and scales."""


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
        (
            lambda p: type("Listy", (Strange,), {"value": [1, 2]})(p, lr=0.1),
            r"Listy keeps state 'strange' \(a list",
        ),
        (
            lambda p: type("Odd", (Strange,), {"value": torch.zeros(7)})(p, lr=0.1),
            r"Odd keeps state 'strange' .*shape \(7,\)",
        ),
        (
            lambda p: type("AdamW4bit", (Strange,), {"value": torch.zeros(1).as_subclass(Packed)})(
                p, lr=0.1
            ),
            r"AdamW4bit keeps state 'strange' \(a Packed",
        ),
    ],
)
def test_state_that_cannot_follow_is_refused_before_anything_changes(make, message):
    net, group = network()
    optimizer = make(net.parameters())
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(lambda: net(torch.ones(1, 5, dtype=torch.float64)).sum())
    else:
        step(net, optimizer, 0)
    groups = [list(g["params"]) for g in optimizer.param_groups]
    with pytest.raises(PruningError, match=message):
        check_optimizers([optimizer], net.parameters())
    rewrites = apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 3)}))
    with pytest.raises(PruningError, match=message):
        update_optimizers([optimizer], rewrites)
    assert all(
        a is b
        for g, h in zip(groups, optimizer.param_groups, strict=True)
        for a, b in zip(g, h["params"], strict=True)
    )


def test_folded_weights_keep_their_state():
    net, group = network()
    optimizer = torch.optim.Adam(net.parameters())
    step(net, optimizer, 0)
    before = optimizer.state[net[2].bias]["exp_avg"].clone()
    compensated = {"2.weight": torch.ones(3, 2), "2.bias": torch.ones(3)}
    rewrites = apply_plan(
        net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 3)}), compensated=compensated
    )
    update_optimizers([optimizer], rewrites)
    assert torch.equal(net[2].bias, torch.ones(3, dtype=torch.float64))
    assert torch.equal(optimizer.state[net[2].bias]["exp_avg"], before)


class Args:
    """Shaped like MockArgs of bitsandbytes."""

    def __init__(self, optim_bits):
        self.optim_bits = optim_bits


class Adam8bit(torch.optim.Adam):
    def __init__(self, params, optim_bits=8):
        super().__init__(params)
        self.args = Args(optim_bits)


def test_eight_bits_are_refused_before_there_is_state():
    net, _ = network()
    with pytest.raises(PruningError, match="Adam8bit keeps its state in blocks of 8-bit numbers"):
        check_optimizers([Adam8bit(net.parameters())], net.parameters())
    check_optimizers([Adam8bit(net.parameters(), optim_bits=32)], net.parameters())


class Lookahead(torch.optim.Optimizer):
    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self.inner = inner


class Chain(torch.optim.Optimizer):
    def __init__(self, *parts):
        super().__init__([g for part in parts for g in part.param_groups], {})
        self.parts = list(parts)


def test_optimizers_around_another_are_refused():
    net, _ = network()
    adam = torch.optim.Adam(net.parameters())
    for outer in (Lookahead(adam), Chain(adam)):
        message = rf"{type(outer).__name__} wraps Adam \(.*; use Adam directly\.$"
        with pytest.raises(PruningError, match=message):
            check_optimizers([outer], net.parameters())
        with pytest.raises(PruningError, match=message):
            snapshot_state([outer], {})
        with pytest.raises(PruningError, match=message):
            restore_state([outer], {}, {}, [{}])
    adam.itself = adam
    check_optimizers([adam], net.parameters())


class Own(torch.optim.SGD):
    """Keeps something in an attribute of its own, from its first step on."""

    def keep(self, parameters):
        raise NotImplementedError

    def step(self, closure=None):
        super().step(closure)
        self.mine = self.keep(self.param_groups[0]["params"])


KEPT = {
    "a tensor": lambda ps: torch.zeros_like(ps[0]),
    "several flattened": lambda ps: torch.cat([p.detach().flatten() for p in ps]),
    "a list": lambda ps: [p.detach().clone() for p in ps],
    "by name": lambda ps: {"momentum": {i: (p.detach().clone(), 0.9) for i, p in enumerate(ps)}},
    "by parameter": lambda ps: dict.fromkeys(ps, 0.9),
    "the parameters": lambda ps: list(ps),
    "a set of them": set,
    "a history": lambda ps: collections.deque([[ps[0].grad]], maxlen=3),
    "a small parameter": lambda ps: nn.Parameter(torch.zeros(())),
}


@pytest.mark.parametrize("kept", KEPT)
def test_tensors_in_attributes_of_its_own_are_refused_by_name(kept):
    net, _ = network()
    optimizer = type("Mine", (Own,), {"keep": lambda self, ps: KEPT[kept](ps)})(
        net.parameters(), lr=0.1
    )
    check_optimizers([optimizer], net.parameters())  # there is nothing yet
    step(net, optimizer, 0)
    before = [id(p) for p in net.parameters()]
    with pytest.raises(PruningError, match=r"Mine keeps .* in its attribute 'mine'") as refused:
        check_optimizers([optimizer], net.parameters())
    assert str(refused.value).count(". ") == 1
    assert before == [id(p) for p in net.parameters()]


def test_what_is_of_no_parameter_or_follows_a_cut_may_be_kept():
    net, group = network()

    def keep(self, parameters):
        loop = [1.0, "text", None]
        loop.append(loop)
        groups = self.param_groups
        single = (torch.zeros(()), torch.ones(1), {"found_inf": torch.zeros(1, 1)})
        return loop, single, groups, groups[0], groups[0]["params"], self.state, len, self.defaults

    optimizer = type("Mine", (Own,), {"keep": keep})(net.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces optimizer.step
    step(net, optimizer, 0)
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(1)
    check_optimizers([optimizer], net.parameters())
    optimizer.grad_scale = optimizer.found_inf = None
    update_optimizers(
        [optimizer], apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 3)}))
    )
    step(net, optimizer, 1)
    check_optimizers([optimizer], net.parameters())


SHIPPED = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
)


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "Optimizer"])
def test_every_optimizer_of_torch_goes_on_or_is_refused_by_name(name):
    net = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    net.double()
    group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
    optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.01)
    if name == "LBFGS":
        with pytest.raises(PruningError, match="LBFGS keeps a history"):
            check_optimizers([optimizer], net.parameters())
        return

    def train(seed):
        if name == "SparseAdam":
            for parameter in net.parameters():
                parameter.grad = torch.ones_like(parameter).to_sparse()
            optimizer.step()
        else:
            step(net, optimizer, seed)

    for seed in (0, 1):
        check_optimizers([optimizer], net.parameters())
        train(seed)
    check_optimizers([optimizer], net.parameters())
    update_optimizers(
        [optimizer], apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 3, 4)}))
    )
    before = [p.detach().clone() for p in net.parameters()]
    train(2)
    check_optimizers([optimizer], net.parameters())
    moved = zip(before, net.parameters(), strict=True)
    assert all(not torch.equal(a, b) for a, b in moved)


@pytest.fixture
def one_process():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_the_wrappers_of_torch_are_refused():
    # Imported here: the import itself warns.
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

    net, _ = network()
    zero = ZeroRedundancyOptimizer(net.parameters(), torch.optim.Adam, lr=0.1)
    with pytest.raises(PruningError, match=r"ZeroRedundancyOptimizer wraps Adam \(in 'optim'\)"):
        check_optimizers([zero], net.parameters())
    local = PostLocalSGDOptimizer(
        torch.optim.SGD(net.parameters(), lr=0.1), PeriodicModelAverager(period=2, warmup_steps=0)
    )
    with pytest.raises(PruningError, match=r"PostLocalSGDOptimizer wraps SGD \(in 'optim'\)"):
        check_optimizers([local], net.parameters())


def test_a_parameter_held_twice_is_refused_where_it_is_cut():
    net, _ = network()
    twice = [net[0].weight, net[0].weight, net[2].weight]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD(twice, lr=0.1)
    with pytest.raises(PruningError, match="SGD holds a parameter twice"):
        check_optimizers([optimizer], net.parameters())
    check_optimizers([optimizer], [net[2].weight, net[2].weight])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (4, 1), (1, 4)])
def test_rows_and_columns_of_a_square_are_distinguished(shape, dim):
    """A cut of one dimension shortens exactly the state tensors that follow it."""
    old = nn.Parameter(torch.ones(shape))
    kept = torch.tensor([1, 3] if shape[dim] == 4 else [0])
    new = nn.Parameter(old.detach().index_select(dim, kept))
    for make in (torch.optim.Adafactor, HFAdafactor):
        optimizer = make([old])
        view = [-1 if i == dim else 1 for i in range(old.ndim)]
        values = (10.0 ** torch.arange(shape[dim])).view(view).expand(shape)
        old.grad = values.clone()
        optimizer.step()
        fresh = make([new])
        new.grad = values.index_select(dim, kept)
        fresh.step()
        expected = fresh.state[new]
        update_optimizers([optimizer], [Rewrite(old, new, {dim: kept})])
        state = optimizer.state[new]
        assert state.keys() == expected.keys()
        along = {"row_var": len(shape) - 1, "exp_avg_sq_row": len(shape) - 1}
        along |= {"col_var": len(shape) - 2, "exp_avg_sq_col": len(shape) - 2}
        for key in along.keys() & state.keys():
            assert state[key].shape == expected[key].shape
            if along[key] != dim:  # a mean along the cut dimension remembers what was cut
                assert torch.allclose(state[key], expected[key])
        new = nn.Parameter(new.detach().clone())


def named(net):
    return {id(p): name for name, p in net.named_parameters()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_cut_that_is_undone_never_happened(kind):
    """Train, snapshot, cut, train, grow, restore, train on == train, train on; bit for bit."""
    net, group = network()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for seed in range(4):
        step(net, optimizer, seed)
    # Copied as one object: load_state_dict would cast NAdam's products to the parameters' type.
    never, never_cut = copy.deepcopy((net, optimizer))
    weights = copy.deepcopy(net.state_dict())
    file = io.BytesIO()
    torch.save(snapshot_state([optimizer], named(net)), file)

    update_optimizers(
        [optimizer], apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (1, 2, 5)}))
    )
    for seed in range(4, 8):
        step(net, optimizer, seed)
    subset, held = optimizer.param_groups[0], optimizer.param_groups[0]["params"]
    small = dict(net.named_parameters())
    reshape_tensors(net, [group], PruningPlan({"hidden": 8}, {"hidden": tuple(range(8))}))
    net.load_state_dict(weights)
    grown = {id(small[n]): p for n, p in net.named_parameters() if p is not small[n]}
    file.seek(0)
    states = torch.load(file, weights_only=True)
    kept = copy.deepcopy(states)
    restore_state([optimizer], grown, named(net), states)

    assert optimizer.param_groups[0] is subset
    assert subset["params"] is held
    assert all(a is b for a, b in zip(held, net.parameters(), strict=True))
    assert set(optimizer.state) <= set(net.parameters())
    for seed in range(10, 16):
        step(net, optimizer, seed)
        step(never, never_cut, seed)
        for a, b in zip(net.parameters(), never.parameters(), strict=True):
            assert torch.equal(a, b)
    # Training on has not written into the snapshot: it can be restored once more.
    for name, state in kept[0].items():
        for key, value in state.items():
            again = states[0][name][key]
            assert torch.equal(value, again) if isinstance(value, torch.Tensor) else value == again


def test_a_snapshot_is_plain_and_of_named_parameters():
    net, _ = network()
    adam, sgd = torch.optim.Adam(net.parameters()), torch.optim.SGD(net.parameters(), lr=0.1)
    step(net, adam, 0)
    adam.state[net[0].weight]["ratio"] = np.float64(0.5)
    adam.state[net[0].weight]["exp_avg"].requires_grad_()
    first, second = snapshot_state([adam, sgd], {id(net[0].weight): "a", id(net[2].bias): "b"})
    assert type(first) is dict
    assert first.keys() == second.keys() == {"a", "b"}
    assert type(first["a"]) is dict
    assert type(first["a"]["ratio"]) is float
    assert not first["a"]["exp_avg"].requires_grad
    assert second == {"a": {}, "b": {}}
    before = first["b"]["exp_avg"].clone()
    step(net, adam, 1)
    assert torch.equal(first["b"]["exp_avg"], before)


def test_a_snapshot_refuses_what_a_cut_refuses():
    net, _ = network()
    optimizer = type("Odd", (Strange,), {"value": torch.zeros(7)})(net.parameters(), lr=0.1)
    step(net, optimizer, 0)
    with pytest.raises(PruningError, match="Odd keeps state 'strange'"):
        snapshot_state([optimizer], named(net))
    assert snapshot_state([optimizer], {}) == [{}]


def test_restore_of_an_early_snapshot_forgets_later_state():
    net, _ = network()
    adam = torch.optim.Adam(net.parameters())
    states = snapshot_state([adam], named(net))
    step(net, adam, 0)
    restore_state([adam], {}, named(net), states)
    assert not adam.state


def test_restore_leaves_hyperparameters_and_strangers_alone():
    net, _ = network()
    adam = torch.optim.Adam(net.parameters(), lr=0.1)
    step(net, adam, 0)
    known = {id(net[0].weight): "0.weight"}
    states = snapshot_state([adam], known)
    step(net, adam, 1)
    adam.param_groups[0]["lr"] = 0.05
    others = {p: dict(adam.state[p]) for p in net.parameters()}
    grown = nn.Parameter(torch.zeros(9, dtype=torch.float64))
    compensated = nn.Parameter(torch.ones(3, dtype=torch.float64))
    old_bias, old_out = net[0].bias, net[2].bias
    replaced = {id(old_bias): grown, id(old_out): compensated}
    restore_state([adam], replaced, known | {id(grown): "0.bias"}, states)
    assert adam.param_groups[0]["lr"] == 0.05
    assert adam.state[net[0].weight]["step"] == 1
    assert adam.state[net[2].weight] == others[net[2].weight]
    assert adam.state[compensated] == others[old_out]  # same shape: the present state goes on
    assert grown not in adam.state  # the present state is of another shape
    assert old_bias not in adam.state
    assert adam.param_groups[0]["params"] == [net[0].weight, grown, net[2].weight, compensated]


def test_two_optimizers_are_restored_each_from_its_own():
    net, group = network()
    first = torch.optim.Adam(net[0].parameters())
    second = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    step(net, first, 0)
    step(net, second, 1)
    states = snapshot_state([first, second], named(net))
    small = apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 3)}))
    update_optimizers([first, second], small)
    step(net, second, 2)
    replaced = {id(r.new): r.old for r in small}
    names = {id(r.old): n for r in small for n, p in net.named_parameters() if p is r.new}
    names[id(net[2].bias)] = "2.bias"
    restore_state([first, second], replaced, names, states)
    weight = next(r.old for r in small if names[id(r.old)] == "0.weight")
    assert first.param_groups[0]["params"][0] is weight is second.param_groups[0]["params"][0]
    assert torch.equal(first.state[weight]["exp_avg"], states[0]["0.weight"]["exp_avg"])
    buffer = second.state[weight]["momentum_buffer"]
    assert torch.equal(buffer, states[1]["0.weight"]["momentum_buffer"])


@pytest.mark.skipif(torch.__version__ < "2.6", reason="optimizers keep no names")
@pytest.mark.parametrize("at", ["", "net."])
def test_names_follow_removed_and_restored_parameters(at):
    net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    full = dict(net.named_parameters())
    first = [(at + n, p) for n, p in full.items() if n[0] in "01"]
    rest = [(at + n, p) for n, p in full.items() if n[0] in "23"]
    adam = torch.optim.Adam([{"params": first}, {"params": rest}])
    before = copy.deepcopy(adam.state_dict())
    known = {id(p): f"model.{at}{n}" for n, p in full.items()}
    states, groups = snapshot_state([adam], known), parameter_names([adam], known)
    gone = [*net[1].parameters(), *net[2].parameters()]
    now = {n.replace("3.", "1."): p for n, p in full.items() if n[0] in "03"}
    update_optimizers([adam], [], gone, {id(p): f"model.{at}{n}" for n, p in now.items()})
    found = [group["param_names"] for group in adam.param_groups]
    assert found == [[f"{at}0.weight", f"{at}0.bias"], [f"{at}1.weight", f"{at}1.bias"]]
    assert before["param_groups"][0]["param_names"] == [name for name, _ in first]
    back = {name: p for p, name in ((p, known[id(p)]) for p in gone)}
    restore_state([adam], {}, known, states, groups, back)
    assert adam.state_dict()["param_groups"] == before["param_groups"]


def broken(states, **changes):
    states = copy.deepcopy(states)
    states[0]["2.weight"].update(changes)
    return states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: [], "holds 0 readable optimizer states; expected 1"),
        (lambda s: [*s, {}], "holds 2 readable optimizer states; expected 1"),
        (lambda s: {"0": s[0]}, "holds 0 readable"),
        (lambda s: [[1]], "holds 0 readable"),
        (lambda s: [{"2.weight": torch.zeros(3)}], "holds 0 readable"),
        (lambda s: broken(s, exp_avg=torch.zeros(3, 7)), r"'2\.weight' has 'exp_avg'.*\(3, 7\)"),
        (lambda s: broken(s, exp_avg=torch.zeros(8, 3)), "does not fit"),
        (lambda s: broken(s, exp_avg=torch.zeros(1, 8)), "does not fit"),
        (lambda s: broken(s, exp_avg=torch.zeros(1)), "does not fit"),
        (lambda s: broken(s, step=torch.zeros(3, 8)), "does not fit"),
        (lambda s: broken(s, step=torch.zeros(1)), "does not fit"),
        (lambda s: broken(s, exp_avg=torch.zeros(3, 8).to_sparse()), "does not fit"),
        (lambda s: broken(s, exp_avg="text"), "does not fit"),
        (lambda s: broken(s, exp_avg=[torch.zeros(3, 8)]), "does not fit"),
    ],
)
def test_a_snapshot_that_does_not_fit_changes_nothing(change, message):
    net, _ = network()
    adam = torch.optim.Adam(net.parameters())
    step(net, adam, 0)
    states = snapshot_state([adam], named(net))
    step(net, adam, 1)
    parameters = list(net.parameters())
    before = copy.deepcopy(adam.state_dict())
    replaced = {id(p): nn.Parameter(p.detach().clone()) for p in parameters}
    names = {id(replaced[id(p)]): name for name, p in net.named_parameters()}
    with pytest.raises(PruningError, match=message):
        restore_state([adam], replaced, names, change(states))
    assert all(a is b for a, b in zip(parameters, adam.param_groups[0]["params"], strict=True))
    after = adam.state_dict()
    assert before["state"].keys() == after["state"].keys()
    for place, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, after["state"][place][key])


@pytest.mark.parametrize("capturable", [False, True])
def test_steps_are_put_where_the_optimizer_wants_them(capturable):
    """The meta device stands in for an accelerator: nothing computes, but tensors live there."""
    weight = nn.Parameter(torch.zeros(3, device="meta"))
    states = [{"w": {"step": torch.tensor(2.0), "exp_avg": torch.ones(3)}}]
    adam = torch.optim.Adam([weight], capturable=capturable)
    restore_state([adam], {}, {id(weight): "w"}, states)
    assert adam.state[weight]["exp_avg"].device.type == "meta"
    assert adam.state[weight]["step"].device.type == ("meta" if capturable else "cpu")
    # An optimizer that shows where it keeps its step is believed.
    adam.state[weight]["step"] = torch.tensor(0.0, device="cpu" if capturable else "meta")
    restore_state([adam], {}, {id(weight): "w"}, states)
    assert adam.state[weight]["step"].device.type == ("cpu" if capturable else "meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch refuses capturable off the GPU")
@pytest.mark.parametrize("option", ["capturable", "fused"])
def test_steps_on_the_gpu_stay_there(option):
    net, group = network()
    net.cuda()
    adam = torch.optim.Adam(net.parameters(), **{option: True})

    def train():
        adam.zero_grad()
        net(torch.ones(4, 5, dtype=torch.float64, device="cuda")).square().sum().backward()
        adam.step()

    train()
    states = snapshot_state([adam], named(net))
    assert all(v.device.type == "cpu" for state in states[0].values() for v in state.values())
    rewrites = apply_plan(net, [group], PruningPlan({"hidden": 8}, {"hidden": (0, 3)}))
    update_optimizers([adam], rewrites)
    train()
    small = dict(net.named_parameters())
    reshape_tensors(net, [group], PruningPlan({"hidden": 8}, {"hidden": tuple(range(8))}))
    grown = {id(small[n]): p for n, p in net.named_parameters() if p is not small[n]}
    restore_state([adam], grown, named(net), states)
    assert all(v.is_cuda for state in adam.state.values() for v in state.values())
    train()
    assert adam.state[net[0].weight]["step"] == 2
