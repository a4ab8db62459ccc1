"""Options of the command: parameters of functions and fields of their option records."""

from __future__ import annotations

import argparse
import inspect
import re
import shutil
import textwrap
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser

from lightning_mi_prune.allocation.budget import budget_of
from lightning_mi_prune.cli.config import Request, one_sentence, refuse_unknown
from lightning_mi_prune.cli.printing import Shown
from lightning_mi_prune.core import options as records
from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "JSON",
    "Command",
    "Entry",
    "Option",
    "grouped",
    "help_text",
    "options_of",
    "values_of",
]

_VALUES = {bool: "BOOL", int: "N", float: "X", str: "TEXT", Sequence: "LIST", Mapping: "MAP"}

_RECORDS: list[Any] = [kind for _, kind in inspect.getmembers(records, is_dataclass)]

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
    def is_flag(self) -> bool:
        """Whether it is off unless it is given."""
        return self.kind is bool and self.default is False and self.record is None

    @property
    def takes_numbers(self) -> bool:
        """Whether it takes all numbers that follow."""
        return get_origin(self.kind) is Sequence and get_args(self.kind) in ((int,), (float,))

    @property
    def value_name(self) -> str:
        """What stands for its value in the help."""
        kind = self.kind
        if self.takes_numbers:
            return f"{_VALUES[get_args(kind)[0]]} ..."
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


@dataclass(frozen=True)
class Entry:
    """A line of a help text.

    Args:
        title: The group that it is in.
        name: The word, with dashes if it is an option.
        value: What stands for its value; empty where it has none.
        text: A sentence about it.
    """

    title: str
    name: str
    value: str
    text: str

    @classmethod
    def of(cls, title: str, option: Option) -> Entry:
        """The line of an option, with its default."""
        text, default = option.text.replace("None", "null"), option.default
        if default not in (None, "", {}) and default is not False:
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
            text += f" [{shown.lower()}]"
        value = "" if option.is_flag else option.value_name
        return cls(title, f"--{option.name}", value, text)


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        name: Its name.
        usage: What follows the name.
        description: What it does.
        example: What follows the name, in an example.
        options: Its options.
        entries: The lines of its help.
        run: Takes what the command line asks for, and the values of the options.
        places: Names of the words that it needs, in order.
        epilog: What else must be known.
        builds: Whether it takes files and options of a LightningCLI.
        file_places: Whether words that belong to no option are such files.
        from_files: Whether its options can be in these files.
    """

    name: str
    usage: str
    description: str
    example: str
    options: Sequence[Option]
    entries: Sequence[Entry]
    run: Callable[[Request, Mapping[str, Any]], Shown]
    places: Sequence[str] = ()
    epilog: str = ""
    builds: bool = False
    file_places: bool = False
    from_files: bool = False

    @classmethod
    def of(cls, function: Callable[..., Shown], example: str, **more: Any) -> Command:
        """A subcommand from a function, with a type and a text for each argument.

        Positional arguments are words, keyword arguments are options. An argument ``request`` gets
        the whole command line.

        Args:
            function: Its name, with ``_`` at the end or not, is that of the subcommand.
            example: What follows the name, in an example.
            more: Other fields.
        """
        name, texts = function.__name__.rstrip("_"), _texts(function)
        parameters = inspect.signature(function).parameters
        first = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
        places = [n for n in first if n != "request"]
        options = tuple(options_of(function, first))

        def run(request: Request, values: Mapping[str, Any]) -> Shown:
            given = ([request] if "request" in first else []) + request.places
            return function(*given, **values)

        lines = [Entry("arguments", place.upper(), "", texts[place]) for place in places]
        lines += more.pop("entries", ())
        lines += [Entry.of("options", option) for option in (*options, JSON)]
        return cls(
            name=name,
            usage=" ".join([*map(str.upper, places), "[options]"]),
            description=" ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split()),
            example=example,
            options=options,
            entries=tuple(lines),
            run=run,
            places=tuple(place.upper() for place in places),
            **more,
        )

    def help(self, program: str) -> str:
        """Its help text.

        Args:
            program: Name of the program.
        """
        start = f"{program} {self.name}"
        return help_text(
            f"{start} {self.usage}",
            self.description,
            self.entries,
            f"{self.epilog}\n\nexample:\n  {start} {self.example}".strip(),
        )


JSON = Option("json", bool, False, "One JSON object on stdout, nothing else.")


def help_text(usage: str, description: str, entries: Sequence[Entry], epilog: str) -> str:
    """A help text: options in groups, as wide as the terminal but no wider than 100 columns.

    Args:
        usage: The form of a command line.
        description: What it does.
        entries: Its lines.
        epilog: What else must be known; lines that start with spaces stay as they are.

    Example:
        >>> print(help_text("resize FILE", "Resize.", [Entry("files", "FILE", "", "It.")], ""))
        usage: resize FILE
        <BLANKLINE>
        Resize.
        <BLANKLINE>
        files:
          FILE  It.
        <BLANKLINE>
    """
    width = max(80, min(100, shutil.get_terminal_size().columns))
    parser = argparse.ArgumentParser(
        usage=usage.replace("%", "%%"),
        formatter_class=partial(argparse.HelpFormatter, max_help_position=33, width=width),
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for entry in entries:
        if entry.title not in groups:
            groups[entry.title] = parser.add_argument_group(entry.title)
        text = entry.text.replace("%", "%%")
        if not entry.name.startswith("-"):
            groups[entry.title].add_argument(entry.name, help=text)
        elif entry.value:
            groups[entry.title].add_argument(entry.name, metavar=entry.value, help=text)
        else:
            groups[entry.title].add_argument(entry.name, action="store_true", help=text)
    head, _, rest = parser.format_help().partition("\n\n")
    paragraphs = (_wrapped(text, width) for text in (head, description, rest.rstrip(), epilog))
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _wrapped(text: str, width: int) -> str:
    """Text in lines, but for lines that start with spaces or that are lines already."""
    lines = []
    for line in text.splitlines():
        keep = len(line) <= width or line.startswith(" ")
        lines += [line] if keep else textwrap.wrap(line, width, break_long_words=False)
    return "\n".join(lines)


def grouped(
    options: Sequence[Option], own: Collection[str], title_of_own: str = "what to prune"
) -> Iterator[Entry]:
    """Lines for options of pruning, by what they are about.

    Args:
        options: The options.
        own: Names of those that are not about how to prune.
        title_of_own: What these are about.
    """
    for option in sorted(options, key=lambda option: option.name not in own):
        if option.record is not None:
            title = _first_sentence(inspect.getdoc(option.record) or "").rstrip(".").lower()
        elif option.name in own:
            title = title_of_own
        elif option.name in _BUDGETS:
            title = "how small (one of these; else sparsity 0.5)"
        else:
            title = "which units"
        yield Entry.of(title, option)


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
