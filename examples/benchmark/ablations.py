"""What each part of the method is worth: one thing changed at a time, without a training step.

    python -m examples.benchmark.ablations
    python -m examples.benchmark.ablations --tasks trec-6 --seeds 0 --settings default top-k
    python -m examples.benchmark.ablations --page

What a model says is gathered once for all settings that can share it. Records are written one by
one, so a run that is stopped goes on where it was, and processes may share the work by tasks or
seeds. Records that are there, committed ones included, are not measured again. The last line
writes the table of docs/ablations.md.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from examples.benchmark.ablation_tables import key_of, rewrite
from examples.benchmark.finetuned import RECIPES, SEEDS, finetuned
from examples.benchmark.hearing import feel, hear, read
from examples.benchmark.oneshot import FOLDER, Subject, cut, machine, score, tested
from examples.benchmark.options import SPARSITIES, quiet, share
from examples.benchmark.records import Record, gather, known, part, write
from examples.benchmark.settings import DEFAULT, NAMED, Feeling, Hearing, Setting
from lightning_mi_prune import Plan, find_axes
from lightning_mi_prune.axes import count_parameters, full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.costs import measure_macs
from lightning_mi_prune.relevance import GradientSums
from lightning_mi_prune.sample import Heard

NAME = "ablations"
RESULTS = Path(__file__).parent / "results" / "ablations.json"
UNITS = ["ffn", "heads"]


@dataclass(frozen=True)
class Gathered:
    """A dense model, and what was gathered of it, each kind of evidence once.

    Args:
        plain: The model and its tests; what it heard is not looked at.
        heard: Passes by what they gather, with their seconds.
        felt: Gradients by what they are of, and what was felt beside neurons and heads, with
            theirs.
    """

    plain: Subject
    heard: dict[Hearing, tuple[Heard, float]] = field(default_factory=dict)
    felt: dict[tuple[Feeling, tuple[str, ...]], tuple[dict[str, GradientSums], float]] = field(
        default_factory=dict
    )

    def subject(self, setting: Setting) -> Subject:
        """The model with the evidence that a setting asks for."""
        plain, hearing, feeling = self.plain, setting.hearing, setting.feeling
        model, seed, rows = plain.model, plain.seed, plain.validation
        chosen = choose_axes(plain.axes, units=[*UNITS, *hearing.also])
        if hearing not in self.heard:
            sizes = hearing.positions, hearing.calls, seed
            started = time.perf_counter()
            heard = hear(model, chosen, rows, *sizes)
            self.heard[hearing] = heard, time.perf_counter() - started
        about = feeling, hearing.also
        if about not in self.felt:
            started = time.perf_counter()
            if feeling.labels == "readers":
                felt = read(model, chosen)
            else:
                options = {"steps": feeling.steps, "seed": seed}
                felt = dict(feel(model, chosen, rows, labels=feeling.labels, **options))
            self.felt[about] = felt, time.perf_counter() - started
        (heard, listening), (felt, feels) = self.heard[hearing], self.felt[about]
        together = replace(heard, gradients=felt)
        return replace(plain, chosen=chosen, heard=together, seconds=listening + feels)


def prepare(task: str, seed: int) -> Gathered:
    """Open a dense model and test it."""
    model, data = finetuned(task, seed)
    axes = find_axes(model)
    rows, test = [*data.val_dataloader()], [*data.test_dataloader()]
    known = task, seed, model, axes, choose_axes(axes, units=UNITS)
    return Gathered(Subject(*known, Heard(), 0.0, rows, test, *score(model, test)))


def measure(gathered: Gathered, setting: Setting, sparsity: float) -> Record:
    """Prune a copy of the model and test it.

    Args:
        gathered: The dense model and what is known of it.
        setting: How.
        sparsity: Share of the parameters of neurons and heads that must go. Where the stream is cut
            too, as many parameters go of all of them together; where MACs are counted, as many of
            them stay as the default leaves.
    """
    subject = gathered.subject(setting)
    all_of_it = count_parameters(gathered.plain.chosen)
    reach = sparsity * all_of_it / count_parameters(subject.chosen)
    work = measure_macs(subject.model, subject.axes, subject.heard.examples)
    if setting.counted == "MACs":
        _, default = cut(gathered.subject(DEFAULT), replace(DEFAULT, refit=False), sparsity)
        reach = work.total(widths_of(default))
    wall, used = time.perf_counter(), time.process_time()
    model, plan = cut(subject, setting, reach)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    found = tested(subject, model, plan)
    gone = found["dense_parameters"] - found["parameters"]
    return {
        **identity(subject.task, subject.seed, setting, sparsity),
        **found,
        "sparsity": gone / all_of_it,
        "macs": work.total(widths_of(plan)),
        "dense_macs": work.total(widths_of(full_plan(subject.axes))),
        "seconds": wall,
        "cpu_seconds": used,
        "machine": machine(),
    }


def widths_of(plan: Plan) -> dict[str, int]:
    """Units that a plan keeps, by axis name."""
    return {name: plan.width(name) for name in plan.kept}


def identity(task: str, seed: int, setting: Setting, sparsity: float) -> Record:
    """The fields that tell a record from all others."""
    return {"task": task, "seed": seed, "setting": setting.name, "target_sparsity": sparsity}


def run(task: str, seed: int, settings: Sequence[Setting], sparsities: Sequence[float]) -> None:
    """Measure what the records of one model lack; nothing is loaded where they lack nothing."""
    path = part(FOLDER, NAME, task, seed)
    records = known(path, RESULTS, task, seed, key_of)
    there = {key_of(record) for record in records}
    missing = [
        (setting, sparsity)
        for sparsity in dict.fromkeys(sparsities)
        for setting in settings
        if key_of(identity(task, seed, setting, sparsity)) not in there
    ]
    if not missing:
        return
    gathered = prepare(task, seed)
    print(f"{task}, seed {seed}: dense {gathered.plain.accuracy:.2%}", flush=True)
    for setting, sparsity in missing:
        record = measure(gathered, setting, sparsity)
        records.append(record)
        write(path, records)
        rise = record["cross_entropy"] - record["dense_cross_entropy"]
        print(
            f"  {sparsity:.0%} {setting.name}: {record['accuracy']:.2%}, {rise:+.3f} nats, "
            f"{record['seconds']:.0f} s",
            flush=True,
        )


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("examples.benchmark.ablations", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tasks", nargs="+", choices=[*RECIPES], default=["trec-6"], help="default: trec-6")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="default: all")
    add("--sparsities", nargs="+", type=share, default=SPARSITIES, help="default: 0.75 0.9")
    add("--settings", nargs="+", choices=[*NAMED], default=[*NAMED], help="default: all")
    add("--page", action="store_true", help="only write the table into docs/ablations.md")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing, merge all there is into the one list, and write its table."""
    asked = arguments(given)
    quiet()
    if not asked.page:
        for seed in asked.seeds:
            for task in asked.tasks:
                run(task, seed, [NAMED[name] for name in asked.settings], asked.sparsities)
    rewrite(gather(FOLDER, NAME, RESULTS, key_of))


if __name__ == "__main__":
    main()
