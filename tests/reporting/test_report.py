from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_mi_prune.allocation.macs import count_macs
from lightning_mi_prune.allocation.measuring import measure_latency
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.importance.layer_criteria import StackCut
from lightning_mi_prune.reporting.plots import heatmap, save_heatmap
from lightning_mi_prune.reporting.records import Cut, GroupCut
from lightning_mi_prune.reporting.report import PruningReport
from lightning_mi_prune.reporting.tables import Table, print_cut, print_table
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import batch, build, random_plan
from tests.support.packages import hide

CUT = Cut(
    epoch=1,
    sparsity=0.5,
    parameters=60,
    prunable_parameters=40,
    macs=600,
    groups=(
        GroupCut("net.layer.0.heads", "heads", 4, 4, 2.0, 1.0),
        GroupCut("net.layer.0.ffn", "ffn", 40, 20, 3.0, 0.9),
    ),
    seconds={"calibration": 1.0, "ranking": 2.0, "surgery": 0.1},
)
REPORT = PruningReport(parameters=100, prunable_parameters=80, macs=1000, cuts=[CUT])


def test_a_report_is_json_with_before_after_and_cuts(tmp_path):
    path = tmp_path / "deep" / "report.json"
    REPORT.write(path, {"before": {"metrics": {"accuracy": 0.9}}, "epochs": 4})
    body = json.loads(path.read_text())
    assert body["before"] == {
        "parameters": 100,
        "prunable_parameters": 80,
        "macs": 1000,
        "metrics": {"accuracy": 0.9},
    }
    assert body["after"] == {"parameters": 60, "prunable_parameters": 40, "macs": 600}
    assert body["epochs"] == 4
    assert body["cuts"][0]["groups"][1] == {
        "name": "net.layer.0.ffn",
        "kind": "ffn",
        "before": 40,
        "after": 20,
        "information_nats": 3.0,
        "information_fraction": 0.9,
    }


def test_a_run_without_cuts_ends_as_it_began():
    body = PruningReport(parameters=5, prunable_parameters=4, macs=3).to_dict()
    assert body["before"] == body["after"]
    assert body["cuts"] == []


@pytest.fixture(params=["rich", "plain text"])
def printed(request, capsys, monkeypatch):
    """Text that a function prints, in one line; with rich and without."""
    monkeypatch.setenv("COLUMNS", "170")
    if request.param == "plain text":
        hide(monkeypatch, "rich")

    def run(cut, report):
        print_cut(cut, report)
        return " ".join(capsys.readouterr().out.split())

    return run


def test_information_of_a_cut_and_of_all_cuts_so_far(printed):
    """Shares of single groups are of one cut; the caption has what all cuts so far left."""
    later = replace(CUT, epoch=2, information_kept=0.8372)
    report = replace(REPORT, cuts=[CUT, later], undone=[later])
    body = report.to_dict()
    assert [cut["information_kept"] for cut in body["cuts"]] == [None, 0.8372]
    assert PruningReport.from_state(json.loads(json.dumps(report.state_dict()))) == report
    text = printed(later, report)
    assert "kept by this cut" in text
    assert "information kept of the model as built 83.7%" in text
    for value in ("0.8", 1.5, -0.1, float("nan"), torch.zeros(2**20).expand(2**10, 2**20)):
        broken = report.state_dict()
        broken["cuts"][1]["information_kept"] = value
        with pytest.raises(PruningError, match="report"):
            PruningReport.from_state(broken)


def test_the_table_names_groups_from_their_common_path(printed):
    text = printed(CUT, REPORT)
    assert "50.0% of the prunable parameters of net.layer.0 are gone" in text
    assert text.index("ffn") < text.index("heads")
    assert "100 -> 60" in text


def test_without_rich_the_columns_are_aligned(monkeypatch, capsys):
    hide(monkeypatch, "rich")
    print_table(
        Table("A title", ("name", "n"), [("a", "1"), ("long", "1,000")], ("name",), "Below")
    )
    lines = ["A title", "name      n", "a         1", "long  1,000", "Below"]
    assert capsys.readouterr().out.splitlines() == lines


def test_macs_are_what_the_shapes_say():
    model, inputs = build(), batch(1)
    expected = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            once = "pooler" in name or "classifier" in name
            expected += module.weight.numel() * (1 if once else 12)
    expected += 2 * 2 * 12 * 12 * 24  # two layers, scores and mixture
    assert count_macs(model, RecordedCall((), inputs)) == expected


def test_counting_leaves_modes_gradients_and_random_state_alone():
    model = build()
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    groups = groups_of(model)
    before = count_macs(model, RecordedCall((), batch(1)))
    apply_plan(model, groups, random_plan(groups))
    assert count_macs(model, RecordedCall((), batch(1))) < 0.7 * before
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_latency_takes_turns():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: (order.append("b"), time.sleep(0.002))}
    result = measure_latency(calls, seconds=0.05, rounds=3)
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["a", "b"] * 4  # once each to warm up, then three rounds
    assert result["b"] >= 2


def stack_cut(criterion="cka"):
    alike = ((1.0, 0.99, -0.05), (0.99, 1.0, 0.4), (-0.05, 0.4, 1.0))
    return StackCut("net.layer", (0, 2, 5), (0, 5), alike, ((0, 2), (5,)), criterion, 0.98)


@pytest.mark.parametrize("criterion", ["cka", "last"])
def test_the_heat_map_frames_clusters_and_crosses_removed_layers(criterion, tmp_path):
    (axes, *_) = heatmap(stack_cut(criterion)).axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "2 ✕", "5"]
    frames = [(p.get_x(), p.get_width()) for p in axes.patches]
    assert frames == [(-0.5, 2), (1.5, 1)]
    assert len(axes.texts) == 9
    assert ("0.9800" if criterion == "cka" else "last") in axes.get_title()
    save_heatmap(stack_cut(criterion), tmp_path / "new" / "map.svg")
    assert "<svg" in (tmp_path / "new" / "map.svg").read_text()


def test_a_report_of_layers_can_be_read_again_and_has_a_picture(tmp_path, printed):
    cut = Cut(1, 1 / 3, 20, 8, 6, (), {"calibration": 0.1}, (stack_cut(),))
    report = PruningReport(30, 12, 9, cuts=[cut], undone=[cut])
    assert PruningReport.from_state(report.state_dict()) == report
    text = json.dumps(report.state_dict())
    assert PruningReport.from_state(json.loads(text)) == report
    report.write(tmp_path / "report.json")
    body = json.loads((tmp_path / "report.json").read_text())
    (stack,) = body["cuts"][0]["stacks"]
    assert (tmp_path / stack["picture"]).exists()
    assert StackCut.read({k: v for k, v in stack.items() if k != "picture"}) == stack_cut()
    text = printed(cut, report)
    for part in ("net.layer", "0 2 | 5", "CKA >= 0.9800", "33.3%"):
        assert part in text


def test_without_matplotlib_a_report_has_no_pictures(tmp_path, monkeypatch):
    hide(monkeypatch, "matplotlib")
    cut = Cut(1, 1 / 3, 20, 8, 6, (), {"calibration": 0.1}, (stack_cut(),))
    with pytest.warns(PruningWarning, match=r"No pictures.*lightning-mi-prune\[plots\]"):
        PruningReport(30, 12, 9, cuts=[cut]).write(tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (
        "picture" not in json.loads((tmp_path / "report.json").read_text())["cuts"][0]["stacks"][0]
    )
    with pytest.raises(PruningError, match=r"'matplotlib'.*pip install 'lightning-mi-prune\[plots"):
        heatmap(stack_cut())
