"""Tables of names of Hugging Face image encoders."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_mi_prune.discovery.families.names import FamilyNames, HeadNames, LayerNames

__all__ = [
    "VISION",
]

_CLASSIFIER = HeadNames(consumers=("classifier",))


def _vit(classes: str, heads: Mapping[str, HeadNames], tokens: tuple[str, ...] = ()) -> FamilyNames:
    return FamilyNames(
        classes=classes,
        layer=LayerNames(
            attention="attention",
            query="attention.q_proj",
            key="attention.k_proj",
            value="attention.v_proj",
            out="attention.o_proj",
            ffn_in="mlp.fc1",
            ffn_out="mlp.fc2",
            residual_inputs=("layernorm_before", "layernorm_after"),
            norms=("layernorm_before", "layernorm_after"),
            head_size="head_dim",
            width=None,
        ),
        heads={"Model": HeadNames(), **heads},
        stack=("layers",),
        embeddings=(),
        embedding_norm=None,
        tokens=(
            "embeddings.cls_token",
            "embeddings.mask_token",
            *tokens,
            "embeddings.position_embeddings",
        ),
        patches="embeddings.patch_embeddings.projection",
        norms=("layernorm",),
        free_pooler=True,
        head_size="head_dim",
    )


VISION: dict[str, FamilyNames] = {
    "vit": _vit("ViT", {"ForImageClassification": _CLASSIFIER}),
    "deit": _vit(
        "DeiT",
        {
            "ForImageClassification": _CLASSIFIER,
            "ForImageClassificationWithTeacher": HeadNames(
                consumers=("cls_classifier", "distillation_classifier")
            ),
        },
        tokens=("embeddings.distillation_token",),
    ),
}
