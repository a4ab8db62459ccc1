"""The baselines on tiny random models: each removes what was asked, and nothing else."""

import copy
import sys

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.baselines import (
    BASELINES,
    Baseline,
    Movement,
    Scored,
    by_library,
    layers_left,
    magnitude_masks,
    share_pruned,
    top,
    widths_at,
)
from benchmarks.subjects import settle, size_of, weight_names
from benchmarks.tasks import train, training_of
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import count_parameters
from tests.benchmarks.tiny import Epochs, labelled, opened, subject
from tests.support.graphs import graph_of
from tests.support.models import batch, build, entries_of, outputs

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def budget(steps: int = 6):
    return training_of(Epochs(), steps, first_epoch=4, learning_rate=1e-3, seed=0)


def groups_of(model: nn.Module):
    return choose_groups(graph_of(model).groups)


@pytest.mark.parametrize(
    "baseline", [r for r in BASELINES if r.prune], ids=lambda r: "-".join(r.name)
)
@pytest.mark.parametrize(("family", "sparsity"), [("bert", 0.5), ("bert", 0.75), ("mpnet", 0.5)])
def test_a_baseline_removes_what_was_asked(
    family: str, baseline: Baseline, sparsity: float
) -> None:
    if baseline.method.startswith("torch-pruning"):
        pytest.importorskip("torch_pruning")
    dense = build(family)
    groups, prunable = groups_of(dense), count_parameters(groups_of(dense))
    cut = settle(baseline.prune(copy.deepcopy(dense), labelled(range(2)), sparsity, 0))
    size = size_of(cut, groups)
    layers = baseline.method.endswith("-layers")
    # One of four heads of a layer is 9 % of it; of two layers only one can go. torch-pruning leaves
    # a layer whole that would lose every head.
    coarse = 0.07 if baseline.widths == "global" else 0.05
    assert size["reached"] == pytest.approx(0.5 if layers else sparsity, abs=coarse)
    assert outputs(cut, batch()).isfinite().all()
    assert size["masked"] == (baseline.method == "magnitude-masks")
    left = sum(p.numel() for p in cut.parameters())
    assert size["parameters"] == left - (round(sparsity * prunable) if size["masked"] else 0)
    if not (layers or size["masked"]):
        gone = sum(p.numel() for p in dense.parameters()) - left
        assert size["reached"] == pytest.approx(gone / prunable)
        assert {kind: len(found) for kind, found in size["kept"].items()} == {"heads": 2, "ffn": 2}
        norms = [m for m in cut.modules() if isinstance(m, nn.LayerNorm)]
        assert {m.normalized_shape for m in norms} == {(24,)}  # the hidden size stays
    assert all(p.grad is None and p.requires_grad for p in cut.parameters())
    copied = copy.deepcopy(cut)  # as it is before it is trained
    copied(**labelled(range(1))[0]).loss.backward()
    assert all(parameter.grad is None for parameter in cut.parameters())


@pytest.mark.parametrize("lost", [(0, 1), (0, 2), (1, 3)])
@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_what_torch_pruning_leaves_computes_the_same(family: str, lost: tuple[int, ...]) -> None:
    """Cutting units whose consumers are zero changes nothing, if the others stay as they are."""
    pytest.importorskip("torch_pruning")
    model = build(family)
    with torch.no_grad():
        if family == "mpnet":
            model.mpnet.encoder.relative_attention_bias.weight.mul_(10)
        for group in groups_of(model):
            units = lost if group.kind == "heads" else range(group.size // 2)
            rows = [
                unit * entries_of(group) + n for unit in units for n in range(entries_of(group))
            ]
            for s in group.tensors:
                if s.dim == 0:
                    model.get_parameter(s.tensor)[rows] *= 1e-3
            model.get_parameter(f"{group.consumers[0]}.weight")[:, rows] = 0
    before = outputs(model, batch())
    cut = by_library("magnitude", together=False)(model, labelled(range(1)), 0.5, 0)
    assert size_of(cut, groups_of(model))["kept"] == {"heads": [2, 2], "ffn": [20, 20]}
    torch.testing.assert_close(outputs(cut, batch()), before, rtol=1e-4, atol=1e-5)


def test_torch_pruning_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-mi-prune\[benchmark\]'"):
        by_library("taylor", together=True)(build(), labelled(range(1)), 0.5, 0)


def test_layers_are_rounded_in_favour_of_the_baseline() -> None:
    shares = (0.25, 0.5, 0.75, 0.9, 0.95)
    assert [layers_left(6, share) for share in shares] == [5, 3, 2, 1, 1]
    assert layers_left(12, 0.75) == 3


# ------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_masks_are_those_of_lightning(family: str, sparsity: float) -> None:
    ours = magnitude_masks(build(family), [], sparsity, 0)
    module = pl.LightningModule()
    module.network = build(family)
    names = weight_names(groups_of(module.network))
    paths = [name.removesuffix(".weight") for name in names]
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.network.get_submodule(path), "weight") for path in paths],
        amount=round(sparsity * count_parameters(groups_of(module.network))),
        use_global_unstructured=True,
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    pruning.setup(trainer, module, "fit")
    pruning.on_train_epoch_end(trainer, module)
    for name in names:
        mask = module.network.get_buffer(f"{name}_mask")
        assert torch.equal(ours.get_buffer(f"{name}_mask"), mask), name
    pruning.on_train_end(trainer, module)
    settle(ours)
    for name in names:
        assert torch.equal(ours.get_parameter(name), module.network.get_parameter(name)), name


def test_masks_stay_zero_through_training(subject) -> None:
    model = magnitude_masks(copy.deepcopy(subject.model), [], 0.6, 0)
    names = weight_names(subject.chosen)
    gone = {n: model.get_buffer(f"{n}_mask") == 0 for n in names}
    smallest = torch.cat([subject.model.get_parameter(n).abs()[~gone[n]] for n in names]).min()
    largest = torch.cat([subject.model.get_parameter(n).abs()[gone[n]] for n in names]).max()
    assert largest <= smallest
    train(model, budget())
    settle(model)
    for name in names:
        weight = model.get_parameter(name)
        assert torch.equal(weight == 0, gone[name])
        assert not torch.equal(weight, subject.model.get_parameter(name))


# ---------------------------------------------------------------------------------------- movement


@pytest.mark.parametrize("count", [0, 1, 7, 12])
def test_the_best_scores_stay_even_where_scores_tie(count: int) -> None:
    scores = torch.tensor([[0.0, 0, 0, 0], [1, 1, 2, 0], [0, -1, 0, 1]])
    mask = top(scores, count)
    assert int(mask.sum()) == count
    assert mask.shape == scores.shape
    best = sorted(scores.flatten().tolist())[12 - count :]
    assert scores[mask == 1].sort().values.tolist() == best


def test_scores_collect_the_gradient_of_the_weight_times_the_weight() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    scored = Scored(2, entries=2)
    scored.mask.copy_(torch.tensor([[1.0, 0.0]]))
    slope = torch.randn(3, 4)
    masked = scored(weight)
    assert torch.equal(masked, weight * torch.tensor([1.0, 1, 0, 0]))
    (masked * slope).sum().backward()
    expected = (weight.detach() * slope).sum(0).view(2, 2).sum(1)[None]  # of masked units too
    torch.testing.assert_close(scored.scores.grad, expected)
    assert torch.equal(weight.grad, slope * torch.tensor([1.0, 1, 0, 0]))


def test_units_that_move_away_from_zero_stay() -> None:
    torch.manual_seed(0)
    true = torch.zeros(4, 40)
    true[:, :10] = 1 + torch.rand(4, 10)  # a quarter of the inputs matters
    layer, scored = nn.Linear(40, 4, bias=False), Scored(40)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([0.5 * true[:, :10], 2 * torch.randn(4, 30)], 1))
    parametrize.register_parametrization(layer, "weight", scored)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(100):
        width = round(40 * (1 - share_pruned(step / 100, 0.75)))
        scored.mask.copy_(top(scored.scores.detach(), width))
        inputs = torch.randn(64, 40)
        (layer(inputs) - inputs @ true.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scored.mask.sum() == 10
    assert scored.mask[:, :10].mean() > 0.9


def test_the_share_rises_along_a_cubic_curve_between_flat_ends() -> None:
    shares = [share_pruned(step / 100, 0.8) for step in range(101)]
    assert shares == sorted(shares)
    assert shares[10] == 0
    assert set(shares[80:]) == {0.8}
    assert shares[45] == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_movement_prunes_while_it_trains(family: str) -> None:
    dense = build(family)
    movement, shares = Movement(copy.deepcopy(dense), 0.75), []

    def before_step(progress: float) -> None:
        movement.before_step(progress)
        masks = [scored.mask for scored in movement.scored.values()]
        shares.append(sum(float((m == 0).sum()) for m in masks) / sum(m.numel() for m in masks))

    scores = movement.parameters()
    train(movement.model, budget(20), before_step=before_step, scores=scores, scores_rate=0.01)
    assert shares[:2] == [0, 0]
    assert shares[-1] > 0.5
    assert all(score.abs().sum() > 0 for score in scores)
    model = movement.finish()
    size = size_of(model, groups_of(dense))
    assert size["reached"] == pytest.approx(0.75, abs=0.03)
    assert not size["masked"]
    assert not [name for name, _ in model.named_parameters() if "scores" in name or "orig" in name]
    assert outputs(model, batch()).isfinite().all()


def test_scores_of_units_keep_the_best_of_them(subject) -> None:
    movement = Movement(copy.deepcopy(subject.model), 0.5)
    with torch.no_grad():
        for scored in movement.scored.values():
            scored.scores.copy_(torch.arange(scored.scores.numel())[None])
    movement.before_step(1.0)
    model = movement.finish()
    for group, width in widths_at(movement.groups, 0.5).items():
        name = f"{group.consumers[0]}.weight"
        dense = subject.model.get_parameter(name)
        assert torch.equal(model.get_parameter(name), dense[:, -width * entries_of(group) :])
