"""The error and the warning of the package, and how numbers and names are written in them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from typing import Any

__all__ = [
    "PruningError",
    "PruningWarning",
    "counted",
    "number",
    "require",
    "shortened",
]


class PruningError(RuntimeError):
    """A request that cannot be carried out; raised before a model, an optimizer or a file changes.

    Example:
        >>> from lightning_mi_prune import PruningPlan
        >>> PruningPlan(sizes={"ffn": 4}, kept={"ffn": (7,)})
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: Group 'ffn' keeps unit 7; expected 0 to 3.
    """


class PruningWarning(UserWarning):
    """Something that works but deserves attention, such as too few samples."""


_DIGITS = re.compile(r"(?<![^.])\d+(?![^.])")
_NUMBER = "\0"  # in place of a number of a path


def number(value: float) -> str:
    """A number with thousands separators if it is whole, else with four significant digits.

    Example:
        >>> number(2090950), number(2090950.0), number(1.75), number(0.00123456)
        ('2,090,950', '2,090,950', '1.75', '0.001235')
    """
    whole = float(value).is_integer() or abs(value) >= 1000
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def counted(value: float, noun: str, plural: str | None = None) -> str:
    """A number with its noun, whose plural is formed with an "s" unless given.

    Example:
        >>> counted(1, "epoch"), counted(1.5, "epoch"), counted(2000, "group", "groups")
        ('1 epoch', '1.5 epochs', '2,000 groups')
    """
    return f"{number(value)} {noun if value == 1 else plural or noun + 's'}"


def require(module: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Args:
        module: Its full name.
        extra: Extra of this package that installs it.

    Raises:
        PruningError: If it is not installed.

    Example:
        >>> require("collections.abc", "plots").__name__
        'collections.abc'
        >>> require("not_installed.anywhere", "plots")
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: This needs the package 'not_installed', which \
is not installed; run: pip install 'lightning-mi-prune[plots]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or package).partition(".")[0] != package:
            raise  # it is installed, but lacks a dependency of its own
        raise PruningError(
            f"This needs the package {package!r}, which is not installed; run: "
            f"pip install 'lightning-mi-prune[{extra}]'"
        ) from error


def shortened(names: Iterable[str], most: int = 4) -> str:
    """A list of paths as short text: those that differ in one number share an entry.

    Args:
        names: The paths.
        most: Entries to write out; the rest is counted.

    Example:
        >>> shortened(["net.layer.0.ffn", "net.layer.1.ffn", "net.layer.3.ffn", "net.pooler"])
        'net.layer.{0,1,3}.ffn, net.pooler'
        >>> shortened([f"layer.{i}.ffn" for i in range(12)])
        'layer.{0..11}.ffn'
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(int(digits) for digits in _DIGITS.findall(name))
        shapes.setdefault(_DIGITS.sub(_NUMBER, name), []).append(numbers)
    found = [text for shape, numbers in shapes.items() for text in _entries(shape, sorted(numbers))]
    rest = len(found) - most
    return ", ".join(found[:most]) + (f" and {number(rest)} more" if rest > 0 else "")


def _entries(shape: str, rows: list[tuple[int, ...]]) -> list[str]:
    """One entry if the paths differ in at most one number, else one each."""
    differ = [i for i, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    if len(differ) > 1:
        return [_filled(shape, [str(n) for n in row]) for row in rows]
    texts = [str(n) for n in rows[0]]
    for i in differ:
        numbers = sorted({row[i] for row in rows})
        run = len(numbers) > 3 and numbers == list(range(numbers[0], numbers[-1] + 1))
        inside = f"{numbers[0]}..{numbers[-1]}" if run else ",".join(map(str, numbers))
        texts[i] = f"{{{inside}}}"
    return [_filled(shape, texts)]


def _filled(shape: str, texts: list[str]) -> str:
    parts = shape.split(_NUMBER)
    return parts[0] + "".join(t + rest for t, rest in zip(texts, parts[1:], strict=True))
