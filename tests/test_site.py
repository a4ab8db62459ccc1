"""The site and the habits of the project: what can be checked without building or network."""

from __future__ import annotations

import ast
import functools
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import lightning.pytorch as pl
import pytest
import yaml

import lightning_mi_prune
from tests.core.test_messages import PACKAGE, text_of
from tools import llms

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
MADE = {"changelog.md", "contributing.md", "examples.md"}  # by tools/site_hooks.py
MADE |= {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_page_has_a_place_in_the_navigation() -> None:
    named = [name for _, _, name in llms.navigation()]
    assert len(set(named)) == len(named)
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert set(named) == found | MADE


def test_the_list_for_programs_is_that_of_the_pages() -> None:
    text = read("docs/llms.txt")
    assert text == llms.text(), "run `python -m tools.llms`"
    summaries = re.findall(r"^- \[.+?\]\((.+?)\): (.*)$", text, re.M)
    assert [name for name, summary in summaries if len(summary) < 25] == []


# ---------------------------------------------------------------------------------------- messages


@functools.cache
def messages_of_the_package() -> list[str]:
    """Texts of all calls in the source, with * for what is filled in."""
    calls = [
        node
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and node.args
    ]
    return [text for node in calls if len(text := text_of(node.args[0])) > 20]


def as_expression(quoted: str) -> str:
    """What is filled in may be anything, also nothing that the source has."""
    parts = [re.escape(part) for part in " ".join(quoted.split()).split("…")]
    return r"[^.;]*\*?".join(parts)


QUOTED = re.findall(r"```text\n(.*?)```", read("docs/messages.md"), re.S)


@pytest.mark.parametrize("quoted", QUOTED, ids=lambda text: text[:50].strip())
def test_a_quoted_message_is_one_of_the_package(quoted: str) -> None:
    expression = re.compile(as_expression(quoted))
    found = [text for text in messages_of_the_package() if expression.search(text)]
    assert found, quoted


def test_messages_that_nothing_says_are_not_found() -> None:
    for odd in ("Pruning calibrates in training, but", "… is no … at all; try …"):
        assert not any(re.search(as_expression(odd), text) for text in messages_of_the_package())


# --------------------------------------------------------------------------------------- notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_small_and_without_errors(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert cells[0]["source"][0].startswith("# ")
    assert sum(bool(cell["outputs"]) for cell in code) >= 5, "run `make notebooks`"
    for cell in code:
        assert cell["execution_count"] is None
        assert [output["name"] for output in cell["outputs"]] in ([], ["stdout"])
        assert len(json.dumps(cell["outputs"])) < 3000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of short runs; `make notebooks` is the long one
def test_a_notebook_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All cells, with epochs of a few steps."""
    short = functools.partialmethod(
        pl.Trainer.__init__, limit_train_batches=2, limit_val_batches=2, num_sanity_val_steps=0
    )
    monkeypatch.setattr(pl.Trainer, "__init__", short)
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.chdir(tmp_path)
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), vars(program))  # noqa: S102
    assert re.search(r"(ffn|heads) +\d+ -> +\d+ #+", capsys.readouterr().out)


# ------------------------------------------------------------------------------------------ habits


def workflow(name: str) -> dict:
    return yaml.safe_load(read(f".github/workflows/{name}.yml"))


def test_workflows_may_do_little() -> None:
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        found = workflow(path.stem)
        assert found["permissions"] == {"contents": "read"}, path.name
        for name, job in found["jobs"].items():
            assert job["timeout-minutes"] <= 90
            more = set(job.get("permissions", {})) - {"contents"}
            assert more <= {"links": {"issues"}, "publish": {"id-token"}}.get(name, set())
            for step in job["steps"]:
                assert re.fullmatch(r"[\w./-]+@(v\d+|release/v1)", step.get("uses", "a/b@v1"))


def test_all_pythons_are_tested() -> None:
    versions = workflow("tests")["jobs"]["versions"]["strategy"]["matrix"]["python"]
    named = re.findall(r'Python :: (3\.\d+)"', read("pyproject.toml"))
    assert versions == named
    (oldest,) = re.findall(r'"lightning>=([\d.]+),', read("pyproject.toml"))
    assert f"'lightning=={oldest}'" in read(".github/workflows/tests.yml")


def test_versions_agree() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["version"] == lightning_mi_prune.__version__
    (ruff,) = re.findall(r"^ruff==(.+)$", read("constraints.txt"), re.M)
    assert f"rev: v{ruff}" in read(".pre-commit-config.yaml")
    assert f"ruff=={ruff}" in read("requirements-docs.txt")


def test_the_sdist_has_every_file_of_the_root() -> None:
    included = read("pyproject.toml").split("[tool.hatch.build.targets.sdist]")[1].split("]")[0]
    files = {path.name for path in ROOT.glob("*.*") if path.is_file() and path.name[0] != "."}
    assert {name for name in files if f'"{name}"' not in included} == {"pyproject.toml"}
