"""What the page says of trainings longer than those that all methods get."""

from examples.benchmark import views
from examples.benchmark.longer import longer_lines
from examples.benchmark.summarize import MINE
from examples.benchmark.views import Plot
from tests.examples.test_comparison import TAYLOR, control, record, seeds


def test_longer_training_is_shown_on_the_seeds_that_have_all_of_it() -> None:
    short = seeds(MINE, -2.0, -4.0) + seeds(MINE, -1.0, -1.5, steps=100)
    assert longer_lines(short) == []  # there is one trained budget
    long = [record(seed=1, gap=-0.25, steps=400), record(TAYLOR, -3.0, seed=1, steps=400)]
    assert longer_lines([*short, record(seed=2, gap=-0.25, steps=400)]) == []  # no seed has all
    lines = longer_lines(short + long + [control(seed=1, steps=steps) for steps in (100, 400)])
    assert lines[-4] == "| task | gone | goal | method | seeds | one shot | 100 steps | 400 steps |"
    assert lines[-2:] == [
        "| trec-6 | 75% | -0.5 | `relevance-mi`, global, refit | 1 | -4.00 | -1.50 | -0.25 |",
        "",
    ]  # TAYLOR has one budget
    budgets = {plot.steps for plot in views.plots(short + long) if isinstance(plot, Plot)}
    assert budgets == {0, 100}
