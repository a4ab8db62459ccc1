"""info, convert, compare, export: their results, in words and as JSON, and their errors."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from torch import nn
from transformers import BertTokenizer

from lightning_mi_prune import PruningPlan, apply_plan, load_pruned, save_pretrained
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.cli import main
from lightning_mi_prune.cli.program import SUBCOMMANDS, command_named
from lightning_mi_prune.core.plan import Ranking
from tests.examples.conftest import model  # noqa: F401  # a fixture
from tests.support.boring import Classifier, Data, Sentences, trainer
from tests.support.graphs import graph_of
from tests.support.models import batch, outputs, random_plan

YAML = {
    "model": "tests.support.boring.Classifier",
    "data": "tests.support.boring.Data",
    "trainer": {"accelerator": "cpu"},
}
QUICK = ["--batch", "1", "2", "--length", "4", "8", "--seconds", "0.01"]


def pruned_module() -> Classifier:
    """Half of its units are gone, and one group knows its order."""
    module = Classifier()
    module.eval()
    graph = graph_of(module)
    tracker = PlanTracker(module, graph)
    kept = {**graph.full.kept, **random_plan(list(graph.groups)).kept}
    name = next(n for n in kept if n.endswith("ffn"))
    gone = [i for i in range(graph.full.sizes[name]) if i not in kept[name]]
    order = (*gone, *kept[name])
    losses = tuple(map(float, range(len(order))))
    rankings = {name: Ranking(order, losses, losses)}
    plan = PruningPlan(graph.full.sizes, kept, rankings)
    apply_plan(module, tracker.groups, plan)
    tracker.plan = plan
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense and pruned, as checkpoints and as folders; a plan, a YAML and labelled rows."""
    top = tmp_path_factory.mktemp("files")
    for name, module in (("dense", Classifier().eval()), ("pruned", pruned_module())):
        file = trainer()
        file.strategy.connect(module)
        file.save_checkpoint(top / f"{name}.ckpt", weights_only=True)
        save_pretrained(module, top / name)
    plan = PlanTracker.of(module).plan
    (top / "plan.json").write_text(plan.to_json())
    torch.save(module.state_dict(), top / "pruned.pt")
    (top / "run.yaml").write_text(yaml.safe_dump(YAML))
    rows = [Sentences(40, seed=2)[i] for i in range(40)]
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    columns["number"] = list(range(40))  # no model takes it
    Dataset.from_dict(columns).save_to_disk(top / "rows")
    return top


@pytest.fixture(autouse=True)
def _among_the_files(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


def found(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    """The one JSON object that a subcommand prints."""
    capsys.readouterr()
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of an error; no other output, and no file."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert sorted(Path().rglob("*")) == before
    return line


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------- info


@pytest.mark.parametrize("name", ["pruned", "pruned.ckpt", "pruned.pt", "plan.json"])
def test_info_tells_sizes_widths_and_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = pruned_module()
    plan = PlanTracker.of(module).plan
    if name == "pruned":  # without stacks, of which nothing is gone
        plan = PruningPlan.from_json(Path("pruned/pruning_plan.json").read_text())
    shown = found(capsys, "info", name)
    in_file = plan.under("model") if name in ("pruned.ckpt", "pruned.pt") else plan
    digest = in_file.digest()  # as the network names its groups
    assert shown["plan_digest"] == digest
    assert shown["rankings"] == 1
    assert {w["name"]: w["now"] for w in shown["widths"]} == plan.widths
    assert {w["name"]: w["built"] for w in shown["widths"]} == dict(plan.sizes)
    if name != "plan.json":
        assert shown["parameters"] == size(module)
        assert shown["parameters_built"] == size(Classifier())
        graph = graph_of(Classifier())
        kinds = {g.name: g.kind for g in graph.groups} | {s.name: "layers" for s in graph.stacks}
        if name == "pruned":
            kinds = {n.partition(".")[2]: kind for n, kind in kinds.items()}
        assert kinds.items() >= {w["name"]: w["kind"] for w in shown["widths"]}.items()
    main(["info", name])
    text = capsys.readouterr().out
    assert digest[:20] in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_plan_has_one_digest_in_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    files = ("pruned", "pruned.ckpt", "pruned.pt")
    assert len({found(capsys, "info", name)["plan_digest"] for name in files}) == 1


def test_info_tells_what_transformers_open_alone(capsys: pytest.CaptureFixture[str]) -> None:
    dense, pruned = (found(capsys, "info", name) for name in ("dense", "pruned"))
    assert (dense["plain"], pruned["plain"]) == (True, False)
    assert dense["plan_digest"] is None
    assert dense["class_name"] == pruned["class_name"] == "BertForSequenceClassification"
    assert "from_pretrained" in pruned["opening"]
    pruned_module().model.save_pretrained("unchecked")  # transformers' own
    shown = found(capsys, "info", "unchecked")
    assert shown["plain"] is None
    assert shown["parameters"] == pruned["parameters"]


class Code:
    """Writes a file when it is opened."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("it_ran"),)


def test_info_runs_nothing_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}, "code": Code()}, "hostile.ckpt")
    assert re.search("hostile.ckpt (holds|would run)", refused(capsys, "info", "hostile.ckpt"))
    assert not Path("it_ran").exists()


# ---------------------------------------------------------------------------------------- convert


def test_convert_writes_a_folder_that_computes_the_same(
    capsys: pytest.CaptureFixture[str],
    model: str,  # noqa: F811
) -> None:
    words = ["convert", "pruned.ckpt", "out/small", "--config", "run.yaml", "--code"]
    shown = found(capsys, *words, "--tokenizer", model)
    assert shown["parameters"] == size(pruned_module())
    assert Path("out/small/modeling_pruned.py").exists()
    assert "with trust_remote_code=True" in shown["opening"]
    assert BertTokenizer.from_pretrained("out/small").vocab_size == 305
    from transformers import AutoModelForSequenceClassification

    opened = AutoModelForSequenceClassification.from_pretrained("out/small").eval()
    module = load_pruned(Classifier(), "pruned.ckpt").eval()
    assert torch.equal(outputs(opened, batch(4)), outputs(module.model, batch(4)))
    line = refused(capsys, *words)
    assert "holds a model already" in line
    dense = found(capsys, *words, "--overwrite", "--model", YAML["model"])
    assert dense["parameters"] == shown["parameters"]


# ---------------------------------------------------------------------------------------- compare


def test_compare_measures_folders(capsys: pytest.CaptureFixture[str]) -> None:
    shown = found(capsys, "compare", "dense", "pruned", "--data", "rows", *QUICK)
    networks = {"dense": Classifier().model.eval(), "pruned": pruned_module().model}
    for side, network in networks.items():
        assert shown[side]["parameters"] == size(network)
        file = Path(side, "model.safetensors")
        assert shown[side]["weight_bytes"] == file.stat().st_size
        rows = [Sentences(40, seed=2)[i] for i in range(40)]
        labels = torch.stack([row.pop("labels") for row in rows])
        given = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        right = outputs(network, given).argmax(-1) == labels
        assert shown[side]["metrics"]["accuracy"] == pytest.approx(right.float().mean().item())
    shapes = [(row["batch"], row["length"]) for row in shown["latency_ms"]]
    assert shapes == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert all(row["dense"] > 0 and row["pruned"] > 0 for row in shown["latency_ms"])
    assert shown["dense"]["macs"] > shown["pruned"]["macs"] > 0
    assert shown["example"] == "one example of 12 tokens"
    gone = shown["dense"]["parameters"] - shown["pruned"]["parameters"]
    before, after = (shown[side]["prunable_parameters"] for side in networks)
    assert before - after == gone
    assert "1 thread" in shown["machine"]


def test_compare_prints_a_table_and_writes_the_card(capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "dense", "pruned", "--data", "rows", *QUICK, "--card"])
    printed = capsys.readouterr().out
    card = Path("pruned/README.md").read_text()
    for row in ("parameters", "weights, MB", "batch 2 x 8, ms", "accuracy"):
        assert row in printed
    assert "| accuracy |" in card
    assert "rows, 40 rows" in card
    assert "1 thread" in card
    main(["compare", "dense", "pruned", *QUICK, "--card"])
    assert "accuracy" not in Path("pruned/README.md").read_text()  # it was not measured


def test_compare_measures_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "dense.ckpt", "pruned.ckpt", "--config", "run.yaml", *QUICK]
    shown = found(capsys, *words, "--evaluate", "validate", "--data.rows", "64")
    module = load_pruned(Classifier(), "pruned.ckpt")
    (expected,) = trainer().validate(module, Data(64), verbose=False)
    assert shown["pruned"]["metrics"] == expected
    assert shown["data"] == "validate of Data"
    folders = found(capsys, "compare", "dense", "pruned", *QUICK)
    for side in ("dense", "pruned"):
        assert shown[side]["parameters"] == folders[side]["parameters"]
        assert shown[side]["prunable_parameters"] == folders[side]["prunable_parameters"]
    plain = found(capsys, *words, "--evaluate", "none")
    assert plain["pruned"]["metrics"] == {}
    assert plain["example"] == "one example of 4 tokens"


# ----------------------------------------------------------------------------------------- export


def test_export_writes_a_file_that_computes_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    shown = found(capsys, "export", "pruned", "out/small.onnx")
    assert Path("out/small.onnx").stat().st_size == shown["bytes"]
    assert shown["difference"] <= 1e-4
    assert shown["inputs"]["input_ids"] == ["batch", "length"]
    assert shown["plan_digest"] == found(capsys, "info", "pruned")["plan_digest"]


# --------------------------------------------------------------------------- the program as a whole


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_help_is_short_and_has_an_example(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        main([name, "--help"])
        text = capsys.readouterr().out
        assert len(text.splitlines()) < 90
        assert max(map(len, text.splitlines())) <= 110
        assert f"\nexample:\n  lightning-mi-prune {name} " in text
        assert not re.search(r":\w+:`|``|\bNone\b", text)
        command = command_named(name)
        for option in (*command.options, *command.places):
            named = option if isinstance(option, str) else f"--{option.name}"
            assert re.search(rf"^  {named}\b", text, re.M), named
        assert re.search(r"^  --json\b", text, re.M)


def test_the_help_of_the_program_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    text = capsys.readouterr().out
    main(["-h"])
    assert capsys.readouterr().out == text
    for name, what in SUBCOMMANDS.items():
        assert re.search(rf"^  {name} ", text, re.M)
        assert " ".join(what.split()[:4]) in text


FILES = ["--config", "run.yaml"]
WRONG = {
    "the old form": (["--config", "run.yaml"], r"write lightning-mi-prune prune --config run.yaml"),
    "a file first": (["run.yaml"], r"write lightning-mi-prune prune run.yaml"),
    "misspelt": (["comapre"], r"'comapre' is no subcommand; did you mean 'compare'\?"),
    "no such": (["zork"], r"'zork' is no subcommand; expected prune, info, compare"),
    "no word": (["info"], r"words are missing; expected lightning-mi-prune info PATH"),
    "a word too much": (["info", "pruned", "dense"], r"'dense' is too much; expected"),
    "no option": (["info", "pruned", "--model", "my.Net"], r"--model is no option"),
    "an option misspelt": (["info", "pruned", "--jsn"], r"--jsn is no option"),
    "nothing there": (["info", "nix"], r"There is no 'nix'; expected a Hugging Face folder"),
    "no model folder": (["info", "rows"], r"rows has no config.json"),
    "no plan": (["info", "rows/state.json"], r"The plan has version"),
    "no weights": (["info", "run.yaml"], r"run.yaml is not a checkpoint"),
    "no checkpoint": (["convert", "nix.ckpt", "new", *FILES], r"There is no file 'nix.ckpt'"),
    "no model": (["convert", "pruned.ckpt", "new"], r"There is no model; expected model: in a"),
    "no tokenizer": (
        ["convert", "pruned.ckpt", "new", *FILES, "--tokenizer", "rows"],
        r"rows holds no tokenizer",
    ),
    "other files": (["convert", "pruned.ckpt", "rows", *FILES], r"rows is a folder with other"),
    "two kinds": (["compare", "dense", "pruned.ckpt"], r"dense is a folder and pruned.ckpt a c"),
    "not there": (["compare", "dense", "nix"], r"There is no 'nix'"),
    "too long": (
        ["compare", "dense", "pruned", "--length", "64", "--seconds", "0.01"],
        r"cannot run on inputs of the shapes .*\(1, 64\).*Is the length more",
    ),
    "size 0": (["compare", "dense", "pruned", "--batch", "0"], r"batch=0"),
    "no number": (["compare", "dense", "pruned", "--batch", "x"], r"batch: expected .*x"),
    "no data": (["compare", "dense", "pruned", "--data", "nix/x"], r"data set 'nix/x' cannot be"),
    "not needed": (["compare", "dense", "pruned", *FILES], r"run.yaml is for checkpoints"),
    "no loop": (
        ["compare", "dense.ckpt", "pruned.ckpt", *FILES, "--evaluate", "zork"],
        r"evaluate: expected one of 'validate', 'test', 'none'",
    ),
    "no card": (["compare", "dense.ckpt", "pruned.ckpt", *FILES, "--card"], r"have no card"),
    "no plan in it": (
        ["compare", "pruned", "dense", "--card", *QUICK],
        r"dense has no pruning_plan.json",
    ),
    "no folder": (["export", "pruned.ckpt", "x.onnx"], r"'pruned.ckpt' is no folder with a config"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = WRONG[case]
    assert re.search(message, refused(capsys, *words))


@pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
def test_smaller_writes_a_folder_for_each_size(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("smaller", "dense", str(tmp_path), "--sparsity", "0.5", "0.75", "--data", "rows")
    sizes = found(capsys, *words)["folders"]
    assert [Path(one["path"]).name for one in sizes] == ["dense-50", "dense-75"]
    counts = [one["parameters"] for one in sizes]
    assert counts == sorted(counts, reverse=True)
    assert found(capsys, "info", str(tmp_path / "dense-75"))["parameters"] == counts[1]


def test_smaller_needs_batches(files: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["smaller", "dense", str(tmp_path / "out"), "--sparsity", "0.5"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no calibration.safetensors" in error
    assert not (tmp_path / "out").exists()
