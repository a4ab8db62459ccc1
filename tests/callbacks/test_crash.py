"""A run that is killed loses nothing but the time since its last checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
from typing import Any

import pytest

from tests.support.crashing import (
    CASES,
    HALF_CUT,
    Case,
    half_copied,
    half_written,
    straight_name,
    write_results,
)
from tests.support.ranks import imported
from tests.support.runs import NOTHING

BATCHES = 4  # of an epoch
KILLED = [name for name, case in CASES.items() if case.deed == "kill"]
WRITING = [name for name in KILLED if "writing" in name]
DECIDED = [
    "killed with the first cut decided",
    "killed with the second cut decided",
    "killed with a cut decided, saved in validation",
    "killed in surgery, decision saved",
    "rank 1 killed in surgery",
]
TORN = [name for name, case in CASES.items() if case.arm is half_copied]
every = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    base, worker = tmp_path_factory.getbasetemp(), "PYTEST_XDIST_WORKER" in os.environ
    folder = (base.parent if worker else base) / "crashes"
    folder.mkdir(exist_ok=True)
    found = folder / "results.json"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker of pytest-xdist does it for all
        if not found.exists():
            process = imported().Process(target=write_results, args=(folder,))
            process.start()
            process.join(600)
            assert process.exitcode == 0
    return json.loads(found.read_text())


def differences(case: Case, results: dict[str, Any], resumed: list[Any]) -> list[str]:
    """What a resumed run ended with and the run that nothing ended did not."""
    found = []
    for rank, (wanted, had) in enumerate(
        zip(results["straight"][straight_name(case)], resumed, strict=True)
    ):
        if wanted is None or had is None:
            found.append(f"rank {rank} did not end")
            continue
        epochs = had["epochs"]
        last = max(map(int, wanted["epochs"]))
        first = min(map(int, epochs), default=last + 1)
        if sorted(map(int, epochs)) != [*range(first, last + 1)] or first > last:
            found.append(f"rank {rank} went through epochs {list(epochs)} of {last + 1}")
        for epoch, digests in epochs.items():
            # Lightning keeps no metric across a resumption.
            lost = ("metrics", NOTHING) if int(epoch) == first else None
            found += [
                f"rank {rank}, epoch {epoch}: {what}"
                for what, value in digests.items()
                if value != wanted["epochs"][epoch][what] and (what, value) != lost
            ]
        found += [
            f"rank {rank}: {what} {had[what]} instead of {wanted[what]}"
            for what in wanted
            if what not in ("epochs", "start") and had[what] != wanted[what]
        ]
    return found


def test_the_run_they_are_compared_with_is_cut(results):
    for name, ranks in results["straight"].items():
        for found in ranks:
            assert found is not None, name
            which = "undone" if "taken back" in name else "cuts"
            assert len(found[which]) == 1 + ("layers" not in name), f"{name}: {found}"
    one, other = results["straight"]["2 ranks"]
    assert one == other, "the two ranks ended with different models"


@every
def test_the_run_ends_there_and_soon(results, name):
    case, found = CASES[name], results["cases"][name]
    assert found["ended"] is not None, f"it was never there: exit code {found['code']}"
    assert found["ended"]["epoch"] == case.epoch
    assert found["lingered"] < 30, f"it took {found['lingered']:.0f} s to end"
    if case.world == 1:
        expected = {"kill": -9, "term": 4, "raise": 3, "interrupt": 5}[case.deed]
        assert found["code"] == expected, f"exit code {found['code']}"
    else:
        assert found["code"] not in (0, "hangs"), f"the launcher: {found['code']}"
    if case.deed == "kill" and case.world > 1 and case.launcher == "fork":
        # Left alone, the other rank may fail first.
        assert found["failures"].get(str(case.rank), -9) == -9, found["failures"]


@every
def test_no_checkpoint_is_lost_or_damaged(results, name):
    case, found = CASES[name], results["cases"][name]
    damaged = {k: v for k, v in found["checkpoints"].items() if isinstance(v, str)}
    assert bool(damaged) == (name in TORN), f"damaged: {damaged}"
    assert found["newest"] is not None, "no checkpoint is whole"
    wanted = found["ended"]["step"]
    if case.saves in ("epochs", "validations"):
        wanted = found["ended"]["epoch"] * BATCHES
    elif name in WRITING:
        wanted -= 1
    had = found["checkpoints"][found["newest"]]["step"]
    assert had >= wanted, f"step {wanted} was saved, the newest checkpoint holds step {had}"


@every
def test_the_resumed_run_ends_as_if_nothing_had_happened(results, name):
    case, found = CASES[name], results["cases"][name]
    assert found["resumed_code"] == 0, f"resuming ended with {found['resumed_code']}"
    whole = [v["step"] for v in found["checkpoints"].values() if not isinstance(v, str)]
    for resumed in found["resumed"]:
        assert resumed["start"] in whole, f"it went on from step {resumed['start']}, not {whole}"
    differs = differences(case, results, found["resumed"])
    assert not differs, "; ".join(differs)


@pytest.mark.parametrize("name", DECIDED)
def test_a_decided_cut_is_in_the_checkpoint(results, name):
    found = results["cases"][name]
    held = {k: v["pending"] for k, v in found["checkpoints"].items()}
    assert all(held.values()), f"holds the decision: {held}"
    assert found["resumed"][0]["start"] == CASES[name].epoch * BATCHES


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, case in CASES.items()
        if "max_drop" in case.method or "max_drop" in case.method.get("layers", {})
    ],
)
def test_a_cut_on_probation_is_in_the_checkpoint(results, name):
    held = {k: v["snapshot"] for k, v in results["cases"][name]["checkpoints"].items()}
    assert all(held.values()), f"holds what it takes to undo the cut: {held}"


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.arm is half_written])
def test_half_a_checkpoint_never_has_the_name_of_a_whole_one(results, name):
    for path, content in results["cases"][name]["checkpoints"].items():
        assert isinstance(content, dict), f"{path}: {content}"


@pytest.mark.parametrize("name", [*HALF_CUT][:2])
def test_a_checkpoint_of_an_exception_inside_a_cut_can_be_resumed(results, name):
    found = results["cases"][name]
    assert found["resumed_code"] == 0, f"resuming from {found['newest']} fails"


def test_a_checkpoint_of_an_exception_after_a_cut_has_it_in_its_report(results):
    found = results["cases"]["exception after a cut"]
    assert found["resumed"][0]["cuts"] == [1, 2]
