"""What a Trainer shows of pruning: steps in its bar and log; curves and figures in its loggers."""

from __future__ import annotations

import logging
import math
import sys
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_mi_prune.core.errors import PruningWarning
from lightning_mi_prune.core.progress import LOGGED, SILENT, Display, Step
from lightning_mi_prune.reporting.plots import heatmap, kept_units
from lightning_mi_prune.reporting.report import PruningReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "FitDisplay",
    "RichTasks",
    "TqdmBars",
    "display_for",
    "figures_of",
    "log_figures",
    "log_start",
    "print_above",
    "show_info",
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


def show_info(trainer: pl.Trainer, text: str) -> None:
    """Log a message of rank 0 above the bars of the Trainer.

    A handler of the log knows nothing of the bars of rich, and would write into them: there the
    message is printed, and goes to the log of the package.

    Args:
        trainer: The trainer.
        text: The message.
    """
    live = _live_bars(trainer)
    if live is not None and trainer.is_global_zero:
        _print_above_live(live, text)
        _log.info("%s", text)
        return
    with Tqdm.external_write_mode():
        rank_zero_info(text)


def print_above(trainer: pl.Trainer, text: str) -> None:
    """Print a text above the bars of the Trainer.

    Args:
        trainer: The trainer.
        text: The text.
    """
    live = _live_bars(trainer)
    if live is not None:
        _print_above_live(live, text)
        return
    with Tqdm.external_write_mode():
        print(text)  # noqa: T201


def _live_bars(trainer: pl.Trainer) -> Any:
    """The ``Progress`` of a RichProgressBar that is on a screen now, or None."""
    bar = trainer.progress_bar_callback
    if not isinstance(bar, RichProgressBar) or bar.is_disabled or bar.progress is None:
        return None
    progress = bar.progress
    shown = progress.console.is_terminal or progress.console.is_jupyter
    return progress if shown and progress.live.is_started else None


def _print_above_live(progress: Any, text: str) -> None:
    # The thread of Lightning that draws takes this lock too, or would draw in the middle.
    with getattr(progress.live, "_lock", nullcontext()):
        progress.console.print(text, highlight=False, markup=False, soft_wrap=True)


class FitDisplay:
    """A bar of the Trainer's own kind for every step that runs, and a line when it is over.

    There are bars where the Trainer has an enabled RichProgressBar or TQDMProgressBar on a terminal
    or in a notebook.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._bars: RichTasks | TqdmBars | None = None
        bar = trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            self._bars = RichTasks(trainer)
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
        if not step.failed:
            show_info(self._trainer, str(step))


class RichTasks:
    """Tasks in the ``Progress`` of a RichProgressBar.

    That finds its own tasks by their place, so none is ever removed: they are hidden and used
    again.

    Args:
        trainer: The trainer that has such a bar.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer = trainer
        self._progress: Any = None  # the one that holds our tasks; with leave=True each epoch's own
        self._free: dict[bool, list[Any]] = {}
        self._tasks: dict[Step, tuple[Any, Any]] = {}

    def begin(self, step: Step) -> None:
        """Show a task."""
        progress, known = _live_bars(self._trainer), step.total is not None
        if progress is None:
            return
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
        self._refresh()

    def advance(self, step: Step) -> None:
        """Move it."""
        progress, task = self._tasks.get(step, (None, None))
        if progress is not None:
            progress.update(task, completed=step.done)
            self._refresh()

    def end(self, step: Step) -> None:
        """Hide it."""
        progress, task = self._tasks.pop(step, (None, None))
        if progress is None:
            return
        progress.update(task, visible=False)
        if progress is self._progress:
            known = math.isfinite(progress.tasks[task].total)
            self._free[known].append(task)
        if step.failed:  # else a line follows, which draws anew
            self._refresh()

    def _refresh(self) -> None:
        bar = self._trainer.progress_bar_callback
        if isinstance(bar, RichProgressBar):
            bar.refresh()


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


def _is_in_notebook() -> bool:
    """Whether the bars of tqdm are widgets."""
    return any(part.__module__ == "tqdm.notebook" for part in Tqdm.__mro__)


def log_start(trainer: pl.Trainer, sizes: Mapping[str, float]) -> None:
    """Begin every curve where training begins, with the model as it is then.

    Args:
        trainer: The trainer.
        sizes: What is logged after every epoch, by name.
    """
    if not trainer.is_global_zero:
        return
    metrics = {f"prune/{name}": float(value) for name, value in sizes.items()}
    metrics["epoch"] = trainer.current_epoch
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def figures_of(report: PruningReport) -> dict[str, Figure]:
    """Figures of what was cut, by name: how alike layers were, and what every layer kept.

    Args:
        report: The report.

    Raises:
        PruningError: If matplotlib is not installed.
    """
    found = {
        f"layers/{stack.name}/epoch {cut.epoch}": heatmap(stack)
        for cut in report.cuts
        for stack in cut.stacks
    }
    if report.groups:
        found["widths"] = kept_units(report.groups)
    return found


def log_figures(trainer: pl.Trainer, report: PruningReport) -> None:
    """Give the figures to the loggers that take some: TensorBoard, Weights & Biases.

    Without matplotlib there are none. What goes wrong is a warning: training is over.

    Args:
        trainer: The trainer.
        report: The report.
    """
    takers = [logger for logger in trainer.loggers if _takes_figures(logger)]
    if not takers or not trainer.is_global_zero or find_spec("matplotlib") is None:
        return
    try:
        figures = figures_of(report)
        for logger in takers:
            for name, figure in figures.items():
                _log_figure(logger, f"prune/{name}", figure, trainer.global_step)
    except Exception as error:  # of a library, or of a server
        warnings.warn(
            f"The figures of pruning could not be logged ({type(error).__name__}: {error}); "
            "report.write keeps what they show.",
            PruningWarning,
            stacklevel=2,
        )


def _takes_figures(logger: Any) -> bool:
    return isinstance(logger, TensorBoardLogger) or hasattr(logger, "log_image")


def _log_figure(logger: Any, name: str, figure: Figure, step: int) -> None:
    if hasattr(logger, "log_image"):
        logger.log_image(key=name, images=[figure])
    else:
        logger.experiment.add_figure(name, figure, global_step=step)
