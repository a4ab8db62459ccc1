"""For tests and doctests alike.

With ``--numprocesses`` one more process only schedules: what takes seconds to import is imported
where it is used.
"""

from __future__ import annotations

import gc
import os

import pytest

# Two busy processes with two threads each are several times slower than with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The files that take longest, in that order, so that the workers end together.
LONGEST = (
    "test_layers",
    "test_crash",
    "test_matrix",
    "test_any_model",
    "test_first_batch",
    "test_monitors",
    "test_distributed",
    "test_golden",
    "test_resume",
    "test_unit_pruning",
    "test_rollback",
    "test_export",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first; within a file nothing moves."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """What was imported is no garbage; looking through it takes a fifth of the time of the runs."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
