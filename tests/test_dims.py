"""Dimensions of heads: turned with no change of the output, cut at no loss, and carried."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_mi_prune import PruningError, from_pretrained, load_pruned, prune
from lightning_mi_prune.axes import as_built, count_parameters, full_plan
from lightning_mi_prune.budget import Budget
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.clock import measure_table
from lightning_mi_prune.costs import ParameterCosts, measure_macs
from lightning_mi_prune.evidence import gather
from lightning_mi_prune.families import find_axes
from lightning_mi_prune.families.stacks import find_stacks
from lightning_mi_prune.gradients import GradientListener
from lightning_mi_prune.limits import Limits
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.measure import count_macs
from lightning_mi_prune.method import Method
from lightning_mi_prune.milliseconds import LatencyCosts
from lightning_mi_prune.optimizers import rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.ranking import rank_axes
from lightning_mi_prune.relevance import relevance_of
from lightning_mi_prune.sample import Example
from lightning_mi_prune.surgery import Rewrite, apply
from lightning_mi_prune.surgery.operation import operate
from lightning_mi_prune.turning import turned
from lightning_mi_prune.turns import turn_along
from tests.models import (
    CONFIGS,
    PICTURES,
    batch,
    build,
    inputs_of,
    masked_copy,
    outputs,
    pictures,
    random_plan,
)
from tests.test_latency import ruler

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")
FAMILIES = [*sorted(set(CONFIGS) - {"albert", "deberta-v2"}), *PICTURES]
UNITS = ["ffn", "heads", "dims"]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
every = pytest.mark.parametrize("family", FAMILIES)


def tiny(family="bert", **options):
    """A small model of a family, and what it can be run on."""
    head = "image" if family in PICTURES else "sequence"
    return build(family, head, **options), inputs_of(head)


def lesson(family, rows=64, count=6):
    """Batches with labels."""
    given = pictures if family in PICTURES else batch
    return [{**given(rows, seed=seed), "labels": torch.arange(rows) % 3} for seed in range(count)]


def loss(model, inputs):
    return model(**inputs).loss


def known(model, axes, family="bert"):
    """Moments and relevance of a model."""
    with torch.no_grad(), Listener(model, axes) as heard:
        for inputs in lesson(family):
            model(**inputs)
    with GradientListener(model, axes) as felt:
        for index, inputs in enumerate(lesson(family)):
            with felt.step(index):
                loss(model, inputs).backward()
            model.zero_grad(set_to_none=True)
    return heard.moments, relevance_of(felt.sums)


def turns(model, family="bert"):
    """The turn of every layer of a model, with what the values were known by."""
    axes, weights = find_axes(model), dict(model.named_parameters())
    moments, relevance = known(model, axes, family)
    plan = full_plan(axes)
    found = []
    for axis in axes:
        if axis.turn is not None:
            said = (moments, weights, plan.kept, plan, axes, relevance)
            (values,) = gather(axis, *said)
            found.append((axis, turned(axis, values, moments, weights, relevance), values))
    return found


def narrow(model, axes, rank):
    """Make the heads of a model say and hear only so much."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for axis in axes:
            if axis.turn is None:
                continue
            size = axis.size
            for path in (axis.turn.query, axis.turn.value):
                layer = model.get_submodule(path)
                for head in range(axis.entries):
                    rows = slice(head * size, head * size + size)
                    inner = torch.randn(size, rank, generator=generator)
                    onto = inner @ torch.linalg.pinv(inner)
                    layer.weight[rows] = onto @ layer.weight[rows]
                    layer.bias[rows] = onto @ layer.bias[rows]


@every
def test_a_turn_changes_no_output(family):
    model, inputs = tiny(family)
    before = outputs(model, inputs)
    for _, turn, _ in turns(model, family):
        weights = dict(model.named_parameters())
        new = turn.weights(weights)
        assert any(not torch.equal(new[name], weights[name]) for name in new)
        for name, value in new.items():
            weights[name].data.copy_(value)
    assert torch.allclose(outputs(model, inputs), before, atol=1e-4)


def test_the_directions_are_those_of_a_balanced_system():
    """Both Gramians are diagonal and fall; values are turned by a rotation."""
    ((axis, turn, values), *_) = turns(build())
    seen = turn.of(values, range(axis.entries), axis.size)
    eye = torch.eye(axis.size, dtype=torch.float64).expand_as(turn.value)
    assert torch.allclose(turn.value @ turn.value.mT, eye, atol=1e-9)
    assert torch.allclose(turn.query @ turn.key.mT, eye, atol=1e-6)
    # By what remains unexplained: the first d of the best basis beat those of any other.
    for size in (1, 3):
        block = slice(0, axis.size)
        covariance = seen.covariance[block, block]
        read = seen.readout[:, block]

        def left(basis, covariance=covariance, read=read):
            both = torch.linalg.inv(basis @ covariance @ basis.mT)
            rest = covariance - covariance @ basis.mT @ both @ basis @ covariance
            return float((read @ rest @ read.mT).trace())

        best = left(torch.eye(axis.size, dtype=torch.float64)[:size])
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            other = torch.randn(size, axis.size, generator=generator, dtype=torch.float64)
            assert best <= left(other) + 1e-12


@every
@pytest.mark.parametrize("dims", [2, 3])
def test_what_heads_never_used_goes_without_a_trace(family, dims):
    model, inputs = tiny(family)
    axes = find_axes(model)
    narrow(model, axes, 2)
    before = outputs(model, inputs)
    method = Method(Budget(0.5), limits=Limits(pins={r"\.dims$": dims}), refit=False)
    mine = [axis for axis in axes if axis.kind == "dims"]
    widths = {axis.name: dims for axis in mine}
    share = 1 - count_parameters(mine, widths) / count_parameters(mine)
    done = prune(model, lesson(family), 0.999 * share, loss=loss, method=method, units=["dims"])
    assert {done.plan.width(a.name) for a in axes if a.kind == "dims"} == {dims}
    assert torch.allclose(outputs(model, inputs), before, atol=2e-3)


@every
def test_a_cut_model_computes_what_the_masked_model_computes(family):
    model, inputs = tiny(family)
    axes = find_axes(model)
    plan = random_plan(axes, dims=True)
    masked = masked_copy(model, axes, plan)
    apply(model, axes, plan)
    assert torch.allclose(outputs(model, inputs), outputs(masked, inputs), atol=1e-5)
    for axis in axes:
        if axis.turn is not None:
            width = plan.width(axis.name) * plan.width(axis.crossed)
            assert model.get_submodule(axis.turn.query).out_features == width
            assert model.get_submodule(axis.turn.reader).in_features == width


@every
def test_dimensions_then_heads_are_both_at_once(family):
    twice, once = tiny(family)[0], tiny(family)[0]
    axes = find_axes(twice)
    plan = random_plan(axes, dims=True)
    first = Plan(
        plan.sizes,
        {a.name: plan.kept[a.name] if a.kind == "dims" else (*range(a.size),) for a in axes},
    )
    apply(twice, axes, first)
    apply(twice, axes, plan, current=first)
    apply(once, axes, plan)
    for a, b in zip(twice.parameters(), once.parameters(), strict=True):
        assert torch.equal(a, b)
    again = as_built(find_axes(once), plan.sizes)
    assert [(a.name, a.size, a.entries, a.slices) for a in again] == [
        (a.name, a.size, a.entries, a.slices) for a in axes
    ]


@every
def test_one_call_meets_its_budget_and_what_is_saved_opens_again(family, tmp_path):
    model, inputs = tiny(family)
    whole = count_parameters([a for a in find_axes(model) if a.kind in UNITS])
    done = prune(model, lesson(family), 0.6, loss=loss, units=UNITS)
    assert done.prunable_parameters[0] == whole
    assert 0.6 <= done.sparsity < 0.75
    assert any(done.plan.width(n) < s for n, s in done.plan.sizes.items() if n.endswith(".dims"))
    assert done.prunable_parameters[1] == sum(p.numel() for p in model.parameters()) - (
        done.parameters[0] - whole
    )
    model.save_pretrained(tmp_path)
    back = from_pretrained(type(model), tmp_path)
    assert torch.equal(outputs(back, inputs), outputs(model, inputs))
    state = model.state_dict()
    fresh = tiny(family, seed=1)[0]
    torch.save(state, tmp_path / "state.pt")
    load_pruned(fresh, tmp_path / "state.pt")
    assert torch.equal(outputs(fresh, inputs), outputs(model, inputs))


@every
def test_a_second_call_goes_on_from_the_first(family):
    model, inputs = tiny(family)
    first = prune(model, lesson(family), 0.4, loss=loss, units=UNITS)
    done = prune(model, lesson(family), 0.7, loss=loss, units=UNITS)
    assert 0.7 <= done.sparsity < 0.85
    for name, kept in done.plan.kept.items():
        assert set(kept) <= set(first.plan.kept[name])
    assert torch.isfinite(outputs(model, inputs)).all()


@pytest.mark.parametrize("dims", [0, 5])
def test_heads_that_vanish_take_their_dimensions_along(dims):
    """Nothing is lost with dimensions that no head has, in this cut and in the next."""
    model = build()
    pins = {r"layer\.0\.heads": 0} | ({r"layer\.0\.dims": dims} if dims else {})
    method = Method(Budget(0.5), limits=Limits(pins=pins))
    done = prune(model, lesson("bert"), 0.6, loss=loss, units=UNITS, method=method)
    assert done.plan.width("bert.encoder.layer.0.heads") == 0
    assert set(done.plan.rankings["bert.encoder.layer.0.dims"].loss) == {0.0}
    done = prune(model, lesson("bert"), 0.8, loss=loss, units=UNITS)
    assert done.sparsity >= 0.8
    assert torch.isfinite(outputs(model, batch())).all()


@pytest.mark.parametrize("first", [UNITS, ["dims"], ["heads"]])
@pytest.mark.parametrize("second", [None, ["dims"], [*UNITS, "residual", "pooler"]])
@pytest.mark.parametrize("widths", ["global", "uniform"])
def test_kinds_may_change_from_cut_to_cut(first, second, widths, tmp_path):
    model = build()
    prune(model, lesson("bert"), 0.2, loss=loss, units=first)
    method = Method(Budget(0.5), widths=widths)
    done = prune(model, lesson("bert"), 0.4, loss=loss, units=second, method=method)
    assert done.sparsity >= 0.4
    model.save_pretrained(tmp_path)
    back = from_pretrained(type(model), tmp_path)
    assert torch.equal(outputs(back, batch()), outputs(model, batch()))


def test_costs_are_those_of_the_cut_model():
    model = build()
    axes = find_axes(model)
    plan = random_plan(axes, dims=True)
    calls = {"": Example((), batch(1))}
    macs = measure_macs(model, axes, calls)
    parameters = ParameterCosts(
        axes, sum(p.numel() for p in model.parameters()) - count_parameters(axes)
    )
    apply(model, axes, plan)
    assert parameters.total(plan.widths) == sum(p.numel() for p in model.parameters())
    assert macs.total(plan.widths) == count_macs(model, calls[""])
    cut = measure_macs(model, axes, calls, plan.widths)
    assert cut.total(plan.widths) == macs.total(plan.widths)
    assert cut.total(full_plan(axes).widths) == macs.total(full_plan(axes).widths)


def test_rankings_end_with_all_the_loss_and_all_the_information():
    """Without the last dimension the values say nothing: as much as without the last head."""
    model = build()
    axes = find_axes(model)
    weights = dict(model.named_parameters())
    moments, relevance = known(model, axes)
    chosen = [axis for axis in axes if axis.kind in ("heads", "dims")]
    found = rank_axes(chosen, moments, weights, full_plan(axes), relevance=relevance)
    for axis, turn, _ in turns(model):
        dims, heads = found[axis.name], found[axis.crossed]
        assert dims.order == tuple(reversed(range(axis.size)))
        assert list(dims.loss) == sorted(dims.loss)
        assert list(dims.nats) == sorted(dims.nats)
        silent = float(turn.scores.sum())
        assert dims.loss[-1] - silent == pytest.approx(heads.loss[-1], rel=1e-3)
        assert dims.nats[-1] > heads.nats[-1]


def test_heads_are_judged_by_the_dimensions_that_stay():
    """A head that only speaks in what goes has nothing to lose."""
    model = build()
    axes = find_axes(model)
    axis = next(axis for axis in axes if axis.kind == "dims")
    weights = dict(model.named_parameters())
    moments, relevance = known(model, axes)
    said = (moments, weights, full_plan(axes))
    pair = [a for a in axes if a.name in (axis.name, axis.crossed)]
    alone = rank_axes(pair, *said, relevance=relevance)
    beside = rank_axes(
        pair, *said, relevance=relevance, beside={axis.name: (0,), axis.crossed: (0, 2)}
    )
    assert beside[axis.crossed].loss[-1] < alone[axis.crossed].loss[-1]
    assert beside[axis.name].loss[-1] < alone[axis.name].loss[-1]
    same = rank_axes(
        pair,
        *said,
        relevance=relevance,
        beside={axis.name: (*range(axis.size),), axis.crossed: (*range(axis.entries),)},
    )
    assert same == alone


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_momentum_turns_with_its_parameter(momentum):
    """Training a turned problem and turning a trained one are one thing."""
    generator = torch.Generator().manual_seed(0)
    maps, _ = torch.linalg.qr(torch.randn(2, 3, 3, generator=generator, dtype=torch.float64))
    straight = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))
    turning = nn.Parameter(turn_along(straight.detach(), 0, maps))
    target = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    first = torch.optim.SGD([straight], lr=0.1, momentum=momentum)

    def step(optimizer, parameter, goal):
        optimizer.zero_grad()
        (parameter - goal).pow(2).sum().backward()
        optimizer.step()

    for _ in range(3):
        step(first, straight, target)
    turning = nn.Parameter(turn_along(straight.detach(), 0, maps))
    second = torch.optim.SGD([straight], lr=0.1, momentum=momentum)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rebind([second], [Rewrite(straight, turning, {}, {0: maps})])
    for _ in range(3):
        step(first, straight, target)
        step(second, turning, turn_along(target, 0, maps))
    assert torch.allclose(turning, turn_along(straight.detach(), 0, maps))


def test_squares_stay_squares_and_gradients_go_the_other_way():
    """Of a stretch, gradients shrink as weights grow."""
    old = nn.Parameter(torch.ones(4, 2))
    new = nn.Parameter(torch.ones(2, 2))
    adam = torch.optim.Adam([old], lr=0.1)
    (old * torch.tensor([1.0, -2.0])).sum().backward()
    adam.step()
    maps = torch.tensor([[[2.0, 0.0], [0.0, 4.0]], [[1.0, 0.0], [0.0, 1.0]]])
    before = copy.deepcopy(adam.state[old])
    rebind([adam], [Rewrite(old, new, {0: torch.tensor([0, 2])}, {0: maps})])
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
    new = nn.Parameter(turn_along(old.detach(), 0, maps))
    before = copy.deepcopy(optimizer.state[old])
    rebind([optimizer], [Rewrite(old, new, {}, {0: maps})])
    return old, new, maps, before, optimizer


def test_squares_stay_at_least_those_of_their_mean():
    def make(parameters):
        return torch.optim.RMSprop(parameters, lr=0.1, centered=True)

    _, new, maps, before, optimizer = trained_and_turned(make)
    state = optimizer.state[new]
    mean = turn_along(before["grad_avg"], 0, torch.linalg.inv(maps).mT)
    assert torch.allclose(state["grad_avg"], mean)
    assert (state["square_avg"] >= mean.square() * (1 - 1e-9)).all()
    (new * torch.randn(6, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert new.isfinite().all()


def test_averages_of_weights_turn_as_weights_do():
    def make(parameters):
        return torch.optim.ASGD(parameters, lr=0.01, t0=0)

    old, new, maps, before, optimizer = trained_and_turned(make)
    assert torch.allclose(optimizer.state[new]["ax"], turn_along(before["ax"], 0, maps))
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
    expected = turn_along(before[key], 0, used.abs())
    assert torch.allclose(optimizer.state[new][key], expected)


def test_nothing_tells_which_dimensions_matter_without_gradients():
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match="relevance='readers': gradients tell which"):
        prune(model, lesson("bert"), 0.5, units=UNITS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_milliseconds_are_shared_by_heads_and_their_dimensions(tmp_path):
    """The table's own clock, which counts products, times the model that a budget left."""
    model, inputs = tiny()
    axes, path = find_axes(model), tmp_path / "latency.json"
    call = Example((), inputs)
    table = measure_table(model, axes, {"": call}, clock=ruler, multiple=1)
    table.write(path)
    budget = Budget(target_latency_ms=0.6 * table.dense_ms)
    method = Method(budget, relevance="gradient", latency_table=str(path), multiple=1)
    for attempt in (0.6, 0.4):  # in two cuts
        budget = Budget(target_latency_ms=attempt * table.dense_ms)
        done = prune(model, lesson("bert"), budget, loss=loss, units=UNITS, method=method)
        costs = LatencyCosts(table, axes)
        widths = {name: len(kept) for name, kept in done.plan.kept.items()}
        assert costs.total(widths) <= attempt * table.dense_ms + 1e-9
        assert any(widths[axis.name] < axis.size for axis in axes if axis.kind == "dims")
    real = ruler({"x": lambda: model(**inputs)})["x"]
    assert real == pytest.approx(costs.total(widths), rel=0.02)


def test_a_table_without_dimensions_of_heads_is_refused(tmp_path):
    model, inputs = tiny()
    path = tmp_path / "latency.json"
    axes, call = find_axes(model), Example((), inputs)
    measure_table(model, axes, {"": call}, kinds=["ffn", "heads"], clock=ruler).write(path)
    budget = Budget(target_latency_ms=0.5)
    method = Method(budget, relevance="gradient", latency_table=str(path))
    with pytest.raises(PruningError, match=r"does not know .*dims' of 6 units.*Measure it again"):
        prune(model, lesson("bert"), budget, loss=loss, units=UNITS, method=method)


def test_heads_and_their_dimensions_lose_the_same_information():
    budget = Budget(keep_information=0.8)
    with pytest.raises(PruningError, match=r"keep_information=0.8 cannot be shared by .*heads"):
        prune(build(), lesson("bert"), budget, loss=loss, units=UNITS)
    prune(build(), lesson("bert"), budget, loss=loss, units=["dims"])


@pytest.mark.parametrize(("one", "other"), [("query", "key"), ("key", "value")])
def test_projections_that_are_one_cannot_be_turned_apart(one, other):
    model = build()
    inner = model.bert.encoder.layer[1].attention.self
    getattr(inner, other).weight = getattr(inner, one).weight
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=rf"{one}.weight' and .*{other}.weight' are one parame"):
        prune(model, lesson("bert"), 0.5, loss=loss, units=UNITS)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    prune(model, lesson("bert"), 0.5, loss=loss)  # heads alone may


@pytest.mark.parametrize("units", [["dims"], UNITS])
@pytest.mark.parametrize(
    ("silent", "heads"),
    [(names, count) for names in (("query", "key"), ("key",), ("value",)) for count in (1, 4)],
)
def test_silent_heads_harm_nothing(silent, heads, units):
    model = build()
    inner = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        for name in silent:
            getattr(inner, name).weight[: 6 * heads] = 0.0
    prune(model, lesson("bert"), 0.3, loss=loss, units=units)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert all(bool((p.abs() < 1e6).all()) for p in model.parameters())


@pytest.mark.parametrize("size", [1e-3, 1e-5, 1e-7])
def test_keys_that_hardly_change_keep_a_bias_that_half_precision_holds(size):
    """Their directions are made louder, and with them the mean, which softmax does not see."""
    model = build()
    inner = model.bert.encoder.layer[0].attention.self
    with torch.no_grad():
        inner.key.weight.mul_(size)
        inner.key.bias.copy_(torch.linspace(-2, 2, len(inner.key.bias)))
    prune(model, lesson("bert"), 0.3, loss=loss, units=["dims"])
    assert max(float(p.detach().abs().max()) for p in inner.parameters()) < 100


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mpnet"}))
def test_no_config_scales_attention_by_fewer_dimensions(family, tmp_path):
    """Four heads of 3 in a stream of 12 look like a smaller model, but scores were made for 6."""
    model, inputs = tiny(family)
    axes = find_axes(model)
    sizes = {"dims": 3, "residual": 12, "pooler": 12}
    kept = {axis.name: tuple(range(sizes.get(axis.kind, axis.size))) for axis in axes}
    apply(model, axes, Plan({axis.name: axis.size for axis in axes}, kept))
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path).eval()
    assert torch.equal(outputs(again, inputs), outputs(model, inputs))


def test_a_turn_of_another_model_is_refused():
    model = build()
    axes = find_axes(model)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    values = {name: model.get_parameter(name).detach().clone()}
    plan = full_plan(axes)
    for maps in (torch.eye(5).expand(4, 5, 5), torch.eye(6)):
        with pytest.raises(PruningError, match=r"expected \(heads, size, size\) of \(24, 24\)"):
            apply(model, axes, plan, folded=values, turned={name: {0: maps}})
    with pytest.raises(PruningError, match="beside new values"):
        apply(model, axes, plan, turned={name: {0: torch.eye(6).expand(4, 6, 6)}})


@pytest.mark.parametrize("family", ["albert", "deberta-v2"])
def test_families_that_see_more_than_products_have_no_such_axis(family):
    assert not any(axis.kind == "dims" for axis in find_axes(build(family)))


def test_axes_described_after_a_layer_went_cross_their_own_layer():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**{**SMALL, "num_hidden_layers": 3}))
    keeper = PlanKeeper.of(model, find_stacks)
    (stack,) = keeper.anatomy.stacks
    plan = keeper.anatomy.without(keeper.plan, {stack.name: (0, 2)})
    done = operate(model, keeper.anatomy, plan, current=keeper.plan)
    keeper.plan = done.after
    keeper.store(done.removed)
    axes = {axis.name: axis for axis in PlanKeeper.of(model, find_axes).axes}
    crossing = {name: axis.crossed for name, axis in axes.items() if axis.crossed}
    assert {name.rpartition(".")[0] for name in crossing} >= {f"{stack.name}.2"}
    for name, crossed in crossing.items():
        assert name.rpartition(".")[0] == crossed.rpartition(".")[0]


def test_axes_keep_what_crosses_them_wherever_they_stand():
    net = nn.ModuleDict({"inner": build()})
    pairs = {axis.name: axis.crossed for axis in find_axes(net) if axis.crossed}
    assert pairs
    assert all(pairs[other] == name for name, other in pairs.items())
    axis = next(axis for axis in find_axes(net) if axis.turn is not None)
    assert net.get_submodule(axis.turn.query).out_features == axis.size * axis.entries
    assert replace(axis, turn=None).reads == axis.places
