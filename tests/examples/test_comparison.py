"""What the page on the comparison says, from records made by hand."""

from pathlib import Path

import pytest

from examples.benchmark import front, page, plots, summarize, views
from examples.benchmark.finetuned import RECIPES
from examples.benchmark.looks import GROUPS, LOOKS
from examples.benchmark.losses import cells, goal_lines, lost, lost_lines
from examples.benchmark.plots import FLOORS, apart, draw, save, signed
from examples.benchmark.records import write
from examples.benchmark.recovery import DENSE, ENTRIES, RATE
from examples.benchmark.summarize import INSIDE, MINE, compared, entropy_lines
from examples.benchmark.tables import variant_of
from examples.benchmark.views import VIEWS, Plot, points

TAYLOR = ("taylor", "uniform", "none", 1)
MASKS = ("magnitude-masks", "global", "none", 1)


def record(name=MINE, gap=0.0, *, task="trec-6", sparsity=0.75, seed=0, steps=0, **others):
    """A record whose accuracy is so many points from its dense control's."""
    method, widths, fold_in, cuts = name
    about = {"method": method, "widths": widths, "fold_in": fold_in, "cuts": cuts}
    about |= {"task": task, "target_sparsity": sparsity, "seed": seed, "steps": steps}
    about |= {"dense_accuracy": 0.9, "accuracy": 0.9 + gap / 100, "sparsity": sparsity}
    about |= {"learning_rate": RATE * RECIPES[task].learning_rate, "masked": name == MASKS}
    about |= {"model": "m", "n_test": 1000, "cpu_seconds": 20.0, "evidence_cpu_seconds": 10.0}
    return dict.fromkeys(summarize.FIELDS) | about | others


def seeds(name, *gaps, **others):
    return [record(name, gap, seed=seed, **others) for seed, gap in enumerate(gaps)]


def control(**others):
    name = (DENSE.method, DENSE.widths, DENSE.fold_in, DENSE.cuts)
    return record(name, sparsity=0.0, evidence_cpu_seconds=0.0, **others)


# ------------------------------------------------------------------------------------ cross-entropy


def test_nats_are_paired_by_seed_over_the_tasks_of_a_model() -> None:
    pytest.importorskip("scipy")

    def rise(name, task, *nats):
        known = {"dense_cross_entropy": 0.3}
        return [
            record(name, seed=seed, task=task, **known, cross_entropy=0.3 + more)
            for seed, more in enumerate(nats)
        ]

    records = rise(MINE, "trec-6", 0.01, 0.02) + rise(TAYLOR, "trec-6", 0.05, 0.062)
    assert entropy_lines(records) == []  # a mean takes two tasks
    records += rise(MINE, "tweets-3", 0.03, 0.02) + rise(TAYLOR, "tweets-3", 0.05, 0.042)
    lines = entropy_lines(records)
    assert "### One shot, nats, mean of 2 tasks" in lines
    # Seed by seed ours lose .02 and .02, theirs .05 and .052; t is 12.706 as below.
    assert lines[-3:-1] == [
        "| relevance-mi | global | refit | 1 | 2 | -0.020 |",
        "| taylor | uniform | none | 1 | 2 | -0.051; ▲+0.031 ± 0.013 |",
    ]


# ------------------------------------------------------------------------------------------- losses


def test_a_rival_that_wins_is_listed_and_one_that_does_not_is_not() -> None:
    pytest.importorskip("scipy")
    records = seeds(MINE, -1.0, -1.2) + seeds(TAYLOR, -0.5, -0.6) + seeds(MASKS, -3.0, -3.0)
    assert [(found.name, found.task) for found in lost(records)] == [(TAYLOR, "trec-6")]
    lines = lost_lines(records)
    assert "in 1 of 2 cells" in lines[0]
    # Ours less theirs: -0.5 and -0.6; Student's t with one degree of freedom is 12.706.
    assert lines[-1] == (
        "| one shot | 75% | trec-6 | `taylor`, uniform | -0.55; -0.55 ± 0.64 | -1.10 |"
    )
    assert "magnitude-masks" not in "\n".join(lines)
    clear = seeds(MINE, -1.0, -1.2) + seeds(MASKS, -0.5, -0.701)
    assert "in 1 of them" in lost_lines(clear)[0]
    assert lost_lines(clear)[-1].startswith("| one shot | 75% | trec-6 | `magnitude-masks`, global")
    assert "(masks) | -0.60; ▼-0.50" in lost_lines(clear)[-1]


def test_only_the_same_task_sparsity_and_steps_are_compared() -> None:
    ours = [*seeds(MINE, -1.0), *seeds(MINE, -0.1, sparsity=0.5), *seeds(MINE, -0.1, steps=100)]
    theirs = seeds(TAYLOR, -0.5, steps=100) + seeds(TAYLOR, 0.0, task="tweets-3")
    assert len(cells([*ours, *theirs, control()])) == 1
    assert lost([*ours, *theirs]) == []
    (found,) = lost([*ours, *theirs, *seeds(TAYLOR, -0.9)])
    assert found[:3] == (0, 0.75, "trec-6")


def test_a_better_mean_counts_even_on_other_seeds() -> None:
    ours, theirs = record(gap=-1.0, seed=0), record(TAYLOR, -0.4, seed=1)
    (found,) = lost([ours, theirs])
    assert found.gap[0] == pytest.approx(-0.6)
    assert lost_lines([ours, theirs])[-1].endswith("| -0.40 | -1.00 |")  # nothing to pair
    # Worse on the seed of both, better over all of its own.
    both = [ours, record(TAYLOR, -1.5, seed=0), record(TAYLOR, 0.0, seed=1)]
    assert [each.name for each in lost(both)] == [TAYLOR]
    assert lost([ours, record(TAYLOR, -1.0, seed=0)]) == []  # a draw is no loss


def test_where_less_went_the_list_says_so() -> None:
    records = [record(gap=-1.0), record(TAYLOR, -0.5, sparsity=0.75) | {"sparsity": 0.6}]
    assert "(60% gone)" in lost_lines(records)[-1]


def test_missed_goals_are_listed_and_met_ones_counted() -> None:
    pytest.importorskip("scipy")
    records = seeds(MINE, -0.4, -0.6) + seeds(MINE, -0.6, -0.8, task="tweets-3")
    records += seeds(MINE, 0.0, sparsity=0.5, steps=100)
    records += seeds(TAYLOR, -9.0)  # goals are ours
    lines = goal_lines(records)
    assert lines[0].startswith("Of 4 goals")
    assert "2 are met and 2 missed" in lines[0]
    # Whole where there is nothing, else with the tasks that lack it.
    assert "Not measured yet: 75% in one shot (20-newsgroups, movie-snippets); 90% in" in lines[0]
    assert "50% after training (20-newsgroups, movie-snippets, tweets-3); 75% after" in lines[0]
    assert "90% after training; 95% after training." in lines[0]
    assert [line.split(" | ")[2:] for line in lines[-2:]] == [
        ["tweets-3", "-0.5", "-0.70 ± 1.27", "2", "", " |"],
        ["mean of 2 tasks", "-0.5", "-0.60 ± 1.27", "2", "", " |"],
    ]
    assert len(goal_lines(seeds(MINE, -0.4))) == 1
    trained = goal_lines(seeds(MINE, -0.01, sparsity=0.5, steps=100))
    assert trained[-1] == "| 100 steps | 50% | trec-6 | 0.0 | -0.01 | 1 |  |  |"
    inside = [*seeds(INSIDE, -0.5, -0.7, task="tweets-3"), record(INSIDE, sparsity=0.9)]
    assert goal_lines([*records, *inside])[:-2] == lines[:-2]  # it counts for no goal by itself
    (row,) = (line for line in goal_lines([*records, *inside]) if "| tweets-3 |" in line)
    assert row.endswith("| -0.70 ± 1.27 | 2 | -0.60 ± 1.27 | 2 |")


def test_longer_trainings_count_for_no_goal() -> None:
    pytest.importorskip("scipy")
    records = seeds(MINE, -1.0, -2.0, steps=100)
    assert goal_lines([*records, record(gap=0.0, steps=400)]) == goal_lines(records)


def test_other_learning_rates_are_not_compared() -> None:
    usual, other = record(steps=100), record(steps=100, learning_rate=3.3e-5)
    assert compared([usual, other, record(learning_rate=3.3e-5)]) == [
        usual,
        record(learning_rate=3.3e-5),  # one shot has none
    ]


# ---------------------------------------------------------------------------------------- figures


def test_every_method_has_a_look_of_its_own() -> None:
    assert {(e.method, e.widths, e.fold_in, e.cuts) for e in ENTRIES} == LOOKS.keys()
    looks = [(look.color, look.marker) for look in LOOKS.values()]
    assert len(set(looks)) == len(looks)
    names = [(look.group, look.label) for look in LOOKS.values()]
    assert len(set(names)) == len(names)
    assert {look.group for look in LOOKS.values()} == set(GROUPS)
    assert [name for name, look in LOOKS.items() if look.marker == "*"] == [MINE]


def test_points_are_means_with_the_range_over_seeds() -> None:
    records = [
        *seeds(MINE, -1.0, -2.0, -4.5),
        *seeds(MINE, -0.1, sparsity=0.5),
        record(TAYLOR, -1.0, seed=1) | {"sparsity": 0.7},
    ]
    found = points(records, VIEWS[0])
    assert list(found) == [MINE, TAYLOR]
    low, high = found[MINE][1], found[MINE][0]
    assert (low.place, low.mean) == (pytest.approx(0.25), pytest.approx(-2.5))
    assert (low.least, low.most) == (pytest.approx(-4.5), pytest.approx(-1.0))
    assert high.place == 0.5
    assert found[TAYLOR][0].place == pytest.approx(0.3)
    assert apart([MINE, TAYLOR, MASKS])[MINE] == 1
    assert len(set(apart([MINE, TAYLOR, MASKS]).values())) == 3


def test_what_is_not_measured_is_not_drawn_and_said() -> None:
    assert list(views.plots([control()])) == [
        "There are no records yet: python -m examples.benchmark.recovery"
    ]
    found = list(views.plots([record(), record(steps=100), control(steps=100)]))
    drawn = [plot.name for plot in found if isinstance(plot, Plot)]
    names = [
        (steps, view) for steps in ("one-shot", "100-steps") for view in ("parameters", "cost")
    ]
    assert drawn == [f"{steps}-{view}" for steps, view in names]
    said = [plot for plot in found if isinstance(plot, str)]
    assert len(said) == 4
    assert said[0].startswith("No one-shot-speed-b32")
    assert "examples.benchmark.latency" in said[0]
    times = {f"{side}latency_ms_b{n}": ms for n in (1, 32) for side, ms in (("dense_", 6), ("", 2))}
    fast = record(**times)
    assert [view.value(fast) for view in VIEWS] == [0.25, 3.0, 3.0, 30.0]
    assert all(isinstance(plot, Plot) for plot in views.plots([fast]))


@pytest.mark.parametrize("tasks", [1, 3])
def test_figures_have_a_panel_a_task_and_clip_what_is_hopeless(tasks: int) -> None:
    records = [
        r
        for task in [*RECIPES][:tasks]
        for r in [
            record(gap=-1.0, task=task, steps=100),
            record(TAYLOR, -60.0, task=task, steps=100),
            control(task=task, steps=100),
        ]
    ]
    for plot in views.plots(records):
        if isinstance(plot, str):
            continue
        figure = draw(plot)
        figure.canvas.draw()
        panels = [axes for axes in figure.axes if axes.get_visible()]
        assert len(panels) == tasks
        for axes in panels:
            assert axes.get_ylim()[0] == FLOORS[True]
            heights = [y for line in axes.lines for y in line.get_ydata() if y != 1]
            assert min(heights) == FLOORS[True]
            assert ": dense 90.0%, 1 seed" in axes.get_title(loc="left")
        shown = [text.get_text() for part in figure.legends for text in part.get_texts()]
        extra = "goal" if plot.view.grouped else "dense control"
        assert shown == ["relevance MI", extra, "Taylor"]
        assert f"below {signed(FLOORS[True])}" in figure.get_supylabel()


def test_the_same_records_give_the_same_files(tmp_path: Path) -> None:
    records = seeds(MINE, -1.0, -2.0) + seeds(TAYLOR, -30.0)
    told = [save(records, tmp_path / folder) for folder in ("one", "two")]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["one-shot-cost.svg", "one-shot-parameters.svg"]
    assert [line for line in told[0] if line.endswith(".svg")] == [
        str(tmp_path / "one" / name) for name in reversed(names)
    ]
    for name in names:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two


# -------------------------------------------------------------------------------------------- page


def test_only_what_stands_between_the_comments_is_written() -> None:
    text = f"# Page\n\nBy hand.\n\n{page.BEGIN}\n\nold\n\n{page.END}\n\nMore.\n"
    new = page.rewritten(text, ["new"])
    assert new == text.replace("old", "new")
    assert page.rewritten(new, ["new"]) == new
    with pytest.raises(ValueError, match="expected once each"):
        page.rewritten("# Page\n", ["new"])


def test_the_page_follows_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.setattr(summarize, "RESULTS", tmp_path / "summary.json")
    monkeypatch.setattr(page, "FOLDER", tmp_path / "figures")
    monkeypatch.setattr(page.by_time, "RESULTS", tmp_path / "by_time.json")
    path = tmp_path / "comparison.md"
    path.write_text(f"{page.BEGIN}\n{page.END}\n", encoding="utf-8")
    page.main(["--page", str(path), "--no-figures"])
    assert "There are no records yet" in path.read_text(encoding="utf-8")
    records = seeds(MINE, -1.0, -1.2) + seeds(TAYLOR, -0.5, -0.6) + [control()]
    write(summarize.RESULTS, records)
    page.main(["--page", str(path)])
    text = path.read_text(encoding="utf-8")
    assert "| trec-6 | 1000 | 0, 1 | 90.00% |" in text
    assert "`taylor`, uniform | -0.55" in text
    assert "![Accuracy and size, in one shot](figures/one-shot-parameters.svg)" in text
    assert (tmp_path / "figures" / "one-shot-parameters.svg").exists()
    assert "No one-shot-speed-b32" in text
    assert "### One shot, trec-6" in text
    assert text.index("## Where it loses") < text.index("## Tables")
    page.main(["--page", str(path), "--no-figures"])
    assert path.read_text(encoding="utf-8") == text
    assert {variant_of(r) for r in records} - LOOKS.keys() == {("dense", "uniform", "none", 1)}


def test_records_of_different_dense_models_are_named() -> None:
    records = [record(), record(TAYLOR, dense_accuracy=0.91), record(steps=100)]
    assert page.disagreeing(records) == ["trec-6, seed 0, one shot"]
    assert any("trec-6, seed 0, one shot." in line for line in page.facts(records))


def test_the_marker_of_the_page_names_its_script() -> None:
    assert page.__name__ in page.BEGIN
    assert plots.FOLDER.parent == page.PAGE.parent


def test_the_comparison_in_short_has_a_row_a_method_that_was_measured() -> None:
    records = [*seeds(MINE, -0.5, -1.0), control(), *seeds(TAYLOR, -30.0)]
    records += seeds(MINE, -9.0, task="tweets-3") + seeds(MINE, 0.25, sparsity=0.5, steps=100)
    head, _, counts, *rows = front.front(records)
    assert head == "| TREC-6 | one shot, 75% gone | 100 steps, 50% gone |"
    assert counts == "| *seeds* | *2* | *1* |"
    assert rows == ["| **ours** | -0.75 (-1.0 .. -0.5) | +0.25 |"]  # no row for TAYLOR alone
    helped = ("taylor", "global", "refit", 1)
    assert front.front(seeds(helped, -30.0))[-1].endswith("| -30.0, 1 seed |")


def test_the_comparison_in_short_has_the_mean_over_tasks_where_there_is_one() -> None:
    records = seeds(MINE, -0.5, -1.0) + seeds(MINE, -1.5, -1.2, -9.0, task="tweets-3")
    rows = front.front(records)
    assert rows[5] == "| mean of 2 tasks | one shot, 75% gone |"
    # The third seed has one task only.
    assert rows[7:] == [
        "| *seeds* | *2* |",
        "| **ours** | -1.05 (-1.1 .. -1.0) |",
    ]
