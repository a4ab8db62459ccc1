from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.fixture(scope="module")
def printed():
    """What each block prints; one process, where every warning is an error, runs them in turn."""
    blocks = BLOCKS[1:]
    run = "import sys\nfor block in sys.argv[1:]:\n    exec(block, {'__name__': '__main__'})\n"
    command = [sys.executable, "-W", "error", "-c", f"{run}    print('@@')", *blocks]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    *found, rest = done.stdout.split("@@\n")
    assert (len(found), rest) == (len(blocks), "")
    return found


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_the_code_of_the_readme_runs(printed, number):
    """The first block speaks of the consumer's own model; tests/callbacks/test_unit_pruning.py runs its like."""
    assert "Linear(in_features=16, out_features=24" in printed[number - 1]


def test_the_code_of_the_page_on_layers_runs(monkeypatch, capsys):
    page = (ROOT / "docs/layers.md").read_text()
    *_, block = re.findall(r"```python\n(.*?)```", page, re.S)
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)  # as in a process of its own
    monkeypatch.chdir(ROOT)
    exec(block, vars(program))  # noqa: S102
    assert capsys.readouterr().out.startswith("3 (")


def test_the_readme_is_finished():
    for name in ("README.md", "docs/layers.md", "docs/comparison.md"):
        assert "@@" not in (ROOT / name).read_text()
