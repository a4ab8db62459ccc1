"""Shapes that are timed, layers that are removed in one shot; never a time itself."""

import copy
import json

import pytest
import torch

from benchmarks import latency, layers
from benchmarks.latency import shaped
from benchmarks.subjects import size_of
from lightning_mi_prune.graph.graph import choose_groups
from tests.benchmarks.tiny import opened, subject
from tests.support.graphs import groups_of
from tests.support.models import batch, build, outputs

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
FAST = {"seconds": 0.01, "rounds": 1}


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_shapes_are_built_anew(family: str) -> None:
    model = build(family)
    kept = {"heads": [3, 1], "ffn": [8, 2]}
    again = shaped(copy.deepcopy(model.config), kept)
    assert size_of(again, choose_groups(groups_of(model)))["kept"] == kept
    assert outputs(again, batch()).isfinite().all()


def test_shapes_with_fewer_layers_or_narrower_heads_are_built_anew() -> None:
    model = build()
    short = shaped(copy.deepcopy(model.config), {"heads": [4], "ffn": [40]})
    assert len(short.bert.encoder.layer) == 1
    kept = {"heads": [3, 1], "ffn": [8, 2], "head_dim": [3, 2]}
    again, groups = shaped(copy.deepcopy(model.config), kept), groups_of(model)
    dims = choose_groups(groups, kinds=("head_dim",))
    assert size_of(again, choose_groups(groups), dims)["kept"] == kept


def test_a_shape_is_timed_beside_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build().config
    monkeypatch.setattr(latency, "facts", lambda task: (3, 12))
    monkeypatch.setattr(latency, "config_of", lambda task, classes: copy.deepcopy(config))
    kept = {"heads": [3, 1], "ffn": [8, 2]}
    figures = latency.measured("trec-6", kept, *FAST.values())
    assert figures["length"] == 12
    assert figures["macs"] < figures["dense_macs"]
    assert all(figures[f"{name}ms_b{rows}"] > 0 for name in ("", "dense_") for rows in (1, 32))
    longer = latency.measured("trec-6", kept, *FAST.values(), length=24)
    assert longer["length"] == 24
    assert longer["dense_macs"] > figures["dense_macs"]


@pytest.mark.usefixtures("opened")
def test_layers_are_removed_with_and_without_a_reconstruction(subject) -> None:
    before = copy.deepcopy(subject.model.state_dict())
    found = [layers.shortened("trec-6", 0, 1, reconstruction) for reconstruction in (False, True)]
    for figures in found:
        assert len(figures["removed"]) == 1
        assert figures["n_test"] == 64
        assert json.loads(json.dumps(figures)) == figures
    assert found[0]["removed"] == found[1]["removed"]
    assert found[0]["cross_entropy"] != found[1]["cross_entropy"]
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name]), name
