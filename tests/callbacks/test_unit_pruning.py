from __future__ import annotations

import copy
import math
from itertools import pairwise

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_mi_prune import MutualInformationPruning, PruningError
from lightning_mi_prune.allocation.budget import sparsity_of
from lightning_mi_prune.allocation.latency import Device, LatencyTable
from tests.conftest import count_hooks
from tests.support.boring import Classifier, Sentences, trainer
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, batch, entries_of, outputs
from tests.support.pruning import made, pruning_units, records

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def quiet(sparsity: float | None = 0.5, **options):
    return pruning_units(sparsity, verbose=False, **options)


def even(sparsity: float = 0.5, **options):
    """The same share everywhere: widths that a test can name."""
    return quiet(sparsity, widths="uniform", **options)


class Recorder(MutualInformationPruning):
    """Notes what each decision was made from."""

    def __init__(self, *args, **options):
        super().__init__(*args, verbose=False, **records(MutualInformationPruning, options))
        self.counts, self.gradients, self.rows = [], [], []
        decide = self.engine.strategy.decide

        def noting(session, data, goal):
            self.counts.append({int(m.count) for m in data.moments.values()})
            self.gradients.append({tuple(g.counts.tolist()) for g in data.gradients.values()})
            self.rows.append([sum(c.rows for c in rank["model"]) for rank in data.ranks])
            return decide(session, data, goal)

        self.engine.strategy.decide = noting


def present(callback):
    return {
        group.name: callback.plan.width(group.name) for group in callback.engine.strategy.chosen
    }


def widths(module, kind):
    groups = [a for a in groups_of(module) if a.kind == kind]
    return [module.get_parameter(a.tensors[0].tensor).shape[0] // entries_of(a) for a in groups]


@pytest.mark.parametrize("family", CONFIGS)
def test_one_line_makes_the_model_smaller(family):
    module, callback = Classifier(family=family), quiet(0.5)
    before = sum(p.numel() for p in module.parameters())
    run = trainer(callback, max_epochs=2)
    run.fit(module)
    assert sum(widths(module, "heads")) < 8
    assert sum(widths(module, "ffn")) < 80
    assert sum(p.numel() for p in module.parameters()) < before
    assert callback.plan is not None
    assert set(callback.plan.rankings) == {group.name for group in callback.engine.strategy.chosen}
    assert 0.5 <= run.callback_metrics["prune/sparsity"] < 0.6


@pytest.mark.parametrize("shape", ["global", "uniform"])
def test_the_ramp_is_nested_and_ends_where_one_shot_ends(shape):
    gradual, at_once = Classifier(), Classifier()
    seen = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(dict(callback.plan.kept))

    callback = quiet(0.6, multiple=2, ramp="linear", cuts=4, widths=shape)
    trainer(callback, Watch(), max_epochs=8).fit(gradual)
    trainer(quiet(0.6, multiple=2, ramp="one_shot", widths=shape), max_epochs=2).fit(at_once)
    for earlier, later in pairwise(seen):
        assert all(set(later[name]) <= set(earlier[name]) for name in later)
    assert len({str(kept) for kept in seen}) == 5
    if shape == "uniform":
        for kind in ("ffn", "heads"):
            assert widths(gradual, kind) == widths(at_once, kind)
    epochs = [cut.epoch for cut in callback.report.cuts]
    assert epochs == [1, 2, 3, 4]
    sparsities = [cut.sparsity for cut in callback.report.cuts]
    assert sparsities == sorted(sparsities)
    assert 0.6 <= sparsity_of(callback.engine.strategy.chosen, present(callback)) < 0.63


def test_every_cut_leaves_widths_that_the_config_says(tmp_path):
    module, seen = Classifier(), []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append({*widths(pl_module, "ffn")})
            assert seen[-1] == {pl_module.model.config.intermediate_size}
            assert widths(pl_module, "heads") == [4, 4]

    callback = quiet(0.4, multiple=2, ramp="linear", cuts=2, widths="config")
    trainer(callback, Watch(), max_epochs=4).fit(module)
    assert [len(each) for each in seen] == [1, 1, 1, 1]
    assert 40 == min(seen[0]) > min(seen[1]) > min(seen[2]) == min(seen[3])
    assert callback.report.cuts[-1].sparsity >= 0.4
    module.model.save_pretrained(tmp_path)
    again = type(module.model).from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, batch()), outputs(module.model, batch()))


def test_weights_are_cut_at_the_start_of_the_epoch_and_not_before():
    """Score, weights and shape of an epoch belong together."""
    sizes = []

    class Watch(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            sizes.append(("validation", widths(pl_module, "ffn")[0]))

        def on_train_epoch_end(self, trainer, pl_module):
            sizes.append(("end", widths(pl_module, "ffn")[0]))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                sizes.append(("first batch", widths(pl_module, "ffn")[0]))

    trainer(even(0.5), Watch(), max_epochs=3, num_sanity_val_steps=0).fit(Classifier())
    assert sizes[:3] == [("first batch", 40), ("validation", 40), ("end", 40)]
    assert sizes[3:6] == [("first batch", 16), ("validation", 16), ("end", 16)]


def test_until_the_first_cut_nothing_differs_from_a_run_without_the_callback():
    """Listening draws no random number of the run and touches no weight."""
    losses = {}

    class Watch(pl.Callback):
        def __init__(self, name):
            self.losses = losses.setdefault(name, [])

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.losses.append(outputs["loss"].item())

    torch.manual_seed(3)
    trainer(Watch("with"), quiet(0.5), max_epochs=4).fit(Classifier())
    torch.manual_seed(3)
    trainer(Watch("without"), max_epochs=4).fit(Classifier())
    assert losses["with"][:4] == losses["without"][:4]
    assert losses["with"][4:] != losses["without"][4:]


@pytest.mark.parametrize(
    "kind", ["adamw", "adam-fused", "sgd-momentum", "rmsprop"], ids=lambda kind: kind
)
def test_every_live_parameter_is_in_the_optimizer_once_and_moves(kind):
    make = {
        "adamw": torch.optim.AdamW,
        "adam-fused": lambda p, lr: torch.optim.Adam(p, lr=lr, fused=True),
        "sgd-momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        "rmsprop": torch.optim.RMSprop,
    }[kind]
    after_cut = {}

    class Watch(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            self.optimizer, self.inner = pl_module.optimizers(), trainer.optimizers[0]
            if trainer.current_epoch == 1:
                after_cut.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    module, watch = Classifier(optimizer=make, lr=1e-2), Watch()
    frozen = {
        f"model.bert.encoder.layer.0.{n}"
        for n, _ in module.model.bert.encoder.layer[0].named_parameters()
    }
    module.model.bert.encoder.layer[0].requires_grad_(False)
    run = trainer(quiet(0.5), watch, max_epochs=2)
    run.fit(module)
    (optimizer,) = run.optimizers
    assert watch.inner is optimizer
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    for name, parameter in module.named_parameters():
        # A key's bias shifts all scores of a query alike: its gradient is rounding.
        if "key.bias" in name or "token_type" in name or "position" in name:
            continue
        assert torch.equal(parameter, after_cut[name]) == (name in frozen), name
    for parameter, state in optimizer.state.items():
        assert all(
            v.shape == parameter.shape
            for v in state.values()
            if isinstance(v, torch.Tensor) and v.ndim
        )


def test_the_learning_rate_goes_on_as_if_nothing_had_happened(tmp_path):
    def rates(*callbacks):
        seen = []

        class Watch(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        monitor = LearningRateMonitor(logging_interval="step")
        run = trainer(*callbacks, Watch(), monitor, max_epochs=4, logger=CSVLogger(tmp_path))
        run.fit(Classifier())
        return seen

    assert rates(quiet(0.5)) == rates()


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"val_check_interval": 2},
        {"val_check_interval": 0.25},
        {"limit_val_batches": 3},
        {"limit_val_batches": 0.5},
        {"num_sanity_val_steps": 0},
        {"gradient_clip_val": 1.0},
        {"check_val_every_n_epoch": 2, "max_epochs": 6},
        {"max_epochs": -1, "max_steps": 10},
        {"max_steps": 100},
        {"limit_train_batches": 2},
        {"reload_dataloaders_every_n_epochs": 1},
        {"inference_mode": False},
        {"accumulate_grad_batches": 3, "max_epochs": -1, "max_steps": 5},
        {"detect_anomaly": True},
    ],
    ids=str,
)
def test_trainer_options(options):
    module, callback = Classifier(validation_rows=256), even(0.5)
    trainer(callback, **options).fit(module)
    assert widths(module, "ffn") == [16, 16]
    assert widths(module, "heads") == [2, 2]
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert count_hooks(module) == 0


def test_several_validation_loaders_are_all_heard():
    class Two(Classifier):
        def val_dataloader(self):
            loader = super().val_dataloader()
            return [loader, loader]

        def validation_step(self, batch, index, dataloader_idx=0):
            super().validation_step(batch, index)

    recorder = Recorder(0.5)
    trainer(recorder, max_epochs=2).fit(Two(validation_rows=128))
    assert recorder.counts == [{2 * 128 * 12}]


def test_the_last_validation_of_the_epoch_counts_alone():
    recorder = Recorder(0.5)
    trainer(recorder, max_epochs=2, val_check_interval=1).fit(Classifier(validation_rows=128))
    assert recorder.counts == [{128 * 12}]
    assert recorder.gradients == [{(64, 4, 0)}]


def test_positions_bound_what_is_heard():
    recorder = Recorder(0.5, positions=800, reconstruction_positions=480, gradient_steps=2)
    trainer(recorder, max_epochs=2).fit(Classifier())
    assert recorder.counts == [{800}]
    assert recorder.rows == [[480 / 12]]
    assert recorder.gradients == [{(32, 2, 0)}]


def test_fast_dev_run_listens_and_cuts_nothing():
    module = Classifier()
    trainer(quiet(0.5), fast_dev_run=True).fit(module)
    assert widths(module, "ffn") == [40, 40]
    assert count_hooks(module) == 0


def test_the_sanity_check_is_not_heard():
    module, callback = Classifier(), quiet(0.5)

    class Watch(pl.Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            assert count_hooks(pl_module) == 0
            assert callback.engine.recorder is None

    trainer(callback, Watch(), num_sanity_val_steps=2, max_epochs=2).fit(module)
    assert len(callback.report.cuts) == 1


@pytest.mark.parametrize("where", ["validation", "training"])
def test_hooks_are_gone_after_an_exception(where):
    class Failing(Classifier):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            if where == "validation" and not self.trainer.sanity_checking:
                assert count_hooks(self) > 0
                raise RuntimeError("the user's own bug")

        def training_step(self, batch, index):
            if where == "training" and self.current_epoch == 1:
                raise RuntimeError("the user's own bug")
            return super().training_step(batch, index)

    module = Failing()
    with pytest.raises(RuntimeError, match="the user's own bug"):
        trainer(quiet(0.5)).fit(module)
    assert count_hooks(module) == 0


def test_validate_alone_is_not_heard_and_test_follows_fit():
    module, callback = Classifier(), quiet(0.5)
    run = trainer(callback, max_epochs=2)
    run.fit(module)
    cuts = len(callback.report.cuts)
    run.validate(module, verbose=False)
    run.test(module, verbose=False)
    assert len(callback.report.cuts) == cuts
    assert count_hooks(module) == 0


def test_a_second_fit_goes_on_from_the_smaller_model():
    module = Classifier()
    trainer(quiet(0.3, multiple=2), max_epochs=2).fit(module)
    first = widths(module, "ffn")
    second = quiet(0.6, multiple=2)
    trainer(second, max_epochs=2).fit(module)
    assert widths(module, "ffn") < first
    assert second.plan.sizes["model.bert.encoder.layer.0.ffn"] == 40
    assert sparsity_of(second.engine.strategy.chosen, present(second)) >= 0.6
    third = quiet(0.3)
    trainer(third, max_epochs=2).fit(module)
    assert third.report.cuts == []


def test_only_what_was_asked_for_is_cut():
    module = Classifier()
    trainer(even(0.4, kinds=["ffn"], exclude=r"layer\.0"), max_epochs=2).fit(module)
    assert widths(module, "ffn") == [40, 24]
    assert widths(module, "heads") == [4, 4]
    both = nn.ModuleDict({"a": Classifier().model, "b": Classifier().model})

    class Pair(Classifier):
        def __init__(self):
            super().__init__()
            self.model, self.pair = None, both

        def loss(self, batch):
            return self.pair["a"](**batch).loss + self.pair["b"](**batch).loss

    module = Pair()
    trainer(even(0.5, module="pair.b", kinds=["ffn", "heads", "pooler"]), max_epochs=2).fit(module)
    assert widths(module.pair["a"], "ffn") == [40, 40]
    assert widths(module.pair["b"], "ffn") == [16, 16]
    assert widths(module.pair["b"], "pooler") == [16]


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_sublayers_that_vanish_are_refitted_too(family):
    """What is left of them is a bias: the mean of what they said, past what the stream lost."""
    module = Classifier(family=family)
    first = r"(layer|groups)\.0\.(albert_layers\.0\.)?(attention\.)?(heads|ffn)$"
    callback = quiet(0.5, pins={first: 0})
    trainer(callback, max_epochs=2).fit(module)
    gone = [name for name, kept in callback.plan.kept.items() if not kept]
    assert len(gone) == 2
    assert callback.report.cuts[0].seconds["reconstruction"] > 0
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_each_cut_logs_and_prints_one_table(tmp_path, capsys):
    logger = CSVLogger(tmp_path)
    callback = MutualInformationPruning(0.5)
    run = trainer(callback, max_epochs=2, logger=logger)
    run.fit(Classifier())
    logger.save()
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    names = {
        "prune/parameters",
        "prune/sparsity",
        "prune/macs",
        "prune/information_kept",
        "prune/width/model.bert.encoder.layer.0.ffn",
    }
    assert names <= set(header.split(","))
    printed = capsys.readouterr().out
    assert printed.count("Cut at epoch 1") == 1
    assert "1.ffn" in printed
    (cut,) = callback.report.cuts
    steps = {"discovery", "calibration", "gradients", "ranking", "reconstruction", "surgery"}
    assert set(cut.seconds) == steps
    assert 0 < cut.information_kept < 1
    assert cut.macs < callback.report.macs
    assert cut.parameters == sum(p.numel() for p in run.lightning_module.parameters())
    assert [group.before for group in cut.groups if group.kind == "ffn"] == [40, 40]


def test_a_pruned_checkpoint_loads_into_a_fresh_module_and_can_grow_back(tmp_path):
    keep = ModelCheckpoint(
        dirpath=tmp_path, save_top_k=-1, filename="{epoch}", save_weights_only=True
    )
    module, callback = Classifier(), even(0.5)
    run = trainer(callback, keep, max_epochs=3, enable_checkpointing=True)
    run.fit(module)
    small = copy.deepcopy(module.state_dict())
    run.test(module, ckpt_path=str(tmp_path / "epoch=0.ckpt"), weights_only=True, verbose=False)
    assert widths(module, "ffn") == [40, 40]
    fresh = Classifier()
    trainer(quiet(0.5)).test(
        fresh, ckpt_path=str(tmp_path / "epoch=2.ckpt"), weights_only=True, verbose=False
    )
    assert widths(fresh, "ffn") == [16, 16]
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, small[name])


def fit_with(module=None, options=None, *callbacks, **trainer_options):
    def run():
        target = Classifier() if module is None else module()
        trainer(quiet(**(options or {})), *callbacks, **{"max_epochs": 4, **trainer_options}).fit(
            target
        )

    return run


class NoValidation(Classifier):
    val_dataloader = pl.LightningModule.val_dataloader
    validation_step = pl.LightningModule.validation_step


class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def training_step(self, batch, index):
        return self.layer(torch.ones(1, 2)).sum()

    def validation_step(self, batch, index):
        self.layer(torch.ones(1, 2))

    configure_optimizers = Classifier.configure_optimizers
    optimizer, lr = torch.optim.AdamW, 0.1

    train_dataloader = val_dataloader = Classifier.test_dataloader


class NotANumber(Classifier):
    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.model.bert.encoder.layer[1].intermediate.dense.bias.data[3] = float("nan")


class Unheard(Classifier):
    """Trains on losses of another network."""

    def __init__(self):
        super().__init__()
        self.beside = nn.Linear(1, 1)

    def training_step(self, batch, index):
        return self.beside(torch.ones(1, 1)).sum()


class Overflowing(Classifier):
    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        return loss * (math.inf if index == 2 else 1)

    def on_after_backward(self):
        for parameter in self.parameters():  # the weights survive it
            parameter.grad.nan_to_num_(0, 0, 0)


class Silent(Classifier):
    def validation_step(self, batch, index):
        return None


class History(Classifier):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters())


class Compiled(Classifier):
    def __init__(self):
        super().__init__()
        self.model = torch.compile(self.model)


TABLE = LatencyTable(Device("cpu", "another processor", 1, "2.9.0", "float32"), 1, 12, 5.0, ())

BAD_RUNS = [
    (fit_with(max_epochs=1), "lasts 1 epoch; expected at least 2"),
    (fit_with(max_epochs=-1, max_steps=7), "lasts 1.75 epochs"),
    (fit_with(max_epochs=-1, max_steps=-1), "length of the run is not known"),
    (fit_with(options={"last_epoch": 4}), "last_epoch=4 leaves no epoch to recover"),
    (fit_with(options={"first_epoch": 3}), "first_epoch=3 comes after the last cut at epoch 2"),
    (fit_with(options={"cuts": 3}), "cuts=3, but only the epochs"),
    (fit_with(check_val_every_n_epoch=3), "No validation runs before and after epochs 1 to 2"),
    (fit_with(NoValidation), "this run has none"),
    (fit_with(limit_val_batches=0), "this run has none"),
    (fit_with(Plain), "Nothing of Plain can be pruned"),
    (fit_with(options={"sparsity": 0.99, "floor": 0.05}), "sparsity=0.99 is out of reach"),
    (fit_with(options={"sparsity": 0.99, "widths": "uniform"}), "sparsity=0.99 is out of reach"),
    (
        fit_with(options={"sparsity": None, "target_parameters": 100}),
        "target_parameters=100 is out of reach: .* no fewer than .* parameters can be reached",
    ),
    (
        fit_with(options={"sparsity": None, "target_parameters": 10**9}),
        "target_parameters=1000000000, but the module has .* as built: nothing to cut",
    ),
    (
        fit_with(options={"floors": {"decoder": 2}}),
        "floors: 'decoder' matches no group; the names look like",
    ),
    (
        fit_with(options={"pins": {r"0\.ffn": 41}}),
        "asks for a pinned width of 41 units, above the 40 that .*0.ffn' has as built; lower it",
    ),
    (
        fit_with(options={"pins": {r"0\.ffn": 8}, "floors": {"ffn": 16}}),
        "is pinned to 8 units, below its floor of 16 .*; change one of them",
    ),
    (
        fit_with(
            options={"sparsity": None, "target_latency_ms": 1.0, "latency_table": "latency.json"}
        ),
        "latency table was measured on .*another processor.*, but this is .*: measure",
    ),
    (fit_with(Unheard), "relevance='gradient' needs training steps, but there were none at"),
    (fit_with(Overflowing), "NaN or infinite gradients at .* in 1 of 4 training steps"),
    (fit_with(options={"module": "encoder"}), "module='encoder' is not part of"),
    (fit_with(options={"include": "decoder"}), "include='decoder' matches no group"),
    (fit_with(options={"exclude": "decoder"}), "exclude='decoder' matches no group"),
    (fit_with(options={"exclude": "model"}), "Nothing is left to prune"),
    (fit_with(options={"kinds": ["neurons"]}), "names 'neurons'"),
    (fit_with(lambda: Classifier(validation_rows=2)), "Only .* at .* but scoring against"),
    (fit_with(NotANumber), "NaN or infinite activations at 'model.bert.encoder.layer.1.ffn'"),
    (fit_with(Silent), "No activations were collected at"),
    (fit_with(History), "LBFGS keeps a history"),
    (fit_with(Compiled), "compiled for the uncut shape"),
    (
        fit_with(None, None, StochasticWeightAveraging(1e-2)),
        "StochasticWeightAveraging cannot run beside",
    ),
    (fit_with(None, None, EMAWeightAveraging()), "EMAWeightAveraging cannot run beside"),
    (
        fit_with(None, None, ModelPruning("l1_unstructured", amount=0.5)),
        "ModelPruning cannot run beside",
    ),
    (
        fit_with(None, None, MutualInformationPruning(0.3)),
        "more than one stateful callback of type",
    ),
]


@pytest.mark.parametrize(("run", "message"), BAD_RUNS, ids=[m for _, m in BAD_RUNS])
def test_runs_that_cannot_be_pruned_are_refused(run, message, monkeypatch, tmp_path):
    cuts = []
    monkeypatch.chdir(tmp_path)
    TABLE.write("latency.json")
    monkeypatch.setattr(
        "lightning_mi_prune.callbacks.engine.cut_model", lambda *a, **k: cuts.append(a)
    )
    with pytest.raises((MisconfigurationException, PruningError, RuntimeError), match=message):
        run()
    assert cuts == []


@pytest.mark.parametrize(
    "sabotage", [NotANumber, lambda: Classifier(validation_rows=2), Unheard, Overflowing]
)
def test_a_refused_cut_leaves_model_and_optimizer_as_they_were(sabotage):
    module = sabotage()
    run = trainer(quiet(0.5))
    with pytest.raises(PruningError):
        run.fit(module)
    assert widths(module, "ffn") == [40, 40]
    held = [p for g in run.optimizers[0].param_groups for p in g["params"]]
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True))
    assert module.model.config.intermediate_size == 40
    assert count_hooks(module) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0}, "sparsity=0; expected a number above 0 and below 1"),
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": math.nan}, "sparsity=nan"),
        ({"sparsity": "half"}, "sparsity='half'"),
        ({"sparsity": True}, "sparsity=True"),
        ({"floor": 1.0}, "floor=1.0"),
        ({"floor": -1}, "floor=-1"),
        ({"multiple": 0}, "multiple=0; expected a whole number of at least 1"),
        ({"multiple": 2.5}, "multiple=2.5"),
        ({"positions": 1}, "positions=1"),
        ({"cuts": 0}, "cuts=0"),
        ({"first_epoch": 0}, "first_epoch=0"),
        ({"last_epoch": 0}, "last_epoch=0"),
        ({"first_epoch": 3, "last_epoch": 2}, "first_epoch=3 comes after last_epoch=2"),
        ({"first_epoch": 3, "last_epoch": 4, "cuts": 3}, "cuts=3 do not fit into epochs 3 to 4"),
        ({"ramp": "one_shot", "cuts": 2}, "makes one cut, but cuts=2"),
        ({"ramp": "slow"}, "ramp='slow'"),
        ({"selection": "greedy"}, "selection='greedy'"),
        ({"seed": None}, "seed=None; expected a whole number"),
        ({"seed": -1}, "seed=-1"),
        ({"include": 3}, "include=3; expected text or None"),
        ({"module": 3}, "module=3; expected text or None"),
        ({"include": "("}, r"include='\(' is not a regular expression"),
        ({"exclude": "["}, r"exclude='\[' is not a regular expression"),
        ({"kinds": []}, r"kinds=\[\]"),
        ({"kinds": "ffn"}, "kinds='ffn'; expected a list"),
        (
            {"sparsity": 0.5, "target_macs": 10_000},
            "budget of sparsity=0.5 and target_macs=10000; expected exactly one of sparsity, ",
        ),
        (
            {"target_parameters": 10, "keep_information": 0.9},
            "target_parameters=10 and keep_information=0.9; expected exactly one",
        ),
        ({"target_parameters": 0}, "target_parameters=0; expected a whole number of at least 1"),
        ({"target_macs": 1e6}, "target_macs=1000000.0; expected a whole number"),
        ({"target_latency_ms": 0}, "target_latency_ms=0; expected a number above 0"),
        ({"keep_information": 1}, "keep_information=1; expected a number above 0 and below 1"),
        ({"widths": "free"}, r"widths='free'; expected one of \('global', 'uniform', 'config'\)"),
        ({"relevance": "labels"}, "relevance='labels'; expected one of .*'gradient', 'weights'"),
        ({"gradient_steps": 0}, "gradient_steps=0; expected a whole number of at least 1"),
        ({"method": None}, "method=None; expected one of .*'layerwise', 'compensation'"),
        (
            {"reconstruction_positions": 1},
            "positions=1; expected a whole number of at least 2",
        ),
        ({"latency_batch": 0}, "batch=0; expected a whole number of at least 1"),
        ({"latency_table": 3}, "table=3; expected the path of a JSON file, or None"),
        ({"floors": {"(": 0.5}}, r"floors: '\(' is not a regular expression"),
        ({"caps": {3: 0.5}}, "caps: 3 is not text; expected a regular expression"),
        ({"floors": {"ffn": 1.5}}, "floors: 'ffn' is 1.5; expected a whole number of units, or a"),
        ({"caps": {"ffn": -1}}, "caps: 'ffn' is -1; expected a whole number of units, or a share"),
        ({"pins": {"ffn": None}}, "pins: 'ffn' is None; expected a whole number of units, or a"),
        ({"pins": ["ffn"]}, r"pins=\['ffn'\]; expected a mapping"),
        ({"best_of": "all"}, "best_of='all'; expected one of"),
    ],
    ids=str,
)
def test_options_are_checked_when_they_are_given(options, message):
    with pytest.raises((MisconfigurationException, PruningError), match=message):
        pruning_units(**options)


def test_a_cut_that_never_came_is_said():
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    with pytest.warns(UserWarning, match="ended after 1 of 4 cuts"):
        trainer(quiet(0.6, cuts=4), Stop(), max_epochs=8).fit(Classifier())


def test_a_late_validation_delays_the_cut_and_says_so():
    class Sparse(Classifier):
        def train_dataloader(self):
            return torch.utils.data.DataLoader(Sentences(64), batch_size=16)

    module = Sparse()
    with pytest.warns(UserWarning, match="The cut of epoch . waits"):
        trainer(even(0.5), max_epochs=6, val_check_interval=8, check_val_every_n_epoch=None).fit(
            module
        )
    assert widths(module, "ffn") == [16, 16]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_two_fits_with_two_callbacks_load_again(tmp_path):
    module = Classifier()
    trainer(quiet(0.3, multiple=2), max_epochs=2).fit(module)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last")
    run = trainer(quiet(0.6, multiple=2), keep, max_epochs=2, enable_checkpointing=True)
    run.fit(module)
    run.validate(module, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True, verbose=False)
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    fresh = Classifier()
    trainer(quiet(0.6)).validate(fresh, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert widths(fresh, "ffn") == widths(module, "ffn")
    other = Classifier()
    callback = quiet(0.5)
    trainer(callback, max_epochs=2).fit(module)
    trainer(callback, max_epochs=2).fit(other)
    assert any("lightning_mi_prune" in key for key in module.state_dict())


def test_a_frozen_teacher_is_left_alone():
    class Distilled(Classifier):
        def __init__(self):
            super().__init__()
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)

        def loss(self, batch):
            self.teacher(**batch)
            return super().loss(batch)

    module = Distilled()
    trainer(even(0.5), max_epochs=2).fit(module)
    assert widths(module.model, "ffn") == [16, 16]
    assert widths(module.teacher, "ffn") == [40, 40]


def test_a_batch_that_runs_the_encoder_twice_gets_one_share():
    counts = []

    class Twice(Classifier):
        def validation_step(self, batch, index):
            super().validation_step(batch, index)
            super().validation_step(batch, index)

    class Count(MutualInformationPruning):
        def on_validation_batch_end(self, *args):
            if self.engine.recorder is not None:
                counts.append(int(next(iter(self.engine.recorder.moments.values())).count))

    trainer(made(Count, 0.5, verbose=False, positions=800), max_epochs=2).fit(
        Twice(validation_rows=512)
    )
    assert counts == [100 * (i + 1) for i in range(8)]


def test_validation_of_unknown_length_is_heard():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(Sentences(256, seed=1))

    class Streaming(Classifier):
        def val_dataloader(self):
            return torch.utils.data.DataLoader(Stream(), batch_size=64)

    module = Streaming()
    trainer(even(0.5, positions=1000), max_epochs=2).fit(module)
    assert widths(module, "ffn") == [16, 16]


def test_macs_that_cannot_be_counted_do_not_stop_the_run(monkeypatch):
    def fail(*args):
        raise RuntimeError("opaque kernel")

    monkeypatch.setattr("lightning_mi_prune.callbacks.state.macs_of_calls", fail)
    callback, module = even(0.5), Classifier()
    with pytest.warns(UserWarning, match="MACs could not be counted.*opaque kernel"):
        trainer(callback, max_epochs=2).fit(module)
    assert callback.report.cuts[0].macs == 0
    assert widths(module, "ffn") == [16, 16]


def test_macs_of_every_cut_are_of_the_same_example_and_all_networks():
    class Pair(Classifier):
        def __init__(self):
            super().__init__()
            self.other = copy.deepcopy(self.model)

        def loss(self, batch):
            length = 12 - 2 * (self.current_epoch % 3)
            batch = {k: v[:, :length] if v.ndim == 2 else v for k, v in batch.items()}
            return self.model(**batch).loss + self.other(**batch).loss

    pair, single = quiet(0.6, multiple=2), quiet(0.6, multiple=2)
    trainer(pair, max_epochs=8).fit(Pair())
    trainer(single, max_epochs=2).fit(Classifier())
    assert pair.report.macs == 2 * single.report.macs
    macs = [cut.macs for cut in pair.report.cuts]
    assert macs == sorted(macs, reverse=True)


class Tied(Classifier):
    def __init__(self):
        super().__init__()
        layers = self.model.bert.encoder.layer
        layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight


class Stale(Classifier):
    def __init__(self):
        super().__init__()
        small = Classifier()
        trainer(quiet(0.5), max_epochs=2).fit(small)
        self.model = type(self.model)(small.model.config)  # four heads, where the plan keeps two


def test_layers_that_share_a_weight_lose_the_same_units():
    module = Tied()
    trainer(even(0.5), max_epochs=2).fit(module)
    first, second = module.model.bert.encoder.layer
    assert first.intermediate.dense.weight is second.intermediate.dense.weight
    assert first.intermediate.dense.out_features == second.output.dense.in_features < 40
    assert outputs(module.model, batch()).isfinite().all()


def test_a_model_built_from_the_config_of_a_cut_one_is_refused_before_the_first_batch():
    steps = []

    class Watch(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            steps.append(1)

    with pytest.raises(PruningError, match=r"made for another model: .* has shape"):
        trainer(quiet(0.5), Watch()).fit(Stale())
    assert steps == []
