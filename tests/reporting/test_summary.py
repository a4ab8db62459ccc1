"""The summary fits one screen, and its numbers are those of the report."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mi_prune.reporting.report import Cut, GroupCut, PruningReport
from lightning_mi_prune.reporting.summary import HEIGHT, WIDTH, summary


def group(name, kind, before, after):
    return GroupCut(name, kind, before, after, 1.0, 0.5)


def cut(epoch, groups, **changed):
    sizes = {"parameters": 600, "prunable_parameters": 400, "macs": 6000}
    made = Cut(epoch, 0.5, groups=tuple(groups), seconds={"ranking": 1.5}, **sizes)
    return replace(made, **changed)


def layers(count, width):
    return [
        group(f"net.layers.{i}.{kind}", kind, size, width(i, size))
        for i in range(count)
        for kind, size in (("ffn", 3072), ("heads", 12))
    ]


def numbers(line):
    return [int(text.replace(",", "")) for text in re.findall(r"(?<![\w.])[\d,]+(?![\w.%])", line)]


def test_its_numbers_are_those_of_the_json():
    first = cut(1, layers(6, lambda i, size: size - i - 1), parameters=900, macs=8000)
    second = [replace(g, before=g.after, after=g.after - 1) for g in first.groups]
    report = PruningReport(1000, 800, 9000, [first, cut(3, second, information_kept=0.25)])
    body, lines = report.to_dict(), str(report).splitlines()
    for line, name in zip(lines[1:4], ("parameters", "prunable_parameters", "macs"), strict=True):
        assert numbers(line) == [body["before"][name], body["after"][name]]
    for line, kind in zip(lines[4:6], ("ffn", "heads"), strict=True):
        before, after = (
            sum(g[side] for g in body["cuts"][place]["groups"] if g["kind"] == kind)
            for side, place in (("before", 0), ("after", -1))
        )
        assert line.startswith(f"{kind}, 6 groups")
        assert numbers(line)[-2:] == [before, after]
    for layer, line in enumerate(lines[8:14]):
        found = [g for g in body["cuts"][-1]["groups"] if f".{layer}." in g["name"]]
        built = [g for g in body["cuts"][0]["groups"] if f".{layer}." in g["name"]]
        pairs = [n for g, b in zip(found, built, strict=True) for n in (g["after"], b["before"])]
        assert numbers(line) == [layer, *pairs]
    assert "2 cuts at epoch 1, 3 | information kept 25.0%" in lines
    assert lines[-1] == "3.0 s of pruning: ranking 3.0 s"


def test_equal_neighbours_share_a_row():
    text = summary({}, layers(30, lambda i, size: size // (2 if i < 20 else 4)))
    assert [line.split()[0] for line in text.splitlines()[-2:]] == ["0-19", "20-29"]


def test_a_model_of_many_different_layers_is_folded_into_ranges():
    text = summary({"parameters": (2000, 1000)}, layers(80, lambda i, size: max(1, size - i)))
    rows = text.splitlines()[6:]
    assert len(text.splitlines()) <= HEIGHT
    assert rows[0].split()[0].startswith("0-")
    assert rows[-1].split()[0].endswith("-79")
    least = min(number for row in rows for number in numbers(row.split("  ", 1)[1]) if number > 12)
    assert least == 3072 - 79


def test_kinds_that_do_not_fit_are_among_the_totals():
    kinds = [f"kind_{'x' * 12}_{i}" for i in range(8)]
    groups = [group(f"net.{i}.{kind}", kind, 4096, 1024 + i) for i in range(4) for kind in kinds]
    text = summary({}, groups)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(f"{kind}, 4 groups" in text for kind in kinds)


NAMES = st.lists(
    st.from_regex(r"\A[a-z]{1,30}(\.([a-z]{1,30}|[0-9]{1,2})){0,5}\Z"), min_size=1, max_size=60
)


@given(names=NAMES, data=st.data())
def test_it_always_fits_a_screen(names, data):
    kinds = st.sampled_from(["ffn", "heads", "channels", "head_dim"])
    groups = [
        group(name, data.draw(kinds), size, data.draw(st.integers(0, size)))
        for name in dict.fromkeys(names)
        for size in (data.draw(st.integers(1, 200_000)),)
    ]
    seconds = {"ranking": 1.0, "reconstruction": 10_000.0, "calibration": 3.0, "gradients": 4.0}
    text = summary({"parameters": (10**12, 10**11)}, groups, seconds=seconds, notes=["word " * 30])
    assert len(text.splitlines()) <= HEIGHT
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("seconds", [None, {}])
def test_a_report_without_cuts_has_a_summary_too(seconds):
    assert str(PruningReport(parameters=10)).splitlines()[-1] == "No cut"
    assert summary({"parameters": (10, 5)}, [], seconds=seconds).splitlines()[-1].endswith("50.0%")
