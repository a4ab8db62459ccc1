"""The one-shot benchmark on a tiny random model: its records, their files, its tables."""

import copy
import json
from pathlib import Path

import pytest
import torch

from examples.benchmark import oneshot
from examples.benchmark.oneshot import CALLS, Subject, examine, main, measure
from examples.benchmark.records import gather, load, part, write
from examples.benchmark.tables import paired, summary
from examples.benchmark.variants import METHODS, OURS, Variant
from lightning_mi_prune import MutualInformationPruning
from tests.models import batch, build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")

VARIANTS = [variant for group in METHODS.values() for variant in group]
KEYS = {
    "task",
    "model",
    "method",
    "fold_in",
    "widths",
    "cuts",
    "sparsity",
    "target_sparsity",
    "seed",
    "n_test",
    "accuracy",
    "dense_accuracy",
    "parameters",
    "dense_parameters",
    "prunable_parameters",
    "dense_prunable_parameters",
    "kept",
    "seconds",
    "cross_entropy",
    "dense_cross_entropy",
    "machine",
}


def labelled(seeds: range) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        batch(seed=seed) | {"labels": torch.randint(3, (32,), generator=generator)}
        for seed in seeds
    ]


@pytest.fixture(scope="module")
def subject() -> Subject:
    return examine("trec-6", 0, build(), labelled(range(12)), labelled(range(12, 15)))


def named(variant: Variant) -> str:
    return f"{variant.method}-{variant.widths}-{variant.fold_in}-{variant.cuts}"


@pytest.mark.parametrize("variant", VARIANTS, ids=named)
def test_every_variant_gives_a_record(subject: Subject, variant: Variant) -> None:
    before = copy.deepcopy(subject.model.state_dict())
    record = measure(subject, variant, 0.75)
    assert set(record) == KEYS
    assert record["sparsity"] >= 0.75
    assert record["n_test"] == 96
    assert 0 <= record["accuracy"] <= 1
    gone = record["dense_parameters"] - record["parameters"]
    assert gone == record["dense_prunable_parameters"] - record["prunable_parameters"] > 0
    assert {k: len(widths) for k, widths in record["kept"].items()} == dict.fromkeys(
        variant.units, 2
    )
    if variant.widths == "uniform":
        assert len(set(record["kept"]["ffn"])) == 1
    assert json.loads(json.dumps(record)) == record
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_evidence_is_of_the_validation_split_alone() -> None:
    rows = labelled(range(12))
    first, second = (
        examine("trec-6", 0, build(), rows, labelled(range(n, n + 2))).heard for n in (20, 30)
    )
    stored = [call for calls in first.ranks[0].values() for call in calls]
    assert sum(call.rows for call in stored) == 12 * 32
    for key, moments in first.moments.items():
        assert torch.equal(moments.statistics()[1], second.moments[key].statistics()[1])
        assert first.gradients[key].counts.tolist() == [12 * 32, 12, 0]
        assert first.gradients[key].taylor.any()


class Data:
    def val_dataloader(self):
        return labelled(range(12))

    def test_dataloader(self):
        return labelled(range(12, 15))


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The benchmark in a folder of its own; the models that were opened."""
    found = []

    def finetuned(task, seed):
        found.append((task, seed))
        return build(seed=seed), Data()

    monkeypatch.setattr(oneshot, "finetuned", finetuned)
    monkeypatch.setattr(oneshot, "FOLDER", tmp_path / "parts")
    monkeypatch.setattr(oneshot, "RESULTS", tmp_path / "results" / "oneshot.json")
    return found


def test_a_run_goes_on_where_it_was(
    opened: list[tuple[str, int]], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    few = ["--tasks", "trec-6", "--sparsities", "0.5", "--methods", "random", "magnitude"]

    def stop(*arguments, **options):
        if len(load(path)) == 3:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    path = part(oneshot.FOLDER, "oneshot", "trec-6", 0)
    monkeypatch.setattr(oneshot, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        main([*few, "--seeds", "0"])
    begun = load(path)
    monkeypatch.setattr(oneshot, "measure", measure)
    main([*few, "--seeds", "0", "1"])
    assert load(path)[:3] == begun
    variants = [v for v in VARIANTS if v.method in ("random", "magnitude")]
    assert len(load(oneshot.RESULTS)) == 2 * len(variants)
    assert opened == [("trec-6", 0), ("trec-6", 0), ("trec-6", 1)]

    main([*few, "--seeds", "0", "1"])
    assert len(opened) == 3  # nothing was missing, so nothing was opened
    capsys.readouterr()
    main(["--table"])
    assert "trec-6, 50% of the prunable parameters gone" in capsys.readouterr().out


def test_gathering_is_idempotent_and_keeps_what_has_no_part(tmp_path: Path) -> None:
    def record(seed: int, accuracy: float) -> dict[str, object]:
        same = {"task": "trec-6", "target_sparsity": 0.75, "widths": "global", "fold_in": "refit"}
        return same | {"method": "relevance-mi", "cuts": 1, "seed": seed, "accuracy": accuracy}

    results = tmp_path / "results.json"
    write(results, [record(0, 0.1), record(2, 0.2)])
    for seed in (1, 0):
        write(part(tmp_path, "oneshot", "trec-6", seed), [record(seed, 0.5)])
    write(tmp_path / "oneshot-trec-6-0.json.1.partial", [record(7, 0.5)])
    expected = [record(0, 0.5), record(1, 0.5), record(2, 0.2)]
    assert gather(tmp_path, "oneshot", results) == expected
    before = results.stat().st_mtime_ns
    assert gather(tmp_path, "oneshot", results) == expected == load(results)
    assert results.stat().st_mtime_ns == before


def test_differences_are_paired_by_seed() -> None:
    ours = {seed: {"accuracy": value} for seed, value in enumerate((0.9, 0.8, 0.7))}
    theirs = {seed: {"accuracy": value} for seed, value in enumerate((0.8, 0.7, 0.6, 0.1))}
    mean, error, seeds = paired(ours, theirs)
    assert (mean, error, seeds) == (pytest.approx(10), pytest.approx(0), 3)
    mean, error, _ = paired(ours, {0: {"accuracy": 0.8}, 1: {"accuracy": 0.6}})
    assert (mean, error) == (pytest.approx(15), pytest.approx(5))
    assert paired(ours, {}) is None
    rows = [
        {
            "method": variant.method,
            "widths": variant.widths,
            "fold_in": variant.fold_in,
            "cuts": variant.cuts,
            "seed": seed,
            "accuracy": accuracy,
            "dense_accuracy": 0.9,
            "seconds": 2.0,
        }
        for variant, accuracy in ((METHODS["random"][0], 0.5), (OURS, 0.8))
        for seed in (0, 1)
    ]
    assert summary(rows) == [
        ("relevance-mi", "global", "refit", "1", "-10.00", "-10.00 .. -10.00", "2.0", "2", ""),
        (
            *("random", "uniform", "none", "1", "-40.00", "-40.00 .. -40.00", "2.0", "2"),
            "+30.00 ± 0.00",
        ),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--tasks", "trec-7"], "invalid choice: 'trec-7'"),
        (["--methods", "hessian"], "invalid choice: 'hessian'"),
        (["--seeds", "7"], "invalid choice: 7"),
        (["--sparsities", "1.5"], "1.5: expected a share above 0 and below 1"),
    ],
)
def test_unknown_names_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(given)
    assert message in capsys.readouterr().err


def test_help_names_methods_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("--table", "movie-snippets", *METHODS))


def test_the_ridge_is_that_of_the_callback() -> None:
    callback = MutualInformationPruning()
    assert OURS.at(0.5, 0, CALLS).criterion.ridge == callback.method.criterion.ridge == 1.0
