"""The program: finds the subcommand, reads its words, prints its result.

A wrong option, value or file, and what cannot be done, end with one line ``error: ...`` on stderr
and exit code 2, and leave no file. Errors of the user's own code keep their traceback. Modules of
the working directory are found, as with ``python -m``.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from lightning_mi_prune.cli.config import Request, read_words, section_of
from lightning_mi_prune.cli.options import JSON, Command, Entry, help_text, values_of
from lightning_mi_prune.cli.printing import Shown, print_shown
from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "PROGRAM",
    "SUBCOMMANDS",
    "command_named",
    "run",
]

PROGRAM = "lightning-mi-prune"

SUBCOMMANDS = {
    "prune": "Prune a LightningModule on its data in one shot.",
    "info": "Show what a folder, a checkpoint or a plan holds, without opening the model.",
    "compare": "Measure two models side by side: size, MACs, latency, metric.",
    "convert": "Write the network of a checkpoint as a Hugging Face folder.",
    "export": "Write the model of a folder as an ONNX file.",
    "smaller": "Write smaller models of the one in a folder, from one calibration.",
}
"""What each subcommand does, in a line."""

_HELP = ("-h", "--help")


def command_named(name: str) -> Command:
    """A subcommand; only what it needs is imported.

    Raises:
        PruningError: If there is none of this name.

    Example:
        >>> command_named("info").places
        ('PATH',)
        >>> command_named("inof")
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: 'inof' is no subcommand; did you mean 'info'?
    """
    if name not in SUBCOMMANDS:
        close = difflib.get_close_matches(name, SUBCOMMANDS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected {', '.join(SUBCOMMANDS)}."
        raise PruningError(f"{name!r} is no subcommand; {hint}")
    home = "pruning" if name == "prune" else "commands"
    module = importlib.import_module(f"lightning_mi_prune.cli.{home}")
    command: Command = getattr(module, name.upper())
    return command


def run(words: Sequence[str]) -> None:
    """Run the command line, see :func:`lightning_mi_prune.cli.main`."""
    here = os.getcwd()
    if not {"", here} & set(sys.path):
        sys.path.insert(0, here)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message="No seed found")  # seed_everything: true
        # Of calls that Lightning itself makes.
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning|jsonarg")
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        try:
            _run(words)
        except Exception as error:
            if not isinstance(error, (PruningError, *_refusals())):
                raise
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            raise SystemExit(2) from error


def _refusals() -> tuple[type[Exception], ...]:
    """Errors of Lightning that name what is wrong, if Lightning was imported at all."""
    found = sys.modules.get("lightning.fabric.utilities.exceptions")
    return () if found is None else (found.MisconfigurationException,)


def _run(words: Sequence[str]) -> None:
    if not words or words[0] in _HELP:
        sys.stdout.write(_help())
        return
    name = words[0]
    if name.startswith("-") or name.endswith((".yaml", ".yml")):
        raise PruningError(
            f"The command line starts with {name!r}; expected a subcommand. To prune, write "
            f"{PROGRAM} prune {' '.join(words)}"
        )
    command = command_named(name)
    request = read_words(
        words[1:],
        [option.name for option in (*command.options, JSON)],
        flags=[option.name for option in (*command.options, JSON) if option.is_flag],
        numbers=[option.name for option in command.options if option.takes_numbers],
        builds=command.builds,
        file_places=command.file_places,
    )
    if request.help:
        sys.stdout.write(command.help(PROGRAM))
        return
    _check_places(command, request)
    sections = [section_of(body)[0] for body in request.files.values() if command.from_files]
    values = values_of((*command.options, JSON), sections, request.options)
    as_json = values.pop("json")
    print_shown(_result(command, request, values, as_json=as_json), as_json=as_json)


def _result(
    command: Command, request: Request, values: Mapping[str, Any], *, as_json: bool
) -> Shown:
    """What a subcommand finds; with JSON, what anything else prints meanwhile goes to stderr."""
    if not as_json:
        return command.run(request, values)
    with redirect_stdout(sys.stderr):
        return command.run(request, values)


def _check_places(command: Command, request: Request) -> None:
    found, wanted = len(request.places), len(command.places)
    if found != wanted:
        odd = f"{request.places[wanted]!r} is too much" if found > wanted else "words are missing"
        raise PruningError(f"{odd}; expected {PROGRAM} {command.name} {command.usage}. See --help.")


def _help() -> str:
    return help_text(
        f"{PROGRAM} SUBCOMMAND ...",
        "Make trained networks smaller, and look at what came out.",
        [Entry("subcommands", name, "", text) for name, text in SUBCOMMANDS.items()],
        f"{PROGRAM} SUBCOMMAND --help lists its options. With --json a subcommand prints one JSON "
        "object. What is wrong is one line on stderr, and exit code 2.\n\nexample:\n"
        f"  {PROGRAM} prune run.yaml --checkpoint best.ckpt --sparsity 0.75 --output small.ckpt\n"
        f"  {PROGRAM} info small.ckpt",
    )
