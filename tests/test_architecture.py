"""The house: who may import whom, who may change what, and what is public."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import lightning_mi_prune

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_mi_prune"
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_lightning_is_known_where_a_trainer_is_held(path):
    allowed = path.parent.name == "callbacks" or path.stem in ("strategies", "checkpoints", "cli")
    uses = {m for m in imports(path) if m.split(".")[0] in ("lightning", "pytorch_lightning")}
    assert allowed or not uses


@pytest.mark.parametrize(
    "stem",
    ["groups", "plan", "budget", "constraints", "competition", "latency", "milliseconds", "errors"],
)
def test_plain_data_knows_no_torch(stem):
    assert not {m for m in imports(PACKAGE / f"{stem}.py") if m.split(".")[0] == "torch"}


def test_imports_point_one_way():
    names = {name_of(p) for p in FILES}
    graph = {
        name_of(p): {m if m in names else m.rpartition(".")[0] for m in imports(p)} & names
        for p in FILES
    }
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        trail.append(name)
        for other in graph.get(name, ()):
            visit(other)
        trail.pop()
        done.add(name)

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short_and_say_what_is_public(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    assert "__all__ = [" in text
    assert ast.get_docstring(ast.parse(text))


def test_public_names_exist_sorted_and_documented():
    names = lightning_mi_prune.__all__
    assert names == sorted(names)
    for name in names:
        assert getattr(lightning_mi_prune, name).__doc__


def test_nothing_dangerous_is_called():
    for path in FILES:
        text = path.read_text()
        assert not re.search(r"(?<!\.)\b(eval|exec)\(|pickle|weights_only=False", text), path


def test_the_readme_shows_the_yaml_of_the_demo():
    readme = (ROOT / "README.md").read_text()
    demo = (ROOT / "examples/text_classification/demo.yaml").read_text()
    assert f"```yaml\n{demo}```" in readme
    assert yaml.safe_load(demo)["trainer"]["callbacks"]


def test_constraints_pin_every_requirement():
    pins = set(re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    pins = {pin.lower().replace("_", "-") for pin in pins}
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^  "([A-Za-z0-9-]+)(?:\[[a-z]+\])?>=', project, re.M)
    assert len(wanted) >= 12
    assert {name.lower() for name in wanted} <= pins
