"""Sums made one after another from files: the same plan and weights, one matrix at a time."""

from __future__ import annotations

import errno
import gc
import logging
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mi_prune import PruningError, discover, options, prune
from lightning_mi_prune.calibration import memory as choosing
from lightning_mi_prune.calibration.collect import collect_gradients
from lightning_mi_prune.calibration.gradients import GradientRecorder
from lightning_mi_prune.calibration.memory import MemoryNeeds, choose_memory, memory_needs
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.calibration.samples import MomentsOnDemand, StoredSamples
from lightning_mi_prune.core import spilling
from lightning_mi_prune.core.spilling import in_file, spilled, spilled_zeros
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.surgery.tensors import parameters_in_files
from tests.support.graphs import groups_of
from tests.support.models import SOME, batch, build
from tests.support.runs import sha

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for temporary files, which tensors of any size go to."""
    monkeypatch.setattr(spilling, "_SMALLEST", 1)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def loss(model: nn.Module, given: dict[str, torch.Tensor]) -> Any:
    return (model(**given).logits ** 3).mean()


def pruned(family: str, memory: str, **given: Any) -> tuple[str, Any]:
    """Digest of the weights after a cut, and what it did."""
    model = build(family)
    batches = [batch(seed=seed) for seed in range(4)]
    calibration = options.Calibration(memory=memory, gradient_steps=3)
    result = prune(model, batches, 0.5, loss=loss, calibration=calibration, **given)
    return sha(*(x for item in model.state_dict().items() for x in item)), result


SETTINGS: dict[str, dict[str, Any]] = {
    "gradients": {},
    "weights": {"importance": options.Importance(relevance="weights")},
    "taylor": {"importance": options.Importance("taylor")},
    "hidden": {"kinds": ["ffn", "heads", "hidden"]},
    "head_dim": {"kinds": ["ffn", "head_dim"]},
    "compensation": {"reconstruction": options.Reconstruction("compensation")},
    "uniform": {"widths": "uniform"},
}


@pytest.mark.parametrize(
    ("family", "setting"),
    [*(("bert", setting) for setting in SETTINGS), ("distilbert", "gradients")],
)
def test_low_memory_gives_the_same_plan_and_weights_bit_for_bit(
    files: Path, family: str, setting: str
) -> None:
    ordinary, low = (pruned(family, memory, **SETTINGS[setting]) for memory in ("ordinary", "low"))
    assert low[1].plan == ordinary[1].plan
    assert low[0] == ordinary[0]
    assert (ordinary[1].memory, low[1].memory) == ("ordinary", "low")
    assert [*files.iterdir()] == []


def test_the_state_of_an_optimizer_follows_likewise(files: Path) -> None:
    found = []
    for memory in ("ordinary", "low"):
        model = build("bert")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loss(model, batch()).backward()
        optimizer.step()
        prune(
            model,
            [batch()],
            0.5,
            loss=loss,
            optimizers=[optimizer],
            calibration=options.Calibration(memory=memory),  # type: ignore[arg-type]
        )
        loss(model, batch()).backward()
        optimizer.step()
        found.append(sha(*model.parameters()))
    assert found[0] == found[1]


def test_weights_return_to_memory_and_nothing_else_stays(files: Path) -> None:
    model = build("bert")
    calibration = options.Calibration(memory="low")
    prune(model, [batch()], 0.5, loss=loss, calibration=calibration)
    shared = {p.untyped_storage().filename for p in model.parameters()}
    assert shared == {None}
    assert all(p.grad is None for p in model.parameters())


def test_one_matrix_of_sums_is_there_at_a_time(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without waiting for the garbage collector."""
    alive: weakref.WeakSet[Moments] = weakref.WeakSet()
    most = 0
    made = StoredSamples.moments

    def count(self: StoredSamples) -> Moments:
        nonlocal most
        found = made(self)
        alive.add(found)
        most = max(most, len(alive))
        return found

    monkeypatch.setattr(StoredSamples, "moments", count)
    gc.disable()
    try:
        pruned("bert", "low")
    finally:
        gc.enable()
    assert most == 1


def test_backward_passes_keep_no_gradient_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build("bert"), []
    groups = groups_of(model)
    end = GradientRecorder.end

    def look(self: GradientRecorder, **given: Any) -> None:
        seen.append(sum(p.grad is not None for p in model.parameters()))
        end(self, **given)

    monkeypatch.setattr(GradientRecorder, "end", look)
    collect_gradients(model, groups, full_plan(groups), [batch()] * 2, loss, steps=2)
    assert seen == [0, 0]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


# ---------------------------------------------------------------------------------------- choice

NEEDS = MemoryNeeds(ordinary=80, low=10, files=30, largest="layers.3.ffn", entries=14_336)


@pytest.mark.parametrize(
    ("wanted", "free", "found"),
    [
        ("auto", 160, "ordinary"),
        ("auto", 159, "low"),
        ("ordinary", 1, "ordinary"),
        ("low", 10, "low"),
    ],
)
def test_files_are_used_where_half_of_the_free_memory_is_not_enough(
    wanted: Any, free: int, found: str
) -> None:
    assert choose_memory(options.Calibration(memory=wanted), NEEDS, CPU, free=free) == found


def test_a_model_that_does_not_fit_even_group_by_group_is_refused() -> None:
    with pytest.raises(PruningError, match=r"'layers.3.ffn' has 14,336 entries, which takes 1 MB"):
        choose_memory(options.Calibration(), NEEDS, CPU, free=9)


def test_needs_grow_with_the_largest_group_alone() -> None:
    model = build("bert")
    groups = groups_of(model)
    known = {"positions": 100, "gradients": True}
    every = memory_needs(model, groups, full_plan(groups), **known)
    ffn = [group for group in groups if group.kind == "ffn"]
    one = memory_needs(model, ffn[:1], full_plan(groups), **known)
    assert one.low == every.low
    assert one.ordinary < every.ordinary
    assert one.files < every.files


def test_a_choice_is_logged(
    files: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups = [group for group in groups_of(build("bert")) if group.kind in ("ffn", "heads")]
    needs = memory_needs(build("bert"), groups, full_plan(groups), positions=16_384, gradients=True)
    monkeypatch.setattr(choosing, "free_memory", lambda device: needs.ordinary)
    with caplog.at_level(logging.INFO, logger="lightning_mi_prune"):
        _, result = pruned("bert", "auto")
    assert result.memory == "low"
    (line,) = [r.message for r in caplog.records if "memory='low'" in r.message]
    assert str(needs) in line
    assert str(files) in line


@pytest.mark.parametrize("place", ["free_memory", "disk_usage", "posix_fallocate"])
def test_too_little_room_is_refused_before_the_model_changes(
    files: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patches: dict[str, tuple[Any, str, Any, str]] = {
        "free_memory": (choosing, place, lambda _: 1, "Not even one group at a time fits"),
        "disk_usage": (
            choosing.shutil,
            place,
            lambda _: type("Usage", (), {"free": 1}),
            "Set TMPDIR to a folder on a larger disk",
        ),
        "posix_fallocate": (os, place, full, "do not fit in"),
    }
    owner, name, value, sentence = patches[place]
    monkeypatch.setattr(owner, name, value)
    model = build("bert")
    before = sha(*(x for item in model.state_dict().items() for x in item))
    with pytest.raises(PruningError, match=sentence):
        prune(model, [batch()], 0.5, loss=loss, calibration=options.Calibration(memory="low"))
    assert sha(*(x for item in model.state_dict().items() for x in item)) == before
    assert [*files.iterdir()] == []


def test_another_choice_is_refused() -> None:
    with pytest.raises(PruningError, match=r"memory='little'; expected one of"):
        options.Calibration(memory="little")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------- files


TENSORS = {
    "plain": torch.arange(20.0).view(4, 5),
    "transposed": torch.arange(20.0).view(4, 5).mT,
    "part": torch.arange(20, dtype=torch.bfloat16).view(4, 5)[:, 1:],
    "whole": torch.arange(6).view(2, 3),
    "boolean": torch.tensor([True, False]),
    "complex": torch.arange(6.0).view(3, 2) * 1j,
}


@pytest.mark.parametrize("x", TENSORS.values(), ids=TENSORS)
def test_tensors_in_files_have_values_type_and_order_of_entries(
    files: Path, x: torch.Tensor
) -> None:
    found = in_file(x)
    assert torch.equal(found, x)
    assert found.dtype == x.dtype
    assert found.stride() == torch.empty_like(x).stride()
    assert found.data_ptr() != x.data_ptr()
    assert [*files.iterdir()] == []  # the name is gone, the file is not
    found.zero_()  # and can be written to
    assert not torch.equal(found, x)


def test_small_tensors_and_those_outside_of_a_block_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    assert in_file(x).data_ptr() == x.data_ptr()
    monkeypatch.setattr(spilling, "_SMALLEST", 1)
    assert spilled(x) is x
    with spilling.spilling():
        assert spilled(x) is not x
        zeros = spilled_zeros((2, 2), torch.float64, CPU)
        assert zeros.untyped_storage().filename is not None
        with spilling.spilling(False):
            assert spilled(x) is x
    assert not zeros.any()


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_return_from_files(files: Path, fails: bool) -> None:
    layer = nn.Linear(3, 2)
    before, parameters = sha(layer.weight, layer.bias), dict(layer.named_parameters())
    try:
        with parameters_in_files(layer, layer.parameters()):
            assert layer.weight.untyped_storage().filename is not None
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert sha(layer.weight, layer.bias) == before
    assert dict(layer.named_parameters()) == parameters
    assert layer.weight.untyped_storage().filename is None


def test_saved_tensors_in_files_give_the_same_gradients(files: Path) -> None:
    model = build("bert")
    found = []
    for active in (False, True):
        with spilling.spilling(active), spilling.spilling_saved_tensors(model):
            value = loss(model, batch())
        model.zero_grad()
        value.backward()
        found.append(sha(*(p.grad for p in model.parameters() if p.grad is not None)))
    assert found[0] == found[1]


# --------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize(("family", "head"), [*SOME, ("bert", "masked-lm")])
def test_groups_are_found_alike_with_activations_in_files(
    files: Path, family: str, head: str
) -> None:
    found = []
    for active in (False, True):
        with spilling.spilling(active):
            found.append(discover(build(family, head)).to_json())
    assert found[0] == found[1]
    assert [*files.iterdir()] == []


def test_outputs_of_operators_go_to_files_but_views_stay(files: Path) -> None:
    x = torch.randn(4, 5)
    new, view = x * 2, x.mT
    value = new.clone()
    with spilling.spilling():
        spilling.spill_outputs([new, view], [x])
    assert torch.equal(new, value)
    assert new.untyped_storage().filename is not None
    assert view.data_ptr() == x.data_ptr()


def test_stored_samples_give_the_sums_of_the_parts(files: Path) -> None:
    direct, stored = Moments(5), StoredSamples(5)
    for rows in (3, 512, 1):
        x = torch.randn(rows, 5)
        direct.update(x)
        stored.update(x)
    for name in ("count", "total", "outer"):
        assert torch.equal(getattr(stored.moments(), name), getattr(direct, name))


def test_sums_of_ranks_are_added_one_after_another(files: Path) -> None:
    samples = {name: StoredSamples(2) for name in "ab"}
    for stored in samples.values():
        stored.update(torch.randn(4, 2))
    added: list[list[str]] = []

    def twice(sums: Any) -> None:
        added.append([*sums])
        for each in sums.values():
            each.unpack(2 * each.packed())

    keys = {"a": samples["a"], "also": samples["a"], "b": samples["b"]}
    found = MomentsOnDemand(keys).reduced(twice)
    assert added == [["a"], ["b"]]  # what is shared, once
    assert [*found] == [*keys]
    for key, stored in keys.items():
        assert torch.equal(found[key].packed(), 2 * stored.moments().packed())
    found.check()


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [([], "No activations were collected at 'ffn'"), ([[float("nan")]], "NaN or infinite")],
)
def test_samples_that_cannot_be_scored_are_refused(samples: list[Any], sentence: str) -> None:
    stored = StoredSamples(1)
    if samples:
        stored.update(torch.tensor(samples))
    found = MomentsOnDemand({"ffn": stored})
    with pytest.raises(PruningError, match=sentence):
        found.check()
    if samples:  # and as sums of several ranks
        with pytest.raises(PruningError, match=sentence):
            found.reduced(lambda _: None).check()
