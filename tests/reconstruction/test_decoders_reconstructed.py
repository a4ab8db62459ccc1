"""On texts that nothing was fitted to, a decoder is no further from the dense one than before."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_mi_prune import prune
from lightning_mi_prune.core.options import Reconstruction

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
# With nothing, a norm, or a factor between the neurons and the residual stream.
DECODERS = {
    "llama": {},
    "gemma3_text": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.3},
}


def error(dense, pruned, texts):
    """Mean squared difference of the logits as a share of their variance."""
    with torch.no_grad():
        one, two = (model(texts).logits for model in (dense, pruned))
    return float((one - two).square().mean() / one.var())


@pytest.mark.parametrize("name", DECODERS)
def test_reconstruction_brings_a_decoder_nearer_to_the_dense_one(name):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, **DECODERS[name])
    dense = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that layers change the stream
    ids = [torch.randint(0, 64, (8, 24)) for _ in range(17)]
    batches = [{"input_ids": each, "labels": each} for each in ids[:-1]]
    errors = {}
    for method in ("compensation", "layerwise"):
        model = copy.deepcopy(dense)
        prune(model, batches, sparsity=0.3, kinds=["ffn"], reconstruction=Reconstruction(method))
        errors[method] = error(dense, model, ids[-1])
    assert errors["layerwise"] < 1.02 * errors["compensation"]
