"""Vision, audio and mixed models of transformers: tiny configurations with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks.zoo.models import Inputs, ZooModel, image, tokens
from benchmarks.zoo.text import SEQ2SEQ, SIZES, transformer

__all__ = ["media_models"]

LAYERS = {name: SIZES[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
PATCHES = SIZES | {"image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [24, 40], "depths": [2, 2], "num_stages": 2, "patch_size": 2}
SPEECH: dict[str, Any] = {
    **SIZES,
    "vocab_size": 30,
    "conv_dim": (32, 48),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def _pixels(size: int = 32) -> Inputs:
    return Inputs(kwargs={"pixel_values": image(size)})


def _waves() -> Inputs:
    return Inputs(kwargs={"input_values": torch.randn(2, 400)})


def _spectrum() -> Inputs:
    features, ids = torch.randn(2, 20, 100), tokens()
    named = {"input_features": features, "decoder_input_ids": ids, "use_cache": False}
    return Inputs(kwargs=named)


def _both() -> Inputs:
    ids = tokens()
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image()}
    return Inputs(kwargs=named)


def _text_only() -> Inputs:
    ids = tokens()
    ids[:, -1] = 2
    return Inputs(kwargs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})


Row = tuple[str, str, str, Mapping[str, Any], Callable[[], Inputs]]


def _classifiers() -> Iterator[Row]:
    """Image classifiers: name, prefix of the classes, fields, inputs."""
    swin = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32}
    windows = swin | {"patch_size": 2, "window_size": 4}
    resnet = {"embedding_size": 16, "depths": [2, 2]}
    segformer = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "decoder_hidden_size": 32,
    }
    pvt = {
        "image_size": 64,
        "num_encoder_blocks": 4,
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 32, 48, 64],
        "num_attention_heads": [1, 2, 3, 4],
        "mlp_ratios": [2, 2, 2, 2],
        "strides": [4, 2, 2, 2],
    }
    mobilevit = {"image_size": 64, "hidden_sizes": [24, 32, 40], "num_attention_heads": 4}
    rows = (
        ("vit", "ViT", PATCHES, 32),
        ("deit", "DeiT", PATCHES, 32),
        ("beit", "Beit", PATCHES, 32),
        ("data2vec-vision", "Data2VecVision", PATCHES, 32),
        ("dinov2", "Dinov2", LAYERS | {"image_size": 32, "patch_size": 8}, 32),
        (
            "dinov2-registers",
            "Dinov2WithRegisters",
            LAYERS | {"image_size": 32, "patch_size": 8},
            32,
        ),
        ("ijepa", "IJepa", PATCHES, 32),
        ("vit-msn", "ViTMSN", PATCHES, 32),
        ("swin", "Swin", windows, 32),
        ("swinv2", "Swinv2", windows, 32),
        ("convnext", "ConvNext", STAGES, 32),
        ("convnextv2", "ConvNextV2", STAGES, 32),
        (
            "resnet-basic",
            "ResNet",
            resnet | {"hidden_sizes": [16, 24], "layer_type": "basic"},
            32,
        ),
        (
            "resnet-bottleneck",
            "ResNet",
            resnet | {"hidden_sizes": [64, 96], "layer_type": "bottleneck"},
            32,
        ),
        (
            "regnet",
            "RegNet",
            {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "groups_width": 16},
            32,
        ),
        (
            "bit",
            "Bit",
            {"embedding_size": 16, "hidden_sizes": [64, 96], "depths": [1, 1], "num_groups": 4},
            32,
        ),
        ("mobilenet-v1", "MobileNetV1", {"image_size": 32, "depth_multiplier": 0.25}, 32),
        ("mobilenet-v2", "MobileNetV2", {"image_size": 32, "depth_multiplier": 0.35}, 32),
        (
            "mobilevit",
            "MobileViT",
            mobilevit | {"neck_hidden_sizes": [8, 12, 16, 24, 32, 40, 80]},
            64,
        ),
        ("mobilevitv2", "MobileViTV2", {"image_size": 64, "width_multiplier": 0.25}, 64),
        (
            "efficientnet",
            "EfficientNet",
            {
                "image_size": 32,
                "width_coefficient": 0.25,
                "depth_coefficient": 0.25,
                "hidden_dim": 320,
            },
            32,
        ),
        ("segformer", "Segformer", segformer, 32),
        (
            "pvt",
            "Pvt",
            pvt | {"patch_sizes": [4, 2, 2, 2], "sequence_reduction_ratios": [8, 4, 2, 1]},
            64,
        ),
        (
            "pvt-v2",
            "PvtV2",
            pvt | {"patch_sizes": [7, 3, 3, 3], "sr_ratios": [8, 4, 2, 1]},
            64,
        ),
        (
            "poolformer",
            "PoolFormer",
            {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
            64,
        ),
        (
            "levit",
            "Levit",
            {
                "image_size": 64,
                "hidden_sizes": [32, 48, 64],
                "num_attention_heads": [2, 3, 4],
                "depths": [1, 1, 1],
                "key_dim": [16, 16, 16],
            },
            64,
        ),
        ("cvt", "Cvt", {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]}, 64),
        (
            "focalnet",
            "FocalNet",
            {
                "image_size": 32,
                "embed_dim": 16,
                "depths": [1, 1],
                "focal_levels": [2, 2],
                "focal_windows": [3, 3],
                "patch_size": 4,
            },
            32,
        ),
        (
            "swiftformer",
            "SwiftFormer",
            {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 48]},
            64,
        ),
        (
            "hiera",
            "Hiera",
            {
                "image_size": [32, 32],
                "embed_dim": 16,
                "depths": [1, 1, 1, 1],
                "num_heads": [1, 2, 4, 8],
                "patch_size": [3, 3],
                "patch_stride": [2, 2],
                "patch_padding": [1, 1],
                "masked_unit_size": [8, 8],
                "query_stride": [2, 2],
            },
            32,
        ),
        (
            "textnet",
            "TextNet",
            {
                "image_size": [64, 64],
                "conv_layer_kernel_sizes": [[[3, 3]], [[3, 3]], [[3, 1]], [[1, 3]]],
                "conv_layer_strides": [[2], [2], [2], [2]],
                "hidden_sizes": [16, 16, 24, 32, 40],
                "stem_num_channels": 3,
                "stem_out_channels": 16,
            },
            64,
        ),
    )
    for name, prefix, fields, size in rows:
        model = f"{prefix}ForImageClassification"
        yield name, model, f"{prefix}Config", fields, partial(_pixels, size)


def _others() -> Iterator[Row]:
    """Audio, reconstruction, detection, segmentation."""
    for name, prefix in (
        ("wav2vec2", "Wav2Vec2"),
        ("hubert", "Hubert"),
        ("wavlm", "WavLM"),
        ("unispeech", "UniSpeech"),
        ("sew", "SEW"),
        ("data2vec-audio", "Data2VecAudio"),
    ):
        fields = dict(SPEECH)
        if name == "sew":
            fields |= {"squeeze_factor": 2}
        if name == "data2vec-audio":
            fields |= {"conv_pos_kernel_size": 5, "num_conv_pos_embeddings": 2}
        model = f"{prefix}ForSequenceClassification"
        yield name, model, f"{prefix}Config", fields, _waves
    ctc = "Wav2Vec2ForCTC"
    yield "wav2vec2-ctc", ctc, "Wav2Vec2Config", {**SPEECH, "pad_token_id": 0}, _waves
    whisper = SEQ2SEQ | {"num_mel_bins": 20, "max_source_positions": 50}
    generation = "WhisperForConditionalGeneration"
    yield "whisper", generation, "WhisperConfig", whisper, _spectrum
    spectrogram = SIZES | {"patch_size": 4, "max_length": 32, "num_mel_bins": 16}
    audio = partial(_named, "input_values", (2, 32, 16))
    classifier = "ASTForAudioClassification"
    yield "ast", classifier, "ASTConfig", spectrogram, audio
    mae = PATCHES | {
        "decoder_num_attention_heads": 4,
        "decoder_hidden_size": 64,
        "decoder_num_hidden_layers": 1,
        "decoder_intermediate_size": 80,
        "mask_ratio": 0.5,
    }
    yield "vit-mae", "ViTMAEForPreTraining", "ViTMAEConfig", mae, _masked_pixels
    segmentation = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "decoder_hidden_size": 32,
    }
    mask = "SegformerForSemanticSegmentation"
    yield "segformer-segmentation", mask, "SegformerConfig", segmentation, _pixels
    detr = {"num_queries": 5, "hidden_size": 96, "image_size": [32, 32], "patch_size": 8}
    objects = "YolosForObjectDetection"
    yield "yolos", objects, "YolosConfig", {**SIZES, **detr, "num_detection_tokens": 5}, _pixels
    depth = PATCHES | {
        "num_hidden_layers": 4,
        "reassemble_factors": [4, 2, 1, 0.5],
        "backbone_out_indices": [0, 1, 2, 3],
    }
    depth |= {"neck_hidden_sizes": [16, 24, 32, 40], "fusion_hidden_size": 24, "is_hybrid": False}
    yield "dpt", "DPTForDepthEstimation", "DPTConfig", depth, _pixels


def _masked_pixels() -> Inputs:
    """The noise fixes which patches are masked."""
    return Inputs(kwargs={"pixel_values": image(), "noise": torch.rand(2, 16)})


def _named(name: str, shape: tuple[int, ...]) -> Inputs:
    return Inputs(kwargs={name: torch.randn(shape)})


def _pair(model: str, config: str, text: Mapping[str, Any]) -> nn.Module:
    """A model with a tower for text and one for images."""
    towers = {"text_config": dict(text), "vision_config": dict(PATCHES)}
    if config == "CLIPConfig":
        towers["projection_dim"] = 48  # type: ignore[assignment]
    settings = getattr(transformers, config)(**towers)
    found: nn.Module = getattr(transformers, model)(settings)
    return found


def _towers() -> Iterator[ZooModel]:
    """Models of text and images, and their towers."""
    text = SIZES | {"max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
    text |= {"pad_token_id": 0, "projection_dim": 48}
    vision = {**PATCHES, "projection_dim": 48}
    rows: tuple[Row, ...] = (
        ("clip-text", "CLIPTextModelWithProjection", "CLIPTextConfig", text, _text_only),
        ("clip-vision", "CLIPVisionModelWithProjection", "CLIPVisionConfig", vision, _pixels),
        ("clip-classifier", "CLIPForImageClassification", "", {}, _pixels),
        ("clip", "CLIPModel", "CLIPConfig", text, _both),
        ("siglip", "SiglipModel", "SiglipConfig", text, _both),
        ("siglip-classifier", "SiglipForImageClassification", "", {}, _pixels),
        ("blip", "BlipForImageTextRetrieval", "BlipConfig", text, _both),
        ("chinese-clip", "ChineseCLIPModel", "ChineseCLIPConfig", text, _both),
        (
            "vilt",
            "ViltForQuestionAnswering",
            "ViltConfig",
            PATCHES | {"max_position_embeddings": 16, "num_labels": 3},
            _both,
        ),
    )
    for name, model, config, fields, inputs in rows:
        if name in ("clip", "siglip", "blip", "chinese-clip"):
            build = partial(_pair, model, config, fields)
        elif name in ("clip-classifier", "siglip-classifier"):
            kind = "CLIPConfig" if name == "clip-classifier" else "SiglipConfig"
            build = partial(_pair, model, kind, text)
        else:
            build = partial(transformer, model, config, fields)
        yield ZooModel(name, "transformers", build, inputs)
    yield ZooModel("detr", "transformers", _detr, partial(_pixels, 64))


def _detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 24],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],
    )
    fields = {name: value for name, value in SEQ2SEQ.items() if not name.endswith("token_id")}
    settings = transformers.DetrConfig(
        **fields,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        num_queries=5,
    )
    found: nn.Module = transformers.DetrForObjectDetection(settings)
    return found


def media_models() -> Iterator[ZooModel]:
    """All vision, audio and mixed models."""
    for rows in (_classifiers(), _others()):
        for name, model, config, fields, inputs in rows:
            build = partial(transformer, model, config, fields)
            yield ZooModel(name, "transformers", build, inputs)
    yield from _towers()
