"""A tiny random model in the place of every fine-tuned one."""

from collections.abc import Iterator

import pytest

from benchmarks import ablations, layers, recovery
from benchmarks.subjects import Subject, examine
from tests.benchmarks.tiny import Data, labelled
from tests.models import build


@pytest.fixture(scope="session")
def subject() -> Subject:
    return examine("trec-6", 0, build(), labelled(range(12)), labelled(range(12, 14)))


@pytest.fixture
def opened(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The tasks and seeds that were opened; all of them are the tiny model."""
    asked: list[tuple[str, int]] = []

    def tiny(task: str, seed: int, *, calibrated: bool = True):
        asked.append((task, seed))
        return subject, Data()

    caches = [recovery.training_after, recovery.control_of, recovery.pruned, layers.compared]
    caches += [ablations._activations, ablations._gradients]
    for module in (recovery, ablations, layers):
        monkeypatch.setattr(module, "opened", tiny)
    for cache in caches:
        cache.cache_clear()
    yield asked
    for cache in caches:
        cache.cache_clear()
