"""Whether the files of a Hugging Face folder may be opened: what no other check looks at."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from lightning_mi_prune.checkpoint.archive import check_archive
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.untrusted import (
    check_nesting,
    described,
    mapping,
    read_text,
    reading,
    text,
)

__all__ = ["building_within", "check_folder"]

_REMEDY = "expected a file of save_pretrained. Copy or save the folder again"
_CONFIG = "config.json"
_INDICES = "*.index*.json"
_ARCHIVES = "*.bin"

_TENSORS = (2**12, 256)  # that may be made, and one more for so many bytes of the folder
_ENTRIES = (2**23, 8)  # that one of them may have, and so many more for each byte


def check_folder(source: Any, options: Mapping[str, Any]) -> None:
    """Refuse a local folder whose index names files outside, or whose files expand.

    Args:
        source: Folder or hub name, of which nothing is checked.
        options: Those of ``from_pretrained``.

    Raises:
        PruningError: Naming the file, before it is opened.
    """
    folder = _local(source, options)
    if folder is None:
        return
    if (folder / _CONFIG).is_file():
        found = _json(folder / _CONFIG)
        if not isinstance(found, Mapping):
            raise PruningError(
                f"The config.json of {source} is {described(found)}; expected an object with "
                "fields. Copy or save the folder again."
            )
    for path in sorted(folder.glob(_INDICES)):
        index = _json(path)
        with reading(str(path), _REMEDY):
            _check_index(index)
    try:
        for path in sorted(folder.glob(_ARCHIVES)):
            check_archive(path)
    except PruningError as error:
        raise PruningError(
            f"{error} Is one file damaged? Copy or save the folder again."
        ) from error


@contextmanager
def building_within(source: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """A block that builds no model that is far larger than the files of a local folder.

    A config may ask for a billion layers or words; what is new in a model is small.

    Args:
        source: Folder or hub name, of which nothing is known.
        options: Those of ``from_pretrained``.

    Raises:
        PruningError: Inside the block, before the tensor is made.
    """
    folder = _local(source, options)
    if folder is None or options.get("state_dict") is not None:
        yield
        return
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    with _Bounded(folder, size):
        yield


class _Bounded(TorchFunctionMode):
    """Counts tensors that are made, and refuses those that take far more memory than files do."""

    def __init__(self, folder: Path, size: int) -> None:
        super().__init__()
        self._folder, self._size, self._made = folder, size, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func in _MADE:
            self._made += 1
            few, each = _TENSORS
            if self._made > few + self._size // each:
                self._refuse(f"more than {self._made - 1} tensors")
            few, each = _ENTRIES
            entries = _entries(func, args, options)
            if entries < 0:
                self._refuse("a tensor of a negative size")
            if entries > few + self._size * each and not _is_meta(func, args, options):
                self._refuse(f"a tensor of {described(entries)} entries")
        return func(*args, **options)

    def _refuse(self, what: str) -> None:
        raise PruningError(
            f"The config.json of {self._folder} asks for {what}, but the files of the folder have "
            f"{self._size} bytes; expected a model of that size. Copy or save the folder again."
        )


_SIZED = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn}
_LIKE = {torch.empty_like, torch.zeros_like, torch.ones_like, torch.rand_like, torch.randn_like}
_MADE = _SIZED | _LIKE | {torch.full, torch.arange}


def _is_meta(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    given = options.get("device")
    if given is None and func in _LIKE and args and isinstance(args[0], torch.Tensor):
        given = args[0].device
    return given is not None and torch.device(given).type == "meta"


def _entries(func: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> int:
    """Entries of the tensor that a call makes; 0 for a wrong call, -1 for a negative size."""
    if func in _LIKE:
        return args[0].numel() if args and isinstance(args[0], torch.Tensor) else 0
    sizes: Any = options.get("size", args[:1] if func is torch.full else args)
    if len(sizes) == 1 and isinstance(sizes[0], (list, tuple)):
        sizes = sizes[0]
    if not all(isinstance(size, (int, float)) for size in sizes):
        return 0
    if func is torch.arange:
        ends = [*sizes, *(options[n] for n in ("start", "end") if n in options)]
        return int(max((abs(end) for end in ends), default=0))
    return -1 if any(size < 0 for size in sizes) else int(math.prod(sizes))


def _local(source: Any, options: Mapping[str, Any]) -> Path | None:
    """The folder on this machine that is to be opened; None for anything else."""
    subfolder = options.get("subfolder") or ""
    if not isinstance(source, (str, Path)) or not isinstance(subfolder, (str, Path)):
        return None
    try:
        folder = Path(source, subfolder)
        return folder if folder.is_dir() else None
    except ValueError:  # a null character
        return None


def _json(path: Path) -> Any:
    given = read_text(path, "The file", _REMEDY)
    with reading(str(path), _REMEDY):
        found = json.loads(given)
        check_nesting(found)
        return found


def _check_index(found: Any) -> None:
    """All weights are in files of the folder."""
    metadata = mapping(found).get("metadata", {})
    mapping(metadata)
    for name in {text(file) for file in mapping(found["weight_map"]).values()}:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name or not name.strip("\0"):
            raise ValueError(f"it names the file {described(name)}, outside the folder")
