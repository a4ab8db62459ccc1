"""No result moves: every case against its record in results.json (``python -m tests.golden``)."""

from __future__ import annotations

import pytest

from tests.golden.cases import CASES, DIGESTS, load, machine, record

MACHINE, RECORDS = load()
# Other vector instructions round otherwise, and training steps carry that on.
CLOSE = 1e-5 if machine() == MACHINE else 2e-3


def _slack(path):
    """Few examples are counted in an accuracy: on another processor some of them change sides."""
    return 0.05 if ".metrics[" in path and machine() != MACHINE else 1e-9


def compare(old, new, path):
    """Numbers nearly, everything else exactly."""
    if isinstance(old, dict):
        assert sorted(old) == sorted(new), path
        for key in old:
            if key not in DIGESTS or machine() == MACHINE:
                compare(old[key], new[key], f"{path}.{key}")
    elif isinstance(old, list):
        assert len(old) == len(new), path
        for place, (a, b) in enumerate(zip(old, new, strict=True)):
            compare(a, b, f"{path}[{place}]")
    elif isinstance(old, float):
        assert new == pytest.approx(old, rel=CLOSE, abs=_slack(path)), path
    else:
        assert type(new) is type(old), path
        assert new == old, path


def test_every_case_is_recorded():
    assert list(RECORDS) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_recorded(name):
    compare(RECORDS[name], record(name), name)
