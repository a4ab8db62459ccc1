"""What holds for every input of a reader: its error, its time, its memory, the files beside it."""

from __future__ import annotations

import os
import random
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded

from lightning_mi_prune import PruningError

INPUTS = int(os.environ.get("FUZZ", "0"))  # of all readers together; 0 for a few that never change
SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(2**32))

_SECONDS = 30  # a reader that takes longer hangs
_RESIDENT = 64 * 2**20  # bytes, beside ten times the input
_CLAIMED = 2**30
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

counts: dict[str, list[int]] = {}  # inputs, and those that were accepted, by reader


def fuzzed(share: float, few: int) -> Callable[[Any], Any]:
    """A test of a share of all inputs, or of a few that are the same at every run."""

    def decorate(test: Any) -> Any:
        quiet = {
            "deadline": None,  # _within counts: the machine may be busy
            "database": None,
            "suppress_health_check": list(HealthCheck),
            "print_blob": True,
            "phases": (Phase.explicit, Phase.generate),  # inputs are small changes already
        }
        if INPUTS:
            return seeded(SEED)(settings(max_examples=max(1, int(share * INPUTS)), **quiet)(test))
        return settings(max_examples=few, derandomize=True, **quiet)(test)

    return decorate


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything below a folder."""
    return {
        str(path): (path.lstat().st_size if path.is_file() else 0, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def check(
    reader: str,
    size: int,
    read: Callable[[], Any],
    sound: Callable[[Any], None],
    unchanged: Callable[[], None] = lambda: None,
    *,
    errors: tuple[type[Exception], ...] = (),
    watched: Path | None = None,
) -> None:
    """Read an input: it is accepted and sound, or refused in a sentence, and leaves no trace.

    Args:
        reader: Its name, for the counts.
        size: Bytes of the input.
        read: Reads it.
        sound: Asserts that what was read is right.
        unchanged: Asserts that what was there before a refusal is still there.
        errors: Errors of other libraries that the reader documents.
        watched: Folder in which no file may change.
    """
    before = listing(watched) if watched is not None else {}
    inputs = counts.setdefault(reader, [0, 0])
    inputs[0] += 1
    result, refusal = None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _within(_SECONDS), _bounded(size):
            try:
                result = read()
            except (PruningError, *errors) as error:
                refusal = error
        if refusal is None:
            inputs[1] += 1
            sound(result)
        else:
            _check_sentence(refusal)
            unchanged()
    assert watched is None or listing(watched) == before


_REMEDY = re.compile(
    r"expected|was it (edited|replaced)|this package reads|plan again|"
    r"\b(save|take|give|build|open|load|write|measure|"
    r"correct|copy|sort|delete|leave|tokenize|see|did you mean|set|pass|allow)\b",
    re.IGNORECASE,
)


def _check_sentence(error: Exception) -> None:
    """The message is short, and ours is one line with a remedy."""
    message = str(error)
    assert 10 < len(message) < 4000, message[:500]
    if isinstance(error, PruningError):
        assert "\n" not in message, message[:500]
        assert _REMEDY.search(message), message[:500]


@contextmanager
def _within(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _bounded(size: int) -> Iterator[None]:
    """The memory of the process grows by a bounded amount, also for a moment."""
    if not _CLEAR.exists():
        yield
        return
    _CLEAR.write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = _memory()
    yield
    after = _memory()
    grown = (after["VmHWM"] - before["VmRSS"]) * 1024
    assert grown < _RESIDENT + 10 * size, f"{grown} bytes for an input of {size}"
    if after["VmPeak"] > before["VmPeak"]:
        claimed = (after["VmPeak"] - before["VmSize"]) * 1024
        assert claimed < _CLAIMED + 10 * size, f"{claimed} bytes claimed for an input of {size}"


def _memory() -> dict[str, int]:
    lines = (line.split() for line in _STATUS.read_text(encoding="ascii").splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[0].startswith("Vm")}
