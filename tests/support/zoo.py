"""Tiny models, one of each kind, with batches to train them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from tests.support.runs import Resumable

__all__ = ["ZOO", "Kind", "Learner", "learner"]

VOCABULARY = 41
_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _of(name: str, **sizes: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, name.split("For")[0].removesuffix("LMHeadModel") + "Config")
    model: nn.Module = getattr(transformers, name)(config(**sizes))
    return model


class Depthwise(nn.Module):
    """Inverted bottlenecks with depthwise convolutions, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.expand = nn.ModuleList(nn.Conv2d(12, 36, 1, bias=False) for _ in range(2))
        self.depth = nn.ModuleList(nn.Conv2d(36, 36, 3, padding=1, groups=36) for _ in range(2))
        self.norm = nn.ModuleList(nn.BatchNorm2d(36) for _ in range(2))
        self.project = nn.ModuleList(nn.Conv2d(36, 12, 1) for _ in range(2))
        self.head = nn.Linear(12, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        parts = zip(self.expand, self.depth, self.norm, self.project, strict=True)
        for expand, depth, norm, project in parts:
            x = x + project(norm(depth(expand(x).relu())).relu())
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    """Every layer reads all layers before it, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        widths = (12, 20, 28)
        self.stem = nn.Conv2d(3, 12, 3, 2, 1)
        self.norm = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.grow = nn.ModuleList(nn.Conv2d(width, 8, 3, padding=1) for width in widths)
        self.head = nn.Linear(36, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for norm, grow in zip(self.norm, self.grow, strict=True):
            x = torch.cat([x, grow(norm(x).relu())], 1)
        return self.head(x.relu().mean((2, 3)))


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` as it comes."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 40, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(24, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(input_ids)).mean(1))


class Residual(nn.Module):
    """Two blocks of neurons that add to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.up = nn.ModuleList(nn.Linear(24, 40) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(40, 24) for _ in range(2))
        self.head = nn.Linear(24, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(functional.gelu(up(x)))
        return self.head(x.mean(1))


class Functional(nn.Module):
    """Blocks that multiply with parameters of their own, without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 24)
        self.blocks = nn.ModuleList(FunctionalBlock() for _ in range(2))
        self.head = nn.Linear(24, 3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(1))


class FunctionalBlock(nn.Module):
    """Neurons that one matrix makes and another reads, stored in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(24, 40) / 5)
        self.down = nn.Parameter(torch.randn(24, 40) / 6)
        self.bias = nn.Parameter(torch.zeros(24))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.gelu(x @ self.up), self.down, self.bias)


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Kind:
    """A model of the zoo.

    Args:
        build: Makes it, with random weights.
        data: ``"text"`` (with a class), ``"tokens"`` (to predict) or ``"pictures"``.
        kinds: Kinds of unit that must be found and verified.
        generates: Whether it generates text.
    """

    build: Callable[[], nn.Module]
    data: str
    kinds: tuple[str, ...]
    generates: bool = False


ZOO: dict[str, Kind] = {
    "bert": Kind(
        lambda: _of("BertForSequenceClassification", **_TEXT, num_labels=3),
        "text",
        ("ffn", "heads"),
    ),
    "gpt2": Kind(
        lambda: _of(
            "GPT2LMHeadModel",
            vocab_size=VOCABULARY,
            n_embd=24,
            n_layer=2,
            n_head=4,
            n_positions=32,
            **_ENDS,
        ),
        "tokens",
        ("ffn", "heads"),
        generates=True,
    ),
    "llama": Kind(
        lambda: _of("LlamaForCausalLM", **_TEXT, num_key_value_heads=2, **_ENDS),
        "tokens",
        ("ffn", "heads"),
        generates=True,
    ),
    "t5": Kind(
        lambda: _of(
            "T5ForConditionalGeneration",
            vocab_size=VOCABULARY,
            d_model=24,
            d_kv=6,
            d_ff=40,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
        ),
        "tokens",
        ("ffn", "heads"),
        generates=True,
    ),
    "modernbert": Kind(
        lambda: _of(
            "ModernBertForSequenceClassification",
            **_TEXT,
            **_ENDS,
            cls_token_id=1,
            sep_token_id=2,
            num_labels=3,
        ),
        "text",
        ("ffn", "heads"),
    ),
    "vit": Kind(
        lambda: _of(
            "ViTForImageClassification",
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=40,
            image_size=16,
            patch_size=4,
            num_labels=3,
        ),
        "pictures",
        ("ffn", "heads"),
    ),
    "resnet": Kind(
        lambda: _of(
            "ResNetForImageClassification",
            embedding_size=12,
            hidden_sizes=[12, 20],
            depths=[2, 2],
            layer_type="basic",
            num_labels=3,
        ),
        "pictures",
        ("channels",),
    ),
    "convnext": Kind(
        lambda: _of(
            "ConvNextForImageClassification",
            hidden_sizes=[12, 20],
            depths=[2, 2],
            num_stages=2,
            patch_size=2,
            num_labels=3,
        ),
        "pictures",
        ("ffn",),
    ),
    "depthwise": Kind(Depthwise, "pictures", ("channels",)),
    "concatenated": Kind(Concatenated, "pictures", ("channels",)),
    "torch-encoder": Kind(TorchEncoder, "text", ("ffn",)),
    "hand-written": Kind(Residual, "text", ("ffn",)),
    "functional": Kind(Functional, "text", ("ffn",)),
    "mixtral": Kind(
        lambda: _of(
            "MixtralForCausalLM", **_TEXT, num_key_value_heads=2, num_local_experts=4, **_ENDS
        ),
        "tokens",
        ("ffn", "heads"),
        generates=True,
    ),
    "qwen-moe": Kind(
        lambda: _of(
            "Qwen2MoeForCausalLM",
            **_TEXT,
            **_EXPERTS,
            **_ENDS,
            num_key_value_heads=2,
            shared_expert_intermediate_size=56,
        ),
        "tokens",
        ("ffn", "heads"),
        generates=True,
    ),
}


def batches(data: str, count: int, *, seed: int) -> list[dict[str, Tensor]]:
    """Batches of eight examples with labels."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        labels = torch.randint(3, (8,), generator=generator)
        if data == "pictures":
            pictures = torch.randn(8, 3, 16, 16, generator=generator)
            found.append({"pixel_values": pictures + labels[:, None, None, None], "labels": labels})
            continue
        ids = torch.randint(3, VOCABULARY, (8, 12), generator=generator)
        found.append({"input_ids": ids, "labels": ids if data == "tokens" else ids[:, 1] % 3})
    return found


class Learner(pl.LightningModule):
    """Trains any of them; nothing in it is about pruning."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.kind = kind.build(), kind

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        if hasattr(self.network, "config"):
            return self.network(**batch).loss
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return functional.cross_entropy(self.network(**inputs), batch["labels"])

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        torch.manual_seed(1000 * self.current_epoch + index)  # dropout of a resumed run
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=8)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Resumable:
        return Resumable(batches(self.kind.data, 3, seed=0))

    def val_dataloader(self) -> DataLoader:
        return DataLoader(batches(self.kind.data, 8, seed=1), batch_size=None)


def learner(name: str) -> Learner:
    """A fresh one, with the same weights each time, ready to train."""
    return Learner(ZOO[name]).train()
