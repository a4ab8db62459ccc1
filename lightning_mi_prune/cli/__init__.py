"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_mi_prune.core.errors import PruningError, require

__all__ = ["main"]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command ``lightning-mi-prune``.

    Args:
        args: Arguments of the command; default: those of the process.

    Raises:
        SystemExit: With code 2 after one line ``error: ...`` on stderr, if a request cannot be
            carried out or the extra ``cli`` is not installed.
    """
    try:
        require("jsonargparse", "cli")
    except PruningError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from error
    from lightning_mi_prune.cli.program import run

    run(sys.argv[1:] if args is None else args)
