"""What more training does for methods that were also measured with a larger budget of steps."""

import statistics
from collections.abc import Sequence

from examples.benchmark.finetuned import TASKS
from examples.benchmark.losses import GOALS, budget
from examples.benchmark.paired import POINTS, by_seed
from examples.benchmark.records import Record
from examples.benchmark.recovery import STEPS
from examples.benchmark.tables import Name, in_words, variant_of

Place = tuple[str, float, Name]


def longer_lines(records: Sequence[Record]) -> list[str]:
    """A row for each task, sparsity and method with several budgets, on the seeds that have all.

    Args:
        records: Those that are compared.
    """
    groups: dict[Place, dict[int, list[Record]]] = {}
    for record in records:
        if record["target_sparsity"]:
            place = record["task"], record["target_sparsity"], variant_of(record)
            groups.setdefault(place, {}).setdefault(record["steps"], []).append(record)
    found = {place: gaps for place, same in groups.items() if (gaps := gaps_of(place[0], same))}
    if not found:
        return []
    counts = sorted({steps for gaps in found.values() for steps in gaps})
    lines = [
        "## Longer training",
        "",
        "The same pruned models, trained for more steps, beside a dense control that is trained "
        "for as many: points to that control, mean over the seeds. Only the methods below were "
        f"trained for more than {max(STEPS)} steps; no figure shows that, and no goal counts it.",
        "",
        f"| task | gone | goal | method | seeds | {' | '.join(map(budget, counts))} |",
        "|---" * (5 + len(counts)) + "|",
    ]
    aims = {(task, goal.sparsity): goal.aim for task in TASKS for goal in GOALS if goal.trained}
    for task, sparsity, name in sorted(found, key=lambda place: order(place, found[place])):
        gaps = found[task, sparsity, name]
        cells = [task, f"{sparsity:.0%}", aims.get((task, sparsity), ""), in_words(name)]
        cells.append(str(len(next(iter(gaps.values())))))
        cells += [
            f"{statistics.mean(gaps[steps].values()):+.2f}" if steps in gaps else ""
            for steps in counts
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def gaps_of(task: str, same: dict[int, list[Record]]) -> dict[int, dict[int, float]]:
    """Points by steps and seed, on the seeds that have all; none without two trained budgets.

    Args:
        task: The task of the records.
        same: Records of one method and sparsity, by steps.
    """
    gaps = {steps: by_seed(found, [task], POINTS) for steps, found in sorted(same.items())}
    common = set.intersection(*map(set, gaps.values()))
    if sum(steps > 0 for steps in gaps) < 2 or not common:
        return {}
    return {steps: {seed: of[seed] for seed in sorted(common)} for steps, of in gaps.items()}


def order(place: Place, gaps: dict[int, dict[int, float]]) -> tuple[str, float, float]:
    """Tasks and sparsities in turn, within them the best after most steps first."""
    return place[0], place[1], -statistics.mean(gaps[max(gaps)].values())
