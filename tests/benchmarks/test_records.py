"""Records: one format, files that grow by lines, and the command line that fills them."""

import json
from functools import partial
from pathlib import Path

import pytest

from benchmarks import __main__, cases
from benchmarks.__main__ import main
from benchmarks.cases import CASES, OPTIONS, Case, missing_jobs
from benchmarks.records import FOLDER, Job, Store, single
from benchmarks.tasks import RECIPES, TASKS

FIELDS = {"case", "setting", "seed", "figures", "machine", "versions"}


def test_of_two_records_about_the_same_the_later_one_counts(tmp_path: Path) -> None:
    store = Store("case", tmp_path)
    store.add({"a": 1, "b": [2]}, 0, {"x": 1.0})
    store.add({"b": [2], "a": 1}, 0, {"x": 2.0})
    store.add({"a": 1, "b": [2]}, 1, {"x": 3.0})
    again = Store("case", tmp_path)
    assert [(r.seed, r["x"], r["a"]) for r in again] == [(0, 2.0, 1), (1, 3.0, 1)]
    assert [r.figures for r in again] == [r.figures for r in store]
    assert again.has({"a": 1, "b": [2]}, 1)
    assert not again.has({"a": 1}, 1)
    (found,) = again.find(a=1, seed=1)
    assert found.get("y") is None
    assert {"cpu", "cores", "threads"} == found.machine.keys()
    assert {"python", "torch"} == found.versions.keys()


def test_processes_may_append_to_one_file(tmp_path: Path) -> None:
    one, two = Store("case", tmp_path), Store("case", tmp_path)
    one.add({"a": 1}, 0, {})
    two.add({"a": 2}, 0, {})
    assert [r["a"] for r in Store("case", tmp_path)] == [1, 2]


def test_all_records_of_the_project_have_one_format() -> None:
    files = {case.file for case in CASES.values()}
    measured = {path.stem for path in FOLDER.glob("*")}
    assert measured <= files
    for name in measured:
        lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        for line in lines:
            record = json.loads(line)
            assert record.keys() == FIELDS
            assert record["case"] == name
            assert "cpu" in record["machine"]
            assert "torch" in record["versions"]
        assert len(lines) == len([*Store(name)]), "two records about the same"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A case with three jobs, the second of two records; the jobs that ran."""
    ran: list[int] = []

    def run(number: int) -> dict[str, int]:
        ran.append(number)
        return {"number": number}

    def together() -> list[dict[str, int]]:
        return [run(1), run(2)]

    def jobs(steps=(0,)):
        """A case."""
        yield single({"n": 0, "steps": [*steps], "seed": 3}, run, 0)
        yield Job([{"n": 1}, {"n": 2}], 0, together)
        yield single({"n": 3}, run, 3)

    case = Case("counted", jobs, {"steps": [9]})
    for module in (__main__, cases):
        monkeypatch.setattr(module, "CASES", {"counted": case})
    return ran


def test_a_run_that_is_stopped_goes_on_where_it_was(counted: list[int], tmp_path: Path) -> None:
    given = ["run", "counted", "--records", str(tmp_path), "--steps", "5"]
    main(given)
    assert counted == [0, 1, 2, 3]
    assert [r.seed for r in Store("counted", tmp_path)] == [3, 0, 0, 0]
    path = tmp_path / "counted.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))  # stopped between two records of one job
    main(given)
    assert counted == [0, 1, 2, 3, 1, 2, 3]
    main(given)
    assert len(counted) == 7
    main([*given[:4], "--quick"])
    assert counted[7:] == [0]  # its steps are others


@pytest.mark.parametrize("name", CASES)
def test_every_case_names_its_jobs_before_anything_is_opened(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    assert case.question.endswith(".")
    assert case.quick.keys() <= case.options <= OPTIONS.keys()
    if name in ("latency", "lengths", "deploy", "opening"):
        store = Store("recovery", tmp_path)
        about = {"task": "trec-6", "sparsity": 0.5, "steps": 0}
        for method, widths, weights in (
            ("relevance-mi", "global", "reconstruction"),
            ("taylor", "uniform", "none"),
        ):
            named = {"method": method, "widths": widths, "weights": weights}
            for seed in (0, 1):  # of one shape
                store.add(about | named, seed, {"kept": {"ffn": [1], "heads": [1]}})
    if name == "vision-latency":
        about = {"task": "t", "model": "vit", "sparsity": 0.5, "method": "torch-pruning-taylor"}
        about |= {"widths": "global", "weights": "none"}
        Store("vision", tmp_path).add(about, 0, {"kept": {"ffn": [1], "heads": [1]}})
    given = {"tasks": ["trec-6"], "sparsities": [0.5]}
    jobs = [*missing_jobs(case, given, tmp_path, quick=False)]
    settings = [(json.dumps(setting), job.seed) for job in jobs for setting in job.settings]
    assert settings
    assert len(set(settings)) == len(settings)


def test_a_shape_without_a_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"'sparsity': 0.5.*run recovery`"):
        [*missing_jobs(CASES["lengths"], {}, tmp_path, quick=False)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["run", "recovery", "--tasks", "trec-7"], "invalid choice: 'trec-7'"),
        (["run", "recovery", "--methods", "hessian"], "invalid choice: 'hessian'"),
        (["run", "race"], "invalid choice: 'race'"),
        (["run", "demo", "--sparsities", "0.5"], "no case takes --sparsities: demo"),
        (["tables", "--only", "none"], "invalid choice: 'none'"),
        (["plots", "--only", "none"], "invalid choice: 'none'"),
    ],
)
def test_unknown_names_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(given)
    assert message in capsys.readouterr().err


def test_the_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*CASES]


def test_the_larger_model_is_measured_only_where_it_is_asked_for() -> None:
    assert {RECIPES[task].model for task in TASKS} == {"minilm-l6"}
    assert RECIPES["trec-6-mpnet"].model == "mpnet-base"
    job = next(iter(partial(CASES["recovery"].jobs, tasks=["trec-6-mpnet"])()))
    assert job.settings[0]["task"] == "trec-6-mpnet"
