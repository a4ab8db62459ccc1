"""Fine-tune a text classifier while it gets smaller.

    python -m examples.text_classification fit --config examples/text_classification/demo.yaml

`fit` trains with the callbacks of the YAML, tests on rows that calibration did not use, trains a
dense control for the same number of epochs, and writes the pruned model, its tokenizer and
`report.json` to `runs/<name>/`, the control and the test rows to `dense` and `test_rows` there.
`validate`, `test` and `predict` take the same YAML.
"""

import copy
import csv
import sys
import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
from jsonargparse import ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

from examples.text_classification.data import TextDataModule
from examples.text_classification.model import TextClassifier
from examples.text_classification.packaged import DataError
from lightning_mi_prune import PruningError
from lightning_mi_prune.allocation.measuring import measure_latency
from lightning_mi_prune.callbacks.base import PruningCallback


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
        self.model.network.config.id2label = names
        self.model.network.config.label2id = {name: index for index, name in names.items()}
        first = self.trainer.is_global_zero
        if first:
            self.model.network.save_pretrained(self.folder)
            self.datamodule.tokenizer.save_pretrained(self.folder)
        after = named(self.trainer.test(self.model, self.datamodule, verbose=False)[0])
        callback = next((c for c in self.callbacks if isinstance(c, PruningCallback)), None)
        if callback is None:
            if first:
                print(f"Test metrics: {after}. The model is in {self.folder}")
            return
        extra: dict[str, Any] = {
            "before": {"metrics": {}},
            "after": {"metrics": after, "fit_seconds": self.seconds},
            "epochs": self.trainer.current_epoch,
            "test_rows": len(self.datamodule.splits["test"]),
        }
        path = self.folder / "report.json"
        if first:
            latency = compare_latency(self.dense.network, self.model.network)
            for side, measured in latency.items():
                extra[side]["latency_ms"] = measured
            callback.report.write(path, extra)
        self.trainer.strategy.barrier()  # latencies are measured on an idle machine
        if self.options.control:
            started = time.perf_counter()
            trainer = self.train_control()
            extra["before"]["fit_seconds"] = time.perf_counter() - started
            metrics = trainer.test(self.dense, self.datamodule, verbose=False)[0]
            extra["before"]["metrics"] = named(metrics)
            if first:
                self.dense.network.save_pretrained(self.folder / "dense")
                self.datamodule.splits["test"].save_to_disk(self.folder / "test_rows")
        if first:
            callback.report.write(path, extra)
            print_summary(callback.report.to_dict(), extra, self.folder)

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


def compare_latency(before: Any, after: Any, length: int = 64) -> dict[str, list[dict[str, Any]]]:
    """Median forward time of both encoders in ms, measured in turn, at batch sizes 1 and 32."""
    results: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    device = next(after.parameters()).device
    encoders = [  # copies, because training of these models continues
        copy.deepcopy(network.base_model).to(device).eval() for network in (before, after)
    ]
    for batch_size in (1, 32):
        ids = torch.randint(5, before.config.vocab_size, (batch_size, length), device=device)
        calls = {
            side: partial(_run, encoder, ids)
            for side, encoder in zip(results, encoders, strict=True)
        }
        for side, median in measure_latency(calls).items():
            results[side].append(
                {
                    "median": median,
                    "batch_size": batch_size,
                    "sequence_length": length,
                    "threads": torch.get_num_threads(),
                    "device": device.type,
                }
            )
    return results


@torch.inference_mode()
def _run(encoder: Any, ids: torch.Tensor) -> None:
    encoder(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()


def print_summary(report: dict[str, Any], extra: dict[str, Any], folder: Path) -> None:
    """Print both models side by side."""
    table = Table(title=f"{extra['epochs']} epochs, {extra['test_rows']} test rows")
    for name in ("", "dense", "pruned", "ratio"):
        table.add_column(name, justify="right" if name else "left")
    before, after = (report[side] | extra[side] for side in ("before", "after"))
    for key in ("parameters", "prunable_parameters", "macs"):
        if not after[key]:
            continue  # MACs are counted during calibration; there was none
        ratio = before[key] / after[key]
        table.add_row(key.replace("_", " "), f"{before[key]:,}", f"{after[key]:,}", f"{ratio:.2f}x")
    for old, new in zip(before["latency_ms"], after["latency_ms"], strict=True):
        table.add_row(
            f"encoder, batch {old['batch_size']} x {old['sequence_length']}, ms",
            f"{old['median']:.1f}",
            f"{new['median']:.1f}",
            f"{old['median'] / new['median']:.2f}x",
        )
    for name, value in after["metrics"].items():
        dense = before["metrics"].get(name)
        table.add_row(
            f"test {name}",
            "not trained" if dense is None else f"{dense:.2%}",
            f"{value:.2%}",
            "" if dense is None else f"{100 * (value - dense):+.2f} points",
        )
    pruning = sum(sum(cut["seconds"].values()) for cut in report["cuts"])
    training = after["fit_seconds"]
    Console().print(
        table,
        f"\nPruning took {pruning:.0f} of {training:.0f} s of training ({pruning / training:.0%}).",
        f"\nThe pruned model and report.json are in {folder}",
    )
    if before["metrics"]:
        print(
            f"Measure both again: lightning-mi-prune compare {folder / 'dense'} {folder} "
            f"--data {folder / 'test_rows'}"
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
