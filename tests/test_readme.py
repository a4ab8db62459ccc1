from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.communication import table
from benchmarks.seeds import summary
from examples.benchmark import depth, front, page, plots, takeover
from examples.benchmark.layer_tables import depth_table, takeover_table
from examples.benchmark.recovery import ENTRIES
from examples.benchmark.summarize import compared

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
    """The first block speaks of the reader's own model; tests/test_callback.py runs its like."""
    assert "Linear(in_features=16, out_features=24" in printed[number - 1]


def test_the_code_of_the_page_on_layers_runs(monkeypatch, capsys):
    page = (ROOT / "docs/layers.md").read_text()
    *_, block = re.findall(r"```python\n(.*?)```", page, re.S)
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)  # as in a process of its own
    monkeypatch.chdir(ROOT)
    exec(block, vars(program))  # noqa: S102
    assert capsys.readouterr().out.startswith("3 (")


def test_the_numbers_of_the_page_on_layers_are_in_the_records():
    page = (ROOT / "docs/layers.md").read_text()
    assert depth_table(depth.load(depth.RESULTS)) in page
    assert takeover_table(depth.load(takeover.RESULTS)) in page
    speed = json.loads(depth.RESULTS.with_name("depth-speed.json").read_text())
    for batch, found in speed["latency"].items():
        cells = [f"{found['ms'][n]:.1f}" for n in "643"]
        cells += [f"{found['speed_up_of_layer_ratio'][n]:.2f}" for n in "43"]
        assert f"| {batch} | {' | '.join(cells)} |" in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    records = depth.load(depth.RESULTS)
    dense = {(r["task"], r["seed"]): r["accuracy"] for r in records if r["layers"] == 6}
    for task, words in (("trec-6", "on TREC-6"), ("movie-snippets", "on movie snippets")):
        gaps = [
            100 * (r["accuracy"] - dense[task, r["seed"]])
            for r in records
            if depth.key_of(r) == (task, r["seed"], *depth.Variant(4, "cka"))
        ]
        said = readme.split("At equal budgets")[1][:300]
        assert f"{statistics.median(gaps):+.1f} {words}" in said
        assert f"{len(gaps)} seeds" in said
    assert f"adds {100 * speed['overhead']['added']['median']:.0f} %" in page


def test_the_readme_is_finished():
    for name in ("README.md", "docs/layers.md", "docs/comparison.md"):
        assert "@@" not in (ROOT / name).read_text()


def test_every_number_of_the_results_is_in_the_records():
    """The table of the README is the one that benchmarks/seeds.py prints."""
    records = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    table = (ROOT / "README.md").read_text().split("## What it measures")[1].split("\n## ")[0]
    for name, values in summary(records).items():
        cells = [f"{v:.2f}" for v in (statistics.median(values), min(values), max(values))]
        assert f"| {name} | {' | '.join(cells)} |" in table


def test_the_table_of_one_cut_is_in_the_records():
    readme = (ROOT / "README.md").read_text()
    seconds = ("listening_s", "order_conditional_s", "choosing_s", "refit_s")
    for record in json.loads((ROOT / "benchmarks/results/cost.json").read_text())["records"]:
        cells = [f"{record[key]['median']:.1f}" for key in seconds]
        cells += [f"{record[key]['median']:,.0f}" for key in ("moments_mb", "peak_above_model_mb")]
        assert f"| {record['shape']} | {' | '.join(cells)} |" in readme


def test_the_comparison_in_short_is_what_its_script_writes():
    readme = (ROOT / front.FRONT).read_text()
    lines = front.front(compared())
    frame = front.BEGIN, front.END
    assert page.rewritten(readme, lines, *frame) == readme, "run examples.benchmark.page"
    assert "**ours**" in lines[3]


def test_the_table_of_communication_is_what_its_script_prints():
    page = (ROOT / "docs/distributed.md").read_text()
    assert "\n".join(table()) in page


def test_the_page_on_the_comparison_is_what_its_script_writes():
    pytest.importorskip("scipy")  # for its intervals
    text = (ROOT / page.PAGE).read_text()
    records = compared()
    assert page.rewritten(text, page.written(records)) == text, "run examples.benchmark.page"
    # Those of the page, and no others that an earlier run left.
    shown = re.findall(r"!\[[^]]+\]\((.+?)\)", text)
    there = [f"figures/{path.name}" for path in (ROOT / plots.FOLDER).glob("*")]
    assert sorted(shown) == sorted(there)


def test_the_page_on_the_comparison_says_what_every_method_is():
    before, _ = (ROOT / page.PAGE).read_text().split(page.BEGIN)
    methods = {entry.method for entry in ENTRIES} | {record["method"] for record in compared()}
    assert [name for name in methods - {"dense"} if f"`{name}`" not in before] == []
