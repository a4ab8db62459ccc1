"""Hugging Face encoders: one table of names a family, no tracing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lightning_mi_prune.axes import Count, WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families.describe import linear_axis

__all__ = ["MODEL_TYPES", "describe", "matches", "nearest_unknown"]


@dataclass(frozen=True)
class _Names:
    """Where the parts of one layer are, seen from the layer; the stack is seen from the encoder."""

    stack: str
    query: str
    key: str
    value: str
    attention_out: str
    ffn_in: str
    ffn_out: str
    ffn_width: str
    heads: tuple[str, str]
    entries: tuple[str, str] | None


@dataclass(frozen=True)
class _Head:
    """Two dense layers above the encoder: the units between them can be cut."""

    producer: str
    reader: str


_BERT = _Names(
    stack="encoder.layer",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    ffn_width="intermediate_size",
    heads=("attention.self", "num_attention_heads"),
    entries=("attention.self", "all_head_size"),
)
_DISTILBERT = _Names(
    stack="transformer.layer",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_out="attention.out_lin",
    ffn_in="ffn.lin1",
    ffn_out="ffn.lin2",
    ffn_width="hidden_dim",
    heads=("attention", "n_heads"),
    entries=None,
)
_DENSE_HEAD = _Head("classifier.dense", "classifier.out_proj")

MODEL_TYPES: dict[str, _Names] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
}
# Masked-LM, token and question heads read the residual stream itself: no units of their own.
_HEADS: dict[str, _Head] = {
    "BertForSequenceClassification": _Head("bert.pooler.dense", "classifier"),
    "RobertaForSequenceClassification": _DENSE_HEAD,
    "XLMRobertaForSequenceClassification": _DENSE_HEAD,
    "ElectraForSequenceClassification": _DENSE_HEAD,
    "DistilBertForSequenceClassification": _Head("pre_classifier", "classifier"),
}


def _model_type(module: nn.Module) -> str | None:
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return kind if isinstance(kind, str) and hasattr(module, "base_model_prefix") else None


def _base(network: nn.Module) -> tuple[str, nn.Module]:
    prefix = str(getattr(network, "base_model_prefix", ""))
    inner = getattr(network, prefix, None)
    return (prefix, inner) if isinstance(inner, nn.Module) else ("", network)


def matches(module: nn.Module) -> bool:
    """Whether the module is a Hugging Face model of a known family, with or without a head."""
    kind = _model_type(module)
    if kind not in MODEL_TYPES:
        return False
    _, base = _base(module)
    try:
        base.get_submodule(MODEL_TYPES[kind].stack)
    except AttributeError:
        return False
    return True


def nearest_unknown(module: nn.Module) -> nn.Module | None:
    """The first Hugging Face model inside that no table describes."""
    strangers = (m for m in module.modules() if _model_type(m) is not None and not matches(m))
    return next(strangers, None)


def describe(network: nn.Module) -> list[WidthAxis]:
    """Axes of one network: FFN neurons and heads of every layer, and the head's units.

    Raises:
        PruningError: If a layer is not a plain ``nn.Linear`` or its widths disagree.
    """
    prefix, base = _base(network)
    names = MODEL_TYPES[str(_model_type(network))]
    dot = f"{prefix}." if prefix else ""
    layers = base.get_submodule(names.stack)
    if getattr(network.config, "chunk_size_feed_forward", 0):
        raise PruningError(
            f"{type(network).__name__} cuts its sequences into chunks, where padding cannot be "
            "told from text. Set config.chunk_size_feed_forward=0 when the model is built."
        )
    axes: list[WidthAxis] = []
    seen: set[int] = set()
    for index, layer in enumerate(layers._modules.values()):
        if layer is None or id(layer) in seen:  # a layer that stands twice is one set of axes
            continue
        seen.add(id(layer))
        path = f"{dot}{names.stack}.{index}"
        axes += _layer_axes(network, layer, path, names, scope=prefix, level=2 * index)
    head = _HEADS.get(type(network).__name__)
    if head is not None:
        axes.append(
            linear_axis(
                network,
                "pooler",
                kind="pooler",
                producers=[head.producer],
                readers=[head.reader],
                scope=prefix,
                level=2 * len(axes),
            )
        )
    return axes


def _layer_axes(
    network: nn.Module, layer: nn.Module, path: str, names: _Names, *, scope: str, level: int
) -> list[WidthAxis]:
    attention, attribute = names.heads
    entries = int(layer.get_submodule(attention).attention_head_size)  # type: ignore[arg-type]
    counts = [Count(f"{path}.{attention}", attribute)]
    if names.entries is not None:
        counts.append(Count(f"{path}.{names.entries[0]}", names.entries[1], entries))
    heads = linear_axis(
        network,
        f"{path}.heads",
        kind="heads",
        producers=[f"{path}.{part}" for part in (names.query, names.key, names.value)],
        readers=[f"{path}.{names.attention_out}"],
        entries=entries,
        counts=counts,
        scope=scope,
        level=level,
    )
    ffn = linear_axis(
        network,
        f"{path}.ffn",
        kind="ffn",
        producers=[f"{path}.{names.ffn_in}"],
        readers=[f"{path}.{names.ffn_out}"],
        scope=scope,
        config=names.ffn_width,
        level=level + 1,
    )
    return [heads, ffn]
