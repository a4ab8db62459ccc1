"""The subcommand plan, and prune with a plan: files, JSON, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_mi_prune import load_pruned
from lightning_mi_prune.allocation.plan_file import read_plan
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.cli import main
from tests.support.boring import Classifier
from tests.support.graphs import graph_of

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
RUN: dict[str, Any] = {
    "model": "tests.support.boring.Classifier",
    "data": "tests.support.boring.Data",
    "trainer": {"accelerator": "cpu", "max_epochs": 3},
    "sparsity": 0.6,
    "kinds": ["ffn", "heads"],
    "graph": "graph.json",
    "reconstruction": {"method": "compensation"},
    "seed": 3,
}


@pytest.fixture(autouse=True)
def _among_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    graph_of(Classifier()).save("graph.json")
    Path("run.yaml").write_text(yaml.safe_dump(RUN))


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = {path: path.read_bytes() for path in Path().iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert {path: path.read_bytes() for path in Path().iterdir()} == before
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_a_plan_is_written_edited_and_cut(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", "run.yaml", "--budgets", "0.5", "0.8", "--json"])
    body = json.loads(capsys.readouterr().out)
    plan = read_plan("plan.yaml")
    assert [entry["label"] for entry in body["budgets"]] == ["60%", "50%", "80%"]
    assert body["plan"] == "plan.yaml"
    assert {key: body[key] for key in body if key not in ("plan", "seconds")} == {
        key: value for key, value in plan.to_dict().items() if key != "seconds"
    }
    name = "model.bert.encoder.layer.1.ffn"
    text = Path("plan.yaml").read_text()
    width = plan.columns[0].widths[name]
    start = text.index(f"{name}:")
    changed = text[start:].replace(f"60%: {width}", f"60%: {width - 8}", 1)
    Path("plan.yaml").write_text(text[:start] + changed)
    main(["prune", "run.yaml", "--plan", "plan.yaml", "--evaluate", "none", "--output", "a.ckpt"])
    assert "of the prunable parameters are gone" in capsys.readouterr().out
    wanted = {**plan.columns[0].widths, name: width - 8}
    carried = PlanTracker.of(load_pruned(Classifier(), "a.ckpt")).plan
    assert {n: carried.width(n) for n in wanted} == wanted


def test_the_plan_may_be_in_the_file_and_tables_fit_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    plain = {key: value for key, value in RUN.items() if key != "sparsity"}
    Path("run.yaml").write_text(yaml.safe_dump(plain))
    main(["plan", "run.yaml", "--output", "deep/mine.yaml"])
    text = capsys.readouterr().out
    assert "75%" in text
    assert "The plan is deep/mine.yaml" in text
    assert max(map(len, text.splitlines())) <= 80
    plan = read_plan("deep/mine.yaml")
    Path("run.yaml").write_text(yaml.safe_dump({**plain, "plan": "deep/mine.yaml"}))
    main(["prune", "run.yaml", "--sparsity", "0.75", "--evaluate", "none", "--output", "b.ckpt"])
    carried = PlanTracker.of(load_pruned(Classifier(), "b.ckpt")).plan
    wanted = dict(plan.columns[1].widths)
    assert {n: carried.width(n) for n in wanted} == wanted


def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--budget is no option; did you mean --budgets?" in refused(
        capsys, "plan", "run.yaml", "--budget", "0.5"
    )
    assert "sparsity=1.5; expected a number" in refused(
        capsys, "plan", "run.yaml", "--budgets", "1.5"
    )
    assert "cannot be written" in refused(capsys, "plan", "run.yaml", "--output", "run.yaml/x.yaml")
    assert "expected a file that exists" in refused(
        capsys, "plan", "run.yaml", "--checkpoint", "no.ckpt"
    )
    assert "The plan cannot be read from 'no.yaml'" in refused(
        capsys, "prune", "run.yaml", "--plan", "no.yaml"
    )
    Path("odd.yaml").write_text("version: 1\nmodel: [1\n")
    assert "no valid YAML" in refused(capsys, "prune", "run.yaml", "--plan", "odd.yaml")
