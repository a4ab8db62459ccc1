"""The zoo's own check finds wrong groups; its children end; its shares and tables."""

import os
import random
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.pages import TABLES
from benchmarks.records import Record
from benchmarks.zoo import tables
from benchmarks.zoo.checking import check_groups, halved, places
from benchmarks.zoo.measuring import all_models, covered, in_child, prunable, time_limit
from benchmarks.zoo.models import Inputs, randomized, tokens
from benchmarks.zoo.operators import nms
from lightning_mi_prune.graph.groups import DependencyGroup, PrunableDim, SizeAttribute
from lightning_mi_prune.graph.layouts import kept_positions


class Heads(nn.Module):
    """Two heads of three dimensions; a normalised residual stream with a gated block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.values, self.gates, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        inner = self.norm(x)
        return self.last(x + self.out(self.values(inner) * self.gates(inner).sigmoid()))


def dims(layout, **places):
    """Dimensions of parameters of `Heads`: name of a layer to the dimensions of its weight."""
    shapes = {name: tuple(p.shape) for name, p in Heads().named_parameters()}
    found = []
    for layer, dim in places.items():
        found.append(PrunableDim(f"{layer}.weight", dim, shapes[f"{layer}.weight"], layout))
        if dim == 0 and f"{layer}.bias" in shapes:
            found.append(PrunableDim(f"{layer}.bias", 0, shapes[f"{layer}.bias"], layout))
    return tuple(found)


HEADS = DependencyGroup(
    "heads", "heads", 2, dims((("heads", 3),), values=0, gates=0, out=1), ("out",)
)
STREAM = (("hidden",),)
HIDDEN = DependencyGroup(
    "hidden",
    "hidden",
    8,
    dims(STREAM, first=0, norm=0)
    + tuple(replace(d, dim=1, shape=(6, 8)) for d in dims(STREAM, values=0)[:1])
    + tuple(replace(d, dim=1, shape=(6, 8)) for d in dims(STREAM, gates=0)[:1])
    + dims(STREAM, out=0, last=1),
    ("values", "gates", "last"),
    attributes=(SizeAttribute("norm", "normalized_shape", STREAM, sequence=True),),
)
INPUTS = Inputs((torch.randn(4, 5, generator=torch.Generator().manual_seed(0)),))


def verdicts(*groups: DependencyGroup) -> dict[str, str]:
    found = check_groups(randomized(Heads()), INPUTS, groups)
    assert all(outcome.effect > 1e-2 for outcome in found.values() if outcome.effect)
    return {name: outcome.verdict for name, outcome in found.items()}


def test_right_groups_are_exact_with_every_gradient() -> None:
    assert verdicts(HEADS) == {"heads": "exact"}
    every = verdicts(HEADS, HIDDEN)
    assert every.pop("heads") == every.pop("all but hidden") == "exact"
    assert every == dict.fromkeys(("hidden", "all"), "exact with restricted norms")
    found = check_groups(randomized(Heads()), INPUTS, [HEADS])
    assert found["heads"].gradients == len([*Heads().parameters()])


@pytest.mark.parametrize("what", ["other rows", "another order", "a bias less"])
def test_groups_that_run_but_are_wrong_are_found(what: str) -> None:
    """Sizes fit in all of them."""
    across = ((3, "heads"),)
    if what == "other rows":  # the gates of other units go
        changed = [replace(d, layout=across) if "gates" in d.tensor else d for d in HEADS.tensors]
        wrong = replace(HEADS, tensors=tuple(changed))
    elif what == "another order":  # the consumer reads the entries of a head from elsewhere
        changed = [replace(d, layout=across) if "out" in d.tensor else d for d in HEADS.tensors]
        wrong = replace(HEADS, tensors=tuple(changed))
    else:
        changed = [d for d in HEADS.tensors if d.tensor != "gates.bias"]
        wrong = replace(HEADS, tensors=tuple(changed))
    assert verdicts(wrong)["heads"] == "wrong"


def test_a_wrong_stream_is_not_excused_by_its_norm() -> None:
    turned = ((2, ("hidden",)),)
    halves = replace(
        HIDDEN, size=4, tensors=tuple(replace(d, layout=turned) for d in HIDDEN.tensors)
    )
    mixed = [
        replace(d, layout=(("hidden", 2),)) if d.tensor == "last.weight" else d
        for d in replace(halves, tensors=halves.tensors).tensors
    ]
    attribute = SizeAttribute("norm", "normalized_shape", ((2, "hidden"),), sequence=True)
    wrong = replace(halves, tensors=tuple(mixed), attributes=(attribute,))
    assert verdicts(wrong)["hidden"] == "wrong"


class Responses(nn.Module):
    """Channels divided by the mean of their responses, as in ConvNeXt V2."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        size = x.norm(p=2, dim=(2, 3), keepdim=True)
        return self.last(x * size / size.mean(dim=1, keepdim=True))


def test_a_mean_over_channels_is_one_over_those_that_stay() -> None:
    layout = (("channels",),)
    tensors = [("first.weight", 0, (6, 3, 1, 1)), ("first.bias", 0, (6,))]
    tensors += [("last.weight", 1, (2, 6, 1, 1))]
    dimensions = tuple(PrunableDim(*each, layout) for each in tensors)
    group = DependencyGroup("channels", "channels", 6, dimensions, ("last",))
    found = check_groups(randomized(Responses()), Inputs((torch.randn(2, 3, 4, 4),)), [group])
    assert found["channels"].verdict == "exact with restricted norms"
    assert found["channels"].gradients == 4


def test_positions_are_those_of_the_package() -> None:
    generator = random.Random(0)  # noqa: S311
    widths = {"a": 5, "b": 3}

    def layout(depth: int):
        def factor():
            kind = generator.randrange(4 if depth else 3)
            return ["a", "b", generator.randrange(1, 4), None][kind] or layout(depth - 1)

        return tuple(
            tuple(factor() for _ in range(generator.randrange(1, 4)))
            for _ in range(generator.randrange(1, 4))
        )

    for _ in range(50):
        one, kept = layout(2), {"a": (0, 2, 3), "b": (1,)}
        assert places(one, kept, widths) == kept_positions(one, kept, widths)


def test_what_is_prunable_and_covered() -> None:
    net = Heads()
    assert {*prunable(net)} == {f"{n}.weight" for n in ("first", "values", "gates", "out", "last")}
    assert covered(net, [HEADS]) == pytest.approx(3 * 48 / (5 * 8 + 3 * 48 + 8 * 3))
    assert covered(net, [HIDDEN]) == 1
    assert covered(net, [HIDDEN], ("ffn", "heads")) == 0
    cut = halved(net, [HEADS])
    assert cut.values.weight.shape == (3, 8)  # type: ignore[union-attr]
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            vocab_size=32,
            tie_word_embeddings=True,
        )
    )
    names = {*prunable(llama)}
    assert len(names) == 7
    assert not any("embed" in name or "head" in name for name in names)


def test_children_end_whatever_they_do() -> None:
    def works(send) -> None:
        send({"a": 1})
        send({"b": torch.ones(2).sum().item()})

    def raises(send) -> None:
        send({"a": 1})
        raise ValueError("no")

    def spins(send) -> None:
        send({"stage": "spinning"})
        with time_limit(0.2):
            while True:
                with suppress(Exception):  # as code that catches everything would
                    sum(range(1000))

    def dies(send) -> None:
        send({"a": 1})
        os._exit(3)

    def sleeps(send) -> None:
        send({"a": 1})
        time.sleep(600)

    def eats(send) -> None:
        torch.empty(1 << 36, dtype=torch.int64)

    assert in_child(works, 60) == {"a": 1, "b": 2.0}
    assert in_child(raises, 60)["error"] == "ValueError: no"
    assert in_child(spins, 60)["error"].startswith("TimeLimitError: over 0.2 s")
    assert in_child(dies, 60) == {"a": 1, "error": "the process ended with 3"}
    assert in_child(sleeps, 0.2) == {"a": 1, "error": "killed after 1 s"}
    assert "error" in in_child(eats, 60)


def test_every_model_has_a_name_of_its_own() -> None:
    models = [model for model in all_models() if model.library in ("torch", "transformers")]
    assert len({model.name for model in models}) == len(models)
    assert len([model for model in models if model.library == "transformers"]) > 120


def test_random_weights_let_every_unit_matter() -> None:
    config = LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    one, other = (randomized(LlamaForCausalLM(config)) for _ in range(2))
    ids = tokens(5, 50)
    assert torch.equal(one(ids).logits, other(ids).logits)
    assert all(p.abs().max() > 1e-2 for p in one.parameters())


def record(name: str, **figures: Any) -> Record:
    given = {"note": "", "stage": "done", "parameters": 10**6, "groups": {"ffn": 2}, "seconds": 1.0}
    given |= {"covered": 0.95, "covered_without_hidden": 0.8, "refused": {}, "unknown": []}
    given |= {"rival": {"step": "done", "removed": 0.5, "seconds": 2.0}, "removed": 0.6}
    given |= {"verdicts": {"ffn": "exact"}, "wrong": {}, "refusals": []}
    setting = {"model": name, "library": "transformers"}
    return Record("zoo", setting, 0, given | figures, {"cpu": "A", "threads": 1}, {"torch": "2"})


def test_tables_count_what_falls_short() -> None:
    late = {"step": "build", "error": "TimeLimitError: over 30 s of processor time"}
    records = [
        record("good"),
        record("half", covered=0.5, refusals=["net.heads (heads, 4): roll in net"], rival=late),
        record("bad", wrong={"heads": "cut and masked model differ by 1e-1"}),
        record("slow", groups=None, covered=None, seconds=None, error=late["error"]),
    ]
    (*_, total) = tables.summary(records)
    cells = [cell.strip() for cell in total.strip("|").split("|")]
    assert cells == ["**all**", "4", "3", "2 (50%)", "1", "1", "1.0 / 1.0", "3 (75%)", "1"]
    short = "\n".join(tables.shortfalls(records))
    assert "good" not in short
    assert short.index("slow") < short.index("half") < short.index("bad")
    assert "roll in net" in short
    whole = "\n".join(tables.every_model(records))
    assert "**wrong**: heads" in whole
    assert "over the limit" in whole
    assert tables.shortfalls([record("good")]) == ["None."]
    assert {"zoo", "zoo-shortfalls", "zoo-summary"} <= TABLES.keys()


def test_boxes_that_overlap_a_better_one_go() -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [5, 5, 6, 6]])
    assert nms(boxes, torch.tensor([0.1, 0.2, 0.3]), 0.5).tolist() == [2, 1]
    assert nms(boxes[:0], torch.empty(0), 0.5).tolist() == []
