"""Everything else that sits in a Trainer, beside the callback, in real runs."""

from __future__ import annotations

import contextlib
import io
import math
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
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

from lightning_mi_prune import MutualInformationPruning, PruningError, find_axes
from lightning_mi_prune.callbacks.companions import restart_comparison
from lightning_mi_prune.callbacks.run import run_length
from lightning_mi_prune.strategies import refuse_unsupported
from tests.boring import Classifier, Sentences, trainer
from tests.conftest import count_hooks
from tests.models import build
from tests.runs import PRECISIONS, Batches, Module

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),
]

BUILT, FINAL = 40, 20  # neurons of a layer in the runs below, which cut at epochs 1 and 2 of 4


def quiet(sparsity: float = 0.5, **options):
    defaults = {"multiple": 2, "ramp": "linear", "verbose": False}
    return MutualInformationPruning(sparsity, **{**defaults, **options})


class Graded(Module):
    """Logs, as ``score``, one number of a list after each epoch: the user's metric, scripted."""

    def __init__(self, scores=(0.0, 1.0, 2.0, 3.0), **options):
        super().__init__(**options)
        self.scores = scores

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.log("score", self.scores[min(self.current_epoch, len(self.scores) - 1)])


def run(module, *callbacks, prune=None, first=True, **options):
    """Fit with pruning before (or after) the other callbacks."""
    prune = quiet() if prune is None else prune
    order = [prune, *callbacks] if first else [*callbacks, prune]
    fitted = trainer(*order, **{"num_sanity_val_steps": 0, **options})
    fitted.fit(module)
    return fitted, prune


def width(state):
    return len(state["model.bert.encoder.layer.0.intermediate.dense.bias"])


def stored(path):
    return width(torch.load(path, weights_only=True)["state_dict"])


def widths(module, kind="ffn"):
    axes = [a for a in find_axes(module) if a.kind == kind]
    return [module.get_parameter(a.slices[0].tensor).shape[0] // a.entries for a in axes]


def is_cut_and_clean(module, prune, epochs=(1, 2)):
    assert widths(module) == [FINAL, FINAL]
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


@pytest.mark.parametrize("mode", SIGNS)
@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_best_checkpoint_is_of_the_final_size(tmp_path, mode, top):
    """Although the first epochs, of the big model, log better numbers."""
    module = Graded([SIGNS[mode] * score for score in (0, 1, 2, 3)])
    best, files = keep(tmp_path, mode, save_top_k=top), Files(tmp_path)
    fitted, prune = run(module, best, files, enable_checkpointing=True)
    is_cut_and_clean(module, prune)
    assert Path(best.best_model_path).stem == "epoch=2"
    assert best.best_model_score == SIGNS[mode] * 2
    assert stored(best.best_model_path) == FINAL
    assert files.look() == {f"epoch={e}" for e in {1: (2,), 2: (2, 3), 3: (1, 2, 3)}[top]}
    assert {str(p) for p in tmp_path.glob("*.ckpt")} == set(best.best_k_models)
    assert all(files.after_first()), "a moment without a checkpoint"
    for earlier, later in zip(files.seen, files.seen[1:], strict=False):
        kept, fresh = earlier & later, later - earlier
        assert all(k > gone for k in kept for gone in earlier - later), "not the oldest first"
        assert len(fresh) <= 1
    fitted.test(module, ckpt_path="best", weights_only=True, verbose=False)
    assert widths(module) == [FINAL, FINAL]
    fresh = Graded()
    trainer(quiet()).test(fresh, ckpt_path=best.best_model_path, weights_only=True, verbose=False)
    assert widths(fresh) == [FINAL, FINAL]


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
    assert found["epoch=1"] == BUILT > found["epoch=3"] > found["epoch=5"] == FINAL
    assert Path(best.best_model_path).stem == "epoch=5"


def test_any_size_lets_the_big_model_win(tmp_path):
    best, module = keep(tmp_path), Graded()
    run(module, best, prune=quiet(best_of="any_size"), enable_checkpointing=True)
    assert Path(best.best_model_path).stem == "epoch=0"
    assert stored(best.best_model_path) == BUILT
    assert len(list(tmp_path.glob("*.ckpt"))) == 1


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("last", [True, "link"])
def test_the_last_checkpoint_and_those_without_monitor_are_untouched(tmp_path, last, weights_only):
    def names(*callbacks):
        folder = tmp_path / str(len(callbacks))
        common = {"save_weights_only": weights_only, "filename": "{epoch}"}
        plain = ModelCheckpoint(dirpath=folder / "plain", save_last=last, **common)
        every = ModelCheckpoint(
            dirpath=folder / "all", save_top_k=-1, **common, every_n_train_steps=4
        )
        best = keep(folder / "best", save_last=last, save_weights_only=weights_only)
        trainer(*callbacks, plain, every, best, enable_checkpointing=True).fit(Graded())
        paths = [p for p in folder.rglob("*.ckpt") if p.parent.name != "best"]
        found = {str(p.relative_to(folder)) for p in paths}
        return found, folder, (plain, every, best)

    without, _, _ = names()
    found, folder, (plain, every, best) = names(quiet())
    assert found == without
    assert plain.best_model_path == str(folder / "plain" / "epoch=3.ckpt")
    assert [stored(folder / "all" / f"epoch={e}.ckpt") for e in (0, 3)] == [BUILT, FINAL]
    for checkpoint in (plain, best):
        assert stored(checkpoint.last_model_path) == FINAL
    assert stored(best.best_model_path) == FINAL
    fresh = Graded()
    trainer(quiet()).test(fresh, ckpt_path=best.last_model_path, weights_only=True, verbose=False)
    assert widths(fresh) == [FINAL, FINAL]


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
    files = Files(tmp_path)
    run(Graded(), best, files, enable_checkpointing=True)
    assert stored(best.best_model_path) == FINAL
    assert all(files.after_first())
    assert [str(p) for p in tmp_path.glob("*.ckpt")] == [best.best_model_path]


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("best_of", ["final_size", "each_size", "any_size"])
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
    run(Graded(), straight, prune=quiet(**prune), **common)
    with pytest.raises(KeyError, match="the machine"):
        run(Graded(), Crash(), broken, prune=quiet(**prune), first=False, **common)
    assert stored(broken.last_model_path) == (BUILT, 30)[epoch]
    again, module = trainer(quiet(**prune), resumed, **common), Graded()
    again.fit(module, ckpt_path=broken.last_model_path, weights_only=True)
    assert widths(module) == [FINAL, FINAL]
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
@pytest.mark.parametrize("at_end", [True, False, None])
@pytest.mark.parametrize("patience", [1, 2])
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
    lasted = ran(stopping, first=first, module=Loud(), last=4, check_val_every_n_epoch=2)
    assert lasted == (5, [2, 4])
    assert stopping.stopping_threshold == 9.0


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
    assert prune.plan.is_full
    assert prune.report.cuts == []
    assert widths(module) == [BUILT, BUILT]
    assert count_hooks(module) == 0
    assert prune._listener is None
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
    assert widths(module) == [FINAL, FINAL]
    last = prune.report.cuts[-1].epoch
    assert fitted.global_step == steps
    assert last <= run_length(fitted) / 2 + 1e-9
    assert math.ceil(run_length(fitted)) == fitted.current_epoch + (fitted.global_step < 0)


@pytest.mark.parametrize("accumulate", [3, 4])
def test_no_gradient_crosses_a_cut(accumulate):
    """The step after the cut is that of a run whose gradients were cleared at the epoch's start."""

    def weights(*extra):
        module = Module()
        run(module, *extra, accumulate_grad_batches=accumulate, max_epochs=3)
        return module.state_dict()

    class Clear(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                assert all(p.grad is None or not p.grad.any() for p in pl_module.parameters())
                pl_module.zero_grad(set_to_none=True)

    one, two = weights(), weights(Clear())
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
