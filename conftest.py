"""For tests and doctests alike."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_mi_prune import families


@pytest.fixture(autouse=True)
def _families_stay_as_they_were() -> Iterator[None]:
    """What a test registers would be asked about every network of the tests after it."""
    before = list(families._FAMILIES)
    yield
    families._FAMILIES[:] = before
