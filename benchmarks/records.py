"""The record format of all benchmarks: one JSON object a line, one file a case."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["FOLDER", "Figures", "Job", "Record", "Store", "cpu_name", "key_of", "single"]

FOLDER = Path(__file__).parent / "records"
Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What was measured, of what, and where.

    Args:
        case: Name of the benchmark.
        setting: What was measured; with the seed it identifies a record of its case.
        seed: Seed of the data and the model.
        figures: The results.
        machine: What seconds depend on: processor, threads.
        versions: Of Python and torch.
    """

    case: str
    setting: Mapping[str, Any]
    seed: int
    figures: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        """A figure, a part of the setting, or the seed.

        Raises:
            KeyError: If the record has no field of this name.
        """
        if name == "seed":
            return self.seed
        return self.figures[name] if name in self.figures else self.setting[name]

    def get(self, name: str) -> Any:
        """The same; None where the record has no such field."""
        return self[name] if name in {*self.figures, *self.setting, "seed"} else None


class Job(NamedTuple):
    """Something to measure: one record, or several that can only be measured together.

    Args:
        settings: What is measured.
        seed: Seed of the data and the model.
        run: Measures it and returns the figures of every setting.
    """

    settings: Sequence[Mapping[str, Any]]
    seed: int
    run: Callable[[], Sequence[Figures]]


def single(setting: Mapping[str, Any], run: Callable[..., Figures], *given: Any) -> Job:
    """A job of one record: what it is about, a function and its arguments.

    The seed is taken out of the setting.
    """
    about = {name: value for name, value in setting.items() if name != "seed"}
    return Job([about], setting.get("seed", 0), lambda: [run(*given)])


def key_of(setting: Mapping[str, Any], seed: int) -> str:
    """A setting and a seed as text."""
    return json.dumps([setting, seed], sort_keys=True)


class Store:
    """The records of one case; new ones are appended.

    Of two with the same setting and seed, the later one counts.

    Args:
        case: Name of the benchmark.
        folder: Where the files of records are.
    """

    def __init__(self, case: str, folder: Path = FOLDER) -> None:
        self.case, self.folder = case, folder
        self.path = folder / f"{case}.jsonl"
        self._records: dict[str, Record] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                found = Record(**json.loads(line))
                self._records[key_of(found.setting, found.seed)] = found

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def has(self, setting: Mapping[str, Any], seed: int = 0) -> bool:
        """Whether there is a record of a setting and a seed."""
        return key_of(setting, seed) in self._records

    def find(self, **fields: Any) -> list[Record]:
        """The records whose fields have these values."""
        return [r for r in self if all(r.get(name) == value for name, value in fields.items())]

    def add(self, setting: Mapping[str, Any], seed: int, figures: Figures) -> None:
        """Append what this machine measured, in one write: other processes may append as well."""
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        new = Record(self.case, setting, seed, figures, machine, versions)
        self._records[key_of(setting, seed)] = new
        line = json.dumps(asdict(new), separators=(",", ":")) + "\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())


def cpu_name() -> str:
    """Model of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
