"""Inputs for Hugging Face models that are not given any, made from their config."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "example_inputs",
]

_EXAMPLES, _TOKENS, _CHOICES = 2, 12, 3
_SAMPLES = 6400  # of sound
_FRAMES = 100  # of a spectrogram


def example_inputs(module: nn.Module) -> dict[str, Tensor]:
    """Arguments of a call of a Hugging Face model, on its device.

    Args:
        module: The model.

    Raises:
        PruningError: If it is no such model, or its config does not give what it needs.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> net = BertModel(BertConfig(num_hidden_layers=1, hidden_size=24, vocab_size=50))
        >>> [(name, tuple(x.shape)) for name, x in example_inputs(net).items()]
        [('input_ids', (2, 12)), ('attention_mask', (2, 12))]
    """
    config: Any = getattr(module, "config", None)
    if not hasattr(module, "dummy_inputs") or config is None:
        raise PruningError(
            f"{type(module).__name__} cannot be called without arguments; expected those of one "
            "call: discover(module, *args, **kwargs)."
        )
    accepted = inspect.signature(module.forward).parameters
    made = dict(_inputs(str(getattr(module, "main_input_name", "")), config, set(accepted)))
    if not made:
        dummy: Any = module.dummy_inputs
        made = {name: value[:_EXAMPLES] for name, value in dict(dummy).items()}
    if type(module).__name__.endswith("MultipleChoice"):  # examples x choices x positions
        made = {name: x.unsqueeze(1).repeat(1, _CHOICES, 1) for name, x in made.items()}
    device = next(module.parameters()).device
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return {n: x.to(device, dtype if x.is_floating_point() else None) for n, x in made.items()}


def _inputs(main: str, config: Any, accepted: set[str]) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    if main == "input_ids" or ("input_ids" in accepted and main in ("", "inputs")):
        ids = _tokens(config, generator)
        yield "input_ids", ids
        if "attention_mask" in accepted:
            yield "attention_mask", torch.ones_like(ids)
    if "pixel_values" in accepted and (main == "pixel_values" or hasattr(config, "vision_config")):
        yield "pixel_values", _pixels(config, generator)
    if main == "input_values":
        yield main, torch.randn(_EXAMPLES, _SAMPLES, generator=generator)
    if main == "input_features":
        bins = _first(config, "num_mel_bins", "input_feat_per_channel", "feature_size") or 80
        longest = getattr(config, "max_source_positions", None)
        frames = 2 * longest if "decoder_input_ids" in accepted and longest else _FRAMES
        shape = (bins, frames) if hasattr(config, "max_source_positions") else (frames, bins)
        yield main, torch.randn(_EXAMPLES, *shape, generator=generator)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        yield "decoder_input_ids", _tokens(config, generator)


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Token ids, none of them special, but for an end of the sequence where decoders need it."""
    text = getattr(config, "text_config", None) or config
    if isinstance(text, Mapping):
        text = config
    vocabulary = int(_first(text, "vocab_size") or 100)
    special = {
        value
        for part in (config, text)
        for name, value in vars(part).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    plain = [i for i in range(min(vocabulary, 1000)) if i not in special] or [0]
    longest = int(_first(text, "max_position_embeddings") or 512)
    length = max(2, min(_TOKENS, longest - 4))
    chosen = torch.randint(0, len(plain), (_EXAMPLES, length), generator=generator)
    ids = torch.tensor(plain)[chosen]
    end = getattr(config, "eos_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(end, int) and end < vocabulary:
        ids[:, -1] = end
    return ids


def _pixels(config: Any, generator: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", None) or config
    size: Any = _first(vision, "image_size", "input_size") or 224
    height, width = size[-2:] if isinstance(size, (list, tuple)) else (size, size)
    channels = _first(vision, "num_channels", "in_channels", "in_chans") or 3
    return torch.randn(_EXAMPLES, int(channels), int(height), int(width), generator=generator)


def _first(config: Any, *names: str) -> Any:
    """The first of some fields that a config has."""
    return next((value for n in names if (value := getattr(config, n, None)) is not None), None)
