"""One call of prune() on networks with functional weights and on mixtures of experts."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_mi_prune import PruningError, load_pruned, prune
from lightning_mi_prune.core.options import Constraints, Importance, Reconstruction
from tests.support.functional_weights import ORDERS, Layered, Products, experts

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning"),
    pytest.mark.filterwarnings("ignore:The explicitly set RoPE"),
]
MIXTURES = ("Mixtral", "Qwen2Moe", "GptOss")


def error(small, model, given):
    """Squared error of the outputs, relative."""
    with torch.no_grad():
        want = [model(**batch) for batch in given]
        got = [small(**batch) for batch in given]
    pairs = [[x if isinstance(x, torch.Tensor) else x.logits for x in xs] for xs in (got, want)]
    lost = sum(float((a - b).square().sum()) for a, b in zip(*pairs, strict=True))
    return lost / sum(float(b.square().sum()) for b in pairs[1])


def pruned(model, given, sparsity=0.4, **options):
    small = copy.deepcopy(model)
    return small, prune(small, given, sparsity, **options)


def correlated(rows=500):
    """Inputs of few dimensions, so that neurons can stand in for each other."""
    mix = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    return [{"x": torch.randn(rows, 3) @ mix} for _ in range(4)]


def texts(count=6):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 41, (8, 16), generator=generator) for _ in range(count)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


def squared(model, batch):
    found = model(**batch)
    found = found if isinstance(found, torch.Tensor) else found.logits
    return found.square().mean()


@pytest.mark.parametrize("loss", [None, squared])
@pytest.mark.parametrize("order", ORDERS)
def test_compensation_lowers_the_error_and_order_is_no_matter(order, loss):
    given = correlated()
    model = Products(order)
    options = {"loss": loss, "include": "^up", "constraints": Constraints(multiple=1)}
    errors = {}
    for method in ("none", "compensation", "layerwise"):
        how = Reconstruction(method=method)
        small, result = pruned(model, given, 0.5, reconstruction=how, **options)
        assert result.plan.width("up.ffn") == 12
        assert small.down.shape == ((10, 12) if order == "linear" else (12, 10))
        errors[method] = error(small, model, given)
        other, layered = pruned(Layered(model), given, 0.5, reconstruction=how, **options)
        assert other.down.weight.shape == (10, 12)
        if loss is None:  # with a loss, noise is that of the units instead of the outputs
            assert layered.plan.kept["up.ffn"] == result.plan.kept["up.ffn"]
            if method != "layerwise":
                assert errors[method] == pytest.approx(error(other, model, given), rel=1e-3)
    assert errors["compensation"] < 0.8 * errors["none"]
    assert errors["layerwise"] <= errors["compensation"] * (1 + 1e-6)


@pytest.mark.parametrize("loss", [None, squared])
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_ranked_compensated_and_still_train(name, loss):
    model, given = experts(name), texts()
    errors = {}
    for method in ("none", "compensation", "layerwise"):
        small, result = pruned(
            model, given, loss=loss, kinds=["ffn"], reconstruction=Reconstruction(method=method)
        )
        errors[method] = error(small, model, given)
        widths = [result.plan.width(n) for n in result.plan.kept if n.endswith("ffn")]
        assert min(widths) < 40
        assert all(width % 8 == 0 for width in widths)
        assert result.macs[1] < result.macs[0]
        assert result.parameters[1] == sum(p.numel() for p in small.parameters())
    assert errors["compensation"] < errors["none"]
    assert errors["layerwise"] < errors["none"]
    live = []
    for one in (model, small):
        one.train()(**given[0], labels=given[0]["input_ids"]).loss.backward()
        live.append({n for n, p in one.named_parameters() if p.grad is not None and p.grad.any()})
    assert live[0] == live[1]
    assert any("experts" in parameter for parameter in live[1])


@pytest.mark.parametrize("name", MIXTURES)
def test_a_budget_of_multiplications_counts_those_of_experts(name):
    model, given = experts(name), texts()
    full = pruned(model, given, 0.1, kinds=["ffn"])[1].macs[0]
    _, result = pruned(model, given, None, kinds=["ffn"], target_macs=int(0.8 * full))
    assert 0.7 * full < result.macs[1] <= 0.8 * full


@pytest.mark.parametrize("criterion", ["taylor", "magnitude", "random"])
def test_other_criteria_rank_experts_too(criterion):
    model, given = experts("Mixtral"), texts()
    importance = Importance(criterion=criterion, relevance="gradient")
    _, result = pruned(model, given, kinds=["ffn"], loss=squared, importance=importance)
    assert any(result.plan.width(n) < 40 for n in result.plan.kept if n.endswith("ffn"))


def test_the_hidden_size_of_a_mixture_goes():
    model, given = experts("Mixtral"), texts()
    small, _ = pruned(model, given, 0.3, kinds=["hidden"], loss=squared)
    assert small.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 80, 16)
    assert small.model.layers[0].mlp.experts.down_proj.shape == (4, 16, 40)
    assert error(small, model, given) < 1


@pytest.mark.parametrize("make", [lambda: Products("matmul"), lambda: experts("Mixtral")])
def test_what_is_saved_opens_again(make, tmp_path):
    model = make()
    given = texts() if hasattr(model, "config") else correlated()
    kinds = ["ffn"]
    small, _ = pruned(model, given, kinds=kinds)
    torch.save({"state_dict": small.state_dict()}, tmp_path / "small.pt")
    fresh = make()
    load_pruned(fresh, tmp_path / "small.pt")
    assert error(fresh, small, given) == 0.0
    assert fresh.state_dict().keys() == small.state_dict().keys()
    parameters = zip(fresh.parameters(), small.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)


def test_a_pin_that_grouped_mm_cannot_compute_is_refused_before_anything_changes():
    model, given = experts("Mixtral"), texts(2)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=r"pins .model\.layers\.0\.ffn. to 13 units"):
        prune(model, given, 0.4, kinds=["ffn"], constraints=Constraints(pins={"0.ffn": 13}))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
