"""Layers that criteria remove from a tiny decoder, in one shot."""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import layer_choice
from benchmarks.cases import CASES
from benchmarks.layer_choice import CRITERIA
from benchmarks.layer_pages import draw_layer_choice
from benchmarks.layer_pages import layer_choice as table
from benchmarks.records import Record, Store


def tiny(name: str):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    return model.eval(), lambda text: {"input_ids": [ord(letter) % 32 for letter in text]}


def texts(part: str) -> list[str]:
    draw = random.Random(part)  # noqa: S311
    return ["".join(draw.choices("abcdefgh ", k=1300)) for _ in range(10)]


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[layer_choice.Job]]:
    monkeypatch.setattr(layer_choice, "loaded", tiny)
    monkeypatch.setattr(layer_choice, "brown", texts)
    monkeypatch.setattr(layer_choice, "DEPTHS", {"tiny": (3, 2)})
    monkeypatch.setattr(layer_choice, "LOSS_BATCHES", {"tiny": 1})
    caches = layer_choice.examined, layer_choice.quality
    for cache in caches:
        cache.cache_clear()
    yield [*CASES["layer-choice"].jobs(models=["tiny"], folder=tmp_path)]
    for cache in caches:
        cache.cache_clear()


def test_every_criterion_has_a_record_with_and_without_compensation(jobs, tmp_path: Path) -> None:
    assert len(jobs) == 2 * 2 * len(CRITERIA)
    found = {}
    for job in jobs:
        (setting,), (figures,) = job.settings, job.run()
        assert json.loads(json.dumps(figures)) == figures
        assert setting.keys() >= {"task", "model", "layers", "criterion", "compensation", "steps"}
        assert len(figures["removed"]) == 4 - setting["layers"]
        assert math.isfinite(figures["perplexity"])
        Store("layer-choice", tmp_path).add(setting, job.seed, figures)
        found[tuple(setting.values())[2:5]] = Record("c", setting, job.seed, figures, {}, {})
    layers = {(n, c): found[n, c, "none"]["removed"] for n, c, _ in found}
    assert all(found[n, c, "layerwise"]["removed"] == layers[n, c] for n, c in layers)
    measured = found[3, "measured_loss", "none"]
    assert measured["losses_measured"] == 4
    assert measured["loss_tokens"] == 4 * 128
    assert found[2, "last", "none"]["removed"] == [2, 3]
    lines = table([*found.values()])
    assert len(lines) == 2 + len(layers)
    assert len({line.count("|") for line in lines}) == 1
    (axes,) = (axes for axes in draw_layer_choice([*found.values()]).axes if axes.get_visible())
    assert axes.get_title(loc="left").startswith("tiny: dense perplexity")
    assert len(axes.lines) == 2 * len(CRITERIA)
    drawn = {tuple(line.get_xdata()) for line in axes.lines}
    assert drawn == {(3, 2)}


def test_the_figure_draws_accuracy_in_points_and_what_is_beyond_its_edge_on_it() -> None:
    def record(layers: int, accuracy: float) -> Record:
        setting = {"model": "m", "layers": layers, "criterion": "cka", "compensation": "none"}
        return Record("c", setting, 0, {"accuracy": accuracy, "dense_accuracy": 0.9}, {}, {})

    axes = draw_layer_choice([record(11, 0.88), record(9, 0.2)]).axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([-2.0, axes.get_ylim()[0]])
