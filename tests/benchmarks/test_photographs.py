"""The benchmark of MobileNetV2, on a tiny one and on pictures of noise."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import photographs
from benchmarks.photographs import PHOTOGRAPHS, MobileNetV2, agreement, crops, packaged
from tests.support.models import randomize

CACHES = (photographs.known, photographs.graph)


@pytest.fixture
def noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Small pictures of noise and a tiny network with random weights."""
    generator = torch.Generator().manual_seed(0)

    def picture(package: str, path: str) -> Path:
        pixels = torch.randint(256, (48, 64, 3), dtype=torch.uint8, generator=generator)
        found = tmp_path / Path(path).with_suffix(".png").name
        Image.fromarray(pixels.numpy()).save(found)
        return found

    torch.manual_seed(0)
    network = MobileNetV2(((1, 8, 1, 1), (4, 8, 2, 2)), last=16, classes=6).eval()
    randomize(network)
    for name, value in {"SIDE": 32, "CROPS": 6, "ROWS": 8, "TOO_FEW": r"^features\.4"}.items():
        monkeypatch.setattr(photographs, name, value)
    monkeypatch.setattr(photographs, "packaged", picture)
    monkeypatch.setattr(photographs, "pretrained", lambda: network)
    for cache in CACHES:
        cache.cache_clear()
    yield network
    for cache in CACHES:
        cache.cache_clear()


@pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
def test_every_method_is_compared_with_the_dense_network(noise: MobileNetV2) -> None:
    before = {name: value.clone() for name, value in noise.state_dict().items()}
    jobs = [*photographs.mobilenet(sparsities=[0.25])]
    assert len(jobs) == len(photographs.METHODS)
    for job in jobs:
        (found,) = job.run()
        assert found["n_test"] == 6 * len(PHOTOGRAPHS["test"])
        assert 0 <= found["top1"] <= found["top5"] <= 1
        assert found["parameters"] < found["dense_parameters"]
        assert found["macs"] < found["dense_macs"]
        assert found["divergence"] > -1e-6
    assert all(torch.equal(value, before[name]) for name, value in noise.state_dict().items())


def test_the_dense_network_agrees_with_itself(noise: MobileNetV2) -> None:
    found = agreement(noise, photographs.known(0)[1])
    assert found == {"top1": 1, "top5": 1, "divergence": pytest.approx(0, abs=1e-6)}


def test_no_photograph_is_calibrated_on_and_tested(noise: MobileNetV2) -> None:
    assert not {*PHOTOGRAPHS["calibration"]} & {*PHOTOGRAPHS["test"]}
    assert crops("test", 0).shape == (6 * len(PHOTOGRAPHS["test"]), 3, 32, 32)


def test_a_missing_file_is_named_with_its_remedy() -> None:
    for package in ("no-such-package-here", "pytest"):
        with pytest.raises(FileNotFoundError, match=r"requirements-vision\.txt"):
            packaged(package, "weights.pth")


def test_the_names_are_those_of_torchvision() -> None:
    names = MobileNetV2().state_dict().keys()
    assert len(names) == 314
    assert {"features.0.0.weight", "features.2.conv.1.0.weight", "classifier.1.bias"} < names
