"""One thread a process (two busy processes with two threads each are several times slower)."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


def count_hooks(module: nn.Module) -> int:
    """All forward hooks on a module tree."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
