"""Files that are written whole or not at all."""

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
    """Write a text file, or nothing: a crash leaves what was there, a failure no draft.

    Args:
        path: The file; folders are made.
        text: What it will hold.
        what: What that is, for the error.

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
    """Refuse a path that :func:`write_whole` could not write to; nothing stays behind.

    A draft is written and removed, beside the file or in the lowest folder above it that exists.

    Args:
        path: The file.
        what: What will be written, for the error.

    Raises:
        PruningError: If the file could not be written.
    """
    target = Path(path)
    with _refusing(target, what):
        if target.exists() and not target.is_file():
            raise OSError(None, "it is a folder" if target.is_dir() else "it is no regular file")
        folder, missing = target.parent, [target.name]
        while not folder.exists() and folder != folder.parent:
            folder, missing = folder.parent, [folder.name, *missing]
        for name in missing:  # too long a name, or one with characters that the disk refuses
            with suppress(FileNotFoundError):
                os.lstat(folder / name)
        with _draft(folder) as draft:
            draft.write_text("draft", encoding="utf-8")


@contextmanager
def _draft(folder: Path) -> Iterator[Path]:
    """A path for a draft that nobody else uses, and that is gone afterwards."""
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
