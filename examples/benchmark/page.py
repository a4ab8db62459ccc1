"""Writes what the records say into `docs/comparison.md`, and draws its figures.

    python -m examples.benchmark.summarize
    python -m examples.benchmark.page

Only the part between two comments is written; the prose around it is written by hand. It can be
run again as records arrive: the same records give the same page and the same figures.
"""

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from examples.benchmark import by_time, distillation, latency, lengths
from examples.benchmark.front import BEGIN as FRONT_BEGIN
from examples.benchmark.front import END as FRONT_END
from examples.benchmark.front import FRONT, front
from examples.benchmark.inside import inside_lines
from examples.benchmark.longer import longer_lines
from examples.benchmark.losses import budget, goal_lines, lost_lines
from examples.benchmark.paired import averaged
from examples.benchmark.plots import FLOORS, FOLDER, save, signed
from examples.benchmark.records import Record, load
from examples.benchmark.speed_tables import length_lines, mask_lines, paced_lines
from examples.benchmark.summarize import compared, entropy_lines, markdown
from examples.benchmark.views import Plot, plots

PAGE = Path("docs", "comparison.md")
BEGIN = "<!-- From here on: written by python -m examples.benchmark.page -->"
END = "<!-- Until here. -->"
CHARGED = (
    "Every way of this package is charged the evidence that it needs (activations, gradients or "
    "both), as measured once for each task."
)


def facts(records: Sequence[Record]) -> list[str]:
    """Tasks, seeds and dense controls, and what must be known of the machines."""
    counts = sorted({record["steps"] for record in records})
    head = " | ".join(f"dense, {budget(steps)}" for steps in counts)
    lines = [f"| task | test rows | seeds | {head} |", "|---" * (3 + len(counts)) + "|"]
    for task in sorted({record["task"] for record in records}):
        same = [record for record in records if record["task"] == task]
        cells = [task, spelled({record["n_test"] for record in same})]
        cells.append(spelled({record["seed"] for record in same}))
        for steps in counts:
            # A dense control belongs to a seed, however many records name it.
            dense = {r["seed"]: r["dense_accuracy"] for r in same if r["steps"] == steps}
            cells.append(f"{statistics.mean(dense.values()):.2%}" if dense else "")
        lines.append(f"| {' | '.join(cells)} |")
    models = {record["model"] for record in records}
    cpus = spelled({str((record["machine"] or {}).get("cpu")) for record in records})
    lines += ["", f"{len(records)} records; model: {spelled(models)}; processors: {cpus}."]
    groups = averaged(records)
    if sum(map(len, groups)) != len({record["task"] for record in records}):
        means = "; ".join(", ".join(tasks) for tasks in groups) or "none yet"
        lines += ["", f"Means go over tasks of one model with two seeds or more: {means}."]
    if mixed := disagreeing(records):
        lines += ["", f"Not one dense model stands behind all records of {'; '.join(mixed)}."]
    return lines


def spelled(values: set[int] | set[str]) -> str:
    """Values one after another."""
    return ", ".join(map(str, sorted(values)))


def disagreeing(records: Sequence[Record]) -> list[str]:
    """Where records of one task, seed and number of steps name different dense accuracies."""
    found: dict[tuple[str, int, int], set[float]] = {}
    for record in records:
        about = record["task"], record["seed"], record["steps"]
        found.setdefault(about, set()).add(record["dense_accuracy"])
    return [
        f"{task}, seed {seed}, {budget(steps)}"
        for (task, seed, steps), values in sorted(found.items())
        if max(values) - min(values) > 1e-9
    ]


def caption(plot: Plot) -> str:
    """What a figure shows, for those who cannot see it, too."""
    when = f"after {budget(plot.steps)} of training" if plot.steps else "in one shot"
    return f"{plot.view.title}, {when}"


def figures(records: Sequence[Record], page: Path) -> list[str]:
    """The figures with their captions, and a sentence for each that cannot be drawn yet."""
    lines = [
        "Means over the seeds; bars reach from the worst seed to the best. The vertical axis is "
        "linear around zero and logarithmic beyond. Methods below "
        f"{signed(FLOORS[False])} points (one shot) or {signed(FLOORS[True])} (after training) "
        "stand at the lower edge; the tables have their numbers. Masks make nothing smaller, so "
        "they have the speed of the dense model."
    ]
    folder = os.path.relpath(FOLDER, page.parent)
    for plot in plots(records):
        if isinstance(plot, str):
            lines += ["", plot]
            continue
        path = Path(folder, f"{plot.name}.svg").as_posix()
        lines += ["", f"**{caption(plot)}**", "", f"![{caption(plot)}]({path})"]
        if plot.view.control:
            lines += ["", CHARGED]
    return lines


def written(records: Sequence[Record], page: Path = PAGE) -> list[str]:
    """All that the script writes.

    Args:
        records: Those that are compared.
        page: Where it will stand.
    """
    if not any(record["target_sparsity"] for record in records):
        return ["There are no records yet: `python -m examples.benchmark.recovery` makes them."]
    return [
        "## What was measured",
        "",
        *facts(records),
        "",
        "## Where it loses",
        "",
        *goal_lines(records),
        "",
        *lost_lines(records),
        "",
        "## Figures",
        "",
        *figures(records, page),
        "",
        *inside_lines(records, load(latency.RESULTS)),
        *longer_lines(records),
        *distillation.distilled_lines(load(distillation.RESULTS)),
        *mask_lines(load(latency.MASKED)),
        *length_lines(load(lengths.RESULTS)),
        *paced_lines(load(by_time.RESULTS), records),
        "## Tables",
        "",
        *markdown(records),
        "",
        *entropy_lines(records),
    ]


def rewritten(text: str, lines: Sequence[str], begin: str = BEGIN, end: str = END) -> str:
    """A page with these lines between its two comments.

    Args:
        text: The page as it is.
        lines: What comes between them.
        begin: The first comment.
        end: The second one.
    """
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"expected once each, in this order: {begin!r} and {end!r}")
    before, after = text.split(begin)
    _, after = after.split(end)
    return "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"])


def main(given: Sequence[str] | None = None) -> None:
    """Draw the figures and rewrite the page."""
    parser = argparse.ArgumentParser("examples.benchmark.page", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--page", type=Path, default=PAGE, help="default: docs/comparison.md")
    parser.add_argument("--no-figures", action="store_true", help="only rewrite the page")
    asked = parser.parse_args(given)
    records = compared()
    text = rewritten(asked.page.read_text(encoding="utf-8"), written(records, asked.page))
    asked.page.write_text(text, encoding="utf-8")
    print(f"wrote {asked.page}")
    if asked.page == PAGE:
        text = rewritten(FRONT.read_text(encoding="utf-8"), front(records), FRONT_BEGIN, FRONT_END)
        FRONT.write_text(text, encoding="utf-8")
        print(f"wrote {FRONT}")
    if not asked.no_figures:
        print("\n".join(save(records, FOLDER)))


if __name__ == "__main__":
    main()
