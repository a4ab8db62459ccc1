"""The page of a report, read by a parser: its numbers, sections and names; no browser needed."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import html5lib
import pytest

from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.reporting.page import page_of
from lightning_mi_prune.reporting.report import PruningReport
from tests.support.packages import hide
from tests.support.pages import BAD, SECTIONS, measured, numbers_in, shown_in, whole_report

HTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page, and the JSON beside it."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("report.html", "report.json"):
        whole_report().write(folder / name, measured())
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tree(written):
    return html5lib.HTMLParser(strict=True).parse(written[0])  # raises for what is no HTML


def test_every_number_of_a_table_is_one_of_the_json(written):
    page, body = written
    before = body["before"]
    known = {*numbers_in(body)}
    known |= {group["after"] / first["before"] for group, first in _widths(body)}
    known.add(1.0)  # information before the first cut
    shown = shown_in(page)
    assert len(shown) > 200
    for value, text in shown:
        assert value in known, text
        plain = float(re.sub("[,%]", "", text)) / (100 if text.endswith("%") else 1)
        assert plain == pytest.approx(value, rel=6e-3, abs=6e-3), text
    summary = dict(shown)
    for side in (before, body["after"]):
        for name in ("parameters", "prunable_parameters", "macs"):
            assert summary[side[name]] == f"{side[name]:,}"
        assert side["metrics"]["accuracy"] in summary
        assert {row["median"] for row in side["latency_ms"]} <= set(summary)


def _widths(body):
    """Every group after its last cut, and the same before its first one."""
    groups = [group for cut in body["cuts"] for group in cut["groups"]]
    first = {group["name"]: group for group in reversed(groups)}
    return [(group, first[group["name"]]) for group in groups]


def test_every_curve_of_the_json_is_on_the_page(written):
    page, body = written
    shown = {value for value, _ in shown_in(page)}
    for group in body["cuts"][-1]["groups"]:
        curve = group["curve"]
        assert group["after"] in curve["widths"]
        assert len(curve["widths"]) == len(curve["loss"]) == len(curve["nats"]) <= 34
        assert {*curve["loss"], *curve["nats"]} <= shown


def test_a_section_is_there_for_all_that_was_recorded(written, tree):
    text = json.dumps(written[1])
    found = [part.get("id") for part in tree.iter(f"{HTML}section")]
    assert found == [*SECTIONS]
    assert all(f'"{entry}"' in text for entry in SECTIONS.values())


def test_what_was_not_recorded_has_no_section():
    page = page_of(PruningReport(5, 4, 3).to_dict())
    assert re.findall(r'<section id="([^"]*)"', page) == ["summary"]
    assert "Nothing was cut." in page
    assert "<figure" not in page


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("metrics", {"history": []}),
        ("versions", {"versions": {}}),
        ("left-out", {"left_out": []}),
        ("layers", {"cuts": whole_report().cuts[1:]}),
        ("latency", {}),
    ],
)
@pytest.mark.filterwarnings("ignore:The report has no figures")
def test_a_section_goes_with_what_it_shows(section, change, monkeypatch):
    hide(monkeypatch, "matplotlib")  # which takes a second
    page = page_of(replace(whole_report(), **change).to_dict())
    found = re.findall(r'<section id="([^"]*)"', page)
    assert section not in found
    assert "sensitivity" in found


def test_figures_have_a_name_and_a_table(tree):
    figures = [*tree.iter(f"{HTML}figure")]
    assert len(figures) >= 11
    for figure in figures:
        (drawing,) = figure.iter(f"{SVG}svg")
        assert drawing.get("role") == "img"
        assert len(drawing.get("aria-label")) > 20
        assert [*figure.iter(f"{HTML}table")]
        assert [*figure.iter(f"{HTML}summary")]
    texts = [element.text for element in tree.iter(f"{SVG}text")]
    assert "units that stay, % of those before the cut" in texts  # text is text, not outlines


def test_ids_are_unique_and_every_reference_is_one_of_them(written, tree):
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', written[0]):
        assert "".join(target) in ids


def test_nothing_is_loaded_and_nothing_runs(written, tree):
    page = written[0]
    assert not [*tree.iter(f"{HTML}script")]
    assert "default-src 'none'" in page
    names = re.findall(r"https?://[^\s\"')]+", page)
    assert {name for name in names if "www.w3.org" not in name} == set()
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"\son\w+=", page)


def test_tables_that_scroll_can_be_reached_by_keyboard(tree):
    regions = [e for e in tree.iter() if e.get("role") == "region"]
    assert regions
    assert all(e.get("tabindex") == "0" and e.get("aria-label") for e in regions)


def test_names_are_not_trusted(tmp_path):
    report = whole_report()
    cut = report.cuts[1]
    groups = tuple(replace(g, name=f"{BAD}.{i}", kind=BAD) for i, g in enumerate(cut.groups))
    history = [replace(e, values={BAD: 0.5}) for e in report.history]
    odd = replace(report, cuts=[replace(cut, groups=groups)], history=history, left_out=[BAD])
    page = page_of(odd.to_dict())
    tree = html5lib.HTMLParser(strict=True).parse(page)
    assert not [*tree.iter(f"{HTML}script")]
    assert "<script" not in page
    assert "\x07" not in page
    assert "\u202e" not in page
    assert "$\\frac{1}{2}$" in page  # as it is written, not as a formula


def test_the_page_is_the_same_for_the_same_report(written):
    body = whole_report().to_dict()
    assert page_of(body) == page_of(json.loads(json.dumps(body)))
    assert len(written[0]) < 600_000


def test_the_suffix_decides_and_others_are_refused(tmp_path):
    for name in ("report.pdf", "report", "report.HTM"):
        with pytest.raises(
            PruningError, match=r"expected a path that ends in '\.html' or '\.json'"
        ):
            PruningReport().write(tmp_path / name)
    assert not [*tmp_path.iterdir()]


def test_without_matplotlib_the_page_has_its_tables(tmp_path, monkeypatch):
    hide(monkeypatch, "matplotlib")
    with pytest.warns(PruningWarning, match=r"no figures.*lightning-mi-prune\[plots\]"):
        whole_report().write(tmp_path / "report.html", measured())
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<svg" not in page
    assert len(shown_in(page)) > 200
    assert "<details open>" in page


def test_units_that_stay_are_listed_as_ranges(written):
    plan = written[1]["plan"]
    assert plan["net.layers"] == "0, 2"
    assert plan["net.layers.0.ffn"] == "0-9"


def test_lists_of_numbers_are_on_one_line(tmp_path):
    whole_report().write(tmp_path / "report.json")
    lines = (tmp_path / "report.json").read_text().splitlines()
    assert any(line.strip().startswith('"widths": [40, 38') for line in lines)
    assert len(lines) < 700
