"""Everything else that sits in a Trainer, beside the callback, in real runs."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    RichModelSummary,
    RichProgressBar,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightning_mi_prune import MutualInformationPruning, PruningError
from lightning_mi_prune.callbacks.distributed import refuse_unsupported
from lightning_mi_prune.callbacks.monitors import BestOf, restart_comparison
from lightning_mi_prune.callbacks.schedule import run_length
from tests.conftest import count_hooks
from tests.support.boring import Classifier, Sentences, trainer
from tests.support.graphs import groups_of
from tests.support.models import build, entries_of
from tests.support.pruning import pruning_units, records
from tests.support.runs import PRECISIONS, Batches, Module, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]


def size(state):
    """Numbers in a state dict: models of different size differ in it."""
    return sum(value.numel() for value in state.values() if value.is_floating_point())


BUILT = size(Module().state_dict())  # the runs below cut it at epochs 1 and 2 of 4


def quiet(sparsity: float = 0.5, **options):
    defaults = {"multiple": 2, "ramp": "linear", "cuts": 2, "verbose": False}
    return pruning_units(sparsity, **{**defaults, **options})


class Graded(Module):
    """Logs, as ``score``, one number of a list after each epoch: the user's metric, scripted."""

    def __init__(self, scores=(0.0, 1.0, 2.0, 3.0), **options):
        super().__init__(**options)
        self.scores = scores

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.log("score", self.scores[min(self.current_epoch, len(self.scores) - 1)])

    def val_dataloader(self):
        return Batches(64, 32, seed=1)


def run(module, *callbacks, prune=None, first=True, **options):
    """Fit with pruning before (or after) the other callbacks."""
    prune = quiet() if prune is None else prune
    order = [prune, *callbacks] if first else [*callbacks, prune]
    fitted = trainer(*order, **{"num_sanity_val_steps": 0, **options})
    fitted.fit(module)
    return fitted, prune


def stored(path):
    return size(torch.load(path, weights_only=True)["state_dict"])


def is_cut_and_clean(module, prune, epochs=(1, 2)):
    for group in groups_of(module):
        rows = module.get_parameter(group.tensors[0].tensor).shape[group.tensors[0].dim]
        assert rows == prune.plan.width(group.name) * entries_of(group, prune.plan.widths)
    assert prune.report.cuts[-1].sparsity >= 0.5
    assert [cut.epoch for cut in prune.report.cuts] == list(epochs)
    assert count_hooks(module) == 0
    assert all(torch.isfinite(p).all() for p in module.parameters())


class Files(pl.Callback):
    """What lies in a folder when training batches and validations end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def look(self) -> set[str]:
        return {p.stem for p in self.folder.glob("*.ckpt")}

    def on_train_batch_end(self, *args):
        self.seen.append(self.look())

    def on_validation_batch_end(self, *args):
        self.seen.append(self.look())

    def on_train_epoch_end(self, *args):
        self.seen.append(self.look())

    def after_first(self):
        first = next(i for i, files in enumerate(self.seen) if files)
        return self.seen[first:]


SIGNS = {"min": 1.0, "max": -1.0}


def keep(folder, mode="min", **options):
    defaults = {"monitor": "score", "mode": mode, "filename": "{epoch}"}
    return ModelCheckpoint(dirpath=folder, **{**defaults, **options})


@pytest.mark.parametrize(
    ("mode", "top"), [("min", 1), ("max", 1), ("min", 2), ("max", 2), ("min", 3)]
)
def test_the_best_checkpoint_is_of_the_final_size(tmp_path, mode, top):
    """Although the first epochs, of the big model, log better numbers."""
    module = Graded([SIGNS[mode] * score for score in (0, 1, 2, 3)])
    best, files = keep(tmp_path, mode, save_top_k=top), Files(tmp_path)
    fitted, prune = run(module, best, files, enable_checkpointing=True)
    is_cut_and_clean(module, prune)
    assert Path(best.best_model_path).stem == "epoch=2"
    assert best.best_model_score == SIGNS[mode] * 2
    final = size(module.state_dict())
    assert stored(best.best_model_path) == final < BUILT
    assert files.look() == {f"epoch={e}" for e in {1: (2,), 2: (2, 3), 3: (1, 2, 3)}[top]}
    assert {str(p) for p in tmp_path.glob("*.ckpt")} == set(best.best_k_models)
    assert all(files.after_first()), "a moment without a checkpoint"
    for earlier, later in zip(files.seen, files.seen[1:], strict=False):
        kept, fresh = earlier & later, later - earlier
        assert all(k > gone for k in kept for gone in earlier - later), "not the oldest first"
        assert len(fresh) <= 1
    fitted.test(module, ckpt_path="best", weights_only=True, verbose=False)
    assert size(module.state_dict()) == final
    fresh = Graded()
    trainer(quiet()).test(fresh, ckpt_path=best.best_model_path, weights_only=True, verbose=False)
    assert size(fresh.state_dict()) == final


@pytest.mark.parametrize("top", [1, 2])
def test_within_one_size_the_better_checkpoint_wins(tmp_path, top):
    """The order of the scores decides again as soon as the size does not change any more."""
    scores = (0.0, 0.0, 5.0, 9.0, 4.0, 7.0)
    best, files = keep(tmp_path, save_top_k=top), Files(tmp_path)
    module = Graded(scores)
    _, prune = run(
        module, best, files, prune=quiet(last_epoch=2), max_epochs=6, enable_checkpointing=True
    )
    is_cut_and_clean(module, prune)
    assert files.look() == {"epoch=4", "epoch=2"} if top == 2 else {"epoch=4"}
    assert best.best_model_score == 4.0
    assert Path(best.best_model_path).stem == "epoch=4"


def test_each_size_leaves_the_best_of_every_size_on_disk(tmp_path):
    scores = (1.0, 0.0, 5.0, 3.0, 9.0, 8.0)  # cuts at epochs 2 and 4
    best = keep(tmp_path)
    prune = quiet(best_of="each_size", first_epoch=2, last_epoch=4, cuts=2)
    module = Graded(scores)
    run(module, best, prune=prune, max_epochs=6, enable_checkpointing=True)
    assert [cut.epoch for cut in prune.report.cuts] == [2, 4]
    found = {p.stem: stored(p) for p in tmp_path.glob("*.ckpt")}
    assert set(found) == {"epoch=1", "epoch=3", "epoch=5"}
    assert found["epoch=1"] == BUILT > found["epoch=3"] > found["epoch=5"]
    assert found["epoch=5"] == size(module.state_dict())
    assert Path(best.best_model_path).stem == "epoch=5"


def test_any_size_lets_the_big_model_win(tmp_path):
    best, module = keep(tmp_path), Graded()
    run(module, best, prune=quiet(best_of="any_size"), enable_checkpointing=True)
    assert Path(best.best_model_path).stem == "epoch=0"
    assert stored(best.best_model_path) == BUILT
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


@pytest.mark.parametrize(("last", "weights_only"), [(True, False), ("link", True)])
def test_the_last_checkpoint_and_those_without_monitor_are_untouched(tmp_path, last, weights_only):
    def names(*callbacks):
        folder = tmp_path / str(len(callbacks))
        common = {"save_weights_only": weights_only, "filename": "{epoch}"}
        plain = ModelCheckpoint(dirpath=folder / "plain", save_last=last, **common)
        every = ModelCheckpoint(
            dirpath=folder / "all", save_top_k=-1, **common, every_n_train_steps=4
        )
        best = keep(folder / "best", save_last=last, save_weights_only=weights_only)
        module = Graded()
        trainer(*callbacks, plain, every, best, enable_checkpointing=True).fit(module)
        paths = [p for p in folder.rglob("*.ckpt") if p.parent.name != "best"]
        found = {str(p.relative_to(folder)) for p in paths}
        return found, folder, (plain, every, best), size(module.state_dict())

    without, *_ = names()
    found, folder, (plain, _, best), final = names(quiet())
    assert found == without
    assert plain.best_model_path == str(folder / "plain" / "epoch=3.ckpt")
    assert [stored(folder / "all" / f"epoch={e}.ckpt") for e in (0, 3)] == [BUILT, final]
    for checkpoint in (plain, best):
        assert stored(checkpoint.last_model_path) == final
    assert stored(best.best_model_path) == final
    fresh = Graded()
    trainer(quiet()).test(fresh, ckpt_path=best.last_model_path, weights_only=True, verbose=False)
    assert size(fresh.state_dict()) == final


def test_every_monitor_of_several_is_restarted(tmp_path):
    ups = keep(tmp_path / "a", monitor="up", mode="max")
    downs = keep(tmp_path / "b", monitor="score")

    class Both(Graded):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            self.log("up", -self.scores[self.current_epoch])

    run(Both(), ups, downs, enable_checkpointing=True)
    assert Path(ups.best_model_path).stem == Path(downs.best_model_path).stem == "epoch=2"


@pytest.mark.parametrize("versions", [True, False])
def test_one_file_name_for_all_sizes_ends_with_the_final_size(tmp_path, versions):
    best = keep(tmp_path, filename="best", enable_version_counter=versions)
    files, module = Files(tmp_path), Graded()
    run(module, best, files, enable_checkpointing=True)
    assert stored(best.best_model_path) == size(module.state_dict()) < BUILT
    assert all(files.after_first())
    assert [str(p) for p in tmp_path.glob("*.ckpt")] == [best.best_model_path]


@pytest.mark.parametrize(
    ("best_of", "at_end"), [*zip(get_args(BestOf), (True, False, True), strict=True)]
)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_run_resumed_with_a_pending_cut_finds_the_same_best(tmp_path, best_of, at_end, epoch):
    class Crash(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch + 1:
                raise KeyError("the machine")

    def best(folder):
        return keep(tmp_path / folder, save_last=True, save_on_train_epoch_end=at_end)

    prune, common = {"best_of": best_of}, {"enable_checkpointing": True}
    straight, broken, resumed = best("straight"), best("resumed"), best("resumed")
    whole = Graded()
    run(whole, straight, prune=quiet(**prune), **common)
    with pytest.raises(KeyError, match="the machine"):
        run(Graded(), Crash(), broken, prune=quiet(**prune), first=False, **common)
    is_small = epoch == 1 and best_of != "any_size"  # which saved nothing after epoch 0
    assert (stored(broken.last_model_path) < BUILT) == is_small
    again = trainer(quiet(**prune), resumed, num_sanity_val_steps=0, **common)
    module = Graded()
    again.fit(module, ckpt_path=broken.last_model_path, weights_only=True)
    assert size(module.state_dict()) == size(whole.state_dict())
    assert Path(resumed.best_model_path).name == Path(straight.best_model_path).name
    assert stored(resumed.best_model_path) == stored(straight.best_model_path)
    found = {p.name for p in (tmp_path / "resumed").glob("epoch*.ckpt")}
    assert found == {p.name for p in (tmp_path / "straight").glob("epoch*.ckpt")}
    wanted, found = (
        torch.load(c.best_model_path, weights_only=True)["state_dict"] for c in (straight, resumed)
    )
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"every_n_train_steps": 2}, {}),
        ({"save_on_train_epoch_end": True}, {"check_val_every_n_epoch": 2, "max_epochs": 8}),
    ],
    ids=["inside epochs", "epochs without validation"],
)
@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_no_small_model_is_credited_with_a_score_of_the_big_one(tmp_path, options, trained):
    """A checkpoint between the cut and the next validation has only an older model's score."""
    credited = {}

    class Keep(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            credited[filepath] = float(self.current_score), trainer.current_epoch
            super()._save_checkpoint(trainer, filepath)

    best = Keep(dirpath=tmp_path, monitor="score", filename="{epoch}-{step}", **options)
    every = trained.get("check_val_every_n_epoch", 1)
    module = Graded([float(e) for e in range(8)])
    _, prune = run(module, best, enable_checkpointing=True, **trained)
    score, epoch = credited[best.best_model_path]
    last = prune.report.cuts[-1].epoch
    assert epoch >= last
    assert score >= last, f"scored {score} before the last cut, at epoch {last} (of {every})"


LAST_CUT = 2  # in the runs of six epochs below


def ran(stopping, *, best_of="final_size", first=True, module=None, last=LAST_CUT, **options):
    """Epochs that a run of six lasts, and the epochs of its cuts."""
    prune = quiet(last_epoch=last, best_of=best_of)
    target = Graded((5.0,)) if module is None else module
    fitted, _ = run(target, stopping, prune=prune, first=first, max_epochs=6, **options)
    return fitted.current_epoch, [cut.epoch for cut in prune.report.cuts]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(("at_end", "patience"), [(True, 1), (False, 1), (None, 2)])
def test_patience_begins_at_the_last_cut(first, at_end, patience):
    stopping = EarlyStopping("score", patience=patience, check_on_train_epoch_end=at_end)
    assert ran(stopping, first=first) == (LAST_CUT + 1 + patience, [1, 2])
    assert stopping.stopped_epoch == LAST_CUT + patience
    assert stopping.wait_count == patience


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_score_good_enough_stops_only_the_final_size(first, at_end):
    stopping = EarlyStopping("score", stopping_threshold=9.0, check_on_train_epoch_end=at_end)
    assert ran(stopping, first=first) == (LAST_CUT + 1, [1, 2])
    assert stopping.stopping_threshold == 9.0
    assert stopping.stopped_epoch == LAST_CUT


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("options", "value"),
    [({"divergence_threshold": 9.0}, 10.0), ({}, math.nan), ({}, math.inf)],
    ids=["divergence", "nan", "inf"],
)
def test_a_run_that_goes_wrong_is_stopped_at_once(options, value, first):
    stopping, module = EarlyStopping("score", **options), Graded((5.0, value, 5.0))
    with pytest.warns(UserWarning, match="Training ended after 1 of 2 cuts"):
        assert ran(stopping, module=module, first=first) == (2, [1])


def test_any_size_leaves_early_stopping_alone():
    stopping = EarlyStopping("score", patience=1, stopping_threshold=0.0)
    with pytest.warns(UserWarning, match="Training ended after 1 of 2 cuts"):
        assert ran(stopping, best_of="any_size") == (2, [1])
    assert stopping.stopping_threshold == 0.0


class Loud(Graded):
    def training_step(self, batch, index):
        self.log("train_score", 5.0)
        return super().training_step(batch, index)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_training_metric_does_not_stop_epochs_without_validation_either(first):
    options = {"stopping_threshold": 9.0, "check_on_train_epoch_end": True}
    stopping = EarlyStopping("train_score", patience=1, **options)
    lasted, cuts = ran(stopping, first=first, module=Loud(), last=4, check_val_every_n_epoch=2)
    assert cuts == [2, 4]
    assert lasted > cuts[-1]
    assert stopping.stopping_threshold == 9.0


def test_the_score_of_the_big_model_does_not_stop_the_small_one():
    options = {"stopping_threshold": 1.0, "check_on_train_epoch_end": True, "strict": False}
    stopping, module = EarlyStopping("score", **options), Graded((0.0,) * 4 + (5.0,))
    assert ran(stopping, module=module, last=4, check_val_every_n_epoch=2) == (6, [2, 4])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_users_threshold_is_back_after_an_exception(error):
    class Failing(Graded):
        def training_step(self, batch, index):
            if self.current_epoch == 1:
                assert stopping.stopping_threshold is None
                raise error("the user's own bug")
            return super().training_step(batch, index)

    stopping = EarlyStopping("score", stopping_threshold=9.0)
    with pytest.raises((error, SystemExit)):
        ran(stopping, module=Failing())
    assert stopping.stopping_threshold == 9.0


def test_a_resumed_run_still_holds_early_stopping(tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "0.ckpt")

    def stopping():
        return EarlyStopping("score", patience=1, stopping_threshold=1.0)

    fitted = trainer(quiet(last_epoch=2), Save(), stopping(), max_epochs=6)
    fitted.fit(Graded((5.0,)))
    again = trainer(quiet(last_epoch=2), stopping(), max_epochs=6)
    again.fit(Graded((5.0,)), ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert fitted.current_epoch == again.current_epoch == LAST_CUT + 2


class Plateau(Graded):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        plateau = ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "score"}}


@pytest.mark.parametrize(("best_of", "drops"), [("final_size", 1), ("any_size", 3)])
def test_a_plateau_is_one_of_the_present_size(best_of, drops):
    """Every score is worse than the one before; only the last two are of one size."""
    module = Plateau()
    fitted, _ = run(module, prune=quiet(best_of=best_of))
    assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.1**drops)
    assert fitted.lr_scheduler_configs[0].scheduler.best == (2.0 if drops == 1 else 0.0)


def test_monitors_in_mode_max_forget_in_the_right_direction():
    parameter = torch.nn.Parameter(torch.ones(1))
    plateau = ReduceLROnPlateau(torch.optim.SGD([parameter], lr=1.0), mode="max")
    plateau.step(3.0)
    stopping = EarlyStopping("score", mode="max")
    stopping.best_score = torch.tensor(3.0)
    fake = SimpleNamespace(
        checkpoint_callbacks=[],
        callbacks=[stopping],
        lr_scheduler_configs=[SimpleNamespace(scheduler=plateau)],
    )
    restart_comparison(fake, "final_size")
    assert plateau.best == stopping.best_score == -math.inf


class Tunable(Classifier):
    """Has what the tuner changes."""

    def __init__(self):
        super().__init__(validation_rows=256)
        self.batch_size = 4

    def train_dataloader(self):
        return DataLoader(Sentences(64), batch_size=self.batch_size)


def tune_lr(trainer, module):
    found = Tuner(trainer).lr_find(module, num_training=30, early_stop_threshold=None)
    assert len(found.results["lr"]) >= 30


def tune_size(mode):
    def tune(trainer, module):
        options = {"mode": mode, "max_trials": 2, "steps_per_trial": 2}
        assert Tuner(trainer).scale_batch_size(module, **options) == module.batch_size

    return tune


@pytest.mark.parametrize(
    "tune",
    [tune_lr, tune_size("power"), tune_size("binsearch")],
    ids=["lr", "power", "binsearch"],
)
@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_tuning_before_fit_listens_to_nothing_and_cuts_nothing(tune, tmp_path):
    module, prune = Tunable(), quiet()
    tuned = trainer(prune, default_root_dir=tmp_path)
    tune(tuned, module)
    assert prune.plan is None  # no batch flowed in a fit
    assert prune.report.cuts == []
    assert size(module.state_dict()) == BUILT
    assert count_hooks(module) == 0
    assert prune.engine.recorder is None
    built = sum(p.numel() for p in module.parameters())
    tuned.fit(module)
    is_cut_and_clean(module, prune)
    assert prune.report.parameters == built
    held = [p for group in tuned.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}


class LRFinder(LearningRateFinder):
    def __init__(self):
        super().__init__(num_training_steps=30, early_stop_threshold=None)


class SizeFinder(BatchSizeFinder):
    def __init__(self):
        super().__init__(max_trials=2, steps_per_trial=2)


@pytest.mark.parametrize("finder", [LRFinder, SizeFinder])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_finders_inside_fit_are_followed_by_the_cuts(finder, first, tmp_path):
    module = Tunable()
    built = sum(p.numel() for p in module.parameters())
    fitted, prune = run(module, finder(), first=first, default_root_dir=tmp_path)
    is_cut_and_clean(module, prune)
    assert prune.report.parameters == built
    assert fitted.current_epoch == 4
    held = [p for group in fitted.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters()}
    moments = {id(p) for p in fitted.optimizers[0].state}
    assert moments <= {id(p) for p in held}


def stub(batches, steps, factor=1, scheduling=None):
    callbacks = [] if scheduling is None else [GradientAccumulationScheduler(dict(scheduling))]
    return SimpleNamespace(
        max_epochs=-1,
        max_steps=steps,
        num_training_batches=batches,
        accumulate_grad_batches=factor,
        callbacks=callbacks,
        lightning_module=SimpleNamespace(automatic_optimization=True),
    )


def counted(batches, steps, factor_of):
    """Epochs until so many steps were taken, batch by batch; whole epochs and whether more."""
    taken, epoch = 0, 0
    while True:
        for batch in range(batches):
            taken += (batch + 1) % factor_of(epoch) == 0 or batch + 1 == batches
            if taken == steps:
                return epoch + 1, batch + 1 == batches
        epoch += 1


@pytest.mark.parametrize("batches", [1, 4, 7])
@pytest.mark.parametrize(
    "scheduling", [{0: 1}, {0: 4, 2: 2, 5: 1}, {2: 3}, {0: 8, 4: 3}, {1: 7}], ids=str
)
def test_the_length_of_a_run_is_what_counting_says(batches, scheduling):
    accumulate = GradientAccumulationScheduler(dict(scheduling)).get_accumulate_grad_batches
    for steps in range(1, 40):
        length = run_length(stub(batches, steps, scheduling=scheduling))
        epochs, ended = counted(batches, steps, accumulate)
        assert math.ceil(length - 1e-9) == epochs
        assert (abs(length - round(length)) < 1e-9) == ended
    for factor in (1, 2, 3, 9):
        for steps in range(1, 20):
            length = run_length(stub(batches, steps, factor))
            assert math.ceil(length - 1e-9) == counted(batches, steps, lambda _, f=factor: f)[0]


@pytest.mark.parametrize("steps", [8, 9, 11, 13])
def test_scheduled_accumulation_fits_the_cuts_into_max_steps(steps):
    """A warning that the run ended before its schedule would be an error here."""
    module = Module()
    accumulate = GradientAccumulationScheduler({0: 4, 2: 2, 4: 1})
    fitted, prune = run(module, accumulate, max_epochs=-1, max_steps=steps)
    is_cut_and_clean(module, prune, [cut.epoch for cut in prune.report.cuts])
    last = prune.report.cuts[-1].epoch
    assert fitted.global_step == steps
    assert last <= run_length(fitted) / 2 + 1e-9
    assert math.ceil(run_length(fitted)) == fitted.current_epoch + (fitted.global_step < 0)


@pytest.mark.parametrize("accumulate", [3, 4])
def test_no_gradient_crosses_a_cut(accumulate):
    """The step after the cut is that of a run whose gradients were cleared at the epoch's start."""

    def weights(*extra):
        module = Module()
        run(module, *extra, prune=quiet(cuts=1), accumulate_grad_batches=accumulate, max_epochs=3)
        return module.state_dict()

    class Clear(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                assert all(p.grad is None or not p.grad.any() for p in pl_module.parameters())
                pl_module.zero_grad(set_to_none=True)

    one, two = weights(), weights(Clear())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def logged(folder):
    return (folder / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0].split(",")


@pytest.fixture(scope="module")
def alone():
    """Weights of a run with pruning and nothing else."""
    module = Module()
    run(module)
    return module.state_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda: ModelSummary(max_depth=3),
        lambda: RichModelSummary(max_depth=2),
        RichProgressBar,
        lambda: LearningRateMonitor(logging_interval="epoch", log_momentum=True),
        lambda: DeviceStatsMonitor(cpu_stats=True),
        lambda: Timer(duration={"hours": 1}),
    ],
    ids=["summary", "rich-summary", "rich-bar", "lr", "device", "timer"],
)
def test_onlookers_change_nothing(alone, make, tmp_path):
    beside = Module()
    common = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    common["enable_progress_bar"] = make is RichProgressBar
    _, prune = run(beside, make(), first=make is RichProgressBar, **common)
    is_cut_and_clean(beside, prune)
    one, two = alone, beside.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {"prune/parameters", "prune/sparsity", "prune/macs"} <= set(logged(tmp_path))


def test_the_summary_of_the_pruned_model_counts_what_is_left():
    module = Module()
    _, prune = run(module)
    left = sum(p.numel() for p in module.parameters())
    summary = pl.utilities.model_summary.summarize(module, max_depth=-1)
    assert summary.total_parameters == left == prune.report.cuts[-1].parameters


@pytest.mark.filterwarnings("ignore:The cut of epoch 1 waits")
def test_a_timer_that_ends_the_run_early_is_reported():
    with pytest.warns(UserWarning, match="Training ended after 0 of 2 cuts"):
        run(Module(), max_time={"milliseconds": 1})


def test_every_logger_gets_every_cut(tmp_path):
    class Scalars(TensorBoardLogger):
        def log_metrics(self, metrics, step=None):
            seen.append(set(metrics))
            super().log_metrics(metrics, step)

    seen = []
    files = [CSVLogger(tmp_path), CSVLogger(tmp_path / "second")]
    _, prune = run(Module(), logger=[*files, Scalars(tmp_path / "board")], log_every_n_steps=1)
    names = {f"prune/width/{group.name}" for group in prune.engine.strategy.chosen}
    names |= {"prune/parameters", "prune/sparsity", "prune/macs", "prune/information_kept"}
    assert names <= set(logged(tmp_path))
    assert names <= set(logged(tmp_path / "second"))
    assert (
        sum(names <= metrics for metrics in seen) == 4
    )  # epochs 0 to 3, the one before the first cut too
    assert list((tmp_path / "board").rglob("events.*"))


@pytest.mark.parametrize("profiler", ["simple", "advanced", "pytorch"])
@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule")
def test_profilers_look_on(profiler, tmp_path):
    module = Module()
    few = {"limit_train_batches": 2, "limit_val_batches": 2, "max_epochs": 2}  # it is slow
    prune = quiet(cuts=1)
    run(module, prune=prune, profiler=profiler, default_root_dir=tmp_path, **few)
    is_cut_and_clean(module, prune, [1])


QUIET = {"sparsity": 0.5, "multiple": 2, "ramp": "linear", "cuts": 2, "verbose": False}


class Count(MutualInformationPruning):
    """Notes how many samples each cut is decided from."""

    def __init__(self, **options):
        super().__init__(**records(MutualInformationPruning, {**QUIET, **options}))
        self.counts = []
        decide = self.engine.strategy.decide

        def noting(session, data, goal):
            self.counts.append({int(m.count) for m in data.moments.values()})
            return decide(session, data, goal)

        self.engine.strategy.decide = noting


def loader(rows, seed=1, size=32):
    return DataLoader(Sentences(rows, seed=seed), batch_size=size)


class ManyLoaders(Module):
    """Two training loaders of different length, and as many for validation as asked for."""

    def __init__(self, *, mode="max_size_cycle", validation=list):
        super().__init__()
        self.mode, self.validation = mode, validation

    def train_dataloader(self):
        loaders = {"a": loader(64, 0, 16), "b": loader(32, 3, 16)}
        return CombinedLoader(loaders, self.mode)

    def val_dataloader(self):
        loaders = [loader(96), loader(64, 2), loader(10, 4)]
        return loaders if self.validation is list else dict(zip("xyz", loaders, strict=True))

    def training_step(self, batch, index):
        found = batch if isinstance(batch, dict) else batch[0]
        return sum(self.loss(part) for part in found.values() if part is not None)

    def validation_step(self, batch, index, dataloader_idx=0):
        self.log("score", self.loss(batch), batch_size=len(batch["labels"]))

    test_dataloader = None


@pytest.mark.parametrize(
    ("mode", "validation"), [("max_size_cycle", list), ("min_size", dict), ("max_size", list)]
)
def test_all_of_several_loaders_are_heard(mode, validation):
    module, prune = ManyLoaders(mode=mode, validation=validation), Count()
    run(module, prune=prune)
    is_cut_and_clean(module, prune)
    assert prune.counts == [{(96 + 64 + 10) * 12}] * 2


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"check_val_every_n_epoch": 2, "max_epochs": 8}, [2, 4]),
        ({"check_val_every_n_epoch": 3, "max_epochs": 7, "num_sanity_val_steps": 2}, [3]),
        ({"val_check_interval": 1}, [1, 2]),
        ({"val_check_interval": 0.5}, [1, 2]),
        ({"val_check_interval": 3}, [1, 2]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": 2}, [2]),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [1, 2]),
        ({"val_check_interval": 2, "limit_train_batches": 3}, [1, 2]),
    ],
    ids=str,
)
def test_cuts_come_at_the_right_epoch_after_one_whole_validation(options, epochs):
    class Plain(Module):
        def train_dataloader(self):
            return loader(64, 0, 16)

        def val_dataloader(self):
            return loader(128)

    module, prune = Plain(), Count(cuts=len(epochs))
    run(module, prune=prune, **options)
    is_cut_and_clean(module, prune, epochs)
    assert prune.counts == [{128 * 12}] * len(epochs)


def test_a_run_resumed_where_validation_is_rare_goes_on(tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    options = {"check_val_every_n_epoch": 2, "max_epochs": 6}
    straight = Module()
    run(straight, Save(), prune=quiet(cuts=1), **options)
    for epoch in (0, 1, 2):
        module, prune = Module(), quiet(cuts=1)
        again = trainer(prune, num_sanity_val_steps=0, **options)
        again.fit(module, ckpt_path=tmp_path / f"{epoch}.ckpt", weights_only=True)
        is_cut_and_clean(module, prune, [2])
        one, two = straight.state_dict(), module.state_dict()
        assert all(torch.equal(one[name], two[name]) for name in one), epoch


class Adversarial(Module):
    """Two networks, each with an optimizer of its own, stepped in turn."""

    def __init__(self):
        super().__init__(automatic=False)
        self.judge = build("distilbert", seed=1)

    def training_step(self, batch, index):
        for optimizer, network in zip(self.optimizers(), (self.model, self.judge), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(network(**batch).loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.judge(**batch)

    def configure_optimizers(self):
        return [
            torch.optim.AdamW(self.model.parameters(), lr=1e-2),
            torch.optim.SGD(self.judge.parameters(), lr=1e-2, momentum=0.9),
        ]


def is_idle(name):
    """A key's bias shifts all scores of a query alike; some rows of embeddings never occur."""
    return any(part in name for part in ("key.bias", "k_lin.bias", "token_type", "position"))


class AfterCut(pl.Callback):
    """Copies all parameters where an epoch's first batch begins."""

    def __init__(self, epoch=2):
        self.epoch, self.then = epoch, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 0):
            self.then = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    def moved(self, module):
        live = dict(module.named_parameters())
        assert live.keys() == self.then.keys()
        return {n for n, p in live.items() if not (p.numel() and torch.equal(p, self.then[n]))}


def parameter_names(optimizers, module):
    names = {id(p): n for n, p in module.named_parameters()}
    return [[[names[id(p)] for p in g["params"]] for g in o.param_groups] for o in optimizers]


def test_two_optimizers_in_turn_keep_their_own_networks():
    module, after = Adversarial(), AfterCut()
    before = parameter_names(module.configure_optimizers(), module)
    fitted, prune = run(module, after)
    is_cut_and_clean(module, prune)
    kept = {n: prune.plan.width(n) / size for n, size in prune.plan.sizes.items()}
    assert all(min(kept[n] for n in kept if part in n) < 1 for part in ("model.", "judge."))
    live = {n for n, _ in module.named_parameters()}  # those of vanished sublayers left
    left = [[[n for n in group if n in live] for group in groups] for groups in before]
    assert parameter_names(fitted.optimizers, module) == left
    still = {n for n, _ in module.named_parameters()} - after.moved(module)
    assert all(is_idle(name) for name in still), still


def test_manual_optimization_needs_epochs():
    module, after = Adversarial(), AfterCut(0)
    with pytest.raises(MisconfigurationException, match=r"Under manual optimization.*Set max_epo"):
        run(module, after, max_epochs=-1, max_steps=100)
    assert after.then == {}


def test_a_skipped_step_after_a_cut_leaves_scaler_and_optimizer_consistent():
    """The scale is what its rule says for these steps, as if there had been no cut."""
    plugins = PRECISIONS["16-mixed"]()["plugins"]
    scaler = plugins[0].scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    seen, bad = [], (1, 0)

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.at = (trainer.current_epoch, batch_idx)
            self.before = [p.detach().clone() for p in pl_module.parameters()]
            self.steps = self.taken(trainer)

        def on_after_backward(self, trainer, pl_module):
            if self.at == bad:
                weight = pl_module.model.bert.encoder.layer[0].intermediate.dense.weight
                assert size(pl_module.state_dict()) < BUILT
                weight.grad[0, 0] = math.inf

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(scaler.get_scale())
            same = [
                torch.equal(*pair) for pair in zip(self.before, pl_module.parameters(), strict=True)
            ]
            assert all(same) if self.at == bad else not all(same)
            assert (self.taken(trainer) == self.steps) == (self.at == bad)

        def taken(self, trainer):
            return [float(state["step"]) for state in trainer.optimizers[0].state.values()]

    module = Module()
    fitted, prune = run(module, Watch(), plugins=plugins)
    is_cut_and_clean(module, prune)
    expected, scale, good = [], 256.0, 0
    for step in range(16):
        good = 0 if step == 4 else good + 1
        scale *= 0.5 if step == 4 else 2.0 if good == 3 else 1.0
        good %= 3
        expected.append(scale)
    assert seen == expected
    assert set(Watch().taken(fitted)) == {15.0}


class Backbone(Module):
    @property
    def backbone(self):
        return self.model.bert

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def finetuning(epoch):
    return BackboneFinetuning(
        unfreeze_backbone_at_epoch=epoch, lambda_func=lambda _: 1.5, verbose=False, train_bn=False
    )


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("epoch", [2, 3])
def test_a_backbone_that_thaws_late_is_cut_frozen_and_trained_after(epoch, first, tmp_path):
    class Save(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    module, after = Backbone(), AfterCut(3)
    fitted, prune = run(module, finetuning(epoch), after, Save(), first=first)
    is_cut_and_clean(module, prune)
    (groups,) = parameter_names(fitted.optimizers, module)
    assert len(groups) == 2
    held = sorted(groups[0] + groups[1])
    assert held == sorted(n for n, _ in module.named_parameters())
    assert all(name.startswith("model.bert.") for name in groups[1])
    still = set(held) - after.moved(module)
    assert all(is_idle(name) for name in still), still
    # Lightning itself leaves a thawed backbone frozen on resuming; its groups it restores.
    again, resumed = trainer(quiet(), finetuning(epoch)), Backbone()
    again.fit(resumed, ckpt_path=tmp_path / f"{epoch}.ckpt", weights_only=True)
    assert parameter_names(again.optimizers, resumed) == [groups]
    assert size(resumed.state_dict()) == size(module.state_dict()) < BUILT


def test_frozen_layers_are_cut_and_stay_frozen():
    module, after = Module(), AfterCut()
    module.model.bert.encoder.layer[0].requires_grad_(False)
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    _, prune = run(module, after)
    is_cut_and_clean(module, prune)
    assert {n for n, p in module.named_parameters() if not p.requires_grad} == frozen
    still = {n for n, _ in module.named_parameters()} - after.moved(module)
    assert frozen <= still
    assert all(is_idle(name) for name in still - frozen)


class Tied(Module):
    def __init__(self):
        super().__init__()
        self.model = build("bert", "masked-lm")

    def loss(self, batch):
        return self.model(**{**batch, "labels": batch["input_ids"]}).loss

    training_step = Classifier.training_step
    validation_step = Classifier.validation_step


def test_tied_weights_stay_tied(tmp_path):
    module, after, best = Tied(), AfterCut(), keep(tmp_path, monitor="val_loss")

    def tied(module):
        return module.model.cls.predictions.decoder.weight is (
            module.model.bert.embeddings.word_embeddings.weight
        )

    assert tied(module)
    fitted, prune = run(module, after, best, enable_checkpointing=True)
    is_cut_and_clean(module, prune)
    assert tied(module)
    held = [id(p) for group in fitted.optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    assert "model.bert.embeddings.word_embeddings.weight" in after.moved(module)
    fitted.test(module, ckpt_path="best", weights_only=True, verbose=False)
    assert tied(module)


class Groups(Module):
    def configure_optimizers(self):
        named = list(self.named_parameters())
        ffn = [p for n, p in named if "intermediate" in n or "output.dense" in n]
        heads = [p for n, p in named if "attention.self" in n]
        taken = {id(p) for p in (*ffn, *heads)}
        rest = [p for _, p in named if id(p) not in taken]
        return torch.optim.AdamW(
            [
                {"params": ffn, "lr": 1e-2, "weight_decay": 0.0},
                {"params": heads, "lr": 1e-3, "betas": (0.8, 0.9)},
                {"params": rest, "name": "mine"},
            ],
            lr=1e-4,
        )


def test_parameter_groups_keep_their_members_and_rates():
    def numbers(optimizer):
        return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]

    module, after = Groups(), AfterCut()
    start = module.configure_optimizers()
    members, options = parameter_names([start], module), numbers(start)
    fitted, prune = run(module, after)
    is_cut_and_clean(module, prune)
    assert parameter_names(fitted.optimizers, module) == members
    assert numbers(fitted.optimizers[0]) == options
    still = {n for n, _ in module.named_parameters()} - after.moved(module)
    assert all(is_idle(name) for name in still), still


def with_adapters():
    module = Module()
    options = peft.LoraConfig(target_modules=["query", "value"])
    module.model = peft.get_peft_model(module.model, options)
    return module


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_are_refused_with_the_remedy():
    module, after = with_adapters(), AfterCut(0)
    with pytest.raises(PruningError, match=r"query' is a peft.*merge_and_unload"):
        run(module, after)
    assert after.then == {}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_merged_adapters_are_pruned():
    module = with_adapters()
    module.model = module.model.merge_and_unload().requires_grad_(True)
    _, prune = run(module)
    is_cut_and_clean(module, prune)


def bare(kind):
    """A strategy whose own package is not installed."""
    return object.__new__(kind)


class Unknown(Strategy):
    pass


Unknown.__abstractmethods__ = frozenset()

REFUSED = {
    "FSDPStrategy shards parameters": FSDPStrategy,
    "ModelParallelStrategy shards parameters": ModelParallelStrategy,
    "DeepSpeedStrategy keeps its own flat copies": lambda: bare(DeepSpeedStrategy),
    "XLAStrategy compiles the model": lambda: bare(XLAStrategy),
    "DDPStrategy with start method 'spawn'": lambda: DDPStrategy(start_method="spawn"),
    "DDPStrategy with start method 'fork'": lambda: DDPStrategy(start_method="fork"),
    "DDPStrategy with start method 'forkserver'": lambda: DDPStrategy(start_method="forkserver"),
    "Unknown is not known to survive a cut": Unknown,
}


@pytest.mark.parametrize("message", REFUSED)
def test_strategies_that_cannot_be_pruned_are_refused_in_one_sentence(message):
    fake = SimpleNamespace(strategy=REFUSED[message](), callbacks=[])
    with pytest.raises(MisconfigurationException, match=message) as caught:
        refuse_unsupported(fake)
    said = str(caught.value)
    assert "Trainer(strategy='ddp')" in said
    assert said.count(". ") == 0
    assert said.endswith(".")


@pytest.mark.parametrize("name", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_a_trainer_with_a_forking_strategy_is_refused(name):
    with pytest.raises(MisconfigurationException, match="copies the weights of its processes"):
        refuse_unsupported(trainer(strategy=name, devices=2))


@pytest.mark.parametrize("make", [lambda: SingleDeviceStrategy("cpu"), DDPStrategy])
def test_strategies_that_can_be_pruned_are_not_refused(make):
    refuse_unsupported(SimpleNamespace(strategy=make(), callbacks=[]))


def test_a_run_that_saves_nothing_after_the_last_cut_says_so(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="val_loss", every_n_epochs=2)
    with pytest.warns(UserWarning, match="'val_loss'.* saved no model of the final size"):
        fit(
            tmp_path,
            pruning={"cuts": 1, "last_epoch": 2, "first_epoch": 2},
            callbacks=[keep],
            enable_checkpointing=True,
            max_epochs=3,
        )
