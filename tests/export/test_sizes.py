"""Several sizes from one calibration are what as many calls of prune would make."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification as AutoClassifier

from lightning_mi_prune import PruningError, from_pretrained, prune, pruner, save_pretrained
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.export.batches import read_batches
from lightning_mi_prune.export.sizes import opened, smaller
from lightning_mi_prune.pruner import prune_sizes
from tests.support.models import batch, build, outputs

SIZES = (0.25, 0.5, 0.75)
pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def batches() -> list[dict[str, torch.Tensor]]:
    return [batch(32, seed=s) | {"labels": torch.arange(32) % 3} for s in range(4)]


def loss(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**given).loss


def test_each_size_is_what_prune_makes_and_the_model_stays() -> None:
    model = build("bert").eval()
    before = copy.deepcopy(model.state_dict())
    with patch.object(pruner, "collect_activations", wraps=pruner.collect_activations) as collected:
        found = [*prune_sizes(model, batches(), SIZES, loss=loss)]
    assert collected.call_count == 1
    for sparsity, (small, result) in zip(SIZES, found, strict=True):
        alone = build("bert").eval()
        expected = prune(alone, batches(), sparsity, loss=loss)
        assert result.plan == expected.plan
        assert result.sparsity >= sparsity
        state = alone.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in small.state_dict().items())
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert PlanTracker.held_by(model) is None


def test_sizes_out_of_reach_are_refused_before_calibration() -> None:
    floors = Constraints(floor=0.5)
    for sizes, message in (([0.25, 0.9], "out of reach"), ([], "is empty"), ([1.5], "sparsity")):
        collects = patch.object(pruner, "collect_activations")
        with collects as collected, pytest.raises(PruningError, match=message):
            next(prune_sizes(build("bert"), batches(), sizes, loss=loss, constraints=floors))
        assert not collected.called


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_pretrained(build("bert"), tmp_path / "model", calibration=batches())


def test_stored_batches_are_read_back(folder: Path) -> None:
    for found, given in zip(read_batches(folder), batches(), strict=True):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], value) for name, value in given.items())


def test_smaller_writes_a_folder_and_a_card_for_each_size(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    written = [*smaller(folder, SIZES, tmp_path / "out")]
    assert [path.name for path in written] == ["model-25", "model-50", "model-75"]
    sizes = []
    for sparsity, path in zip(SIZES, written, strict=True):
        alone = opened(folder)
        prune(alone, batches(), sparsity, loss=loss)
        small = AutoClassifier.from_pretrained(path).eval()
        assert torch.equal(outputs(small, batch(4)), outputs(alone, batch(4)))
        card = (path / "README.md").read_text()
        assert "Measured on the batches that it was calibrated on" in card
        assert "| loss |" in card
        assert (path / "tokenizer.json").is_file()
        sizes.append((path / "model.safetensors").stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    again = next(smaller(written[0], [0.5], tmp_path / "twice", data=batches()))
    count = sum(p.numel() for p in from_pretrained(AutoClassifier, again).parameters())
    assert count < sum(p.numel() for p in from_pretrained(AutoClassifier, written[0]).parameters())


def test_smaller_refuses_before_it_writes(folder: Path, tmp_path: Path) -> None:
    bare = save_pretrained(build("bert"), tmp_path / "bare")
    for source, sizes, message in (
        (bare, [0.5], "has no calibration.safetensors"),
        (folder, [0.0], "expected a number above 0"),
        (tmp_path / "nowhere", [0.5], "nowhere"),
    ):
        with pytest.raises(PruningError, match=message):
            next(smaller(source, sizes, tmp_path / "out"))
    (folder / "calibration.safetensors").write_bytes(b"damaged")
    with pytest.raises(PruningError, match=r"calibration\.safetensors"):
        next(smaller(folder, [0.5], tmp_path / "out"))
    assert not (tmp_path / "out").exists()
