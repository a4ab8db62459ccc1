"""Options and numbers mean one thing, and messages say what they matched and count."""

from __future__ import annotations

import logging
import re
import warnings

import lightning.pytorch as pl
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_mi_prune import (
    CKALayerPruning,
    MutualInformationPruning,
    PruningError,
    PruningWarning,
)
from lightning_mi_prune.allocation.constraints import resolve_bounds
from lightning_mi_prune.callbacks.monitors import MetricGuard
from lightning_mi_prune.cli.pruning import prune_module
from lightning_mi_prune.core.errors import counted, number, shortened
from lightning_mi_prune.core.options import Constraints
from lightning_mi_prune.graph.graph import choose_groups, modules_without_groups, summarize_groups
from lightning_mi_prune.graph.groups import DependencyGroup
from tests.support.boring import Classifier, trainer
from tests.support.graphs import graph_of, groups_of
from tests.support.models import build
from tests.support.pruning import made, pruning_layers, pruning_units
from tests.support.runs import Point, fit

BOTH = [MutualInformationPruning, CKALayerPruning]


class WithHead(Classifier):
    """A head of the user's own behind the network; its name is part of "heads"."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 3))

    def loss(self, batch):
        labels = batch["labels"]
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        return nn.functional.cross_entropy(self.head(self.model(**inputs).logits), labels)


def quiet(**options):
    return pruning_units(**{"multiple": 2, "verbose": False, **options})


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_module_that_an_expression_names_but_cannot_cut_is_mentioned(option):
    module = WithHead()
    groups = groups_of(module)
    others = modules_without_groups(module, groups)
    with pytest.warns(PruningWarning, match=rf"{option}='head' finds 2 groups.* module 'head'"):
        chosen = choose_groups(groups, modules=others, **{option: "head"})
    assert {group.kind for group in chosen} == {"heads" if option == "include" else "ffn"}
    with pytest.raises(PruningError, match=r"matches no group.*the module 'head\.0'"):
        choose_groups(groups, modules=others, **{option: r"head\.0"})


@pytest.mark.parametrize(
    "expression", ["heads", "heads$", r"layer\.0", "encoder", "layer", "0", "model", "ffn|nowhere"]
)
def test_expressions_that_find_what_they_name_are_not_remarked_upon(expression):
    module = WithHead()
    groups = groups_of(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_groups(
            groups, include=expression, modules=modules_without_groups(module, groups)
        )


def test_modules_that_belong_to_groups_are_not_without_them():
    model = build()
    others = modules_without_groups(model, groups_of(model))
    assert others == []  # the residual stream meets every matrix
    groups = [group for group in groups_of(model) if group.kind == "heads"]
    others = modules_without_groups(model, groups)
    assert "classifier" in others
    assert not any("attention" in path for path in others)


def test_what_will_be_cut_is_shown_as_fit_starts(caplog):
    caplog.set_level(logging.INFO)
    module = WithHead()  # the graph is of the network only
    prune = quiet(include="head", graph=graph_of(module))
    with pytest.warns(PruningWarning, match="No group belongs to the module 'head'"):
        trainer(prune, fast_dev_run=True, max_epochs=2).fit(module)
    said = [r.message for r in caplog.records if r.message.startswith("Pruning may cut")]
    where = "model.bert.encoder.layer.{0,1}.heads"
    assert said == [f"Pruning may cut 2 groups: 2 of kind 'heads' ({where})."]


def test_names_in_short_tell_of_every_name():
    kinds = {"ffn": range(12), "heads": (0, 2), "pooler": [None]}
    groups = [
        DependencyGroup("net.pooler" if i is None else f"net.{i}.{kind}", kind, 8, (), ("down",))
        for kind, numbers in kinds.items()
        for i in numbers
    ]
    assert summarize_groups(groups) == (
        "15 groups: 12 of kind 'ffn' (net.{0..11}.ffn), 2 of kind 'heads' (net.{0,2}.heads), "
        "1 of kind 'pooler' (net.pooler)"
    )
    two = [f"{side}.{i}.ffn" for side in "abcdef" for i in (0, 1)]
    assert shortened(two, most=2) == "a.{0,1}.ffn, b.{0,1}.ffn and 4 more"
    assert shortened(["a.0.b.1", "a.1.b.0"]) == "a.0.b.1, a.1.b.0"
    assert shortened(["v2.x", "v3.x"]) == "v2.x, v3.x"  # a digit in a name is no number


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2090950, "2,090,950"),
        (2_090_950.4, "2,090,950"),
        (0, "0"),
        (1.75, "1.75"),
        (0.000123456, "0.0001235"),
        (999.96, "1000"),
        (-1234567.0, "-1,234,567"),
    ],
)
def test_numbers_are_written_as_people_do(value, text):
    assert number(value) == text
    assert counted(value, "unit") == f"{text} units"


def test_one_is_singular_and_nothing_else():
    assert [counted(n, "group", "groups") for n in (0, 1, 1.0, 1.5, 2)] == [
        "0 groups", "1 group", "1 group", "1.5 groups", "2 groups",
    ]  # fmt: skip


def test_no_message_is_in_powers_of_ten_or_counts_one_as_many():
    groups = [DependencyGroup("a", "heads", 4, (), ("down",))]
    for constraints in ({"pins": {"a": 1}, "floors": {"a": 2}}, {"caps": {"a": 0.1}}):
        with pytest.raises(PruningError) as refused:
            resolve_bounds(Constraints(**constraints), groups)
        assert not re.search(r"\b1 \w+s\b|e\+\d", str(refused.value)), refused.value
    with pytest.raises(MisconfigurationException, match=r"lasts 1 epoch; "):
        trainer(quiet(), max_epochs=1).fit(Classifier())
    with pytest.raises(PruningError, match=r"as built: \d{2},\d{3}\)\."):
        trainer(quiet(target_parameters=100)).fit(Classifier())


@pytest.mark.parametrize("callback", BOTH)
@pytest.mark.parametrize("mode", ["max", "min"])
def test_max_drop_is_in_the_units_of_the_metric(callback, mode):
    """A drop of 2 from a best value of 50 costs 2, whichever callback watches it."""
    budget = made(callback, max_drop=1.5, monitor="m", mode=mode).engine.guard
    assert budget == MetricGuard(1.5, "m", mode)
    worse = -1 if mode == "max" else 1
    for best in (50.0, 0.0, -50.0):
        assert budget.exceeded(best + 2 * worse, best)
        assert not budget.exceeded(best + 1 * worse, best)
        assert not budget.exceeded(best - 9 * worse, best)


@pytest.mark.parametrize("callback", BOTH)
@pytest.mark.parametrize("option", ["first_epoch", "last_epoch"])
def test_epochs_are_those_of_the_trainer(callback, option):
    with pytest.raises(
        PruningError, match=rf"{option}=0; expected .*at least 1: epochs count from 0"
    ):
        made(callback, **{option: 0})


@pytest.mark.parametrize("first", [1, 2])
def test_the_first_cut_is_made_as_that_epoch_of_the_trainer_starts(first):
    class Sizes(pl.Callback):
        seen: dict[int, int]

        def on_train_batch_start(self, trainer, module, batch, index):
            self.seen[trainer.current_epoch] = sum(p.numel() for p in module.parameters())

    sizes, prune = Sizes(), quiet(first_epoch=first, last_epoch=first)
    sizes.seen = {}
    trainer(prune, sizes).fit(Classifier())
    assert [cut.epoch for cut in prune.report.cuts] == [first]
    smaller = [epoch for epoch, size in sizes.seen.items() if size < sizes.seen[0]]
    assert smaller == list(range(first, 4))


@pytest.mark.parametrize("made", [*BOTH, prune_module], ids=lambda made: made.__name__)
def test_help_is_plain_text(made):
    parser = ArgumentParser(exit_on_error=False)
    if isinstance(made, type):
        parser.add_class_arguments(made, "of", fail_untyped=False)
    else:
        parser.add_function_arguments(made, "of", skip={"module", "data", "trainer"})
    assert "--of." in (text := parser.format_help())
    assert not re.search(r":[a-z]+:`", text)


def logged(folder):
    """Rows of a CSV file by epoch, numbers as numbers."""
    header, *rows = (folder / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    found = {}
    for row in rows:
        named = dict(zip(header.split(","), row.split(","), strict=True))
        numbers = {k: float(v) for k, v in named.items() if v and k.startswith("prune/")}
        found.setdefault(int(named["epoch"]), {}).update(numbers)
    return found


@pytest.mark.parametrize("widths", ["global", "uniform"])
def test_every_curve_begins_before_the_first_cut_and_information_never_rises(tmp_path, widths):
    logger = CSVLogger(tmp_path)
    prune = quiet(sparsity=0.7, cuts=3, ramp="linear", widths=widths)
    module = Classifier()
    size = sum(p.numel() for p in module.parameters())
    trainer(prune, max_epochs=6, logger=logger).fit(module)
    rows = logged(tmp_path)
    spent = [row.pop("prune/seconds") for row in rows.values()]
    assert spent == sorted(spent)
    cuts = {cut.epoch: cut for cut in prune.report.cuts}
    assert sorted(cuts) == [1, 2, 3]
    assert all(row.keys() == rows[0].keys() for row in rows.values())
    full = {f"prune/width/{group.name}": group.size for group in prune.engine.strategy.chosen}
    assert rows[0] == {
        "prune/parameters": size,
        "prune/sparsity": 0,
        "prune/information_kept": 1,
        "prune/macs": prune.report.macs,
        **full,
    }
    kept = [row["prune/information_kept"] for row in rows.values()]
    assert kept == sorted(kept, reverse=True)
    assert 0 < kept[3] < kept[2] < kept[1] < 1
    for epoch, cut in cuts.items():
        row = rows[epoch]
        assert row["prune/information_kept"] == pytest.approx(cut.information_kept)
        assert row["prune/sparsity"] == pytest.approx(cut.sparsity)
        assert (row["prune/macs"], row["prune/parameters"]) == (cut.macs, cut.parameters)
        assert {a.name: row[f"prune/width/{a.name}"] for a in cut.groups} == {
            a.name: a.after for a in cut.groups
        }


def test_information_that_is_kept_is_what_the_budget_of_that_name_counts():
    prune = quiet(keep_information=0.6, cuts=2)
    trainer(prune, max_epochs=5).fit(Classifier())
    assert [cut.epoch for cut in prune.report.cuts] == [1, 2]
    assert 0.6 <= prune.report.cuts[-1].information_kept < 0.7


def test_all_groups_count_where_only_some_are_cut():
    """A group that loses nothing still has its information: the share is one of all groups."""
    module, prune = Classifier(), quiet(sparsity=0.4, cuts=1, widths="uniform", pins={"heads": 4})
    trainer(prune, max_epochs=3).fit(module)
    (cut,) = prune.report.cuts
    whole = {a.name: a.before == a.after for a in cut.groups}
    assert any(whole.values())
    assert set(prune.plan.rankings) == set(whole)
    lost = sum(r.lost(prune.plan.width(n))[1] for n, r in prune.plan.rankings.items())
    total = sum(r.lost(0)[1] for r in prune.plan.rankings.values())
    assert cut.information_kept == pytest.approx(1 - lost / total)


def test_information_that_is_kept_survives_a_stop_between_two_cuts(tmp_path):
    def kept(watch):
        return [cut.information_kept for cut in watch.pruning.report.cuts]

    _, _, straight = fit(tmp_path, points={"between": Point("on_train_epoch_end", 1)})
    _, _, resumed = fit(tmp_path, resume=tmp_path / "0.ckpt")
    assert kept(resumed) == kept(straight)
    assert kept(straight)[1] < kept(straight)[0] < 1


class Scored(Classifier):
    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        size = sum(p.numel() for p in self.parameters())
        self.log("size", torch.tensor(float(size)), batch_size=1)


def test_a_cut_that_was_taken_back_leaves_the_curves_as_before(tmp_path):
    logger = CSVLogger(tmp_path)
    prune = quiet(sparsity=0.5, cuts=1, max_drop=1.0, monitor="size", on_drop="stop", first_epoch=1)
    trainer(prune, max_epochs=5, logger=logger).fit(Scored())
    assert prune.report.cuts == []
    assert len(prune.report.undone) == 1
    rows = logged(tmp_path)
    spent = [row.pop("prune/seconds") for row in rows.values()]
    assert spent == sorted(spent)  # what was undone took its time
    assert rows[4] == rows[0]
    assert rows[1] != rows[0]
    assert rows[1]["prune/information_kept"] == pytest.approx(
        prune.report.undone[0].information_kept
    )


def test_depth_and_width_have_curves_from_the_first_epoch_on(tmp_path):
    logger = CSVLogger(tmp_path)
    depth = pruning_layers(None, target_layers=1, verbose=False, method="none")
    prune = quiet(sparsity=0.7, relevance=None)
    trainer(prune, depth, max_epochs=8, logger=logger).fit(Classifier())
    rows = logged(tmp_path)
    assert all(row.keys() == rows[7].keys() for row in rows.values() if "prune/macs" in row)
    assert rows[0]["prune/depth/model.bert.encoder.layer"] == 2
    assert rows[7]["prune/depth/model.bert.encoder.layer"] == 1
    assert rows[0]["prune/information_kept"] == 1
    assert rows[0]["prune/sparsity"] == 0
    first = min(cut.epoch for cut in prune.report.cuts)
    assert "prune/macs" in rows[first - 1]
    gone = [row["prune/sparsity"] for row in rows.values()]
    assert gone == sorted(gone)
