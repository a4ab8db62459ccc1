"""Variants and settings of this package on a tiny random model."""

import copy
import json
from dataclasses import fields

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import ablations
from benchmarks.ablations import calibrated, measured
from benchmarks.methods import DEFAULT, DESCRIBED, OURS, SETTINGS, VARIANTS, Setting
from benchmarks.subjects import (
    Subject,
    calibrate_gradients,
    calibrated_for,
    cut,
    examine,
    quality_of,
    size_of,
)
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.gradients import relevance_of
from lightning_mi_prune.checkpoint.plain import why_not_plain
from lightning_mi_prune.core.options import Importance
from lightning_mi_prune.graph.groups import count_parameters, full_plan
from lightning_mi_prune.importance.criteria import criterion_of
from lightning_mi_prune.importance.ranking import rank_groups
from tests.benchmarks.tiny import labelled, opened, subject
from tests.support.models import build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
NAMED = {setting.name: setting for setting in SETTINGS}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "-".join(variant.name))
def test_every_variant_reaches_its_sparsity_and_leaves_the_dense_model(subject, variant) -> None:
    before = copy.deepcopy(subject.model.state_dict())
    model, plan = cut(subject.cutting(variant.units), variant.options(0.75, 0))
    dims = subject.of(("head_dim",)) if "head_dim" in variant.units else ()
    figures = quality_of(subject, model) | size_of(model, subject.chosen, dims)
    assert figures["reached"] >= 0.75
    assert figures["n_test"] == 64
    assert 0 <= figures["accuracy"] <= 1
    assert {kind: len(found) for kind, found in figures["kept"].items()} == dict.fromkeys(
        variant.units, 2
    )
    if variant.widths == "uniform":
        assert len(set(figures["kept"]["ffn"])) == 1
    assert figures["kept"]["ffn"] == [
        plan.width(a.name) for a in sorted(subject.of(["ffn"]), key=lambda a: a.level)
    ]
    assert json.loads(json.dumps(figures)) == figures
    for name, value in subject.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_widths_of_a_config_remove_as_many_parameters() -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    sizes |= {"vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 40}
    net = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).eval()
    known = examine(0, net, labelled(range(12)), labelled(range(12, 14)), calibrated=False)
    (variant,) = DESCRIBED
    chosen = calibrated_for(known, variant.units)
    prunable = count_parameters(known.chosen)
    model, plan = cut(chosen, variant.options(0.75 * prunable / count_parameters(chosen.chosen), 0))
    gone = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in model.parameters())
    assert gone >= 0.75 * prunable
    assert why_not_plain(model) is None
    assert plan.width("bert.hidden") == model.config.hidden_size < 32


def test_the_calibration_is_of_the_validation_split_alone() -> None:
    rows = labelled(range(12))
    first, second = (
        examine(0, build(), rows, labelled(range(n, n + 2))).calibration for n in (20, 30)
    )
    stored = [call for calls in first.ranks[0].values() for call in calls]
    assert sum(call.rows for call in stored) == 12 * 32
    for key, moments in first.moments.items():
        assert torch.equal(moments.statistics()[1], second.moments[key].statistics()[1])
        assert first.gradients[key].counts.tolist() == [12 * 32, 12, 0]
        assert first.gradients[key].taylor.any()


def test_our_criterion_is_the_default_of_the_package() -> None:
    default = criterion_of(Importance(), seed=0)
    assert vars(OURS.options(0.5, 0).criterion) == vars(default)
    assert vars(DEFAULT.options(0.5, 0).criterion) == vars(default)


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_gives_figures(setting: Setting) -> None:
    figures = measured("trec-6", 0, setting, 0.6)
    if setting.counted == "parameters":
        assert figures["reached"] >= 0.6 - 1e-9
    assert 0 < figures["macs"] < figures["dense_macs"]
    assert 0 <= figures["accuracy"] <= 1
    assert json.loads(json.dumps(figures)) == figures


def test_a_setting_changes_one_thing_but_for_the_few_that_explain_one() -> None:
    several = {setting.name: setting.changes for setting in SETTINGS}
    assert several.pop("default") == set()
    assert {name for name, changes in several.items() if len(changes) > 1} == {
        "top-k, compensation alone",
        "no relevance, uniform",
        "literal reading",
        "hidden size, same MACs",
    }
    assert len(NAMED) == len(SETTINGS)
    known = {field.name for field in fields(Setting)} - {"name"}
    assert set().union(*several.values()) == known  # nothing can be changed that nothing changes


@pytest.mark.usefixtures("opened")
def test_calibrations_are_shared_by_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    monkeypatch.setattr(
        ablations, "collect_activations", lambda *a, **b: passes.append(1) or CalibrationData()
    )
    monkeypatch.setattr(ablations, "calibrate_gradients", lambda *a, **b: passes.append(2) or {})
    for setting in SETTINGS:
        calibrated("trec-6", 0, setting)
    assert passes.count(1) == len({(s.positions, s.stored, s.also) for s in SETTINGS}) == 7
    assert (
        passes.count(2) == 4
    )  # default, 8 batches, with the hidden size, with dimensions of heads


@pytest.mark.usefixtures("opened")
def test_fewer_positions_are_used() -> None:
    few = calibrated("trec-6", 0, Setting("any", positions=512)).calibration
    less = calibrated("trec-6", 0, Setting("any", stored=512)).calibration
    assert {int(moments.count) for moments in few.moments.values()} <= set(range(480, 513))
    stored = [call.mask for calls in less.ranks[0].values() for call in calls]
    assert 0 < sum(mask.numel() for mask in stored) <= 1024


@pytest.mark.usefixtures("opened")
def test_with_gradients_top_down_and_bottom_up_are_one_order() -> None:
    """Every group is weighed against the dense model, whatever was kept above it."""
    subject = calibrated("trec-6", 0, DEFAULT)
    known = subject.calibration.moments, dict(subject.model.named_parameters())
    widths = {group.name: group.size // 4 for group in subject.chosen}

    def orders(relevance, **given) -> list[tuple[int, ...]]:
        plan = full_plan(subject.groups)
        found = rank_groups(subject.chosen, *known, plan, relevance=relevance, **given)
        return [found[group.name].order for group in subject.chosen]

    for relevance in (relevance_of(subject.calibration.gradients), None):
        assert orders(relevance, widths=widths) == orders(relevance)
    # The consumers that were kept above are others than all of them.
    assert orders("weights", widths=widths) != orders("weights")


@pytest.mark.usefixtures("opened")
def test_the_default_setting_is_our_variant() -> None:
    subject: Subject = calibrated("trec-6", 0, DEFAULT)
    (ours, plan), (mine, other) = (cut(subject, way.options(0.6, 0)) for way in (OURS, DEFAULT))
    assert plan.kept == other.kept
    for name, value in ours.state_dict().items():
        assert torch.equal(value, mine.state_dict()[name]), name


@pytest.mark.usefixtures("opened")
def test_where_macs_are_counted_as_many_stay_as_the_default_leaves() -> None:
    default = measured("trec-6", 0, DEFAULT, 0.6)
    for name in ("MACs", "hidden size, same MACs"):
        found = measured("trec-6", 0, NAMED[name], 0.6)
        assert 0.9 * default["macs"] < found["macs"] <= default["macs"]


def test_gradients_of_fewer_batches_are_spread(subject: Subject) -> None:
    found = calibrate_gradients(subject.model, subject.chosen, labelled(range(12)), steps=4)
    assert {tuple(sums.counts.tolist()) for sums in found.values()} == {(4 * 32, 4, 0)}
