"""A cut that costs too much is taken back, also over ranks and crashes."""

from __future__ import annotations

import math
import os

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mi_prune.callbacks.monitors import MetricGuard
from lightning_mi_prune.callbacks.schedule import CutSchedule, decision_epoch, fit_schedule
from lightning_mi_prune.core.errors import PruningError
from tests.support.pruning import pruning_units
from tests.support.ranks import launch
from tests.support.runs import Module, Point, fit, resumed_equals_straight, sha

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
BUDGET = {"max_drop": 0.1, "monitor": "score", "ramp": "linear", "cuts": 2, "first_epoch": 1}


class Scored(Module):
    """Its score is the share of the encoder that is left: every cut hurts by as much as it cuts."""

    def score(self):
        config = self.model.config
        full = 2 * config.hidden_size * 40
        held = sum(
            layer.intermediate.dense.weight.numel() for layer in self.model.bert.encoder.layer
        )
        return held / full

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.log("score", torch.tensor(self.score(), dtype=torch.float64), batch_size=1)


class Painless(Scored):
    """Only cuts beyond a third hurt."""

    def score(self):
        return min(1.0, super().score() + 0.35)


class Watch(pl.Callback):
    """The model around every change of size."""

    def __init__(self):
        self.before, self.after, self.sizes = {}, {}, []

    def _state(self, trainer, module):
        names = {id(p): n for n, p in module.named_parameters()}
        state = {
            (names[id(p)], key): value.clone() if isinstance(value, torch.Tensor) else value
            for optimizer in trainer.optimizers
            for p, values in optimizer.state.items()
            for key, value in values.items()
        }
        weights = {n: v.clone() for n, v in module.state_dict().items()}
        return weights, state, trainer.callbacks[0].plan

    def on_train_epoch_end(self, trainer, pl_module):
        self.before[trainer.current_epoch + 1] = self._state(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        self.after[trainer.current_epoch] = self._state(trainer, pl_module)
        self.sizes.append(sum(p.numel() for p in pl_module.parameters()))
        held = [p for o in trainer.optimizers for g in o.param_groups for p in g["params"]]
        assert all(a is b for a, b in zip(held, pl_module.parameters(), strict=True))


def run(folder, module=Scored, budget=None, **options):
    watch = Watch()
    options = {"max_epochs": 8, **options}
    trainer, target, _ = fit(
        folder, module=module, pruning={**BUDGET, **(budget or {})}, callbacks=[watch], **options
    )
    return trainer, target, watch, trainer.callbacks[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum", "adafactor", "two-manual"])
def test_after_taking_back_everything_is_as_before_the_cut(tmp_path, optimizer):
    _, _, watch, prune = run(
        tmp_path, optimizer=optimizer, budget={"on_drop": "stop", "sparsity": 0.6}
    )
    (cut,) = prune.report.undone
    assert prune.report.cuts == []
    undone = next(e for e in range(cut.epoch + 1, 8) if watch.sizes[e] == watch.sizes[0])
    assert watch.sizes[cut.epoch] < watch.sizes[0]
    weights, state, plan = watch.after[undone]
    expected, held, before = watch.before[cut.epoch]
    assert plan == before
    assert plan.is_full
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[n], expected[n]) for n in expected)
    assert state.keys() == held.keys()
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in ((state[k], held[k]) for k in held)
    )
    assert len(set(watch.sizes[undone:])) == 1
    assert sha(*watch.before[8][0].values()) != sha(*weights.values())


def test_time_goes_on_for_the_learning_rate(tmp_path):
    rates = {}
    for name, budget in (("hurt", {"on_drop": "stop"}), ("free", {"max_drop": 9.0})):
        seen = rates.setdefault(name, [])

        class Rates(pl.Callback):
            def on_train_batch_end(self, trainer, *args, seen=seen):
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        fit(
            tmp_path, module=Scored, pruning={**BUDGET, **budget}, callbacks=[Rates()], max_epochs=8
        )
    assert rates["hurt"] == rates["free"]


def test_half_of_the_step_is_tried_until_one_is_small_enough(tmp_path):
    _, target, watch, prune = run(
        tmp_path, module=Painless, budget={"sparsity": 0.8, "cuts": 1}, max_epochs=10
    )
    tried = [cut.sparsity for cut in prune.report.undone]
    kept = [cut.sparsity for cut in prune.report.cuts]
    assert tried
    assert kept
    assert max(kept) < min(tried)
    assert target.score() >= 1 - BUDGET["max_drop"]
    assert watch.sizes[-1] < watch.sizes[0]
    assert prune.report.to_dict()["undone"][0]["sparsity"] == tried[0]


def test_small_losses_cannot_add_up(tmp_path):
    """Each cut costs less than the budget against its predecessor, two cost more than it."""
    budget = {"max_drop": 0.3, "sparsity": 0.5, "on_drop": "stop", "widths": "uniform"}
    _, target, _, prune = run(tmp_path, budget=budget)
    assert len(prune.report.cuts) == 1
    assert len(prune.report.undone) == 1
    assert target.score() >= 0.7


def test_a_metric_that_is_not_a_number_counts_as_lost(tmp_path):
    class Nan(Scored):
        def score(self):
            return super().score() if super().score() == 1 else math.nan

    _, _, _, prune = run(tmp_path, module=Nan, budget={"on_drop": "stop"})
    assert len(prune.report.undone) == 1


def test_the_last_cut_is_judged_while_there_is_an_epoch_left(tmp_path):
    budget = {"on_drop": "stop", "cuts": 1, "last_epoch": 2, "first_epoch": 2}
    trainer, target, watch, prune = run(tmp_path, budget=budget, max_epochs=4)
    assert [cut.epoch for cut in prune.report.undone] == [2]
    assert watch.sizes[2] < watch.sizes[0]
    assert watch.sizes[:2] == watch.sizes[:1] * 2
    assert watch.sizes[3] == watch.sizes[0]
    assert trainer.current_epoch == 4
    assert target.score() == 1


POINTS = {
    "cut pending": Point("on_validation_end", 0),
    "on trial": Point("on_train_batch_end", 1, 1),
    "judged": Point("on_validation_end", 1),
    "judged, epoch over": Point("on_train_epoch_end", 1),
    "taken back": Point("on_train_batch_end", 2, 1),
    "half of it on trial": Point("on_train_batch_end", 3, 0),
}
TRIAL = {**BUDGET, "cuts": 2, "sparsity": 0.6}


@pytest.mark.parametrize("on_drop", ["halve", "stop"])
def test_a_resumed_trial_ends_like_the_straight_one(tmp_path, on_drop):
    found = resumed_equals_straight(
        tmp_path, POINTS, module=Scored, pruning={**TRIAL, "on_drop": on_drop}, max_epochs=6
    )
    assert not any(found.values()), found


def over_ranks(folder):
    mine = folder / os.environ["WORLD_SIZE"]
    mine.mkdir(exist_ok=True)
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 6, "module": Scored}
    trainer, _, watch = fit(mine, pruning=TRIAL, **options)
    undone = [cut.epoch for cut in trainer.callbacks[0].report.undone]
    return resumed_equals_straight(mine, POINTS, pruning=TRIAL, **options), watch.digests, undone


def test_ranks_take_back_as_one_and_resume(tmp_path):
    first, second = launch(2, over_ranks, tmp_path).values()
    assert first == second
    assert not any(first[0].values()), first[0]
    assert first[2][0] == 1


def test_budget_values():
    more = MetricGuard(0.1, "acc")
    less = MetricGuard(0.1, "loss", "min")
    assert [more.exceeded(v, 0.9) for v in (0.95, 0.8, 0.79, math.nan)] == [0, 0, 1, 1]
    assert [less.exceeded(v, 0.9) for v in (0.5, 1.0, 1.01, math.inf)] == [0, 0, 1, 1]
    assert not more.exceeded(0.1, None)
    assert more.better(0.5, None) == 0.5
    assert more.better(0.5, 0.6) == less.better(0.7, 0.6) == 0.6
    assert more.better(math.nan, 0.6) == 0.6


def test_halved_schedules():
    schedule = CutSchedule((1, 2), (0.3, 0.6))
    assert schedule.halved(3, 0.0, 0.3, 8, 1) == CutSchedule((3, 4, 5, 6), (0.15, 0.3, 0.45, 0.6))
    assert schedule.halved(3, 0.3, 0.6, 3, 1) == CutSchedule((3,), (0.45,))
    assert schedule.halved(3, 0.3, 0.6, 2, 1) == CutSchedule()
    assert CutSchedule((2, 6), (0.2, 0.4)).halved(7, 0.2, 0.4, 30, 2).epochs == (8, 12)


@pytest.mark.parametrize(
    ("length", "every"), [(3, 1), (4, 1), (5.5, 1), (8, 1), (20, 1), (6, 2), (8, 2), (21, 3)]
)
def test_every_cut_of_a_fitted_schedule_is_judged_after_it_and_before_the_end(length, every):
    schedule = fit_schedule(length, 0.5, every=every, recovery=2)
    for cut, following in zip(schedule.epochs, [*schedule.epochs[1:], None], strict=True):
        judged = decision_epoch(cut, following, length, every)
        assert cut <= judged < (following or length - 1)
        assert (judged + 1) % every == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": -0.1, "monitor": "a"}, "max_drop=-0.1"),
        ({"max_drop": "1", "monitor": "a"}, "max_drop='1'"),
        ({"max_drop": math.nan, "monitor": "a"}, "max_drop=nan"),
        ({"max_drop": 0.1}, "max_drop=0.1 needs monitor"),
        ({"monitor": "a"}, "monitor='a' is compared for max_drop only"),
        ({"max_drop": 0.1, "monitor": 3}, "monitor=3; expected text or None"),
        ({"max_drop": 0.1, "monitor": "a", "mode": "up"}, "mode='up'"),
        ({"max_drop": 0.1, "monitor": "a", "on_drop": "undo"}, "on_drop='undo'"),
        ({"best_of": "all"}, "best_of='all'"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    with pytest.raises((MisconfigurationException, PruningError), match=message):
        pruning_units(**options)


@pytest.mark.parametrize(
    ("pruning", "options", "message"),
    [
        (
            {"monitor": "typo"},
            {},
            "monitor='typo', which Scored never logs.*'score', 'val_acc', 'val_loss'\\]",
        ),
        ({}, {"max_epochs": 2}, "lasts 2 epochs; expected at least 3"),
        ({"last_epoch": 3, "cuts": 1}, {"max_epochs": 4}, "last_epoch=3 leaves no epoch"),
        (
            {"first_epoch": 4, "last_epoch": 4, "cuts": 1},
            {"max_epochs": 6, "check_val_every_n_epoch": 2},
            "No validation comes after the last cut at epoch 4",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_runs_that_could_not_be_judged_are_refused(tmp_path, pruning, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, budget=pruning, **options)


def test_a_run_that_ends_on_trial_says_so(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = trainer.current_epoch == 1

    budget = {**BUDGET, "cuts": 1, "last_epoch": 1}
    with pytest.warns(UserWarning, match="before the cut of epoch 1 could be accepted"):
        fit(tmp_path, module=Scored, pruning=budget, callbacks=[Stop()], max_epochs=6)
