"""Tables of a transformer family: the paths of the parts of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "FamilyNames",
    "HeadNames",
    "LayerNames",
]


@dataclass(frozen=True)
class LayerNames:
    """Paths of the parts of one layer, from the layer.

    Args:
        attention: Module with the number of heads; its ``forward`` is replaced without heads.
        query: Projection of the queries.
        key: Projection of the keys.
        value: Projection of the values.
        out: Linear module that reads the heads.
        ffn_in: Linear module that produces the neurons.
        ffn_out: Linear module that reads them.
        residual_inputs: Modules whose input is the residual stream, for heads and neurons.
        norms: Normalisations over the stream.
        positions: Further projections of the heads, of relative positions, if the layer has them.
        heads: Attribute of ``attention`` with the number of heads.
        head_size: Attribute of ``attention`` with the size of a head.
        width: Attribute of ``attention`` with the product of both.
        rotatable: Whether queries and keys are only used in their product, so that the dimensions
            of heads can be rotated.
        rescaled: Whether attention divides by the root of the present head size.
        hidden: Attribute of ``attention`` with the width of the stream.
        unit_argument: Argument of ``attention`` with an entry for every head as built.
        dropout: Dropout behind ``out``, if ``attention`` calls it.
        norm: Normalisation behind ``dropout``, if ``attention`` calls it.
    """

    attention: str
    query: str
    key: str
    value: str
    out: str
    ffn_in: str
    ffn_out: str
    residual_inputs: tuple[str, str]
    norms: tuple[str, ...]
    positions: tuple[str, ...] = ()
    heads: str = "num_attention_heads"
    head_size: str = "attention_head_size"
    width: str | None = "all_head_size"
    rotatable: bool = True
    rescaled: bool = False
    hidden: str | None = None
    unit_argument: str | None = None
    dropout: str | None = None
    norm: str | None = None


@dataclass(frozen=True)
class HeadNames:
    """Paths of the parts above an encoder, from the network.

    Args:
        consumers: Linear modules that read the last hidden state.
        pooler: Two dense layers: the units between them can be cut.
        transform: Dense layer, normalisation and decoder (or None) of a masked-LM head. The
            decoder's weight is tied to the word embeddings, so its inputs are hidden units too.
        square: Whether a layer in ``consumers`` has as many outputs as the hidden size in the
            config, in no group: the config must then stay as built.
    """

    consumers: tuple[str, ...] = ()
    pooler: tuple[str, str] | None = None
    transform: tuple[str, str, str | None] | None = None
    square: bool = False


@dataclass(frozen=True)
class FamilyNames:
    """Paths of the parts of an encoder, from the encoder.

    Args:
        classes: Common prefix of the class names.
        layer: Parts of a layer.
        heads: Parts above the encoder, by the rest of the class name.
        stack: List of layers; the second name is that of a list in each item of the first.
        repeats: Whether one item of the stack runs many times.
        embeddings: Embedding modules, if they exist.
        embedding_norm: Normalisation over the embeddings, of their own width.
        projection: Linear module from the width of the embeddings to the hidden size; with it,
            the embeddings are not part of the residual stream.
        positions: Embedding module that always has the hidden size, if it exists.
        tokens: Parameters whose last dimension has the hidden size.
        patches: Convolution that produces the residual stream.
        mixer: Convolution over positions that reads the residual stream and adds to it.
        norms: Normalisations over the residual stream outside the layers, if they exist.
        pooler: Linear module in the encoder that reads the last hidden state, if it exists.
        free_pooler: Whether the config has a separate width for it.
        hidden: Config field of the hidden size.
        ffn_width: Config field of the number of neurons.
        head_count: Config field of the number of heads; None if it is not enough.
        head_size: Config field that, if present, makes heads independent of the hidden size.
        config_aliases: Config fields that must equal ``hidden`` if they do as built.
    """

    classes: str
    layer: LayerNames
    heads: Mapping[str, HeadNames] = field(default_factory=dict)
    stack: tuple[str, ...] = ("encoder.layer",)
    repeats: bool = False
    embeddings: tuple[str, ...] = (
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
    )
    embedding_norm: str | None = "embeddings.LayerNorm"
    projection: str | None = None
    positions: str | None = None
    tokens: tuple[str, ...] = ()
    patches: str | None = None
    mixer: str | None = None
    norms: tuple[str, ...] = ()
    pooler: str | None = "pooler.dense"
    free_pooler: bool = False
    hidden: str = "hidden_size"
    ffn_width: str = "intermediate_size"
    head_count: str | None = "num_attention_heads"
    head_size: str | None = None
    config_aliases: tuple[str, ...] = ()
