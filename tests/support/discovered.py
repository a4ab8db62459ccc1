"""Tiny models of no described family, with the graphs that one call of each shows."""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn

from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.core.errors import PruningWarning
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.discovery.discover import discover

IDS = torch.arange(14).reshape(2, 7) % 11 + 3


class Residual(nn.Module):
    """Convolutions of every kind around a residual addition, and a flattened output."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.inner = nn.BatchNorm2d(12)
        self.back = nn.Conv2d(12, 8, 1)
        self.last = nn.Conv2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6 * 4, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.back(self.inner(self.depthwise(self.deep(x).relu())).relu())
        return self.head(self.last(x).relu().flatten(1))


def convolutions():
    return Residual(), (torch.randn(2, 3, 4, 4),), {}


def grouped_queries():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    return LlamaForCausalLM(config), (), {"input_ids": IDS}


def fused_queries():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return GPT2LMHeadModel(config), (), {"input_ids": IDS}


def torch_encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return encoder, (torch.randn(2, 5, 16),), {}


MODELS = {
    "convolutions": convolutions,
    "grouped queries": grouped_queries,
    "fused queries": fused_queries,
    "torch encoder": torch_encoder,
}


def build(name, seed=0):
    """A model in evaluation mode, and its call."""
    torch.manual_seed(seed)
    model, args, kwargs = MODELS[name]()
    for module in model.modules():  # statistics other than those of a new layer
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval(), RecordedCall(args, kwargs)


@cache
def graph_of(name):
    model, call = build(name)
    with warnings.catch_warnings():  # of attention of torch, only the neurons may be found
        warnings.simplefilter("ignore", PruningWarning)
        return discover(model, *call.args, **call.kwargs)


def kinds_of(name):
    return sorted({group.kind for group in graph_of(name).groups})


def half(graph, kinds):
    """A plan that keeps every other unit of some kinds of group."""
    kept = {
        group.name: tuple(range(0, group.size, 2 if group.kind in kinds else 1))
        for group in graph.groups
    }
    return graph.full.joined(PruningPlan({a.name: a.size for a in graph.groups}, kept))


@torch.no_grad()
def output_of(model, call):
    out = model(*call.args, **call.kwargs)
    return out if isinstance(out, Tensor) else out.logits
