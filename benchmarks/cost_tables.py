"""Writes the tables of docs/cost.md from the records: ``python -m benchmarks.cost_tables``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["filled", "goals_table", "markdown", "ranks_table", "rivals_table", "scaling_table"]

_RESULTS = Path(__file__).parent / "results"
_PAGE = Path(__file__).parent.parent / "docs" / "cost.md"
_PARTS = {
    "validation": "*validation itself, without us*",
    "listening": "**listening**: hooks and sums",
    "moments": "of which sums",
    "product": "plain product `XᵀX`, float64",
    "product_of_one_triangle": "the same, one triangle (BLAS `dsyrk`)",
    "product_float32": "plain product, float32",
    "scores": "**scores** `I(xᵢ; Y)` from the sums",
    "scores_of_covariances": "of which scores from covariances",
    "log_det": "a log-determinant a neuron, covariances given",
    "log_det_of_samples": "a covariance and a log-determinant a neuron",
    "neighbours_one_readout": "scikit-learn, neurons with one read-out",
    "neighbours_all_readouts": "scikit-learn, neurons with every read-out",
    "order": "**whole order** by conditional information, and its losses",
    "fold_in": "**fold-in** of half of the units",
    "cut": "**cut** (of a copy)",
    "gradients": "gradients of as many batches",
    "taylor_step": "torch-pruning: Taylor importance and cut (of a copy)",
}
# Label, part above the line, part below it, and what was aimed at.
_GOALS = (
    ("sums, in plain products (float64)", "moments", "product", "at most 2"),
    ("sums, in products of one triangle", "moments", "product_of_one_triangle", "at most 2"),
    ("listening, in plain products", "listening", "product", ""),
    (
        "log-determinants, in scores from covariances",
        "log_det",
        "scores_of_covariances",
        "at least 100",
    ),
    ("log-determinants, in scores from the sums", "log_det", "scores", "at least 100"),
    ("log-determinants, in whole orders", "log_det", "order", ""),
    ("log-determinants of samples, in whole orders", "log_det_of_samples", "order", ""),
    (
        "scikit-learn with one read-out, in scores from the sums",
        "neighbours_one_readout",
        "scores",
        "",
    ),
)


def machine_line(body: Mapping[str, Any]) -> str:
    """What was measured on, and how."""
    found, settings = body["machine"], body["settings"]
    load = "while other work ran" if found["busy"] else "with nothing else running"
    return (
        f"{found['cpu']}, {found['threads']} of {found['cores']} cores, torch {found['torch']}, "
        f"{load}; median of {settings['repeats']}."
    )


def rivals_table(body: Mapping[str, Any]) -> list[str]:
    """Seconds and memory of every part, ours in bold; medians."""
    records = body["records"]
    names = [record["shape"] for record in records]
    columns = [f"{name}, {unit}" for name in names for unit in ("s", "CPU s", "peak MB")]
    rows = [_row(["", *columns, "measured"]), "|---" + "|---:" * len(columns) + "|---|"]
    for part, label in _PARTS.items():
        cells = [label]
        for record in records:
            found = record["parts"][part]
            cells += [_digits(found[key]["median"]) for key in ("wall_s", "cpu_s", "peak_mb")]
        rows.append(_row([*cells, _share(records[-1]["parts"][part])]))
    return rows


def _share(part: Mapping[str, Any]) -> str:
    """How much of a part was measured."""
    for key, value in part.items():
        if key.startswith("timed_"):
            unit = key.removeprefix("timed_")
            return f"{value:,} of {part[unit]:,} {unit.replace('_', ' ')}"
    return "all"


def ratio(record: Mapping[str, Any], ours: str, theirs: str, clock: str = "cpu_s") -> float:
    """Seconds of one part in seconds of another, by their medians."""
    parts = record["parts"]
    return float(parts[ours][clock]["median"] / max(parts[theirs][clock]["median"], 1e-9))


def goals_table(body: Mapping[str, Any]) -> list[str]:
    """Ratios between parts, by the seconds of the processor and of the clock."""
    records = body["records"]
    columns = [f"{r['shape']}, {clock}" for r in records for clock in ("CPU", "clock")]
    rows = [_row(["", *columns, "goal"]), "|---" + "|---:" * len(columns) + "|---|"]
    for label, ours, theirs, goal in _GOALS:
        values = [ratio(r, ours, theirs, c) for r in records for c in ("cpu_s", "wall_s")]
        rows.append(_row([label, *map(_digits, values), goal]))
    return rows


def scaling_table(body: Mapping[str, Any]) -> list[str]:
    """Exponents of growth, with the seconds they were fitted to."""
    rows = [
        "| grows | from .. to | what | CPU s | exponent, CPU | exponent, clock |",
        "|---|---|---|---:|---:|---:|",
    ]
    for grows, sweep in body["sweeps"].items():
        sizes = sweep["sizes"]
        for part, found in sweep["parts"].items():
            seconds = [each["cpu_s"]["median"] for each in found["costs"]]
            rows.append(
                _row(
                    [
                        grows.replace("_", " "),
                        f"{sizes[0]:,} .. {sizes[-1]:,}",
                        part.replace("_", " "),
                        f"{_digits(seconds[0])} .. {_digits(seconds[-1])}",
                        *(f"{found['exponent'][clock]:.2f}" for clock in ("cpu_s", "wall_s")),
                    ]
                )
            )
    return rows


def ranks_table(body: Mapping[str, Any]) -> list[str]:
    """What a cut sends, by number of ranks."""
    rows = ["| shapes | ranks | all-reduces | MB a rank sends |", "|---|---:|---:|---:|"]
    for found in body["ranks"]:
        cells = [found["shape"], found["ranks"], found["all_reduces"]]
        rows.append(_row([*map(str, cells), _digits(found["sent_mb"])]))
    return rows


def markdown(rivals: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, str]:
    """All tables of docs/cost.md by name."""
    tables = {
        "rivals": rivals_table(rivals),
        "goals": goals_table(rivals),
        "scaling": scaling_table(scaling),
        "ranks": ranks_table(scaling),
    }
    found = {name: "\n".join(rows) for name, rows in tables.items()}
    return {"machine": machine_line(rivals), **found, "scaling machine": machine_line(scaling)}


def _digits(value: float) -> str:
    """Three digits, thousands apart."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def filled(page: str, tables: Mapping[str, str]) -> str:
    r"""A page with the tables between the comments that name them.

    Example:
        >>> filled("<!-- a -->\nold\n<!-- / -->", {"a": "new"})
        '<!-- a -->\nnew\n<!-- / -->'
    """
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", "\n<!-- / -->"
        before, _, rest = page.partition(start)
        page = before + start + table + end + rest.partition(end)[2]
    return page


def main() -> None:
    """Put the tables of the records into the page."""
    bodies = [
        json.loads((_RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("rival_costs", "scaling")
    ]
    page = _PAGE.read_text(encoding="utf-8")
    _PAGE.write_text(filled(page, markdown(*bodies)), encoding="utf-8")


if __name__ == "__main__":
    main()
