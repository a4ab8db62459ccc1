"""A model that comes in parts: pieces of one zip file, joined and opened once."""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

WEIGHTS = "model.safetensors"
CHUNK = 1 << 20  # bytes


def join(parts: Sequence[Path], folder: Path, sha256: str) -> None:
    """Makes the folder of a model; it appears whole, or not at all.

    Args:
        parts: The pieces of the zip file, which holds a folder of the same name, in their order.
        folder: The folder to make.
        sha256: What the weights must hash to.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remedy = "reinstall the packages that the parts come from"
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as place:
        whole, inside = Path(place, "whole.zip"), Path(place, "inside")
        with whole.open("wb") as output:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, output, CHUNK)
        try:
            with ZipFile(whole) as archive:
                check_names(archive.namelist())
                archive.extractall(inside)
        except BadZipFile as error:
            names = ", ".join(part.name for part in parts)
            raise ValueError(f"{names} are not parts of one zip file: {error}; {remedy}") from error
        ready = inside / folder.name
        if not (ready / WEIGHTS).is_file():
            raise ValueError(f"expected {folder.name}/{WEIGHTS} in {parts[0].name} ...; {remedy}")
        if (found := digest(ready / WEIGHTS)) != sha256:
            raise ValueError(
                f"{WEIGHTS} of {folder.name} has the sha256 {found}: expected {sha256}; {remedy}"
            )
        try:
            ready.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


def check_names(names: Iterable[str]) -> None:
    """Refuses names that could lead out of the folder that a zip file is opened in.

    Example:
        >>> check_names(["model/", "model/config.json"])
        >>> check_names(["../config.json"])
        Traceback (most recent call last):
        ...
        ValueError: '../config.json' in a zip file: expected plain names of files inside it
    """
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ValueError(f"{name!r} in a zip file: expected plain names of files inside it")


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()
