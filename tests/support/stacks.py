"""A BERT of six small layers of which two say what the one below them says."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from tests.support.runs import Module

STACK = "model.bert.encoder.layer"
COPIES = (2, 3)


def deep_bert(*, copies: tuple[int, ...] = COPIES, layers: int = 6) -> nn.Module:
    """Layers turn their input far, but for the copies, which hand it on."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=24,
            num_hidden_layers=layers,
            num_attention_heads=4,
            intermediate_size=40,
            max_position_embeddings=32,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    with torch.no_grad():
        for place, layer in enumerate(model.bert.encoder.layer):
            for out in (layer.attention.output.dense, layer.output.dense):
                out.weight.mul_(0.0 if place in copies else 100.0)
    return model.train()


class Deep(Module):
    """The ordinary module around it."""

    def __init__(self, *, optimizer: str = "adamw", **options: object) -> None:
        super().__init__(optimizer=optimizer, lr=1e-4, **options)
        self.model = deep_bert()


class Scored(Deep):
    """Its score is the share of the layers that is left: every layer is missed alike."""

    def validation_step(self, batch, index):
        super().validation_step(batch, index)
        self.log("score", self.score(), batch_size=1)

    def score(self):
        return len(self.model.bert.encoder.layer) / 6


class Tolerant(Scored):
    """It can do without one layer, not without two."""

    def score(self):
        return min(1.0, super().score() + 1 / 6)
