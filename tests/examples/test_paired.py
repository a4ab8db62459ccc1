"""What records say together: means over seeds and tasks, with intervals."""

import math

import pytest

from examples.benchmark import paired, summarize


def test_summed_records_take_numbers_of_a_shape_together() -> None:
    record = dict.fromkeys(summarize.FIELDS, 1) | {"task": "a", "kept": {"ffn": [2]}}
    old = {name: record[name] for name in summarize.FIELDS if name not in summarize.ONE_SHOT}
    shape = dict.fromkeys(summarize.FROM_SHAPES, 7)
    paid = {"evidence_cpu_seconds": 0.0}  # a method of nobody's
    assert summarize.merged([[old], [old | {"accuracy": 2}]], {}, {}) == [
        {name: record[name] for name in summarize.FIELDS}
        | summarize.ONE_SHOT
        | {"accuracy": 2}
        | paid
    ]
    summed = summarize.summarized(record, shape)
    assert {summed[name] for name in summarize.FROM_SHAPES} == {7}


def test_intervals_are_paired_by_seed() -> None:
    pytest.importorskip("scipy")
    mean, half = paired.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-5))
    assert paired.cell({0: -3.0, 1: -3.5, 5: -9.0}, {0: -1.0, 1: -1.5, 2: 0.0}).endswith(
        "▲+2.00 ± 0.00"
    )
    assert math.isnan(paired.interval([1.0])[1])
    records = [
        {"task": task, "seed": seed, "accuracy": 0.8, "dense_accuracy": dense}
        for task, seed, dense in (("a", 0, 0.9), ("b", 0, 0.8), ("a", 1, 0.8))
    ]
    assert paired.by_seed(records, ["a", "b"]) == {0: pytest.approx(-5.0)}
