"""A report with every section, its page as a tree, and the browsers of this machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.importance.layer_criteria import StackCut
from lightning_mi_prune.importance.stability import Agreement
from lightning_mi_prune.reconstruction.compensation import StandIns
from lightning_mi_prune.reporting.records import Cut, EpochMetrics, GroupCut
from lightning_mi_prune.reporting.report import PruningReport

SECTIONS = {
    "summary": "before",
    "widths": "cuts",
    "sensitivity": "curve",
    "metrics": "history",
    "information": "information_kept",
    "layers": "stacks",
    "stability": "agreement",
    "latency": "latency_ms",
    "cost": "seconds",
    "plan": "plan",
    "left-out": "left_out",
    "versions": "versions",
}
"""Sections of the page, and the entry of the JSON that each shows."""

BAD = '<script>alert("x")</script> & $\\frac{1}{2}$ \x07\u202e'
"""A name that is markup, a formula, and characters that cannot be printed."""

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--hide-scrollbars --enable-logging=stderr --allow-file-access-from-files"
)


def group(layer: int, kind: str, size: int, kept: int) -> GroupCut:
    """A group of which the last units go."""
    order = (*range(kept, size), *range(kept))
    curve = tuple(round(0.01 * (layer + 1) * step**2, 6) for step in range(1, size + 1))
    return GroupCut(
        f"net.layers.{layer}.{kind}",
        kind,
        size,
        kept,
        3.25,
        0.875,
        Ranking(order, curve, curve),
        StandIns(tuple(range(kept, size)), (0.5,) * (size - kept), (0,) * (size - kept)),
        Agreement(size, kept, kept // 2) if kept < size else None,
    )


def whole_report() -> PruningReport:
    """Layers, then units in two cuts, and one that was rolled back."""
    alike = ((1.0, 0.99, -0.05), (0.99, 1.0, 0.4), (-0.05, 0.4, 1.0))
    stack = StackCut("net.layers", (0, 1, 2), (0, 2), alike, ((0, 1), (2,)), "cka", 0.98)
    seconds = {"calibration": 1.5, "ranking": 2.25, "surgery": 0.125}
    sizes = {"ffn": 40, "heads": 8}
    first, second = (
        tuple(group(i, kind, sizes[kind] // part, sizes[kind] // part // 2)
              for i in (0, 2) for kind in sizes)
        for part in (1, 2)
    )  # fmt: skip
    cuts = [
        Cut(1, 1 / 3, 80_000, 60_000, 900_000, (), seconds, (stack,)),
        Cut(2, 0.5, 60_000, 40_000, 600_000, first, seconds, (), 0.9375),
        Cut(3, 0.75, 40_000, 20_000, 300_000, second, seconds, (), 0.8125),
    ]
    history = [EpochMetrics(e, {"val_acc": 0.5 + e / 16, "val_loss": 2 - e / 8}) for e in range(5)]
    return PruningReport(
        100_000,
        80_000,
        1_200_000,
        cuts=cuts,
        undone=[replace(cuts[2], epoch=4)],
        left_out=["net.odd: no operator is known"],
        history=history,
        monitor="val_acc",
        versions={"torch": "2.9.0"},
    )


def measured() -> dict[str, Any]:
    """What a program adds that measured both models."""
    sides = []
    for factor in (2.0, 1.0):
        latency = [
            {"batch_size": b, "sequence_length": 32, "median": factor * b, "machine": "a CPU"}
            for b in (1, 8)
        ]
        sides.append({"metrics": {"accuracy": 0.5 + factor / 8}, "latency_ms": latency})
    return {"before": sides[0], "after": {**sides[1], "fit_seconds": 60.5}}


def numbers_in(value: Any) -> Iterator[float]:
    """All numbers of a JSON document."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers_in(part)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def shown_in(page: str) -> list[tuple[float, str]]:
    """Numbers of the tables of a page: as the JSON has them, and as they are read."""
    cells = re.findall(r'<td class="n" data-value="([^"]*)">([^<]*)</td>', page)
    return [(float(value), text) for value, text in cells]


def browser() -> str | None:
    """Chromium or Chrome, if it is installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if (path := shutil.which(name))), None)


def opened(path: Path, profile: Path, *options: str) -> tuple[str, list[str]]:
    """The page as a headless browser without a network shows it, and lines of its console."""
    found = subprocess.run(
        [
            str(browser()),
            *_FLAGS.split(),
            f"--user-data-dir={profile}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *options,
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return found.stdout, [line for line in found.stderr.splitlines() if "CONSOLE" in line]


def screenshot(path: Path) -> None:
    """The start of the page: python -m tests.support.pages docs/figures/report.png."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        whole_report().write(page, measured())
        flags = [*_FLAGS.split(), f"--user-data-dir={folder}/profile", "--window-size=1100,1240"]
        command = [str(browser()), *flags, f"--screenshot={path.resolve()}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    screenshot(Path(sys.argv[1]))
