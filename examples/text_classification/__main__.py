"""Fine-tune a text classifier while it gets smaller.

    python -m examples.text_classification fit --config examples/text_classification/demo.yaml

`fit` trains with the callbacks of the YAML, tests on rows that calibration did not use, trains a
dense control for the same number of epochs, and writes to `runs/<name>/`: the pruned model with its
tokenizer and model card to `model`, the control to `dense`, the test rows to `test_rows`, and
`report.html` with `report.json`.
`validate`, `test` and `predict` take the same YAML.
"""

import copy
import csv
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from examples.text_classification.data import TextDataModule
from examples.text_classification.model import TextClassifier
from examples.text_classification.packaged import DataError
from lightning_mi_prune import PruningError, PruningReport, save_pretrained
from lightning_mi_prune.calibration.datasets import batches_of
from lightning_mi_prune.callbacks.base import PruningCallback
from lightning_mi_prune.export.compare import Comparison, compare_networks, first_row
from lightning_mi_prune.export.saving import rewrite_card
from lightning_mi_prune.reporting.tables import print_table


class TextClassificationCLI(LightningCLI):
    """LightningCLI that names runs and, after `fit`, reports what pruning changed."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to neither trainer, model nor data."""
        parser.add_argument("--name", type=str, default="run", help="Results go to runs/<name>.")
        parser.add_argument(
            "--control",
            type=bool,
            default=True,
            help="Train a dense control for the same number of epochs, to compare with.",
        )
        parser.link_arguments("model.model", "data.model")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    @property
    def options(self) -> Any:
        """The configuration of this subcommand."""
        return self.config[self.config.subcommand]

    @property
    def folder(self) -> Path:
        """Where this run writes."""
        return Path("runs", self.options.name)

    def before_instantiate_classes(self) -> None:
        """Keep everything the run writes in its folder."""
        trainer = self.options.trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(self.folder)
        if trainer.logger is None:
            trainer.logger = Namespace(  # type: ignore[no-untyped-call]
                class_path="lightning.pytorch.loggers.CSVLogger",
                init_args=Namespace(save_dir=str(self.folder)),  # type: ignore[no-untyped-call]
            )

    def before_fit(self) -> None:
        """Copy the dense model before training changes it."""
        self.dense = copy.deepcopy(self.model)
        self.started = time.perf_counter()

    def after_fit(self) -> None:
        """Save, test, train the control, compare."""
        if getattr(self.trainer, "fast_dev_run", False):
            return
        self.seconds, self.steps = time.perf_counter() - self.started, self.trainer.global_step
        names = dict(enumerate(self.datamodule.class_names))
        for network in (self.model.network, self.dense.network):
            network.config.id2label = names
            network.config.label2id = {name: index for index, name in names.items()}
        first = self.trainer.is_global_zero
        tokenizer, rows = self.datamodule.tokenizer, self.datamodule.splits["test"]
        if first:
            save_pretrained(self.model, self.folder / "model", processor=tokenizer, overwrite=True)
        after = named(self.trainer.test(self.model, self.datamodule, verbose=False)[0])
        callback = next((c for c in self.callbacks if isinstance(c, PruningCallback)), None)
        if callback is None:
            if first:
                print(f"Test metrics: {after}. The model is in {self.folder / 'model'}")
            return
        if first:
            rows.save_to_disk(self.folder / "test_rows")
            found = self.compared(f"test rows of {self.options.data.dataset}")
        self.trainer.strategy.barrier()  # latencies are measured on an idle machine
        before: dict[str, float] = {}
        extra: dict[str, Any] = {"before": {}, "after": {"fit_seconds": self.seconds}}
        if self.options.control:
            started = time.perf_counter()
            trainer = self.train_control()
            extra["before"]["fit_seconds"] = time.perf_counter() - started
            before = named(trainer.test(self.dense, self.datamodule, verbose=False)[0])
            if first:
                folder = self.folder / "dense"
                save_pretrained(self.dense, folder, processor=tokenizer, overwrite=True)
        if not first:
            return
        pairs = {name: (before.get(name), value) for name, value in after.items()}
        found = replace(found, metrics=pairs, rows=len(rows))
        rewrite_card(self.model.network, self.folder / "model", found.measured())
        for place, (side, metrics) in enumerate((("before", before), ("after", after))):
            extra[side] |= figures(found, place) | {"metrics": metrics}
        extra |= {"epochs": self.trainer.current_epoch, "test_rows": len(rows)}
        for name in ("report.json", "report.html"):
            callback.report.write(self.folder / name, extra)
        print_summary(found, callback.report, self.seconds, self.folder)

    def compared(self, data: str) -> Comparison:
        """Sizes, MACs and latencies of the dense and the pruned network, measured in turn."""
        device = next(self.model.parameters()).device
        dense, pruned = (  # copies, because training of these models continues
            copy.deepcopy(module.network).to(device).eval() for module in (self.dense, self.model)
        )
        batches: Any = batches_of(str(self.folder / "test_rows"))
        found = compare_networks(dense, pruned, row=first_row(dense, batches))
        return replace(found, data=data)

    @property
    def callbacks(self) -> list[pl.Callback]:
        """The callbacks of the trainer."""
        return list(self.trainer.callbacks)  # type: ignore[attr-defined]

    def train_control(self) -> pl.Trainer:
        """Train the dense model from the same start for as many epochs, without callbacks."""
        Console().rule("dense control, the same number of epochs")
        pl.seed_everything(self.options.seed_everything or 0, workers=True, verbose=False)
        given = self.options.trainer.clone()
        given.callbacks, given.logger, given.enable_checkpointing = None, False, False
        given.max_epochs = self.trainer.current_epoch
        parser = ArgumentParser()
        parser.add_class_arguments(pl.Trainer, "trainer", instantiate=True)
        trainer: pl.Trainer = parser.instantiate(Namespace(trainer=given)).trainer  # type: ignore[no-untyped-call]
        trainer.fit(self.dense, self.datamodule)
        return trainer

    def after_predict(self) -> None:
        """Write the predicted classes beside the model."""
        if self.trainer.world_size > 1:
            raise MisconfigurationException(
                f"predict writes the rows in their order, but each of {self.trainer.world_size} "
                "processes has only a share of them; use --trainer.devices 1."
            )
        predictions: Any = self.trainer.predict_loop.predictions
        rows, names = self.datamodule.splits["test"], self.datamodule.class_names
        texts = self.datamodule.tokenizer.batch_decode(
            rows["input_ids"][:], skip_special_tokens=True
        )
        best, predicted = torch.cat(list(predictions)).max(-1)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label", "predicted", "probability"])
            for text, label, index, share in zip(
                texts, rows["labels"][:], predicted.tolist(), best.tolist(), strict=True
            ):
                writer.writerow([text, names[label], names[index], f"{share:.4f}"])
        Console().print(f"Predictions are in {self.folder / 'predictions.csv'}")


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics without the name of the stage."""
    return {name.removeprefix("test_"): float(value) for name, value in metrics.items()}


def figures(found: Comparison, place: int) -> dict[str, Any]:
    """What was measured of one of both models, for the report."""
    threads = torch.get_num_threads()
    return {
        "macs": found.macs[place] if found.macs else 0,
        "latency_ms": [
            {
                "median": (row.dense_ms, row.ms)[place],
                "batch_size": row.batch,
                "sequence_length": row.length,
                "threads": threads,
                "machine": found.machine,
            }
            for row in found.latency
        ],
    }


def print_summary(found: Comparison, report: PruningReport, training: float, folder: Path) -> None:
    """Print both models side by side, and what pruning took of the training."""
    print_table(found.table())
    pruning = sum(sum(cut.seconds.values()) for cut in report.cuts)
    share = f"{pruning:.0f} of {training:.0f} s of training ({pruning / training:.0%})"
    print(f"Pruning took {share}. The pruned model is in {folder / 'model'}, and the report is")
    print(f"{folder / 'report.html'} (its numbers: {folder / 'report.json'}).")
    if any(dense is not None for dense, _ in found.metrics.values()):
        print(
            f"Measure both again: lightning-mi-prune compare {folder / 'dense'} "
            f"{folder / 'model'} --data {folder / 'test_rows'}"
        )


def main() -> None:
    """Run the command line."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    try:
        TextClassificationCLI(
            TextClassifier,
            TextDataModule,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
        )
    except (PruningError, MisconfigurationException, DataError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
