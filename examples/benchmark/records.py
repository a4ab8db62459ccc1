"""Where the records of a benchmark are kept: a part for each model, gathered in one list."""

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Key = tuple[Any, ...]

IDENTITY = ("task", "target_sparsity", "method", "widths", "fold_in", "cuts", "seed")


def key_of(record: Record) -> Key:
    """What a record is about; there is one record of each. Without `steps` it is one shot."""
    steps = record.get("steps", 0)
    return *(record[name] for name in IDENTITY), steps, record["learning_rate"] if steps else 0.0


def load(path: Path) -> list[Record]:
    """The records of a file, none where it is not there."""
    if not path.exists():
        return []
    records: list[Record] = json.loads(path.read_text(encoding="utf-8"))
    return records


def write(path: Path, records: Iterable[Record]) -> None:
    """Write a file in one step: whoever reads it sees all of it or what was there before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(list(records), indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def part(folder: Path, name: str, task: str, seed: int) -> Path:
    """The file of one model; processes that run on different models never write the same one."""
    return folder / f"{name}-{task}-{seed}.json"


def known(
    path: Path, results: Path, task: str, seed: int, key: Callable[[Record], Key] = key_of
) -> list[Record]:
    """The records of a model: those of its part, and what the one list holds besides.

    Args:
        path: The part of the model.
        results: The one list, which may have come with the project.
        task: Task of the model.
        seed: Its seed.
        key: What a record is about.
    """
    here = load(path)
    there = {key(record) for record in here}
    besides = [r for r in load(results) if (r["task"], r["seed"]) == (task, seed)]
    return here + [record for record in besides if key(record) not in there]


def gather(
    folder: Path, name: str, results: Path, key: Callable[[Record], Key] = key_of
) -> list[Record]:
    """Merge all parts into the one list; a part wins over what the list says of the same.

    What the list holds of models that have no part here stays, so results that came with the
    project are not lost on a machine that runs only some of it.

    Args:
        folder: Where the parts are.
        name: How their names begin.
        results: The one list.
        key: What a record is about.
    """
    found = {key(record): record for record in load(results)}
    whole = re.compile(rf"{re.escape(name)}-.+-\d+\.json")
    for path in sorted(folder.glob(f"{name}-*.json")):
        if whole.fullmatch(path.name):
            found |= {key(record): record for record in load(path)}
    records = [found[about] for about in sorted(found)]
    if records != load(results):
        write(results, records)
    return records
