"""Options of the command: parameters of functions and fields of their option records."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from lightning_mi_prune.allocation.budget import budget_of
from lightning_mi_prune.cli.config import one_sentence, refuse_unknown
from lightning_mi_prune.core import options as records
from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "Option",
    "help_text",
    "options_of",
    "values_of",
]

_VALUES = {bool: "BOOL", int: "N", float: "X", str: "TEXT", Sequence: "LIST", Mapping: "MAP"}

_RECORDS = [kind for _, kind in inspect.getmembers(records, is_dataclass)]

_BUDGETS = tuple(inspect.signature(budget_of).parameters)


@dataclass(frozen=True)
class Option:
    """One option of the command.

    Args:
        name: Its name; ``record.field`` for a field of an option record.
        kind: Type of its value.
        default: Its default.
        text: One sentence about it.
        record: The record that it is a field of; None for a parameter.
    """

    name: str
    kind: Any
    default: Any
    text: str
    record: type[Any] | None = None

    @property
    def value_name(self) -> str:
        """What stands for its value in the help."""
        kind = self.kind
        if type(None) in get_args(kind):
            kind = next(k for k in get_args(kind) if k is not type(None))
        return "WORD" if get_origin(kind) is Literal else _VALUES[get_origin(kind) or kind]


def options_of(function: Callable[..., Any], skip: Collection[str]) -> Iterator[Option]:
    """Options for the parameters of a function, and for the fields of its option records.

    Args:
        function: The function.
        skip: Parameters that a command line cannot give.

    Example:
        >>> def resize(model, width: int = 3, latency: records.Latency | None = None):
        ...     '''Resize a model.
        ...
        ...     Args:
        ...         model: The model.
        ...         width: Its ``width``, see the paper.
        ...         latency: How it is timed.
        ...     '''
        >>> [(option.name, option.value_name) for option in options_of(resize, {"model"})]
        [('width', 'N'), ('latency.table', 'TEXT'), ('latency.batch', 'N')]
    """
    hints, texts = get_type_hints(function), _texts(function)
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip:
            continue
        members = get_args(hints[name]) or (hints[name],)
        record = next((kind for kind in _RECORDS if kind in members), None)
        if record is None:
            plain = tuple(m for m in members if not is_dataclass(m))  # a Budget has no text
            kind = hints[name] if plain == members else Union[plain]  # noqa: UP007
            yield Option(name, kind, parameter.default, texts[name])
            continue
        fields, about, defaults = get_type_hints(record), _texts(record), record()
        for part in inspect.signature(record).parameters:
            default = getattr(defaults, part)
            yield Option(f"{name}.{part}", fields[part], default, about[part], record)


def values_of(
    options: Sequence[Option],
    sections: Sequence[Mapping[str, Any]],
    words: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Values of all options, of the right types; those of a record as that record.

    Args:
        options: The options.
        sections: Names and values from files; later ones override.
        words: Names and texts from the command line, which override files.

    Raises:
        PruningError: If a value has another type, or is out of range.
    """
    parser = ArgumentParser(exit_on_error=False)
    for option in options:
        parser.add_argument(f"--{option.name}", type=option.kind, default=option.default)
    names = {option.name for option in options}
    tops = {name.partition(".")[0] for name in names}
    try:
        found = parser.get_defaults()
        for section in sections:
            given = {name: value for name, value in section.items() if name in tops}
            for name in given.keys() - names:  # a record
                if not isinstance(given[name], dict):
                    value = repr(given[name])[:60]
                    raise PruningError(f"{name}={value}; expected names with values.")
                for key in given[name]:
                    refuse_unknown(f"{name}.{key}", names)
            found = parser.parse_object(given, found)
        found = parser.parse_args([f"--{name}={value}" for name, value in words], found)
    except ArgumentError as error:
        raise PruningError(one_sentence(str(error))) from error
    values: dict[str, Any] = found.as_dict()
    for option in options:
        name = option.name.partition(".")[0]
        if option.record is not None and not is_dataclass(values[name]):
            values[name] = option.record(**values[name])
    return values


def help_text(
    options: Sequence[Option],
    own: Collection[str],
    classes: Mapping[str, str],
    trainer: Sequence[str],
) -> str:
    """The help: options in groups, as wide as the terminal but no wider than 100 columns.

    Args:
        options: The options.
        own: Names of those that are not about how to prune.
        classes: What stands for files and classes, with a text each.
        trainer: Options of the trainer that are used.
    """
    width = max(80, min(100, shutil.get_terminal_size().columns))
    parser = argparse.ArgumentParser(
        "lightning-mi-prune",
        usage="%(prog)s --config FILE [--model CLASS] [--data CLASS] [options]",
        description="Prune a LightningModule on its data in one shot, and save it as a checkpoint.",
        epilog=(
            "Arguments of the classes: --model.NAME VALUE, --data.NAME VALUE. Trainer, as in "
            f"Lightning: --trainer.NAME VALUE with {', '.join(trainer)}. Defaults are in "
            "[brackets]. Options can also be in the file; those of the command line override it. "
            "Values are YAML: --kinds '[ffn, heads]', --constraints.floors '{ffn$: 0.25}'. An "
            "error ends with exit code 2."
        ),
        formatter_class=partial(argparse.HelpFormatter, max_help_position=33, width=width),
        add_help=False,
    )
    groups: dict[str, Any] = {}

    def add(title: str, name: str, value: str, text: str) -> None:
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(f"--{name}", metavar=value, help=text.replace("%", "%%"))

    for name, text in classes.items():
        add("what to prune", name, "FILE" if name == "config" else "CLASS", text)
    for option in sorted(options, key=lambda option: option.name not in own):
        text = option.text.replace("None", "null")
        if option.default not in (None, "") and option.default != {}:
            text += f" [{str(option.default).lower()}]"
        if option.record is not None:
            title = _first_sentence(inspect.getdoc(option.record) or "").rstrip(".").lower()
        elif option.name in own:
            title = "what to prune"
        elif option.name in _BUDGETS:
            title = "how small (one of these; else sparsity 0.5)"
        else:
            title = "which units"
        add(title, option.name, option.value_name, text)
    return parser.format_help()


def _texts(documented: Any) -> dict[str, str]:
    """The first sentence about every argument."""
    found = parse_docstring(inspect.getdoc(documented) or "").params
    return {entry.arg_name: _first_sentence(entry.description or "") for entry in found}


def _first_sentence(text: str) -> str:
    """The first sentence of a description, without markup.

    Example:
        >>> _first_sentence("Share of ``all``, see :class:`Budget`. Default 0.5.")
        'Share of all, see Budget.'
    """
    plain = re.sub(r":\w+:`~?([^`]*)`", r"\1", " ".join(text.split())).replace("``", "")
    return re.split(r"[.;] (?![^(]*\))", plain)[0].rstrip(".") + "."
