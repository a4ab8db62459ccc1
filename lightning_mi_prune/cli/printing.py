"""What the subcommands print: tables or one JSON object on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mi_prune.reporting.tables import Table, print_table

__all__ = [
    "Shown",
    "print_shown",
]


@dataclass(frozen=True)
class Shown:
    """The result of a subcommand, in both forms.

    Args:
        body: The JSON object.
        tables: The tables.
        lines: Sentences below them.
    """

    body: Mapping[str, Any]
    tables: Sequence[Table] = ()
    lines: Sequence[str] = ()


def print_shown(shown: Shown, *, as_json: bool) -> None:
    """Print a result on stdout.

    Args:
        shown: The result.
        as_json: Whether as one JSON object.

    Example:
        >>> print_shown(Shown({"size": 3}, lines=["It has size 3."]), as_json=True)
        {
          "size": 3
        }
        >>> print_shown(Shown({"size": 3}, lines=["It has size 3."]), as_json=False)
        It has size 3.
    """
    if as_json:
        sys.stdout.write(json.dumps(shown.body, indent=2, allow_nan=False) + "\n")
        return
    for table in shown.tables:
        print_table(table)
    sys.stdout.writelines(f"{line}\n" for line in shown.lines)
