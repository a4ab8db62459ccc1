"""The uncut model as a teacher: what the student is told, and that nobody else changes."""

import copy
from pathlib import Path

import pytest
import torch

from examples.benchmark import distillation
from examples.benchmark.distillation import Teacher, distance, distilled_lines, divergence, losses
from examples.benchmark.oneshot import Subject, cut, examine
from examples.benchmark.records import load
from examples.benchmark.training import train
from examples.benchmark.variants import OURS
from tests.examples.test_recovery import Data, budget, labelled
from tests.models import build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return examine("trec-6", 0, build(), labelled(range(12)), labelled(range(12, 15)))


def test_the_uncut_model_has_nothing_to_learn_from_itself(subject: Subject) -> None:
    (batch,) = labelled(range(1))
    own = subject.model(**batch).loss
    for name, loss in losses(subject.model).items():
        expected = own if name == "labels" else own / 2  # no divergence, no distance
        torch.testing.assert_close(loss(subject.model, batch), expected)


def test_terms_are_those_of_the_papers() -> None:
    said, wanted = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    p, q = (wanted / 2).softmax(-1), (said / 2).softmax(-1)
    by_hand = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(said, wanted, temperature=2.0), by_hand)
    share = ((said - wanted) ** 2).sum() / (wanted**2).sum()
    torch.testing.assert_close(distance(said, wanted), share)


def test_padding_and_embeddings_teach_nothing(subject: Subject) -> None:
    (batch,) = labelled(range(1))
    mask = batch["attention_mask"].bool()
    student, teacher = cut(subject, OURS, 0.75)[0], subject.model
    with torch.no_grad():
        said, wanted = (m(**batch, output_hidden_states=True) for m in (student, teacher))
        parts = [
            distance(x[mask], y[mask])
            for x, y in zip(said.hidden_states[1:], wanted.hidden_states[1:], strict=True)
        ]
        plain, both = Teacher(teacher)(student, batch), Teacher(teacher, hidden=3.0)(student, batch)
    assert not mask.all()
    torch.testing.assert_close(both - plain, 3 * sum(parts) / len(parts))


def test_a_teacher_is_only_run_and_a_student_comes_nearer(subject: Subject) -> None:
    student, weights = cut(subject, OURS, 0.75)[0], copy.deepcopy(subject.model.state_dict())
    (batch,) = labelled(range(20, 21))
    states = Teacher(subject.model, hidden=1.0)
    with torch.no_grad():
        before = states(student, batch)
    train(student, budget(12), loss=states)
    with torch.no_grad():
        assert states(student, batch) < before
    assert all(torch.equal(weights[name], t) for name, t in subject.model.state_dict().items())
    assert all(p.grad is None for p in subject.model.parameters())


def test_a_run_measures_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distillation, "RESULTS", tmp_path / "distillation.json")
    monkeypatch.setattr(distillation, "finetuned", lambda t, s: (build(seed=s), Data()))
    asked = ["--steps", "3", "--sparsities", "0.75", "--seeds", "0"]
    distillation.main(asked)
    first = load(distillation.RESULTS)
    assert {r["taught_by"] for r in first} == {"labels", "predictions", "predictions and states"}
    assert len({r["cross_entropy"] for r in first}) == 3
    assert {r["steps"] for r in first} == {3}
    capsys.readouterr()
    distillation.main([*asked, "1"])
    assert "seed 0" not in capsys.readouterr().out
    records = load(distillation.RESULTS)
    assert [r for r in records if r["seed"] == 0] == first


def test_the_page_pairs_what_was_taught_by_seed() -> None:
    pytest.importorskip("scipy")
    ways = ("labels", "predictions", "predictions and states")
    place = {"task": "trec-6", "target_sparsity": 0.75, "steps": 3, "cross_entropy": 0.25}
    made = [
        place | {"seed": seed, "taught_by": way, "accuracy": 0.5 + gain * seed}
        for seed in (1, 2)
        for way, gain in zip(ways, (0.0, 0.01, -0.01), strict=True)
    ]
    assert distilled_lines([]) == []
    lines = distilled_lines([*made, made[0] | {"seed": 3}])  # a seed without teachers is left out
    assert lines[-2] == (
        "| trec-6 | 75% | 3 | 2 | 50.00% | +1.50 ± 6.35; +0.000 ± 0.000 "
        "| -1.50 ± 6.35; +0.000 ± 0.000 |"
    )
    assert "| +1.00; +0.000 | -1.00; +0.000 |" in distilled_lines(made[:3])[-2]
