"""Layers that go while a model trains: which, when, exactly, and back again."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from types import MethodType

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from transformers import AutoModelForSequenceClassification

from lightning_mi_prune import CKALayerPruning, PruningError, load_pruned
from lightning_mi_prune.core.errors import PruningWarning
from tests.support.boring import Classifier, trainer
from tests.support.models import batch, outputs
from tests.support.pruning import pruning_layers, pruning_units
from tests.support.ranks import launch
from tests.support.runs import Point, fit, resumed_equals_straight, sha
from tests.support.stacks import STACK, Deep, Scored, Tolerant, deep_bert

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
QUIET = {"verbose": False, "first_epoch": 1}
GATE = {"max_drop": 0.01, "monitor": "score", "first_epoch": 1}


def held(run):
    return [p for o in run.optimizers for g in o.param_groups for p in g["params"]]


def test_alike_layers_go_and_an_ordinary_shorter_model_trains_on(tmp_path):
    run, module, watch = fit(tmp_path, layers={}, module=Deep)
    (cut,) = watch.pruning.report.cuts
    (stack,) = cut.stacks
    assert (cut.epoch, stack.name, stack.before) == (1, STACK, (0, 1, 2, 3, 4, 5))
    assert stack.clusters == ((0,), (1, 2, 3), (4,), (5,))
    assert stack.removed == (2, 3)
    assert cut.sparsity == pytest.approx(1 / 3)
    assert watch.pruning.plan.kept[STACK] == (0, 1, 4, 5)
    assert module.model.config.num_hidden_layers == len(module.model.bert.encoder.layer) == 4
    assert all(a is b for a, b in zip(held(run), module.parameters(), strict=True))
    assert set(run.optimizers[0].state) == set(module.parameters())
    before, after = (watch.pruning.report.to_dict()[side] for side in ("before", "after"))
    assert after["parameters"] == sum(p.numel() for p in module.parameters())
    assert before["parameters"] == sum(p.numel() for p in Deep().parameters())
    assert after["macs"] < 0.7 * before["macs"]

    module.model.save_pretrained(tmp_path / "folder")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folder")
    assert torch.equal(outputs(plain, batch()), outputs(module.model.eval(), batch()))
    run.save_checkpoint(tmp_path / "last.ckpt")
    again = load_pruned(Deep(), tmp_path / "last.ckpt")
    assert sha(*again.state_dict().values()) == sha(*module.state_dict().values())


def test_a_single_cut_comes_half_way(tmp_path):
    _, _, watch = fit(tmp_path, layers={"first_epoch": None}, module=Deep, max_epochs=5)
    assert [cut.epoch for cut in watch.pruning.report.cuts] == [2]


def test_a_larger_checkpoint_brings_layers_back(tmp_path):
    dense = {"dense": Point("on_train_epoch_end", 0)}
    run, module, watch = fit(tmp_path, points=dense, layers={}, module=Deep)
    small = copy.deepcopy(module.state_dict())
    run.test(module, ckpt_path=str(tmp_path / "0.ckpt"), verbose=False)
    assert len(module.model.bert.encoder.layer) == module.model.config.num_hidden_layers == 6
    assert watch.pruning.plan.is_full
    stored = torch.load(tmp_path / "0.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(v, stored[n]) for n, v in module.state_dict().items())
    assert not any(p.is_meta for p in module.parameters())
    module.load_state_dict(small)
    assert len(module.model.bert.encoder.layer) == 4


def test_where_nothing_is_alike_it_says_so_and_cuts_nothing(tmp_path):
    with pytest.warns(PruningWarning, match="have CKA .* Lower threshold, or set target"):
        _, module, watch = fit(
            tmp_path, layers={}, module=type("Unlike", (Deep,), {"__init__": _unlike})
        )
    assert len(module.model.bert.encoder.layer) == 6
    assert watch.pruning.report.cuts == []


def _unlike(self, **options):
    Deep.__init__(self, **options)
    self.model = deep_bert(copies=())


class States(pl.Callback):
    """Weights, optimizer state and plan at the end of every epoch and the start of the next."""

    def __init__(self):
        self.ends, self.starts, self.depths = {}, {}, []

    def state(self, trainer, module):
        names = {id(p): n for n, p in module.named_parameters()}
        groups = [
            [[names[id(p)] for p in g["params"]] for g in o.param_groups]
            for o in trainer.optimizers
        ]
        moments = sorted(
            (names[id(p)], key, sha(value))
            for o in trainer.optimizers
            for p, values in o.state.items()
            for key, value in values.items()
        )
        weights = [(name, sha(value)) for name, value in module.state_dict().items()]
        return weights, moments, groups

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends[trainer.current_epoch] = self.state(trainer, pl_module)

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts[trainer.current_epoch] = self.state(trainer, pl_module)
        self.depths.append(len(pl_module.model.bert.encoder.layer))


@pytest.mark.parametrize("optimizer", ["adamw", "adam-groups", "sgd-momentum", "two-manual"])
def test_a_cut_that_costs_too_much_is_taken_back_exactly(tmp_path, optimizer):
    states = States()
    _, _, watch = fit(
        tmp_path,
        optimizer=optimizer,
        layers={**GATE, "cuts": 1},
        module=Scored,
        callbacks=[states],
        max_epochs=6,
    )
    (cut,) = watch.pruning.report.undone
    assert watch.pruning.report.cuts == []
    back = next(e for e in range(cut.epoch + 1, 6) if states.depths[e] == 6)
    assert states.depths[cut.epoch] == 4
    assert states.starts[back] == states.ends[cut.epoch - 1]
    assert states.depths[back:] == [6] * (6 - back)
    assert states.ends[5] != states.starts[back]
    assert watch.pruning.plan.is_full


def test_after_a_failure_fewer_layers_of_each_cluster_go(tmp_path):
    states = States()
    _, module, watch = fit(
        tmp_path,
        layers={**GATE, "cuts": 3, "last_epoch": 5},
        module=Tolerant,
        callbacks=[states],
        max_epochs=9,
    )
    (undone, later), (cut,) = watch.pruning.report.undone, watch.pruning.report.cuts
    assert undone.stacks[0].removed == (2, 3)
    assert later.stacks[0].removed == (3,)  # tried when the model had recovered, and not given up
    assert (cut.stacks[0].every, cut.stacks[0].removed) == (2, (2,))
    assert cut.stacks[0].similarity == undone.stacks[0].similarity  # it is the same model
    assert states.depths[1:4] == [4, 4, 5]
    assert len(module.model.bert.encoder.layer) == 5


def test_it_gives_up_after_every_third_layer(tmp_path):
    _, module, watch = fit(
        tmp_path,
        layers={**GATE, "cuts": 4, "last_epoch": 7},
        module=Scored,
        max_epochs=12,
    )
    assert [c.stacks[0].every for c in watch.pruning.report.undone] == [1, 2]  # 3 is 2 again
    assert len(module.model.bert.encoder.layer) == 6
    assert watch.pruning.plan.is_full


def test_a_cut_that_costs_little_stays(tmp_path):
    _, module, watch = fit(tmp_path, layers={**GATE, "max_drop": 0.4}, module=Scored, max_epochs=7)
    assert [c.stacks[0].removed for c in watch.pruning.report.cuts] == [(2, 3)]
    assert len(module.model.bert.encoder.layer) == 4


@pytest.mark.parametrize(
    ("criterion", "removed"),
    [("cka", (2, 3)), ("angle", (2, 3)), ("angular_run", (2, 3)), ("last", (4, 5))],
)
def test_every_criterion_reaches_the_target(tmp_path, criterion, removed):
    options = {"threshold": None, "target_layers": 4, "criterion": criterion}
    _, _, watch = fit(tmp_path, layers=options, module=Deep, max_epochs=2)
    assert watch.pruning.report.cuts[0].stacks[0].removed == removed


def test_any_layers_are_the_same_for_a_seed(tmp_path):
    options = {"threshold": None, "target_layers": 4, "criterion": "random"}
    removed = [
        fit(tmp_path, layers={**options, "seed": seed}, module=Deep, max_epochs=2)[2]
        .pruning.report.cuts[0]
        .stacks[0]
        .removed
        for seed in (3, 3, 4)
    ]
    assert removed[0] == removed[1] != removed[2]


def test_a_target_is_reached_in_several_cuts(tmp_path):
    options = {"threshold": None, "target_layers": 2, "cuts": 2, "last_epoch": 3}
    _, module, watch = fit(tmp_path, layers=options, module=Deep)
    assert [len(c.stacks[0].after) for c in watch.pruning.report.cuts] == [4, 2]
    assert len(module.model.bert.encoder.layer) == 2


def test_the_threshold_may_stop_above_the_target(tmp_path):
    _, module, _ = fit(tmp_path, layers={"target_layers": 5}, module=Deep)
    assert len(module.model.bert.encoder.layer) == 5
    _, module, _ = fit(tmp_path, layers={"target_layers": 1}, module=Deep)
    assert len(module.model.bert.encoder.layer) == 4


POINTS = {
    "inside an epoch": Point("on_train_batch_end", 0, 1),
    "validation half heard": Point("on_validation_batch_end", 0, 1),
    "cut pending": Point("on_train_epoch_end", 0),
    "on probation": Point("on_train_batch_end", 1, 1),
    "failed, not yet back": Point("on_train_epoch_end", 2),
    "tried again": Point("on_train_batch_end", 3, 1),
    "later": Point("on_train_epoch_end", 4),
}


@pytest.mark.filterwarnings("ignore:Training ended")
@pytest.mark.parametrize(
    "options",
    [
        {"layers": {}, "module": Deep, "max_epochs": 6},
        {"layers": {**GATE, "cuts": 3, "last_epoch": 5}, "module": Tolerant, "max_epochs": 8},
        {"layers": {}, "pruning": {"gradient_steps": 8}, "module": Deep, "max_epochs": 8},
        {"layers": {}, "module": Deep, "val_check_interval": 2, "max_epochs": 6},
    ],
    ids=["accepted", "taken back", "units too", "two validations"],
)
def test_a_resumed_run_equals_the_straight_one(tmp_path, options):
    found = resumed_equals_straight(tmp_path, POINTS, **options)
    assert not any(found.values()), found


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("first", ["layers", "units"])
def test_layers_go_first_then_units(tmp_path, first):
    depth = pruning_layers(**QUIET)
    width = pruning_units(0.75, multiple=2, gradient_steps=8, verbose=False)
    both = [depth, width] if first == "layers" else [width, depth]
    module = Deep()
    run = trainer(*both, max_epochs=8, num_sanity_val_steps=0)
    run.fit(module)
    assert width.report is depth.report
    assert width.plan == depth.plan
    layers, *units = depth.report.cuts
    assert layers.epoch == 1
    assert units[0].epoch >= 5  # the second half
    assert units[-1].sparsity == pytest.approx(0.75, abs=0.03)
    assert len({group.name.split(".")[4] for group in units[-1].groups} - {"0", "1", "4", "5"}) == 0
    assert all(a is b for a, b in zip(held(run), module.parameters(), strict=True))
    told = json.loads(json.dumps(depth.report.to_dict()))
    held_now = sum(p.numel() for p in module.model.bert.encoder.layer.parameters())
    assert told["after"]["prunable_parameters"] == held_now

    run.save_checkpoint(tmp_path / "both.ckpt")
    again = load_pruned(Deep(), tmp_path / "both.ckpt")
    assert torch.equal(outputs(again.model.eval(), batch()), outputs(module.model.eval(), batch()))
    fresh = Deep()
    trainer(pruning_layers(**QUIET), max_epochs=8).test(
        fresh, ckpt_path=str(tmp_path / "both.ckpt"), verbose=False, weights_only=True
    )
    assert sha(*fresh.state_dict().values()) == sha(*module.state_dict().values())

    from lightning_mi_prune import from_pretrained

    module.model.save_pretrained(tmp_path / "folder")
    opened = from_pretrained(AutoModelForSequenceClassification, tmp_path / "folder")
    assert torch.equal(outputs(opened, batch()), outputs(module.model.eval(), batch()))


def test_layers_of_a_model_whose_units_were_cut_before(tmp_path):
    module = Deep()
    width = pruning_units(0.5, multiple=2, relevance=None, verbose=False)
    trainer(width, max_epochs=2, num_sanity_val_steps=0).fit(module)
    widths = [layer.intermediate.dense.out_features for layer in module.model.bert.encoder.layer]
    depth = pruning_layers(None, target_layers=4, criterion="last", **QUIET)
    run = trainer(depth, max_epochs=2, num_sanity_val_steps=0)
    run.fit(module)
    now = [layer.intermediate.dense.out_features for layer in module.model.bert.encoder.layer]
    assert now == widths[:4]
    again = Deep()
    run.save_checkpoint(tmp_path / "x.ckpt")
    load_pruned(again, tmp_path / "x.ckpt")
    assert sha(*again.state_dict().values()) == sha(*module.state_dict().values())
    width = pruning_units(0.9, multiple=2, relevance=None, floor=0.1, verbose=False)
    trainer(width, max_epochs=2, num_sanity_val_steps=0).fit(module)
    assert width.report.cuts[-1].sparsity >= 0.9


class Layerwise(Scored):
    """A parameter group for every layer, as for layer-wise learning rates."""

    def configure_optimizers(self):
        layers = list(self.model.bert.encoder.layer)
        inside = {id(p) for layer in layers for p in layer.parameters()}
        groups = [{"params": [p for p in self.parameters() if id(p) not in inside]}]
        groups += [
            {"params": list(x.parameters()), "lr": 1e-4 * 0.9**i} for i, x in enumerate(layers)
        ]
        return torch.optim.AdamW(groups, lr=1e-4)


def test_a_group_of_a_layer_that_is_gone_is_empty_and_filled_again(tmp_path):
    states = States()
    fit(tmp_path, layers={**GATE, "cuts": 1}, module=Layerwise, callbacks=[states], max_epochs=6)
    sizes = [len(group) for group in states.starts[1][2][0]]
    assert (sizes[3], sizes[4]) == (0, 0)
    back = next(e for e in range(2, 6) if states.depths[e] == 6)
    assert states.starts[back] == states.ends[0]


class ByLayer(Scored):
    """Two optimizers, and what is left of the second when layers go is nothing."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def configure_optimizers(self):
        layers = list(self.model.bert.encoder.layer)
        mine = [p for layer in layers[2:4] for p in layer.parameters()]
        inside = set(map(id, mine))
        others = [p for p in self.parameters() if id(p) not in inside]
        return [
            torch.optim.AdamW(others[::2], lr=1e-4),
            torch.optim.SGD(mine, lr=1e-4, momentum=0.9),
            torch.optim.Adam(others[1::2], lr=1e-4),
        ]


class Decayed(Layerwise):
    """Learning rates of layers that count from the top, and fall each in its own way."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        top = self.model.config.num_hidden_layers
        falls = [lambda step, r=0.9 ** (top - i): r**step for i in range(top + 1)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falls)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}


class Named(Layerwise):
    """Optimizers that keep the names of parameters, seen from the model, and names of our own."""

    def configure_optimizers(self):
        groups = {}
        for name, parameter in self.model.named_parameters():
            _, found, rest = name.partition("encoder.layer.")
            groups.setdefault(rest.split(".")[0] if found else "", []).append((name, parameter))
        own = [(f"p{i}", p) for i, (_, p) in enumerate(groups.pop(""))]
        return torch.optim.AdamW([{"params": pairs} for pairs in (own, *groups.values())], lr=1e-4)


class Names(pl.Callback):
    def __init__(self):
        self.seen, self.right = {}, []

    def on_train_batch_end(self, trainer, pl_module, *args):
        names = {id(p): name for name, p in pl_module.model.named_parameters()}
        own, *groups = trainer.optimizers[0].param_groups
        now = [[names[id(p)] for p in g["params"]] for g in groups]
        self.right.append(now == [g["param_names"] for g in groups])
        self.seen[trainer.current_epoch] = (own["param_names"], now)


@pytest.mark.skipif(torch.__version__ < "2.6", reason="optimizers keep no names")
def test_names_that_optimizers_keep_follow_the_layers(tmp_path):
    names, again = Names(), Names()
    points = {"x": Point("on_train_batch_end", 1, 1)}
    options = {"layers": {**GATE, "cuts": 1}, "module": Named, "max_epochs": 6}
    _, _, watch = fit(tmp_path, callbacks=[names], points=points, **options)
    fit(tmp_path, callbacks=[again], resume=tmp_path / "0.ckpt", **options)
    assert len(watch.pruning.report.undone) == 1
    assert all(names.right)
    assert all(again.right)
    assert names.seen[0] == names.seen[5] == again.seen[5] != names.seen[1] == again.seen[1]
    assert names.seen[1][1][4][0].startswith("bert.encoder.layer.2.")


RESUMED = {
    "inside an epoch": Point("on_train_batch_end", 1, 1),
    "failed, not yet back": Point("on_train_epoch_end", 2),
    "later": Point("on_train_batch_end", 4, 1),
}


GROUPED = [Layerwise, ByLayer, Decayed]
VERDICTS = {"accepted": {}, "taken back": {**GATE, "cuts": 2, "last_epoch": 4}}


@pytest.mark.parametrize("number", range(3), ids=lambda number: GROUPED[number].__name__)
@pytest.mark.parametrize("verdict", VERDICTS)
def test_groups_by_layer_resume_after_layers_went(tmp_path, number, verdict):
    """Every module meets every point, and every verdict does, in half of the runs."""
    first, second, third = (list(RESUMED)[(number + k) % 3] for k in range(3))
    names = (first, second) if verdict == "taken back" else (third,)
    points = {name: RESUMED[name] for name in names}
    options = {"layers": VERDICTS[verdict], "module": GROUPED[number], "max_epochs": 6}
    found = resumed_equals_straight(tmp_path, points, **options)
    assert list(found) == list(names)
    assert not any(found.values()), found


@pytest.mark.parametrize("optimizer", ["adam-groups", "two-manual"])
def test_groups_by_position_resume_after_layers_went(tmp_path, optimizer):
    options = {"layers": {}, "module": Deep, "optimizer": optimizer, "max_epochs": 4}
    found = resumed_equals_straight(tmp_path, {"later": Point("on_train_epoch_end", 2)}, **options)
    assert not any(found.values()), found


def test_a_run_that_began_without_some_layers_resumes_on_all_of_them(tmp_path):
    options = {"threshold": None, "criterion": "last"}
    module, seen = Layerwise(), []
    trainer(pruning_layers(**options, target_layers=5, **QUIET), max_epochs=2).fit(module)
    path = tmp_path / "later.ckpt"
    for target, source in ((module, None), (Layerwise(), path)):
        states = States()
        run = trainer(
            pruning_layers(**options, target_layers=4, **QUIET),
            states,
            max_epochs=3 + bool(source),
        )
        run.fit(target, ckpt_path=source, weights_only=source and True)
        run.save_checkpoint(path)
        seen.append([len(group) for group in states.ends[run.current_epoch - 1][2][0]])
        assert "configure_optimizers" not in vars(target)
        assert len(target.model.bert.encoder.layer) == target.model.config.num_hidden_layers == 4
        assert not any(p.is_meta for p in target.parameters())
    assert [len(sizes) for sizes in seen] == [6, 6]  # of five layers
    assert seen[0] == seen[1]
    assert seen[0][-1] == 0


class Idle(Deep):
    """Nothing is trained, and Lightning has a stand-in for the optimizer."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        return None

    def configure_optimizers(self):
        return None


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_a_run_without_optimizers_resumes(tmp_path):
    options = {"layers": {}, "module": Idle, "max_epochs": 4}
    found = resumed_equals_straight(tmp_path, {"later": Point("on_train_epoch_end", 2)}, **options)
    assert not any(found.values()), found


def test_a_hook_that_is_set_on_the_module_is_called_and_stays(tmp_path):
    """As LightningCLI sets it."""
    fit(tmp_path, points={"x": Point("on_train_epoch_end", 1)}, layers={}, module=Layerwise)
    target, seen = Deep(), []

    def configure(module):
        seen.append(len(module.model.bert.encoder.layer))
        return Layerwise.configure_optimizers(module)

    target.configure_optimizers = own = MethodType(configure, target)
    run = trainer(pruning_layers(**QUIET), max_epochs=3)
    run.fit(target, ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert seen == [6]
    assert vars(target)["configure_optimizers"] is own
    assert len(run.optimizers[0].param_groups) == 7


class Regrouped(Layerwise):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Failing(Layerwise):
    def configure_optimizers(self):
        raise RuntimeError("no optimizer today")


@pytest.mark.parametrize(
    ("module", "error"),
    [
        (
            Regrouped,
            r"have groups of \[\[\d+, 16, 16, 0, 0, 16, 16\]\] parameters; .* have \[\[\d+\]\]",
        ),
        (Failing, "no optimizer today"),
    ],
)
def test_other_groups_than_the_checkpoint_has_are_refused_in_a_sentence(tmp_path, module, error):
    fit(tmp_path, points={"x": Point("on_train_epoch_end", 1)}, layers={}, module=Layerwise)
    target = module()
    run = trainer(pruning_layers(**QUIET), max_epochs=5)
    with pytest.raises((PruningError, RuntimeError), match=error):
        run.fit(target, ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    assert len(target.model.bert.encoder.layer) == target.model.config.num_hidden_layers == 4
    assert not any(p.is_meta for p in target.parameters())
    assert "configure_optimizers" not in vars(target)


@pytest.mark.parametrize("noted", ["text", {"optimizers_of": 3}, {"optimizers_of": "{}"}])
def test_a_damaged_note_in_a_checkpoint_is_refused(tmp_path, noted):
    points = {"x": Point("on_train_epoch_end", 1)}
    fit(tmp_path, points=points, layers={}, module=Deep, max_epochs=3)
    checkpoint = torch.load(tmp_path / "0.ckpt", weights_only=True)
    torch.save({**checkpoint, "lightning_mi_prune": noted}, tmp_path / "bad.ckpt")
    with pytest.raises(PruningError, match=r"expected the plan at which|has version None"):
        fit(tmp_path, resume=tmp_path / "bad.ckpt", layers={}, module=Deep)


def two_ranks(folder, **options):
    _, module, watch = fit(folder, layers=options, module=Deep, strategy="ddp", devices=2)
    similarity = watch.pruning.report.cuts[0].stacks[0].similarity
    return sha(*module.state_dict().values()), watch.pruning.plan.to_json(), similarity


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_remove_what_one_does_and_stay_equal(tmp_path):
    (one, plan, alike), (two, other, same) = launch(2, two_ranks, tmp_path).values()
    assert (one, plan, alike) == (two, other, same)
    _, _, watch = fit(tmp_path, layers={}, module=Deep)
    assert watch.pruning.plan.to_json() == plan
    alone = watch.pruning.report.cuts[0].stacks[0].similarity
    torch.testing.assert_close(torch.tensor(alone), torch.tensor(alike), atol=0.03, rtol=0)


BAD_OPTIONS = [
    ({"threshold": 0}, r"threshold=0; expected a number above 0 and up to 1"),
    ({"threshold": 98}, r"threshold=98; .* \(not a percentage\)"),
    ({"threshold": "high"}, r"threshold='high'; expected a number"),
    ({"threshold": None}, "do not determine how many layers to remove; expected target_layers"),
    ({"criterion": "last"}, "criterion='last'.* do not determine how many"),
    ({"criterion": "first", "target_layers": 4}, "criterion='first'; expected one of"),
    ({"target_layers": 0}, "target_layers=0; expected a whole number of at least 1"),
    ({"target_layers": 2.5}, "target_layers=2.5; expected a whole number"),
    ({"kernel": "cosine"}, "kernel='cosine'; expected one of"),
    ({"bandwidth": 0}, "bandwidth=0; expected a number above 0"),
    ({"method": "compensation"}, "method='compensation' is for units; expected"),
    ({"ramp": "one_shot"}, "ramp='one_shot' is for units; whole layers"),
    (
        {"reconstruction_positions": 0},
        "positions=0; expected a whole number of at least 2",
    ),
    ({"positions": 3}, "positions=3; expected a whole number of at least 4"),
    ({"stacks": "model.layers"}, "stacks='model.layers'.* stacks as a list"),
    ({"stacks": []}, r"stacks=\[\].* stacks as a list"),
    ({"stacks": ["a"], "module": "b"}, r"stacks=\['a'\], module='b'; expected one of the two"),
    ({"cuts": 0}, "cuts=0; expected a whole number of at least 1"),
    ({"first_epoch": 3, "last_epoch": 2}, "first_epoch=3 comes after last_epoch=2"),
    ({"max_drop": 0.01}, "max_drop=0.01 needs monitor"),
    ({"max_drop": -0.1, "monitor": "val_acc"}, "max_drop=-0.1; expected a number from 0"),
    ({"monitor": "val_acc"}, "is compared for max_drop only"),
    ({"mode": "best"}, "mode='best'; expected one of"),
    ({"seed": -1}, "seed=-1; expected a whole number"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=[str(o) for o, _ in BAD_OPTIONS])
def test_options_out_of_range_are_named(options, message):
    with pytest.raises((MisconfigurationException, PruningError), match=message):
        pruning_layers(**options)


class Thawing(BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.model.bert.embeddings)

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 2:
            self.unfreeze_and_add_param_group(module.model.bert.embeddings, optimizer)


class Backbone(Deep):
    @property
    def backbone(self):
        return self.model.bert


@pytest.mark.parametrize("other", [Thawing, BackboneFinetuning])
@pytest.mark.parametrize("first", [True, False])
def test_finetuning_that_goes_by_names_is_refused_at_the_start(other, first):
    module, both = Backbone(), [pruning_layers(**QUIET), other()]
    message = f"{other.__name__} cannot run beside a callback that removes layers, because .* names"
    with pytest.raises(MisconfigurationException, match=message):
        trainer(*both[:: 1 if first else -1], max_epochs=4).fit(module)
    assert len(module.model.bert.encoder.layer) == 6


class Odd(Deep):
    """Layers of different widths."""

    def __init__(self, **options):
        super().__init__(**options)
        self.tower = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 8))
        self.mixed = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
        self.named = nn.Sequential()
        self.named.add_module("up", nn.Linear(24, 24))
        self.named.add_module("down", nn.Linear(24, 24))
        self.single = nn.Sequential(nn.Linear(24, 24))
        self.idle = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.tower(torch.randn(8, 24))


class Loose(Deep):
    """It runs the layers of a list itself, so that nothing that holds them is ever called."""

    def __init__(self, **options):
        super().__init__(**options)
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))

    def loss(self, batch):
        states = self.model.bert.embeddings(batch["input_ids"])
        for block in self.blocks:
            states = block(states)
        logits = self.model.classifier(states.mean(1))
        return nn.functional.cross_entropy(logits, batch["labels"])

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))


def test_macs_of_layers_that_are_called_one_by_one_are_not_counted_and_said_so(tmp_path):
    options = {"threshold": None, "target_layers": 2, "criterion": "last", "stacks": ["blocks"]}
    with pytest.warns(UserWarning, match="MACs are not counted .* never called itself. Call it"):
        _, module, watch = fit(tmp_path, layers=options, module=Loose, max_epochs=2)
    assert len(module.blocks) == 2
    assert watch.pruning.report.cuts[0].macs == 0


class Diverged(Deep):
    def on_validation_start(self):
        if not self.trainer.sanity_checking:
            self.model.bert.encoder.layer[3].output.dense.bias.data[3] = float("nan")


class Albert(Classifier):
    def __init__(self):
        super().__init__(family="albert")


def one_layer(**options):
    module = Deep(**options)
    module.model = deep_bert(layers=1)
    return module


SILENT = r"'idle' never ran in validation, .*; {} did.* leave them out with stacks= or module="
BAD_RUNS = [
    (Odd, {"stacks": ["idle"]}, SILENT.format("no others")),
    (Odd, {"stacks": [STACK, "idle"]}, SILENT.format(rf"\['{STACK}'\]")),
    (Odd, {"stacks": ["tower"]}, r"outputs of different widths, \[\(24,\), \(8,\)\]"),
    (Odd, {"stacks": ["mixed"]}, r"holds 2 layers of \['Linear', 'ReLU'\]; expected"),
    (Odd, {"stacks": ["named"]}, r"are named \['up', 'down'\]; expected numbers from 0"),
    (Odd, {"stacks": ["single"]}, r"holds 1 layer of \['Linear'\]; expected two or more"),
    (Odd, {"stacks": ["model.bert.pooler"]}, "is a BertPooler; expected an nn.ModuleList"),
    (Odd, {"stacks": ["nowhere"]}, "'nowhere' is no module of Odd"),
    (one_layer, {}, "No stack of layers was found in Deep; .* There are none"),
    (
        Deep,
        {"module": "model.classifier"},
        rf"No stack .* below module='model.classifier'; .* There are \['{STACK}'\]",
    ),
    (Deep, {"target_layers": 7}, "target_layers=7, but .* has 6 layers as built"),
    (Diverged, {}, r"layers \[3, 4, 5\] hold NaN or infinite values"),
    (Scored, {"max_drop": 0.1, "monitor": "val_f1"}, "monitor='val_f1', which Scored never logs"),
    (Albert, {}, "No stack of layers was found in Albert; .* There are none"),
]


@pytest.mark.parametrize(("build", "options", "message"), BAD_RUNS, ids=[m for *_, m in BAD_RUNS])
def test_runs_that_cannot_lose_layers_are_refused_and_nothing_changes(
    build, options, message, monkeypatch
):
    module, cuts = build(), []
    where = "lightning_mi_prune.callbacks.engine.cut_model"
    monkeypatch.setattr(where, lambda *a, **k: cuts.append(a))
    run = trainer(pruning_layers(**QUIET, **options), max_epochs=6, num_sanity_val_steps=0)
    with pytest.raises((MisconfigurationException, PruningError), match=message):
        run.fit(module)
    assert cuts == []
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_two_of_a_kind_are_refused():
    both = [pruning_layers(**QUIET), pruning_layers(0.9, **QUIET)]
    for callback, key in zip(both, "ab", strict=True):
        callback.__class__ = type(f"Layers{key}", (CKALayerPruning,), {})  # Lightning asks for keys
    with pytest.raises(MisconfigurationException, match=r"2 .* in one Trainer"):
        trainer(*both, max_epochs=4).fit(Deep())


def test_a_run_too_short_for_both_is_refused():
    both = [pruning_layers(**QUIET), pruning_units(0.5, verbose=False)]
    with pytest.raises(MisconfigurationException, match=r"at least 2.* share this run of 3 epochs"):
        trainer(*both, max_epochs=3).fit(Deep())


def two_ranks_in_vain(folder):
    options = {"layers": {**GATE, "cuts": 1}, "max_epochs": 6}
    run, module, watch = fit(folder, module=Scored, strategy="ddp", devices=2, **options)
    ordered = all(a is b for a, b in zip(held(run), module.parameters(), strict=True))
    state = sha(*module.state_dict().values()), watch.pruning.plan.is_full
    return state, [cut.epoch for cut in watch.pruning.report.undone], ordered


def two_ranks_by_layer(folder):
    options = {"layers": {}, "module": ByLayer, "strategy": "ddp", "devices": 2, "max_epochs": 4}
    points = {"x": Point("on_train_batch_end", 2, 1)}
    runs = [fit(folder, points=points, **options)]
    runs += [fit(folder, resume=folder / "0.ckpt", **options)]
    return [watch.digests[3] for _, _, watch in runs]


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_resume_with_an_optimizer_whose_layers_are_gone(tmp_path):
    for straight, resumed in launch(2, two_ranks_by_layer, tmp_path).values():
        assert straight == resumed


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_take_layers_back_together(tmp_path):
    one, two = launch(2, two_ranks_in_vain, tmp_path).values()
    assert one == two
    (_, full), undone, ordered = one
    assert full
    assert undone == [1]
    assert ordered


def test_a_retry_towards_a_target_is_gentler(tmp_path):
    options = {"threshold": None, "target_layers": 2, "cuts": 2, "last_epoch": 5}
    _, module, watch = fit(tmp_path, layers={**GATE, **options}, module=Scored, max_epochs=9)
    tried = [set(cut.stacks[0].removed) for cut in watch.pruning.report.undone]
    assert len(tried) >= 2
    assert all(later < earlier for earlier, later in pairwise(tried))
    assert len(module.model.bert.encoder.layer) == 6


class Twice(Scored):
    """Clusters of two: every second layer of one is the same as all but the first."""

    def __init__(self, **options):
        super().__init__(**options)
        self.model = deep_bert(copies=(2,))


def test_the_same_layers_are_not_tried_twice(tmp_path):
    options = {"cuts": 4, "last_epoch": 7}
    _, _, watch = fit(tmp_path, layers={**GATE, **options}, module=Twice, max_epochs=12)
    assert [cut.stacks[0].removed for cut in watch.pruning.report.undone] == [(2,)]


def test_a_layer_with_a_second_name_is_refused_before_it_goes():
    module = Deep()
    module.hint = module.model.bert.encoder.layer[3]
    with pytest.raises(PruningError, match=r"Layer 3 .* holds a part of it as 'hint"):
        trainer(pruning_layers(**QUIET), max_epochs=3, num_sanity_val_steps=0).fit(module)
    assert len(module.model.bert.encoder.layer) == 6
    assert not any(p.is_meta for p in module.parameters())


HALF_JUDGED = {"on_validation_start": None, "on_validation_batch_end": 1}


def test_a_checkpoint_inside_the_judging_validation_keeps_the_verdict(tmp_path):
    points = {name: Point(name, 1, batch) for name, batch in HALF_JUDGED.items()}
    options = {"layers": {**GATE, "cuts": 1}, "module": Scored, "max_epochs": 4}
    found = resumed_equals_straight(tmp_path, points, **options)
    assert not any(found.values()), found


def test_a_gate_that_no_validation_could_close_is_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="No validation comes after the last cut"):
        fit(tmp_path, layers=GATE, module=Scored, max_epochs=4, check_val_every_n_epoch=2)


def test_a_budget_that_gone_layers_bring_within_reach_is_taken():
    module = Deep()
    options = {"target_layers": 2, "criterion": "last"}
    trainer(pruning_layers(None, **options, **QUIET), max_epochs=2).fit(module)
    floor = {"floor": 0.2, "multiple": 2, "relevance": None, "verbose": False}
    width = pruning_units(0.9, **floor)
    trainer(width, max_epochs=2).fit(module)
    assert width.report.cuts[-1].sparsity >= 0.9
    with pytest.raises(PruningError, match="out of reach"):
        trainer(pruning_units(0.99, **floor), max_epochs=2).fit(module)


class Charged(Scored):
    """It is worth less without its layers, and as much with any units."""

    def score(self):
        return 1.0 - 0.05 * (super().score() < 1)


def test_what_layers_may_cost_is_not_charged_to_units(tmp_path):
    layers = {"max_drop": 0.1, "monitor": "score", "cuts": 1}
    units = {"sparsity": 0.7, "max_drop": 0.02, "monitor": "score", "gradient_steps": 8}
    _, _, watch = fit(tmp_path, layers=layers, pruning=units, module=Charged, max_epochs=16)
    assert watch.pruning.report.undone == []
    assert watch.pruning.report.cuts[-1].sparsity >= 0.7


def renumbered(weights, stay):
    """Digests of weights by name, where the layers that stay have closed up."""
    found = {}
    for name, digest in weights:
        parts = name.split(".")
        if "lightning_mi_prune" in name:  # the plan
            continue
        if name.startswith(f"{STACK}."):
            if int(parts[4]) not in stay:
                continue
            parts[4] = str(stay.index(int(parts[4])))
        found[".".join(parts)] = digest
    return found


@pytest.mark.parametrize("method", ["layerwise", "none"])
def test_only_what_takes_over_gets_other_values(tmp_path, method):
    states = States()
    options = {
        "threshold": None,
        "target_layers": 4,
        "criterion": "last",
        "method": method,
    }
    fit(tmp_path, layers=options, module=Deep, callbacks=[states], max_epochs=2)
    before, after = (renumbered(x, (0, 1, 2, 3)) for x in (states.ends[0][0], states.starts[1][0]))
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    top = f"{STACK}.3.output"
    parts = ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")
    taken = {f"{top}.{part}" for part in parts}
    assert changed <= taken
    assert (
        {f"{top}.dense.{part}" for part in ("weight", "bias")} <= changed
        if method == "layerwise"
        else not changed
    )
    assert states.starts[1][2] == [[list(after)]]  # still in the optimizer


def test_too_little_to_learn_from_is_said_and_layers_go_all_the_same(tmp_path):
    with pytest.warns(UserWarning, match=r"No layer makes up .* raise"):
        _, module, _ = fit(
            tmp_path, layers={"reconstruction_positions": 2}, module=Deep, max_epochs=2
        )
    assert len(module.model.bert.encoder.layer) == 4


def test_what_was_heard_without_calls_is_heard_again_where_they_are_asked_for(tmp_path):
    points = {"heard": Point("on_train_batch_end", 0, 3)}
    options = {"module": Deep, "val_check_interval": 3, "max_epochs": 3}
    fit(tmp_path, points=points, layers={"method": "none"}, **options)
    with pytest.warns(UserWarning, match="No inputs were stored to reconstruct"):
        _, module, watch = fit(tmp_path, resume=tmp_path / "0.ckpt", layers={}, **options)
    assert watch.pruning.report.cuts[0].epoch == 2
    assert len(module.model.bert.encoder.layer) == 4


def test_a_pending_cut_of_other_options_is_chosen_again(tmp_path):
    points = {"pending": Point("on_train_epoch_end", 0)}
    first, second = ({"threshold": None, "target_layers": n} for n in (4, 5))
    fit(tmp_path, points=points, layers=first, module=Deep)
    with pytest.warns(UserWarning, match="pending cut was chosen by other options"):
        _, module, watch = fit(tmp_path, resume=tmp_path / "0.ckpt", layers=second, module=Deep)
    (cut,) = watch.pruning.report.cuts
    assert (cut.epoch, cut.stacks[0].removed) == (2, cut.stacks[0].removed[:1])
    assert len(module.model.bert.encoder.layer) == 5
