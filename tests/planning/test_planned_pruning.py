"""plan() changes nothing, and what it wrote is cut: as it is, or as it was edited."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_mi_prune import PruningError, plan, prune
from lightning_mi_prune import pipeline as method
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.measuring import measure_table
from lightning_mi_prune.allocation.plan_file import plan_from_yaml, plan_to_yaml, write_plan
from lightning_mi_prune.core.options import Constraints, Importance, Latency
from tests.conftest import count_hooks
from tests.support.graphs import graph_of
from tests.support.models import batch, build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [(8, 64), (64, 48), (48, 32), (32, 4)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*layers[:-1]).eval()


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(300, 8, generator=generator) for _ in range(4)]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


planned = partial(plan, data=rows(), loss=loss)
pruned = partial(prune, data=rows(), loss=loss)


def alike(first: nn.Module, second: nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def edited(found, old: str, new: str):
    text = plan_to_yaml(found)
    assert old in text
    return plan_from_yaml(text.replace(old, new, 1))


def test_planning_changes_nothing() -> None:
    model, random = network(), torch.get_rng_state()
    model.train()
    before = copy.deepcopy(model)
    found = planned(model)
    assert alike(model, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert count_hooks(model) == 0
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert [column.label for column in found.columns] == ["50%", "75%", "90%"]
    assert found.cut == "50%"
    assert found.loss_unit == "nats per example"
    assert planned(model) == found  # the seconds aside


def test_the_numbers_of_every_budget_are_those_of_the_cut_model() -> None:
    found = planned(
        network(), budgets=[0.5, Budget(target_macs=2000), Budget(keep_information=0.9)]
    )
    assert found.size.parameters == sum(p.numel() for p in network().parameters())
    losses = []
    for column in found.columns:
        model = network()
        result = pruned(model, sparsity=column.budget)
        assert {name: result.plan.width(name) for name in column.widths} == dict(column.widths)
        assert column.size.parameters == result.parameters[1]
        assert (found.size.macs, column.size.macs) == result.macs
        for name, width in column.widths.items():
            ranking = result.plan.rankings[name]
            assert column.loss[name] == pytest.approx(ranking.lost(width)[0], rel=1e-3)
        losses.append(column.total_loss)
    assert all(value > 0 for value in losses)
    for group in found.groups:
        names = {f"{group.name.split('.')[0]}.{part}" for part in ("weight", "bias")}
        built = sum(p.numel() for n, p in network().named_parameters() if n in names)
        assert group.parameters is not None
        assert group.parameters >= built  # and the columns of the layer above


CASES = {
    "gradient": {},
    "weights": {"importance": Importance(relevance="weights")},
    "uniform": {"widths": "uniform"},
    "uniform, weights": {"widths": "uniform", "importance": Importance(relevance="weights")},
    "topk": {"importance": Importance(selection="topk")},
    "pins": {"constraints": Constraints(pins={"^2": 13}, floors={"^4": 0.5}, multiple=4)},
    "excluded": {"exclude": "^2"},
}


@pytest.mark.parametrize("name", CASES)
def test_a_plan_as_it_is_makes_the_cut_of_its_budget(name: str, tmp_path: Path) -> None:
    options = CASES[name]
    found = planned(network(), budgets=[0.5, 0.7], **options)
    path = write_plan(found, tmp_path / "plan.yaml")
    rest = {k: v for k, v in options.items() if k not in ("exclude", "widths")}
    for column in found.columns:
        first, second = network(), network()
        direct = pruned(first, sparsity=column.budget, **options)
        carried = pruned(second, sparsity=column.budget.sparsity, plan=str(path), **rest)
        assert carried.plan == direct.plan
        assert carried.plan.rankings == direct.plan.rankings
        assert carried.information == direct.information
        assert alike(first, second)


@pytest.mark.parametrize(
    "options",
    [
        {"importance": Importance(relevance="weights"), "kinds": ["ffn", "heads", "hidden"]},
        {"kinds": ["ffn", "heads", "head_dim"]},
        {"kinds": ["ffn"], "widths": "config"},
    ],
    ids=["weights", "head_dim", "config"],
)
def test_a_plan_of_an_encoder_as_it_is_makes_the_same_model(options) -> None:
    """Groups are put in order again for other widths than those that are cut."""
    data = [
        {**batch(64, seed=i), "labels": batch(64, seed=i)["input_ids"][:, 1] % 3} for i in (0, 1)
    ]
    shared = {"loss": lambda m, b: m(**b).loss, "graph": graph_of(build())}
    found = plan_from_yaml(plan_to_yaml(plan(build(), data, [0.5], **shared, **options)))
    first, second = build(), build()
    direct = prune(first, data, 0.5, **shared, **options)
    importance = options.get("importance")
    carried = prune(second, data, plan=found, importance=importance, **shared)
    assert carried.plan == direct.plan
    assert alike(first, second)
    if "importance" in options:
        assert found.columns[0].ranked_at
    if "widths" not in options:
        return
    ffn, now = found.groups[0].name, found.columns[0].widths[found.groups[0].name]
    odd = edited(found, f"now: 40, 50%: {now}", f"now: 40, 50%: {now - 8}")
    with pytest.raises(PruningError, match=rf"{now - 8} units of '{ffn}' and .* intermediate_size"):
        prune(build(), data, plan=odd, **shared)


def test_an_edited_width_is_cut_exactly() -> None:
    found = planned(network())
    name, width = "2.ffn", found.columns[0].widths["2.ffn"]
    for text, wanted in ((f"50%: {width}", 40), (f"50%: {width}", 8), ("now: 48", 13)):
        model = network()
        new = f"50%: {wanted}" if text.startswith("50%") else f"now: 48, pin: {wanted}"
        start = plan_to_yaml(found).index("2.ffn")
        whole = plan_to_yaml(found)
        changed = plan_from_yaml(whole[:start] + whole[start:].replace(text, new, 1))
        result = pruned(model, plan=changed)
        assert result.plan.width(name) == wanted == model[2].out_features == model[4].in_features
        others = {n: w for n, w in found.columns[0].widths.items() if n != name}
        assert {n: result.plan.width(n) for n in others} == others
        assert result.parameters[1] == sum(p.numel() for p in model.parameters())


def test_an_excluded_group_and_one_without_a_line_stay_whole() -> None:
    found = planned(network())
    lines = plan_to_yaml(found).splitlines()
    place = next(i for i, line in enumerate(lines) if "2.ffn" in line)
    excluded = [*lines]
    excluded[place] = lines[place].replace("kind: ffn", "kind: ffn, exclude: true")
    plans = []
    for text in (excluded, lines[:place] + lines[place + 1 :]):
        model = network()
        result = pruned(model, plan=plan_from_yaml("\n".join(text)))
        assert model[2].out_features == 48
        assert model[0].out_features == found.columns[0].widths["0.ffn"]
        plans.append(result.plan)
    assert plans[0] == plans[1]


def test_what_cannot_be_carried_out_is_refused_before_anything_changes() -> None:
    model = network()
    found, before = planned(model), copy.deepcopy(model)
    width = found.columns[0].widths["0.ffn"]
    wrong = {
        "multiple of 8": edited(found, f"now: 64, 50%: {width}", "now: 64, 50%: 33"),
        "did you mean '0.ffn'": edited(found, "0.ffn", "0.fnf"),
        "widths='uniform', but the plan": found,
        "no budget of the plan": found,
        "leave out": found,
        "cannot run without units": edited(found, f"now: 64, 50%: {width}", "now: 64, pin: 0"),
    }
    options = {
        "widths='uniform', but the plan": {"widths": "uniform"},
        "no budget of the plan": {"sparsity": 0.6},
        "leave out": {"include": "^0"},
    }
    for message, one in wrong.items():
        with pytest.raises(PruningError, match=message):
            pruned(model, plan=one, **options.get(message, {}))
        assert alike(model, before)
        assert count_hooks(model) == 0
    with pytest.raises(PruningError, match="belongs to another model"):
        prune(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), rows(), plan=found)


def test_a_plan_is_for_the_model_it_was_made_of_or_a_later_one() -> None:
    model = network()
    found = planned(model)
    pruned(model, plan=found)
    with pytest.raises(PruningError, match=r"meets 50% of the plan \(\w{8}\) already"):
        pruned(model, plan=found)
    width = found.columns[0].widths["0.ffn"]
    widest = edited(found, f"now: 64, 50%: {width}", "now: 64, 50%: 64")
    with pytest.raises(PruningError, match=r"above the .* that it has now; units that are gone"):
        pruned(model, plan=widest)
    later = planned(model, budgets=[0.75])  # from there on
    assert {g.name: g.built for g in later.groups} == {"0.ffn": 64, "2.ffn": 48, "4.ffn": 32}
    assert plan_from_yaml(plan_to_yaml(later)) == later
    with pytest.raises(PruningError, match=r"was made when .* had .*; now it has"):
        pruned(network(), plan=later)
    result = pruned(model, plan=later)
    assert {n: result.plan.width(n) for n in later.columns[0].widths} == later.columns[0].widths


def test_budgets_out_of_reach_are_left_out_with_the_reason() -> None:
    found = planned(network(), constraints=Constraints(floor=0.45))
    assert [column.label for column in found.columns] == ["50%"]
    assert set(found.left_out) == {"75%", "90%"}
    assert "out of reach" in found.left_out["75%"]
    with pytest.raises(PruningError, match="out of reach"):
        planned(network(), budgets=[0.9, 0.5], constraints=Constraints(floor=0.45))
    for budgets in ([], 0.5, "0.5"):
        with pytest.raises(PruningError, match=r"expected a list of one share or more"):
            planned(network(), budgets=budgets)


def test_milliseconds_are_predicted_where_a_table_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(method, "measure_table", partial(measure_table, seconds=0.005))
    assert planned(network()).size.ms is None
    table = tmp_path / "table.json"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = planned(network(), latency=Latency(table=str(table)))
        assert table.is_file()
        content = table.read_bytes()
        again = planned(network(), latency=Latency(table=str(table)))
    assert again == found
    assert table.read_bytes() == content
    assert found.size.ms is not None
    assert all(column.size.ms is not None for column in found.columns)
    assert " ms " in str(found)
