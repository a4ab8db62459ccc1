"""What a table of a transformer family says: where the parts of a network are."""

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
    """Where the parts of one layer are, seen from the layer.

    Args:
        attention: Module that counts the heads, and stands in when there are none.
        query: Projection of the queries.
        key: Projection of the keys.
        value: Projection of the values; first of its site, since nothing else ever passes it.
        out: Linear module that reads the heads.
        ffn_in: Linear module that makes the neurons.
        ffn_out: Linear module that reads them.
        skips: Modules whose input is the stream that is added to what heads and neurons say.
        norms: Normalisations over the stream.
        positions: Further projections of the heads, where the layer has them; they read a stream
            of their own, of positions.
        heads: Attribute of ``attention`` with the number of heads.
        head_size: Attribute of ``attention`` with the size of a head.
        width: Attribute of ``attention`` with the product of both.
        turns: Whether nothing but the product of queries and keys is seen of them, so that the
            dimensions of heads can be rotated.
        rescales: Whether attention divides by the root of the size that a head has now.
        hidden: Attribute of ``attention`` with the width of the stream.
        selects: Argument of ``attention`` that brings something for every head as built.
        dropout: What ``attention`` drops out with behind ``out``, where it holds the norm too.
        norm: The normalisation that ``attention`` holds itself.
    """

    attention: str
    query: str
    key: str
    value: str
    out: str
    ffn_in: str
    ffn_out: str
    skips: tuple[str, str]
    norms: tuple[str, ...]
    positions: tuple[str, ...] = ()
    heads: str = "num_attention_heads"
    head_size: str = "attention_head_size"
    width: str | None = "all_head_size"
    turns: bool = True
    rescales: bool = False
    hidden: str | None = None
    selects: str | None = None
    dropout: str | None = None
    norm: str | None = None


@dataclass(frozen=True)
class HeadNames:
    """What stands above an encoder, seen from the network.

    Args:
        reads: Linear modules that read the last state of the stream, each its own input.
        pooler: Two dense layers: the units between them can be cut.
        transform: The dense layer (it reads the stream), the normalisation and the decoder of a
            masked-LM head: the decoder's weight is that of the word embeddings, so the units
            between them are those of the stream. The decoder may be missing.
        square: Whether a layer in ``reads`` makes as many units as the config says the stream has,
            without being part of any group: the config must then stay as built.
    """

    reads: tuple[str, ...] = ()
    pooler: tuple[str, str] | None = None
    transform: tuple[str, str, str | None] | None = None
    square: bool = False


@dataclass(frozen=True)
class FamilyNames:
    """Where the parts of an encoder are, seen from the encoder.

    Args:
        classes: What the class names begin with.
        layer: Parts of a layer.
        heads: What stands above the encoder, by the rest of the class name.
        stack: List of layers; the second name is that of a list in each item of the first.
        repeats: Whether one item of the stack runs many times.
        embeddings: Embedding modules, where they exist.
        embedding_norm: Normalisation over the embeddings, of their own width.
        projection: Linear module from the width of the embeddings to that of the stream; where the
            encoder has it, the stream begins there and the embeddings are no part of it.
        positions: Embedding module whose width is that of the stream in any case, if it exists.
        tokens: Parameters whose last dimension is the stream.
        patches: Convolution that makes the stream.
        mixer: Convolution over positions that reads the stream and adds to it.
        norms: Normalisations over the stream outside the layers, where they exist.
        pooler: Linear module in the encoder that reads the last state, where it exists.
        free_pooler: Whether the config has a width of its own for it.
        hidden: Config field of the width of the stream.
        ffn_width: Config field of the number of neurons.
        head_count: Config field of the number of heads; None if heads cannot be said by it.
        head_size: Config field that, where the config has it, frees heads from the stream's width.
        config_aliases: Config fields that must equal ``hidden``, where they do.
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
