"""The benchmark of networks for pictures, on a few random ones."""

import gzip
from pathlib import Path

import pytest
import torch

from benchmarks import pictures, vision
from benchmarks.pictures import RECIPES, ResNet, fashion_mnist, held_out, training_batches, vit
from benchmarks.records import Store
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import count_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]


def written(folder: Path, name: str, data: torch.Tensor, *, zipped: bool = True) -> None:
    """An IDX file of bytes."""
    head = bytes([0, 0, 8, data.ndim]) + b"".join(n.to_bytes(4, "big") for n in data.shape)
    raw = head + data.numpy().tobytes()
    path = folder / f"{name}-idx{data.ndim}-ubyte{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random pictures and tiny networks; the folder of the records."""
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", 80), ("t10k", 24)):
        pixels = torch.randint(256, (count, 28, 28), dtype=torch.uint8, generator=generator)
        written(tmp_path, f"{name}-images", pixels)
        written(tmp_path, f"{name}-labels", (torch.arange(count) % 10).byte())
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    for name, value in {"EPOCHS": 3, "STEPS": 3, "BATCH": 8, "HELD_OUT": 24}.items():
        monkeypatch.setattr(pictures, name, value)
    tiny = {"resnet": lambda: ResNet((8, 16)), "vit": lambda: vit(16, 3, 14)}
    for model, build in tiny.items():
        recipe = pictures.Recipe(build, RECIPES[model].optimizer, 1e-3)
        monkeypatch.setitem(RECIPES, model, recipe)  # type: ignore[misc]
    caches = (fashion_mnist, vision.split, vision.graph_of)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "records"
    for cache in caches:
        cache.cache_clear()


def run(case, store: Store, **given) -> None:
    for job in case(folder=store.folder, **given):
        for setting, figures in zip(job.settings, job.run(), strict=True):
            store.add(setting, job.seed, figures)


def test_the_pictures_are_read_under_any_of_their_names(
    few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = fashion_mnist("test")
    assert test.pixels.shape == (24, 1, 28, 28)
    assert test.labels.tolist() == [n % 10 for n in range(24)]
    other = tmp_path / "other"
    other.mkdir()
    written(other, "t10k-images", ((test.pixels * 0.353 + 0.286) * 255).round().byte()[:, 0])
    (other / "t10k-images-idx3-ubyte.gz").rename(other / "t10k-images.idx3-ubyte.gz")
    written(other, "t10k-labels", test.labels.byte(), zipped=False)
    monkeypatch.setenv("FASHION_MNIST", str(other))
    fashion_mnist.cache_clear()
    again = fashion_mnist("test")
    assert torch.equal(again.pixels, test.pixels)
    assert torch.equal(again.labels, test.labels)
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion_mnist("train")


def test_batches_depend_on_seed_and_epoch_alone(few: Path) -> None:
    training, validation = held_out(0)
    both = torch.cat([training.pixels, validation.pixels]).flatten(1).sum(1).sort().values
    torch.testing.assert_close(both, fashion_mnist("train").pixels.flatten(1).sum(1).sort().values)

    def labels(seed: int, epoch: int) -> list[list[int]]:
        loader = training_batches(training, seed)
        loader.sampler.set_epoch(epoch)
        return [batch["labels"].tolist() for batch in loader]

    assert labels(0, 1) == labels(0, 1)
    assert labels(0, 1) != labels(0, 2)
    assert labels(0, 1) != labels(1, 1)
    # Every picture once before any comes again: 56 pictures in batches of 8, so after 7 steps.
    loader, seen = training_batches(training, 0), []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        seen += [*loader.sampler]
    first = torch.cat(seen)[: len(training.labels)]
    assert sorted(first.tolist()) == [*range(len(training.labels))]


@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_all_ways_are_measured_beside_one_dense_control(few: Path, model: str) -> None:
    pytest.importorskip("torch_pruning")
    store, methods = Store("vision", few), ["torch-pruning-taylor", "magnitude"]
    run(vision.vision, store, models=[model], seeds=[0], sparsities=[0.5], methods=methods)
    (dense,) = store.find(method="dense")
    (mine,) = store.find(method="relevance-mi")
    others = [*store.find(method="torch-pruning-taylor"), *store.find(method="magnitude")]
    assert len(others) == 3
    assert dense["reached"] == 0
    assert dense["macs"] == dense["dense_macs"]
    groups = choose_groups(vision.graph_of(model).groups)
    for record in (mine, *others):
        assert record["dense_accuracy"] == dense["accuracy"]
        assert record["macs"] < dense["macs"]
        lost = record["dense_parameters"] - record["parameters"]
        assert record["reached"] == pytest.approx(lost / count_parameters(groups))
        assert [*dict(record["cuts"])] == [1]
        assert record["cuts"][-1][1] == record["macs"]
    assert mine["reached"] == pytest.approx(0.5, abs=0.15)
    coarse = 0.25 * dense["macs"]  # a head, or a few channels, of a tiny network
    for record in store.find(method="torch-pruning-taylor"):
        assert record["macs"] == pytest.approx(mine["macs"], abs=coarse)
    speeds = Store("vision-latency", few)
    given = {"models": [model], "sparsities": [0.5], "seconds": 0.01, "rounds": 1}
    run(vision.vision_latency, speeds, **given)
    known = {record["macs"] for record in (mine, *store.find(method="torch-pruning-taylor"))}
    assert {record["macs"] for record in speeds} == known
    assert all(record["ms_b64"] > 0 for record in speeds)


@pytest.mark.parametrize("model", ["resnet", "vit"])
def test_a_third_of_the_layers_is_removed(few: Path, model: str) -> None:
    given = {"models": [model], "seeds": [0]}
    run(vision.vision, Store("vision", few), **given, sparsities=[])
    store = Store("vision-layers", few)
    run(vision.vision_layers, store, **given)
    found = [(record["criterion"], record["reconstruction"]) for record in store]
    assert found == [*vision.LAYERS[model]]
    stacks = {"resnet": 2, "vit": 1}[model]
    for record in store:
        assert [len(removed) for removed in record["removed"][0]] == [1] * stacks
        assert record["macs"] < record["dense_macs"]


def test_rivals_need_the_record_of_ours(few: Path) -> None:
    jobs = vision.vision(few, ["vit"], [0], [0.5], ["torch-pruning-taylor"])
    with pytest.raises(LookupError, match="python -m benchmarks run vision"):
        [*jobs][-1].run()
