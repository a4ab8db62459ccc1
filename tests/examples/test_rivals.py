"""The rivals of the benchmark on a tiny random model: each removes what was asked."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from examples.benchmark.oneshot import Subject
from examples.benchmark.rivals import RIVALS, Rival
from examples.benchmark.rivals.layers import layers_left
from examples.benchmark.rivals.masks import magnitude_masks
from examples.benchmark.rivals.movement import Movement, Scored, share_gone, top, widths_at
from examples.benchmark.rivals.size import settle, size_of, weights_of, zeros_of
from examples.benchmark.rivals.torchpruning import group_magnitude
from examples.benchmark.training import train
from lightning_mi_prune import find_axes
from lightning_mi_prune.choosing import choose_axes
from tests.examples.subjects import budget, counted, labelled, named
from tests.models import batch, build, outputs

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")


@pytest.mark.parametrize("rival", [r for r in RIVALS if r.prune], ids=named)
@pytest.mark.parametrize("sparsity", [0.5, 0.75])
def test_a_rival_removes_what_was_asked(subject: Subject, rival: Rival, sparsity: float) -> None:
    if rival.method.startswith("torch-pruning"):
        pytest.importorskip("torch_pruning")
    model = copy.deepcopy(subject.model)
    cut = settle(rival.prune(model, subject.validation[:2], sparsity, 0))
    size = size_of(cut, subject.chosen)
    layers = rival.method.endswith("-layers")
    # One of four heads of a layer is 9 % of it; of two layers only one can go.
    assert size.sparsity == pytest.approx(0.5 if layers else sparsity, abs=0.05)
    assert outputs(cut, batch()).isfinite().all()
    assert size.masked == (rival.method == "magnitude-masks")
    left = sum(p.numel() for p in cut.parameters())
    assert size.parameters == left - (round(sparsity * counted(subject)) if size.masked else 0)
    if not (layers or size.masked):
        gone = sum(p.numel() for p in subject.model.parameters()) - left
        assert size.sparsity == pytest.approx(gone / counted(subject))
        assert {k: len(v) for k, v in size.kept.items()} == {"heads": 2, "ffn": 2}
        hidden = [m for m in cut.modules() if isinstance(m, nn.LayerNorm)]
        assert {m.normalized_shape for m in hidden} == {(24,)}  # the stream keeps its width
    assert all(p.grad is None for p in cut.parameters())


def test_heads_that_torch_pruning_leaves_still_say_the_same() -> None:
    """Cutting units whose readers are zero changes nothing, so positions and counts are right."""
    pytest.importorskip("torch_pruning")
    model = build()
    with torch.no_grad():
        for axis in choose_axes(find_axes(model)):
            half = axis.size // 2 * axis.entries
            for s in axis.slices:
                tensor = model.get_parameter(s.tensor)
                (tensor[:half] if s.dim == 0 else tensor[:, :half]).mul_(1e-3)
            model.get_parameter(f"{axis.readers[0]}.weight")[:, :half] = 0
    before = outputs(model, batch())
    cut = group_magnitude(everywhere=False)(model, labelled(range(1)), 0.5, 0)
    assert size_of(cut, choose_axes(find_axes(model))).sparsity == 0.5
    torch.testing.assert_close(outputs(cut, batch()), before, rtol=1e-4, atol=1e-5)


def test_torch_pruning_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-mi-prune\[benchmark\]'"):
        group_magnitude(everywhere=True)(build(), labelled(range(1)), 0.5, 0)


def test_layers_are_rounded_in_favour_of_the_rival() -> None:
    shares = (0.25, 0.5, 0.75, 0.9, 0.95)
    assert [layers_left(6, share) for share in shares] == [5, 3, 2, 1, 1]
    assert layers_left(12, 0.75) == 3


def test_masks_stay_zero_through_training(subject: Subject) -> None:
    model = magnitude_masks(copy.deepcopy(subject.model), [], 0.6, 0)
    names = weights_of(subject.chosen)
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


@pytest.mark.parametrize("count", [0, 1, 7, 12])
def test_top_v_keeps_exactly_so_many_even_where_scores_tie(count: int) -> None:
    scores = torch.tensor([[0.0, 0, 0, 0], [1, 1, 2, 0], [0, -1, 0, 1]])
    mask = top(scores, count)
    assert int(mask.sum()) == count
    assert mask.shape == scores.shape
    assert (
        scores[mask == 1].sort().values.tolist() == sorted(scores.flatten().tolist())[12 - count :]
    )


def test_scores_collect_the_gradient_of_the_weight_times_the_weight() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    scored = Scored((1, 2), entries=2)
    scored.mask.copy_(torch.tensor([[1.0, 0.0]]))
    slope = torch.randn(3, 4)
    masked = scored(weight)
    assert torch.equal(masked, weight * torch.tensor([1.0, 1, 0, 0]))
    (masked * slope).sum().backward()
    expected = (weight.detach() * slope).sum(0).view(2, 2).sum(1)[None]  # of masked units too
    torch.testing.assert_close(scored.scores.grad, expected)
    assert torch.equal(weight.grad, slope * torch.tensor([1.0, 1, 0, 0]))


def test_weights_that_move_away_from_zero_stay() -> None:
    torch.manual_seed(0)
    true = torch.zeros(4, 40)
    true[:, :10] = 1 + torch.rand(4, 10)  # a quarter of the inputs matters
    layer, scored = nn.Linear(40, 4, bias=False), Scored((4, 40))
    with torch.no_grad():
        layer.weight.copy_(torch.cat([0.5 * true[:, :10], 2 * torch.randn(4, 30)], 1))
    parametrize.register_parametrization(layer, "weight", scored)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(100):
        scored.mask.copy_(
            top(scored.scores.detach(), round(160 * (1 - share_gone(step / 100, 0.75))))
        )
        inputs = torch.randn(64, 40)
        (layer(inputs) - inputs @ true.T).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert scored.mask.sum() == 40
    assert scored.mask[:, :10].mean() > 0.9


def test_the_share_rises_along_a_cubic_curve_between_flat_ends() -> None:
    shares = [share_gone(step / 100, 0.8) for step in range(101)]
    assert shares == sorted(shares)
    assert shares[10] == 0
    assert set(shares[80:]) == {0.8}
    assert shares[45] == pytest.approx(0.8 * (1 - 0.5**3))


@pytest.mark.parametrize("rival", [r for r in RIVALS if r.gradual], ids=named)
def test_movement_prunes_while_it_trains(subject: Subject, rival: Rival) -> None:
    movement = rival.gradual(copy.deepcopy(subject.model), 0.75)
    scores, units = movement.parameters(), rival.method == "movement-units"
    shares = []

    def before_step(progress: float) -> None:
        movement.before_step(progress)
        masks = [scored.mask for scored in movement.scored.values()]
        shares.append(sum(float((m == 0).sum()) for m in masks) / sum(m.numel() for m in masks))

    train(movement.model, budget(20), before_step=before_step, scores=scores, scores_rate=0.01)
    assert shares[:2] == [0, 0]
    assert units or shares == sorted(shares)  # where a head stays, neurons of others go
    assert all(score.abs().sum() > 0 for score in scores)
    model = movement.finish()
    size = size_of(model, subject.chosen)
    assert size.sparsity == pytest.approx(0.75, abs=0.03 if units else 0.002)
    assert size.masked != units
    assert not [name for name, _ in model.named_parameters() if "scores" in name or "orig" in name]
    assert outputs(model, batch()).isfinite().all()
    if rival.widths == "uniform" and not units:
        zeros = [
            zeros_of(model, n) / model.get_parameter(n).numel() for n in weights_of(subject.chosen)
        ]
        assert max(zeros) - min(zeros) < 0.01


def test_scores_of_units_keep_the_best_of_them(subject: Subject) -> None:
    movement = Movement.of_units(copy.deepcopy(subject.model), 0.5)
    with torch.no_grad():
        for scored in movement.scored.values():
            scored.scores.copy_(torch.arange(scored.scores.numel())[None])
    movement.before_step(1.0)
    dense = {
        axis: subject.model.get_parameter(f"{axis.readers[0]}.weight") for axis in movement.axes
    }
    model = movement.finish()
    for axis, width in widths_at(movement.axes, 0.5).items():
        weight = model.get_parameter(f"{axis.readers[0]}.weight")
        assert torch.equal(weight, dense[axis][:, -width * axis.entries :])
