"""The steps of pruning in the progress bar of the Trainer, and in its log."""

from __future__ import annotations

import logging
import math
import sys
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_info

from lightning_mi_prune.core.progress import LOGGED, SILENT, Display, Step

__all__ = [
    "FitDisplay",
    "RichTasks",
    "TqdmBars",
    "display_for",
]

_log = logging.getLogger(__name__)


def display_for(trainer: pl.Trainer, *, verbose: bool) -> Display:
    """Who shows the steps of a fit: rank 0 alone, beside the bar that the Trainer has.

    Args:
        trainer: The trainer.
        verbose: Whether there are bars and lines; without, there is only the log of the package.
    """
    if not trainer.is_global_zero:
        return SILENT
    return FitDisplay(trainer) if verbose else LOGGED


class FitDisplay:
    """A bar of the Trainer's own kind for every step that runs, and a line when it is over.

    There are bars where the Trainer has an enabled RichProgressBar or TQDMProgressBar on a terminal
    or in a notebook.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._bars: RichTasks | TqdmBars | None = None
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            self._bars = RichTasks(bar)
        elif isinstance(bar, TQDMProgressBar):
            self._bars = TqdmBars(bar)

    def begin(self, step: Step) -> None:
        """Show a bar."""
        if self._bars is not None:
            self._bars.begin(step)

    def advance(self, step: Step) -> None:
        """Move it."""
        if self._bars is not None:
            self._bars.advance(step)

    def end(self, step: Step) -> None:
        """Take the bar down; write what was done and how long it took."""
        if self._bars is not None:
            self._bars.end(step)
        if step.failed:
            return
        if self._bars is None:
            rank_zero_info(str(step))
        else:
            self._bars.write(str(step))


class RichTasks:
    """Tasks in the ``Progress`` of a RichProgressBar.

    That finds its own tasks by their place, so none is ever removed: they are hidden and used
    again.

    Args:
        bar: The bar.
    """

    def __init__(self, bar: RichProgressBar) -> None:
        self._bar = bar
        self._progress: Any = None  # the one that holds our tasks; with leave=True each epoch's own
        self._free: dict[bool, list[Any]] = {}
        self._tasks: dict[Step, tuple[Any, Any]] = {}

    @property
    def _is_live(self) -> bool:
        progress = self._bar.progress
        if self._bar.is_disabled or progress is None or not progress.live.is_started:
            return False
        return bool(progress.console.is_terminal or progress.console.is_jupyter)

    def begin(self, step: Step) -> None:
        """Show a task."""
        if not self._is_live:
            return
        progress: Any = self._bar.progress
        known = step.total is not None
        if progress is not self._progress:
            self._progress, self._free = progress, {True: [], False: []}
        total = math.inf if step.total is None else step.total
        if self._free[known]:
            task = self._free[known].pop()
            progress.reset(
                task, description=step.name.capitalize(), total=total, completed=0, visible=True
            )
        else:
            task = progress.add_task(step.name.capitalize(), total=total)
        self._tasks[step] = progress, task
        self._bar.refresh()

    def advance(self, step: Step) -> None:
        """Move it."""
        progress, task = self._tasks.get(step, (None, None))
        if progress is not None:
            progress.update(task, completed=step.done)
            self._bar.refresh()

    def end(self, step: Step) -> None:
        """Hide it."""
        progress, task = self._tasks.pop(step, (None, None))
        if progress is None:
            return
        progress.update(task, visible=False)
        if progress is self._progress:
            known = math.isfinite(progress.tasks[task].total)
            self._free[known].append(task)
        self._bar.refresh()

    def write(self, line: str) -> None:
        """Write a line above the bars: a handler of the log would write into them."""
        if self._is_live:
            self._bar.progress.console.print(line, highlight=False)  # type: ignore[union-attr]
            _log.info("%s", line)
        else:
            rank_zero_info(line)


class TqdmBars:
    """Bars below those of a TQDMProgressBar.

    Args:
        bar: The bar of the Trainer.
    """

    def __init__(self, bar: TQDMProgressBar) -> None:
        self._bar = bar
        self._bars: dict[Step, Tqdm] = {}

    def begin(self, step: Step) -> None:
        """Show a bar."""
        if self._bar.is_disabled or not (sys.stdout.isatty() or _is_in_notebook()):
            return
        self._bars[step] = Tqdm(
            desc=step.name.capitalize(),
            total=step.total,
            position=2 * self._bar.process_position + 2 + len(self._bars),
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self._bar.BAR_FORMAT,
        )

    def advance(self, step: Step) -> None:
        """Move it."""
        if step in self._bars:
            self._bars[step].update(step.done - self._bars[step].n)

    def end(self, step: Step) -> None:
        """Take it down."""
        if step in self._bars:
            self._bars.pop(step).close()

    def write(self, line: str) -> None:
        """Write a line through the log of Lightning, on a line of its own."""
        with Tqdm.external_write_mode():
            rank_zero_info(line)


def _is_in_notebook() -> bool:
    """Whether the bars of tqdm are widgets."""
    return any(part.__module__ == "tqdm.notebook" for part in Tqdm.__mro__)
