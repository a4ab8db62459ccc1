"""plan.yaml: what is written is read again; what people and strangers make of it is checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lightning_mi_prune import PruningError
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.plan_file import (
    budget_or_plan,
    check_bounds,
    check_present,
    choose_planned,
    plan_from_yaml,
    plan_of,
    plan_to_yaml,
    planned_groups,
    read_plan,
    write_plan,
)
from lightning_mi_prune.allocation.width_plan import (
    PlannedBudget,
    PlannedGroup,
    PlannedSize,
    WidthPlan,
)
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.graph.groups import DependencyGroup

NAMES = ("net.0.ffn", "net.1.ffn", "net.1.heads")
SIZES = (64, 64, 4)
GROUPS = [
    DependencyGroup(name, name.rpartition(".")[2], size, (), ("down",), may_be_empty=True)
    for name, size in zip(NAMES, SIZES, strict=True)
]


def column(budget: Budget, *widths: int) -> PlannedBudget:
    losses = {name: 1e-7 * (1 + i) for i, name in enumerate(NAMES)}
    size = PlannedSize(1000, 2000, 1.5)
    return PlannedBudget(budget, dict(zip(NAMES, widths, strict=True)), losses, size)


PLAN = WidthPlan(
    model="Net",
    groups=tuple(
        PlannedGroup(g.name, g.kind, g.size, g.size, parameters=10 * g.size) for g in GROUPS
    ),
    columns=(column(Budget(0.5), 32, 32, 2), column(Budget(target_macs=900), 16, 8, 1)),
    cut="50%",
    size=PlannedSize(4000, 8000, 3.25),
    loss_unit="nats per example",
    left_out={"90%": "it is out of reach"},
)
TEXT = plan_to_yaml(PLAN)


def edited(old: str, new: str) -> str:
    assert old in TEXT
    return TEXT.replace(old, new, 1)


def test_a_plan_is_written_and_read_again(tmp_path: Path) -> None:
    path = write_plan(PLAN, tmp_path / "deep" / "plan.yaml")
    again = read_plan(path)
    assert again == PLAN
    assert again.left_out == PLAN.left_out
    assert plan_to_yaml(again) == TEXT == path.read_text()
    assert plan_of(str(path)) == plan_of(path) == PLAN
    assert max(map(len, TEXT.splitlines())) < 120
    assert len(TEXT.splitlines()) < 25


@pytest.mark.parametrize(
    "name",
    [
        "a: b",
        "#x",
        "null",
        "on",
        "12",
        "1e5",
        "x y",
        'quo"te',
        "ü.ß",
        "\u2028",
        "- a",
        "*x",
        "{",
        "",
    ],
)
def test_any_name_of_a_group_survives(name: str) -> None:
    groups = (PlannedGroup(f"{name}.ffn" if name else "ffn", name or "ffn", 8, 8),)
    plan = WidthPlan(name or "N", groups, (PlannedBudget(Budget(0.5), {groups[0].name: 4}),), "50%")
    assert plan_from_yaml(plan_to_yaml(plan)) == plan


@pytest.mark.parametrize(
    "budget",
    [
        Budget(1 / 3),
        Budget(0.1 + 0.2),
        Budget(1e-9),
        Budget(target_parameters=7),
        Budget(target_latency_ms=0.125),
        Budget(target_latency_ms=12),
        Budget(keep_information=0.95),
    ],
    ids=str,
)
def test_every_budget_is_read_as_it_was_written(budget: Budget) -> None:
    plan = replace(PLAN, columns=(column(budget, 8, 8, 1),), cut=column(budget, 0, 0, 0).label)
    assert plan_from_yaml(plan_to_yaml(plan)).columns[0].budget == budget


def test_edits_are_carried_out() -> None:
    plan = plan_from_yaml(edited("50%: 32", "50%: 48"))
    assert plan.carried_out().widths == {"net.0.ffn": 48, "net.1.ffn": 32, "net.1.heads": 2}
    pinned = plan_from_yaml(edited("50%: 32", "pin: 50, 50%: 32"))
    for label in ("50%", "900 MACs"):
        assert replace(pinned, cut=label).carried_out().widths["net.0.ffn"] == 50
    assert [g.name for g in planned_groups(pinned, GROUPS)] == list(NAMES)
    without = plan_from_yaml(edited("kind: ffn,", "kind: ffn, exclude: true,"))
    assert list(without.carried_out().widths) == list(NAMES[1:])
    lines = [line for line in TEXT.splitlines() if not line.strip().startswith("net.0.ffn")]
    deleted = plan_from_yaml("\n".join(lines))
    assert deleted.carried_out().widths == without.carried_out().widths
    assert [g.name for g in planned_groups(deleted, GROUPS)] == list(NAMES[1:])
    other = plan_from_yaml(edited("cut: 50%", "cut: 900 MACs"))
    assert other.carried_out().widths == {"net.0.ffn": 16, "net.1.ffn": 8, "net.1.heads": 1}
    assert len({p.carried_out().label for p in (PLAN, plan, pinned, without, other)}) == 5


def test_a_budget_beside_a_plan_chooses_its_column() -> None:
    nothing = (None,) * 5
    assert budget_or_plan(nothing, PLAN) == (Budget(0.5), PLAN)
    budget, plan = budget_or_plan((None, None, 900, None, None), PLAN)
    assert (budget, plan and plan.cut) == (Budget(target_macs=900), "900 MACs")
    assert budget_or_plan((0.3, None, None, None, None), None) == (Budget(0.3), None)
    with pytest.raises(PruningError, match=r"sparsity=0\.6 is no budget of the plan.*50%, 900 MAC"):
        budget_or_plan((0.6, None, None, None, None), PLAN)


WRONG = {
    "another version": (
        edited("version: 1", "version: 2"),
        "version 2; this package reads version",
    ),
    "no version": (edited("version: 1\n", ""), "no version"),
    "true as version": (edited("version: 1", "version: true"), "version True"),
    "an unknown key": (
        edited("multiple: 8", "multipel: 8"),
        r"'multipel'.*did you mean 'multiple'",
    ),
    "an unknown key of a group": (edited("now: 64", "nwo: 64"), r"'nwo'.*did you mean 'now'"),
    "a column that is not there": (edited("50%: 32", "55%: 32"), r"'55%'.*did you mean '50%'"),
    "above": (
        edited("50%: 32", "50%: 72"),
        r"net\.0\.ffn.*72 is above the 64 units.*do not come back",
    ),
    "below": (edited("50%: 32", "50%: -8"), r"net\.0\.ffn.*-8 is below 0"),
    "a fraction": (edited("50%: 32", "50%: 31.5"), r"31\.5; expected a whole number"),
    "a text": (edited("50%: 32", "50%: many"), "'many'; expected a whole number"),
    "a truth": (edited("50%: 32", "50%: true"), "True; expected a whole number"),
    "no width": (edited("50%: 32, ", ""), r"no width at 50%; expected one, pin: N or exclude"),
    "pin and exclude": (
        edited("now: 64", "now: 64, pin: 8, exclude: true"),
        "asks for a width and exclude: true for none; leave one",
    ),
    "a pin above": (edited("now: 64", "now: 64, pin: 65"), "pin: 65 is above the 64 units"),
    "exclude is no truth": (edited("now: 64", "now: 64, exclude: 1"), "neither true nor false"),
    "now above built": (edited("now: 64", "built: 32, now: 64"), "above the 32 as built"),
    "cut is no column": (edited("cut: 50%", "cut: 60%"), r"cut: '60%' is no budget.*'50%'"),
    "two groups of a name": (
        TEXT.replace("net.1.ffn:", "net.0.ffn:"),
        "'net.0.ffn' is there twice",
    ),
    "a budget of another name": (
        edited("50%: {sparsity: 0.5", "50%: {sparsity: 0.6"),
        r"sparsity=0\.6; expected the name '60%'",
    ),
    "a budget out of range": (
        edited("sparsity: 0.5", "sparsity: 1.5"),
        "expected a number above 0",
    ),
    "two budgets in one": (
        edited("sparsity: 0.5", "sparsity: 0.5, target_macs: 9"),
        "expected exactly one",
    ),
    "widths": (edited("widths: global", "widths: best"), "'best'; expected one of"),
    "multiple": (edited("multiple: 8", "multiple: 0"), "0 is not a whole number from 1"),
    "no groups": (TEXT.partition("groups:")[0] + "groups: {}", "0 groups; expected 1"),
    "a list": ("[1, 2]", "a list of 2; expected names with values"),
    "nothing": ("", "holds None"),
    "a reference": ("a: &a [1]\nb: *a", r"refers to another place"),
    "a bomb of merges": (
        "a: &a {x: 1}\nb: &b {<<: [*a, *a, *a, *a]}\nc: {<<: [*b, *b, *b, *b]}",
        "refers to another place",
    ),
    "an object": ("!!python/object/apply:os.system ['touch it_ran']", "no valid YAML"),
    "deep": ("[" * 5000, "no valid YAML"),
    "open": ("version: [1", "no valid YAML in line 1"),
    "a date": (edited("model: Net", "model: 2020-01-01"), "a date, and no text"),
    "a bad date": (edited("model: Net", "model: 2020-13-41"), "no valid YAML"),
    "endless digits": (edited("50%: 32", "50%: 1" + "0" * 9000), "no valid YAML"),
    "not finite": (edited("loss: 6.0e-07", "loss: .nan"), "not a finite number"),
    "long": ("#" * (2**20 + 1), "more than"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_in_a_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, message = WRONG[name]
    with pytest.raises(PruningError, match=message) as caught:
        plan_from_yaml(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"cannot be read from .*; write one with plan"):
        read_plan(tmp_path / "nowhere.yaml")
    with pytest.raises(PruningError, match=r"plan=3; expected the path of a plan\.yaml"):
        plan_of(3)  # type: ignore[arg-type]
    (tmp_path / "long.yaml").write_text("#" * (2**20 + 1))
    with pytest.raises(PruningError, match="has more than 1048576 characters"):
        read_plan(tmp_path / "long.yaml")
    with pytest.raises(PruningError, match="cannot be written"):
        write_plan(PLAN, tmp_path)


def refused(plan: WidthPlan, groups: list[DependencyGroup] = GROUPS, **options: object) -> str:
    with pytest.raises(PruningError) as caught:
        choose_planned(plan, groups, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_plan_that_does_not_fit_the_model_is_refused() -> None:
    misspelt = plan_from_yaml(TEXT.replace("net.1.ffn", "net.1.fnf"))
    assert "'net.1.fnf', which is none that can be cut here; did you mean 'net.1.ffn'" in refused(
        misspelt
    )
    text = refused(plan_from_yaml(TEXT.replace("net.", "deep.encoder.layer.")))
    assert "of a Net, with groups such as deep.encoder.layer" in text
    assert "it belongs to another model" in text
    wider = [replace(group, size=2 * group.size) for group in GROUPS]
    assert "64 units of kind 'ffn' in 'net.0.ffn' as built, but the model 128" in refused(
        PLAN, wider
    )
    kinds = [replace(group, kind="channels") for group in GROUPS]
    assert "belongs to another model" in refused(PLAN, kinds)
    odd = plan_from_yaml(edited("50%: 32", "50%: 33"))
    assert refused(odd).endswith("a multiple of 8, such as 32 or 40, or pin: 33.")
    aligned = [replace(GROUPS[0], multiple=16), *GROUPS[1:]]
    pinned = plan_from_yaml(edited("now: 64", "now: 64, pin: 24"))
    assert "a multiple of 16, which its operators need, such as 16 or 32." in refused(
        pinned, aligned
    )
    needed = [replace(GROUPS[0], may_be_empty=False), *GROUPS[1:]]
    emptied = plan_from_yaml(edited("50%: 32", "50%: 0"))
    assert "cannot run without units (50%: 0)" in refused(emptied, needed)
    alone = plan_from_yaml(
        TEXT.replace("now:", "exclude: true, now:").replace("exclude: true, now: {", "now: {")
    )
    assert "leaves every group alone" in refused(alone)


def test_a_plan_that_contradicts_other_options_is_refused() -> None:
    assert [g.name for g in choose_planned(PLAN, GROUPS, kinds=["ffn", "heads"])] == list(NAMES)
    assert "cuts net.1.heads, which kinds, include" in refused(PLAN, kinds=["ffn"])
    assert "cuts net.1.ffn, net.1.heads, which kinds" in refused(PLAN, exclude="1")
    built = dict(zip(NAMES, SIZES, strict=True))
    check_bounds(PLAN, Constraints(multiple=4), GROUPS, built)
    check_bounds(PLAN, Constraints(floors={"ffn": 32}), GROUPS, built)
    with pytest.raises(PruningError, match=r"32 units of 'net\.0\.ffn', but .* ask for 40 to 64"):
        check_bounds(PLAN, Constraints(floors={"0.ffn": 40}), GROUPS, built)
    with pytest.raises(PruningError, match=r"2 units of 'net\.1\.heads', but .* ask for 3"):
        check_bounds(PLAN, Constraints(pins={"heads": 3}), GROUPS, built)


def test_a_plan_fits_the_widths_it_was_made_for_and_those_on_the_way() -> None:
    built = dict(zip(NAMES, SIZES, strict=True))
    check_present(PLAN, built)
    check_present(PLAN, {**built, "net.0.ffn": 40})  # one of several cuts was made
    with pytest.raises(PruningError, match=r"32 units of 'net\.0\.ffn', above the 24"):
        check_present(PLAN, {**built, "net.0.ffn": 24})
    later = plan_from_yaml(edited("now: 64", "built: 64, now: 48"))
    with pytest.raises(PruningError, match=r"was made when 'net\.0\.ffn' had 48 units; now it has"):
        check_present(later, built)
    check_present(later, {**built, "net.0.ffn": 48})


def test_the_json_and_the_text_hold_the_same_numbers() -> None:
    body = PLAN.to_dict()
    assert [entry["label"] for entry in body["budgets"]] == ["50%", "900 MACs"]
    loaded = yaml.safe_load(TEXT)
    for entry in body["budgets"]:
        column_of = {name: loaded["groups"][name][entry["label"]] for name in NAMES}
        assert column_of == entry["widths"]
        assert loaded["budgets"][entry["label"]]["parameters"] == entry["parameters"]
    text = str(PLAN)
    assert "50% *" in text
    assert "90% is left out: it is out of reach" in text
    assert max(map(len, text.splitlines())) <= 80
