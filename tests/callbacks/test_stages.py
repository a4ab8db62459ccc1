"""Stacks beyond encoders of text, in training: both halves of T5, decoders, ViT, residual CNNs."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_mi_prune import CKALayerPruning, load_pruned
from tests.support.boring import trainer
from tests.support.pruning import pruning_layers
from tests.support.runs import sha

OPTIONS = {"verbose": False, "threshold": None}


class Any(pl.LightningModule):
    """Trains whatever it is given."""

    def __init__(self, model, batches):
        super().__init__()
        self.model, self.batches = model, batches

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-4)

    def train_dataloader(self):
        return DataLoader(self.batches, batch_size=None)

    val_dataloader = train_dataloader


def tokens(count=4):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 64, (8, 10), generator=generator) for _ in range(count)]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids]


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    layers = {"num_layers": 4, "num_decoder_layers": 3, "dropout_rate": 0.0}
    return Any(T5ForConditionalGeneration(T5Config(**sizes, **ends, **layers)), tokens())


def test_both_halves_of_t5_are_shortened_apart(tmp_path):
    module, callback = t5(), pruning_layers(target_layers=2, **OPTIONS)
    run = trainer(callback, max_epochs=3)
    run.fit(module)
    (cut,) = callback.report.cuts
    assert {s.name: len(s.after) for s in cut.stacks} == {
        "model.decoder.block": 2,
        "model.encoder.block": 2,
    }
    assert all(stack.after[0] == 0 for stack in cut.stacks)  # it holds the bias of the others
    config = module.model.config
    assert (config.num_layers, config.num_decoder_layers) == (2, 2)
    ids = tokens(1)[0]["input_ids"]
    module.eval()
    cached, plain = (
        module.model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = load_pruned(t5(), tmp_path / "x.ckpt")
    assert sha(*again.state_dict().values()) == sha(*module.state_dict().values())


def test_only_the_stack_that_is_named_is_shortened():
    module = t5()
    callback = pruning_layers(target_layers=2, stacks=["model.encoder.block"], **OPTIONS)
    trainer(callback, max_epochs=3).fit(module)
    assert (len(module.model.encoder.block), len(module.model.decoder.block)) == (2, 3)


def test_a_decoder_generates_alike_with_and_without_cache():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    module = Any(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), tokens())
    trainer(pruning_layers(target_layers=2, **OPTIONS), max_epochs=3).fit(module)
    assert [layer.self_attn.layer_idx for layer in module.model.model.layers] == [0, 1]
    ids = tokens(1)[0]["input_ids"]
    module.eval()
    cached, plain = (
        module.model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_a_vision_transformer():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
    )
    generator = torch.Generator().manual_seed(0)
    pictures = [
        {
            "pixel_values": torch.randn(8, 3, 16, 16, generator=generator),
            "labels": torch.arange(8) % 2,
        }
        for _ in range(4)
    ]
    module = Any(ViTForImageClassification(config), pictures)
    callback = pruning_layers(target_layers=3, **OPTIONS)
    trainer(callback, max_epochs=3).fit(module)
    assert module.model.config.num_hidden_layers == 3
    assert callback.report.cuts[0].macs < callback.report.macs


class Block(nn.Module):
    """A residual block; the first of a stage halves the picture and widens it."""

    def __init__(self, channels, out, stride=1):
        super().__init__()
        self.first = nn.Conv2d(channels, out, 3, stride, padding=1)
        self.second = nn.Conv2d(out, out, 3, padding=1)
        self.norm = nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        y = self.norm(self.second(functional.relu(self.first(x))))
        return functional.relu(self.short(x) + y)


class Pictures(pl.LightningModule):
    """A small residual network; the blocks 2 and 3 of its second stage add nothing at first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.early = nn.Sequential(Block(8, 8), Block(8, 8))
        self.late = nn.Sequential(Block(8, 16, 2), *(Block(16, 16) for _ in range(4)))
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            for place in (1, 4):
                self.late[place].norm.weight.mul_(5)
            for place in (2, 3):
                self.late[place].norm.weight.zero_()

    def forward(self, x):
        return self.head(self.late(self.early(self.stem(x))).mean((2, 3)))

    def training_step(self, batch, index):
        return functional.cross_entropy(self(batch), torch.arange(len(batch)) % 2)

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randn(32, 3, 8, 8, generator=generator) for _ in range(4)]
        return DataLoader(batches, batch_size=None)

    val_dataloader = train_dataloader


def test_blocks_of_a_residual_stage_go_where_they_add_nothing(tmp_path):
    module, callback = Pictures(), CKALayerPruning(0.98, stacks=["late"], verbose=False)
    run = trainer(callback, max_epochs=4)
    run.fit(module)
    (cut,) = callback.report.cuts
    assert cut.stacks[0].removed == (2, 3)
    assert cut.stacks[0].clusters == ((0,), (1, 2, 3), (4,))
    assert len(module.late) == 3
    assert cut.macs < callback.report.macs
    run.save_checkpoint(tmp_path / "x.ckpt")
    again = load_pruned(Pictures(), tmp_path / "x.ckpt")
    assert sha(*again.state_dict().values()) == sha(*module.state_dict().values())
    picture = torch.randn(2, 3, 8, 8)
    assert torch.equal(again.eval()(picture), module.eval()(picture))


@pytest.mark.parametrize(
    "criterion", ["last", "random", "angle", "angular_run", "cka", "measured_loss"]
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_block_that_changes_the_shape_always_stays(criterion, seed):
    module = Pictures()
    options = {"target_layers": 1, "criterion": criterion, "seed": seed, "stacks": ["late"]}
    callback = pruning_layers(**options, **OPTIONS)
    trainer(callback, max_epochs=2).fit(module)
    assert callback.report.cuts[0].stacks[0].after == (0,)


def test_a_half_of_one_layer_is_left_alone():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4}
    ends = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = T5Config(**sizes, **ends, num_layers=4, num_decoder_layers=1)
    module = Any(T5ForConditionalGeneration(config), tokens())
    trainer(pruning_layers(target_layers=2, **OPTIONS), max_epochs=3).fit(module)
    assert (len(module.model.encoder.block), len(module.model.decoder.block)) == (2, 1)


@pytest.mark.filterwarnings("ignore:No layer is left to remove")
def test_a_stack_of_one_layer_is_fitted_on_and_loads_again(tmp_path):
    callback = pruning_layers(target_layers=1, stacks=["late"], criterion="last", **OPTIONS)
    module = Pictures()
    run = trainer(callback, max_epochs=3)
    run.fit(module)
    trainer(callback, max_epochs=3).fit(module)
    assert len(module.late) == 1
    module.load_state_dict(Pictures().state_dict())
    assert len(module.late) == 5
