"""Text files that are written completely or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "check_writable",
    "write_whole",
]


def write_whole(path: str | Path, text: str, what: str) -> None:
    """Replace a text file in one step: after a crash it has its old content.

    Args:
        path: The file; missing folders are created.
        text: Its new content.
        what: Name of the content in the error message.

    Raises:
        PruningError: If the file cannot be written.
    """
    target = Path(path)
    with _refusing(target, what):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _draft(target.parent) as draft:
            draft.write_text(text, encoding="utf-8")
            draft.replace(target)


def check_writable(path: str | Path, what: str) -> None:
    """Refuse a path that :func:`write_whole` could not write to.

    A temporary file is written and removed, in the lowest folder of the path that exists.

    Args:
        path: The file.
        what: Name of the content in the error message.

    Raises:
        PruningError: If the file could not be written.
    """
    target = Path(path)
    with _refusing(target, what):
        if target.exists() and not target.is_file():
            raise OSError(None, "it is a folder" if target.is_dir() else "it is not a regular file")
        folder, missing = target.parent, [target.name]
        while not folder.exists() and folder != folder.parent:
            folder, missing = folder.parent, [folder.name, *missing]
        for name in missing:  # fails for names that the disk refuses
            with suppress(FileNotFoundError):
                os.lstat(folder / name)
        with _draft(folder) as draft:
            draft.write_text("draft", encoding="utf-8")


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """An unused path for a temporary file, which is removed afterwards."""
    draft = folder / f".{uuid4().hex[:16]}.tmp"
    try:
        yield draft
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


@contextmanager
def _refusing(target: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise PruningError(
            f"{what} cannot be written to {target} ({reason}); expected a path to a file in a "
            "folder that can be written to."
        ) from error
