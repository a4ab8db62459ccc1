"""The page of a report in a headless browser (make pages installs one where it can)."""

from __future__ import annotations

import json
import os
import re

import pytest

from tests.support.pages import SECTIONS, browser, measured, opened, shown_in, whole_report

NEEDED = bool(os.environ.get("NEEDS_BROWSER"))
pytestmark = pytest.mark.skipif(
    not NEEDED and browser() is None, reason="no Chromium here; make pages installs one"
)

WIDTHS = """<!doctype html><title>widths</title><iframe id="f" src="report.html" width="{width}"
 height="800"></iframe><script>onload = () => {{
 const root = document.getElementById("f").contentDocument.documentElement;
 document.title = `needs ${{root.scrollWidth}} of ${{root.clientWidth}}`;
}};</script>"""
FOCUS = """<!doctype html><title>focus</title><iframe id="f" src="report.html" width="1200"
 height="800"></iframe><script>onload = () => {
 const page = document.getElementById("f").contentDocument;
 const parts = [...page.querySelectorAll("a[href], summary, [tabindex='0']")];
 parts.forEach(part => part.click && part.tagName === "SUMMARY" && part.click());
 const reached = parts.filter(part => { part.focus(); return page.activeElement === part; });
 const open = [...page.querySelectorAll("details")].every(part => part.open);
 document.title = `reached ${reached.length} of ${parts.length}, open ${open}`;
};</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("page")
    for name in ("report.html", "report.json"):
        whole_report().write(found / name, measured())
    return found


def title(folder, name, html):
    """Title of a page, once its script ran."""
    (folder / name).write_text(html, encoding="utf-8")
    page, console = opened(folder / name, folder / f"profile-{name}")
    assert console == []
    return re.findall(r"<title>(.*?)</title>", page)[0]


def test_it_opens_without_errors_and_shows_the_numbers_of_the_json(folder):
    page, console = opened(folder / "report.html", folder / "profile")
    assert console == []
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert shown_in(page) == shown_in(source)
    shown = {value for value, _ in shown_in(page)}
    body = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    for side in (body["before"], body["after"]):
        values = [side[name] for name in ("parameters", "prunable_parameters", "macs")]
        assert {*values, *side["metrics"].values()} <= shown
    assert re.findall(r'<section id="([^"]*)"', page) == [*SECTIONS]


def test_a_page_with_an_error_would_be_noticed(folder):
    (folder / "wrong.html").write_text("<script>nothing.at.all</script>", encoding="utf-8")
    _, console = opened(folder / "wrong.html", folder / "profile-wrong")
    assert len(console) == 1


@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_window(folder, width):
    needs, has = map(
        int, re.findall(r"\d+", title(folder, f"{width}.html", WIDTHS.format(width=width)))
    )
    assert needs <= has
    assert has > width - 30


def test_all_that_can_be_opened_is_reached_by_keyboard(folder):
    found = title(folder, "focus.html", FOCUS)
    reached, parts = map(int, re.findall(r"\d+", found))
    assert reached == parts > 30
    assert found.endswith("open true")
