"""Speed by length and layout: what is timed, what is skipped and what the page says of it."""

from pathlib import Path

import pytest
from torch import nn

from examples.benchmark import by_time, lengths, oneshot, recovery
from examples.benchmark.records import load, write
from examples.benchmark.rivals.size import Kept
from examples.benchmark.speed_tables import length_lines, paced_lines
from lightning_mi_prune import Plan, apply, find_axes
from lightning_mi_prune.choosing import choose_axes
from tests.models import build


def named(layout: str, kept: Kept, sparsity: float = 0.75) -> dict[str, object]:
    method, widths, fold_in = lengths.LAYOUTS[layout]
    about = {"task": "trec-6", "seed": 0, "steps": 0, "cuts": 1, "target_sparsity": sparsity}
    return about | {"method": method, "widths": widths, "fold_in": fold_in, "kept": kept}


def network_of(kept: Kept | None = None) -> nn.Module:
    """A tiny encoder with that many neurons a layer."""
    model = build().eval()
    if kept is not None:
        axes = [axis for axis in choose_axes(find_axes(model)) if axis.kind == "ffn"]
        places = {a.name: tuple(range(n)) for a, n in zip(axes, kept["ffn"], strict=True)}
        apply(model, axes, Plan({axis.name: axis.size for axis in axes}, places))
    return model


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Three shapes that records name, and files in a folder of their own."""
    found = [named("ours", {"ffn": [5, 3]}), named("uniform", {"ffn": [4, 4]})]
    paced = named("ours, by time", {"ffn": [6, 2]}) | {"machine": oneshot.machine()}
    monkeypatch.setattr(recovery, "RESULTS", tmp_path / "recovery.json")
    monkeypatch.setattr(lengths, "RESULTS", tmp_path / "lengths.json")
    monkeypatch.setattr(lengths, "network_of", network_of)
    monkeypatch.setattr(by_time, "RESULTS", tmp_path / "by_time.json")
    write(recovery.RESULTS, found)
    write(by_time.RESULTS, [paced])
    return [found[0], paced, found[1]]


def test_every_length_is_timed_once(
    records: list[dict[str, object]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--seconds", "0.01", "--rounds", "1", "--sparsities", "0.75", "--lengths"]
    lengths.main([*asked, "4"])
    first = load(lengths.RESULTS)
    assert [(r["layout"], r["length"], r["compiled"]) for r in first] == [
        ("ours", 4, False),
        ("ours, by time", 4, False),
        ("uniform", 4, False),
    ]
    assert [r["kept"] for r in first] == [r["kept"] for r in records]
    for record in first:
        assert record["macs"] < record["dense_macs"]
        for name in ("latency_ms_b1", "latency_ms_b32"):
            assert record[name] > 0 < record[f"dense_{name}"]
    assert len({r["dense_latency_ms_b32"] for r in first}) == 1  # in one run
    capsys.readouterr()
    lengths.main([*asked, "8", "4"])
    assert "4 tokens" not in capsys.readouterr().out
    both = load(lengths.RESULTS)
    assert both[:3] == first
    assert [record["length"] for record in both] == [4, 4, 4, 8, 8, 8]
    assert both[3]["dense_macs"] > first[0]["dense_macs"]
    changed = records[0] | {"kept": {"ffn": [6, 3]}}
    write(recovery.RESULTS, [changed, records[2]])
    lengths.main([*asked, "4"])
    assert capsys.readouterr().out.count("4 tokens") == 1  # its widths are others now
    again = load(lengths.RESULTS)
    assert again[1:] == both[1:]
    assert again[0]["kept"] == changed["kept"]
    both = again
    for record in both:
        record["machine"]["cpu"] = ""  # of another processor, which comes first
    write(lengths.RESULTS, both)
    lengths.main([*asked, "4"])
    assert load(lengths.RESULTS)[:6] == both
    assert [record["length"] for record in load(lengths.RESULTS)[6:]] == [4, 4, 4]


@pytest.mark.usefixtures("records")
def test_a_shape_without_a_record_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lengths.main(["--sparsities", "0.5"])
    told = capsys.readouterr().err
    assert "no record of" in told
    assert "'target_sparsity': 0.5" in told
    assert "examples.benchmark.recovery makes it" in told
    assert not lengths.RESULTS.exists()
    (paced,) = load(by_time.RESULTS)
    write(by_time.RESULTS, [paced | {"machine": {"cpu": "another"}}])
    with pytest.raises(SystemExit):
        lengths.main(["--sparsities", "0.75"])
    assert "examples.benchmark.by_time makes it" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--lengths", "0"], ["--rounds", "-1"], ["--seconds", "0"]])
def test_what_cannot_be_timed_is_refused(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        lengths.main(given)
    assert f"{given[1]}: expected a" in capsys.readouterr().err


def test_the_page_says_what_share_of_the_ratio_is_reached() -> None:
    assert length_lines([]) == []
    record = {"length": 23, "layout": "ours", "target_sparsity": 0.75, "compiled": False}
    record |= {"macs": 25, "dense_macs": 100, "machine": {"cpu": "A", "threads": 2}}
    record |= {"latency_ms_b1": 4.0, "dense_latency_ms_b1": 8.0}
    record |= {"latency_ms_b32": 20.0, "dense_latency_ms_b32": 60.0}
    compiled = record | {"compiled": True, "latency_ms_b32": 15.0}
    alone = record | {"layout": "uniform"}
    elsewhere = record | {"machine": {"cpu": "B", "threads": 4}, "latency_ms_b1": 2.0}
    lines = length_lines([record, alone, compiled, elsewhere])
    assert lines[-4:] == [
        "| 23 | 75% | ours | 4.00x | 4.00x (1.00) | 3.00x (0.75) |  |",
        "",
        "Processors: B; threads: 4.",
        "",
    ]
    assert lines[-11:-8] == [
        "| 23 | 75% | ours | 4.00x | 2.00x (0.50) | 3.00x (0.75) | 4.00x (1.00) |",
        "| 23 | 75% | uniform | 4.00x | 2.00x (0.50) | 3.00x (0.75) |  |",
        "",
    ]


def test_the_page_sets_time_beside_parameters() -> None:
    assert paced_lines([], []) == []
    ours = named("ours", {"heads": [3, 1], "ffn": [800, 400]})
    ours |= {"dense_accuracy": 0.9, "dense_cross_entropy": 0.3}
    ours |= {"accuracy": 0.89, "cross_entropy": 0.34}
    paced = ours | {"widths": "time", "accuracy": 0.88, "cross_entropy": 0.36}
    machine = {"machine": {"cpu": "A", "threads": 2}, "length": 23}
    paced |= machine
    other = paced | {"target_sparsity": 0.5}
    trained = ours | {"steps": 100, "accuracy": 0.5}
    lines = paced_lines([other, paced], [ours, trained])
    assert "of 32 texts of 23 tokens" in lines[0]
    assert lines[-5:] == [
        "| trec-6 | 0 | 50% |  | -2.00, -0.060; 4, 1,200 |",
        "| trec-6 | 0 | 75% | -1.00, -0.040; 4, 1,200 | -2.00, -0.060; 4, 1,200 |",
        "",
        "Processors: A; threads: 2.",
        "",
    ]
