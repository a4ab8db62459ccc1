"""COMMAND  prune a LightningModule on a DataModule from the command line, in one shot.

    lightning-mi-prune --config run.yaml --checkpoint best.ckpt --sparsity 0.75 --output small.ckpt

The YAML is the one of a LightningCLI (``model``, ``data``, ``trainer``), with classes by path.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from lightning_mi_prune.budget import asked_budget
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.limits import Limits
from lightning_mi_prune.loading import load_pruned
from lightning_mi_prune.method import Method
from lightning_mi_prune.oneshot import Pruned, prune

__all__ = ["main", "prune_module"]


def prune_module(
    module: pl.LightningModule,
    data: pl.LightningDataModule,
    trainer: pl.Trainer,
    *,
    output: Path = Path("pruned.ckpt"),
    checkpoint: Path | None = None,
    sparsity: float | None = None,
    target_parameters: int | None = None,
    target_macs: int | None = None,
    target_latency_ms: float | None = None,
    keep_information: float | None = None,
    units: list[str] | None = None,
    module_path: str = "",
    include: str | None = None,
    exclude: str | None = None,
    widths: Literal["global", "uniform"] = "global",
    floors: dict[str, int | float] | None = None,
    caps: dict[str, int | float] | None = None,
    pins: dict[str, int | float] | None = None,
    relevance: Literal["gradient", "readers"] | None = "gradient",
    refit: bool = True,
    evaluate: Literal["validate", "test", "none"] = "validate",
) -> Pruned:
    """Prune a module on the validation data of a DataModule, and save it as a checkpoint.

    Args:
        module: The module; its ``training_step`` tells what matters, its ``validation_step`` runs.
        data: Validation batches to listen to, training batches for the backward passes.
        trainer: Evaluates and saves.
        output: Checkpoint to write; :func:`load_pruned` opens it.
        checkpoint: Weights to start from.
        sparsity: Share of the prunable parameters to remove. Default 0.5, unless one of the other
            four budgets is given.
        target_parameters: Instead: parameters of the whole module.
        target_macs: Instead: multiply-accumulates of one example.
        target_latency_ms: Instead: milliseconds of one forward pass, from a table measured here.
        keep_information: Instead: share of the information with the layers above that stays.
        units: Kinds of unit to cut.
        module_path: Path of the submodule to search.
        include: Only axes whose name this regular expression finds.
        exclude: No axes whose name this regular expression finds.
        widths: Whether axes compete, or all keep the same share.
        floors: Least units of an axis by regular expression.
        caps: Most units of an axis by regular expression.
        pins: Exact units of an axis by regular expression.
        relevance: Which part of a layer matters (:class:`Method`).
        refit: Whether output projections are solved again on what the cut model hears.
        evaluate: Loop of the trainer to run before and after.

    Raises:
        PruningError: If the module, the data or an option does not allow it; no file is written.
    """
    targets = (target_parameters, target_macs, target_latency_ms, keep_information)
    budget = asked_budget(sparsity, *targets)
    limits = Limits(floors or {}, caps or {}, pins or {})
    method = Method(budget, widths=widths, relevance=relevance, refit=refit, limits=limits)
    if checkpoint is not None:
        load_pruned(module, checkpoint)
    data.prepare_data()
    data.setup("fit")
    before = _metrics(trainer, module, data, evaluate)
    module.to(trainer.strategy.root_device)  # a loop that is over leaves it on the CPU
    done = prune(
        module,
        data.val_dataloader(),
        budget,
        method=method,
        units=units,
        module=module_path,
        include=include,
        exclude=exclude,
        training=data.train_dataloader(),
    )
    after = _metrics(trainer, module, data, evaluate)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(output, weights_only=True)
    _tell(done, before, after, output)
    return done


class _PruneCLI(LightningCLI):
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_function_arguments(prune_module, skip={"module", "data", "trainer"})


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    try:
        cli = _PruneCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"logger": False, "enable_checkpointing": False},
            args=None if args is None else list(args),
        )
        names = ("model", "data", "trainer", "config", "seed_everything", "optimizer")
        given = {n: v for n, v in vars(cli.config_init).items() if n not in names}
        given.pop("lr_scheduler", None)
        prune_module(cli.model, cli.datamodule, cli.trainer, **given)
    except (PruningError, MisconfigurationException) as error:
        sys.exit(f"error: {error}")


def _metrics(
    trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, loop: str
) -> Mapping[str, float]:
    if loop == "none":
        return {}
    found = getattr(trainer, loop)(module, data, verbose=False)
    return {name: float(value) for part in found for name, value in part.items()}


def _tell(
    done: Pruned, before: Mapping[str, float], after: Mapping[str, float], path: Path
) -> None:
    table = Table(title=f"{done.sparsity:.1%} of the prunable parameters are gone")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for name, (old, new) in (
        ("parameters", done.parameters),
        ("prunable parameters", done.prunable_parameters),
    ):
        table.add_row(name, f"{old:,}", f"{new:,}")
    for name, value in after.items():
        table.add_row(name, f"{before[name]:.4f}", f"{value:.4f}")
    Console().print(table, f"The pruned checkpoint is {path}; open it with load_pruned.")


if __name__ == "__main__":
    main()
