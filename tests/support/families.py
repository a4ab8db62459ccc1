"""Tiny random models of twelve families of transformers, as plain folders of them must open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family", "made"]

_VOCABULARY = 64
_SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
_TEXT = {**_SIZES, "vocab_size": _VOCABULARY, "max_position_embeddings": 40}
_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PICTURE = {**_SIZES, "image_size": 8, "patch_size": 4, "num_channels": 2}


@dataclass(frozen=True)
class Family:
    """A model, and what of it is cut.

    Args:
        name: Class of transformers.
        auto: Auto class that opens it.
        config: Its config, by the sizes.
        inputs: Names of its inputs.
        kinds: Kinds of units that are cut; None for those by default.
        pins: Widths that are asked for, so that heads are cut where a config can describe it.
        ties: Fields of which the second is divided by the first.
        sparsity: Share of its prunable parameters to remove.
    """

    name: str
    auto: str
    config: Callable[[], dict[str, Any]]
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    kinds: tuple[str, ...] | None = None
    pins: dict[str, int] = field(default_factory=dict)
    ties: tuple[tuple[str, str], ...] = ()
    sparsity: float = 0.3

    def build(self) -> nn.Module:
        """The model, with weights large enough that every unit matters."""
        import transformers

        torch.manual_seed(0)
        cls = getattr(transformers, self.name)
        model: nn.Module = cls(cls.config_class(**self.config())).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "norm" not in name.lower():
                    parameter.normal_(0, 0.2)
        return model

    def batch(self, seed: int = 0) -> dict[str, Tensor]:
        """One batch, of as many examples as a hidden size of 24 needs."""
        made_inputs = made(seed)
        return {name: made_inputs[name] for name in self.inputs}


def made(seed: int = 0, rows: int = 32) -> dict[str, Tensor]:
    """Inputs of all kinds, by name."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, _VOCABULARY, (rows, 8), generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids.flip(1),
        "pixel_values": torch.randn(rows, 2, 8, 8, generator=generator),
        "input_features": torch.randn(rows, 8, 20, generator=generator),
    }


_GROUPED = (("num_key_value_heads", "num_attention_heads"),)
_WITH_HIDDEN = ("ffn", "heads", "hidden", "pooler")

FAMILIES: dict[str, Family] = {
    "bert": Family(
        "BertForSequenceClassification",
        "AutoModelForSequenceClassification",
        lambda: _TEXT,
        kinds=_WITH_HIDDEN,
        pins={"heads": 3},
        ties=(("num_attention_heads", "hidden_size"),),
        sparsity=0.5,
    ),
    "roberta": Family(
        "RobertaForSequenceClassification", "AutoModelForSequenceClassification", lambda: _TEXT
    ),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        "AutoModelForSequenceClassification",
        lambda: {
            "vocab_size": _VOCABULARY,
            "dim": 24,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 40,
            "max_position_embeddings": 40,
        },
    ),
    "electra": Family(
        "ElectraForSequenceClassification",
        "AutoModelForSequenceClassification",
        lambda: {**_TEXT, "embedding_size": 24},
    ),
    "modernbert": Family(
        "ModernBertForSequenceClassification",
        "AutoModelForSequenceClassification",
        lambda: {**_TEXT, **_ENDS, "cls_token_id": 1, "sep_token_id": 2},
        kinds=("ffn", "heads", "hidden"),
        pins={"heads": 3},
        ties=(("num_attention_heads", "hidden_size"),),
        sparsity=0.5,
    ),
    "llama": Family(
        "LlamaForCausalLM",
        "AutoModelForCausalLM",
        lambda: {**_TEXT, **_ENDS, "num_key_value_heads": 2},
        pins={"heads": 1},
        ties=_GROUPED,
        sparsity=0.4,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "AutoModelForCausalLM",
        lambda: {**_TEXT, **_ENDS, "num_key_value_heads": 2, "head_dim": 8},
        pins={"heads": 1},
        ties=_GROUPED,
        sparsity=0.4,
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "AutoModelForCausalLM",
        lambda: {
            "vocab_size": _VOCABULARY,
            "n_embd": 24,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 40,
            **_ENDS,
        },
        kinds=("ffn", "heads", "hidden"),
        pins={"heads": 3},
        ties=(("n_head", "n_embd"),),
        sparsity=0.5,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "AutoModelForSeq2SeqLM",
        lambda: {
            "vocab_size": _VOCABULARY,
            "d_model": 24,
            "d_kv": 6,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        ("input_ids", "attention_mask", "decoder_input_ids"),
        pins={"heads": 3},
    ),
    "vit": Family(
        "ViTForImageClassification",
        "AutoModelForImageClassification",
        lambda: _PICTURE,
        ("pixel_values",),
        pins={"heads": 3},
    ),
    "clip": Family(
        "CLIPModel",
        "AutoModel",
        lambda: {
            "text_config": {**_TEXT, **_ENDS},
            "vision_config": {**_PICTURE, "intermediate_size": 48},
            "projection_dim": 16,
        },
        ("input_ids", "attention_mask", "pixel_values"),
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "AutoModelForSpeechSeq2Seq",
        lambda: {
            "vocab_size": _VOCABULARY,
            "num_mel_bins": 8,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
            "decoder_ffn_dim": 40,
            "d_model": 24,
            "max_source_positions": 10,
            "max_target_positions": 20,
            "decoder_start_token_id": 1,
            **_ENDS,
        },
        ("input_features", "decoder_input_ids"),
    ),
}
