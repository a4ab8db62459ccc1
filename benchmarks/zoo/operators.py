"""torchvision without its compiled operators.

The registry's torchvision is built for the CUDA build of torch; beside a CPU build its import
fails, and with it that of torchmetrics and of many models of transformers, as two operators that it
describes to torch are missing. Classifiers need neither; of detectors some need `nms`, which is
given here in Python.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["complete_torchvision", "nms"]

_kept: list[Any] = []  # operators are gone when what defined them is


def complete_torchvision() -> None:
    """Make `import torchvision` work where it is installed."""
    if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # half imported
        library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        importlib.import_module("torchvision").ops.boxes.nms = nms


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Numbers of the boxes that do not overlap a better one by more than a share.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1.9], [3, 3, 4, 4]])
        >>> nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)
        tensor([1, 2])
    """
    order = scores.detach().argsort(descending=True).numpy()
    places = boxes.detach().numpy()  # one operator of torch for each box would be recorded
    area = (places[:, 2:] - places[:, :2]).prod(1)
    kept, left = list[int](), order
    while len(left):
        best, left = left[0], left[1:]
        kept.append(int(best))
        low = np.maximum(places[best, :2], places[left, :2])
        high = np.minimum(places[best, 2:], places[left, 2:])
        shared = (high - low).clip(min=0).prod(1)
        left = left[shared <= iou_threshold * (area[best] + area[left] - shared)]
    return torch.tensor(kept, dtype=torch.long)
