"""The table of docs/ablations.md, from the records."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from examples.benchmark.page import rewritten
from examples.benchmark.records import Key, Record
from examples.benchmark.settings import DEFAULT, rows
from examples.benchmark.tables import difference

PAGE = Path("docs", "ablations.md")
BEGIN = "<!-- From here on: written by python -m examples.benchmark.ablations --page -->"
END = "<!-- Until here. -->"
IDENTITY = ("task", "target_sparsity", "setting", "seed")
COLUMNS = (
    "setting | seeds | rise of cross-entropy | to default | accuracy | to default | MACs | CPU s"
)


def key_of(record: Record) -> Key:
    """What a record is about; there is one record of each."""
    return tuple(record[name] for name in IDENTITY)


def rise(record: Record) -> float:
    """Cross-entropy more than that of the dense model, in nats."""
    return float(record["cross_entropy"] - record["dense_cross_entropy"])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the range where there are several."""
    mean = f"{statistics.mean(values):+.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):+.{digits}f} .. {max(values):+.{digits}f})"


def table(records: Sequence[Record]) -> list[str]:
    """One task and sparsity: a row a setting, removed ones too."""
    lines = [f"| {COLUMNS} |", "|---" * (COLUMNS.count("|") + 1) + "|"]
    by_setting = {name: {r["seed"]: r for r in records if r["setting"] == name} for name in rows()}
    default = by_setting[DEFAULT.name]
    for name, found in by_setting.items():
        if not found:
            continue
        cells = [name, str(len(found))]
        both = sorted(found.keys() & default.keys()) if name != DEFAULT.name else []
        for value, digits in ((rise, 3), (difference, 2)):
            cells.append(spread([value(record) for record in found.values()], digits))
            gaps = [value(found[seed]) - value(default[seed]) for seed in both]
            cells.append(spread(gaps, digits) if gaps else "")
        work = statistics.mean(r["macs"] / r["dense_macs"] for r in found.values())
        cells.append(f"{work:.0%}")
        cells.append(f"{statistics.mean(r['cpu_seconds'] for r in found.values()):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def written(records: Sequence[Record]) -> list[str]:
    """All that the script writes."""
    lines: list[str] = []
    for task, sparsity in sorted({(r["task"], r["target_sparsity"]) for r in records}):
        same = [r for r in records if (r["task"], r["target_sparsity"]) == (task, sparsity)]
        dense = {r["seed"]: r for r in same}
        accuracy = statistics.mean(r["dense_accuracy"] for r in dense.values())
        nats = statistics.mean(r["dense_cross_entropy"] for r in dense.values())
        lines += [
            *([""] if lines else []),
            f"**{task}, {sparsity:.0%} gone**; dense {accuracy:.2%}, {nats:.3f} nats; "
            f"{same[0]['n_test']} test rows.",
            "",
            *table(same),
        ]
    return lines or ["There are no records yet."]


def rewrite(records: Sequence[Record], page: Path = PAGE) -> None:
    """Write the tables into the page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(rewritten(text, written(records), BEGIN, END), encoding="utf-8")
