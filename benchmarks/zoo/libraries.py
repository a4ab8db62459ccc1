"""Classifiers, segmentation and detection of torchvision, and families of timm."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.models import Inputs, ZooModel, image

__all__ = ["timm_models", "torchvision_models"]

FAMILIES: dict[str, int] = {
    "resnet10t": 64,
    "resnext26ts": 64,
    "resnetv2_18": 64,
    "res2net50_14w_8s": 64,
    "resnest14d": 64,
    "seresnet18": 64,
    "skresnet18": 64,
    "ecaresnet26t": 64,
    "densenet121": 64,
    "dla46_c": 64,
    "dpn48b": 64,
    "efficientnet_lite0": 64,
    "mobilenetv3_small_050": 64,
    "mobilenetv4_conv_small_035": 64,
    "mnasnet_small": 64,
    "fbnetc_100": 64,
    "ghostnet_050": 64,
    "hrnet_w18_small": 64,
    "mixnet_s": 64,
    "rexnetr_100": 64,
    "repvgg_a0": 64,
    "selecsls42": 64,
    "tinynet_e": 64,
    "ese_vovnet19b_slim_dw": 64,
    "xception41": 64,
    "inception_resnet_v2": 96,
    "regnetx_002": 64,
    "nf_regnet_b0": 64,
    "cspresnet50": 64,
    "convnext_atto": 64,
    "convnextv2_atto": 64,
    "vit_tiny_patch16_224": 64,
    "deit_tiny_distilled_patch16_224": 64,
    "beit_base_patch16_224": 64,
    "eva02_tiny_patch14_224": 56,
    "cait_xxs24_224": 64,
    "coat_lite_tiny": 224,
    "coatnet_nano_rw_224": 224,
    "convit_tiny": 64,
    "crossvit_tiny_240": 240,
    "edgenext_xx_small": 64,
    "efficientformer_l1": 224,
    "efficientvit_b0": 64,
    "fastvit_t8": 64,
    "focalnet_tiny_srf": 64,
    "inception_next_atto": 64,
    "levit_128s": 224,
    "maxvit_rmlp_pico_rw_256": 256,
    "mixer_s32_224": 64,
    "mobilevit_xxs": 64,
    "mobilevitv2_050": 64,
    "mvitv2_tiny": 64,
    "pit_ti_224": 64,
    "poolformerv2_s12": 64,
    "pvt_v2_b0": 64,
    "repvit_m0_9": 64,
    "resmlp_12_224": 64,
    "sequencer2d_s": 224,
    "swin_tiny_patch4_window7_224": 64,
    "swinv2_tiny_window8_256": 64,
    "tiny_vit_5m_224": 64,
    "tnt_s_legacy_patch16_224": 64,
    "twins_pcpvt_small": 224,
    "visformer_tiny": 224,
    "volo_d1_224": 64,
    "xcit_nano_12_p16_224": 64,
    "davit_tiny": 64,
    "starnet_s1": 64,
    "mambaout_femto": 64,
}
"""A small member of each family of timm, and the size of its images."""

RESIZED = ("vit_", "deit", "beit", "eva02", "cait", "convit", "mixer", "mvitv2", "resmlp")
RESIZED_TOO = ("swin", "tnt", "volo", "pit_")


def _images(size: int) -> Inputs:
    return Inputs((image(size),))


def _classifier(name: str, **options: Any) -> nn.Module:
    found: nn.Module = importlib.import_module("torchvision.models").get_model(
        name, weights=None, **options
    )
    return found


def _two_layers(name: str, size: int) -> nn.Module:
    """A large vision transformer with its first two layers; it never exists whole."""
    with torch.device("meta"):
        model = _classifier(name, image_size=size)
    encoder: Any = model.encoder
    encoder.layers = encoder.layers[:2]
    return model.to_empty(device="cpu")


def _largest_regnet() -> nn.Module:
    """The widths of regnet_y_128gf with a block in every stage."""
    regnet = importlib.import_module("torchvision.models.regnet")
    widths = [528, 1056, 2904, 7392]
    blocks = regnet.BlockParams([1] * 4, widths, [264] * 4, [1.0] * 4, [2] * 4, se_ratio=0.25)
    found: nn.Module = regnet.RegNet(blocks)
    return found


def torchvision_models() -> Iterator[ZooModel]:
    """All classifiers, three for segmentation, two detectors; none without torchvision."""
    if importlib.util.find_spec("torchvision") is None:
        return
    models = importlib.import_module("torchvision.models")
    giants = {"vit_h_14": 56, "vit_l_16": 64, "vit_l_32": 64}
    for name in models.list_models(module=models):
        if name in giants:
            build = partial(_two_layers, name, giants[name])
            inputs = partial(_images, giants[name])
            yield ZooModel(name, "torchvision", build, inputs, "two layers")
            continue
        if name == "regnet_y_128gf":
            note = "one block a stage"
            yield ZooModel(name, "torchvision", _largest_regnet, partial(_images, 64), note)
            continue
        size = {"inception_v3": 96, "maxvit_t": 224}.get(name, 64)
        options = {"image_size": size} if name.startswith("vit") else {}
        if name in ("inception_v3", "googlenet"):
            options = {"init_weights": False}
        build = partial(_classifier, name, **options)
        yield ZooModel(name, "torchvision", build, partial(_images, size))
    for name in ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        build = partial(_classifier, name, weights_backbone=None)
        yield ZooModel(name, "torchvision", build, partial(_images, 64))
    for name in ("ssdlite320_mobilenet_v3_large", "retinanet_resnet50_fpn"):
        build = partial(_classifier, name, weights_backbone=None)
        yield ZooModel(name, "torchvision", build, _list_of_images)


def _list_of_images() -> Inputs:
    return Inputs(([*torch.rand(2, 3, 64, 64)],))


def _family(name: str, size: int) -> nn.Module:
    options = {"img_size": size} if name.startswith(RESIZED + RESIZED_TOO) else {}
    found: nn.Module = importlib.import_module("timm").create_model(name, **options)
    return found


def timm_models() -> Iterator[ZooModel]:
    """A small member of each family; none without timm."""
    if importlib.util.find_spec("timm") is not None:
        for name, size in FAMILIES.items():
            build = partial(_family, name, size)
            yield ZooModel(f"timm/{name}", "timm", build, partial(_images, size))
