"""Sublayers that lost all units: no linear layer of zero width, no parameter without entries."""

from __future__ import annotations

import copy
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_mi_prune.core.empty_linear import EmptyLinear
from lightning_mi_prune.core.options import Constraints, Importance
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.pruner import prune
from lightning_mi_prune.surgery.optimizers import parameter_names, update_optimizers
from lightning_mi_prune.surgery.units import apply_plan, reshape_tensors
from tests.support.boring import Classifier, Sentences, trainer
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, PICTURES, build, inputs_of, outputs
from tests.support.pruning import pruning_layers, pruning_units

FAMILIES = [(f, "sequence") for f in CONFIGS] + [(f, "image") for f in PICTURES]
GONE = ("heads", "ffn")


def without_units(model, kinds=GONE, layers=99):
    """The model without units of some kinds, its groups and the plan."""
    groups = groups_of(model)
    full = full_plan(groups)
    gone = [group.name for group in groups if group.kind in kinds][:layers]
    plan = PruningPlan(full.sizes, {**full.kept, **dict.fromkeys(gone, ())})
    return groups, plan


@pytest.mark.parametrize(("family", "head"), FAMILIES)
def test_nothing_of_zero_width_is_left_in_the_tree(family, head):
    model, inputs = build(family, head), inputs_of(head)
    groups, plan = without_units(model)
    keys = set(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    update_optimizers([optimizer], apply_plan(model, groups, plan))
    empty = [path for path, part in model.named_modules() if isinstance(part, EmptyLinear)]
    assert empty
    assert all(p.numel() for p in model.parameters())
    assert all(t.numel() for t in model.state_dict().values())
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    assert all(part.in_features and part.out_features for part in linears)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert set(map(id, held)) == set(map(id, model.parameters()))
    small = outputs(model, inputs)
    model.double().float()  # what stands beside the tree follows devices and precision
    assert torch.equal(outputs(model, inputs), small)
    reshape_tensors(model, groups, full_plan(groups))
    assert set(model.state_dict()) == keys
    assert not any(isinstance(part, EmptyLinear) for part in model.modules())


def test_layers_beside_the_tree_follow_the_device():
    model = build()
    groups, plan = without_units(model)
    apply_plan(model, groups, plan)
    moved = model.to("meta")
    reshape_tensors(moved, groups, full_plan(groups))
    assert all(p.is_meta for p in moved.parameters())


@pytest.mark.parametrize("family", ["bert", "albert", "mpnet"])
def test_hooks_of_the_user_stay(family):
    model, seen = build(family), []
    groups, plan = without_units(model)
    consumers = [group.consumers[0] for group in groups if group.kind in GONE]
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.append(path))
        for path in consumers
    ]
    apply_plan(model, groups, plan)
    outputs(model, inputs_of("sequence"))
    assert set(seen) == set(consumers)
    seen.clear()
    for handle in handles:
        handle.remove()
    outputs(model, inputs_of("sequence"))
    assert not seen


@pytest.mark.parametrize(("family", "head"), [("bert", "sequence"), ("vit", "image")])
def test_dynamic_int8_is_as_close_as_that_of_a_dense_model(family, head):
    model, inputs = build(family, head), inputs_of(head)
    groups, plan = without_units(model, layers=2)
    apply_plan(model, groups, plan)
    with pytest.warns(Warning, match="deprecated"):
        small = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )
    want, got = outputs(model, inputs), outputs(small, inputs)
    assert (want - got).abs().max() < 0.2 * want.std()


def rival(name):
    """Optimizers of torch, made as people make them."""
    kind = getattr(torch.optim, name)
    extra = {"SGD": {"momentum": 0.9}, "Rprop": {}, "Adagrad": {}}.get(name, {})
    return partial(kind, **extra)


def matrices(parameters, lr):
    """Muon takes matrices only; the rest goes its own way."""
    given = [p for p in parameters if p.ndim == 2]
    return torch.optim.Muon(given, lr=lr)


OPTIMIZERS = {
    name: rival(name)
    for name in ("Adafactor", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "SGD", "Adagrad")
    if hasattr(torch.optim, name)
} | ({"Muon": matrices} if hasattr(torch.optim, "Muon") else {})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("norm", [2.0, float("inf")])
def test_training_goes_on_after_sublayers_vanished(name, norm):
    model = build().train()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-3)
    inputs = inputs_of("sequence") | {"labels": torch.arange(32) % 3}

    def step():
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(held, 1.0, norm)
        optimizer.step()

    step()
    groups, plan = without_units(model)
    update_optimizers([optimizer], apply_plan(model, groups, plan))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step()
    step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


class Grouped(Classifier):
    """A group for each parameter, as discriminative learning rates have it."""

    def configure_optimizers(self):
        return torch.optim.AdamW(
            [{"params": [p], "lr": 1e-3} for p in self.parameters() if p.requires_grad]
        )


class Seeded(pl.Callback):
    """The same dropout in every run."""

    def on_train_epoch_start(self, trainer, pl_module):
        torch.manual_seed(trainer.current_epoch)


def in_order(kind):
    """A module whose training rows come in the same order in every run."""

    class InOrder(kind):
        def train_dataloader(self):
            return DataLoader(Sentences(64), batch_size=16)

    return InOrder


def pins():
    return {"layer.0.heads": 0, "layer.1.ffn": 0}


def cutting(**options):
    return pruning_units(0.5, pins=pins(), cuts=1, first_epoch=1, verbose=False, **options)


@pytest.mark.parametrize("module", [Classifier, Grouped])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_resumes_with_the_groups_it_had(module, tmp_path):
    module = in_order(module)
    straight, begun, again = module(), module(), module()
    run = trainer(Seeded(), cutting(), max_epochs=3)
    run.fit(straight)
    first = trainer(Seeded(), cutting(), max_epochs=2)
    first.fit(begun)
    first.save_checkpoint(tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert all(t.numel() for t in stored["state_dict"].values())
    resumed = trainer(Seeded(), cutting(), max_epochs=3)
    resumed.fit(again, ckpt_path=tmp_path / "half.ckpt", weights_only=True)

    def grouped(run, module):
        names = {id(p): name for name, p in module.named_parameters()}
        return parameter_names(run.strategy.optimizers, names)

    assert grouped(resumed, again) == grouped(run, straight)
    held = [p for g in resumed.optimizers[0].param_groups for p in g["params"]]
    assert all(p.numel() for p in held)
    for (name, mine), theirs in zip(
        again.named_parameters(), straight.named_parameters(), strict=True
    ):
        assert (name, True) == (theirs[0], torch.equal(mine, theirs[1])), name


class Plateau(Grouped):
    """Gets worse as soon as it is cut."""

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.log("score", float(sum(p.numel() for p in self.parameters())))


def test_a_rollback_brings_the_parameters_back_to_their_groups():
    module = Plateau()
    shapes = {n: p.shape for n, p in module.named_parameters()}
    run = trainer(
        cutting(max_drop=1.0, monitor="score", on_drop="stop"), max_epochs=6, num_sanity_val_steps=0
    )
    run.fit(module)
    assert {n: p.shape for n, p in module.named_parameters()} == shapes
    held = [[id(p) for p in g["params"]] for g in run.optimizers[0].param_groups]
    assert held == [[id(p)] for p in module.parameters()]


def test_layers_beside_the_tree_go_with_their_layer():
    module = Classifier()
    loss = lambda net, batch: net.loss(batch)  # noqa: E731
    how = {
        "importance": Importance(relevance="gradient"),
        "constraints": Constraints({}, {}, pins()),
    }
    prune(module, module.val_dataloader(), 0.5, loss=loss, **how)
    callback = pruning_layers(threshold=None, target_layers=1, method="none", verbose=False)
    trainer(callback, max_epochs=2).fit(module)
    assert len(module.model.bert.encoder.layer) == 1
    assert all(p.numel() for p in module.parameters())
