"""README, CONTRIBUTING and docs: their code runs, their links lead somewhere, their names exist."""

from __future__ import annotations

import inspect
import re
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.records import Store
from lightning_mi_prune import CKALayerPruning, MutualInformationPruning, options

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_mi_prune"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
}
CODE = {name: re.findall(r"```python\n(.*?)```", text, re.S) for name, text in PAGES.items()}
SHOWS = {  # what the blocks of a page print, in their order
    "README.md": r"Linear\(in_features=32, out_features=(?!64).*Linear\(in_features=16, "
    r"out_features=24, .*\(1348, 508\)",
    "docs/deploy.md": r"^{'input_ids': \('batch', 'length'\)} {'logits': \('batch', 2\)} 512\n$",
    "docs/discovery.md": r"parameters .* in 1 group\nchannels 16 \('4',\)\n",
    "docs/layers.md": r"^3 \(",
    "docs/memory.md": r"^low Sequential\(.*out_features=48, ",
    "docs/method.md": r"Linear\(in_features=32, out_features=24, ",
    "docs/plan.md": r"what a cut would leave\n.*\n50% \*.*'2.ffn': 44}.*units .* 75% ",
    "docs/training.md": "",
}


def test_every_page_with_code_is_run() -> None:
    assert {name for name, blocks in CODE.items() if blocks} == set(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
@pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")  # tiny data
def test_the_code_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocks of a page share their names, as in a notebook."""
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", program)
    monkeypatch.chdir(tmp_path)
    for block in CODE[name]:
        exec(block, vars(program))  # noqa: S102
    assert re.search(SHOWS[name], capsys.readouterr().out, re.S)


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", PAGES)
def test_named_files_and_modules_exist(name: str) -> None:
    for quoted in re.findall(r"`([\w./]+\.(?:py|yaml|md|jsonl))`", PAGES[name]):
        if quoted == "plan.yaml":  # which the package writes
            continue
        places = [ROOT, PACKAGE, *(p for p in PACKAGE.iterdir() if p.is_dir())]
        assert any((place / quoted).is_file() for place in places), quoted
    for module in re.findall(r"\blightning_mi_prune((?:\.[a-z_]+)+)", PAGES[name]):
        parts = module[1:].split(".")
        found = PACKAGE
        while parts and (found / parts[0]).is_dir():
            found /= parts.pop(0)
        known = not parts or (found / f"{parts[0]}.py").is_file()
        assert known or hasattr(__import__("lightning_mi_prune"), parts[0]), module


def test_the_map_names_every_file_and_no_other() -> None:
    section = PAGES["CONTRIBUTING.md"].split("## The map")[1].split("\n## ")[0]
    named, folder = set(), ""
    for line in section.splitlines():
        if heading := re.match(r"\*\*`(\w+)`\*\*|\*\*The package itself\*\*", line):
            folder = f"{heading[1]}/" if heading[1] else ""
        elif line.startswith("* "):
            named |= {folder + path for path in re.findall(r"`([\w/]+\.py)`", line.split(": ")[0])}
    found = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    plain = {path for path in found if not re.fullmatch(r"(\w+/)?__init__\.py", path)}
    assert named == plain


def options_in(text: str) -> set[str]:
    """Names in the first column of a table whose head is ``option``."""
    (table,) = re.findall(r"^\| option \| default \| meaning \|\n((?:\|.*\n)+)", text, re.M)
    return {n for row in table.splitlines()[1:] for n in re.findall(r"`(\w+)`", row.split("|")[1])}


@pytest.mark.parametrize(
    ("name", "callback"),
    [("README.md", MutualInformationPruning), ("docs/layers.md", CKALayerPruning)],
)
def test_the_tables_of_options_are_those_of_the_callbacks(name: str, callback: type) -> None:
    taken = set(inspect.signature(callback).parameters)
    assert options_in(PAGES[name]) <= taken
    assert taken - options_in(PAGES[name]) <= {"seed", "verbose", "monitoring"}


@pytest.mark.parametrize("name", PAGES)
def test_options_in_the_text_can_be_made(name: str) -> None:
    records = {k: v for k, v in vars(options).items() if k in options.__all__ and k[0].isupper()}
    for call in re.findall(rf"\b((?:{'|'.join(records)})\([^)`]+\))", PAGES[name]):
        if "..." not in call:
            eval(call, records)  # noqa: S307


def test_the_numbers_of_the_demo_in_the_readme_are_in_the_records() -> None:
    readme = " ".join(PAGES["README.md"].split())
    runs = Store("demo").find(cuts=1, compensation="layerwise", epochs=6)
    single = [record["encoder speed-up, batch 1"] for record in runs]
    many, share = (
        statistics.median(record[key] for record in runs)
        for key in ("encoder speed-up, batch 32", "pruning, % of training")
    )
    dense = {r["seed"]: r["dense accuracy, %"] for r in Store("demo") if r.get("cuts") is None}
    dense |= {r["seed"]: r["accuracy, %"] for r in Store("demo").find(cuts=0)}
    points = statistics.median(record["accuracy, %"] - dense[record["seed"]] for record in runs)
    assert f"{many:.1f} times as fast at batch size 32" in readme
    assert f"(at 1 between {min(single):.1f} and {max(single):.1f} times" in readme
    assert f"changes by {points:+.1f} points (medians of {len(runs)} seeds)" in readme
    assert f"pruning takes {share:.0f} % of the training" in readme
