"""Progress: long loops show how far they are to whoever shows it, and log how long they took.

A loop runs in :func:`progress_step` and calls :meth:`Step.advance`. Who shows it is chosen by the
caller, with :func:`showing`: the progress bar of a Trainer, a terminal, or nothing but the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from lightning_mi_prune.core.errors import counted

__all__ = [
    "LOGGED",
    "SILENT",
    "Display",
    "Step",
    "begin_step",
    "is_shown",
    "progress_step",
    "showing",
]

_log = logging.getLogger(__name__)
_PLURALS = {"batch": "batches"}


class Display(Protocol):
    """Shows steps; each one begins once, advances, and ends once, also after an error."""

    def begin(self, step: Step) -> None:
        """A step begins."""

    def advance(self, step: Step) -> None:
        """A step has done more."""

    def end(self, step: Step) -> None:
        """A step is over; it :attr:`~Step.failed` where an error ended it."""


@dataclass(eq=False)
class Step:
    """One long loop.

    Args:
        name: What is done, such as ``"ranking"``.
        unit: What is counted, in the singular.
        total: How many there are; None where that is not known.
        display: Who shows it.

    Attributes:
        done: How many are done.
        seconds: Time that it took; 0 until it is over.
        failed: Whether an error ended it.

    Example:
        >>> step = Step("ranking", "group", 2, SILENT)
        >>> step.advance()
        >>> step.advance()
        >>> step.end(seconds=0.25)
        >>> str(step)
        'Ranking: 2 groups in 0.2 s'
    """

    name: str
    unit: str
    total: int | None
    display: Display
    done: int = 0
    seconds: float = 0.0
    failed: bool = False
    _started: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        number = counted(self.done, self.unit, _PLURALS.get(self.unit))
        return f"{self.name.capitalize()}: {number} in {self.seconds:.1f} s"

    def advance(self, count: int = 1) -> None:
        """More is done."""
        self.done += count
        self.display.advance(self)

    def stop_early(self) -> None:
        """What is done is enough, whatever the total was."""
        self.total = self.done

    def end(self, *, seconds: float | None = None, failed: bool = False) -> None:
        """The loop is over.

        Args:
            seconds: What it took, where that is not all the time since it began.
            failed: Whether an error ended it.
        """
        self.seconds = time.perf_counter() - self._started if seconds is None else seconds
        self.failed = failed
        self.display.end(self)


class _Silent:
    """Shows nothing, as on all ranks but the first."""

    def begin(self, step: Step) -> None:
        pass

    def advance(self, step: Step) -> None:
        pass

    def end(self, step: Step) -> None:
        pass


class _Logged(_Silent):
    """Writes a line into the log of the package for every step that is done."""

    def end(self, step: Step) -> None:
        if not step.failed:
            _log.info("%s", step)


SILENT: Display = _Silent()
"""Shows nothing."""

LOGGED: Display = _Logged()
"""Writes a line into the log of the package (level INFO) for every step that is done."""

_shown: ContextVar[Display | None] = ContextVar("lightning_mi_prune_progress", default=None)


def is_shown() -> bool:
    """Whether a caller chose who shows the steps."""
    return _shown.get() is not None


@contextmanager
def showing(display: Display) -> Iterator[None]:
    """A block whose steps are shown by ``display``.

    Args:
        display: Who shows them.
    """
    token = _shown.set(display)
    try:
        yield
    finally:
        _shown.reset(token)


def begin_step(name: str, unit: str, total: int | None = None) -> Step:
    """Begin a step that the caller ends.

    Args:
        name: What is done.
        unit: What is counted, in the singular.
        total: How many there are, if that is known.
    """
    step = Step(name, unit, total, _shown.get() or LOGGED)
    step.display.begin(step)
    return step


@contextmanager
def progress_step(name: str, unit: str, total: int | None = None) -> Iterator[Step]:
    """A block that is one step.

    Args:
        name: What is done.
        unit: What is counted, in the singular.
        total: How many there are, if that is known.

    Example:
        >>> with progress_step("ranking", "group", total=2) as step:
        ...     for _ in range(2):
        ...         step.advance()
        >>> step.done
        2
    """
    step = begin_step(name, unit, total)
    try:
        yield step
    except BaseException:
        step.end(failed=True)
        raise
    step.end()
