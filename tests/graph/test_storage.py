"""Graphs as JSON: they come back equal, and damaged or hostile text is refused in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.graph import PruningGraph, Refusal
from tests.support.graphs import groups_of, stacks_of
from tests.support.models import build


def graph_of(family: str) -> PruningGraph:
    model = build(family)
    refused = (Refusal("embeddings.weight", "", 64, 1536, "its rows are the vocabulary"),)
    total = sum(p.numel() for p in model.parameters())
    return PruningGraph(
        tuple(groups_of(model)),
        () if family == "albert" else tuple(stacks_of(model)),
        refused,
        ("einsum in 'encoder'",),
        parameters=total,
        reachable=total // 2,
    )


@pytest.mark.parametrize("family", ["bert", "mpnet", "albert", "deberta-v2"])
def test_a_graph_comes_back_equal(family: str, tmp_path) -> None:
    graph = graph_of(family)
    assert graph.groups
    assert graph.stacks or family == "albert"
    assert PruningGraph.from_json(graph.to_json()) == graph
    graph.save(tmp_path / "new" / "graph.json")
    assert PruningGraph.load(tmp_path / "new" / "graph.json") == graph


def test_a_missing_or_damaged_file_is_named(tmp_path) -> None:
    with pytest.raises(PruningError, match=r"cannot be read.*nothing.json"):
        PruningGraph.load(tmp_path / "nothing.json")
    (tmp_path / "half.json").write_text(graph_of("bert").to_json()[:100])
    with pytest.raises(PruningError, match="not valid JSON"):
        PruningGraph.load(tmp_path / "half.json")


def group(body: dict) -> dict:
    return body["groups"][0]


CHANGES = {
    "a size of another layout": lambda b: group(b).update(size=5),
    "a factor of zero": lambda b: group(b)["tensors"][0].update(layout=[[group(b)["name"], 0]]),
    "an unknown name": lambda b: group(b)["tensors"][0].update(layout=[["other"]]),
    "no name": lambda b: group(b).pop("name"),
    "an entry of no field": lambda b: group(b).update(hook="os.system"),
    "a huge size": lambda b: group(b).update(size=2**40),
    "a flag that is text": lambda b: group(b).update(may_be_empty="yes"),
    "a dimension outside": lambda b: group(b)["tensors"][0].update(dim=7),
    "a layout that is a number": lambda b: group(b)["tensors"][0].update(layout=3),
    "a mapping of groups": lambda b: b.update(groups={}),
    "the same group twice": lambda b: b["groups"].append(group(b)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_text_that_is_no_graph_is_refused(change: str) -> None:
    body = json.loads(graph_of("bert").to_json())
    CHANGES[change](body)
    with pytest.raises(PruningError):
        PruningGraph.from_json(json.dumps(body))


def test_the_table_names_every_group_and_every_reason() -> None:
    graph = graph_of("bert")
    text = str(graph)
    for kind in {g.kind for g in graph.groups}:
        assert any(kind in line and line.endswith("yes") for line in text.splitlines())
    assert "bert.encoder.layer.{0,1}.ffn" in text
    assert "its rows are the vocabulary" in text
    assert "einsum in 'encoder'" in text
    assert "50.0%" in text


def test_a_graph_of_nothing_has_a_table_too() -> None:
    assert str(PruningGraph()).split() == ["group", "kind", "units", "parameters", "verified"]


def test_joined_graphs_keep_what_was_refused() -> None:
    graph = graph_of("bert")
    other = replace(graph, refused=(Refusal("head", "", 3, 3, "fixed"),))
    assert {r.name for r in graph.joined(other).refused} == {"embeddings.weight", "head"}
    assert {r.name for r in graph.prefixed("net").refused} == {"net.embeddings.weight"}
