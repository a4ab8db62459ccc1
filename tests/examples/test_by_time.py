"""Competition by milliseconds at as many parameters: which budget is found, and what it leaves."""

from pathlib import Path

import pytest

from examples.benchmark import by_time
from examples.benchmark.oneshot import Subject, cut, examine
from examples.benchmark.records import load, write
from examples.benchmark.variants import OURS
from lightning_mi_prune.budget import sparsity_of
from lightning_mi_prune.clock import device_of
from lightning_mi_prune.latency import LatencyCurve, LatencyTable
from tests.examples.test_benchmark import Data, labelled
from tests.models import build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return examine("trec-6", 0, build(), labelled(range(12)), labelled(range(12, 15)))


def table(subject: Subject, heads: float, neurons: float, least: float = 0) -> LatencyTable:
    """A table in which all heads of a layer take so many ms, and all neurons so many.

    What is left of an axis at a share of its size takes no time.
    """
    taken = {"heads": heads, "ffn": neurons}
    curves = []
    for axis in subject.axes:
        last = round(least * axis.size)
        widths = (axis.size, last, 0) if last else (axis.size, 0)
        saved = (0.0, *([taken.get(axis.kind, 0.0)] * (len(widths) - 1)))
        curves.append(LatencyCurve((axis.name,), widths, saved))
    device = device_of(subject.model, subject.heard.examples)
    return LatencyTable(device, by_time.ROWS, 8, 100.0, tuple(curves))


def test_as_many_parameters_go_and_what_takes_time_goes_first(
    subject: Subject, tmp_path: Path
) -> None:
    kept = {}
    for name, taken in {"heads": (30.0, 3.0), "neurons": (3.0, 30.0)}.items():
        path = tmp_path / f"{name}.json"
        found = table(subject, *taken)
        found.write(path)
        ms = by_time.milliseconds(subject, found, 0.5)
        record = by_time.measure(subject, 0.5, ms, found, path)
        assert record["sparsity"] >= 0.5
        assert 0 < record["budget_ms"] < record["dense_ms"] == 100.0
        assert (record["widths"], record["method"]) == (by_time.WIDTHS, OURS.method)
        kept[name] = {kind: sum(widths) for kind, widths in record["kept"].items()}
        # A little more time would leave more than may stay.
        way = by_time.Paced(record["budget_ms"] + 1.0, path)
        plan = cut(subject, way, 0.5)[1]
        widths = {axis.name: plan.width(axis.name) for axis in subject.chosen}
        assert sparsity_of(subject.chosen, widths) < 0.5
    assert kept["heads"]["heads"] < kept["neurons"]["heads"]
    assert kept["heads"]["ffn"] > kept["neurons"]["ffn"]


def test_what_cannot_be_faster_is_no_budget(subject: Subject) -> None:
    # Of 100 ms only 4 can go, so the search must not end in budgets below 96.
    assert 96 <= by_time.milliseconds(subject, table(subject, 1.0, 1.0), 0.9) < 100
    # Where half of the units save as much as all do, or nothing would take any time at all.
    for none in (table(subject, 1.0, 1.0, least=0.5), table(subject, 30.0, 30.0)):
        with pytest.raises(LookupError, match="takes 95% of the parameters"):
            by_time.milliseconds(subject, none, 0.95)


def test_a_run_measures_what_is_missing(
    subject: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = []

    def measured(*asked, **options):
        calls.append((asked[-1], options["seconds"]))
        return table(subject, 9.0, 9.0)

    monkeypatch.setattr(by_time, "RESULTS", tmp_path / "by_time.json")
    monkeypatch.setattr(by_time, "FOLDER", tmp_path)
    monkeypatch.setattr(by_time, "finetuned", lambda task, seed: (build(seed=seed), Data()))
    monkeypatch.setattr(by_time, "measure_table", measured)
    asked = ["--seconds", "0.25", "--sparsities", "0.5"]
    by_time.main(asked)
    (record,) = load(by_time.RESULTS)
    assert (record["task"], record["seed"], record["target_sparsity"]) == ("trec-6", 0, 0.5)
    stored = LatencyTable.load(tmp_path / "milliseconds-trec-6.json")
    assert stored == table(subject, 9.0, 9.0)
    ((timed, seconds),) = calls
    (call,) = timed.values()
    length = labelled(range(12, 13))[0]["input_ids"].shape[1]
    assert (tuple(call.kwargs["input_ids"].shape), seconds) == ((32, length), 0.25)
    capsys.readouterr()
    by_time.main([*asked, "0.75"])
    assert "50% in" not in capsys.readouterr().out
    assert [r["target_sparsity"] for r in load(by_time.RESULTS)] == [0.5, 0.75]
    assert load(by_time.RESULTS)[0] == record
    assert len(calls) == 1  # the table is there
    # What another processor says stays, and does not count here.
    others = [r | {"machine": r["machine"] | {"cpu": ""}} for r in load(by_time.RESULTS)]
    write(by_time.RESULTS, others)
    by_time.main(asked)
    assert load(by_time.RESULTS)[:2] == others
    assert load(by_time.RESULTS)[2] == record
    by_time.RESULTS.unlink()
    table(subject, 9.0, 9.0, least=0.5).write(tmp_path / "milliseconds-trec-6.json")
    with pytest.raises(SystemExit):
        by_time.main(["--sparsities", "0.9"])
    assert "Measure it on a quiet machine" in capsys.readouterr().err
