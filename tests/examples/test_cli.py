"""The command line of the example, from a YAML to a folder that opens again."""

import contextlib
import csv
import io
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from examples.text_classification.__main__ import TextClassificationCLI
from examples.text_classification.data import TextDataModule
from examples.text_classification.model import TextClassifier
from lightning_mi_prune import PruningPlan, from_pretrained, load_pruned
from lightning_mi_prune.allocation.measuring import measure_latency
from lightning_mi_prune.cli import main
from lightning_mi_prune.export import compare as measure
from tests.support.ranks import launch

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def short_latency(calls: Any, *, seconds: float = 0) -> dict[str, float]:
    """Latencies from one round."""
    return measure_latency(calls, seconds=0.02, rounds=1)


@pytest.fixture
def config(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model and data in a folder of their own, and the demo's YAML pointed at them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["text_classification"])
    monkeypatch.setattr(measure, "measure_latency", short_latency)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of LightningCLI's own calls
    shape = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 40}
    network = BertForSequenceClassification(
        BertConfig(**shape, num_attention_heads=4, vocab_size=305)
    )
    network.save_pretrained("tiny")
    BertTokenizer.from_pretrained(model).save_pretrained("tiny")
    rows = [{"text": f"w{i % 7} w{i} w{i % 5}", "label": "ab"[i % 2]} for i in range(290)]
    with Path("all.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    demo: dict[str, Any] = yaml.safe_load(
        (ROOT / "examples/text_classification/demo.yaml").read_text()
    )
    demo["trainer"] |= {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False}
    demo["trainer"]["enable_model_summary"] = False
    demo["model"]["model"] = "tiny"
    demo["data"]["dataset"] = "all.csv"
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(demo))
    return path


def run(*arguments: str) -> TextClassificationCLI:
    return TextClassificationCLI(
        TextClassifier,
        TextDataModule,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        args=list(arguments),
    )


def score(*arguments: str) -> float:
    cli = run("test", *arguments)
    return float(cli.trainer.callback_metrics["test_accuracy"])


def test_fit_reports_and_its_results_open_again(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", "--config", str(config))
    report = json.loads(Path("runs/demo/report.json").read_text())
    for side in ("before", "after"):
        assert {"parameters", "prunable_parameters", "macs", "metrics", "latency_ms"} <= set(
            report[side]
        )
        assert 0 <= report[side]["metrics"]["accuracy"] <= 1
        assert report[side]["fit_seconds"] > 0
        for latency in report[side]["latency_ms"]:
            assert {"median", "batch_size", "sequence_length", "threads"} <= set(latency)
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["after"]["prunable_parameters"] <= 0.5 * report["before"]["prunable_parameters"]
    (cut,) = report["cuts"]
    assert sum(cut["seconds"].values()) < report["after"]["fit_seconds"]
    assert cut["epoch"] == 1
    assert cut["sparsity"] >= 0.5
    steps = {"discovery", "calibration", "gradients", "ranking", "reconstruction", "surgery"}
    assert set(cut["seconds"]) == steps
    for group in cut["groups"]:
        assert set(group) == {
            "name",
            "kind",
            "before",
            "after",
            "information_nats",
            "information_fraction",
        }

    accuracy = report["after"]["metrics"]["accuracy"]
    assert score("--config", str(config), "--model.model", "runs/demo/model") == accuracy
    (checkpoint,) = Path("runs/demo").rglob("*.ckpt")
    assert score("--config", str(config), "--ckpt_path", str(checkpoint)) == accuracy

    # The files of the run give its table again.
    capsys.readouterr()
    words = ["--batch", "1", "32", "--length", "64", "--seconds", "0.02", "--json"]
    main(["compare", "runs/demo/dense", "runs/demo/model", "--data", "runs/demo/test_rows", *words])
    table = json.loads(capsys.readouterr().out)
    for side, old in (("dense", report["before"]), ("pruned", report["after"])):
        for key in ("parameters", "prunable_parameters", "macs", "metrics"):
            assert table[side][key] == old[key], key
    sizes = [(row["batch_size"], row["sequence_length"]) for row in report["after"]["latency_ms"]]
    assert [(row["batch"], row["length"]) for row in table["latency_ms"]] == sizes
    assert table["rows"] == report["test_rows"]

    saved = json.loads(Path("runs/demo/model/config.json").read_text())
    assert saved["label2id"] == {"a": 0, "b": 1}
    plan = PruningPlan.from_json(saved["pruning_plan"])
    for group in cut["groups"]:
        assert plan.width(group["name"].partition(".")[2]) == group["after"]
    reloaded = from_pretrained(BertForSequenceClassification, "runs/demo/model")
    assert sum(p.numel() for p in reloaded.parameters()) == report["after"]["parameters"]


def test_test_rows_are_not_used_for_calibration(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.Tensor] = []
    inner = TextClassifier.validation_step

    def record(self: TextClassifier, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        used.append(batch["input_ids"][:, 2])  # the word that identifies the row
        inner(self, batch, batch_idx)

    monkeypatch.setattr(TextClassifier, "validation_step", record)
    cli = run("fit", "--config", str(config), "--control", "false")
    test_rows = {ids[2] for ids in cli.datamodule.splits["test"]["input_ids"][:]}
    assert len(test_rows) == 58
    assert not test_rows & set(torch.cat(used).tolist())
    report = json.loads(Path("runs/demo/report.json").read_text())
    assert report["before"]["metrics"] == {}


def test_validate_and_predict(config: Path) -> None:
    run("validate", "--config", str(config))
    run("predict", "--config", str(config))
    with Path("runs/demo/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 58
    assert {row["predicted"] for row in rows} <= {"a", "b"}
    for row in rows:  # the text determines its label
        number = int(row["text"].split()[1].removeprefix("w"))
        assert row["label"] == "ab"[number % 2]


def test_a_plain_run_without_the_callback_is_saved_too(config: Path) -> None:
    run("fit", "--config", str(config), "--trainer.callbacks", "null")
    assert not Path("runs/demo/report.json").exists()
    score("--config", str(config), "--model.model", "runs/demo/model")


def test_a_pruned_model_is_trained_on_without_a_further_cut(config: Path) -> None:
    """With a profiler in the trainer, which the control's trainer must build again."""
    options = ["--config", str(config), "--trainer.profiler", "SimpleProfiler"]
    run("fit", *options, "--control", "false")
    again = ["--model.model", "runs/demo/model", "--name", "again"]
    run("fit", *options, *again)
    first, second = (
        json.loads(Path("runs", name, "report.json").read_text()) for name in ("demo", "again")
    )
    assert second["cuts"] == []
    for key in ("parameters", "prunable_parameters"):
        assert second["before"][key] == first["before"][key]
    assert second["after"]["parameters"] == first["after"]["parameters"]


def test_layers_go_first_in_the_yaml_that_is_laid_over(config: Path) -> None:
    text = (ROOT / "examples/text_classification/layers.yaml").read_text()
    over: dict[str, Any] = yaml.safe_load(text)
    over["trainer"]["callbacks"][0]["init_args"]["target_layers"] = 1
    over["trainer"]["callbacks"][1]["init_args"]["sparsity"] = 0.75  # one of two layers is half
    Path("layers.yaml").write_text(yaml.safe_dump(over))
    run("fit", "--config", str(config), "--config", "layers.yaml", "--trainer.max_epochs", "5")
    report = json.loads(Path("runs/layers/report.json").read_text())
    layers, units = report["cuts"]
    (stack,) = layers["stacks"]
    assert (stack["before"], len(stack["after"])) == ([0, 1], 1)
    assert Path("runs/layers", stack["picture"]).read_bytes().startswith(b"\x89PNG")
    assert units["sparsity"] >= 0.75
    assert report["after"]["macs"] < report["before"]["macs"]
    opened = from_pretrained(BertForSequenceClassification, Path("runs/layers/model"))
    assert opened.config.num_hidden_layers == len(opened.bert.encoder.layer) == 1
    again = score("--config", str(config), "--model.model", "runs/layers/model", "--name", "again")
    assert again == pytest.approx(report["after"]["metrics"]["accuracy"])


def test_options_of_the_callback_are_checked_on_the_command_line(config: Path) -> None:
    with pytest.raises(ValueError, match=r"sparsity=1.5; expected a number above 0 and below 1"):
        run("fit", "--config", str(config), "--trainer.callbacks.init_args.sparsity", "1.5")


def test_the_demo_is_pruned_in_one_shot_by_the_command(config: Path) -> None:
    """From its YAML, whose callbacks train; the class of the CLI links the number of classes."""
    example = "examples.text_classification"
    words = ["prune", str(config), "--model", f"{example}.model.TextClassifier"]
    words += ["--data", f"{example}.data.TextDataModule", "--sparsity", "0.5"]
    main([*words, "--cli", f"{example}.__main__.TextClassificationCLI"])
    module = load_pruned(TextClassifier, "pruned.ckpt")
    other = load_pruned(TextClassifier("tiny", 2), "pruned.ckpt")
    whole = sum(p.numel() for p in TextClassifier("tiny", 2).parameters())
    assert sum(p.numel() for p in module.parameters()) < whole
    state = other.state_dict()
    assert all(torch.equal(state[name], value) for name, value in module.state_dict().items())


def program_on_a_rank(folder: Path, *words: str) -> str:
    """What the program prints on this rank, run as ``python -m`` runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(measure, "measure_latency", short_latency)
        patch.setattr(sys, "argv", ["text_classification", *words])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_module("examples.text_classification", run_name="__main__", alter_sys=True)
    return printed.getvalue()


def test_two_ranks_write_one_report(config):
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--name", "pair"]
    printed = launch(2, program_on_a_rank, Path.cwd(), "fit", "--config", str(config), *options)
    line = "The pruned model is in"
    assert {rank: text.count(line) for rank, text in printed.items()} == {0: 1, 1: 0}
    report = json.loads(Path("runs/pair/report.json").read_text())
    assert report["after"]["parameters"] < report["before"]["parameters"]
    assert report["before"]["metrics"]


def test_predictions_of_shares_are_refused():
    stub = SimpleNamespace(trainer=SimpleNamespace(world_size=2))
    with pytest.raises(MisconfigurationException, match="each of 2 processes has only a share"):
        TextClassificationCLI.after_predict(stub)
