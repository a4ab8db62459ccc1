"""Layers that criteria remove from a tiny decoder, in one shot and after some steps."""

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
from benchmarks.layer_choice import CONTROL, CRITERIA
from benchmarks.layer_pages import draw_layer_choice, lost, short
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
    monkeypatch.setattr(layer_choice, "DEPTHS", {"tiny": (4, 3, 2)})
    monkeypatch.setattr(layer_choice, "LOSS_BATCHES", {"tiny": 1})
    monkeypatch.setattr(layer_choice, "STEPS", {"tiny": 2})
    monkeypatch.setattr(layer_choice, "ROWS", {"tiny": 2})
    caches = layer_choice.examined, layer_choice.shortened, layer_choice.quality
    for cache in caches:
        cache.cache_clear()
    yield [*CASES["layer-choice"].jobs(models=["tiny"], folder=tmp_path)]
    for cache in caches:
        cache.cache_clear()


def test_every_criterion_has_records_as_it_is_compensated_and_after_steps(
    jobs, tmp_path: Path
) -> None:
    assert len(jobs) == 1 + 2 * 3 * len(CRITERIA)
    found = {}
    for job in jobs:
        (setting,), (figures,) = job.settings, job.run()
        assert json.loads(json.dumps(figures)) == figures
        assert setting.keys() >= {"task", "model", "layers", "criterion", "compensation", "steps"}
        assert len(figures["removed"]) == 4 - setting["layers"]
        assert math.isfinite(figures["perplexity"])
        Store("layer-choice", tmp_path).add(setting, job.seed, figures)
        about = tuple(setting.values())[2:6]
        found[about] = Record("c", setting, job.seed, figures, {}, {})
    control = found.pop((4, CONTROL, "none", 2))
    assert control["perplexity"] != control["dense_perplexity"]  # it was trained
    layers = {(n, c): found[n, c, "none", 0]["removed"] for n, c, *_ in found}
    for n, c in layers:
        compensated, after = found[n, c, "layerwise", 0], found[n, c, "layerwise", 2]
        assert compensated["removed"] == after["removed"] == layers[n, c]
        assert compensated["perplexity"] != after["perplexity"]
        assert compensated["dense_perplexity"] == after["dense_perplexity"]
    for n in (3, 2):  # the same layers, and the same training
        same = {tuple(layers[n, c]): found[n, c, "layerwise", 2]["perplexity"] for c in CRITERIA}
        for c in CRITERIA:
            assert found[n, c, "layerwise", 2]["perplexity"] == same[tuple(layers[n, c])]
    measured = found[3, "measured_loss", "none", 0]
    assert measured["losses_measured"] == 4
    assert measured["loss_tokens"] == 4 * 128
    assert found[2, "last", "none", 0]["removed"] == [2, 3]
    records = [control, *found.values()]
    lines = table(records)
    assert len(lines) == 2 + 1 + len(layers)
    assert len({line.count("|") for line in lines}) == 1
    panels = [axes for axes in draw_layer_choice(records).axes if axes.get_visible()]
    titles = [axes.get_title(loc="left") for axes in panels]
    assert titles[0].startswith("tiny: dense perplexity")
    assert titles[1] == f"tiny, 2 steps: dense perplexity {control['perplexity']:.1f}"
    assert [len(axes.lines) for axes in panels] == [2 * len(CRITERIA), len(CRITERIA)]
    drawn = {tuple(line.get_xdata()) for axes in panels for line in axes.lines}
    assert drawn == {(3, 2)}


def record(
    layers: int, accuracy: float, criterion: str = "cka", steps: int = 0, seed: int = 0
) -> Record:
    compensation = "layerwise" if steps and criterion != CONTROL else "none"
    setting = {"model": "m", "layers": layers, "criterion": criterion}
    setting |= {"compensation": compensation, "steps": steps}
    figures = {"accuracy": accuracy, "dense_accuracy": 0.9, "removed": [*range(12 - layers)]}
    return Record("c", setting, seed, figures, {}, {})


def test_training_is_that_of_the_fine_tuning_with_fewer_rows_of_each_batch(monkeypatch) -> None:
    class Loader:
        sampler = type("Sampler", (), {"set_epoch": lambda self, epoch: None})()

        def __iter__(self):
            return iter([{"input_ids": torch.arange(8).view(4, 2), "labels": torch.arange(4)}] * 3)

    class Data:
        def train_dataloader(self):
            return Loader()

    monkeypatch.setattr(layer_choice, "task_data", lambda task, seed: Data())
    monkeypatch.setitem(layer_choice.ROWS, "quick", 3)
    training = layer_choice.training("quick", 0, 5)
    assert [len(batch["labels"]) for batch in training.batches] == [3] * 5
    assert training.batches[0]["input_ids"].shape == (3, 2)


def test_the_figure_draws_accuracy_in_points_and_what_is_beyond_its_edge_on_it() -> None:
    axes = draw_layer_choice([record(11, 0.88), record(9, 0.2)]).axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([-2.0, axes.get_ylim()[0]])


def test_after_steps_the_figure_compares_with_the_control_of_the_same_seeds() -> None:
    records = [record(12, 0.94 + seed / 100, CONTROL, 5, seed) for seed in (0, 1)]
    records += [record(11, 0.92 + seed / 100, "cka", 5, seed) for seed in (0, 1)]
    axes = draw_layer_choice(records).axes[0]
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([-2.0])
    assert axes.get_title(loc="left") == "m, 5 steps: dense 94.5 %"


def test_the_table_has_means_over_seeds_best_first_and_the_control_without_a_criterion() -> None:
    records = [record(11, 0.92, seed=0), record(11, 0.90, seed=1), record(11, 0.93, "angle")]
    records += [record(12, 0.95, CONTROL, 5), record(11, 0.94, "cka", 5)]
    control, first, second = table(records)[2:]
    assert control == "| m | 12 |  | 1 | 90.00 |  |  | 95.00 (5) |  |  |"
    assert first == "| m | 11 | `angle` | 1 | 90.00 | 93.00 |  |  | 0 |  |"
    assert second == "| m | 11 | `cka` | 2 | 90.00 | 91.00 |  | 94.00 (5, 1 seed) | 0 |  |"


def test_cells_in_which_the_measured_loss_is_not_best_are_listed() -> None:
    names = ("measured_loss", "cka", "angle", "angular_run")
    records = [record(11, 0.9 + n / 100, name) for n, name in enumerate(names)]
    records += [record(10, 0.9 - n / 100, name) for n, name in enumerate(names)]
    records += [record(9, 0.9, "cka")]  # without rivals, so it is no cell
    lead, *_, last = lost(records)
    assert lead.startswith("Of 2 cells")
    assert "`measured_loss` in 1 of 2, `cka` in 2 of 2, `angular_run` in 1 of 2" in lead
    assert "`last` in 0 of 0" in lead
    assert last == "| m | 11 | as they are | `angular_run` | 93.00 | 90.00 | 91.00 |"


def test_costs_are_means_over_depths_that_all_rivals_have_with_the_best_in_bold() -> None:
    names = ("measured_loss", "cka", "angle", "angular_run", "last")
    records = [record(11, 0.9 - n / 100, name) for n, name in enumerate(names)]
    records += [record(10, 0.8 - n / 100, name) for n, name in enumerate(names[:4])]
    records += [record(9, 0.1, "cka"), record(12, 0.95, CONTROL, 5)]
    records += [record(11, 0.94 - n / 100, name, 5) for n, name in enumerate(names)]
    one_shot, after = short(records)[2:]
    expected = "**-5.00** | -6.00 | -8.00 | -7.00 |  |  |"
    assert one_shot == f"| m | 11, 10 | as they are | {expected}"
    expected = "**-1.00** | -2.00 | -4.00 | -3.00 | -5.00 |  |"
    assert after == f"| m | 11 | 5 steps | {expected}"
