"""Text models of transformers: tiny configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.zoo.models import Inputs, ZooModel, tokens

__all__ = ["SIZES", "text_models", "transformer"]

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 176,
    "vocab_size": 101,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = SIZES | SPECIAL | {"num_key_value_heads": 2}
GPT = {"n_embd": 96, "n_layer": 2, "n_head": 6, "vocab_size": 101, **SPECIAL}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 101,
    "d_model": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 176,
    "decoder_ffn_dim": 176,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 64,
    **SPECIAL,
}
T5 = {"vocab_size": 101, "d_model": 96, "d_ff": 176, "num_layers": 2, "num_heads": 6, "d_kv": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def transformer(model: str, config: str, fields: Mapping[str, Any]) -> nn.Module:
    """A model of transformers with random weights.

    Args:
        model: Name of its class.
        config: Name of the class of its config.
        fields: Fields of the config.

    Raises:
        AttributeError: If the installed transformers has no such class.
    """
    settings = getattr(transformers, config)(**fields)
    found: nn.Module = getattr(transformers, model)(settings)
    return found


def _encoder_inputs(length: int = 7) -> Inputs:
    ids = tokens(length)
    return Inputs(kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _ids(length: int = 7) -> Inputs:
    return Inputs(kwargs={"input_ids": tokens(length)})


def _decoder_inputs() -> Inputs:
    found = _encoder_inputs()
    return Inputs(kwargs={**found.kwargs, "use_cache": False})


def _uncached() -> Inputs:
    return Inputs(kwargs={"input_ids": tokens(), "use_cache": False})


def _seq2seq_inputs(length: int = 7) -> Inputs:
    found = _encoder_inputs(length)
    return Inputs(kwargs={**found.kwargs, "decoder_input_ids": tokens(), "use_cache": False})


Row = tuple[str, str, str, Mapping[str, Any], Callable[[], Inputs]]


def _encoders() -> Iterator[Row]:
    """Encoders: name, prefix of the classes, fields, inputs."""
    head, inputs = "ForSequenceClassification", _encoder_inputs
    deberta = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pad_token_id": 0}
    funnel = {"vocab_size": 101, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 96}
    same = (
        ("bert", "Bert", SIZES),
        ("bert-eager", "Bert", SIZES | {"attn_implementation": "eager"}),
        ("roberta", "Roberta", SIZES),
        ("xlm-roberta", "XLMRoberta", SIZES),
        ("camembert", "Camembert", SIZES),
        ("roberta-prelayernorm", "RobertaPreLayerNorm", SIZES),
        ("data2vec-text", "Data2VecText", SIZES),
        (
            "distilbert",
            "DistilBert",
            {"vocab_size": 101, "dim": 96, "n_layers": 2, "n_heads": 6, "hidden_dim": 176},
        ),
        ("electra", "Electra", SIZES | {"embedding_size": 48}),
        ("albert", "Albert", SIZES | {"embedding_size": 48}),
        ("mpnet", "MPNet", SIZES),
        ("convbert", "ConvBert", SIZES | {"embedding_size": 48, "conv_kernel_size": 3}),
        ("squeezebert", "SqueezeBert", SIZES | {"embedding_size": 96, "num_attention_heads": 8}),
        (
            "mobilebert",
            "MobileBert",
            SIZES | {"embedding_size": 32, "intra_bottleneck_size": 48, "num_attention_heads": 4},
        ),
        ("megatron-bert", "MegatronBert", SIZES),
        (
            "nystromformer",
            "Nystromformer",
            SIZES | {"num_landmarks": 7, "segment_means_seq_len": 7},
        ),
        ("roformer", "RoFormer", SIZES | {"embedding_size": 96}),
        ("fnet", "FNet", SIZES),
        ("ernie", "Ernie", SIZES),
        ("rembert", "RemBert", SIZES | {"input_embedding_size": 48}),
        ("layoutlm", "LayoutLM", SIZES),
        ("deberta", "Deberta", SIZES | deberta),
        (
            "deberta-v2",
            "DebertaV2",
            SIZES
            | deberta
            | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
        ),
        ("modernbert", "ModernBert", SIZES | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2}),
        ("esm", "Esm", SIZES | {"pad_token_id": 1, "mask_token_id": 2}),
        (
            "xlnet",
            "XLNet",
            {"vocab_size": 101, "d_model": 96, "n_layer": 2, "n_head": 6, "d_inner": 176},
        ),
        ("funnel", "Funnel", funnel | {"n_head": 6, "d_head": 16, "d_inner": 176}),
        ("xlm", "XLM", {"vocab_size": 101, "emb_dim": 96, "n_layers": 2, "n_heads": 6}),
        ("flaubert", "Flaubert", {"vocab_size": 101, "emb_dim": 96, "n_layers": 2, "n_heads": 6}),
    )
    for name, prefix, fields in same:
        yield name, f"{prefix}{head}", f"{prefix}Config", fields, inputs
    window = SIZES | {"attention_window": 8, "pad_token_id": 0}
    yield "longformer", f"Longformer{head}", "LongformerConfig", window, partial(inputs, 16)
    big = SIZES | {"attention_type": "original_full", **SPECIAL}
    yield "bigbird", f"BigBird{head}", "BigBirdConfig", big, inputs
    sparse = big | {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1}
    yield "bigbird-sparse", f"BigBird{head}", "BigBirdConfig", sparse, partial(inputs, 64)


def _decoders() -> Iterator[Row]:
    """Decoders: name, prefix of the classes, fields, inputs."""
    sized = GROUPED | {"head_dim": 16}
    opt = SIZES | SPECIAL | {"ffn_dim": 176, "word_embed_proj_dim": 96}
    same = (
        ("gpt-neo", "GPTNeo", GPT_NEO),
        ("gpt-neox", "GPTNeoX", SIZES | SPECIAL),
        ("gpt-bigcode", "GPTBigCode", GPT),
        ("codegen", "CodeGen", GPT | {"n_head": 4, "rotary_dim": 8}),
        ("gptj", "GPTJ", GPT | {"rotary_dim": 8}),
        ("opt", "OPT", opt),
        ("bloom", "Bloom", {"vocab_size": 101, "hidden_size": 96, "n_layer": 2, "n_head": 6}),
        ("falcon", "Falcon", SIZES | SPECIAL),
        (
            "falcon-new",
            "Falcon",
            SIZES | SPECIAL | {"new_decoder_architecture": True, "num_kv_heads": 2},
        ),
        ("mpt", "Mpt", {"vocab_size": 101, "d_model": 96, "n_layers": 2, "n_heads": 6}),
        ("llama", "Llama", SIZES | SPECIAL),
        ("llama-gqa", "Llama", GROUPED),
        ("llama-gqa-eager", "Llama", GROUPED | {"attn_implementation": "eager"}),
        ("mistral", "Mistral", GROUPED),
        ("ministral", "Ministral", sized),
        ("mixtral", "Mixtral", GROUPED | {"num_local_experts": 4, "intermediate_size": 40}),
        ("qwen2", "Qwen2", GROUPED),
        (
            "qwen2-moe",
            "Qwen2Moe",
            GROUPED | EXPERTS | {"shared_expert_intermediate_size": 56},
        ),
        ("qwen3", "Qwen3", sized),
        ("qwen3-moe", "Qwen3Moe", sized | EXPERTS),
        ("gemma", "Gemma", sized),
        ("gemma2", "Gemma2", sized),
        ("phi", "Phi", GROUPED),
        ("phi3", "Phi3", GROUPED),
        ("phimoe", "Phimoe", GROUPED | {"num_local_experts": 4, "intermediate_size": 40}),
        ("stablelm", "StableLm", GROUPED),
        ("olmo", "Olmo", GROUPED),
        ("olmo2", "Olmo2", GROUPED),
        ("olmoe", "Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
        ("cohere", "Cohere", GROUPED),
        ("cohere2", "Cohere2", GROUPED),
        ("granite", "Granite", GROUPED),
        ("granitemoe", "GraniteMoe", GROUPED | {"num_local_experts": 4, "intermediate_size": 40}),
        ("starcoder2", "Starcoder2", GROUPED),
        ("smollm3", "SmolLM3", GROUPED),
        ("persimmon", "Persimmon", SIZES | SPECIAL),
        ("nemotron", "Nemotron", GROUPED),
        ("glm", "Glm", sized),
        ("glm4", "Glm4", sized),
        ("helium", "Helium", sized),
        ("exaone4", "Exaone4", GROUPED | {"sliding_window": 16}),
        ("ernie4-5", "Ernie4_5", sized),
        ("seed-oss", "SeedOss", sized),
        ("arcee", "Arcee", GROUPED),
        ("bitnet", "BitNet", GROUPED),
        ("biogpt", "BioGpt", SIZES | SPECIAL),
        (
            "xglm",
            "XGLM",
            {
                "vocab_size": 101,
                "d_model": 96,
                "ffn_dim": 176,
                "num_layers": 2,
                "attention_heads": 6,
            },
        ),
        (
            "mamba",
            "Mamba",
            {"vocab_size": 101, "hidden_size": 96, "num_hidden_layers": 2, "state_size": 8},
        ),
        (
            "falcon-mamba",
            "FalconMamba",
            {"vocab_size": 101, "hidden_size": 96, "num_hidden_layers": 2, "state_size": 8},
        ),
        ("mamba2", "Mamba2", MAMBA2),
        (
            "rwkv",
            "Rwkv",
            {
                "vocab_size": 101,
                "hidden_size": 96,
                "attention_hidden_size": 96,
                "num_hidden_layers": 2,
                "intermediate_size": 176,
            },
        ),
        (
            "recurrent-gemma",
            "RecurrentGemma",
            GROUPED
            | {
                "lru_width": 96,
                "block_types": ["recurrent", "attention"],
                "attention_window_size": 16,
            },
        ),
        (
            "jamba",
            "Jamba",
            GROUPED
            | {
                "num_experts": 2,
                "attn_layer_offset": 1,
                "attn_layer_period": 2,
                "expert_layer_period": 2,
                "expert_layer_offset": 1,
                "mamba_d_state": 8,
                "use_mamba_kernels": False,
            },
        ),
        ("openai-gpt", "OpenAIGPT", GPT),
    )
    uncached = {"mamba", "falcon-mamba", "mamba2", "rwkv"}
    for name, prefix, fields in same:
        head = "LMHeadModel" if name == "openai-gpt" else "ForCausalLM"
        inputs = _uncached if name in uncached else _decoder_inputs
        if name == "openai-gpt":
            inputs = _encoder_inputs
        yield name, f"{prefix}{head}", f"{prefix}Config", fields, inputs
    yield "gpt2", "GPT2LMHeadModel", "GPT2Config", GPT, _decoder_inputs
    yield "gemma3", "Gemma3ForCausalLM", "Gemma3TextConfig", sized, _decoder_inputs
    # A classifier whose head reads the last token, as many fine-tune decoders.
    yield "gpt2-classifier", "GPT2ForSequenceClassification", "GPT2Config", GPT, _decoder_inputs
    classifier = "LlamaForSequenceClassification"
    yield "llama-classifier", classifier, "LlamaConfig", GROUPED, _decoder_inputs


GPT_NEO: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,
    "num_layers": 2,
    "num_heads": 6,
    "intermediate_size": 176,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    **SPECIAL,
}
MAMBA2: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "state_size": 8,
    "num_heads": 12,
    "head_dim": 16,
    "n_groups": 2,
    "chunk_size": 4,
    **SPECIAL,
}


def _seq2seq() -> Iterator[Row]:
    """Encoder-decoders: name, classes, fields, inputs."""
    generation = "ForConditionalGeneration"
    for name, prefix in (("t5", "T5"), ("mt5", "MT5"), ("umt5", "UMT5"), ("longt5", "LongT5")):
        fields: dict[str, Any] = T5 | {"local_radius": 3} if name == "longt5" else T5
        yield name, f"{prefix}{generation}", f"{prefix}Config", fields, _seq2seq_inputs
    switch = T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    yield (
        "switch-transformers",
        f"SwitchTransformers{generation}",
        "SwitchTransformersConfig",
        switch,
        _seq2seq_inputs,
    )
    for name, prefix, head in (
        ("bart", "Bart", generation),
        ("mbart", "MBart", generation),
        ("pegasus", "Pegasus", generation),
        ("marian", "Marian", "MTModel"),
        ("m2m-100", "M2M100", generation),
        ("plbart", "PLBart", generation),
        ("blenderbot", "Blenderbot", generation),
    ):
        yield name, f"{prefix}{head}", f"{prefix}Config", SEQ2SEQ, _seq2seq_inputs
    led = SEQ2SEQ | {"attention_window": 8}
    yield "led", f"LED{generation}", "LEDConfig", led, partial(_seq2seq_inputs, 16)
    bart = "BartForSequenceClassification"
    yield "bart-classifier", bart, "BartConfig", SEQ2SEQ, partial(_with_end, 7)
    prophet = {
        "vocab_size": 101,
        "hidden_size": 96,
        "encoder_ffn_dim": 176,
        "decoder_ffn_dim": 176,
        "num_encoder_layers": 2,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 6,
        "num_decoder_attention_heads": 6,
    }
    name = f"ProphetNet{generation}"
    yield "prophetnet", name, "ProphetNetConfig", prophet, _seq2seq_inputs


def _with_end(length: int) -> Inputs:
    """Token numbers that end with the end token, which the head of Bart looks for."""
    ids = tokens(length)
    ids[:, -1] = 2
    return Inputs(kwargs={"input_ids": ids, "use_cache": False})


def text_models() -> Iterator[ZooModel]:
    """All text models."""
    for rows in (_encoders(), _decoders(), _seq2seq()):
        for name, model, config, fields, inputs in rows:
            build = partial(transformer, model, config, fields)
            yield ZooModel(name, "transformers", build, inputs)
