"""Prune a LightningModule on its data from the command line, in one shot.

    lightning-mi-prune --config run.yaml --checkpoint best.ckpt --sparsity 0.75 --output small.ckpt

The files are those of a LightningCLI: its ``model``, ``data`` and ``trainer``, the ``config.yaml``
that it saves, with or without sections of stages (``fit:``). Where they hold arguments only, as for
``LightningCLI(MyModel, MyData)``, the classes are options: ``--model mypackage.MyModel --data
mypackage.MyData``. In place of a DataModule, ``--data`` takes a data set of the ``datasets``
package. All else in the files is ignored, and named in one line. Modules of the working directory
are found, as with ``python -m``.

A wrong option, value or file, and pruning that cannot be done, end with one line ``error: ...`` on
stderr and exit code 2, and leave no file. Errors of the user's own code keep their traceback.
"""

from __future__ import annotations

import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse.typing import Path_fr
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mi_prune.allocation.budget import budget_of
from lightning_mi_prune.calibration.datasets import batches_of
from lightning_mi_prune.checkpoint.loading import load_pruned
from lightning_mi_prune.cli.config import (
    Block,
    Request,
    as_yaml,
    block_of,
    imported,
    is_class_path,
    one_sentence,
    read_words,
    refuse_misspelt,
    section_of,
)
from lightning_mi_prune.cli.options import help_text, options_of, values_of
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.files import check_writable
from lightning_mi_prune.core.options import Importance
from lightning_mi_prune.pruner import PruneResult, prune
from lightning_mi_prune.reporting.tables import Table, print_table

__all__ = [
    "OPTIONS",
    "prune_module",
    "run",
]

Loop = Literal["validate", "test", "none"]

# Arguments of prune() that a command line cannot give.
_OBJECTS_OF_PRUNE = ("model", "data", "loss", "forward", "training", "optimizers")

_TRAINER = (
    "accelerator",
    "precision",
    "limit_val_batches",
    "limit_test_batches",
    "deterministic",
    "benchmark",
    "inference_mode",
    "enable_progress_bar",
)

_OBJECTS = ("callbacks", "logger", "plugins", "profiler", "strategy")  # cannot be linked

_ONE_DEVICE: dict[str, Any] = {
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


def prune_module(
    model: pl.LightningModule,
    data: Any,
    trainer: pl.Trainer,
    *,
    checkpoint: str | None = None,
    output: str = "pruned.ckpt",
    evaluate: Loop = "validate",
    **options: Any,
) -> PruneResult:
    """Prune a module on validation data, and save it as a checkpoint.

    Args:
        model: The module; gradients are those of its ``training_step``, ``validation_step`` runs.
        data: Its DataModule, or a data set of the datasets package (its folder or name); None where
            the module has dataloaders of its own. Activations are collected on validation batches,
            gradients on training batches, or on validation batches where there are no others.
        trainer: Evaluates and saves, on one device.
        checkpoint: Weights to start from, pruned or not.
        output: Checkpoint to write. load_pruned opens it.
        evaluate: Loop of the trainer to run before and after: ``"validate"``, ``"test"`` or
            ``"none"``.
        options: Options of ``prune``, but those that are objects: loss, forward, training,
            optimizers.

    Raises:
        PruningError: If the module, the data, the options or the files do not allow it; no file is
            written.
        MisconfigurationException: If a loop cannot run.
    """
    names = [name for name in signature(prune).parameters if name not in _OBJECTS_OF_PRUNE]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise PruningError(f"{unknown[0]} is no option of one-shot pruning; expected {names}.")
    budget_of(*(options.get(name) for name in signature(budget_of).parameters))
    target = Path(output)
    _check_files(target, checkpoint)
    if data is not None and not isinstance(data, pl.LightningDataModule):
        sizes = {name: options[name] for name in ("batch_size", "seed") if name in options}
        data = _Rows(batches_of(data, **sizes))
    source = model if data is None else data
    if not is_overridden("val_dataloader", source):
        remedy = "give a DataModule, --data mypackage.MyData" if data is None else "write one"
        name = type(source).__name__
        raise PruningError(f"{name} has no val_dataloader, which calibration needs; {remedy}.")
    if checkpoint is not None:
        load_pruned(model, checkpoint)
    before = _metrics(trainer, model, data, evaluate)
    for part in (model,) if data is None else (data, model):
        part.trainer = trainer  # as in fit; evaluate="none" attached none
        part.prepare_data()
        part.setup("fit")
    model.to(trainer.strategy.root_device)  # a finished loop leaves it on the CPU
    validation, training = _Batches(model, data, "val_dataloader", "sequential"), None
    relevance = (options.get("importance") or Importance()).relevance
    if relevance == "gradient" and is_overridden("train_dataloader", source):
        training = _Batches(model, data, "train_dataloader", "max_size_cycle")
    result = prune(
        model,
        validation,
        forward=validation.forward if len(validation.loaders.flattened) > 1 else None,
        training=training,
        **options,
    )
    after = _metrics(trainer, model, data, evaluate)
    _save(trainer, model, target)
    _print_result(result, before, after, target)
    return result


_OWN = ("checkpoint", "output", "evaluate", "batch_size")

OPTIONS = (
    *options_of(prune_module, {"model", "data", "trainer", "options"}),
    *options_of(prune, _OBJECTS_OF_PRUNE),
)

_NAMES = tuple(dict.fromkeys(option.name.partition(".")[0] for option in OPTIONS))

_PATHS = {
    "config": "YAML of a LightningCLI; later ones override.",
    "model": "mypackage.MyModel, where the file names no class.",
    "data": "mypackage.MyData, or a folder or name of a data set (datasets).",
    "cli": "Your LightningCLI, for its links and extra arguments.",
}


class _Rows(pl.LightningDataModule):
    """Batches of a data set for all loops of evaluation."""

    def __init__(self, batches: Any) -> None:
        super().__init__()
        self.batches = batches

    def val_dataloader(self) -> Any:
        """All batches."""
        return self.batches

    test_dataloader = val_dataloader


class _Batches:
    """Batches of a dataloader hook, moved and transformed as by the trainer.

    Raises:
        PruningError: If there are none.
    """

    def __init__(
        self,
        model: pl.LightningModule,
        data: pl.LightningDataModule | None,
        hook: str,
        mode: Literal["sequential", "max_size_cycle"],
    ) -> None:
        self.model, self.data, self.mode, self.index = model, data, mode, 0
        source = model if data is None else data
        self.loaders = CombinedLoader(getattr(source, hook)(), mode)
        if not any(sized_len(loader) != 0 for loader in self.loaders.flattened):
            raise PruningError(
                f"{hook} of {type(source).__name__} gives no batches; expected a few thousand "
                "samples. Check its rows, its batch size and drop_last."
            )

    def __len__(self) -> int:
        lengths = [len(loader) for loader in self.loaders.flattened]
        return sum(lengths) if self.mode == "sequential" else max(lengths)

    def __iter__(self) -> Iterator[Any]:
        for batch, _, index in self.loaders:
            self.index = index
            batch = self._hook("on_before_batch_transfer")(batch, index)
            move = self._hook("transfer_batch_to_device")
            batch = move(batch, self.model.device, index)
            yield self._hook("on_after_batch_transfer")(batch, index)

    def forward(self, model: Any, batch: Any) -> Any:
        """Run ``validation_step`` on a batch of one of several loaders."""
        return model.validation_step(batch, 0, self.index)

    def _hook(self, name: str) -> Any:
        return getattr(self.data if is_overridden(name, self.data) else self.model, name)


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
        except (PruningError, MisconfigurationException) as error:
            sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
            raise SystemExit(2) from error


def _run(words: Sequence[str]) -> None:
    request = read_words(words, [option.name for option in OPTIONS])
    if request.help:
        sys.stdout.write(help_text(OPTIONS, _OWN, _PATHS, _TRAINER))
        return
    sections = [section_of(body)[0] for body in request.files.values()]
    options = values_of(OPTIONS, sections, request.options)
    _check_files(Path(options["output"]), options["checkpoint"])
    model, data = (block_of(key, sections, request.classes.get(key)) for key in ("model", "data"))
    rows = None if data.path is None or is_class_path(data.path) else data.path
    if rows is not None:
        data = Block("data", None, False, False)
    own = request.classes.get("cli")
    base = _checked(own, "--cli", LightningCLI) if own else LightningCLI
    builder = type("_OwnBuilder", (_Builder, base), {}) if own else _Builder
    cli = builder(request, model, data, checkpoint=options["checkpoint"])
    if cli.ignored:
        names = ", ".join(dict.fromkeys(cli.ignored))
        sys.stderr.write(f"ignored, not used in one-shot pruning: {names}\n")
    prune_module(cli.model, cli.datamodule if rows is None else rows, cli.trainer, **options)


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

    def __init__(self, request: Request, model: Block, data: Block, checkpoint: str | None) -> None:
        if model.path is None:
            raise PruningError(
                "There is no model; expected model: in the file of --config, or --model my.Net."
            )
        if data.path is None and any(name.startswith("data.") for name, _ in request.others):
            raise PruningError("There is no data; name its class: --data mypackage.MyData.")
        self.request, self.blocks = request, {"model": model, "data": data}
        self.ignored: list[str] = []
        bases = {"model": pl.LightningModule, "data": pl.LightningDataModule}
        classes = {
            key: _checked(block.path, f"--{key}", bases[key])
            for key, block in self.blocks.items()
            if block.path is not None and not (block.named and "." not in block.path)
        }
        takes = {key: _arguments(found) for key, found in classes.items()}
        words = [f"--{key}={block.path}" for key, block in self.blocks.items() if block.named]
        stored = {n: v for n, v in _numbers(checkpoint).items() if n in takes.get("model", ())}
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
        options = {name: given[name] for name in _TRAINER if given.get(name) is not None}
        try:
            return pl.Trainer(**options, **_ONE_DEVICE)
        except (TypeError, ValueError) as error:
            raise PruningError(f"trainer: {error}; correct its options.") from error

    def _overrides(self) -> Iterator[tuple[str, str]]:
        """Options of the command line, without those of the trainer that are not used here."""
        for name, value in self.request.others:
            part, _, key = name.partition(".")
            if part == "trainer" and key.partition(".")[0] not in _TRAINER:
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
            elif key not in _NAMES:
                refuse_misspelt(key, (*_NAMES, "model", "data", "trainer", "seed_everything"))
                self.ignored.append(key)
        self.ignored += stages
        return prepared

    def _of_trainer(self, section: Any) -> dict[str, Any]:
        if not isinstance(section, dict):
            raise PruningError(f"trainer={section!r:.60}; expected names with values.")
        kept, defaults = {}, _trainer_defaults()
        for key, value in section.items():
            if key in _TRAINER:
                kept[key] = value
                continue
            if key not in defaults:
                refuse_misspelt(key, _TRAINER, "trainer.")
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


def _numbers(checkpoint: str | None) -> dict[str, int | float]:
    """Numbers among the hyperparameters of a checkpoint, such as the user's CLI linked.

    Only numbers: a text may name a class, and a file must not cause an import.
    """
    if checkpoint is None:
        return {}
    try:
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


def _check_files(output: Path, checkpoint: str | Path | None) -> None:
    """Refuse files that cannot be read or written, before anything runs."""
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise PruningError(f"checkpoint={str(checkpoint)!r}; expected a file that exists.")
    if checkpoint is not None and output.exists() and output.samefile(checkpoint):
        raise PruningError(f"output={str(output)!r} is the checkpoint; expected another file.")
    check_writable(output, "The pruned checkpoint")


def _save(trainer: pl.Trainer, model: pl.LightningModule, output: Path) -> None:
    """Write all of the checkpoint, or none."""
    draft = output.with_name(f".{output.name}.part")
    trainer.strategy.connect(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        trainer.save_checkpoint(draft, weights_only=True)
        draft.replace(output)
    finally:
        draft.unlink(missing_ok=True)


def _metrics(
    trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule | None, loop: Loop
) -> Mapping[str, float]:
    if loop == "none":
        return {}
    found = getattr(trainer, loop)(model, datamodule=data, verbose=False)
    return {name: float(value) for part in found for name, value in part.items()}


def _print_result(
    result: PruneResult, before: Mapping[str, float], after: Mapping[str, float], path: Path
) -> None:
    sizes = {"parameters": result.parameters, "prunable parameters": result.prunable_parameters}
    rows = [(name, f"{old:,}", f"{new:,}") for name, (old, new) in sizes.items()]
    rows += [(name, f"{before[name]:.4f}", f"{value:.4f}") for name, value in after.items()]
    title = f"{result.sparsity:.1%} of the prunable parameters are gone"
    print_table(Table(title, ("", "before", "after"), rows, ("",)))
    sys.stdout.write(f"The pruned checkpoint is {path}; open it with load_pruned.\n")
