"""What the benchmark charges a method for its evidence."""

import json
from pathlib import Path

import pytest
import torch

from examples.benchmark import evidence
from examples.benchmark.hearing import feel, hear
from examples.benchmark.oneshot import cut, examine
from examples.benchmark.records import load
from examples.benchmark.variants import METHODS, Variant
from lightning_mi_prune.sample import Heard
from tests.examples.test_benchmark import labelled
from tests.models import build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")

VARIANTS = [variant for group in METHODS.values() for variant in group if variant.cuts == 1]


def name_of(variant: Variant) -> tuple[str, str, str, int]:
    return variant.method, variant.widths, variant.fold_in, variant.cuts


def test_every_way_is_charged_what_it_needs_and_no_more() -> None:
    taken = {"hearing_cpu_seconds": 3.0, "feeling_cpu_seconds": 5.0}
    wanted = {
        ("relevance-mi", "global", "refit", 1): 8.0,
        ("mi-topk", "uniform", "none", 1): 3.0,
        ("taylor", "uniform", "none", 1): 5.0,
        ("activation-norm", "uniform", "none", 1): 3.0,
        ("activation-norm", "global", "refit", 1): 8.0,
        ("magnitude", "uniform", "none", 1): 0.0,
        ("magnitude", "uniform", "fold_in", 1): 3.0,
        ("torch-pruning-taylor", "global", "none", 1): 0.0,
        ("dense", "uniform", "none", 1): 0.0,
    }
    assert {name: evidence.charged(name, taken) for name in wanted} == wanted
    assert evidence.charged(("taylor", "uniform", "none", 1), None) is None
    assert evidence.charged(("magnitude", "uniform", "none", 1), None) == 0.0


def test_what_is_not_charged_does_not_matter() -> None:
    """Evidence of another model in place of what a way is said not to need changes nothing."""
    model = build()
    rows = labelled(range(12))
    subject = examine("trec-6", 0, model, rows, labelled(range(12, 15)))
    other = examine("trec-6", 0, build(seed=5), rows, labelled(range(12, 15))).heard
    torch.manual_seed(0)
    for variant in VARIANTS:
        hears, feels = evidence.needed(name_of(variant))
        mine = subject.heard
        mixed = Heard(
            moments=mine.moments if hears else other.moments,
            gradients=mine.gradients if feels else other.gradients,
            ranks=mine.ranks if hears else other.ranks,
            examples=mine.examples,
        )
        swapped = type(subject)(**{**vars(subject), "heard": mixed})
        (net, plan), (twin, twin_plan) = (cut(s, variant, 0.5) for s in (subject, swapped))
        assert plan == twin_plan, variant
        for (key, value), theirs in zip(
            net.state_dict().items(), twin.state_dict().values(), strict=True
        ):
            assert torch.equal(value, theirs), (variant, key)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A tiny model and its rows; the tasks that were opened."""
    opened: list[str] = []

    class Data:
        num_classes = 3

        def val_dataloader(self):
            return labelled(range(3))

    def task_data(task: str, seed: int) -> Data:
        opened.append(task)
        return Data()

    monkeypatch.setattr(evidence, "task_data", task_data)
    monkeypatch.setattr(evidence, "shaped", lambda config: build())
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "evidence.json")
    return opened


def test_a_task_is_measured_once(tiny: list[str]) -> None:
    evidence.main(["--tasks", "trec-6", "--rounds", "1"])
    (record,) = load(evidence.RESULTS)
    assert record["task"] == "trec-6"
    assert min(record["hearing_cpu_seconds"], record["feeling_cpu_seconds"]) > 0
    assert record["positions"] == sum(int(b["attention_mask"].sum()) for b in labelled(range(3)))
    evidence.main(["--tasks", "trec-6", "tweets-3", "--rounds", "1"])
    assert tiny == ["trec-6", "tweets-3"]
    assert record in json.loads(evidence.RESULTS.read_text())


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evidence.main(["--rounds", "0"])
    assert "expected at least one" in capsys.readouterr().err


def test_the_median_round_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 3.0, 10.0, 15.0, 15.0, 16.0, 20.0, 22.0, 22.0, 31.0])
    monkeypatch.setattr(evidence.time, "process_time", lambda: next(clock))
    for work in (hear, feel):
        monkeypatch.setattr(evidence, work.__name__, lambda *args, **options: None)
    taken = evidence.gauge(build(), [], 3)
    assert taken == {"hearing_cpu_seconds": 2.0, "feeling_cpu_seconds": 2.0}
