"""Prints which inputs are drawn, and afterwards how many each reader got."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest

# hypothesis keeps what it learned about the code; nothing of it belongs into the checkout.
os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis")
)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The seed and the counts, where ``make fuzz`` runs."""
    from tests.fuzz.limits import INPUTS, SEED, counts

    if not INPUTS or not counts:
        return
    terminalreporter.section(f"inputs; again with FUZZ={INPUTS} FUZZ_SEED={SEED}")
    for reader, (inputs, accepted) in sorted(counts.items()):
        terminalreporter.write_line(f"{inputs:7,} {reader}; {accepted:,} accepted")
    terminalreporter.write_line(f"{sum(n for n, _ in counts.values()):7,} in all")


@pytest.fixture(autouse=True)
def _hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
