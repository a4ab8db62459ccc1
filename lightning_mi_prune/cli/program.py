"""Prune a LightningModule on its data from the command line, in one shot.

    lightning-mi-prune --config run.yaml --checkpoint best.ckpt --sparsity 0.75 --output small.ckpt

The files are those of a LightningCLI: its ``model``, ``data`` and ``trainer``, the ``config.yaml``
that it saves, with or without sections of stages (``fit:``). Where they hold bare arguments, as for
``LightningCLI(MyModel, MyData)``, the classes are given beside: ``--model mypackage.MyModel --data
mypackage.MyData``. Whatever else they hold is ignored, and said in one line. Modules of the working
directory are found, as with ``python -m``.

A wrong option, value or file, and pruning that cannot be done, end with one line ``error: ...`` on
stderr and exit code 2, and leave no file. What the user's own code raises keeps its traceback.
"""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
import warnings
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping, Sequence
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

from lightning_mi_prune.callbacks.units import MutualInformationPruning
from lightning_mi_prune.checkpoint.loading import load_pruned
from lightning_mi_prune.cli.config import (
    OPTIONS,
    OWN,
    Block,
    Loop,
    Request,
    as_yaml,
    block_of,
    help_text,
    imported,
    one_sentence,
    options_of,
    read_words,
    refuse_misspelt,
    section_of,
)
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Calibration
from lightning_mi_prune.pipeline import PipelineOptions, PruneResult, prune
from lightning_mi_prune.reporting.tables import Table, print_table

__all__ = [
    "prune_module",
    "run",
]

_PRUNE = {
    "units": "kinds",
    "module": "module",
    "include": "include",
    "exclude": "exclude",
    "seed": "seed",
}


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


_OBJECTS = ("callbacks", "logger", "plugins", "profiler", "strategy")


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
    data: pl.LightningDataModule | None,
    trainer: pl.Trainer,
    *,
    checkpoint: str | Path | None = None,
    output: str | Path = "pruned.ckpt",
    evaluate: Loop = "validate",
    **options: Any,
) -> PruneResult:
    """Prune a module on validation data, and save it as a checkpoint.

    Args:
        model: The module; its ``training_step`` tells what matters, its ``validation_step`` runs.
        data: Its DataModule; None where the module has dataloaders of its own. Validation batches
            calibrate, training batches (validation batches where there are none) give gradients.
        trainer: Evaluates and saves, on one device.
        checkpoint: Weights to start from, pruned or not.
        output: Checkpoint to write. load_pruned opens it.
        evaluate: Loop of the trainer to run before and after: ``"validate"``, ``"test"`` or
            ``"none"``.
        options: Any option of MutualInformationPruning that is not about training.

    Raises:
        PruningError: If the module, the data or the files do not allow it; no file is written.
        MisconfigurationException: If an option is outside its range, or a loop cannot run.
    """
    method = _method(options)
    source = model if data is None else data
    if not is_overridden("val_dataloader", source):
        remedy = "give a DataModule (--data mypackage.MyData)" if data is None else "write one"
        raise PruningError(
            f"{type(source).__name__} has no val_dataloader, whose batches calibrate; {remedy}."
        )
    output = Path(output)
    _check_files(output, checkpoint)
    if checkpoint is not None:
        load_pruned(model, checkpoint)
    before = _metrics(trainer, model, data, evaluate)
    for part in (model,) if data is None else (data, model):
        part.trainer = trainer  # as in fit; evaluate="none" attached none
        part.prepare_data()
        part.setup("fit")
    model.to(trainer.strategy.root_device)  # a loop that is over leaves it on the CPU
    validation, training = _Batches(model, data, "val_dataloader", "sequential"), None
    if method.importance.relevance == "gradient" and is_overridden("train_dataloader", source):
        training = _Batches(model, data, "train_dataloader", "max_size_cycle")
    done = prune(
        model,
        validation,
        method.budget,
        widths=method.widths,
        importance=method.importance,
        constraints=method.constraints,
        latency=method.latency,
        reconstruction=method.reconstruction,
        forward=validation.forward if len(validation.loaders.flattened) > 1 else None,
        training=training,
        calibration=Calibration(
            options.get("positions") or 16_384, options.get("relevance_steps") or 64
        ),
        **{new: options[old] for old, new in _PRUNE.items() if options.get(old) is not None},
    )
    after = _metrics(trainer, model, data, evaluate)
    _save(trainer, model, output)
    _tell(done, before, after, output)
    return done


class _Batches:
    """Batches of one hook, moved and transformed as a loop of the trainer does it.

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
        """Validate on a batch of one of several loaders."""
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
    request = read_words(words, OPTIONS)
    if request.help:
        sys.stdout.write(help_text(prune_module, _TRAINER))
        return
    sections = [section_of(body)[0] for body in request.files.values()]
    options = options_of(sections, request.options)
    _method({name: value for name, value in options.items() if name not in OWN})
    _check_files(Path(options["output"]), options["checkpoint"])
    blocks = [block_of(key, sections, request.classes.get(key)) for key in ("model", "data")]
    own = request.classes.get("cli")
    base = _checked(own, "--cli", LightningCLI) if own else LightningCLI
    consumer = type("_OwnReader", (_Reader, base), {}) if own else _Reader
    cli = consumer(request, *blocks, checkpoint=options["checkpoint"])
    if cli.ignored:
        names = ", ".join(dict.fromkeys(cli.ignored))
        sys.stderr.write(f"ignored, of no use in one shot: {names}\n")
    prune_module(cli.model, cli.datamodule, cli.trainer, **options)


class _Parser(LightningArgumentParser):
    """Reads files in the form that was prepared for it."""

    texts: Mapping[str, str] = MappingProxyType({})

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As ever: paths in the file are relative to it."""
        if str(path) not in self.texts:
            return super().parse_path(path, *args, **kwargs)
        with Path_fr(str(path)).relative_path_context():
            return self.parse_string(self.texts[str(path)], **kwargs)


class _Reader(LightningCLI):
    """Builds model, data and trainer as a LightningCLI does, and runs nothing.

    Hyperparameters that modules save are plain, so that ``load_from_checkpoint`` opens the result.
    Mixed with the user's own LightningCLI, only what that one adds to the parser counts.
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
        """Parse, with files cut down to what the parser knows."""
        known = {action.dest.partition(".")[0] for action in parser._actions}
        parser.texts = {
            path: as_yaml(self._prepared(body, known)) for path, body in self.request.files.items()
        }
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        """Nothing: those of the user's own LightningCLI prepare a run."""

    def after_instantiate_classes(self) -> None:
        """Nothing, likewise."""

    def instantiate_classes(self) -> None:
        """As Lightning does."""
        LightningCLI.instantiate_classes(self)

    def instantiate_trainer(self, **_: Any) -> pl.Trainer:
        """A trainer on one device, with what of the options evaluation needs."""
        given = self.config_init.get("trainer")
        options = {name: given[name] for name in _TRAINER if given.get(name) is not None}
        try:
            return pl.Trainer(**options, **_ONE_DEVICE)
        except (TypeError, ValueError) as error:
            raise PruningError(f"trainer: {error}; correct its options.") from error

    def _overrides(self) -> Iterator[tuple[str, str]]:
        """Options of the command line, without those of the trainer that mean nothing here."""
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
        """One file for the parser; the rest is noted."""
        section, stages = section_of(body)
        prepared: dict[str, Any] = {}
        for key, value in section.items():
            if key in self.blocks:
                if value is not None:
                    prepared[key] = self.blocks[key].normalized(value)
            elif key == "trainer":
                prepared[key] = self._of_trainer(value or {})
            elif key in known:
                prepared[key] = value
            elif key not in OPTIONS:
                refuse_misspelt([key], (*OPTIONS, "model", "data", "trainer", "seed_everything"))
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
                refuse_misspelt([key], _TRAINER, "trainer.")
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

    Only numbers: a text may name a class, which is not imported because of a file.
    """
    if checkpoint is None:
        return {}
    try:
        found = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        stored = found["hyper_parameters"]
        return {name: value for name, value in stored.items() if _is_number(value)}
    except Exception:  # without hyperparameters; what is wrong with a file is said on loading
        return {}


def _is_number(value: object) -> bool:
    return type(value) in (bool, int, float)


def _trainer_defaults() -> dict[str, Any]:
    parameters = inspect.signature(pl.Trainer).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def _method(options: Mapping[str, Any]) -> PipelineOptions:
    """The method that options ask for; the callback's checks are the only ones there are."""
    strange = sorted(set(options) - set(OPTIONS))
    if strange:
        raise PruningError(f"{strange[0]} is no option of one-shot pruning; expected {OPTIONS}.")
    return MutualInformationPruning(**options).method


def _check_files(output: Path, checkpoint: str | Path | None) -> None:
    """Refuse files that cannot be read or written, before anything runs."""
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise PruningError(f"checkpoint={str(checkpoint)!r}; expected a file that is there.")
    if checkpoint is not None and output.exists() and output.samefile(checkpoint):
        raise PruningError(f"output={str(output)!r} is the checkpoint; expected another file.")
    if output.is_dir():
        raise PruningError(f"output={str(output)!r} is a folder; expected the path of a file.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
        if output.exists():
            with output.open("ab"):
                pass
    except OSError as error:
        raise PruningError(
            f"output={str(output)!r} cannot be written: {error.strerror}; expected a file in a "
            "folder that may be written."
        ) from error


def _save(trainer: pl.Trainer, model: pl.LightningModule, output: Path) -> None:
    """Write all of the checkpoint, or none."""
    draft = output.with_name(f".{output.name}.part")
    trainer.strategy.connect(model)
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


def _tell(
    done: PruneResult, before: Mapping[str, float], after: Mapping[str, float], path: Path
) -> None:
    sizes = {"parameters": done.parameters, "prunable parameters": done.prunable_parameters}
    rows = [(name, f"{old:,}", f"{new:,}") for name, (old, new) in sizes.items()]
    rows += [(name, f"{before[name]:.4f}", f"{value:.4f}") for name, value in after.items()]
    title = f"{done.sparsity:.1%} of the prunable parameters are gone"
    caption = f"The pruned checkpoint is {path}; open it with load_pruned."
    print_table(Table(title, ("", "before", "after"), rows, ("",), caption))
