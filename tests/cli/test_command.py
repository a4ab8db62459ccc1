"""The command: any LightningCLI file, one line per error, a checkpoint that opens again."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from datasets import Dataset
from jsonargparse.typing import Path_fr
from lightning.pytorch.cli import LightningCLI
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from lightning_mi_prune import PruningError, load_pruned, options, prune
from lightning_mi_prune.cli import main
from lightning_mi_prune.cli.printing import Shown
from lightning_mi_prune.cli.pruning import OPTIONS, prune_module
from tests.support.boring import Classifier, Sentences, trainer
from tests.support.models import CONFIGS, randomize
from tests.support.packages import hide
from tests.support.zoo import learner

ROOT = Path(__file__).parents[2]

STUB = SimpleNamespace(shown=lambda: Shown({}))

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


class Net(pl.LightningModule):
    """A classifier whose number of classes the user's own command line takes from the data."""

    def __init__(self, num_classes: int, lr: float = 1e-3, act: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["act"])
        config = CONFIGS["bert"](num_labels=num_classes)
        self.network = AutoModelForSequenceClassification.from_config(config)
        randomize(self.network)

    def training_step(self, batch, index):
        return self.network(**batch).loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.network(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Rows(pl.LightningDataModule):
    """Data that know the number of classes."""

    def __init__(self, rows: int = 64, folder: str = "") -> None:
        super().__init__()
        self.rows, self.num_classes = rows, 3

    def train_dataloader(self):
        return DataLoader(Sentences(32), batch_size=16)

    def val_dataloader(self):
        return DataLoader(Sentences(self.rows, seed=1), batch_size=32)


class Located(Rows):
    """Data in a file, given relative to the YAML."""

    def __init__(self, file: Path_fr) -> None:
        super().__init__()
        self.file = file


class Own(Net):
    """Brings its dataloaders along."""

    def prepare_data(self):
        self.prepared = True

    def setup(self, stage):
        assert self.prepared
        self.rows = Rows()

    def train_dataloader(self):
        return self.rows.train_dataloader()

    def val_dataloader(self):
        return self.rows.val_dataloader()


class Several(Own):
    """Two validation sets, and batches that are made whole only on the device."""

    def validation_step(self, batch, index, dataloader_idx):
        self.log(f"val_{dataloader_idx}", self.network(**batch).loss)
        self.seen = {*getattr(self, "seen", ()), dataloader_idx}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert batch.pop("extra") == 1
        return batch

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return {**batch, "extra": 1}

    def train_dataloader(self):
        return self.rows.train_dataloader()

    def val_dataloader(self):
        return [self.rows.val_dataloader(), self.rows.train_dataloader()]


class Faulty(Net):
    """A module with a fault of its own."""

    def training_step(self, batch, index):
        return self.network(**batch).lost


class Typed(LightningCLI):
    """The user's own: links, an option, and hooks that are for runs."""

    def __init__(self, *args, **kwargs):
        raise AssertionError("builds its classes itself")

    def add_arguments_to_parser(self, parser):
        parser.add_argument("--name", default="run")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")

    def before_instantiate_classes(self):
        raise AssertionError("needs a subcommand")

    after_instantiate_classes = before_instantiate_classes


def named(name):
    return f"{__name__}.{name}"


TRAINER = {"accelerator": "cpu", "enable_progress_bar": False}
CLASSES = ["--model", named("Net"), "--data", named("Rows")]
BARE = {"model": {"num_classes": 3}, "data": {"rows": 48}, "trainer": TRAINER}
NAMED = {
    "model": {"class_path": named("Net"), "init_args": {"num_classes": 3}},
    "data": {"class_path": named("Rows"), "init_args": {"rows": 48}},
    "trainer": TRAINER,
}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lightning-mi-prune"])
    monkeypatch.setattr("sys.path", [*sys.path])


def write(body, name="run.yaml"):
    Path(name).write_text(body if isinstance(body, str) else yaml.safe_dump(body))
    return [name]


def opened(path="pruned.ckpt", cls=Net):
    """The checkpoint, opened with the class and into a module: the same, smaller module."""
    module, other = load_pruned(cls, path), load_pruned(cls(3), path)
    state, same = module.state_dict(), other.state_dict()
    assert all(torch.equal(state[name], same[name]) for name in state)
    size = sum(p.numel() for p in module.parameters())
    assert size < sum(p.numel() for p in cls(3).parameters())
    return module


def refused(capsys, *words):
    """The one line of an error; no other output, and no file."""
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main(["prune", *words])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = [line for line in printed.err.splitlines() if not line.startswith("ignored, ")]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert sorted(Path().rglob("*")) == before
    return lines[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What Lightning itself writes: ``config.yaml`` and a checkpoint of a run whose CLI links."""

    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser):
            Typed.add_arguments_to_parser(self, parser)

    folder = tmp_path_factory.mktemp("saved")
    made = {}
    for form, (model, data) in {"bare": (Net, Rows), "named": (None, None)}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["train.py"])
            options = {**TRAINER, "max_steps": 1, "default_root_dir": str(folder / form)}
            options |= {"enable_model_summary": False, "limit_val_batches": 1}
            words = [] if model else ["--model", named("Net"), "--model.num_classes", "3"]
            words += [] if model else ["--data", named("Rows")]
            cli = (Linked if model else LightningCLI)(
                model, data, args=["fit", *words], trainer_defaults=options
            )
            path = Path(cli.trainer.checkpoint_callback.best_model_path)
            made[form] = (path.parent.parent / "config.yaml", path)
    return made


@pytest.mark.parametrize("form", ["bare", "named"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:No seed found")
def test_the_file_that_lightning_saves(form, saved, capsys):
    config, checkpoint = saved[form]
    body = yaml.safe_load(config.read_text())
    assert ("num_classes" in str(body["model"])) == (form == "named")  # where a link was, no value
    classes = CLASSES if form == "bare" else []
    files = ["--config", str(config), *classes]
    if form == "bare":
        line = refused(capsys, *files)
        assert re.search(r"model.num_classes has no value.*--model.num_classes VALUE", line)
    main(["prune", *files, "--checkpoint", str(checkpoint), "--output", "out/small.ckpt"])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("ignored")]
    for key in ("ckpt_path", "optimizer", "lr_scheduler", "weights_only", "trainer.max_steps"):
        assert key in line
    opened("out/small.ckpt")
    assert [path.name for path in Path("out").iterdir()] == ["small.ckpt"]


HOSTILE = {
    **TRAINER,
    "callbacks": [{"class_path": "lightning_mi_prune.MutualInformationPruning"}, {"class_path": 3}],
    "logger": {"class_path": "nowhere.Logger"},
    "profiler": "nonsense",
    "strategy": "ddp",
    "devices": 4,
    "num_nodes": 2,
    "enable_checkpointing": True,
    "fast_dev_run": True,
    "my_own": 1,
}
FORMS = {
    "bare": (BARE, CLASSES),
    "named": (NAMED, []),
    "named, and given": (
        {**NAMED, "model": {**NAMED["model"], "class_path": "__main__.Net"}},
        CLASSES[:2],
    ),
    "one of each": ({**BARE, "data": NAMED["data"]}, CLASSES[:2]),
    "a class path": ({**NAMED, "data": named("Rows")}, []),
    "stages": (
        {"fit": {**BARE, "ckpt_path": None, "verbose": True}, "validate": {"model": 3}, "name": 1},
        CLASSES,
    ),
    "only a later stage": ({"seed_everything": 3, "test": NAMED}, []),
    "empty sections": (
        {"model": {}, "data": {}, "trainer": {}, "optimizer": {}},
        [*CLASSES, "--model.num_classes", "3", "--trainer.accelerator", "cpu"],
    ),
    "no section of its own": ({"trainer": TRAINER}, [*CLASSES, "--model.num_classes", "3"]),
    "arguments in init_args": (
        {"trainer": TRAINER, "model": {"init_args": {"num_classes": 3}}},
        [*CLASSES, "--model.init_args.lr", "1e-2"],
    ),
    "seed true": ({**BARE, "seed_everything": True}, CLASSES),
    "seed null": ({**BARE, "seed_everything": None}, CLASSES),
    "seed": ({**NAMED, "seed_everything": 7}, []),
    "trainer for training": ({**NAMED, "trainer": HOSTILE}, ["--trainer.max_epochs", "3"]),
    "own dataloaders": ({**NAMED, "data": None, "model": named("Own")}, ["--model.num_classes=3"]),
    "options": (
        {
            **NAMED,
            "sparsity": 0.3,
            "kinds": ["ffn"],
            "constraints": {"floors": {"ffn$": 0.25}},
            "importance": {"relevance": None},
        },
        ["--sparsity", "0.5", "--evaluate", "none", "--reconstruction.method", "compensation"],
    ),
    "the user's own": (
        {"trainer": TRAINER, "name": "mine"},
        [*CLASSES, "--cli", named("Typed")],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_any_file_of_a_lightning_cli(form):
    body, words = FORMS[form]
    main(["prune", *write(body), *words])
    opened(cls=Own if form == "own dataloaders" else Net)


def test_with_json_nothing_else_is_on_stdout(capsys):
    """Not even the bar of Lightning."""
    main(["prune", *write(NAMED), "--trainer.enable_progress_bar", "true", "--json"])
    shown = json.loads(capsys.readouterr().out)
    module = opened()
    assert shown["checkpoint"] == "pruned.ckpt"
    assert shown["after"]["parameters"] == sum(p.numel() for p in module.parameters())
    assert shown["before"]["parameters"] == sum(p.numel() for p in Net(3).parameters())
    assert set(shown["before"]["metrics"]) == set(shown["after"]["metrics"]) == {"val_loss"}
    main(["info", "pruned.ckpt", "--json"])
    assert json.loads(capsys.readouterr().out)["plan_digest"] == shown["plan_digest"]


def test_files_are_laid_over_each_other_and_words_over_files(monkeypatch):
    """In both forms, in any order of forms, and from parts that are files of their own."""
    found = []
    monkeypatch.setattr(
        "lightning_mi_prune.cli.pruning.prune_module",
        lambda model, data, trainer, **given: found.append((model.hparams, data, given)) or STUB,
    )
    Path("sub").mkdir()
    write({"num_classes": 4, "lr": 0.5}, "sub/model.yaml")
    over = {"model": {"lr": 0.25}, "data": {"rows": 8}, "sparsity": 0.25}
    over |= {"constraints": {"multiple": 4, "floor": 0.25}, "batch_norm": False}
    first = {"constraints": {"caps": {"ffn$": 12}, "floor": 0.5}}
    for body, words in (({**BARE, **first}, CLASSES), ({**NAMED, **first}, [])):
        for under in (body, {**body, "model": "sub/model.yaml"} if words else body):
            given = [*write(under), *write(over, "over.yaml"), *words, "--constraints.floor", "0.1"]
            main(["prune", *given, "--data.rows", "16", "--sparsity=0.125"])
            hparams, data, used = found.pop()
            assert hparams["num_classes"] == (3 if under is body else 4)
            assert hparams["lr"] == 0.25
            assert data.rows == 16
            assert (used["batch_norm"], used["sparsity"]) == (False, 0.125)
            assert used["constraints"] == options.Constraints(
                caps={"ffn$": 12}, floor=0.1, multiple=4
            )
            assert used["reconstruction"] == options.Reconstruction()
    main(["prune", *write(over, "over.yaml"), *write(NAMED), "--data.init_args.rows", "24"])
    assert found.pop()[1].rows == 24


@pytest.mark.parametrize("form", ["bare", "named"])
def test_paths_in_a_file_are_relative_to_it(form, monkeypatch):
    found = []
    monkeypatch.setattr(
        "lightning_mi_prune.cli.pruning.prune_module",
        lambda model, data, *_, **__: found.append(data) or STUB,
    )
    Path("sub").mkdir()
    data = {"file": "rows.csv"}
    if form == "named":
        data = {"class_path": named("Located"), "init_args": data}
    Path("sub/rows.csv").touch()
    words = CLASSES[:2] if form == "named" else [*CLASSES[:3], named("Located")]
    main(["prune", *write({**BARE, "data": data}, "sub/run.yaml"), *words])
    assert Path(found.pop().file.absolute) == Path("sub/rows.csv").resolve()


def test_the_users_own_command_line_links_what_it_links(monkeypatch):
    given = {"max_epochs": 9, "callbacks": 3}
    found = []
    monkeypatch.setattr(
        "lightning_mi_prune.cli.pruning.prune_module",
        lambda model, data, trainer, **_: found.append((model.hparams.lr, trainer)) or STUB,
    )

    def more(self, parser):
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("trainer.max_epochs", "model.lr", compute_fn=float)

    monkeypatch.setattr(Typed, "add_arguments_to_parser", more)
    main(["prune", *write({"trainer": {**TRAINER, **given}}), *CLASSES, "--cli", named("Typed")])
    lr, used = found.pop()
    assert lr == 9.0
    assert used.max_epochs != 9
    assert not [c for c in used.callbacks if type(c).__module__.startswith("lightning_mi_prune")]


def test_several_validation_sets_and_the_hooks_of_batches(monkeypatch):
    modules = []
    inner = prune_module

    def keep(model, *args, **options):
        modules.append(model)
        return inner(model, *args, **options)

    monkeypatch.setattr("lightning_mi_prune.cli.pruning.prune_module", keep)
    body = {**NAMED, "data": None, "model": named("Several")}
    main(["prune", *write(body), "--model.num_classes", "3", "--evaluate", "none"])
    assert modules[0].seen == {0, 1}
    opened(cls=Several)


WRONG = {
    "no option": ([*CLASSES, "--zork", "3"], r"--zork is no option; see --help"),
    "misspelt": ([*CLASSES, "--sparsty", "3"], r"--sparsty is no option; did you mean --sparsity"),
    "no value": ([*CLASSES, "--sparsity"], r"--sparsity has no value"),
    "one dash": (["-sparsity", "3"], r"'-sparsity' is no option; expected --NAME VALUE"),
    "no such file": (["nix.yaml"], r"cannot be read from .nix.yaml. .No such file"),
    "a word": ([*CLASSES, "--sparsity", "abc"], r"sparsity: expected .*float.*abc"),
    "out of range": ([*CLASSES, "--sparsity", "60"], r"sparsity=60.*above 0 and below 1"),
    "two budgets": ([*CLASSES, "--sparsity=.5", "--target_macs=9"], r"exactly one of"),
    "a choice": (
        [*CLASSES, "--importance.relevance", "abc"],
        r"importance.relevance: expected one of 'gradient', 'weights'; given value: abc",
    ),
    "a loop": ([*CLASSES, "--evaluate", "abc"], r"expected one of 'validate', 'test', 'none'"),
    "not a list": ([*CLASSES, "--kinds", "3"], r"kinds: expected a list.*3"),
    "floor": ([*CLASSES, "--constraints.floor", "2"], r"floor=2.* below 1"),
    "a field": ([*CLASSES, "--floor", "2"], r"--floor is no.*did you mean --constraints.floor\?"),
    "no field": (
        [*CLASSES, "--constraints.flor", "2"],
        r"--constraints.flor is no option; did you mean --constraints.floor\?",
    ),
    "no kind": ([*CLASSES, "--kinds", "[zork]"], r"zork"),
    "no data set": (
        ["--model", named("Net"), "--model.num_classes=3", "--data", "nowhere/rows"],
        r"data set 'nowhere/rows' cannot be opened.*save_to_disk",
    ),
    "rows of a batch": ([*CLASSES, "--batch_size", "few"], r"batch_size: expected an int"),
    "out of reach": ([*CLASSES, "--target_parameters", "5"], r"out of reach"),
    "nothing": ([*CLASSES, "--include", "nowhere"], r"include='nowhere' matches no"),
    "no class": ([*CLASSES[:2], "--data", "tests.nix.Rows"], r"no module 'tests.nix'.*--data my"),
    "no name in it": ([*CLASSES[2:], "--model", named("Nit")], r"no 'Nit' in '.*test_command'"),
    "another class": (
        [*CLASSES[2:], "--model", named("Rows")],
        r"is no LightningModule of l",
    ),
    "a bare name": ([*CLASSES[2:], "--model", "Net"], r"'Net': its module is missing"),
    "no model class": (CLASSES[2:], r"The model: of the file names no class.*--model mypackage"),
    "no data class": (CLASSES[:2], r"The data: of the file names no class.*--data mypackage"),
    "no file": (["--config", "nix.yaml"], r"cannot be read from .nix.yaml. .No such file"),
    "an argument": ([*CLASSES, "--model.num", "3"], r"--model.num=3; model takes num_classes, lr"),
    "its type": ([*CLASSES, "--model.lr", "x"], r"model.lr: expected a float; got value: x"),
    "a class in it": ([*CLASSES, "--model.act", "torch.nn.Rel"], r"model.act: .*torch.nn.Rel"),
    "no trainer option": ([*CLASSES, "--trainer.x", "3"], r"--trainer.x is no option of Trainer"),
    "accelerator": ([*CLASSES, "--trainer.accelerator", "abc"], r"trainer: .*'abc'"),
    "precision": ([*CLASSES, "--trainer.precision", "abc"], r"trainer.precision: .*abc"),
    "no checkpoint": ([*CLASSES, "--checkpoint", "nix"], r"checkpoint='nix'; expected a file"),
    "no such weights": ([*CLASSES, "--checkpoint", "run.yaml"], r"run.yaml is not a checkpoint"),
    "a folder": (
        [*CLASSES, "--output", "."],
        r"checkpoint cannot be written to \. \(it is a folder\)",
    ),
    "no folder": (
        [*CLASSES, "--output", "run.yaml/x.ckpt"],
        r"cannot be written to run.yaml/x.ckpt",
    ),
    "itself": (
        [*CLASSES, "--output", "./run.yaml", "--checkpoint", "run.yaml"],
        r"output='run.yaml' is the checkpoint",
    ),
    "not their option": (
        [*CLASSES, "--cli", named("Typed"), "--zork", "3"],
        r"unrecognized arguments: --zork=3",
    ),
    "not their class": ([*CLASSES, "--cli", named("Net")], r"Net' is no LightningCLI"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_on_the_command_line_is_one_line(case, capsys):
    words, message = WRONG[case]
    files = write(BARE)
    assert re.search(message, refused(capsys, *(files if case != "no file" else []), *words))


BODIES = {
    "yaml": ("model: [1", r"run.yaml is no valid YAML in line 2"),
    "a list": ("- 1", r"run.yaml holds no names"),
    "empty": ("", r"run.yaml holds no names"),
    "no model": ({"trainer": TRAINER}, r"There is no model"),
    "no data": ({**NAMED, "data": None}, r"Net has no val_dataloader.*--data mypackage.MyData"),
    "misspelt": ({**NAMED, "sparsty": 0.6}, r"'sparsty' in the file.*'sparsity'.*--cli"),
    "misspelt beside stages": ({"fit": {**NAMED, "inclde": None}}, r"'inclde'.*'include'"),
    "misspelt field": (
        {**NAMED, "constraints": {"flors": {}}},
        r"constraints.flors is no option; did you mean constraints.floors\?",
    ),
    "trainer": ({**NAMED, "trainer": {"acelerator": "cpu"}}, r"'trainer.acelerator'"),
    "trainer is a list": ({**NAMED, "trainer": [1]}, r"trainer=\[1\]"),
    "stage is a list": ({"fit": [1]}, r"fit=\[1\]; expected names"),
    "range": ({**NAMED, "sparsity": 60}, r"sparsity=60.*above 0 and below 1"),
    "type": ({**NAMED, "sparsity": "lots"}, r"sparsity: expected a float; given value: lots"),
    "map": ({**NAMED, "constraints": {"floors": 3}}, r"floors: expected a mapping.*3"),
    "record": ({**NAMED, "constraints": 3}, r"constraints=3; expected names with values"),
    "model": ({**NAMED, "model": 3}, r"model=3; expected names with values, or a class path"),
    "class": ({**NAMED, "model": {"class_path": 3}}, r"model.class_path=3"),
    "path": ({**NAMED, "model": "nix.Net"}, r"'nix.Net': there is no module 'nix'"),
    "script": ({**NAMED, "model": "__main__.Net"}, r"of the script that wrote the file; .*--model"),
    "missing": ({**NAMED, "model": named("Net")}, r"model.num_classes has no value"),
    "argument": (
        {**NAMED, "model": {"class_path": named("Net"), "init_args": {"num_classes": 3, "x": 1}}},
        r"model: .*'x' is not accepted; model takes num_classes, lr, act",
    ),
    "argument's type": (
        {**NAMED, "model": {"class_path": named("Net"), "init_args": {"num_classes": "a"}}},
        r"num_classes: expected an int",
    ),
    "no rows": ({**BARE, "data": {"class_path": named("Rows"), "init_args": {"rows": 0}}}, "batch"),
}


@pytest.mark.parametrize("case", BODIES)
def test_what_is_wrong_in_a_file_is_one_line(case, capsys):
    body, message = BODIES[case]
    words = [*CLASSES[:2], "--evaluate", "none"] if case == "no rows" else []
    assert re.search(message, refused(capsys, *write(body), *words))


def test_a_failure_leaves_what_was_there(capsys, monkeypatch):
    """Neither half a file nor the loss of an older one, wherever it fails."""
    Path("pruned.ckpt").write_text("older")
    refused(capsys, *write(NAMED), "--constraints.pins", "{ffn: 41}")

    def full(self, path, **_):
        Path(path).write_text("half")
        raise RuntimeError("disk")

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", full)
    with pytest.raises(RuntimeError, match="disk"):
        main(["prune", *write(NAMED), "--evaluate", "none"])
    assert sorted(path.name for path in Path().iterdir()) == ["pruned.ckpt", "run.yaml"]
    assert Path("pruned.ckpt").read_text() == "older"


def test_a_fault_of_the_users_code_keeps_its_traceback():
    body = {**NAMED, "model": {**NAMED["model"], "class_path": named("Faulty")}}
    with pytest.raises(AttributeError, match="lost"):
        main(["prune", *write(body), "--evaluate", "none"])
    Path("faulty.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        main(["prune", *write({**NAMED, "model": "faulty.Net"})])


def test_a_checkpoint_names_no_class(capsys):
    """Of its hyperparameters only numbers are taken, and only those that the class knows."""
    module = Net(3)
    file = trainer()
    file.strategy.connect(module)
    file.save_checkpoint("a.ckpt", weights_only=True)
    stored = torch.load("a.ckpt", weights_only=True)
    stored["hyper_parameters"] = {"num_classes": 3, "other": 5, "act": "torch.nn.ReLU", 4: 4}
    torch.save(stored, "a.ckpt")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lightning_mi_prune.cli.pruning.prune_module",
            lambda m, *_, **__: made.append(m) or STUB,
        )
        main(["prune", *write({"trainer": TRAINER}), *CLASSES, "--checkpoint", "a.ckpt"])
    hparams = {name: value for name, value in made[0].hparams.items() if name[0] != "_"}
    assert hparams == {"num_classes": 3, "lr": 1e-3}


def test_help_is_short_plain_and_complete(capsys, monkeypatch):
    for columns in ("80", "100", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        main(["prune", "--help"])
        text = capsys.readouterr().out
        assert len(text.splitlines()) < 90
        assert max(map(len, text.splitlines())) <= 100
        assert not re.search(r":\w+:`|``|\bNone\b", text)
        for name in (*(option.name for option in OPTIONS), "model", "data", "cli"):
            assert re.search(rf"^  --{name} [A-Z]", text, re.M), name
    main(["prune", "--model", "anything", "-h"])
    assert capsys.readouterr().out == text


def test_options_are_those_of_the_function_and_of_its_records():
    given = {option.name: option.default for option in OPTIONS}
    own = set(inspect.signature(prune_module).parameters) - {"model", "data", "trainer", "options"}
    for name, parameter in inspect.signature(prune).parameters.items():
        record = getattr(options, name.title(), None)
        record = record if isinstance(record, type) else None  # "widths" is one of some words
        fields = [] if record is None else list(inspect.signature(record).parameters)
        for field in fields:
            assert given.pop(f"{name}.{field}") == getattr(record(), field)
        if not fields and name not in (
            "model",
            "data",
            "loss",
            "forward",
            "training",
            "optimizers",
        ):
            assert given.pop(name) == parameter.default
    assert set(given) == own == {"checkpoint", "output", "evaluate"}
    with pytest.raises(PruningError, match="cuts is no option of one-shot pruning"):
        prune_module(Net(3), Rows(), trainer(), cuts=3)


@pytest.mark.parametrize("form", ["words", "file"])
@pytest.mark.parametrize("loop", ["validate", "none"])
def test_a_data_set_in_place_of_a_datamodule(form, loop, capsys):
    rows = [Sentences(48, seed=1)[i] for i in range(48)]
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    Dataset.from_dict(columns).save_to_disk("rows")
    capsys.readouterr()
    body = {"trainer": TRAINER, **({"data": "./rows"} if form == "file" else {})}
    words = [] if form == "file" else ["--data", "rows"]
    words += ["--model", named("Net"), "--model.num_classes", "3", "--evaluate", loop]
    main(["prune", *write(body), *words, "--batch_size", "16"])
    assert ("val_loss" in capsys.readouterr().out) == (loop == "validate")
    opened()


def test_without_jsonargparse_the_command_names_its_extra(capsys, monkeypatch):
    hide(monkeypatch, "jsonargparse")
    line = refused(capsys, "--help")
    assert re.search(r"'jsonargparse'.*pip install 'lightning-mi-prune\[cli\]'", line)


def test_modules_of_the_working_directory_are_found(tmp_path):
    """As a console script is run: the working directory is not on the path."""
    Path("mymodule.py").write_text(
        "from tests.support.boring import Classifier\n\n\nclass Net(Classifier):\n    pass\n"
    )
    body = {**NAMED, "model": "mymodule.Net", "data": "tests.support.boring.Data"}
    run = "import sys; sys.path.remove(''); from lightning_mi_prune.cli import main; main()"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", run, "prune", *write(body)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "val_loss" in done.stdout
    module = load_pruned(Classifier(), "pruned.ckpt")
    size = sum(p.numel() for p in module.parameters())
    assert size < sum(p.numel() for p in Classifier().parameters())


def test_a_network_that_nothing_describes_is_pruned(tmp_path: Path) -> None:
    """What it can lose is found in the first validation batch."""
    module = learner("hand-written")
    before = sum(p.numel() for p in module.parameters())
    output = str(tmp_path / "small.ckpt")
    pruned = prune_module(module, None, trainer(), output=output, evaluate="none", sparsity=0.5)
    result = pruned.result
    assert result.sparsity >= 0.5
    assert sum(p.numel() for p in module.parameters()) == result.parameters[1] < before
    fresh = learner("hand-written")
    load_pruned(fresh, output)
    assert all(map(torch.equal, fresh.state_dict().values(), module.state_dict().values()))
