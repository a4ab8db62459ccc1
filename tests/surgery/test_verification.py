"""Whatever a user built around a network is found before the first cut: on a copy, on one batch."""

from __future__ import annotations

import copy
import random
import threading
from dataclasses import dataclass, replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from transformers import AutoModel

from lightning_mi_prune import (
    CKALayerPruning,
    MutualInformationPruning,
    PruningGraph,
    linear_group,
    prune,
)
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from tests.support.boring import Classifier, Data, Sentences, trainer
from tests.support.graphs import graph_of
from tests.support.models import CONFIGS, batch, build, randomize
from tests.support.pruning import pruning_units


def encoder(family="bert"):
    network = AutoModel.from_config(CONFIGS[family]())
    randomize(network)
    return network


class Own(pl.LightningModule):
    """An encoder under a head of the user's own."""

    def __init__(self, family="bert"):
        super().__init__()
        self.network, self.head = encoder(family), nn.Linear(24, 3)
        self.steps = 0

    def features(self, batch):
        mine = {key: batch[key] for key in ("input_ids", "attention_mask")}
        return self.network(**mine).last_hidden_state[:, 0]

    def loss(self, batch):
        return nn.functional.cross_entropy(self.head(self.features(batch)), batch["labels"])

    def training_step(self, batch, index):
        self.steps += 1
        return self.loss(batch)

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Functional(Own):
    """Reads the hidden size in a product of its own."""

    def __init__(self, family="bert"):
        super().__init__(family)
        self.matrix, self.head = nn.Parameter(torch.randn(24, 3)), nn.Identity()

    def features(self, batch):
        return super().features(batch) @ self.matrix


class OnlyInTraining(Own):
    """Validation runs another head."""

    def __init__(self, family="bert"):
        super().__init__(family)
        self.other = nn.Linear(24, 3)

    def validation_step(self, batch, index):
        self.log("val_loss", self.other(self.features(batch)).square().mean())


def residual(**options):
    kinds = ["ffn", "heads", "hidden"]
    return pruning_units(0.5, kinds=kinds, widths="uniform", verbose=False, **options)


def fitted(module, *callbacks, **options):
    run = trainer(*callbacks, **{"max_epochs": 2, **options})
    run.fit(module, Data())
    return run


def test_a_consumer_that_only_training_runs_is_refused_before_anything_changes():
    module = OnlyInTraining()
    before = copy.deepcopy(module.state_dict())
    where = r"'head' \(Linear\) in training_step"
    with pytest.raises(PruningError, match=where) as refusal:
        fitted(module, residual())
    assert "'network.hidden'" in str(refusal.value)
    assert "Expected" in str(refusal.value)
    assert module.steps == 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert not hasattr(module.network.config, "pruning_plan")


def test_a_consumer_that_only_validation_runs_is_refused_before_the_cut():
    module = OnlyInTraining()
    with pytest.raises(PruningError, match=r"'other' \(Linear\) in validation_step"):
        fitted(module, residual(), num_sanity_val_steps=0)
    assert module.head.in_features == module.other.in_features == 24


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_head_of_the_user_is_cut_with_the_encoder(family, sanity):
    module = Own(family)
    fitted(module, residual(), num_sanity_val_steps=sanity)
    assert module.steps > 0
    assert module.head.in_features < 24


def test_a_weight_of_the_user_is_cut_with_the_encoder():
    module = Functional()
    fitted(module, residual())
    assert module.matrix.shape[0] < 24


def test_what_the_groups_hold_themselves_is_not_refused():
    module = Own()
    fitted(module, MutualInformationPruning(0.5, verbose=False))
    assert module.steps > 0
    assert module.network.config.hidden_size == 24


class Towers(pl.LightningModule):
    """Two encoders whose outputs are compared."""

    def __init__(self):
        super().__init__()
        self.query, self.document = encoder(), encoder("roberta")

    def training_step(self, batch, index):
        mine = {key: batch[key] for key in ("input_ids", "attention_mask")}
        a, b = (net(**mine).last_hidden_state[:, 0] for net in (self.query, self.document))
        return (1 - nn.functional.cosine_similarity(a, b)).mean()

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def test_two_towers_agree_or_are_refused():
    fitted(Towers(), MutualInformationPruning(0.5, verbose=False))
    with pytest.raises(PruningError, match=r"names 'hidden'; this model has"):
        fitted(Towers(), residual(include=r"^query"))  # it is compared entry by entry


# Nothing of the run is reached from the copy


class Watched(Classifier):
    """Has all that a careless copy would share: metrics, lists, random numbers, a logger."""

    def __init__(self):
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)
        self.norm, self.seen, self.draws = nn.BatchNorm1d(3), [], []
        self.lock = threading.Lock()

    def training_step(self, batch, index):
        labels = batch.pop("labels")
        self.draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))  # noqa: S311
        logits = self.norm(self.model(**batch).logits)
        self.accuracy(logits, labels)
        self.log("train_accuracy", self.accuracy)
        if self.logger is not None:
            self.logger.log_metrics({"by_hand": float(index)}, step=self.global_step)
        return nn.functional.cross_entropy(logits, labels)

    def validation_step(self, batch, index):
        self.seen.append(index)
        self.log("val_loss", self.loss(batch))


class FirstEpoch(pl.Callback):
    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            states = (random.getstate(), np.random.get_state()[1].tolist())
            self.found = (states, torch.get_rng_state().tolist(), list(module.draws))
            self.found += (list(module.seen), module.accuracy.metric_state["tp"].tolist())
            self.weights = copy.deepcopy(module.state_dict())


@pytest.mark.filterwarnings("ignore:.*num_workers")
def test_the_dry_run_leaves_no_trace(tmp_path):
    found = []
    for number, callbacks in enumerate([[], [MutualInformationPruning(0.5, verbose=False)]]):
        pl.seed_everything(1, verbose=False)
        module, first = Watched(), FirstEpoch()
        logger = CSVLogger(tmp_path, version=number)
        fitted(module, first, *callbacks, logger=logger, log_every_n_steps=1)
        rows = (tmp_path / "lightning_logs" / f"version_{number}" / "metrics.csv").read_text()
        assert rows.count("\n") > 8
        found.append((first.found, first.weights, rows.splitlines()[1:5]))
    (plain, weights, _), (mine, mine_weights, _) = found
    assert mine == plain
    assert all(torch.equal(mine_weights[name], value) for name, value in weights.items())


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        assert optimizer.param_groups[0]["lr"] > 0
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        schedule.step()
        self.untoggle_optimizer(optimizer)


class Penalized(Classifier):
    """Needs gradients inside of the step."""

    def training_step(self, batch, index):
        loss = self.loss(batch)
        (gradient,) = torch.autograd.grad(loss, [self.model.classifier.weight], create_graph=True)
        self.last = loss  # in the middle of a graph: it cannot be copied
        return loss + gradient.square().sum()


class OneArgument(Classifier):
    def training_step(self, batch):
        return self.loss(batch)

    def validation_step(self, batch, index, dataloader_idx=0):
        self.log("val_loss", self.loss(batch))


@dataclass
class Rows:
    input_ids: Tensor
    labels: Tensor


class Collated(Classifier):
    def loss(self, batch):
        return self.model(input_ids=batch.input_ids, labels=batch.labels).loss

    def train_dataloader(self):
        def collate(rows):
            return Rows(*(torch.stack([r[k] for r in rows]) for k in ("input_ids", "labels")))

        return torch.utils.data.DataLoader(Sentences(64), batch_size=16, collate_fn=collate)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("make", [Manual, Penalized, OneArgument, Collated])
def test_modules_of_all_kinds_are_not_refused(make):
    module = make()
    run = trainer(pruning_units(0.5, verbose=False, positions=512), max_epochs=2)
    run.fit(module)
    assert not run.interrupted


class Singular(Classifier):
    """Its step knows the one object it may run on."""

    def setup(self, stage):
        self.me = id(self)

    def training_step(self, batch, index):
        if id(self) != self.me:
            raise ValueError("not me")
        return super().training_step(batch, index)


def test_a_step_that_fails_on_every_copy_is_reported_and_skipped():
    with pytest.warns(PruningWarning, match=r"could not be tried.*training_step.*not me"):
        fitted(Singular(), MutualInformationPruning(0.5, verbose=False))


class Attentive(Classifier):
    def __init__(self):
        super().__init__()
        self.model = build("bert", attn_implementation="eager")

    def validation_step(self, batch, index):
        seen = self.model(**batch, output_attentions=True)
        self.log("val_loss", seen.attentions[1].mean())


def test_a_cut_that_empties_a_group_is_tried_too():
    module = Attentive()
    graph = graph_of(module)  # of the network alone: nobody looks at its attention there
    fitted(module, pruning_units(0.4, floor=0.25, verbose=False, graph=graph))
    module = Attentive()
    before = {name: p.shape for name, p in module.named_parameters()}
    with pytest.raises(PruningError, match=r"'model.bert.encoder.layer.0.heads' would break vali"):
        fitted(module, pruning_units(0.5, pins={"layer.0.heads": 0}, verbose=False, graph=graph))
    assert {name: p.shape for name, p in module.named_parameters()} == before


class Deepest(Classifier):
    def validation_step(self, batch, index):
        seen = self.model(**batch, output_hidden_states=True)
        self.log("val_loss", seen.loss + 0 * seen.hidden_states[2][0, 0, 0])


def test_a_reader_of_a_layer_that_may_go_is_refused():
    module = Deepest()
    callback = CKALayerPruning(threshold=None, target_layers=1, verbose=False)
    with pytest.raises(PruningError, match=r"'model.bert.encoder.layer' can lose none: IndexErr"):
        fitted(module, callback)
    assert len(module.model.bert.encoder.layer) == 2


# Without a Trainer


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.head = encoder(), nn.Linear(24, 3)

    def forward(self, input_ids, attention_mask):
        mine = {"input_ids": input_ids, "attention_mask": attention_mask}
        return self.head(self.network(**mine).last_hidden_state[:, 0])


def squares(model, inputs):
    return model(**inputs).square().mean()


def test_one_call_tries_the_cut_first():
    model, rows = Wrapped(), [batch(64, seed=seed) for seed in range(4)]
    before, layer = copy.deepcopy(model.state_dict()), "network.encoder.layer.0"
    ends = {"producers": [f"{layer}.intermediate.dense"], "consumers": [f"{layer}.output.dense"]}
    group = linear_group(model, "ffn", kind="ffn", **ends)
    half = replace(group, tensors=group.tensors[:2])  # without its consumer
    with pytest.raises(PruningError, match=r"'ffn' would break 'network.encoder.layer.0.output"):
        prune(model, rows, 0.5, loss=squares, graph=PruningGraph((half,)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model._state_dict_hooks
