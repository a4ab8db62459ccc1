"""The subcommand ``prune``: prune a LightningModule on its data, in one shot.

    lightning-mi-prune prune run.yaml --checkpoint best.ckpt --sparsity 0.75 --output small.ckpt

:mod:`lightning_mi_prune.cli.building` describes the files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mi_prune.allocation.budget import budget_of
from lightning_mi_prune.calibration.datasets import batches_of
from lightning_mi_prune.checkpoint.loading import load_pruned
from lightning_mi_prune.cli.building import TRAINER, build
from lightning_mi_prune.cli.config import Request
from lightning_mi_prune.cli.options import JSON, Command, Entry, grouped, options_of
from lightning_mi_prune.cli.printing import Shown
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.files import check_writable
from lightning_mi_prune.core.options import Importance
from lightning_mi_prune.export.contents import contents_of
from lightning_mi_prune.pruner import PruneResult, prune
from lightning_mi_prune.reporting.tables import Table

__all__ = [
    "NAMES",
    "OPTIONS",
    "PRUNE",
    "Loop",
    "Pruned",
    "RowsModule",
    "metrics_of",
    "prune_module",
]

Loop = Literal["validate", "test", "none"]

# Arguments of prune() that a command line cannot give.
_OBJECTS_OF_PRUNE = ("model", "data", "loss", "forward", "training", "optimizers")


@dataclass(frozen=True)
class Pruned:
    """A module that was pruned and saved.

    Args:
        result: What was cut.
        before: Metrics before it.
        after: Metrics after it.
        path: The checkpoint.
    """

    result: PruneResult
    before: Mapping[str, float]
    after: Mapping[str, float]
    path: Path

    def shown(self) -> Shown:
        """Sizes and metrics before and after."""
        result = self.result
        sizes = {
            "parameters": result.parameters,
            "prunable parameters": result.prunable_parameters,
            "MACs of one example": result.macs,
        }
        rows = [(name, f"{old:,}", f"{new:,}") for name, (old, new) in sizes.items()]
        rows += [(n, f"{self.before[n]:.4f}", f"{new:.4f}") for n, new in self.after.items()]
        title = f"{result.sparsity:.1%} of the prunable parameters are gone"
        sides = [
            {
                "parameters": result.parameters[place],
                "prunable_parameters": result.prunable_parameters[place],
                "macs": result.macs[place],
                "metrics": dict(metrics),
            }
            for place, metrics in enumerate((self.before, self.after))
        ]
        body = {
            "checkpoint": str(self.path),
            "sparsity": result.sparsity,
            "before": sides[0],
            "after": sides[1],
            "plan_digest": contents_of(self.path).plan_digest,
        }
        line = f"The pruned checkpoint is {self.path}; open it with load_pruned."
        return Shown(body, [Table(title, ("", "before", "after"), rows, ("",))], [line])


def prune_module(
    model: pl.LightningModule,
    data: Any,
    trainer: pl.Trainer,
    *,
    checkpoint: str | None = None,
    output: str = "pruned.ckpt",
    evaluate: Loop = "validate",
    **options: Any,
) -> Pruned:
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

    Returns:
        What was cut, with metrics before and after.

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
        data = RowsModule(batches_of(data, **sizes))
    source = model if data is None else data
    if not is_overridden("val_dataloader", source):
        remedy = "give a DataModule, --data mypackage.MyData" if data is None else "write one"
        name = type(source).__name__
        raise PruningError(f"{name} has no val_dataloader, which calibration needs; {remedy}.")
    if checkpoint is not None:
        load_pruned(model, checkpoint)
    before = metrics_of(trainer, model, data, evaluate)
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
    after = metrics_of(trainer, model, data, evaluate)
    _save(trainer, model, target)
    return Pruned(result, before, after, target)


_OWN = ("checkpoint", "output", "evaluate", "batch_size")

OPTIONS = (
    *options_of(prune_module, {"model", "data", "trainer", "options"}),
    *options_of(prune, _OBJECTS_OF_PRUNE),
)

NAMES = tuple(dict.fromkeys(option.name.partition(".")[0] for option in OPTIONS))
"""Names in a file that are options of pruning."""

_PATHS = {
    "model": "mypackage.MyModel, if no file names one.",
    "data": "mypackage.MyData, or a data set's folder, name.",
    "cli": "Your LightningCLI, for its links, arguments.",
}


class RowsModule(pl.LightningDataModule):
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


def _prune(request: Request, values: Mapping[str, Any]) -> Shown:
    _check_files(Path(values["output"]), values["checkpoint"])
    built = build(request, NAMES, values["checkpoint"])
    return prune_module(built.model, built.data, built.trainer, **values).shown()


PRUNE = Command(
    name="prune",
    usage="CONFIG ... [options]",
    description="Prune a LightningModule on its data in one shot, and save it as a checkpoint.",
    example="run.yaml --checkpoint best.ckpt --sparsity 0.75 --output small.ckpt",
    options=OPTIONS,
    entries=(
        Entry("what to prune", "CONFIG", "", "YAML of a LightningCLI (or --config FILE)."),
        *(Entry("what to prune", f"--{n}", "CLASS", text) for n, text in _PATHS.items()),
        Entry.of("what to prune", JSON),
        *grouped(OPTIONS, _OWN),
    ),
    epilog=(
        "Arguments: --model.NAME VALUE, --data.NAME VALUE; --trainer.NAME VALUE with "
        f"{', '.join(TRAINER)}. Defaults: [in brackets]. "
        "Options can be in the file too; the command line overrides it. Values are YAML: "
        "--kinds '[ffn, heads]', --constraints.floors '{ffn$: 0.25}'."
    ),
    run=_prune,
    builds=True,
    file_places=True,
    from_files=True,
)


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


def metrics_of(
    trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule | None, loop: Loop
) -> dict[str, float]:
    """What a loop of the trainer logs; nothing for ``"none"``."""
    if loop == "none":
        return {}
    found = getattr(trainer, loop)(model, datamodule=data, verbose=False)
    return {name: float(value) for part in found for name, value in part.items()}
