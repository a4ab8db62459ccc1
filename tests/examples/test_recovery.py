"""The benchmark's rivals and equal budgets on a tiny random model; its records and its summary."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from examples.benchmark import latency, oneshot, recovery, summarize
from examples.benchmark.oneshot import Subject, examine
from examples.benchmark.records import load, part
from examples.benchmark.recovery import DENSE, ENTRIES, lacking, main, measure, wanted
from examples.benchmark.rivals import RIVALS, Rival
from examples.benchmark.rivals.layers import layers_left
from examples.benchmark.rivals.masks import magnitude_masks
from examples.benchmark.rivals.movement import Movement, Scored, share_gone, top, widths_at
from examples.benchmark.rivals.size import settle, size_of, weights_of, zeros_of
from examples.benchmark.rivals.torchpruning import group_magnitude
from examples.benchmark.training import Training, train, training_of
from examples.benchmark.variants import OURS
from lightning_mi_prune import find_axes
from lightning_mi_prune.axes import count_parameters
from lightning_mi_prune.choosing import choose_axes
from tests.models import batch, build, outputs

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")


def labelled(seeds: range, rows: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        batch(rows, seed=seed) | {"labels": torch.randint(3, (rows,), generator=generator)}
        for seed in seeds
    ]


class Epochs:
    """A loader whose order depends on the epoch alone, as that of the example does."""

    def __init__(self, batches: int = 4) -> None:
        self.dataset = range(8 * batches)
        self.sampler = self
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(labelled(range(100 * self.epoch, 100 * self.epoch + 4), rows=8))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return examine("trec-6", 0, build(), labelled(range(12)), labelled(range(12, 14)))


def budget(steps: int = 6) -> Training:
    return training_of(Epochs(), steps, first_epoch=4, learning_rate=1e-3, seed=0)


def named(entry) -> str:
    return f"{entry.method}-{entry.widths}"


# ------------------------------------------------------------------------------------------- rivals


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


def counted(subject: Subject) -> int:
    return count_parameters(subject.chosen)


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


# ----------------------------------------------------------------------------------------- movement


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


# ------------------------------------------------------------------------------------ equal budgets


def test_a_training_goes_on_where_that_of_the_dense_model_ended() -> None:
    first, again = budget(6), budget(6)
    assert first.steps == 6
    assert first.epochs == 6 * 8 / 32
    for one, other in zip(first.batches, again.batches, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    expected = [*labelled(range(400, 404), rows=8), *labelled(range(500, 502), rows=8)]
    for one, other in zip(first.batches, expected, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])


def test_training_is_repeatable_and_leaves_random_states_alone(subject: Subject) -> None:
    state, found = torch.get_rng_state(), []
    for _ in range(2):
        model = copy.deepcopy(subject.model)
        train(model, budget())
        found.append(model.state_dict())
        assert not model.training
        torch.rand(3)
        torch.set_rng_state(state)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_method_and_the_control_get_the_same_batches(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recorded(model, training, **options):
        seen.append(training)
        return train(model, training, **options)

    monkeypatch.setattr(recovery, "train", recorded)
    training = budget()
    entries = [e for e in ENTRIES if e.method in ("random", "magnitude-masks", "movement-units")]
    for entry in [DENSE, *entries]:
        record = next(iter(measure(subject, entry, 0.5 if entry is not DENSE else 0.0, [training])))
        assert record["steps"] == 6
        assert json.loads(json.dumps(record)) == record
    assert len(seen) == 1 + len(entries)
    assert all(one is training for one in seen)


def test_one_cut_serves_every_number_of_steps(subject: Subject) -> None:
    for method in ("magnitude-masks", "magnitude"):
        entry = next(e for e in ENTRIES if e.method == method)
        both = list(measure(subject, entry, 0.5, [budget(0), budget(4)]))
        alone = list(measure(subject, entry, 0.5, [budget(4)]))
        assert [r["steps"] for r in both] == [0, 4]
        assert both[1]["cross_entropy"] == alone[0]["cross_entropy"] != both[0]["cross_entropy"]
        assert both[0]["sparsity"] == both[1]["sparsity"]
        assert both[0]["finetune_epochs"] == 0


# ------------------------------------------------------------------------------------------ records


class Data:
    def val_dataloader(self):
        return labelled(range(6))

    def test_dataloader(self):
        return labelled(range(12, 14))

    def train_dataloader(self):
        return Epochs()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(recovery, "finetuned", lambda task, seed: (build(seed=seed), Data()))
    monkeypatch.setattr(recovery, "FOLDER", tmp_path)
    for module in (recovery, oneshot, latency, summarize):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results" / f"{module.__name__}.json")
    return tmp_path


def test_a_run_goes_on_where_it_was_and_is_summed_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--tasks", "trec-6", "--sparsities", "0.5", "--steps", "0", "3"]
    few += ["--methods", "magnitude-masks", "first-layers", "movement-masks", "--seeds"]
    path = part(folder, "recovery", "trec-6", 0)
    whole = recovery.measure

    def stop(subject, entry, *rest):
        if entry.method == "movement-masks":
            raise KeyboardInterrupt
        return whole(subject, entry, *rest)

    monkeypatch.setattr(recovery, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        main([*few, "0"])
    begun = load(path)
    assert [(r["method"], r["steps"]) for r in begun] == [
        (method, steps)
        for method in ("dense", "magnitude-masks", "first-layers")
        for steps in (0, 3)
    ]
    monkeypatch.setattr(recovery, "measure", whole)
    main([*few, "0", "1"])
    records = load(path)
    assert records[:6] == begun
    assert [r["steps"] for r in records[6:]] == [3, 3]  # no one-shot form
    for record in records:
        control = next(r for r in begun if r["method"] == "dense" and r["steps"] == record["steps"])
        assert record["dense_accuracy"] == control["accuracy"]
    monkeypatch.setattr(recovery, "finetuned", None)
    main([*few, "0", "1"])  # nothing is missing, so nothing is opened
    capsys.readouterr()
    main(["--list", *few, "0", "2"])
    listed = capsys.readouterr().out
    assert "seed 0: 0 records" in listed
    assert "seed 2: 8 records" in listed

    summarize.main([])
    shown = capsys.readouterr().out
    assert "### 3 steps, trec-6" in shown
    assert "| first-layers | uniform | none | 1 | 2 |" in shown
    summed = load(summarize.RESULTS)
    assert len(summed) == 16
    assert all(set(record) == set(summarize.FIELDS) for record in summed)
    assert all(record["latency_ms_b32"] is None for record in summed)
    assert all(record["macs"] > 0 for record in summed)


@pytest.mark.parametrize(
    ("command", "wrong", "expected"),
    [
        (main, ["--rate", "-1"], "-1: expected a number above 0"),
        (main, ["--rate", "nan"], "nan: expected a number above 0"),
        (main, ["--steps", "0", "-5"], "-5: expected a whole number from 0"),
        (summarize.main, ["--of", "nothing.json"], "nothing.json: there is no such file"),
    ],
)
def test_what_makes_no_sense_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], command, wrong: list[str], expected: str
) -> None:
    with pytest.raises(SystemExit):
        command(wrong)
    assert expected in capsys.readouterr().err
    assert not any(folder.iterdir())


def test_the_grid_holds_each_method_once() -> None:
    grid = wanted(ENTRIES, [0.5, 0.75], [0, 100])
    keys = [
        (entry.method, entry.widths, entry.fold_in, sparsity, count)
        for entry, sparsity, counts in grid
        for count in counts
    ]
    assert len(set(keys)) == len(keys)
    assert grid[0] == (DENSE, 0.0, [0, 100])
    assert grid[1][0] == OURS
    assert sum(len(counts) for *_, counts in lacking("trec-6", 0, [], grid, 1e-4)) == len(keys)


# ---------------------------------------------------------------------------- latency and summary


def test_shapes_are_built_anew_with_their_widths(subject: Subject) -> None:
    kept = {"heads": [3, 1], "ffn": [8, 0]}
    model = latency.shaped(copy.deepcopy(subject.model.config), kept)
    assert size_of(model, subject.chosen).kept == kept
    kept |= {"dims": [2, 5]}
    model = latency.shaped(copy.deepcopy(subject.model.config), kept)
    assert size_of(model, subject.chosen, subject.of(["dims"])).kept == kept
    short = latency.shaped(copy.deepcopy(subject.model.config), {"heads": [4], "ffn": [40]})
    assert len(short.bert.encoder.layer) == 1
    found = latency.gauge(
        lambda: copy.deepcopy(subject.model.config), kept, 12, seconds=0.01, rounds=1
    )
    assert found["macs"] < found["dense_macs"]
    assert all(found[name] > 0 for name in summarize.FROM_SHAPES)


def test_summed_records_take_numbers_of_a_shape_together() -> None:
    record = dict.fromkeys(summarize.FIELDS, 1) | {"task": "a", "kept": {"ffn": [2]}}
    old = {name: record[name] for name in summarize.FIELDS if name not in summarize.ONE_SHOT}
    shape = dict.fromkeys(summarize.FROM_SHAPES, 7)
    paid = {"evidence_cpu_seconds": 0.0}  # a method of nobody's
    assert summarize.merged([[old], [old | {"accuracy": 2}]], {}, {}) == [
        {name: record[name] for name in summarize.FIELDS}
        | summarize.ONE_SHOT
        | {"accuracy": 2}
        | paid
    ]
    summed = summarize.summarized(record, shape)
    assert {summed[name] for name in summarize.FROM_SHAPES} == {7}


def test_intervals_are_paired_by_seed() -> None:
    pytest.importorskip("scipy")
    mean, half = summarize.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-5))
    assert summarize.cell({0: -3.0, 1: -3.5, 5: -9.0}, {0: -1.0, 1: -1.5, 2: 0.0}).endswith(
        "▲+2.00 ± 0.00"
    )
    assert math.isnan(summarize.interval([1.0])[1])
    records = [
        {"task": task, "seed": seed, "accuracy": 0.8, "dense_accuracy": dense}
        for task, seed, dense in (("a", 0, 0.9), ("b", 0, 0.8), ("a", 1, 0.8))
    ]
    assert summarize.by_seed(records, ["a", "b"]) == {0: pytest.approx(-5.0)}
