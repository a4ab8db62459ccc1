"""Input that cannot work is refused in one sentence, before anything runs or changes."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForTokenClassification

from lightning_mi_prune import MutualInformationPruning, prune
from lightning_mi_prune.callbacks.monitors import logged_in_code
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.options import Calibration, Constraints
from tests.support.boring import Classifier, Data, Sentences, trainer
from tests.support.models import CONFIGS, batch, build
from tests.support.pruning import pruning_units

ROWS = [batch(64, seed=seed) for seed in range(4)]
IDS = [rows["input_ids"] for rows in ROWS]


def squares(model, inputs):
    return model(**inputs).logits.square().mean()


def own_loss(model, inputs):
    return model(**inputs).loss


def detached(model, inputs):
    return squares(model, inputs).detach()


def each(model, inputs):
    return model(**inputs).logits.square()


def number(model, inputs):
    return 1.0


def tokens(model, inputs):
    return model(inputs[0]).logits.square().mean()


def on_meta():
    with torch.device("meta"):
        return build()


def in_inference():
    with torch.inference_mode():
        return build()


def compiled_inside():
    model = build()
    layer = model.bert.encoder.layer[0]
    layer.intermediate = torch.compile(layer.intermediate, backend="eager")
    return model


def token_classifier():
    return AutoModelForTokenClassification.from_config(CONFIGS["bert"](num_labels=2))


CASES = {
    "generator": (build, (x for x in ROWS), {}, r"generator was given.*Pass list\(batches\)"),
    "zip": (build, zip(IDS, IDS, strict=True), {}, "zip was given"),
    "iterator of a loader": (build, iter(DataLoader(Sentences(64), 8)), {}, "used up"),
    "empty list": (build, [], {}, "list gave no batches"),
    "empty loader": (build, DataLoader([], 8), {}, "DataLoader gave no batches"),
    "dropped last": (build, DataLoader(Sentences(5), 8, drop_last=True), {}, "no batches"),
    "one batch": (build, ROWS[0], {}, "Put a single batch into a list"),
    "tensor": (build, IDS[0], {}, "A Tensor was given"),
    "number": (build, 3, {}, "A int was given"),
    "labels as a mask": (
        token_classifier,
        DataLoader(TensorDataset(IDS[0], IDS[0] % 2), 8),
        {"loss": tokens},
        "in as 'attention_mask'; expected values by name",
    ),
    "tuples": (build, [(x, x % 3) for x in IDS], {"loss": tokens}, "by position"),
    "meta": (on_meta, ROWS, {}, "on the meta device; expected ordinary tensors"),
    "inference tensors": (in_inference, ROWS, {}, "made under torch.inference_mode"),
    "compiled": (compiled_inside, ROWS, {}, "layer.0.intermediate' is compiled for the uncut"),
    "no labels": (build, ROWS, {"loss": own_loss}, "The loss is None; expected one number"),
    "detached": (build, ROWS, {"loss": detached}, "without gradients; expected"),
    "vector": (build, ROWS, {"loss": each}, r"tensor of shape \(64, 3\); expected one number"),
    "float": (build, ROWS, {"loss": number}, "a float; expected one number"),
    "no parameters": (nn.Identity, ROWS, {}, "Identity has no parameters"),
    "two budgets": (build, ROWS, {"target_macs": 3}, "target_macs=3"),
    "all gone": (
        build,
        ROWS,
        {"sparsity": None, "target_parameters": 3560},
        "leaves nothing: all units of 4 groups",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_call_says_what_is_wrong(case):
    make, batches, options, message = CASES[case]
    model = make()
    before = copy.deepcopy({n: p.shape for n, p in model.named_parameters()})
    with pytest.raises(PruningError, match=message) as refusal:
        prune(model, batches, **{"sparsity": 0.5, "loss": squares, **options})
    assert "\n" not in str(refusal.value)
    assert {n: p.shape for n, p in model.named_parameters()} == before
    for part in model.modules():
        assert not part._state_dict_hooks
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert "_lightning_mi_prune_tracker" not in vars(part)
    if hasattr(model, "config"):
        assert not hasattr(model.config, "pruning_plan")


def test_under_inference_mode():
    with torch.inference_mode(), pytest.raises(PruningError, match=r"under torch.inference_mode"):
        prune(build(), ROWS, 0.5)


def test_all_may_go_where_that_is_asked_for():
    model = build()
    everything = {"constraints": Constraints(pins={"ffn|heads": 0})}
    prune(model, ROWS, 0.999, loss=squares, **everything)
    assert model(**ROWS[0]).logits.isfinite().all()


class Pair(nn.Module):
    """Two positional arguments, one of which is a mask or an input."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(3, 16), nn.Linear(16, 2)

    def forward(self, x, mask):
        return self.down(self.up(x).relu()) * mask[..., None]


class Scaled(Pair):
    def forward(self, x, scale=None):
        return self.down(self.up(x).relu()) * scale


def test_values_by_position_go_where_they_are_meant_to():
    x, ones = torch.randn(200, 3), torch.ones(200)
    loss = lambda net, given: net(*given).square().mean()  # noqa: E731
    prune(Pair(), [(x, ones.bool())] * 3, 0.5, loss=loss)
    prune(Pair(), [(x, ones)] * 3, 0.5, loss=loss)
    prune(Scaled(), [(x, x[:, :1])] * 3, 0.5, loss=loss)
    with pytest.raises(PruningError, match="in as 'mask'"):
        prune(Pair(), [(x, torch.arange(200) % 3)] * 3, 0.5, loss=loss)
    with pytest.raises(PruningError, match=r"3 values does not fit Pair.forward\(x, mask\)"):
        prune(Pair(), [(x, ones, ones)] * 3, 0.5, loss=loss)
    mine = lambda net, given: net(given[0], given[1].bool())  # noqa: E731
    prune(
        Pair(),
        [(x, torch.arange(200) % 3)] * 3,
        0.5,
        forward=mine,
        calibration=Calibration(gradient_steps=1),
    )


# Metrics


class Dynamic(Classifier):
    def validation_step(self, batch, index):
        for name in ("loss",):
            self.log(f"val_{name}", self.loss(batch))


class Handed(Classifier):
    def validation_step(self, batch, index):
        log_with(self, self.loss(batch))


def log_with(module, value):
    module.log("anything", value)


class Mapped(Classifier):
    def validation_step(self, batch, index):
        self.log_dict({"val_loss": self.loss(batch), "other": torch.log(torch.tensor(2.0))})


def test_names_are_read_off_the_code_or_left_open():
    assert logged_in_code([Classifier()]) == {"val_loss"}
    assert logged_in_code([Mapped()]) == {"val_loss", "other"}
    assert logged_in_code([Dynamic()]) is None
    assert logged_in_code([Handed()]) is None


def watching(monitor):
    return pruning_units(0.5, max_drop=9.0, monitor=monitor, mode="min", verbose=False, floor=0.1)


@pytest.mark.parametrize("make", [Classifier, Mapped, Dynamic, Handed])
def test_a_monitor_that_is_not_there_is_refused_before_a_step(make):
    class Counting(make):
        steps = 0

        def training_step(self, batch, index):
            type(self).steps += 1
            return super().training_step(batch, index)

    with pytest.raises(MisconfigurationException, match="monitor='nope'") as refusal:
        trainer(watching("nope"), max_epochs=4).fit(Counting(), Data())
    assert Counting.steps == 0
    assert "expected one of ['" in str(refusal.value)
    assert "test_loss" not in str(refusal.value)


@pytest.mark.parametrize(
    ("make", "monitor"), [(Classifier, "val_loss"), (Dynamic, "val_loss"), (Handed, "anything")]
)
def test_a_monitor_that_is_there_passes(make, monitor):
    trainer(watching(monitor), max_epochs=4).fit(make(), Data())


# Compiled parts


class Augmented(Classifier):
    def __init__(self):
        super().__init__()
        self.augment = torch.compile(nn.Identity(), backend="eager")


class Inside(Classifier):
    def __init__(self, what):
        super().__init__()
        bert = self.model.bert
        if what == "embeddings":
            bert.embeddings = torch.compile(bert.embeddings, backend="eager")
        elif what == "in place":
            bert.encoder.layer[1].compile(backend="eager")
        else:
            self.model = torch.compile(self.model, backend="eager")


def test_what_is_not_cut_may_be_compiled():
    trainer(MutualInformationPruning(0.5, verbose=False), max_epochs=2).fit(Augmented(), Data())
    run = trainer(MutualInformationPruning(0.5, verbose=False), max_epochs=2)
    run.fit(Inside("embeddings"), Data())


@pytest.mark.parametrize("what", ["in place", "whole"])
def test_what_is_cut_may_not_be_compiled(what):
    with pytest.raises(MisconfigurationException, match="compiled for the uncut shape"):
        trainer(MutualInformationPruning(0.5, verbose=False)).fit(Inside(what), Data())
