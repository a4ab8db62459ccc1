"""Whether a file of ``torch.save`` asks for more memory than it has bytes, before it is opened.

``torch.load(weights_only=True)`` runs no code of a file. But entries of an archive may inflate to
gigabytes, and a pickle of a few bytes may call what allocates any number of them.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.untrusted import described

__all__ = ["check_archive"]

_REPEATED = 8  # bytes in memory for each of the file
_SMALL = 2**20
_LEGACY = 5  # pickles of a file that torch wrote before it wrote archives
_END = struct.Struct("<4s4H2LH")  # the end of an archive
_START = b"PK\3\4"

_DAMAGE = (ValueError, LookupError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)

# What allocates as many bytes or entries as it is given.
_ALLOCATE = ("bytearray", "Tensor", "Storage")


def check_archive(path: str | Path) -> None:
    """Refuse a file of ``torch.save`` that would need far more memory than it has bytes.

    Anything that is no such file is left to ``torch.load``, which refuses it.

    Args:
        path: A local file; nothing happens if there is none.

    Raises:
        PruningError: If an entry inflates, occurs twice or has the name of a path outside, or if
            the pickle asks for memory.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"weight": torch.ones(3)}, file.name)
        ...     check_archive(file.name)
    """
    if not os.path.isfile(path):
        if os.path.exists(path) and not os.path.isdir(path):  # a pipe would never end
            raise PruningError(f"{path} is no regular file; expected a file of torch.save.")
        return
    try:
        with Path(path).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            is_archive = file.read(4) == _START
            file.seek(0)
            for pickled in _pickles_in(file, size) if is_archive else [file] * _LEGACY:
                _check_pickle(pickled, _SMALL + _REPEATED * size)
    except OSError:
        return
    except _DAMAGE as error:
        reason = " ".join(str(error)[:300].split()).rstrip(".")
        raise PruningError(
            f"{path} is not a checkpoint, or it is damaged ({reason}); expected a file of a "
            "Trainer or of torch.save(module.state_dict(), path)."
        ) from error


def _pickles_in(file: IO[bytes], size: int) -> Iterator[IO[bytes]]:
    """The pickle of an archive whose entries are stored as ``torch.save`` stores them."""
    with zipfile.ZipFile(file) as archive:
        _check_end(file, size, archive.start_dir)
        entries = archive.infolist()
        names = [entry.filename.lower() for entry in entries]  # torch finds them in any case
        if len(set(names)) < len(names):
            raise ValueError("an entry occurs twice")
        for entry in entries:
            parts = entry.filename.replace("\\", "/").split("/")
            if ".." in parts or parts[0] == "" or "\0" in entry.orig_filename:
                raise ValueError(f"an entry has the name {described(entry.filename)}")
        held = sum(max(entry.file_size, entry.compress_size) for entry in entries)
        if held > _SMALL + _REPEATED * size:
            raise ValueError(
                f"its entries grow from {counted(size, 'byte')} to {counted(held, 'byte')}"
            )
        for entry in entries:
            if entry.filename.lower().endswith("data.pkl"):
                yield io.BytesIO(archive.read(entry))


def _check_end(file: IO[bytes], size: int, start: int) -> None:
    """The list of entries is where its end points to: torch and :mod:`zipfile` read one list."""
    file.seek(max(0, size - _END.size))
    mark, *_, place, comment = _END.unpack(file.read(_END.size))
    if mark != b"PK\5\6" or comment or place not in (start, 2**32 - 1):
        raise ValueError("it has no end, or another list of entries")


class _Called(str):
    """The name of a class or function of a pickle."""

    __slots__ = ()


@dataclass(frozen=True)
class _Storage:
    """A storage that a pickle refers to, with the number of its entries."""

    entries: int

    @classmethod
    def of(cls, reference: Any) -> _Storage:
        """From ``("storage", type, key, device, entries)``."""
        entries = reference[4] if isinstance(reference, tuple) and len(reference) > 4 else 0
        return cls(max(0, entries) if isinstance(entries, int) else 0)


def _check_pickle(file: IO[bytes], most: int) -> None:
    """Follow a pickle without making anything; torch knows few operations, with few effects.

    Args:
        file: The pickle starts where it is, and it is left where the pickle ends.
        most: Entries that may be asked for.

    Raises:
        ValueError: If the pickle asks for more, or is damaged.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}
    asked = 0
    for operation, value, _ in pickletools.genops(file):
        name = operation.name
        if name in ("GLOBAL", "INST"):
            stack.append(_Called(str(value).replace(" ", ".")))
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"):
            stack.append(value)
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            start = marks.pop()
            stack[start:] = [tuple(stack[start:])]
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo.get(value))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, called = stack.pop(), stack.pop()
            asked += _asked(called, arguments)
            stack.append(None)
        elif name == "BINPERSID":
            storage = _Storage.of(stack.pop())
            asked += storage.entries
            stack.append(storage)
        elif name not in ("PROTO", "STOP", "FRAME"):
            _follow(operation, stack, marks)
        if asked > most:
            raise ValueError(f"it asks for {described(asked)} entries")


def _follow(operation: Any, stack: list[Any], marks: list[int]) -> None:
    """Any other operation: what it takes from the stack goes, what it adds is not looked at."""
    taken, added = list(operation.stack_before), operation.stack_after
    if pickletools.markobject in taken:
        del stack[marks.pop() :]
        taken = taken[: taken.index(pickletools.markobject)]
    if len(taken) > len(stack):
        raise ValueError("its pickle takes more than there is")
    if taken:
        del stack[-len(taken) :]
    stack.extend([None] * len(added))


def _asked(called: Any, arguments: Any) -> int:
    """Entries that a call allocates: the product of the numbers it gets, or what a view needs."""
    if not isinstance(called, _Called) or not isinstance(arguments, tuple):
        return 0
    if called.endswith("._rebuild_from_type_v2") and len(arguments) > 2:
        return _asked(arguments[0], arguments[2])
    if "._rebuild_" in called:
        storage, offset, size, stride = (*arguments, None, None, None, None)[:4]
        return _beyond(storage, offset, size, stride)
    if not called.endswith(_ALLOCATE):
        return 0
    numbers, todo, product = 0, [arguments], 1
    while todo:
        one = todo.pop()
        if isinstance(one, tuple):
            todo.extend(one)
        elif isinstance(one, int):
            numbers, product = numbers + 1, product * max(0, one)
    return product if numbers else 0


def _beyond(storage: Any, offset: Any, size: Any, stride: Any) -> int:
    """Entries to which a tensor would extend its storage."""
    if not isinstance(storage, _Storage) or not isinstance(offset, int):
        return 0
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        return 0
    pairs = list(zip(size, stride))  # noqa: B905
    if not all(isinstance(n, int) and isinstance(step, int) for n, step in pairs) or 0 in size:
        return 0
    last = offset + sum((n - 1) * step for n, step in pairs)
    return last if last >= storage.entries else 0
