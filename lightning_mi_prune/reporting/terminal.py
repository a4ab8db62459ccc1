"""The steps of pruning as bars of a terminal, where no Trainer shows them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning_mi_prune.core.progress import LOGGED, Step, is_shown, showing

__all__ = [
    "showing_in_terminal",
]

_SECONDS = 0.1  # between two pictures


@contextmanager
def showing_in_terminal(*, verbose: bool = True) -> Iterator[None]:
    """A block whose steps are bars on the error stream, each with its time when it is over.

    Only on a terminal, with rich, and where nothing else shows them already; the log of the package
    has a line for every step in any case.

    Args:
        verbose: Whether there are bars.

    Example:
        >>> from lightning_mi_prune.core.progress import progress_step
        >>> with showing_in_terminal(verbose=False), progress_step("ranking", "group", 1) as step:
        ...     step.advance()
    """
    bars = _bars() if verbose and not is_shown() else None
    if bars is None:
        yield
        return
    display = _Bars(bars)
    try:
        with showing(display):
            yield
    finally:
        bars.stop()


def _bars() -> Any:
    """The bars of rich; None where there is no terminal, or no rich."""
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError:
        return None
    # No thread draws them, which would disturb the measuring of latencies.
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[counted]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
    )


class _Bars:
    """Shows steps as tasks of rich, which start with the first step."""

    def __init__(self, bars: Any) -> None:
        self._bars, self._drawn = bars, 0.0
        self._tasks: dict[Step, Any] = {}

    def begin(self, step: Step) -> None:
        self._bars.start()
        name = step.name.capitalize()
        self._tasks[step] = self._bars.add_task(name, total=step.total, counted=_counted(step))
        self._draw()

    def advance(self, step: Step) -> None:
        if time.monotonic() - self._drawn >= _SECONDS:
            self._update(step)
            self._draw()

    def end(self, step: Step) -> None:
        if step.total is None and not step.failed:
            self._bars.update(self._tasks[step], total=step.done)
        self._update(step)
        self._bars.stop_task(self._tasks.pop(step))
        self._draw()
        LOGGED.end(step)

    def _update(self, step: Step) -> None:
        self._bars.update(self._tasks[step], completed=step.done, counted=_counted(step))

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._bars.refresh()


def _counted(step: Step) -> str:
    return f"{step.done}" if step.total is None else f"{step.done}/{step.total}"
