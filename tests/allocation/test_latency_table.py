from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_mi_prune.allocation.allocate import allocate
from lightning_mi_prune.allocation.budget import Budget, check_reach
from lightning_mi_prune.allocation.latency import Device, LatencyCosts, LatencyCurve, LatencyTable
from lightning_mi_prune.allocation.measuring import cached_table, device_of, measure_table
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.graphs import groups_of
from tests.support.models import batch, build, random_plan

HERE = Device("cpu", "a processor", 2, "2.9.0", "float32")
CURVES = (
    LatencyCurve(("0.ffn", "1.ffn"), (64, 32, 0), (0.0, 1.0, 3.0)),
    LatencyCurve(("0.heads", "1.heads"), (4, 2, 1), (0.0, 0.0, 0.5)),
)
TABLE = LatencyTable(HERE, batch=8, length=32, dense_ms=10.0, curves=CURVES)
TWO = RecordedCall((), batch(2))


def axes_of_table(**options):
    ffn = [DependencyGroup(f"{i}.ffn", "ffn", 64, (), ("down",), **options) for i in (0, 1)]
    return ffn + [DependencyGroup(f"{i}.heads", "heads", 4, (), ("down",)) for i in (0, 1)]


def ruler(calls):
    """A deterministic clock: a thousandth of the products of each call, and 1 ms for it."""
    found = {}
    for name, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        found[name] = 1 + counter.get_total_flops() / 2e3
    return found


def test_savings_are_linear_between_what_was_measured():
    ffn, heads = CURVES
    assert [ffn.at(w) for w in (64, 48, 32, 16, 8, 0)] == [0.0, 0.5, 1.0, 2.0, 2.5, 3.0]
    assert [heads.at(w) for w in (4, 3, 2, 1)] == [0.0, 0.0, 0.0, 0.5]
    assert heads.at(0) == 0.5  # nobody measured less than one head
    assert heads.at(9) == 0.0


def test_a_table_goes_through_a_file_unchanged(tmp_path):
    path = tmp_path / "deep" / "latency.json"
    TABLE.write(path)
    assert LatencyTable.load(path) == TABLE
    assert [p.name for p in path.parent.iterdir()] == ["latency.json"]


def damaged(**changes):
    return json.dumps({**json.loads(TABLE.to_json()), **changes})


def curve(**changes):
    body = {"groups": ["a"], "widths": [4, 2], "saved": [0.0, 1.0]} | changes
    return damaged(curves=[body])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{" * 10_000, "not valid JSON"),
        ("[]", "is a list of 0; expected a JSON object"),
        (damaged(version=2), "version 2"),
        (damaged(version=True), "version True"),
        (damaged(device={"type": "cpu"}), "is damaged"),
        (damaged(device={**vars(HERE), "name": 7}), "7 is not text"),
        (damaged(device={**vars(HERE), "threads": "two"}), "'two' is not a whole number"),
        (damaged(device={**vars(HERE), "threads": True}), "True is not a whole number"),
        (damaged(device={**vars(HERE), "more": 1}), "an entry 'more'; expected type, name"),
        (damaged(batch=10**400), "batch=an int of 1329 bits"),
        (damaged(dense_ms=10**400), "dense_ms is an int of 1329 bits"),
        ('{"version": 1, "version": 1}', "the key 'version' occurs twice"),
        (f'{{"version": {"9" * 5000}}}', "not valid JSON"),
        (curve(saved=[0.0, 10**400]), "is an int of 1329 bits; expected milliseconds"),
        (curve(widths=[2**70, 2]), "expected widths from 0"),
        (damaged(device=None), "is damaged"),
        (damaged(curves=None), "is damaged"),
        (damaged(curves=[7]), "is damaged"),
        (damaged(batch=-1), "batch=-1; expected a whole number"),
        (damaged(length=True), "length=True"),
        (damaged(dense_ms=0), "dense_ms=0; expected milliseconds above 0"),
        (damaged(dense_ms="fast"), "dense_ms is 'fast'; expected milliseconds"),
        (damaged(dense_ms=float("nan")), "NaN is not a number in JSON"),
        (damaged(dense_ms=2.0), "'0.ffn' saves 3 of 2 ms"),
        (curve(groups=[]), "belongs to no group"),
        (curve(groups="a"), "is damaged"),
        (curve(groups=[7]), "belongs to no group"),
        (curve(widths=[2, 4]), "expected one time for each, from the widest down"),
        (curve(widths=[4, -2]), "widths from 4 to -2; expected widths from 0"),
        (curve(widths=[4, 2.5]), "expected one time for each"),
        (curve(widths=[]), "expected one time for each"),
        (curve(saved=[0.0]), "1 times; expected one time for each"),
        (curve(saved=[0.0, None]), "is None; expected milliseconds"),
        (curve(saved=[0.0, -1.0]), "is -1.0; expected milliseconds from 0"),
        (curve(saved=[0.0, float("inf")]), "Infinity is not a number in JSON"),
        (curve(saved=[0.5, 1.0]), "expected 0 at full width"),
        (
            curve(widths=[4, 2, 1], saved=[0.0, 1.0, 0.5]),
            "expected 0 at full width and no less at any smaller one",
        ),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, text, message):
    path = tmp_path / "latency.json"
    path.write_text(text)
    with pytest.raises(PruningError, match=message) as error:
        LatencyTable.load(path)
    assert "Delete the file to measure again" in str(error.value)


def test_a_file_that_cannot_be_read_or_is_endless_is_refused(tmp_path, monkeypatch):
    with pytest.raises(PruningError, match="The latency table cannot be read from"):
        LatencyTable.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PruningError, match="The latency table cannot be read from"):
        LatencyTable.load(tmp_path / "binary")
    monkeypatch.setattr("lightning_mi_prune.allocation.latency._LARGEST_TEXT", 10)
    (tmp_path / "long").write_text(TABLE.to_json())
    with pytest.raises(PruningError, match="more than 10 characters"):
        LatencyTable.load(tmp_path / "long")


@pytest.mark.parametrize(
    "other", [{"name": "another"}, {"threads": 1}, {"dtype": "bfloat16"}, {"torch": "2.5.0"}]
)
def test_a_table_of_another_device_is_refused(other):
    TABLE.check_device(HERE)
    with pytest.raises(PruningError) as error:
        TABLE.check_device(replace(HERE, **other))
    text = str(error.value)
    assert str(HERE) in text
    assert str(replace(HERE, **other)) in text


def test_a_table_is_measured_once(tmp_path):
    path, measured = tmp_path / "latency.json", []

    def measure():
        measured.append(1)
        return TABLE

    assert cached_table(path, measure, HERE) == cached_table(path, measure, HERE) == TABLE
    assert len(measured) == 1
    with pytest.raises(PruningError, match="was measured on"):
        cached_table(path, measure, replace(HERE, threads=1))
    path.write_text("half a ta")
    with pytest.raises(PruningError, match="not valid JSON"):
        cached_table(path, measure)


def test_the_device_is_named():
    here = device_of(nn.Linear(2, 2))
    assert here == device_of(build("bert"))
    assert (here.type, here.dtype, here.threads) == ("cpu", "float32", torch.get_num_threads())
    assert here.name
    assert device_of(nn.Linear(2, 2).bfloat16()).dtype == "bfloat16"
    assert device_of(nn.Linear(2, 2), {"": replace(TWO, autocast="float16")}).dtype == "float16"


def test_groups_of_one_shape_are_measured_together_on_copies():
    root = nn.ModuleDict({"net": nn.ModuleDict({"inner": build("bert")}), "other": nn.Linear(2, 2)})
    groups, calls = groups_of(root), {"net.inner": TWO}
    before = copy.deepcopy(root.state_dict())
    table = measure_table(root, groups, calls, clock=ruler)
    assert (table.batch, table.length) == (2, 12)
    assert table.dense_ms == ruler({"x": lambda: root["net"]["inner"](**batch(2))})["x"]
    assert sorted(n for c in table.curves for n in c.groups) == sorted(a.name for a in groups)
    ffn = next(c for c in table.curves if c.groups[0].endswith("ffn"))
    assert len(ffn.groups) == 2
    assert ffn.widths == (40, 32, 16, 8, 0)
    # Padding or not: a neuron costs its two products at each of the 2 x 12 positions.
    assert ffn.saved == pytest.approx([(40 - w) * 2 * 24 * 24 / 1e3 for w in ffn.widths])
    after = root.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_cut_model_is_measured_as_it_was_built():
    model = build("bert")
    groups = groups_of(model)
    whole = measure_table(model, groups, {"": TWO}, clock=ruler)
    apply_plan(model, groups, random_plan(groups))
    shapes = [p.shape for p in model.parameters()]
    assert measure_table(model, groups, {"": TWO}, clock=ruler) == whole
    assert [p.shape for p in model.parameters()] == shapes


def test_calls_are_timed_in_the_dtype_they_were_recorded_in():
    model, seen = build("bert"), []
    groups = groups_of(model)
    with (
        torch.autocast("cpu", torch.bfloat16),
        ActivationRecorder(model, groups, positions=8) as recorder,
    ):
        model(**batch(2))
    calls = recorder.calls(groups)
    assert [call.autocast for call in calls.values()] == ["bfloat16"]

    def typed(work):
        def note(module, args, output):
            seen.append(getattr(output, "dtype", None))

        with torch.no_grad():
            handle = nn.modules.module.register_module_forward_hook(note)
            work["dense"]()
            handle.remove()
        return dict.fromkeys(work, 1.0)

    table = measure_table(model, groups, calls, kinds=["ffn"], clock=typed)
    assert torch.bfloat16 in seen
    assert table.device.dtype == "bfloat16"
    assert table.device == device_of(model, calls)
    assert table.device != device_of(model)


def test_chosen_kinds_are_measured_and_a_slower_cut_saves_nothing():
    model = build("bert")
    groups, turns = groups_of(model), []

    def moody(calls):
        turns.append(sorted(calls))
        return {"dense": 2.0, "cut": [1.0, 1.5, 3.0, 0.5][len(turns) - 1]}

    table = measure_table(model, groups, {"": TWO}, kinds=["ffn"], clock=moody)
    assert turns == [["cut", "dense"]] * 4
    assert [c.saved for c in table.curves] == [(0.0, 0.5, 0.5, 0.5, 0.75)]
    with pytest.raises(PruningError, match="leaves no group to measure"):
        measure_table(model, groups, {"": TWO}, kinds=["channels"], clock=moody)


def test_real_clocks_give_a_table():
    model = build("bert")
    groups = groups_of(model)
    table = measure_table(model, groups, {"": TWO}, kinds=["heads"], seconds=0.01)
    assert LatencyTable.from_json(table.to_json()) == table
    assert table.device == device_of(model)


def test_costs_add_up_side_by_side():
    groups = axes_of_table()
    costs = LatencyCosts(TABLE, groups)
    full = {a.name: a.size for a in groups}
    assert costs.measure == "ms"
    assert costs.total({}) == costs.total(full) == 10.0
    assert costs.total({**full, "0.ffn": 0, "1.ffn": 48, "0.heads": 1}) == pytest.approx(6.0)
    assert costs.savings("0.ffn", {**full, "0.ffn": 32}, [32, 16, 0]) == pytest.approx([0, 1, 2])
    assert costs.savings("0.ffn", {**full, "0.ffn": 32}, [31]) == pytest.approx([2 / 32])
    assert costs.savings("0.ffn", full, [63]) == pytest.approx([1 / 32])
    assert costs.neighbours("0.ffn") == frozenset()
    held = LatencyCosts(TABLE, groups, current={"1.ffn": 32})
    assert held.total({"0.ffn": 64}) == pytest.approx(9.0)


def test_the_hidden_size_multiplies_with_the_rest():
    tensors = {n: (PrunableDim(n, 0, (64, 32), ((n,),)),) for n in ("0.ffn", "1.ffn")}
    groups = [replace(a, tensors=tensors[a.name]) for a in axes_of_table() if a.kind == "ffn"]
    both = tuple(PrunableDim(name, 1, (64, 32), (("stream",),)) for name in tensors)
    groups.append(DependencyGroup("stream", "hidden", 32, both, ("down",)))
    stream = LatencyCurve(("stream",), (32, 16), (0.0, 5.0))
    costs = LatencyCosts(replace(TABLE, curves=(*CURVES, stream)), groups)
    assert costs.neighbours("stream") == {"0.ffn", "1.ffn"}
    assert costs.neighbours("0.ffn") == {"stream"}
    at = {"0.ffn": 0, "1.ffn": 32, "stream": 16}
    assert costs.total(at) == pytest.approx(10 * 0.6 * 0.5)
    for name, options in (("stream", [32, 24, 16]), ("0.ffn", [64, 16, 0])):
        start = {**at, name: options[0]}
        expected = [costs.total(start) - costs.total({**start, name: w}) for w in options]
        assert costs.savings(name, start, options) == pytest.approx(expected)


def crossing(stream=False):
    """Heads and their dimensions of two layers, or of one in a stream that is as narrow as it."""
    groups, curves = [], []
    for layer in range(1 if stream else 2):
        q, heads, dims = f"{layer}.q", f"{layer}.heads", f"{layer}.head_dim"
        both = (PrunableDim(q, 0, (32, 16), ((heads, dims),)),)
        groups.append(
            DependencyGroup(
                heads, "heads", 4, both, ("o",), partners=((dims, 8),), may_be_empty=True
            )
        )
        groups.append(DependencyGroup(dims, "head_dim", 8, both, ("o",), partners=((heads, 4),)))
    if stream:
        columns = PrunableDim("0.q", 1, (32, 16), (("stream",),))
        groups.append(DependencyGroup("stream", "hidden", 16, (columns,), ("o",)))
        curves.append(LatencyCurve(("stream",), (16, 8), (0.0, 5.0)))
    for kind, widths, saved in (
        ("heads", (4, 2, 0), (0, 1, 4)),
        ("head_dim", (8, 4, 2), (0, 1, 2)),
    ):
        names = tuple(group.name for group in groups if group.kind == kind)
        curves.append(LatencyCurve(names, widths, tuple(map(float, saved))))
    return groups, LatencyCosts(replace(TABLE, curves=tuple(curves)), groups)


def test_heads_and_their_dimensions_share_the_time_of_one_attention():
    """All heads save 4 ms; half of the dimensions save a quarter of what heads have left."""
    _, costs = crossing()
    assert costs.total({"0.head_dim": 4}) == pytest.approx(10 - 1)
    assert costs.total({"0.heads": 2, "0.head_dim": 4}) == pytest.approx(10 - 4 + 3 * 3 / 4)
    assert costs.total({"0.heads": 0, "0.head_dim": 4}) == pytest.approx(10 - 4)
    assert costs.total({"0.heads": 2, "1.head_dim": 4}) == pytest.approx(10 - 1 - 1)
    assert costs.neighbours("0.heads") == {"0.head_dim"}
    assert costs.neighbours("0.head_dim") == {"0.heads"}


def test_heads_that_must_stay_keep_their_share_of_an_attention():
    """A quarter of the heads with a quarter of their dimensions is a sixteenth of the work."""
    groups = [replace(group, may_be_empty=False) for group in crossing()[0][:2]]
    curves = (
        LatencyCurve(("0.heads",), (4, 2, 1), (0.0, 2.0, 3.0)),
        LatencyCurve(("0.head_dim",), (8, 4, 2), (0.0, 2.0, 3.0)),
    )
    costs = LatencyCosts(replace(TABLE, curves=curves), groups)
    assert costs.total({"0.heads": 1, "0.head_dim": 2}) == pytest.approx(10 - 4 + 4 / 16)
    assert costs.total({"0.heads": 2, "0.head_dim": 4}) == pytest.approx(10 - 4 + 4 / 4)


@pytest.mark.parametrize("stream", [False, True])
def test_savings_of_pairs_are_differences_of_totals(stream):
    groups, costs = crossing(stream)
    assert costs.neighbours("0.head_dim") >= {"0.heads"}
    assert ("stream" in costs.neighbours("0.head_dim")) is stream
    for widths in ({}, {"0.heads": 1, "0.head_dim": 3}, {"0.heads": 0, "0.head_dim": 8}):
        at = {group.name: group.size for group in groups} | widths
        at |= {"stream": 12} if stream else {}
        for group in groups:
            options = [*range(at[group.name], 0, -1)]
            expected = [costs.total(at) - costs.total({**at, group.name: w}) for w in options]
            assert costs.savings(group.name, at, options) == pytest.approx(expected)


def test_costs_of_another_model_are_refused():
    stranger = DependencyGroup("2.ffn", "ffn", 64, (), ("down",))
    larger = DependencyGroup("0.ffn", "ffn", 128, (), ("down",))
    for group in (stranger, larger):
        with pytest.raises(
            PruningError, match=f"does not have '{group.name}' of {group.size} units"
        ):
            LatencyCosts(TABLE, [group])


def test_a_latency_budget_is_met_on_the_table():
    groups = axes_of_table(may_be_empty=True)
    costs = LatencyCosts(TABLE, groups)
    rankings = {
        a.name: Ranking(
            tuple(range(a.size)),
            tuple(0.01 * (i + 1) ** 2 for i in range(a.size)),
            tuple(float(i) for i in range(a.size)),
        )
        for a in groups
    }
    for target in (9.0, 7.5, 4.2):
        widths = allocate(groups, Budget(target_latency_ms=target), costs=costs, rankings=rankings)
        assert costs.total(widths) <= target + 1e-9
        for group in groups:
            step = 8 if group.kind == "ffn" else 1
            if widths[group.name] < group.size:
                more = {**widths, group.name: widths[group.name] + step}
                assert costs.total(more) > target
    uniform = allocate(groups, Budget(target_latency_ms=7), costs=costs, widths="uniform")
    assert uniform["0.ffn"] == uniform["1.ffn"]
    assert costs.total(uniform) <= 7
    with pytest.raises(PruningError, match=r"no fewer than 3 ms can be reached \(as built: 10\)"):
        check_reach(groups, Budget(target_latency_ms=2.9), costs=costs)


def test_a_table_predicts_models_that_are_cut():
    model = build("bert")
    groups = groups_of(model)
    costs = LatencyCosts(measure_table(model, groups, {"": TWO}, clock=ruler), groups)
    kept = {a.name: tuple(range(a.size)) for a in groups}
    kept |= {a.name: () for a in groups if a.name.endswith(("0.ffn", "1.heads"))}
    kept |= {a.name: (0, 1, 2, 3) for a in groups if a.name.endswith("1.ffn")}
    kept |= {a.name: (0, 2) for a in groups if a.name.endswith(("0.heads", "0.head_dim"))}
    apply_plan(model, groups, PruningPlan({a.name: a.size for a in groups}, kept))
    real = ruler({"x": lambda: model(**batch(2))})["x"]
    assert costs.total({name: len(units) for name, units in kept.items()}) == pytest.approx(real)
