"""Folders open in the shapes that their config lists; where anything differs, by the graph."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mi_prune import PruningError, PruningPlan, apply_plan, from_pretrained
from lightning_mi_prune.checkpoint import pretrained
from lightning_mi_prune.checkpoint.plain import parts_of, set_parts
from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_graph
from lightning_mi_prune.core.plan import GRAPH_FIELD, PARTS_FIELD
from lightning_mi_prune.export.saving import save_pretrained
from lightning_mi_prune.graph.groups import full_plan
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, PICTURES, batch, build, pictures, random_plan

FAMILIES = [*CONFIGS, *PICTURES]


def cut(family: str, *, empty: bool = False) -> nn.Module:
    """Some units gone; with ``empty``, all heads of a layer and all neurons of another."""
    model = build(family, "image" if family in PICTURES else "sequence")
    groups = groups_of(model)
    kept = {**full_plan(groups).kept, **random_plan(groups).kept}
    heads, ffn = ([g.name for g in groups if g.kind == kind] for kind in ("heads", "ffn"))
    if empty and len(heads) > 1:
        kept |= {heads[0]: (), ffn[-1]: ()}
    apply_plan(model, groups, PruningPlan(full_plan(groups).sizes, kept))
    return model.eval()


def numbers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        path: {n: v for n, v in vars(module).items() if isinstance(v, (int, float))}
        for path, module in model.named_modules()
    }


@pytest.fixture
def only_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that cannot be opened as recorded fails."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the graph was read")

    monkeypatch.setattr(pretrained, "_load", refuse)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("empty", [False, True])
def test_shapes_of_the_config_open_what_plan_and_graph_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, empty: bool
) -> None:
    model = cut(family, empty=empty)
    folder = save_pretrained(model, tmp_path / "small")
    by_graph = []
    for believed in (True, False):
        if not believed:
            monkeypatch.setattr(pretrained, "set_parts", lambda *_: False)
        by_graph.append(from_pretrained(type(model), folder).eval())
    quick, slow = by_graph
    assert str(quick) == str(slow)
    assert quick.config.to_dict() == slow.config.to_dict()
    assert numbers_of(quick) == numbers_of(slow)
    states = [found.state_dict() for found in (quick, slow)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
    inputs = (pictures if family in PICTURES else batch)(4)
    inputs.pop("labels", None)
    with torch.no_grad():
        outputs = [found(**inputs).logits for found in (model, quick, slow)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    for found in (quick, slow):  # pruning goes on from either
        graph = recorded_graph(found)
        assert graph is not None
        now = present_plan(found, graph.groups)
        group = next(g for g in graph.groups if g.kind == "ffn" and now.width(g.name) > 1)
        fewer = {**now.kept, group.name: now.kept[group.name][:1]}
        apply_plan(found, graph.groups, PruningPlan(now.sizes, fewer), current=now)
    assert str(quick) == str(slow)


@pytest.mark.parametrize("family", ["bert", "albert", "vit"])
@pytest.mark.usefixtures("only_recorded")
def test_the_graph_is_not_read_where_all_is_as_saved(tmp_path: Path, family: str) -> None:
    model = cut(family)
    folder = save_pretrained(model, tmp_path / "small")
    again, found = from_pretrained(type(model), folder, output_loading_info=True)
    assert not any(found[name] for name in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    assert str(again) == str(model)


def test_another_number_of_labels_is_not_that_of_the_config(tmp_path: Path) -> None:
    """As for a folder without parts: the head is refused, or new on request."""
    model: Any = cut("bert")
    folder = save_pretrained(model, tmp_path / "small")
    more = model.config.num_labels + 2
    with pytest.raises(PruningError, match="has shape"):
        from_pretrained(type(model), folder, num_labels=more)
    new: Any = from_pretrained(type(model), folder, num_labels=more, ignore_mismatched_sizes=True)
    assert new.classifier.out_features == more
    assert new.classifier.weight.shape[0] == more


def edited(change: Callable[[dict[str, Any]], Any]) -> tuple[nn.Module, Any]:
    """A network as its class builds it, and a config with other parts than those of its cut."""
    model: Any = cut("bert")
    parts, config = parts_of(model), copy.deepcopy(model.config)
    change(parts)
    setattr(config, PARTS_FIELD, json.dumps(parts))
    return type(model)(config), config


def test_parts_that_are_whole_are_set() -> None:
    network, config = edited(lambda parts: None)
    assert set_parts(network, config)
    assert str(network) == str(cut("bert"))


def first(parts: dict[str, Any]) -> str:
    return next(name for name in parts["shapes"] if name.endswith("dense.weight"))


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "digest": lambda parts: parts.update(digest="0" * 64),
    "class": lambda parts: parts.update({"class": "BertModel"}),
    "larger": lambda parts: parts["shapes"][first(parts)].__setitem__(0, 10**9),
    "negative": lambda parts: parts["shapes"][first(parts)].__setitem__(0, -1),
    "built": lambda parts: parts["built"].update({first(parts): [1, 1]}),
    "built-list": lambda parts: parts.update(built=[]),
    "fraction": lambda parts: parts["shapes"][first(parts)].__setitem__(0, 1.5),
    "dimensions": lambda parts: parts["shapes"][first(parts)].append(1),
    "missing": lambda parts: parts["shapes"].pop(first(parts)),
    "unknown": lambda parts: parts["shapes"].update(other=[1]),
    "shapes": lambda parts: parts.update(shapes=[]),
    "no-numbers": lambda parts: parts.update(numbers=None),
    "private": lambda parts: parts["numbers"].append(["", ["__class__"], 1]),
    "method": lambda parts: parts["numbers"].append(["", ["forward"], 1]),
    "no-module": lambda parts: parts["numbers"].append(["nowhere", ["out_features"], 1]),
    "no-steps": lambda parts: parts["numbers"].append(["", [], 1]),
    "raised": lambda parts: parts["numbers"].append(["", ["num_labels"], 10**9]),
    "empty": lambda parts: parts.update(empty=["nowhere"]),
    "empty-list": lambda parts: parts.update(empty={}),
    "forward": lambda parts: parts["forwards"].append({"module": "bert"}),
    "config": lambda parts: parts.update(config={"hidden_size": 1}),
    "config-list": lambda parts: parts.update(config=[]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_parts_that_do_not_fit_are_not_believed(change: str) -> None:
    network, config = edited(CHANGES[change])
    before = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert not set_parts(network, config)
    after = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    assert all(new <= old for new, old in zip(after.values(), before.values(), strict=True))


@pytest.mark.parametrize("text", [None, 5, "", "[]", "{", "[" * 100_000, '{"digest": 1}'])
def test_text_that_holds_no_parts_is_not_believed(text: Any) -> None:
    network, config = edited(lambda parts: None)
    setattr(config, PARTS_FIELD, text)
    assert not set_parts(network, config)


@pytest.mark.parametrize("change", CHANGES)
def test_a_folder_with_other_parts_opens_by_plan_and_graph(tmp_path: Path, change: str) -> None:
    model: Any = cut("bert")
    folder = save_pretrained(model, tmp_path / "small")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    parts = json.loads(fields[PARTS_FIELD])
    CHANGES[change](parts)
    path.write_text(json.dumps(fields | {PARTS_FIELD: json.dumps(parts)}))
    again = from_pretrained(type(model), folder)
    assert str(again) == str(model)
    with torch.no_grad():
        inputs = {n: x for n, x in batch(4).items() if n != "labels"}
        assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


def test_another_graph_beside_the_parts_is_found(tmp_path: Path) -> None:
    model: Any = cut("bert")
    folder = save_pretrained(model, tmp_path / "small")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    graph = json.loads(fields[GRAPH_FIELD])
    graph["groups"][0]["size"] += 1
    path.write_text(json.dumps(fields | {GRAPH_FIELD: json.dumps(graph)}))
    with pytest.raises(PruningError):
        from_pretrained(type(model), folder)
