"""What the page says of dimensions of heads."""

import pytest

from examples.benchmark.inside import TAYLOR, inside_lines, pace_lines
from examples.benchmark.summarize import INSIDE, MINE
from tests.examples.test_comparison import record, seeds


def test_the_way_with_dimensions_is_paired_with_the_one_without() -> None:
    pytest.importorskip("scipy")
    entropy = {"dense_cross_entropy": 0.25, "cross_entropy": 0.5}
    ours = seeds(MINE, -1.0, -2.0, **entropy)
    assert inside_lines(ours) == []
    inside = seeds(INSIDE, -0.5, -1.6, -9.0, **entropy | {"cross_entropy": 0.375})
    alone = [record(INSIDE, 0.5, task="tweets-3", sparsity=0.9, steps=100, **entropy)]
    lines = inside_lines([*ours, *inside, *alone, record(TAYLOR, -3.5, seed=1, **entropy)])
    assert lines[-3:] == [
        "| one shot | 75% | trec-6 | 3 | -3.70 | +0.45 ± 0.64 | +1.90 "
        "| -0.125 | ▲+0.125 ± 0.000 | +0.125 |",
        "| 100 steps | 90% | tweets-3 | 1 | +0.50 |  |  | -0.250 |  |  |",
        "",
    ]


def test_means_go_over_seeds_that_have_all_tasks() -> None:
    pytest.importorskip("scipy")
    entropy = {"dense_cross_entropy": 0.25, "cross_entropy": 0.5}
    inside = [
        *seeds(INSIDE, -1.0, -2.0, **entropy),
        *seeds(INSIDE, -2.0, -3.0, -9.0, task="tweets-3", **entropy),
    ]
    (row,) = (line for line in inside_lines(inside) if "**mean of 2 tasks**" in line)
    assert row.startswith("| one shot | 75% | **mean of 2 tasks** | 2 | -2.00 |")
    apart = [record(INSIDE, seed=s, task=t, **entropy) for t, s in (("trec-6", 0), ("trec-6", 1))]
    apart += [record(INSIDE, seed=s, task="tweets-3", **entropy) for s in (2, 3)]
    assert not any("mean of" in line for line in inside_lines(apart)[-4:])


def test_speed_is_compared_on_one_processor() -> None:
    wide, narrow = {"heads": [2], "ffn": [8]}, {"heads": [4], "ffn": [8], "dims": [3]}
    records = [record(kept=wide), record(kept=wide, seed=1), record(INSIDE, kept=narrow)]
    records += [record(INSIDE, kept=narrow, seed=1, steps=100)]  # one shot has the shape
    shapes = [
        record(kept=kept, latency_ms_b1=one, latency_ms_b32=many, machine={"cpu": "a"})
        for kept, one, many in ((wide, 1.0, 6.0), (narrow, 2.0, 8.0))
    ]
    (line, _) = pace_lines(records, shapes)
    assert "75% gone (1 pairs): 0.50 (0.50 .. 0.50) at batch 1, 0.75 (0.75 .. 0.75)" in line
    other = [shapes[0], shapes[1] | {"machine": {"cpu": "b"}}]
    assert pace_lines(records, other) == []
    assert pace_lines(records, []) == []
