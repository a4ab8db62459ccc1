"""Lightning's own pruning callback beside the benchmark's masks, and what masks do to speed."""

import copy
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch import nn

from examples.benchmark import latency, recovery
from examples.benchmark.finetuned import TASKS
from examples.benchmark.records import load
from examples.benchmark.rivals.masks import magnitude_masks
from examples.benchmark.rivals.size import settle, weights_of, zeros_of
from examples.benchmark.speed_tables import mask_lines
from lightning_mi_prune import find_axes
from lightning_mi_prune.axes import count_parameters
from lightning_mi_prune.choosing import choose_axes
from tests.examples.test_recovery import labelled
from tests.models import batch, build, outputs


def names_of(model: nn.Module) -> list[str]:
    return weights_of(choose_axes(find_axes(model)))


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_masks_are_those_of_lightning(family: str, sparsity: float) -> None:
    ours = magnitude_masks(build(family), [], sparsity, 0)
    module = pl.LightningModule()
    module.network = build(family)
    names = names_of(module.network)
    paths = [name.removesuffix(".weight") for name in names]
    pruning = ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(module.network.get_submodule(path), "weight") for path in paths],
        amount=round(sparsity * count_parameters(choose_axes(find_axes(module.network)))),
        use_global_unstructured=True,
    )
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    pruning.setup(trainer, module, "fit")
    pruning.on_train_epoch_end(trainer, module)
    for name in names:
        mask = module.network.get_buffer(f"{name}_mask")
        assert torch.equal(ours.get_buffer(f"{name}_mask"), mask), name
    pruning.on_train_end(trainer, module)
    settle(ours)
    for name in names:
        assert torch.equal(ours.get_parameter(name), module.network.get_parameter(name)), name
    assert torch.equal(outputs(ours, batch()), outputs(module.network, batch()))


def test_masks_are_in_place_or_made_permanent() -> None:
    dense = build()
    before, names = copy.deepcopy(dense.state_dict()), names_of(dense)
    placed, zeros = (latency.masked(dense, 0.75, permanent=last) for last in (False, True))
    for name in names:
        assert torch.equal(placed.get_buffer(f"{name}_mask") == 0, zeros.get_parameter(name) == 0)
        assert not hasattr(zeros, f"{name}_mask")
    assert not [name for name, _ in zeros.named_buffers() if name.endswith("_mask")]
    total = sum(dense.get_parameter(name).numel() for name in names)
    assert sum(zeros_of(zeros, name) for name in names) == round(0.75 * total)
    assert torch.equal(outputs(placed, batch()), outputs(zeros, batch()))
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny shape and its rows, in a folder of its own; the tasks that were opened."""
    found = []

    class Data:
        num_classes = 3

        def test_dataloader(self):
            return labelled(range(2))

    def task_data(task: str, seed: int) -> Data:
        found.append(task)
        return Data()

    monkeypatch.setattr(latency, "task_data", task_data)
    monkeypatch.setattr(latency, "shaped", lambda config, kept=None: build())
    for module in (recovery, latency, latency.oneshot):
        monkeypatch.setattr(module, "RESULTS", tmp_path / f"{module.__name__}.json")
    monkeypatch.setattr(latency, "MASKED", tmp_path / "masked.json")
    monkeypatch.setattr(latency, "model_path", lambda name: name)
    monkeypatch.setattr(latency.AutoConfig, "from_pretrained", lambda path, **options: None)
    return found


def test_masks_are_timed_once_beside_the_dense_model(
    opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fast = ["--seconds", "0.01", "--rounds", "1", "--tasks"]
    latency.main([*fast, "trec-6", "--methods", "relevance-mi"])
    assert opened == []  # no shape is named, and no masks are
    latency.main([*fast, "trec-6", "--methods", "magnitude-masks"])
    records = load(latency.MASKED)
    assert [(record["task"], record["share"]) for record in records] == [
        ("trec-6", share) for share in latency.SHARES
    ]
    for record in records:
        assert record["gone"] == pytest.approx(record["share"], abs=1e-3)
        names = [f"{n}_latency_ms_b{b}" for n in ("dense", "masks", "zeros") for b in (1, 32)]
        assert all(record[name] > 0 for name in names)
        assert record["length"] == 12
    assert "trec-6 75% masked: " in capsys.readouterr().out
    latency.main([*fast, "tweets-3", "trec-6"])
    assert opened == ["trec-6", "tweets-3"]
    assert load(latency.MASKED)[:2] == records
    assert len(load(latency.MASKED)) == 4
    assert set(opened) < set(TASKS)


def test_the_page_shows_masks_where_there_are_records() -> None:
    assert mask_lines([]) == []
    record = {"task": "trec-6", "gone": 0.75, "machine": {"cpu": "A", "threads": 2}}
    times = {"dense": (6.0, 60.0), "masks": (8.0, 61.0), "zeros": (6.0, 59.0)}
    for name, values in times.items():
        record |= {f"{name}_latency_ms_b{b}": ms for b, ms in zip((1, 32), values, strict=True)}
    lines = mask_lines([record])
    assert lines[0] == "## Masks and speed"
    assert lines[-5:] == [
        "| trec-6 | 75% | 1 | 6.0 | 8.0 (0.75x) | 6.0 (1.00x) |",
        "| trec-6 | 75% | 32 | 60.0 | 61.0 (0.98x) | 59.0 (1.02x) |",
        "",
        "Processors: A; threads: 2.",
        "",
    ]
