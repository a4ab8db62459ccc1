"""Equal budgets for every method on a tiny random model; runs that go on; their records."""

import copy
import json
from pathlib import Path

import pytest
import torch

from examples.benchmark import latency, oneshot, recovery, summarize
from examples.benchmark.oneshot import Subject
from examples.benchmark.records import load, part
from examples.benchmark.recovery import DENSE, ENTRIES, lacking, main, measure, wanted
from examples.benchmark.rivals.size import size_of
from examples.benchmark.training import train
from examples.benchmark.variants import OURS
from tests.examples.subjects import Epochs, budget, labelled
from tests.models import build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")


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
