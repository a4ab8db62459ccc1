"""Every way to serve a model gives its outputs; never a time itself."""

from pathlib import Path

import pytest

from benchmarks import deploy
from benchmarks.cases import CASES, missing_jobs
from benchmarks.pages import table_lines
from benchmarks.records import Store

pytest.importorskip("onnxruntime")


def test_every_way_to_serve_a_model_is_measured_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "BACKEND", "eager")  # a compiler takes minutes
    (job,) = missing_jobs(CASES["deploy"], {}, tmp_path, quick=True)
    (figures,) = job.run()
    assert figures["parameters"]["pruned"] < figures["parameters"]["dense"]
    for name in ("dense", "pruned"):
        assert list(figures[name]) == list(deploy.WAYS)
        for way, found in figures[name].items():
            # Rounding to int8 moves logits by a hundredth or so, all else by nothing to speak of.
            assert found["difference"] <= (0.1 if "int8" in way else 1e-4), way
            for ms in (found["ms_b1"], found["ms_b32"]):
                assert 0 < ms["min"] <= ms["median"] <= ms["max"]
    for way in deploy.WAYS:
        assert figures["pruned"][way]["mb"] < figures["dense"][way]["mb"]
    for rounded, plain in (("int8", "eager"), ("onnx-int8", "onnx")):
        assert figures["dense"][rounded]["mb"] < figures["dense"][plain]["mb"]
    Store("deploy", tmp_path).add(job.settings[0], 0, figures)
    lines = table_lines("deploy", tmp_path)
    assert lines[0] == "tiny, 75% of the prunable parameters removed, 32 tokens."
    assert [line.split(" | ")[0] for line in lines[4:9]] == [f"| {w}" for w in deploy.WAYS.values()]
    assert lines[-1].endswith(f"ONNX Runtime {figures['onnxruntime']}.")
