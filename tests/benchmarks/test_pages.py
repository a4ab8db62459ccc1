"""Tables from records made by hand; the pages of the project against its records; figures."""

import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import comparison, pages, plots
from benchmarks.__main__ import main
from benchmarks.comparison import by_seed, cell, facts, front, interval, lost, tables
from benchmarks.methods import OURS, SETTINGS
from benchmarks.pages import TABLES, filled, rewritten, table_lines
from benchmarks.plots import FIGURES, LOOKS, SHOWN, drawn
from benchmarks.records import Record, Store
from benchmarks.recovery import ENTRIES
from benchmarks.vision import WAYS
from tests.benchmarks.tiny import ROOT
from tools import schematics

pytest.importorskip("scipy")  # for the intervals

MINE = OURS.name
TAYLOR = ("taylor", "uniform", "none")
MASKS = ("magnitude-masks", "global", "none")


def record(name=MINE, gap=0.0, *, task="trec-6", sparsity=0.75, seed=0, steps=0, **others):
    """A record whose accuracy is so many points from its dense control's."""
    method, widths, weights = name
    setting = {"task": task, "method": method, "widths": widths, "weights": weights}
    setting |= {"sparsity": sparsity, "steps": steps}
    figures: dict[str, Any] = {"model": "m", "n_test": 1000, "masked": name == MASKS}
    figures |= {"accuracy": 0.9 + gap / 100, "dense_accuracy": 0.9, "reached": sparsity}
    figures |= {"kept": {"ffn": [1]}, "cross_entropy": 0.3, "dense_cross_entropy": 0.3} | others
    return Record("recovery", setting, seed, figures, {"cpu": "A", "threads": 2}, {"torch": "2"})


def seeds(name, *gaps, **others):
    return [record(name, gap, seed=seed, **others) for seed, gap in enumerate(gaps)]


def stored(folder: Path, records: Iterable[Record]) -> Path:
    for each in records:
        Store(each.case, folder).add(each.setting, each.seed, each.figures)
    return folder


# ------------------------------------------------------------------------------------- comparisons


def test_intervals_are_paired_by_seed() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-5))
    assert cell({0: -3.0, 1: -3.5, 5: -9.0}, {0: -1.0, 1: -1.5, 2: 0.0}, 2).endswith(
        "▲+2.00 ± 0.00"
    )
    assert math.isnan(interval([1.0])[1])
    several = [*seeds(MINE, -10.0, -2.0), record(gap=0.0, task="tweets-3")]
    assert by_seed(several, ["trec-6", "tweets-3"]) == {0: pytest.approx(-5.0)}


def test_a_baseline_that_wins_is_listed_and_one_that_does_not_is_not() -> None:
    records = seeds(MINE, -1.0, -1.2) + seeds(TAYLOR, -0.5, -0.6) + seeds(MASKS, -3.0, -3.0)
    lines = lost(records)
    assert "in 1 of 2 cells" in lines[0]
    # Ours less theirs: -0.5 and -0.6; Student's t with one degree of freedom is 12.706.
    assert lines[-1] == (
        "| one shot | 75% | trec-6 | `taylor`, uniform | -0.55; -0.55 ± 0.64 | -1.10 |"
    )
    assert "magnitude-masks" not in "\n".join(lines)
    clear = lost(seeds(MINE, -1.0, -1.2) + seeds(MASKS, -0.5, -0.701))
    assert "in 1 of them" in clear[0]
    assert "`magnitude-masks`, global (masks) | -0.60; ▼-0.50" in clear[-1]


def test_only_the_same_task_sparsity_and_steps_are_compared() -> None:
    ours = [*seeds(MINE, -1.0), *seeds(MINE, -0.1, sparsity=0.5), *seeds(MINE, -0.1, steps=100)]
    theirs = seeds(TAYLOR, -0.5, steps=100) + seeds(TAYLOR, 0.0, task="tweets-3")
    assert "in 0 of 1 cells" in lost([*ours, *theirs])[0]
    assert "in 1 of 2 cells" in lost([*ours, *theirs, *seeds(TAYLOR, -0.9)])[0]


def test_a_better_mean_counts_even_on_other_seeds() -> None:
    ours, theirs = record(gap=-1.0, seed=0), record(TAYLOR, -0.4, seed=1)
    assert lost([ours, theirs])[-1].endswith("| -0.40 | -1.00 |")  # nothing to pair
    # Worse on the seed of both, better over all of its own.
    both = [ours, record(TAYLOR, -1.5, seed=0), record(TAYLOR, 0.0, seed=1)]
    assert "in 1 of 1 cells" in lost(both)[0]
    assert "in 0 of 1 cells" in lost([ours, record(TAYLOR, -1.0)])[0]  # a draw is no loss
    less = [record(gap=-1.0), record(TAYLOR, -0.5, reached=0.6)]
    assert "(60% removed)" in lost(less)[-1]


def test_means_go_over_tasks_of_one_model_with_seeds_enough() -> None:
    ours = [*seeds(MINE, -1.0, -1.2), *seeds(MINE, -2.0, -2.2, task="tweets-3")]
    large = record(MINE, -8.0, task="trec-6-mpnet", model="large")
    before, after = tables(ours), tables([*ours, large])
    start = after.index("### One shot, trec-6-mpnet")
    assert after[:start] + after[start + 6 :] == before
    mean = after.index("### One shot, mean of 2 tasks")
    assert after[mean + 4] == "| relevance-mi | global | reconstruction | 2 | -1.60 |"
    lines = facts([*ours, large])
    assert "| trec-6 | 1000 | 0, 1 | 90.00% |" in lines
    assert lines[-1].endswith("with two seeds or more: trec-6, tweets-3.")
    assert "none yet" in facts(ours[:2])[-1]


def test_nats_are_paired_by_seed_over_the_tasks_of_a_model() -> None:
    def rise(name, task, *nats):
        return [
            record(name, seed=seed, task=task, cross_entropy=0.3 + more)
            for seed, more in enumerate(nats)
        ]

    records = rise(MINE, "trec-6", 0.01, 0.02) + rise(TAYLOR, "trec-6", 0.05, 0.062)
    assert tables(records, "nats") == []  # a mean takes two tasks
    records += rise(MINE, "tweets-3", 0.03, 0.02) + rise(TAYLOR, "tweets-3", 0.05, 0.042)
    # Seed by seed ours lose .02 and .02, theirs .05 and .052; t is 12.706 as above.
    assert tables(records, "nats")[-2:] == [
        "| relevance-mi | global | reconstruction | 2 | -0.020 |",
        "| taylor | uniform | none | 2 | -0.051; ▲+0.031 ± 0.013 |",
    ]


def test_the_comparison_in_short_has_a_row_a_method_that_was_measured() -> None:
    records = seeds(MINE, -0.5, -1.0) + seeds(MINE, -1.5, -1.2, -9.0, task="tweets-3")
    records += seeds(TAYLOR, -30.0) + seeds(MINE, 0.25, sparsity=0.5, steps=100)
    lines = front(records)
    assert lines[2] == "| *seeds* | *2* | *0* | *1* | *0* | *0* |"
    assert lines[3] == "| **ours** | -0.75 (-1.0 .. -0.5) |  | +0.25 |  |  |"
    assert lines[4] == ""  # no row for TAYLOR alone
    # The third seed has one task only.
    assert lines[-1] == "| **ours** | -1.05 (-1.1 .. -1.0) |  |  |  |  |"


# --------------------------------------------------------------------------------- other tables


def test_ablations_are_paired_by_seed(tmp_path: Path) -> None:
    def made(setting: str, seed: int, accuracy: float, nats: float) -> Record:
        figures = {"dense_accuracy": 0.9, "dense_cross_entropy": 0.2, "n_test": 10, "macs": 1}
        figures |= {"dense_macs": 4, "accuracy": accuracy, "cross_entropy": nats}
        about = {"task": "trec-6", "sparsity": 0.75, "setting": setting}
        return Record("ablations", about, seed, figures | {"cpu_seconds": 2.0}, {}, {})

    records = [
        *(made("top-k", 0, 0.7, 0.5), made("default", 0, 0.8, 0.3), made("top-k", 1, 0.8, 0.6)),
        *(made("default", 1, 0.8, 0.5), made("ridge 10", 2, 0.8, 0.5)),
    ]
    lines = table_lines("ablations", stored(tmp_path, records))
    assert lines[0].startswith("**trec-6, 75% sparsity**; dense 90.00%, 0.200 nats; 10 test rows.")
    assert lines[4:] == [
        "| default | 2 | +0.200 (+0.100 .. +0.300) |  | -10.00 (-10.00 .. -10.00) |  | 25% | 2 |",
        "| top-k | 2 | +0.350 (+0.300 .. +0.400) | +0.150 (+0.100 .. +0.200) "
        "| -15.00 (-20.00 .. -10.00) | -5.00 (-10.00 .. +0.00) | 25% | 2 |",
        "| ridge 10 | 1 | +0.300 |  | -10.00 |  | 25% | 2 |",
    ]


def test_teachers_are_paired_by_seed(tmp_path: Path) -> None:
    ways = ("labels", "predictions", "predictions and states")
    records = [
        Record(
            "distillation",
            {"task": "trec-6", "sparsity": 0.75, "steps": 3, "loss": way},
            seed,
            {"accuracy": 0.5 + gain * seed, "cross_entropy": 0.25},
            {},
            {},
        )
        for seed in (1, 2, 3)
        for way, gain in zip(ways, (0.0, 0.01, -0.01), strict=True)
        if seed < 3 or way == "labels"  # a seed without teachers is left out
    ]
    assert table_lines("distillation", stored(tmp_path, records))[-1] == (
        "| trec-6 | 75% | 3 | 2 | 50.00% | +1.50 ± 6.35; +0.000 ± 0.000 "
        "| -1.50 ± 6.35; +0.000 ± 0.000 |"
    )


def test_lengths_show_what_share_of_the_ratio_is_reached() -> None:
    def made(cpu: str, widths: str, compiled: bool, ms: float) -> Record:
        setting = {"task": "trec-6", "length": 23, "compiled": compiled, "widths": widths}
        figures = {"macs": 25, "dense_macs": 100, "ms_b1": 4.0, "dense_ms_b1": 8.0}
        figures |= {"ms_b32": ms, "dense_ms_b32": 60.0}
        machine = {"cpu": cpu, "threads": 2}
        about = setting | {"sparsity": 0.75, "cpu": cpu}
        return Record("lengths", about, 0, figures, machine, {"torch": "2"})

    records = [made("A", "ours", False, 20.0), made("A", "uniform", False, 20.0)]
    records += [made("A", "ours", True, 15.0), made("B", "ours", False, 20.0)]
    lines = pages.lengths(records)
    assert lines[2:6] == [
        "| 23 | 75% | ours | 4.00x | 2.00x (0.50) | 3.00x (0.75) | 4.00x (1.00) |",
        "| 23 | 75% | uniform | 4.00x | 2.00x (0.50) | 3.00x (0.75) |  |",
        "",
        "A, threads: 2, torch 2.",
    ]
    assert lines[-1] == "B, threads: 2, torch 2."


def test_pruned_networks_for_pictures_are_paired_by_seed() -> None:
    def made(name, gap: float, seed: int, macs: int, sparsity: float = 0.5) -> Record:
        figures = {"macs": macs, "dense_macs": 100, "parameters": 40, "dense_parameters": 100}
        return record(name, gap, seed=seed, task="p", sparsity=sparsity, cpu_seconds=3.0, **figures)

    library = ("torch-pruning-taylor", "uniform", "none")
    dense = [made(("dense", "uniform", "none"), 0.0, seed, 100, 0.0) for seed in (0, 1)]
    ours = [made(MINE, -1.0, 0, 50), made(MINE, -1.2, 1, 50)]
    lines = pages.vision([*dense, *ours, made(library, -2.0, 0, 51), made(library, -2.2, 1, 51)])
    assert lines[0].startswith("**p**: dense 90.00% (2 seeds), 40 parameters, 0.0 million MACs, 3 ")
    assert lines[-2:] == [
        "| relevance-mi | global | reconstruction | 2 | -1.10 | 50% | 40% | 3 |",
        "| torch-pruning-taylor | uniform | none | 2 | -2.10; ▲+1.00 ± 0.00 | 51% | 40% | 3 |",
    ]


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_rectangular_and_needs_records(name: str, tmp_path: Path) -> None:
    assert table_lines(name, tmp_path)[0].startswith("No records yet: `python -m benchmarks run ")
    lines = table_lines(name)
    parts = "\n".join(lines).split("\n\n")
    rows = [{line.count("|") for line in part.splitlines() if line[0] == "|"} for part in parts]
    assert max(map(len, rows)) <= 1


# -------------------------------------------------------------------------------------------- pages


def test_only_what_stands_between_the_comments_is_written(tmp_path: Path) -> None:
    stored(tmp_path, seeds(MINE, -1.0, -1.2))
    text = "By hand.\n\n<!-- table: comparison -->\nold\n<!-- /table -->\n\nMore.\n"
    new = filled(text, tmp_path)
    assert new.startswith("By hand.\n\n<!-- table: comparison -->\n\n### One shot, trec-6\n")
    assert new.endswith("\n\n<!-- /table -->\n\nMore.\n")
    assert "old" not in new
    assert filled(new, tmp_path) == new
    with pytest.raises(ValueError, match="'none': expected one of comparison-short"):
        filled(text.replace("comparison", "none"), tmp_path)
    with pytest.raises(ValueError, match="expected a `<!-- /table"):
        filled("<!-- table: comparison -->", tmp_path)


def test_the_pages_show_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = set()
    for path, old, new in rewritten():
        assert old == new, f"{path}: run `python -m benchmarks tables`"
        shown |= set(re.findall(r"<!-- table: (\S+) -->", new))
    assert shown == TABLES.keys()
    main(["tables", "--check"])
    monkeypatch.setattr("benchmarks.__main__.rewritten", lambda folder: [(Path("a.md"), "", "b")])
    with pytest.raises(SystemExit, match=r"a\.md differs from the records"):
        main(["tables", "--check"])


def test_the_pages_explain_every_method_and_setting() -> None:
    text = (ROOT / "docs/comparison.md").read_text().split("## What was measured")[0]
    methods = {entry.method for entry in ENTRIES} | {r["method"] for r in Store("recovery")}
    assert [name for name in methods - {"dense"} if f"`{name}`" not in text] == []
    text = (ROOT / "docs/ablations.md").read_text()
    assert [s.name for s in SETTINGS if f"**{s.name}**" not in text] == []
    assert {r["setting"] for r in Store("ablations")} <= {s.name for s in SETTINGS}


def test_the_numbers_of_layers_are_in_the_records() -> None:
    readme = " ".join((ROOT / "docs/results.md").read_text().split())
    store = Store("layers")
    for task, words in (("trec-6", "on TREC-6"), ("movie-snippets", "on movie snippets")):
        dense = {r.seed: r["accuracy"] for r in store.find(task=task, criterion="none")}
        about = {"layers": 4, "criterion": "cka", "reconstruction": True, "first_epoch": None}
        gaps = [100 * (r["accuracy"] - dense[r.seed]) for r in store.find(task=task, **about)]
        shown = readme.split("At equal budgets")[1][:300]
        assert f"{statistics.median(gaps):+.1f} {words}" in shown
        assert f"{len(gaps)} seeds" in shown


# ------------------------------------------------------------------------------------------ figures


def test_every_figure_of_the_pages_is_there_and_no_other() -> None:
    text = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    named = re.findall(r"!\[[^]]+\]\(figures/(.+?)\.svg\)", text)
    known = {*SHOWN, *schematics.FIGURES}
    assert set(named) == known
    assert {path.stem for path in (ROOT / "docs/figures").glob("*")} == known | {"logo"}
    assert set(SHOWN) < set(FIGURES)


def test_the_schematic_figures_are_those_of_the_script(tmp_path: Path) -> None:
    for path in schematics.drawn(tmp_path):
        assert path.read_bytes() == (ROOT / "docs/figures" / path.name).read_bytes(), path.name


def test_every_method_has_a_look_of_its_own() -> None:
    looks = [(color, marker) for _, color, marker in LOOKS.values()]
    assert len(set(looks)) == len(looks)
    assert {entry.name for entry in (*ENTRIES, *WAYS)} >= LOOKS.keys()
    assert [name for name, look in LOOKS.items() if look[2] == "*"] == [MINE]


def test_the_same_records_give_the_same_figures(tmp_path: Path) -> None:
    records = seeds(MINE, -1.0, -2.0) + seeds(TAYLOR, -60.0) + seeds(MINE, -1.0, task="tweets-3")
    folder = stored(tmp_path / "records", records)
    paths = [drawn(FIGURES, tmp_path / name, folder) for name in ("one", "two")]
    # Nothing was trained, and no shape timed.
    assert [path.name for path in paths[0]] == ["one-shot-size.svg"]
    one, two = (found[0].read_bytes() for found in paths)
    assert one == two


def test_figures_have_a_panel_a_task_and_clip_what_is_far_below() -> None:
    records = [
        (each, 1 - each["sparsity"])
        for task in ("a", "b", "c")
        for each in [*seeds(MINE, -1.0, -2.0, -4.5, task=task), record(TAYLOR, -60.0, task=task)]
    ]
    figure = plots.draw(records, "size")
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == [
        f"{task}: dense 90.0%, seeds: 3" for task in "abc"
    ]
    for axes in panels:
        ours, taylor = axes.containers
        assert ours.lines[0].get_ydata() == pytest.approx([-2.5])
        assert taylor.lines[0].get_ydata() == pytest.approx([plots.FLOORS[0]])
    assert comparison.points(records[0][0]) == pytest.approx(-1.0)


def test_speed_is_that_of_the_shape(tmp_path: Path) -> None:
    fast = record(kept={"ffn": [2]})
    shape = {"task": "trec-6", "kept": {"ffn": [2]}}
    figures = {"dense_ms_b1": 6.0, "ms_b1": 2.0, "dense_ms_b32": 6.0, "ms_b32": 3.0}
    folder = stored(tmp_path, [Record("latency", shape, 0, figures, {}, {})])
    shapes = {plots.shape_of("trec-6", r["kept"]): r for r in Store("latency", folder)}
    views = ("size", "speed-b1", "speed-b32")
    assert [plots.place_of(fast, shapes, view) for view in views] == [0.25, 3.0, 2.0]
    assert plots.place_of(record(), shapes, "speed-b1") is None
