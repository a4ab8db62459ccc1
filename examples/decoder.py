"""Prune a decoder: its gated feed-forward neurons and its KV heads with their query heads.

python examples/decoder.py                     # a tiny Llama on generated text, seconds
python examples/decoder.py FOLDER TEXT_FILE    # yours: any causal model of transformers, with text
"""

import math
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from lightning_mi_prune import MutualInformationPruning


class LanguageModel(pl.LightningModule):
    """Nothing in it is about pruning."""

    def __init__(self, network: PreTrainedModel, lr: float) -> None:
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss: Tensor = self.network(input_ids=batch[0], labels=batch[0]).loss
        return loss

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def tiny() -> tuple[PreTrainedModel, Tensor]:
    """A small Llama, and text in which each token follows from the two before it."""
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        eos_token_id=None,  # no token ends a sequence
    )
    tokens = torch.randint(31, (768, 24))
    for place in range(2, 24):
        tokens[:, place] = (tokens[:, place - 1] + 2 * tokens[:, place - 2]) % 31
    return LlamaForCausalLM(config), tokens


def pretrained(folder: str, file: str, length: int = 128) -> tuple[PreTrainedModel, Tensor]:
    """A model of a folder, and a text file in pieces of ``length`` tokens."""
    ids = AutoTokenizer.from_pretrained(folder)(Path(file).read_text())["input_ids"]
    rows = len(ids) // length
    tokens = torch.tensor(ids[: rows * length]).view(rows, length)
    return AutoModelForCausalLM.from_pretrained(folder), tokens


def fit(module: LanguageModel, tokens: Tensor, epochs: int, *callbacks: pl.Callback) -> str:
    """Train; returns how large and how good the module is then."""
    trainer = pl.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), logger=False, enable_checkpointing=False
    )
    rows = len(tokens) // 8
    train, test = TensorDataset(tokens[rows:]), TensorDataset(tokens[:rows])
    trainer.fit(module, DataLoader(train, 16), DataLoader(test, 16))
    size = sum(p.numel() for p in module.parameters())
    return f"{size:,} parameters, perplexity {math.exp(trainer.callback_metrics['val_loss']):.2f}"


if __name__ == "__main__":
    pl.seed_everything(0, verbose=False)
    network, tokens = pretrained(sys.argv[1], sys.argv[2]) if sys.argv[2:] else tiny()
    module = LanguageModel(network, lr=1e-5 if sys.argv[2:] else 3e-3)
    pruning = MutualInformationPruning(sparsity=0.5)
    before = fit(module, tokens, 2)
    after = fit(module, tokens, 4, pruning)
    print(pruning.graph)
    print(f"before: {before}\nafter:  {after}")
    generated: Any = network.generate(tokens[:1, :4], max_new_tokens=8, do_sample=False)
    print(generated.tolist())
