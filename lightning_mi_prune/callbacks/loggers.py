"""Curves and figures for the loggers of the Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mi_prune.core.errors import PruningWarning
from lightning_mi_prune.reporting.plots import heatmap, kept_units
from lightning_mi_prune.reporting.report import PruningReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "figures_of",
    "log_figures",
    "log_start",
]


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
        logger.log_image(key=name, images=[_pixels(figure)])
    else:
        logger.experiment.add_figure(name, figure, global_step=step)


def _pixels(figure: Figure) -> Any:
    """The picture ``(height, width, 3)`` as an array of bytes."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
