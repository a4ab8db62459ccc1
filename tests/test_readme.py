from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_the_code_of_the_readme_runs(number):
    """The first block speaks of the reader's own model; tests/test_callback.py runs its like."""
    command = [sys.executable, "-W", "error", "-c", BLOCKS[number]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Linear(in_features=16, out_features=24" in done.stdout


def test_the_code_of_the_page_on_layers_runs():
    page = (ROOT / "docs/layers.md").read_text()
    *_, block = re.findall(r"```python\n(.*?)```", page, re.S)
    command = [sys.executable, "-c", block]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 (")


def test_the_readme_is_finished():
    for name in ("README.md", "docs/layers.md", "docs/comparison.md"):
        assert "@@" not in (ROOT / name).read_text()
