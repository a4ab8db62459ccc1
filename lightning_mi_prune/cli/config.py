"""Reads the files of a LightningCLI and the words of a command line."""

from __future__ import annotations

import difflib
import importlib
import re
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.untrusted import check_nesting, read_text, reading

__all__ = [
    "Block",
    "Request",
    "as_yaml",
    "block_of",
    "imported",
    "is_class_path",
    "one_sentence",
    "read_file",
    "read_words",
    "refuse_misspelt",
    "refuse_unknown",
    "section_of",
]

_STAGES = ("fit", "validate", "test", "predict")

_PARTS = ("model", "data", "trainer")

_CLASSES = ("model", "data", "cli")
_FILES = (".yaml", ".yml", ".json")
_LARGEST_FILE = 2**20  # characters; the reader of YAML is slow

_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?")
_ALIKE = 0.85  # "sparsty" is 0.93 like "sparsity", "output_dir" 0.75 like "output"


_NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:$|Subclass types expect|Given value type: |"
    r"Given value: .*[({<]|a class path \(|a dict with|Expected a <class 'NoneType'>"
)


@dataclass
class Request:
    """What a command line asks for.

    Args:
        places: Words that belong to no option, in order.
        files: Contents of the files of ``--config``, in order.
        classes: Values of ``--model``, ``--data`` and ``--cli``.
        options: The command's own options.
        others: Options of the model, the data, the trainer and the user's own LightningCLI.
        help: Whether help is all that is wanted.
    """

    places: list[str] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    options: list[tuple[str, str]] = field(default_factory=list)
    others: list[tuple[str, str]] = field(default_factory=list)
    help: bool = False


@dataclass(frozen=True)
class Block:
    """The ``model`` or the ``data``: its class, and the form that the files give it.

    Args:
        key: ``"model"`` or ``"data"``.
        path: Class path; None where there is neither a block nor a class.
        named: Whether a file names the class, beside its ``init_args``; otherwise the file holds
            arguments only.
        given: Whether the command line names the class.
    """

    key: str
    path: str | None
    named: bool
    given: bool

    def normalized(self, value: Any) -> dict[str, Any]:
        """What a file has for it, in the form that a parser with this class reads."""
        block = _as_block(value)
        if self.named:
            return {**block, "class_path": self.path} if self.given and block else block
        if set(block) <= {"init_args", "dict_kwargs"}:
            return {k: v for part in block.values() for k, v in (part or {}).items()}
        return block


def read_words(
    words: Sequence[str],
    options: Collection[str],
    *,
    flags: Collection[str] = (),
    numbers: Collection[str] = (),
    builds: bool = True,
    file_places: bool = False,
) -> Request:
    """What a command line asks for; the files that it names are read.

    Args:
        words: Arguments of the subcommand.
        options: Names of its own options, with dots for fields of records.
        flags: Those that need no value.
        numbers: Those that take all numbers that follow.
        builds: Whether the files and options of a LightningCLI are taken too.
        file_places: Whether words that belong to no option are such files.

    Raises:
        PruningError: If a word is no option, or a file cannot be read.

    Example:
        >>> read_words(["--sparsity=0.6", "--model", "my.Net", "--model.width", "8"], ["sparsity"])
        ... # doctest: +NORMALIZE_WHITESPACE
        Request(places=[], files={}, classes={'model': 'my.Net'}, options=[('sparsity', '0.6')],
            others=[('model.width', '8')], help=False)
        >>> found = read_words(["a", "--n", "1", "2", "b"], ["n"], numbers=["n"])
        >>> found.places, found.options
        (['a', 'b'], [('n', '[1, 2]')])
    """
    request, unknown = Request(), []
    outside = (*_PARTS, "seed_everything")
    taken = (*options, *((*outside, "cli", "config") if builds else ()))
    remaining = deque(words)
    while remaining:
        word = remaining.popleft()
        name, equals, value = word.partition("=")
        if word in ("-h", "--help"):
            request.help = True
            continue
        if not word.startswith("-"):
            if file_places:
                _add_file(request, word)
            else:
                request.places.append(word)
            continue
        name = "--config" if name == "-c" else name
        if not name.startswith("--") or name == "--":
            raise PruningError(f"{word!r} is no option; expected --NAME VALUE. See --help.")
        name = name[2:]
        base = name.partition(".")[0]
        if not equals:
            at_end = not remaining or remaining[0].startswith("--")
            if at_end and name not in flags and base not in outside and not request.help:
                refuse_unknown(name, taken, "--")
            value = _value(name, remaining, flags, numbers)
        if name.removesuffix("+") in options:
            request.options.append((name, value))
        elif builds and (name == "config" or (name in _PARTS and value.endswith(_FILES))):
            _add_file(request, value, None if name == "config" else name)
        elif builds and name in _CLASSES:
            request.classes[name] = value
        else:
            request.others.append((name, value))
            if not builds or base not in outside:
                unknown.append(name)
    if unknown and "cli" not in request.classes and not request.help:
        refuse_unknown(unknown[0], taken, "--")
    return request


def _add_file(request: Request, path: str, part: str | None = None) -> None:
    """Lay a file, or one of a part alone, over those before it."""
    body = read_file(path)
    request.files.pop(path, None)  # the later place counts
    request.files[path] = body if part is None else {part: body}


def _value(
    name: str, remaining: deque[str], flags: Collection[str], numbers: Collection[str]
) -> str:
    """The value of an option, out of the words that follow it."""
    if name in flags and (not remaining or remaining[0].lower() not in ("true", "false")):
        return "true"
    if name in numbers and remaining and _NUMBER.fullmatch(remaining[0]):
        found = []
        while remaining and _NUMBER.fullmatch(remaining[0]):
            found.append(remaining.popleft())
        return f"[{', '.join(found)}]"
    if not remaining or remaining[0].startswith("--"):
        raise PruningError(f"--{name} has no value; expected --{name} VALUE. See --help.")
    return remaining.popleft()


def read_file(path: str | Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The names and values of a YAML or JSON file, and of the files that it refers to.

    Args:
        path: The file.
        above: The files that led to it.

    Raises:
        PruningError: If a file cannot be read, holds something else, or refers to itself.
    """
    path = Path(path)
    given = read_text(path, "The file", "give a YAML file", longest=_LARGEST_FILE)
    try:
        with reading(str(path), "correct it"):  # values such as dates raise plain errors
            body = get_loader("yaml")(given)
            check_nesting(body)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())
        raise PruningError(f"{path} is no valid YAML{where} ({problem}); correct it.") from error
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise PruningError(
            f"{path} holds no names with values; expected the YAML of a LightningCLI, with model:, "
            "data: and trainer:."
        )
    here = (*above, path.resolve())
    for section in (body, *(body[s] for s in _STAGES if isinstance(body.get(s), dict))):
        for key in _PARTS:
            if isinstance(value := section.get(key), str) and value.endswith(_FILES):
                inner = path.parent / value
                if inner.resolve() in here:
                    raise PruningError(f"{path} refers to itself in {key}: {value}; correct it.")
                section[key] = read_file(inner, above=here)
    return body


def section_of(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The section of ``fit`` in a file, or of its first stage, and the stages that are left out.

    Example:
        >>> section_of({"seed_everything": 1, "fit": {"ckpt_path": None}, "test": {}})
        ({'seed_everything': 1, 'ckpt_path': None}, ['test'])
    """
    stages = [stage for stage in _STAGES if stage in body]
    section = {key: value for key, value in body.items() if key not in stages}
    if stages:
        chosen = body[stages[0]] or {}
        if not isinstance(chosen, dict):
            raise PruningError(f"{stages[0]}={chosen!r:.60}; expected names with values.")
        section |= chosen
    return section, stages[1:]


def block_of(key: str, sections: Iterable[Mapping[str, Any]], given: str | None) -> Block:
    """The class of the model or the data, and the form that the files give it.

    Raises:
        PruningError: If there is a block without a class.
    """
    blocks = [_as_block(section[key], key) for section in sections if section.get(key) is not None]
    named = [block["class_path"] for block in blocks if "class_path" in block]
    path = given or (named[-1] if named else None)
    if path is None and blocks:
        raise PruningError(
            f"The {key}: of the file names no class; give it as --{key} mypackage.My{key.title()}."
        )
    if path is not None and not isinstance(path, str):
        raise PruningError(f"{key}.class_path={path!r:.60}; expected mypackage.MyClass.")
    return Block(key, path, bool(named), given is not None)


def _as_block(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, str):
        return {"class_path": value}
    if value is not None and not isinstance(value, dict):
        raise PruningError(f"{key}={value!r:.60}; expected names with values, or a class path.")
    return value or {}


def is_class_path(text: str) -> bool:
    """Whether a text names a class, and not a data set: names with dots, and no file or folder.

    Example:
        >>> [is_class_path(text) for text in ("mypackage.MyData", "imdb", "org/name", "./rows")]
        [True, False, False, False]
    """
    return bool(re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", text)) and not Path(text).exists()


def imported(path: str, option: str) -> Any:
    """The class (or function) of a class path.

    Raises:
        PruningError: If there is no such class. Errors of its module pass through.
    """
    module, _, name = path.rpartition(".")
    remedy = f"expected {option} mypackage.MyClass, importable from here"
    if module == "__main__":
        raise PruningError(f"{path!r} is of the script that wrote the file; {remedy}.")
    try:
        found = getattr(importlib.import_module(module), name, None) if module else None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the user's module imports
        raise PruningError(f"{path!r}: there is no module {error.name!r}; {remedy}.") from error
    if found is None:
        where = f"there is no {name!r} in {module!r}" if module else "its module is missing"
        raise PruningError(f"{path!r}: {where}; {remedy}.")
    return found


def refuse_unknown(name: str, options: Collection[str], dashes: str = "") -> None:
    """Refuse a name that is no option.

    Example:
        >>> refuse_unknown("floors", ["sparsity", "constraints.floors"], "--")
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: --floors is no option; did you mean \
--constraints.floors?
    """
    if name not in options:
        fields = [option for option in options if option.endswith(f".{name}")]
        close = next(iter(fields), None) or _closest(name, options)
        hint = f"did you mean {dashes}{close}?" if close else "see --help."
        raise PruningError(f"{dashes}{name} is no option; {hint}")


def refuse_misspelt(key: str, options: Collection[str], prefix: str = "") -> None:
    """Refuse a key of a file that looks like an option, but is none.

    Example:
        >>> refuse_misspelt("ckpt_path", ["sparsity"])
        >>> refuse_misspelt("sparsty", ["sparsity"])
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: 'sparsty' in the file is no option; did you \
mean 'sparsity'? If it belongs to your own LightningCLI, name that with --cli mypackage.MyCLI.
    """
    close = _closest(key, options)
    if close:
        raise PruningError(
            f"{prefix + key!r} in the file is no option; did you mean {prefix + close!r}? If it "
            "belongs to your own LightningCLI, name that with --cli mypackage.MyCLI."
        )


def _closest(name: str, options: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, options, 1, _ALIKE)), None)


def as_yaml(body: Mapping[str, Any]) -> str:
    """YAML in which every string stays a string, whatever it looks like."""
    text: str = yaml.safe_dump(body, default_style='"')
    return text


def one_sentence(message: str, takes: Mapping[str, Sequence[str]] | None = None) -> str:
    """The message of a parser in one line, with a remedy.

    Args:
        message: The message: nested lists of all types that were tried.
        takes: Arguments of the model and of the data.

    Example:
        >>> one_sentence('''Parser key "sparsity":
        ...   Does not validate against any of the Union subtypes
        ...   Subtypes: [<class 'float'>, <class 'NoneType'>]
        ...   Errors:
        ...     - Expected a <class 'float'>
        ...     - Expected a <class 'NoneType'>
        ...   Given value type: <class 'str'>
        ...   Given value: abc''')
        'sparsity: expected a float; given value: abc.'
        >>> one_sentence("the following arguments are required: model.width")
        'model.width has no value; give it as --model.width VALUE, or name the LightningCLI that \
links it with --cli mypackage.MyCLI.'
    """
    key = next(iter(re.findall(r"[\"'](model|data)[.\"']|--(model|data)\.", message)), ("", ""))
    part = "".join(key)
    missing = re.search(r"following arguments are required: ([\w., ]+)", message)
    if missing:
        names = [name.strip() for name in missing[1].split(",")]
        full = [
            n if n.startswith(("model.", "data.")) or not part else f"{part}.{n}" for n in names
        ]
        have = "has no value; give it" if len(full) == 1 else "have no values; give them"
        return (
            f"{' and '.join(full)} {have} as {' '.join(f'--{n} VALUE' for n in full)}, or name the "
            "LightningCLI that links it with --cli mypackage.MyCLI."
        )
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    lines = [line for line in lines if line and not _NOISE.match(line)]
    text = "; ".join(line.rstrip(".") for line in lines).replace(":;", ":")
    text = re.sub(r'Parser key "([^"]+)":', r"\1:", text)
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    text = text.replace("a Sequence", "a list").replace("a Mapping", "a mapping")
    text = re.sub(r"a typing\.Literal\[([^\]]*)\]", r"one of \1", text)
    text = re.sub(r"\ba int\b", "an int", text)
    text = re.sub(r"(: |; |\. )(Expected|Given|Problem|Got|Not)\b", _lower, text)
    known = (takes or {}).get(part)
    if known and re.search("accept|unrecognized", text):
        text += f"; {part} takes {', '.join(known)}"
    return f"{text}."


def _lower(found: re.Match[str]) -> str:
    return found[1].replace(". ", "; ") + found[2].lower()
