"""Layers removed by the loss without them: the user's own loss, which leaves nothing behind."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_mi_prune.callbacks.layers import LayerStrategy
from lightning_mi_prune.callbacks.losses import BatchCollection
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Similarity
from lightning_mi_prune.reporting.report import PruningReport
from tests.support.boring import trainer
from tests.support.models import batch
from tests.support.pruning import pruning_layers
from tests.support.ranks import launch
from tests.support.runs import Point, fit, resumed_equals_straight, sha
from tests.support.stacks import Deep, Scored

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
MEASURED = {"threshold": None, "criterion": "measured_loss", "target_layers": 4}
GATE = {"max_drop": 0.01, "monitor": "score", "first_epoch": 1}


def test_the_layers_that_are_missed_least_go_and_the_losses_are_reported(tmp_path):
    _, module, watch = fit(tmp_path, layers={**MEASURED, "method": "none"}, module=Deep)
    (stack,) = watch.pruning.report.cuts[0].stacks
    losses = stack.losses
    assert (stack.criterion, stack.removed) == ("measured_loss", losses.removed)
    assert len(losses.single) == len(stack.before) == 6
    for copied in (2, 3):  # they hand on what they receive
        assert losses.single[copied] == pytest.approx(losses.whole, abs=0.01)
    assert losses.after <= losses.whole + 0.02  # of an untrained model, others may do harm
    assert len(module.model.bert.encoder.layer) == 4
    assert PruningReport.from_state(watch.pruning.report.state_dict()) == watch.pruning.report


class State(pl.Callback):
    """Everything of a module, of its metrics and of the process as a validation ends."""

    def __init__(self):
        self.found = []

    def on_validation_end(self, trainer, pl_module):
        gradients = {id(p): None if p.grad is None else sha(p.grad) for p in pl_module.parameters()}
        layers = pl_module.model.bert.encoder.layer
        self.found.append(
            {
                "weights": sha(*pl_module.state_dict().values()),
                "parameters": [id(p) for p in pl_module.parameters()],
                "modes": [part.training for part in pl_module.modules()],
                "hooks": [len(layer._forward_hooks) for layer in layers],
                "gradients": gradients,
                "kept": list(pl_module.seen),
                "logged": {name: float(x) for name, x in trainer.callback_metrics.items()},
                "random": (sha(torch.get_rng_state()), random.getstate()),
                "attributes": sorted(vars(pl_module)),
            }
        )


class Noisy(Deep):
    """A step that keeps what it computes, logs it, and draws numbers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[float] = []

    def training_step(self, batch, index):
        loss = super().training_step(batch, index) + 0 * torch.rand(()) * random.random()  # noqa: S311
        self.seen.append(float(loss.detach()))
        self.log("seen", loss.detach())
        batch.pop("labels")
        return {"loss": loss}


def test_measuring_leaves_the_module_and_the_process_as_they_were():
    before, after, module = State(), State(), Noisy()
    pruning = pruning_layers(**MEASURED, verbose=False, first_epoch=1)
    run = trainer(before, pruning, after, max_epochs=2, num_sanity_val_steps=0)
    run.fit(module)
    assert len(pruning.report.cuts) == 1
    one, other = before.found[0], after.found[0]
    assert [name for name in one if one[name] != other[name] and name != "hooks"] == []
    assert sum(other["hooks"]) == 0  # those of the recorder are gone too
    assert len(module.seen) == 8  # four batches an epoch, and none of those that were measured


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"module": Scored, "layers": {**GATE, "cuts": 1}, "max_epochs": 6},
        {"layers": {"loss_steps": 3}, "optimizer": "adam-groups"},
    ],
    ids=["accepted", "taken back", "fewer steps"],
)
def test_a_resumed_run_equals_the_straight_one(tmp_path, options):
    points = {
        "inside the epoch": Point("on_train_batch_end", 0, 1),
        "inside a validation": Point("on_validation_batch_end", 0, 1),
        "cut pending": Point("on_validation_end", 0),
        "after it": Point("on_train_batch_end", 1, 1),
    }
    layers = {**MEASURED, **options.get("layers", {})}
    given = {"module": Deep, **options, "layers": layers}
    found = resumed_equals_straight(tmp_path, points, **given)
    assert not any(found.values()), found


def test_a_cut_that_costs_too_much_is_the_last(tmp_path):
    layers = {**MEASURED, **GATE, "cuts": 2, "last_epoch": 4}
    _, module, watch = fit(tmp_path, layers=layers, module=Scored, max_epochs=7)
    assert watch.pruning.report.cuts == []
    (undone,) = watch.pruning.report.undone
    assert len(undone.stacks[0].removed) == 1  # half of the way
    assert len(module.model.bert.encoder.layer) == 6


def test_cuts_go_on_from_the_layers_that_are_left(tmp_path):
    layers = {**MEASURED, "target_layers": 2, "cuts": 2, "last_epoch": 3}
    _, _, watch = fit(tmp_path, layers=layers, module=Deep, max_epochs=5)
    first, second = (cut.stacks[0] for cut in watch.pruning.report.cuts)
    assert second.before == first.after
    assert second.losses.removed == second.removed
    assert (len(first.removed), len(second.removed)) == (2, 2)
    assert len(second.losses.single) == 4


def two_ranks(folder):
    layers = {**MEASURED, "loss_steps": 4}
    _, module, watch = fit(folder, layers=layers, module=Deep, strategy="ddp", devices=2)
    (stack,) = watch.pruning.report.cuts[0].stacks
    return sha(*module.state_dict().values()), watch.pruning.plan.to_json(), stack.losses


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_measure_what_one_does(tmp_path):
    one, other = launch(2, two_ranks, tmp_path).values()
    assert one == other
    _, plan, losses = one
    # Each of two ranks takes half of the steps: two, of half of the rows.
    _, _, watch = fit(tmp_path, layers={**MEASURED, "loss_steps": 2}, module=Deep)
    alone = watch.pruning.report.cuts[0].stacks[0].losses
    assert watch.pruning.plan.to_json() == plan
    assert losses.whole == pytest.approx(alone.whole, abs=1e-5)
    assert losses.single == pytest.approx(alone.single, abs=1e-4)
    assert losses.measured == alone.measured


def failing_on_two(folder):
    try:
        fit(folder, layers=MEASURED, module=FailsOnOne, strategy="ddp", devices=2)
    except PruningError as error:
        return str(error)
    return ""


class FailsOnOne(Deep):
    def training_step(self, batch, index):
        if not self.training and self.global_rank:
            raise RuntimeError("no loss here")
        return super().training_step(batch, index)


@pytest.mark.filterwarnings("ignore")
def test_a_step_that_fails_on_one_rank_fails_on_all(tmp_path):
    found = launch(2, failing_on_two, tmp_path)
    assert "fails on another rank" in found[0]
    assert "no loss here" in found[1]


class Silent(Deep):
    """Manual optimization, whose steps return nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "optimizer": "two-manual"})


class Diverged(Deep):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss if self.training else loss * math.nan


class Fails(Noisy):
    def training_step(self, batch, index):
        if not self.training and self.global_step == 4:
            raise RuntimeError("no more than four")
        return super().training_step(batch, index)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Silent, "training step returned None for a loss; expected a tensor of one number"),
        (Diverged, "loss of the whole model is NaN or infinite; expected a finite one"),
        (Fails, r"training_step of Fails fails on a copy in evaluation mode .*no more than four"),
    ],
)
def test_a_step_without_a_loss_is_named_and_nothing_is_cut(module, message):
    target = module()
    weights = copy.deepcopy(target.state_dict())
    pruning = pruning_layers(**MEASURED, verbose=False, first_epoch=1)
    run = trainer(pruning, max_epochs=2, num_sanity_val_steps=0)
    with pytest.raises(PruningError, match=message):
        run.fit(target)
    assert pruning.report.cuts == []
    assert list(weights) == [n for n in target.state_dict() if n in weights]
    assert len(target.model.bert.encoder.layer) == 6
    assert not any("returns_input" in repr(part._forward_hooks) for part in target.modules())


class Widths(Deep):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tower = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 8))

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.tower(torch.zeros(8, 24))


def test_layers_that_change_the_shape_are_refused():
    pruning = pruning_layers(
        **{**MEASURED, "target_layers": 2}, stacks=["tower"], verbose=False, first_epoch=1
    )
    with pytest.raises(PruningError, match="outputs of different widths"):
        trainer(pruning, max_epochs=2, num_sanity_val_steps=0).fit(Widths())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "measured_loss"}, "criterion='measured_loss'.* expected target_layers too"),
        ({**MEASURED, "loss_steps": 0}, "loss_steps=0; expected a whole number of at least 1"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises((MisconfigurationException, PruningError), match=message):
        pruning_layers(**options)


def test_batches_are_copies_and_ranks_get_theirs_back():
    class Session:
        def __init__(self, rank: int = 0, world: int = 1) -> None:
            self.state = type("State", (), {"batches": []})()
            self.world, self.trainer = world, type("T", (), {"global_rank": rank})()

    session, steps = Session(), BatchCollection(2)
    for index in range(3):
        given = {"x": torch.full((2,), float(index))}
        steps.begin(session, given, index)
        given["x"].fill_(9)
    assert [b.args[0]["x"][0].item() for b in session.state.batches] == [0, 1]
    steps.begin(session, batch(), 0)  # a new epoch
    assert len(session.state.batches) == 1
    for rank in (0, 1):
        session = Session(rank, 2)
        session.state.batches = list("abcd")
        steps.resume(session)
        assert session.state.batches == list("abcd")[rank::2]


def test_other_criteria_keep_no_batches():
    for criterion in ("cka", "angle", "last"):
        strategy = pruning_layers(None, target_layers=4, criterion=criterion).engine.strategy
        assert isinstance(strategy, LayerStrategy)
        assert strategy.steps is None
    assert Similarity().loss_steps == 4
