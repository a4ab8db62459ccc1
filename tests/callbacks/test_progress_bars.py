"""The steps of pruning beside the bars of the Trainer, and what its loggers get."""

from __future__ import annotations

import io
import logging
import re
import sys
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi_prune.callbacks import engine
from lightning_mi_prune.callbacks import progress as shown
from lightning_mi_prune.callbacks.progress import FitDisplay, display_for
from lightning_mi_prune.core.progress import LOGGED, SILENT, Step
from lightning_mi_prune.reporting.report import PruningReport
from tests.support.boring import trainer
from tests.support.pruning import pruning_units
from tests.support.steps import Events

STEPS = ("Gradients", "Calibration", "Ranking", "Reconstruction")


class Small(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        linear, relu = nn.Linear, nn.ReLU
        self.net = nn.Sequential(linear(8, 32), relu(), linear(32, 16), relu(), linear(16, 4))

    def training_step(self, batch, index):
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        x = torch.randn(600, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x), batch_size=150)

    val_dataloader = train_dataloader


class Terminal(io.StringIO):
    def isatty(self):
        return True


def fitted(*callbacks, verbose=True, **options):
    prune = pruning_units(0.5, multiple=1, verbose=verbose)
    run = trainer(prune, *callbacks, max_epochs=3, log_every_n_steps=1, **options)
    run.fit(Small())
    return prune


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_bars_of_the_kind_that_the_trainer_has(kind, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    if kind is RichProgressBar:
        bar = kind(console_kwargs={"file": screen, "force_terminal": True, "width": 100})
    else:
        bar = kind()
    prune = fitted(bar, enable_progress_bar=True)
    text = screen.getvalue()
    for name in STEPS:
        assert re.search(rf"{name} *:? +(\x1b|[━ 0-9])", text), name
    assert str(prune.report).splitlines()[1] in text
    if kind is RichProgressBar:
        assert "Ranking: 2 groups in " in text


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar])
def test_no_bars_of_ours_where_there_is_no_terminal_or_verbose_is_off(kind, monkeypatch, caplog):
    for screen, verbose in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stdout", screen)
        options = {"file": screen, "force_terminal": screen.isatty()}
        bar = kind(console_kwargs=options) if kind is RichProgressBar else kind()
        fitted(bar, enable_progress_bar=True, verbose=verbose)
        text = re.sub(r"Cut at epoch.*", "", screen.getvalue(), flags=re.DOTALL)
        assert not any(f"{name} " in text or f"{name}:" in text for name in STEPS)


def test_every_step_of_a_fit_ends_and_reaches_its_total(monkeypatch):
    events = Events()
    monkeypatch.setattr(engine, "display_for", lambda trainer, verbose: events)
    prune = fitted()
    events.check()
    names = [step.name for step in events.steps]
    assert names == ["discovery", "gradients", "calibration", "ranking", "reconstruction"]
    seconds = prune.report.cuts[0].seconds
    for step in events.steps[1:3]:
        assert 0 < step.seconds <= seconds[step.name]
    assert prune.engine.display is events


def test_only_rank_zero_shows_anything():
    bar = SimpleNamespace(is_global_zero=False, progress_bar_callback=None)
    assert display_for(bar, verbose=True) is SILENT
    bar.is_global_zero = True
    assert display_for(bar, verbose=False) is LOGGED
    assert isinstance(display_for(bar, verbose=True), FitDisplay)


def test_ranks_but_the_first_are_silent(capfd, caplog):
    with caplog.at_level(logging.INFO):
        step = Step("ranking", "group", 1, SILENT)
        SILENT.begin(step)
        step.advance()
        step.end()
    assert (capfd.readouterr(), caplog.records) == (("", ""), [])


def rows_of(folder):
    header, *rows = next(folder.rglob("metrics.csv")).read_text().splitlines()
    named = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    curves = [{k: float(v) for k, v in row.items() if v} for row in named]
    return [row for row in curves if "prune/sparsity" in row]


def test_curves_of_a_csv_file_begin_before_the_first_step(tmp_path):
    prune = fitted(logger=CSVLogger(tmp_path))
    rows = rows_of(tmp_path)
    assert rows[0]["step"] == 0
    assert [row["epoch"] for row in rows] == [0, 0, 1, 2]
    curves = {"parameters", "sparsity", "macs", "information_kept", "seconds"}
    names = {name for name in rows[0] if name.startswith("prune/")}
    assert {f"prune/{name}" for name in curves} < names
    assert sum(name.startswith("prune/width/") for name in names) == 2
    assert all(names <= row.keys() for row in rows)
    report = prune.report
    assert rows[0]["prune/macs"] == report.macs == 8 * 32 + 32 * 16 + 16 * 4
    assert rows[0]["prune/parameters"] == report.parameters
    assert rows[-1]["prune/macs"] == report.cuts[-1].macs
    assert rows[-1]["prune/seconds"] == pytest.approx(sum(report.seconds.values()), rel=1e-4)
    spent = [row["prune/seconds"] for row in rows]
    assert spent == sorted(spent)


def test_tensorboard_gets_curves_and_figures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    prune = fitted(logger=logger)
    found = EventAccumulator(logger.log_dir).Reload()
    values = [event.value for event in found.Scalars("prune/parameters")]
    assert values[0] == prune.report.parameters
    assert values[-1] == prune.report.cuts[-1].parameters
    assert found.Tags()["images"] == ["prune/widths"]


class Images(Logger):
    """Takes pictures as that of Weights & Biases does."""

    name, version = "images", 0

    def __init__(self):
        super().__init__()
        self.images, self.metrics = {}, []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_image(self, key, images, step=None, **kwargs):
        self.images[key] = images


def test_loggers_that_take_images_get_the_figures_if_matplotlib_is_there(monkeypatch):
    logger = Images()
    prune = fitted(logger=logger)
    ((name, (picture,)),) = logger.images.items()
    assert name == "prune/widths"
    assert [axes.get_ylabel() for axes in picture.axes] == ["ffn kept"]
    step, first = next((s, m) for s, m in logger.metrics if "prune/macs" in m)
    assert step == 0
    assert first["prune/sparsity"] == 0
    logger.images.clear()
    monkeypatch.setattr(shown, "find_spec", lambda name: None)
    shown.log_figures(trainer(logger=logger), prune.report)
    assert logger.images == {}


def test_a_logger_that_refuses_a_figure_costs_no_run(monkeypatch):
    logger = Images()
    monkeypatch.setattr(logger, "log_image", lambda **given: 1 / 0)
    with pytest.warns(match="could not be logged"):
        report = fitted(logger=logger).report
    assert isinstance(report, PruningReport)
    assert len(report.cuts) == 1
