"""Builds model, data and trainer from the files and options of a LightningCLI; runs nothing.

The files are those of a LightningCLI: its ``model``, ``data`` and ``trainer``, the ``config.yaml``
that it saves, with or without sections of stages (``fit:``). Where they hold arguments only, as for
``LightningCLI(MyModel, MyData)``, the classes are options: ``--model mypackage.MyModel --data
mypackage.MyData``. In place of a DataModule, ``--data`` takes a data set of the ``datasets``
package. All else in the files is ignored, and named in one line.
"""

from __future__ import annotations

import sys
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse.typing import Path_fr
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_mi_prune.checkpoint.archive import check_archive
from lightning_mi_prune.cli.config import (
    Block,
    Request,
    as_yaml,
    block_of,
    imported,
    is_class_path,
    one_sentence,
    refuse_misspelt,
    section_of,
)
from lightning_mi_prune.core.errors import PruningError

__all__ = ["TRAINER", "Built", "build", "numbers_of_checkpoint"]

TRAINER = (
    "accelerator",
    "precision",
    "limit_val_batches",
    "limit_test_batches",
    "deterministic",
    "benchmark",
    "inference_mode",
    "enable_progress_bar",
)
"""Options of the trainer that are used."""

_OBJECTS = ("callbacks", "logger", "plugins", "profiler", "strategy")  # cannot be linked

_ONE_DEVICE: dict[str, Any] = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Built:
    """What a command line describes.

    Args:
        model: The module.
        data: Its DataModule, the folder or name of a data set, or None.
        trainer: A trainer on one device.
    """

    model: pl.LightningModule
    data: Any
    trainer: pl.Trainer


def build(
    request: Request, names: Collection[str], checkpoint: str | None = None, *, quiet: bool = False
) -> Built:
    """Build what a command line describes; what is ignored is named on stderr.

    Args:
        request: The command line.
        names: Names that a file may hold beside those of a LightningCLI.
        checkpoint: Checkpoint with numbers among its hyperparameters, such as a link gave.
        quiet: Whether what is ignored was named before.

    Raises:
        PruningError: If a class, an argument or a value is missing or wrong.
    """
    sections = [section_of(body)[0] for body in request.files.values()]
    model, data = (block_of(key, sections, request.classes.get(key)) for key in ("model", "data"))
    rows = None if data.path is None or is_class_path(data.path) else data.path
    if rows is not None:
        data = Block("data", None, False, False)
    own = request.classes.get("cli")
    base = _checked(own, "--cli", LightningCLI) if own else LightningCLI
    builder = type("_OwnBuilder", (_Builder, base), {}) if own else _Builder
    cli = builder(request, model, data, names=names, checkpoint=checkpoint)
    if cli.ignored and not quiet:
        ignored = ", ".join(dict.fromkeys(cli.ignored))
        sys.stderr.write(f"ignored, not used here: {ignored}\n")
    return Built(cli.model, cli.datamodule if rows is None else rows, cli.trainer)


class _Parser(LightningArgumentParser):
    """Reads files in the form that was prepared for it."""

    texts: Mapping[str, str] = MappingProxyType({})

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As Lightning does, with paths in the file relative to the file."""
        if str(path) not in self.texts:
            return super().parse_path(path, *args, **kwargs)
        with Path_fr(str(path)).relative_path_context():
            return self.parse_string(self.texts[str(path)], **kwargs)


class _Builder(LightningCLI):
    """Builds model, data and trainer as a LightningCLI does, and runs nothing.

    Modules save plain hyperparameters, so that ``load_from_checkpoint`` opens the result. Of the
    user's own LightningCLI, only the arguments and links that it adds to the parser are used.
    """

    def __init__(
        self,
        request: Request,
        model: Block,
        data: Block,
        names: Collection[str],
        checkpoint: str | None,
    ) -> None:
        if model.path is None:
            raise PruningError(
                "There is no model; expected model: in a YAML file, or --model my.Net."
            )
        if data.path is None and any(name.startswith("data.") for name, _ in request.others):
            raise PruningError("There is no data; name its class: --data mypackage.MyData.")
        self.request, self.blocks = request, {"model": model, "data": data}
        self.names, self.ignored = tuple(names), list[str]()
        bases = {"model": pl.LightningModule, "data": pl.LightningDataModule}
        classes = {
            key: _checked(block.path, f"--{key}", bases[key])
            for key, block in self.blocks.items()
            if block.path is not None and not (block.named and "." not in block.path)
        }
        takes = {key: _arguments(found) for key, found in classes.items()}
        words = [f"--{key}={block.path}" for key, block in self.blocks.items() if block.named]
        stored = {
            n: v
            for n, v in numbers_of_checkpoint(checkpoint).items()
            if n in takes.get("model", ())
        }
        if stored:
            words.append(f"--config={as_yaml({'model': stored})}")
        words += [f"--config={path}" for path in request.files]
        words += [f"--{name}={value}" for name, value in self._overrides()]
        try:
            LightningCLI.__init__(
                self,
                None if model.named else classes["model"],
                None if data.named else classes.get("data"),
                save_config_callback=None,
                seed_everything_default=0,
                parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
                parser_class=_Parser,
                auto_configure_optimizers=False,
                args=words,
                run=False,
            )
        except ArgumentError as error:
            raise PruningError(one_sentence(str(error), takes)) from error

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse the files without what the parser does not know."""
        known = {action.dest.partition(".")[0] for action in parser._actions}
        parser.texts = {
            path: as_yaml(self._prepared(body, known)) for path, body in self.request.files.items()
        }
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Does nothing: the method of the user's own LightningCLI prepares a run."""

    def after_instantiate_classes(self) -> None:
        """Does nothing, likewise."""

    def instantiate_classes(self) -> None:
        """As Lightning does, whatever the user's own LightningCLI does."""
        LightningCLI.instantiate_classes(self)

    def instantiate_trainer(self, **_: Any) -> pl.Trainer:
        """A trainer on one device, with the options that evaluation needs."""
        given = self.config_init.get("trainer")
        options = {name: given[name] for name in TRAINER if given.get(name) is not None}
        try:
            return pl.Trainer(**options, **_ONE_DEVICE)
        except (TypeError, ValueError) as error:
            raise PruningError(f"trainer: {error}; correct its options.") from error

    def _overrides(self) -> Iterator[tuple[str, str]]:
        """Options of the command line, without those of the trainer that are not used here."""
        for name, value in self.request.others:
            part, _, key = name.partition(".")
            if part == "trainer" and key.partition(".")[0] not in TRAINER:
                if key.partition(".")[0] not in _trainer_defaults():
                    raise PruningError(f"--{name} is no option of Trainer; see --help.")
                self.ignored.append(name)
            elif part in self.blocks and not self.blocks[part].named:
                yield f"{part}.{key.removeprefix('init_args.')}", value
            else:
                yield name, value

    def _prepared(self, body: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
        """The part of a file that the parser reads; the rest is added to ``ignored``."""
        section, stages = section_of(body)
        prepared: dict[str, Any] = {}
        for key, value in section.items():
            if key in self.blocks:
                if value is not None and self.blocks[key].path is not None:
                    prepared[key] = self.blocks[key].normalized(value)
            elif key == "trainer":
                prepared[key] = self._of_trainer(value or {})
            elif key in known:
                prepared[key] = value
            elif key not in self.names:
                refuse_misspelt(key, (*self.names, "model", "data", "trainer", "seed_everything"))
                self.ignored.append(key)
        self.ignored += stages
        return prepared

    def _of_trainer(self, section: Any) -> dict[str, Any]:
        if not isinstance(section, dict):
            raise PruningError(f"trainer={section!r:.60}; expected names with values.")
        kept, defaults = {}, _trainer_defaults()
        for key, value in section.items():
            if key in TRAINER:
                kept[key] = value
                continue
            if key not in defaults:
                refuse_misspelt(key, TRAINER, "trainer.")
            elif "cli" in self.request.classes and key not in _OBJECTS and _is_number(value):
                kept[key] = value  # what may be linked to the model or the data
            if value is not None and value not in (defaults.get(key), _ONE_DEVICE.get(key)):
                self.ignored.append(f"trainer.{key}")
        return kept


def _checked(path: str, option: str, base: type) -> Any:
    found = imported(path, option)
    if not callable(found) or (isinstance(found, type) and not issubclass(found, base)):
        raise PruningError(
            f"{path!r} is no {base.__name__} of lightning.pytorch; expected {option} "
            "mypackage.MyClass, the path of one."
        )
    return found


def _arguments(found: Any) -> list[str]:
    """Names of the arguments that a class takes, from its parents too."""
    return [name[2:] for name in LightningArgumentParser().add_lightning_class_args(found, "x")]


def numbers_of_checkpoint(checkpoint: str | None) -> dict[str, int | float]:
    """Numbers among the hyperparameters of a checkpoint, such as the user's CLI linked.

    Only numbers: a text may name a class, and a file must not cause an import.
    """
    if checkpoint is None:
        return {}
    try:
        check_archive(checkpoint)
        found = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        stored = found["hyper_parameters"]
        return {name: value for name, value in stored.items() if _is_number(value)}
    except Exception:  # without hyperparameters; load_pruned refuses a damaged file
        return {}


def _is_number(value: object) -> bool:
    return type(value) in (bool, int, float)


def _trainer_defaults() -> dict[str, Any]:
    parameters = signature(pl.Trainer).parameters
    return {name: parameter.default for name, parameter in parameters.items()}
