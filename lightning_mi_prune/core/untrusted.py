"""Checked reading of untrusted values and text from files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "LARGEST_TEXT",
    "check_nesting",
    "described",
    "flag",
    "listed",
    "mapping",
    "number",
    "read_json",
    "read_object",
    "read_text",
    "reading",
    "text",
    "whole",
]

LARGEST_TEXT = 64 * 2**20  # characters; the graph of a large model has a few million

_LONGEST = 60  # characters of a value in a message
_DEEPEST = 64  # nested containers; later code may recurse into them
_REPEATED = 8  # values after expansion, for each that a file holds
_FAILURES = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)


def described(value: Any) -> str:
    """A short description of any value for an error message, in bounded time.

    Tensors and containers are not printed: they may be large, and containers may hold themselves.

    Example:
        >>> described("a" * 100_000), described([[]]), described(10**400)
        ("'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...'", 'a list of 1', 'an int of 1329 bits')
    """
    kind = type(value).__name__[:_LONGEST]
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        return repr(value) if value.bit_length() <= 128 else f"an int of {value.bit_length()} bits"
    if type(value) is str:
        shown = value if len(value) <= _LONGEST else f"{value[: _LONGEST - 20]}..."
        return repr(shown)
    if type(value) in (list, tuple, dict, set, frozenset, bytes, bytearray):
        return f"a {kind} of {len(value)}"
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        sizes = str(tuple(shape)) if len(shape) <= 8 else f"{len(shape)} dimensions"
        return f"a {kind} of shape {sizes} and type {str(getattr(value, 'dtype', '?'))[:40]}"
    return f"a {kind}"


@contextmanager
def reading(what: str, remedy: str) -> Iterator[None]:
    """Turn any failure to read a file into one sentence.

    Args:
        what: What is read, the start of the sentence.
        remedy: What to do, the end of the sentence.

    Raises:
        PruningError: For any failure inside.

    Example:
        >>> with reading("The note", "write it again"):
        ...     whole("3")
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: The note is damaged ('3' is not a whole \
number from 0 to 2147483648); write it again.
    """
    try:
        yield
    except _FAILURES as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"it has no {error.args[0]!r}" if type(error.args[0]) is str else "no such key"
        elif isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        reason = " ".join(reason[:300].split()).rstrip(".")
        raise PruningError(f"{what} is damaged ({reason}); {remedy}.") from error


def number(value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in a range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{described(value)} is not a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found) or not low <= found <= high:
        bounds = f" from {low}" if low > -math.inf else ""
        bounds += f" to {high}" if high < math.inf else ""
        raise ValueError(f"{described(value)} is not a finite number{bounds}")
    return found


def whole(value: Any, high: int = 2**31, low: int = 0) -> int:
    """A whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{described(value)} is not a whole number from {low} to {high}")
    return value


def flag(value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{described(value)} is neither True nor False")
    return value


def text(value: Any, longest: int = 4096) -> str:
    """Text of a bounded length."""
    if not isinstance(value, str) or len(value) > longest:
        raise TypeError(f"{described(value)} is not text of up to {longest} characters")
    return value


def listed(value: Any, length: int | None = None) -> Sequence[Any]:
    """A list or a tuple, of the given length if one is given."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{described(value)} is not a list")
    if length is not None and len(value) != length:
        raise ValueError(f"{described(value)} does not have {length} entries")
    return value


def mapping(value: Any, keys: Sequence[str] | None = None) -> Mapping[str, Any]:
    """A mapping from text, with exactly the given keys if any are given."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{described(value)} is not a mapping")
    odd = next((key for key in value if not isinstance(key, str)), None)
    if odd is not None:
        raise TypeError(f"{described(odd)} is not a name")
    if keys is not None and set(value) != set(keys):
        strange = next((key for key in value if key not in keys), None)
        lacks = next((key for key in keys if key not in value), None)
        wrong = f"no entry {lacks!r}" if lacks is not None else f"an entry {described(strange)}"
        raise ValueError(f"{wrong}; expected {', '.join(keys)}")
    return value


def check_nesting(value: Any) -> None:
    """Refuse containers that hold themselves, or expand to far more values than the file holds.

    Shared references can repeat a list ten times at every level of nesting. Every container is
    visited once, without recursion, so the work is proportional to the size of the file.

    Raises:
        ValueError: If a container holds itself, is nested too deeply or repeated too often.

    Example:
        >>> loop = []
        >>> loop.append(loop)
        >>> check_nesting({"a": loop})
        Traceback (most recent call last):
        ValueError: a list of 1 holds itself
    """
    extents: dict[int, tuple[int, int]] = {}  # values and levels below a container
    above: set[int] = set()
    held, todo = 0, [(value, False)]
    while todo:
        container, left = todo.pop()
        parts, me = _parts(container), id(container)
        if parts is None or (me in extents and not left):
            continue
        if left:
            below = [extents.get(id(part), (1, 0)) for part in parts]
            values, levels = 1 + sum(v for v, _ in below), 1 + max((n for _, n in below), default=0)
            if levels > _DEEPEST:
                raise ValueError(f"it nests more than {_DEEPEST} containers in one another")
            extents[me] = values, levels
            above.discard(me)
            continue
        if me in above:
            raise ValueError(f"{described(container)} holds itself")
        above.add(me)
        held += 1 + len(parts)
        todo.append((container, True))
        todo.extend((part, False) for part in parts)
    values, _ = extents.get(id(value), (1, 0))
    if values > 1000 + _REPEATED * held:
        raise ValueError(f"its {held} values are repeated until they are {described(values)}")


def _parts(value: Any) -> list[Any] | None:
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, dict):
        return [*value, *value.values()]
    return None


def read_text(path: str | Path, what: str, remedy: str, *, longest: int = LARGEST_TEXT) -> str:
    """The text of a regular file of bounded length.

    Args:
        path: The file.
        what: Name of its content in the error message.
        remedy: What to do, the end of the error message.
        longest: Maximal number of characters; no more are read.

    Raises:
        PruningError: If there is no such file, or it is no text or too long.

    Example:
        >>> read_text("nowhere.json", "The note", "write it first")
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: The note cannot be read from 'nowhere.json' \
(No such file or directory); write it first.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would never end
            folder = Path(path).is_dir()
            raise OSError(None, "it is a folder" if folder else "it is no regular file")
        with Path(path).open(encoding="utf-8") as file:
            found = file.read(longest + 1)
    except (OSError, ValueError) as error:  # a null character in the path is a ValueError
        what_else = "it is no text" if isinstance(error, UnicodeDecodeError) else "no path"
        reason = getattr(error, "strerror", None) or what_else
        raise PruningError(
            f"{what} cannot be read from {_shown(path)} ({reason}); {remedy}."
        ) from error
    if len(found) > longest:
        raise PruningError(
            f"{what} in {_shown(path)} has more than {longest} characters; {remedy}."
        )
    return found


def _shown(path: str | Path) -> str:
    return repr(str(path)[:400])


def read_json(given: Any, what: str, *, version: int, longest: int) -> dict[str, Any]:
    """The object in a JSON text of this package; duplicate keys and NaN are refused.

    Args:
        given: The text.
        what: Name of the text in the error message.
        version: Required value of its entry ``"version"``.
        longest: Maximal number of characters.

    Raises:
        PruningError: If the text is anything else.

    Example:
        >>> read_json('{"version": 1, "a": 2}', "The note", version=1, longest=100)["a"]
        2
        >>> read_json('{"version": true}', "The note", version=1, longest=100)
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: The note has version True; this package reads \
version 1.
    """
    body = read_object(given, what, longest=longest)
    found = body.get("version")
    if type(found) is not int or found != version:
        raise PruningError(
            f"{what} has version {described(found)}; this package reads version {version}."
        )
    return body


def read_object(
    given: Any, what: str, *, longest: int = 2**28, constants: bool = False
) -> dict[str, Any]:
    """The object in any JSON text; duplicate keys are refused.

    Args:
        given: The text.
        what: Name of the text in the error message.
        longest: Maximal number of characters.
        constants: Whether NaN and infinities may occur.

    Raises:
        PruningError: If the text is anything else.

    Example:
        >>> read_object('{"a": 2}', "The note")
        {'a': 2}
    """
    if not isinstance(given, str):
        raise PruningError(f"{what} is {described(given)}; expected JSON text.")
    if len(given) > longest:
        raise PruningError(f"{what} has {len(given)} characters; expected at most {longest}.")
    try:
        constant = None if constants else _no_constant
        body = json.loads(given, object_pairs_hook=_object, parse_constant=constant)
    except RecursionError as error:
        raise PruningError(
            f"{what} is not valid JSON (nested too deeply); was it edited?"
        ) from error
    except ValueError as error:
        raise PruningError(f"{what} is not valid JSON ({error}); was it edited?") from error
    if not isinstance(body, dict):
        raise PruningError(f"{what} is {described(body)}; expected a JSON object.")
    return body


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {described(twice)} occurs twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")
